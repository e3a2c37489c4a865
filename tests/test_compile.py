"""torch.compile traces every QAT forward without a break, and computes what eager mode computes."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rows import ROWS, Row, attach_quantizers
from torch import Tensor, nn

import eagerq
from eagerq.nn.intrinsic import qat as nniqat
from eagerq.quant import FakeQuantize, QuantSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's own compiler


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_and_eager(q: Any, backend: str = "aot_eager") -> tuple[Any, Any]:
    return torch.compile(copy.deepcopy(q), fullgraph=True, backend=backend), q


def step(module: Any, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    leaf = x.clone().requires_grad_(x.is_floating_point())
    out = module(leaf)
    out.square().sum().backward()
    grads = [leaf.grad, *(p.grad for p in module.parameters())]
    module.zero_grad(set_to_none=True)
    return out.detach(), grads


def assert_agree(compiled: Any, eager: Any, found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    state = eager.state_dict()
    for key, value in compiled.state_dict().items():
        torch.testing.assert_close(value, state[key.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_class_compiles_whole(row: Row) -> None:
    """With the textbook form where there is a transpose with norm, the direct form elsewhere."""
    preset = "per_tensor" if row.norm is not None and row.transposed else "onnxruntime"
    compiled, eager = compiled_and_eager(row.to_qat(row.chain(), preset))
    for seed in (1, 2):
        x = row.input(seed=seed)
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))
    compiled.eval()
    eager.eval()
    with torch.no_grad():
        assert_agree(compiled, eager, compiled(x), eager(x))


@pytest.mark.parametrize("preset", ["onnxruntime", "per_tensor"])
def test_toggles_reach_the_compiled_module(preset: str) -> None:
    row = next(r for r in ROWS if r.name == "ConvBnReLU2d")
    q = row.to_qat(row.chain(), preset)
    attach_quantizers(row, q, preset)
    compiled, eager = compiled_and_eager(q)
    for i, (verb, quantizes, observes, updates) in enumerate(
        (
            (eagerq.disable_fake_quant, False, True, True),
            (eagerq.freeze_bn_stats, False, True, False),
            (eagerq.disable_observer, False, False, False),
            (eagerq.enable_fake_quant, True, False, False),
            (eagerq.update_bn_stats, True, False, True),
        )
    ):
        compiled.apply(verb)
        eager.apply(verb)
        before = copy.deepcopy(eager.state_dict())
        x = row.input(seed=i)
        found, wanted = step(compiled, x), step(eager, x)
        assert_agree(compiled, eager, found, wanted)
        codes = found[0] / eager.activation_post_process.scale
        assert torch.allclose(codes, codes.round(), atol=1e-3) == quantizes
        assert torch.equal(before["activation_post_process.scale"], eager.activation_post_process.scale) != observes
        assert torch.equal(before["bn.running_mean"], eager.bn.running_mean) != updates
    compiled.eval()
    eager.eval()
    with torch.no_grad():
        assert_agree(compiled, eager, compiled(x), eager(x))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C compiler")
def test_inductor_agrees() -> None:
    row = next(r for r in ROWS if r.name == "ConvBnReLU2d")
    q = row.to_qat(row.chain(), "onnxruntime")
    attach_quantizers(row, q, "onnxruntime")
    compiled, eager = compiled_and_eager(q, "inductor")
    found, wanted = compiled(row.input(seed=1)), eager(row.input(seed=1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # no range is known yet
    x = row.input()
    found, wanted = compiled(x), eager(x)
    # another order of float additions may move a value across a rounding boundary: by one code at most, and rarely
    assert float((found - wanted).abs().max()) <= 1.001 * float(eager.activation_post_process.scale)
    assert float(((found - wanted).abs() > 1e-5).float().mean()) < 0.01


def test_a_whole_model_compiles_whole() -> None:
    model = nn.Sequential(
        nniqat.ConvBnReLU2d(3, 4, 3, padding=1),
        nniqat.ConvBn2d(4, 4, 3, groups=2, qconfig="per_tensor"),
        nn.Flatten(),
        nniqat.LinearReLU(4 * 4 * 4, 5),
    )
    for module, spec in ((model[0], QuantSpec()), (model[3], QuantSpec(bits=4, observer="percentile"))):
        module.activation_post_process = FakeQuantize(spec)
    compiled, eager = compiled_and_eager(model)
    for _ in range(2):  # before and after a range is known
        x = torch.randn(4, 3, 6, 6)
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))
