"""A float state_dict, from before fusing, loads at every stage and comes back out under its old keys."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import eagerq


class Wrapper(nn.Module):
    """The model is a part of another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))


def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def nested_after() -> nn.Module:
    """Only the inner model is fused and converted, later the whole is loaded."""
    return Wrapper(timm.create_model("resnet18", num_classes=10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: timm.create_model("resnet18", num_classes=10),
    "mobilenetv3 (norms that hold their activation)": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "densenet (norm + activation before the convolution)": lambda: timm.create_model("densenet121", num_classes=10),
    "tf_efficientnet (padded convolutions)": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=10),
    "wrapped": nested_after,
    "norms that fold into nothing": lambda: nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), timm.layers.BatchNormAct2d(4, apply_act=False), nn.Conv2d(4, 2, 3)
    ),
    "prelu": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 2, 3, bias=False)),
}


def stages(model: nn.Module) -> dict[str, nn.Module]:
    fused = eagerq.fuse_modules(model, example_inputs=image())
    return {"fused": fused, "qat": eagerq.convert_qat(fused)}


def other(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other values under the same keys."""
    torch.manual_seed(3)
    return {k: v * (0.5 + torch.rand_like(v)) if v.is_floating_point() else v + 7 for k, v in state.items()}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str) -> None:
    model = MODELS[name]().train()
    state = other(model.state_dict())
    expected = copy.deepcopy(model)
    expected.load_state_dict(state)
    for stage, changed in stages(model).items():
        assert eagerq.float_state_dict(changed).keys() == state.keys(), stage
        result = changed.load_state_dict(state, strict=True)
        assert (result.missing_keys, result.unexpected_keys) == ([], []), stage
        back = eagerq.float_state_dict(changed)
        for key, value in state.items():
            assert torch.equal(back[key], value), (stage, key)
        if stage == "fused":
            assert torch.equal(changed.eval()(x := image()), expected.eval()(x))


def test_the_inner_model_alone() -> None:
    model = nested_after().train()
    state = other(model.state_dict())
    model.inner = eagerq.convert_qat(eagerq.fuse_modules(model.inner))
    model.load_state_dict(state)
    back = eagerq.float_state_dict(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], v) for k, v in state.items())


def test_a_fused_checkpoint_loads_into_the_qat_model() -> None:
    fused = eagerq.fuse_modules(MODELS["resnet18"]())
    state = other(fused.state_dict())
    qat = eagerq.convert_qat(fused)
    qat.load_state_dict(state)
    assert torch.equal(qat.conv1.bn.running_var, state["conv1.1.running_var"])
    assert torch.equal(qat.layer2[0].downsample[0].weight, state["layer2.0.downsample.0.0.weight"])


def test_quantizers_keep_their_state_when_a_float_checkpoint_loads() -> None:
    model = MODELS["prelu"]().train()
    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=image()))
    qat(image())
    before = {k: v.clone() for k, v in qat.state_dict().items() if "quant" in k or "activation_post_process" in k}
    qat.load_state_dict(other(model.state_dict()))
    for key, value in before.items():
        assert torch.equal(qat.state_dict()[key], value), key


def test_the_callers_dict_is_left_alone() -> None:
    model = MODELS["prelu"]()
    state = dict(model.state_dict())
    keys = list(state)
    eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=image())).load_state_dict(state)
    assert list(state) == keys


def test_a_state_of_another_architecture_is_refused() -> None:
    for changed in stages(MODELS["prelu"]()).values():
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key|size mismatch"):
            changed.load_state_dict(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict())


def test_a_partial_quantizer_state_is_refused() -> None:
    qat = stages(MODELS["prelu"]())["qat"]
    state = qat.state_dict()
    lost = next(key for key in state if key.endswith("scale"))
    del state[lost]
    with pytest.raises(RuntimeError, match="Missing key"):
        qat.load_state_dict(state)


def test_a_deployed_model_has_no_float_state() -> None:
    qat = stages(MODELS["prelu"]().train())["qat"]
    qat(image())
    with pytest.raises(eagerq.errors.StateError, match="keep the QAT model"):
        eagerq.float_state_dict(eagerq.convert(qat))
