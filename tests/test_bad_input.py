"""Bad input, as a table: which call, which error, which words; and the model is as it was."""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from torch import nn

import eagerq
from eagerq import errors
from eagerq.extras import require
from eagerq.nn import intrinsic as nni
from eagerq.nn import qat as nnqat


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).train()


def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def qat(qconfig: Any = None) -> nn.Module:
    return eagerq.convert_qat(eagerq.fuse_modules(net(), example_inputs=image()), qconfig, image())


def trained() -> nn.Module:
    model = qat()
    model(image())
    return model


def saw(values: torch.Tensor) -> nn.Module:
    model = eagerq.convert_qat(nn.Sequential(nn.Conv2d(3, 4, 3)), example_inputs=image())
    model(values)
    return model


def foreign() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = net()
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        return torch.ao.quantization.prepare_qat(model)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.script(nn.ReLU()), nn.Conv2d(3, 4, 3))


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 3:
            raise KeyError("three channels, please")
        return self.conv(x)


class OtherConvBn(nni.Fused, chain=(nn.Conv2d, nn.BatchNorm2d)):
    """Claims a chain that is taken."""


class OtherQATConv(nnqat.Conv2d, converts=nn.Conv2d):
    """Converts a type that is taken."""


class Unknown(nn.Module):
    """No pattern knows it."""


@dataclasses.dataclass(frozen=True)
class Bad:
    """One row: the model (or what stands for it), the call, the error and the words in its text."""

    name: str
    model: Callable[[], Any]
    call: Callable[[Any], object]
    error: type[Exception]
    words: str


def plan(**kwargs: Any) -> Callable[[Any], object]:
    return lambda model: eagerq.plan_fusion(model, **{"example_inputs": image(), **kwargs})


def fuse(**kwargs: Any) -> Callable[[Any], object]:
    return lambda model: eagerq.fuse_modules(model, **{"example_inputs": image(), "inplace": True, **kwargs})


def prepare(qconfig: Any = None, **kwargs: Any) -> Callable[[Any], object]:
    return lambda model: eagerq.convert_qat(model, qconfig, **{"example_inputs": image(), "inplace": True, **kwargs})


def deploy(model: Any) -> object:
    return eagerq.convert(model, inplace=True)


SPEC = eagerq.QuantSpec
TABLE = (
    Bad("not a module", lambda: 3, plan(), errors.ModelError, "wanted an nn.Module, found int"),
    Bad("a class", lambda: nn.Conv2d, plan(), errors.ModelError, "wanted an nn.Module, found type"),
    Bad(
        "no parameters", lambda: nn.Sequential(nn.ReLU()), plan(), errors.ModelError, "with parameters, found Sequential without"
    ),
    Bad("wrapped", lambda: nn.DataParallel(net()), fuse(), errors.ModelError, r"pass model\.module"),
    Bad("wrapped, to convert", lambda: nn.DataParallel(net()), prepare(), errors.ModelError, r"pass model\.module"),
    Bad("scripted part", scripted, fuse(), errors.ModelError, "'0' to be a RecursiveScriptModule|ScriptModule"),
    Bad("graph module", lambda: torch.fx.symbolic_trace(net()), fuse(), errors.ModelError, "GraphModule"),
    Bad("compiled", lambda: torch.compile(net()), fuse(), errors.ModelError, "torch.compile"),
    Bad("torch.ao's leftovers", foreign, fuse(), errors.ModelError, "load_checkpoint"),
    Bad("lazy", lambda: nn.Sequential(nn.LazyConv2d(4, 3)), fuse(), errors.ModelError, "run one forward first"),
    Bad("empty patterns", net, fuse(patterns=[]), errors.PatternError, "patterns are empty"),
    Bad("empty Patterns", net, fuse(patterns=eagerq.Patterns(())), errors.PatternError, "patterns are empty"),
    Bad("a number", net, fuse(patterns=3), errors.PatternError, "found int"),
    Bad("a string", net, fuse(patterns="conv"), errors.PatternError, "found a str"),
    Bad("mixed", net, fuse(patterns=[["0", nn.ReLU]]), errors.PatternError, "not mixed"),
    Bad("unknown type", net, fuse(patterns=[(Unknown, nn.ReLU)]), errors.PatternError, "Unknown \\+ ReLU"),
    Bad("unknown chain", net, fuse(patterns=[(nn.Conv2d, nn.LayerNorm)]), errors.PatternError, "begin so: Conv2d"),
    Bad("unknown name", net, fuse(patterns=[["0", "nope"]]), errors.PatternError, "no module 'nope'"),
    Bad("unknown chain of names", net, fuse(patterns=[["0", "3"]]), errors.PatternError, r"0 \+ 3"),
    Bad("lists in conflict", net, fuse(patterns=[["0", "1"], ["1", "2"]]), errors.PatternError, "in conflict: '1'"),
    Bad(
        "classes in conflict",
        net,
        lambda m: eagerq.DEFAULT_PATTERNS.extended(OtherConvBn),
        errors.PatternError,
        "claimed by both",
    ),
    Bad(
        "QAT classes in conflict",
        net,
        lambda m: eagerq.DEFAULT_PATTERNS.extended(OtherQATConv),
        errors.PatternError,
        "converted by both",
    ),
    Bad(
        "no pattern class",
        net,
        lambda m: eagerq.DEFAULT_PATTERNS.extended(Unknown),
        errors.PatternError,
        "a pattern is a subclass",
    ),
    Bad("rejected inputs", Picky, fuse(example_inputs=torch.zeros(2, 4, 8, 8)), errors.InputsError, "KeyError: 'three channels"),
    Bad("rejected, to convert", Picky, prepare(example_inputs=torch.zeros(2, 4, 8, 8)), errors.InputsError, "three channels"),
    Bad("inputs of no form", net, fuse(example_inputs="image"), errors.InputsError, "found str"),
    Bad("no inputs in the list", net, fuse(example_inputs=[]), errors.InputsError, "list \\(empty\\)"),
    Bad("bits", net, lambda m: SPEC(bits=9), errors.SpecError, "from 2 to 8, found 9"),
    Bad("half a bit", net, lambda m: SPEC(bits=7.5), errors.SpecError, "found 7.5"),  # type: ignore[arg-type]
    Bad("observer", net, lambda m: SPEC(observer="crystal ball"), errors.SpecError, "min_max, moving_average"),  # type: ignore[arg-type]
    Bad("range", net, lambda m: SPEC(narrow_range=True), errors.SpecError, "signed=True"),
    Bad("affine channels", net, lambda m: SPEC(per_channel=True), errors.SpecError, "symmetric=True"),
    Bad("averaging", net, lambda m: SPEC(averaging_constant=0.0), errors.SpecError, r"\(0, 1\]"),
    Bad("percentile", net, lambda m: SPEC(percentile=3), errors.SpecError, "99.99"),
    Bad(
        "channels of activations",
        net,
        lambda m: eagerq.QConfig(SPEC(symmetric=True, per_channel=True), None),
        errors.SpecError,
        "a tensor",
    ),
    Bad("preset", net, prepare("onnx"), errors.SpecError, "the presets are onnxruntime"),
    Bad("qconfig type", net, prepare(8), errors.SpecError, "found int"),
    Bad("rule for nothing", net, prepare({"layer9.*": None}), errors.SpecError, "'layer9"),
    Bad("rule for no type", net, prepare({nn.Conv3d: None}), errors.SpecError, "Conv3d selects none"),
    Bad("nothing to convert", lambda: nn.Sequential(nn.LayerNorm(8)), prepare(), errors.StateError, "nothing to quantize"),
    Bad("converting twice", trained, prepare(), errors.StateError, "already converted"),
    Bad("fusing a QAT model", trained, fuse(), errors.StateError, "fuse first"),
    Bad("deploying a float model", net, deploy, errors.StateError, "convert_qat"),
    Bad("deploying twice", lambda: eagerq.convert(trained()), deploy, errors.StateError, "call convert once"),
    Bad("QAT of a deployed model", lambda: eagerq.convert(trained()), prepare(), errors.StateError, "deployed"),
    Bad("deploying before observing", qat, deploy, errors.StateError, "saw nothing"),
    Bad("saw zeros", lambda: saw(torch.zeros(2, 3, 8, 8)), deploy, errors.StateError, "only zeros"),
    Bad("saw NaN", lambda: saw(torch.full((2, 3, 8, 8), torch.nan)), deploy, errors.StateError, "NaN"),
    Bad("saw infinity", lambda: saw(torch.full((2, 3, 8, 8), torch.inf)), deploy, errors.StateError, "infinity"),
    Bad("quantizers off", lambda: trained().apply(eagerq.disable_fake_quant), deploy, errors.StateError, "enable_fake_quant"),
    Bad("report of a float model", net, eagerq.report, errors.StateError, "convert first"),
)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_clear_error_and_an_unchanged_model(row: Bad) -> None:
    model = row.model()
    is_module = isinstance(model, nn.Module) and row.name != "lazy"
    before = copy.deepcopy(model.state_dict()) if is_module else {}
    tree = [(name, id(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()] if is_module else []
    with pytest.raises(row.error, match=row.words) as caught:
        row.call(model)
    assert isinstance(caught.value, eagerq.EagerqError)
    assert "\n" not in str(caught.value)
    if is_module:
        assert [(name, id(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()] == tree
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[k], v) or bool(v.isnan().any()) for k, v in before.items())


def test_the_models_own_exception_is_chained() -> None:
    with pytest.raises(errors.InputsError) as caught:
        eagerq.plan_fusion(Picky(), example_inputs=torch.zeros(2, 4, 8, 8))
    assert isinstance(caught.value.__cause__, KeyError)
    assert str(caught.value).startswith("Picky was to run once on example_inputs")


def test_diverged_weights_are_refused() -> None:
    model = trained()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(errors.StateError, match=r"0\.weight was to hold finite values"):
        eagerq.convert(model)


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'eagerq\[onnx\]'") as caught:
        eagerq.export_onnx(eagerq.convert(trained()), "never-written.onnx", image())
    assert isinstance(caught.value, ImportError)
    assert "\n" not in str(caught.value)
    with pytest.raises(ImportError):
        require("a_module_nobody_has", "demo")
