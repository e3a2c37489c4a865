"""The suite over the table: what is found, and that nothing computes or learns otherwise than before."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import timm
import torch
from torch import nn

import eagerq

from .models import ZOO, ZooModel
from .oracle import true_chains

every_model = pytest.mark.parametrize("row", ZOO, ids=lambda row: row.name)


def randomised(row: ZooModel) -> nn.Module:
    """The model in float64 with no default that could hide an error: gammas of both signs, zero and tiny, statistics away
    from 0 and 1, no constant parameter (LayerScale)."""
    torch.manual_seed(0)
    model = timm.create_model(row.name, num_classes=10, **row.options).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for parameter in model.parameters():
        if parameter.dim() == 1 and parameter.numel() > 3:
            nn.init.normal_(parameter, 0.6, 0.4)
            with torch.no_grad():
                parameter[:3] = torch.tensor([0.0, 1e-6, -0.5], dtype=parameter.dtype)
    return model


def batch(row: ZooModel) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 3, row.size, row.size, dtype=torch.float64)


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(2)  # for dropout and stochastic depth
    out = model(x)
    return out if isinstance(out, torch.Tensor) else torch.cat([o.flatten(1) for o in out], 1)


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in eagerq.float_state_dict(model).items() if "running_" in k or "num_batches" in k}


@every_model
def test_the_plan_is_the_table_and_the_oracle(row: ZooModel) -> None:
    model = timm.create_model(row.name, **row.options).train()
    plan = eagerq.plan_fusion(model, example_inputs=batch(row).float() if row.options else None)
    assert Counter(match.fused.__name__ for match in plan.matches) == dict(row.fused)
    if row.traceable:
        assert {match.names for match in plan.matches} == true_chains(copy.deepcopy(model).eval())


@every_model
def test_fusing_changes_no_bit(row: ZooModel) -> None:
    model, x = randomised(row).float(), batch(row).float()
    for training in (False, True):
        float_model = copy.deepcopy(model).train(training)
        fused = eagerq.fuse_modules(float_model, example_inputs=x)
        assert torch.equal(run(fused, x), run(float_model, x))
        for key, value in float_model.state_dict().items():
            assert torch.equal(eagerq.float_state_dict(fused)[key], value), key


@every_model
def test_qat_learns_what_the_float_model_learns(row: ZooModel) -> None:
    """Without fake quantization: output, every gradient and every BN statistic of a training step."""
    model, x = randomised(row).train(), batch(row)
    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x), example_inputs=x)
    qat.apply(eagerq.disable_fake_quant)
    out, expected = run(qat, x), run(model, x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    out.square().mean().backward()
    expected.square().mean().backward()
    for key, value in statistics(model).items():
        torch.testing.assert_close(statistics(qat)[key], value, rtol=1e-10, atol=1e-10, msg=key)
    named = dict(model.named_parameters())
    grads = {id(p): p.grad for p in qat.parameters()}
    keys = eagerq.float_state_dict(qat)
    pointers = {p.data_ptr(): id(p) for p in qat.parameters() if p.numel()}
    for key, parameter in named.items():
        grad = grads[pointers[keys[key].data_ptr()]]
        if parameter.grad is None:
            assert grad is None, key
        else:
            scale = parameter.grad.abs().max().item() + 1e-30
            assert (grad - parameter.grad).abs().max().item() <= 1e-8 * scale, key


@every_model
def test_the_deployed_model_is_the_qat_model_in_eval(row: ZooModel) -> None:
    model, x = randomised(row).float().train(), batch(row).float()
    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x), example_inputs=x)
    optimizer = torch.optim.SGD(qat.parameters(), lr=1e-4)
    out = run(qat, x)
    assert torch.isfinite(out).all()
    out.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in qat.parameters() if p.grad is not None)
    optimizer.step()
    deployed = eagerq.convert(qat)
    with torch.no_grad():
        assert torch.equal(run(deployed, x), run(qat.eval(), x))
