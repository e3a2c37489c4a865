"""convert_qat, report and convert on whole nets: where tensors are quantized, what stays float, what is deployed."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath
from torch import Tensor, nn

import eagerq
from eagerq import QConfig, QConfigMapping, QuantSpec
from eagerq.errors import ModelError, SpecError, StateError
from eagerq.nn import intrinsic as nni
from eagerq.nn import qat as nnqat
from eagerq.nn.intrinsic import qat as nniqat
from eagerq.nn.qat import QATOp
from eagerq.nn.quantized import QuantizeDequantize, QuantizedModule
from eagerq.quant.functional import fake_quantize
from eagerq.surgery import state_tensors
from tests.nets import (
    BY_NAME,
    NETS,
    Basic,
    C,
    ConvOfOwn,
    Made,
    Net,
    Visions,
    bn,
    call,
    conv,
    differences,
    image,
    randomise,
    same,
    snapshot,
    step,
    straight,
    tensors,
)
from tests.test_fuse import plan_of

#: Nothing in it can be quantized.
CONVERTIBLE = tuple(net for net in NETS if net.name != "timm_norm_drop_first")

nets = pytest.mark.parametrize("net", CONVERTIBLE, ids=lambda net: net.name)
presets = pytest.mark.parametrize("preset", sorted(eagerq.PRESETS))


class Dropping(nn.Module):
    """A residual block with stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop_path, self.act = conv(), bn(), DropPath(0.5), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.drop_path(self.bn(self.conv(x))))


class Functional(nn.Module):
    """A residual block whose last activation is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + x)


class Small(nn.Module):
    """A small residual classifier of module-level classes, so that it pickles."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, C, bias=False), bn(), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Basic(), Basic(down=True), Visions(nn.ReLU(inplace=True)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


def small() -> Small:
    torch.manual_seed(0)
    model = Small()
    randomise(model)
    return model


def picture(seed: int = 0, n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def qat_of(model: nn.Module, inputs: Any, qconfig: Any = None) -> nn.Module:
    """Fused and converted."""
    return eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=inputs), qconfig, example_inputs=inputs)


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    """A few real training steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for seed in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(picture(seed)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    return model


# --- the numbers, over all nets


def qat_net(net: Net, qconfig: Any = None) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A net of the table, fused and converted, with the float model's parameters by name."""
    model = net.model()
    parameters = dict(model.named_parameters())
    return eagerq.convert_qat(plan_of(net.name).apply(model), qconfig, inplace=True), parameters


@nets
def test_without_fake_quantization_qat_is_the_float_model(net: Net) -> None:
    inputs = tuple(x.double() for x in net.inputs())
    model, (qat, parameters) = net.model().double(), qat_net(net)
    qat.double().apply(eagerq.disable_fake_quant)
    for training in (True, False, True):
        expected = step(model, dict(model.named_parameters()), inputs, training)
        assert not differences(expected, step(qat, parameters, inputs, training), 1e-10)


@nets
def test_a_quantized_step_and_what_it_deploys_to(net: Net) -> None:
    """Finite and near; every module reads codes; the deployed model is the QAT model in eval; nothing else changes."""
    check_quantized(net, None)


@pytest.mark.parametrize(
    "name", ["straight", "residual", "shared_relu", "transposed_grouped", "linear", "tied", "timm_norm_silu"]
)
@pytest.mark.parametrize("preset", ["tensorrt", "per_tensor"])
def test_the_same_for_other_presets(name: str, preset: str) -> None:
    check_quantized(BY_NAME[name], preset)


def check_quantized(net: Net, preset: str | None) -> None:
    model, (qat, parameters) = net.model(), qat_net(net, preset)
    expected = step(model, dict(model.named_parameters()), net.inputs(), True)
    call(qat, net.inputs())  # activations are quantized once a range is known
    given = step(qat, parameters, net.inputs(), True)
    assert all(torch.isfinite(g).all() for g in (*given.outputs, *given.grads.values()) if g is not None)
    assert all((given.grads[key] is None) == (grad is None) for key, grad in expected.grads.items())
    for want, got in zip(expected.outputs, given.outputs, strict=True):
        assert (want - got).square().mean() <= 0.05 * want.square().mean()
    before = snapshot(qat)
    deployed = eagerq.convert(qat)
    assert snapshot(qat) == before
    qat.eval()
    with torch.no_grad():
        wanted, found = list(tensors(call(qat, net.inputs()))), list(tensors(call(deployed, net.inputs())))
    assert len(wanted) == len(found)
    assert all(torch.equal(x, y) for x, y in zip(wanted, found, strict=True))
    check_inputs_are_codes(qat.train(), net.inputs())


def check_inputs_are_codes(qat: nn.Module, inputs: Any) -> None:
    """In eval each QAT op's input holds codes of the very quantizer it believes its input comes from; and no
    tensor that is on a grid already is quantized once more."""
    for _ in range(2):
        call(qat, inputs)
    qat.eval()
    reads: list[tuple[str, Any, Tensor]] = []
    quantized: list[tuple[str, Any, Any, Tensor]] = []

    def read(name: str) -> Callable[..., None]:
        return lambda module, args: reads.append((name, module, args[0].detach().clone()))

    def done(name: str) -> Callable[..., None]:
        return lambda module, args, output: quantized.append((name, value(args[0]), value(output), output))

    def value(x: Tensor) -> tuple[int, int]:
        return id(x), x._version

    for name, module in qat.named_modules():
        if isinstance(module, QATOp):
            module.register_forward_pre_hook(read(name))
        elif isinstance(module, eagerq.FakeQuantize) and not module.memoryless:
            module.register_forward_hook(done(name))
    with torch.no_grad():
        call(qat, inputs)
    calls = Counter(name for name, _, _ in reads)
    for name, module, x in reads:
        quantizer = module.input_quantizer
        if isinstance(module, nnqat.Embedding):
            assert quantizer is None
            continue
        assert quantizer is not None, name
        if module.input_fake_quant is not None:
            x = module.input_fake_quant(x)
        spec = quantizer.spec
        assert torch.equal(fake_quantize(x, quantizer.scale, quantizer.zero_point, spec.quant_min, spec.quant_max), x), name
    results = {result: name for name, _, result, _ in quantized}
    for name, x, _, _ in quantized:
        if calls[name.rsplit(".", 1)[0]] <= 1:  # a module that runs twice needs one grid for both of its inputs
            assert x not in results, f"{name} quantizes what {results.get(x)} has quantized"


# --- where tensors are quantized


@dataclasses.dataclass(frozen=True)
class Places:
    """A net with all the places where a tensor is quantized, and where each module's input comes from."""

    name: str
    build: Callable[[], nn.Module]
    sites: frozenset[tuple[str, str]]
    sources: Mapping[str, str]
    inputs: Callable[[], Any] = lambda: (image(),)
    qconfig: Any = None


def _places(text: str) -> frozenset[tuple[str, str]]:
    return frozenset(itertools.starmap(lambda kind, name: (kind, name), (line.split() for line in text.split(","))))


PLACES = (
    Places(
        "residual",
        lambda: Made(
            lambda m, x: m.fc(m.pool(m.b(m.a(m.stem(x)))).flatten(1)),
            stem=conv(), a=Basic(), b=Basic(down=True), pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(C, 3),
        ),
        _places("input stem, output stem, output a.conv1, output a.conv2, exit a.act2, output b.conv1, output b.conv2,"
                "output b.downsample.0, exit b.act2, exit pool"),
        {"stem": "this module", "a.conv1": "the output of stem", "a.conv2": "the output of a.conv1",
         "b.conv1": "the output of a.act2", "b.downsample.0": "the output of a.act2",
         "b.conv2": "the output of b.conv1", "fc": "the output of pool"},
    ),
    Places(
        "shared_relu",
        lambda: Made(lambda m, x: m.head(m.b(m.a(x))), a=Visions(nn.ReLU(inplace=True)), b=Visions(nn.ReLU()), head=conv()),
        _places("model_input 0, output a.conv1, output a.conv2, exit a, output b.conv1, output b.conv2, exit b, output head"),
        {"a.conv1": "the model's input", "a.conv2": "the output of a.conv1", "b.conv1": "the output of a",
         "b.conv2": "the output of b.conv1", "head": "the output of b"},
    ),
    Places(
        "input_of_two",
        lambda: Made(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv()),
        _places("model_input 0, output a, output b"),
        {"a": "the model's input", "b": "the model's input"},
    ),
    Places(
        "keyword_of_two",
        lambda: Made(lambda m, x, y=None: m.a(y) + m.b(y) + x, a=conv(), b=conv()),
        _places("model_input y, output a, output b"),
        {"a": "the model's input", "b": "the model's input"},
        inputs=lambda: {"x": image(), "y": image()},
    ),
    Places(
        "functional_relu",
        lambda: Made(lambda m, x: m.head(F.relu(m.bn(m.conv(x)))), conv=conv(), bn=bn(), head=conv()),
        _places("input conv, input head, output head"),
        {"conv": "this module", "head": "this module"},
    ),
    Places(
        "functional_block",
        lambda: Made(lambda m, x: m.head(m.b(m.a(x))), a=Functional(), b=Functional(), head=conv()),
        _places("model_input 0, output a.conv, exit a, output b.conv, exit b, output head"),
        {"a.conv": "the model's input", "b.conv": "the output of a", "head": "the output of b"},
    ),
    Places(
        "sequential_whose_input_is_added",
        lambda: nn.Sequential(Basic(), conv()),
        _places("input 0.conv1, output 0.conv1, output 0.conv2, exit 0.act2, output 1"),
        {"0.conv1": "this module", "0.conv2": "the output of 0.conv1", "1": "the output of 0.act2"},
    ),
    Places(
        "pooled",
        lambda: nn.Sequential(conv(), bn(), nn.ReLU(), nn.MaxPool2d(2), conv(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(C, 2)),
        _places("input 0, output 0, output 4, exit 5"),
        {"0": "this module", "4": "the output of 0", "7": "the output of 5"},
    ),
    Places(
        "concatenated",
        lambda: Made(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(), b=conv(), c=conv(2 * C)),
        _places("model_input 0, output a, output b, input c, output c"),
        {"a": "the model's input", "b": "the model's input", "c": "this module"},
    ),
    Places(
        "sum_of_three",
        lambda: Made(lambda m, x: m.head(m.a(x) + m.b(x) + m.c(x)), a=conv(), b=conv(), c=conv(), head=conv()),
        _places("model_input 0, output a, output b, output c, input head, output head"),
        {"a": "the model's input", "b": "the model's input", "c": "the model's input", "head": "this module"},
    ),
    Places(
        "named_sums",
        lambda: Made(
            lambda m, x: m.head(m.act(m.more(m.sum(m.a(x), m.b(x)), m.c(x)))),
            a=conv(), b=conv(), c=conv(), sum=eagerq.nn.Add(), more=eagerq.nn.Add(), act=nn.ReLU(), head=conv(),
        ),
        _places("model_input 0, output a, output b, output c, exit sum, exit act, output head"),
        {"a": "the model's input", "b": "the model's input", "c": "the model's input", "head": "the output of act"},
    ),
    Places(
        "stochastic_depth",
        lambda: nn.Sequential(conv(), Dropping(), Dropping(), conv()),
        _places("input 0, output 0, output 1.conv, exit 1.act, output 2.conv, exit 2.act, output 3"),
        {"0": "this module", "1.conv": "the output of 0", "2.conv": "the output of 1.act", "3": "the output of 2.act"},
    ),
    Places(
        "preactivation",
        lambda: Made(lambda m, x: m.b(m.a(x)), a=BY_NAME["preactivation"].build(), b=BY_NAME["preactivation"].build()),
        _places("output a.bn, output a.conv, output b.bn, output b.conv"),
        {"a.conv": "the output of a.bn", "b.conv": "the output of b.bn"},
    ),
    Places(
        "embedding",
        lambda: Made(
            lambda m, x: m.out(m.act(m.fc(m.emb(x)))),
            emb=nn.Embedding(10, 6), fc=nn.Linear(6, 5), act=nn.GELU(), out=nn.Linear(5, 2),
        ),
        _places("output emb, output fc"),
        {"fc": "the output of emb", "out": "the output of fc"},
        inputs=lambda: (torch.arange(8).reshape(2, 4),),
    ),
    Places(
        "tensorrt",
        lambda: nn.Sequential(Basic(), Basic(down=True)),
        _places("input 0.conv1, input 0.conv2, input 1.conv1, input 1.conv2, input 1.downsample.0, output 1.downsample.0"),
        dict.fromkeys(("0.conv1", "0.conv2", "1.conv1", "1.conv2", "1.downsample.0"), "this module"),
        qconfig="tensorrt",
    ),
    Places(
        "tensorrt_shortcuts",
        lambda: Made(
            lambda m, x: m.fc(m.pool(m.c(m.b(m.a(m.stem(x))))).flatten(1)),
            stem=conv(), a=Basic(), b=Basic(down=True), c=Basic(), pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(C, 3),
        ),
        _places("input stem, output stem, input a.conv2, input b.conv1, input b.conv2, input b.downsample.0,"
                "output b.downsample.0, exit b.act2, input c.conv2, input fc"),
        {"stem": "this module", "a.conv1": "the output of stem", "a.conv2": "this module", "b.conv1": "this module",
         "b.conv2": "this module", "b.downsample.0": "this module", "c.conv1": "the output of b.act2",
         "c.conv2": "this module", "fc": "this module"},
        qconfig="tensorrt",
    ),
    Places(
        "weights_only",
        lambda: nn.Sequential(Basic(), conv()),
        frozenset(),
        {},
        qconfig=QConfig(activation=None, weight=eagerq.PRESETS["onnxruntime"].weight),
    ),
)  # fmt: skip

places = pytest.mark.parametrize("row", PLACES, ids=lambda row: row.name)


@places
def test_each_tensor_is_quantized_where_it_is_made(row: Places) -> None:
    inputs = row.inputs()
    qat = qat_of(randomise(row.build()), inputs, row.qconfig)
    report = eagerq.report(qat)
    assert set(report.quantizers) == row.sites
    assert len(report.quantizers) == len(row.sites)
    sources = {
        name: reason.removeprefix("input quantized at ") for name, _, state, reason in report.rows if state == "QAT" and reason
    }
    assert sources == row.sources
    assert not report.notes


@places
def test_placement_holds_at_run_time(row: Places) -> None:
    inputs = row.inputs()
    if row.name == "weights_only":
        return
    qat = qat_of(randomise(row.build()), inputs, row.qconfig)
    check_inputs_are_codes(qat, inputs)
    quantizers = [m for m in qat.modules() if isinstance(m, eagerq.FakeQuantize) and not m.memoryless]
    assert len(quantizers) == len(row.sites)
    assert all(q.observed for q in quantizers)


@places
def test_placed_nets_deploy(row: Places) -> None:
    inputs = row.inputs()
    qat = qat_of(randomise(row.build()), inputs, row.qconfig)
    for _ in range(3):
        call(qat, inputs)
    deployed = eagerq.convert(qat)
    qat.eval()
    with torch.no_grad():
        assert torch.equal(call(deployed, inputs), call(qat, inputs))
    quantizers = [m for m in deployed.modules() if isinstance(m, QuantizeDequantize)]
    assert len(quantizers) == len(row.sites)
    assert not any(isinstance(m, eagerq.FakeQuantize) for m in deployed.modules())
    modules = [m for m in deployed.modules() if isinstance(m, QuantizedModule)]
    assert {m.weight_codes.dtype for m in modules} == {torch.int8}
    known = [m for m in modules if m.bias_codes is not None and row.qconfig is None]
    assert {m.bias_codes.dtype for m in known} <= {torch.int32}
    assert all(m.bias_scale is not None for m in known)


def test_without_inputs_each_module_quantizes_its_own() -> None:
    qat = eagerq.convert_qat(small())
    report = eagerq.report(qat)
    assert {kind for kind, _ in report.quantizers} == {"input"}
    assert any("no example inputs" in note for note in report.notes)
    train(qat)
    assert torch.equal(eagerq.convert(qat)(picture(9)), qat.eval()(picture(9)))


def test_inputs_of_the_fusion_are_remembered() -> None:
    for name in ("residual", "data_dependent"):
        net = BY_NAME[name]
        fused = eagerq.fuse_modules(net.model(), example_inputs=net.inputs())
        remembered, given = (
            eagerq.report(eagerq.convert_qat(fused)),
            eagerq.report(eagerq.convert_qat(fused, example_inputs=net.inputs())),
        )
        assert remembered == given
        assert not remembered.notes


def test_a_model_that_runs_in_training_only_is_watched_there() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        if not m.training:
            raise ValueError("only in training")
        return m.conv2(m.conv(x))

    qat = eagerq.convert_qat(Made(run, conv=conv(), conv2=conv()), example_inputs=image())
    report = eagerq.report(qat)
    assert {name for name, _, state, _ in report.rows if state == "QAT"} == {"conv", "conv2"}
    assert any("watched in train mode" in note for note in report.notes)


def test_several_runs_that_disagree_quantize_at_the_reader() -> None:
    model = Made(lambda m, x, way: m.c(m.a(x) if way else m.b(x)), a=conv(), b=conv(), c=conv())
    runs = [(image(), True), (image(), False)]
    qat = eagerq.convert_qat(model, example_inputs=runs)
    assert ("input", "c") in eagerq.report(qat).quantizers
    qat(image(), True)
    qat(image(), False)
    deployed = eagerq.convert(qat)
    qat.eval()
    for way in (True, False):
        assert torch.equal(deployed(image(), way), qat(image(), way))


# --- qconfigs and their rules


def test_rules_by_name_and_type() -> None:
    model = eagerq.fuse_modules(small(), example_inputs=picture())
    four = QuantSpec(bits=4, signed=True, symmetric=True, per_channel=True, narrow_range=True, observer="min_max")
    low = QConfig(QuantSpec(), four)
    mapping = (
        eagerq.PRESETS["onnxruntime"]
        .override("blocks.1.*", low)
        .override(nn.Linear, None)
        .override("blocks.1.conv2", "per_tensor")
    )
    qat = eagerq.convert_qat(model, mapping)
    by_name = {name: m.qconfig for name, m in qat.named_modules() if isinstance(m, QATOp)}
    assert by_name["blocks.1.conv1"] == by_name["blocks.1.downsample.0"] == low
    assert by_name["blocks.1.conv2"] == eagerq.PRESETS["per_tensor"]
    assert by_name["blocks.0.conv1"] == by_name["stem.0"] == eagerq.PRESETS["onnxruntime"]
    assert type(qat.fc) is nn.Linear
    assert ("fc", "kept float by the qconfig") in eagerq.report(qat).left_float
    assert qat.blocks[1].conv1.weight_fake_quant.spec.bits == 4
    train(qat)
    deployed = eagerq.convert(qat)
    assert torch.equal(deployed(picture(9)), qat.eval()(picture(9)))
    codes = deployed.blocks[1].conv1.weight_codes
    assert int(codes.abs().max()) == 7
    given = eagerq.convert_qat(model, {"": "onnxruntime", "blocks.1.*": low, nn.Linear: None, "blocks.1.conv2": "per_tensor"})
    assert eagerq.report(given) == eagerq.report(eagerq.convert_qat(model, mapping))


def test_a_type_rule_means_the_float_type_inside_a_fused_module_too() -> None:
    fused = eagerq.fuse_modules(small(), example_inputs=picture())
    qat = eagerq.convert_qat(fused, {"": "onnxruntime", nn.Conv2d: None})
    assert [name for name, m in qat.named_modules() if isinstance(m, QATOp)] == ["fc"]
    qat = eagerq.convert_qat(fused, {"": "onnxruntime", nni.ConvBn2d: None})
    assert type(qat.blocks[0].conv2) is nni.ConvBn2d
    assert type(qat.blocks[0].conv1) is nniqat.ConvBnReLU2d


def test_a_default_of_none_converts_only_what_is_named() -> None:
    qat = eagerq.convert_qat(
        eagerq.fuse_modules(small(), example_inputs=picture()), QConfigMapping(None).override("stem.*", "onnxruntime")
    )
    assert [name for name, m in qat.named_modules() if isinstance(m, QATOp)] == ["stem.0"]


@pytest.mark.parametrize("rule", ["layer9.*", "stem", nn.Conv3d, nn.ReLU6])
def test_a_rule_that_matches_nothing_is_an_error(rule: Any) -> None:
    model = eagerq.fuse_modules(small(), example_inputs=picture())
    before = snapshot(model)
    with pytest.raises(SpecError, match="selects none of the modules"):
        eagerq.convert_qat(model, {"": "onnxruntime", rule: None}, inplace=True)
    assert snapshot(model) == before


def test_weights_only() -> None:
    weight = eagerq.PRESETS["onnxruntime"].weight
    qat = qat_of(small(), picture(), QConfig(activation=None, weight=weight))
    assert not [m for m in qat.modules() if isinstance(m, eagerq.FakeQuantize) and not m.memoryless]
    train(qat)
    deployed = eagerq.convert(qat)
    assert torch.equal(deployed(picture(9)), qat.eval()(picture(9)))
    assert deployed.fc.weight_codes.dtype == torch.int8
    assert deployed.fc.bias_codes.dtype == torch.float32
    assert deployed.fc.bias_scale is None


def test_activations_only() -> None:
    qat = qat_of(small(), picture(), QConfig(activation=QuantSpec(), weight=None))
    train(qat)
    deployed = eagerq.convert(qat)
    assert torch.equal(deployed(picture(9)), qat.eval()(picture(9)))
    assert deployed.fc.weight_codes.dtype == torch.float32


# --- the report


def test_what_stays_float_has_a_reason() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = F.conv2d(m.never(x) if x is None else m.own(m.conv(x)), m.kernel)
        return m.norm(m.old(m.alone(y) @ y))

    model = Made(
        run,
        conv=conv(),
        own=ConvOfOwn(C, C, 1),
        never=conv(),
        alone=nn.BatchNorm2d(C, track_running_stats=False),
        norm=nn.GroupNorm(2, C),
        old=torch.nn.utils.parametrizations.weight_norm(conv()),
    )
    model.kernel = nn.Parameter(torch.randn(C, C, 1, 1))
    report = eagerq.report(eagerq.convert_qat(model, example_inputs=image()))
    left = dict(report.left_float)
    assert left["never"] == "it did not run in the watched forward"
    assert "no QAT form is known for" in left["own"]
    assert "ConvOfOwn" in left["own"]
    assert left["alone"].startswith("it keeps no running statistics")
    assert "GroupNorm" in left["norm"]
    assert left[""].endswith("Made and its own parameters: kernel")
    assert "ParametrizedConv2d" in left["old"]
    assert "called 1 times" in left["conv2d in the model"]
    assert "called 1 times" in left["matmul in the model"]
    assert [name for name, _, state, _ in report.rows if state == "QAT"] == ["conv"]
    text = str(report)
    assert text.startswith("1 QAT modules, ")
    assert all(name in text and reason in text for name, reason in left.items() if name)


def reads_settings(m: Any, x: Tensor) -> Tensor:
    return m.last(m.alone(m.conv(x)) / (1 + m.alone.eps))


def wants_a_vector(m: Any, x: Tensor) -> Tensor:
    if m.alone.weight.dim() != 1:
        raise ValueError("a weight a channel is wanted")
    return m.last(m.alone(m.conv(x)))


@pytest.mark.parametrize(("run", "stays"), [(reads_settings, None), (wants_a_vector, "a weight a channel is wanted")])
def test_a_lone_norm_is_no_reason_to_refuse_a_model(run: Callable[..., Any], stays: str | None) -> None:
    model = randomise(Made(run, conv=conv(), alone=bn(), last=conv()))
    qat = eagerq.convert_qat(model, example_inputs=image())
    assert type(qat.conv) is type(qat.last) is nnqat.Conv2d
    assert type(qat.alone) is (nnqat.BatchNorm2d if stays is None else nn.BatchNorm2d)
    assert (stays or "") in dict(eagerq.report(qat).left_float).get("alone", "")
    off = copy.deepcopy(qat).apply(eagerq.disable_fake_quant)
    assert torch.equal(off(image()), copy.deepcopy(model)(image()))
    qat(image())
    assert torch.equal(eagerq.convert(qat)(image()), qat.eval()(image()))


def test_modules_called_past_their_name_stay_float() -> None:
    net = BY_NAME["bound_conv"]
    qat = qat_of(net.model(), net.inputs())
    assert "past its name" in dict(eagerq.report(qat).left_float)["conv"]
    assert type(qat.later) is nniqat.ConvReLU2d
    assert isinstance(qat.conv, nn.Conv2d)
    assert qat.convolve.__self__ is qat.conv


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("convert", [eagerq.fuse_modules, eagerq.convert_qat])
def test_a_forward_that_reads_the_original_is_refused(convert: Callable[..., nn.Module], inplace: bool) -> None:
    """A function kept by the model holds the user's own module, which no copy replaces."""
    first = conv()
    model = Made(lambda m, x: m.head(first(x)), first=first, head=conv())
    with pytest.raises(ModelError, match=r"reads 'first.weight' of the original"):
        convert(model, example_inputs=image(), inplace=inplace)
    assert model.first is first and type(model.head) is nn.Conv2d


def test_modules_called_from_a_list_are_replaced_there() -> None:
    net = BY_NAME["python_list"]
    model = net.model()
    qat = qat_of(model, net.inputs())
    assert qat.order["first"][1][0] is qat.conv
    assert type(qat.conv) is nniqat.ConvBn2d
    qat(*net.inputs())
    deployed = eagerq.convert(qat)
    assert deployed.order["first"][1][0] is deployed.conv
    back = eagerq.unfuse_modules(eagerq.fuse_modules(model, example_inputs=net.inputs()))
    assert back.order["first"][1][0] is back.conv
    assert model.order["first"][1][0] is model.conv


def test_old_weight_norm_stays_float() -> None:
    net = BY_NAME["old_weight_norm"]
    qat = qat_of(net.model(), net.inputs())
    assert "weight_norm" in dict(eagerq.report(qat).left_float)["conv"]


def test_report_wants_a_converted_model() -> None:
    for model in (straight(), eagerq.fuse_modules(straight(), example_inputs=image()), 3):
        with pytest.raises(StateError, match="convert first"):
            eagerq.report(model)  # type: ignore[arg-type]


# --- in place or not; what survives


def test_inplace_or_not() -> None:
    fused = eagerq.fuse_modules(small(), example_inputs=picture())
    before = snapshot(fused)
    qat = eagerq.convert_qat(fused)
    assert qat is not fused
    assert snapshot(fused) == before
    parameters = {id(p) for p in fused.parameters()}
    assert eagerq.convert_qat(fused, inplace=True) is fused
    assert {id(p) for p in fused.parameters()} == parameters
    train(fused)
    assert eagerq.convert(fused, inplace=True) is fused
    assert not fused.training
    assert isinstance(fused.fc, QuantizedModule)


def test_mode_dtype_and_requires_grad_survive() -> None:
    model = small().double().eval()
    model.stem[0].weight.requires_grad_(False)
    qat = qat_of(model, picture().double())
    assert not any(m.training for m in qat.modules())
    assert {t.dtype for t in qat.parameters()} == {torch.float64}
    assert not qat.stem[0].weight.requires_grad
    assert qat.train()(picture().double()).dtype == torch.float64
    assert torch.equal(eagerq.convert(qat)(picture().double()), qat.eval()(picture().double()))


def test_an_unobserved_qat_model_evaluates_with_quantized_weights_only() -> None:
    model = small().eval()
    qat = qat_of(model, picture())
    qat.apply(eagerq.disable_fake_quant)
    assert same(qat(picture()), model(picture()), 1e-5)


def test_unfused_models_convert_too() -> None:
    model = small()
    qat = eagerq.convert_qat(model, example_inputs=picture())
    assert type(qat.stem[0]) is nnqat.Conv2d
    assert type(qat.stem[1]) is nnqat.BatchNorm2d
    train(qat)
    assert torch.equal(eagerq.convert(qat)(picture(9)), qat.eval()(picture(9)))


def test_hooks_fire_once_in_each_form() -> None:
    counts: Counter[str] = Counter()
    model = small()
    model.stem[0].register_forward_pre_hook(lambda *a: counts.update(["pre"]))
    model.stem[2].register_forward_hook(lambda *a: counts.update(["relu"]))
    model.blocks[0].bn2.register_forward_hook(lambda *a: counts.update(["bn"]))
    model.fc.register_forward_hook(lambda *a: counts.update(["fc"]))
    fused = eagerq.fuse_modules(model, example_inputs=picture())
    for form in (model, fused, eagerq.convert_qat(fused)):
        for mode in (True, False):
            counts.clear()
            form.train(mode)(picture())
            assert counts == {"pre": 1, "relu": 1, "bn": 1, "fc": 1}


@pytest.mark.parametrize("layer", [lambda: Conv2dSame(C, C, 3), lambda: BatchNormAct2d(C, apply_act=False), bn, conv])
@pytest.mark.parametrize("mode", [True, False])
def test_hooks_of_modules_that_are_not_fused_fire_once(layer: Callable[[], nn.Module], mode: bool) -> None:
    counts: Counter[str] = Counter()
    model = nn.Sequential(conv(), nn.MaxPool2d(2), layer())
    handles: tuple[Any, ...] = (
        model[2].register_forward_pre_hook(lambda *a: counts.update(["pre"])),
        model[2].register_forward_hook(lambda *a: counts.update(["post"])),
    )
    qat = eagerq.convert_qat(model, example_inputs=image(), inplace=True)
    assert isinstance(qat[2], QATOp)
    for left in ({"pre": 1, "post": 1}, {"post": 1}, {}):
        counts.clear()
        qat.train(mode)(image())
        assert counts == left
        for handle in handles[:1]:
            handle.remove()
        handles = handles[1:]


def test_freezing_statistics_of_a_whole_model() -> None:
    qat = train(qat_of(small(), picture()))
    qat.apply(eagerq.freeze_bn_stats)
    qat.apply(eagerq.disable_observer)
    before = {
        k: v.clone()
        for k, v in qat.state_dict().items()
        if "running" in k or "num_batches" in k or "fake" in k or "post_process" in k
    }
    with torch.no_grad():
        qat.train()(picture(5) * 3)
        copy.deepcopy(qat).train()(picture(6))
    after = qat.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    qat.apply(eagerq.update_bn_stats)
    qat.apply(eagerq.enable_observer)
    with torch.no_grad():
        qat(picture(5) * 3)
    after = qat.state_dict()
    assert not any(torch.equal(value, after[key]) for key, value in before.items() if key.endswith("running_mean"))
    assert any(not torch.equal(value, after[key]) for key, value in before.items() if key.endswith("scale"))


def test_eval_learns_nothing() -> None:
    qat = train(qat_of(small(), picture())).eval()
    before = {key: value.clone() for key, value in qat.state_dict().items()}
    qat(picture(7) * 10)
    assert all(torch.equal(value, before[key]) for key, value in qat.state_dict().items())


# --- deploying


@presets
def test_deployed_small_model(preset: str) -> None:
    qat = train(qat_of(small(), picture(), preset), 5)
    deployed = eagerq.convert(qat)
    qat.eval()
    for n in (1, 7):
        assert torch.equal(deployed(picture(9, n)), qat(picture(9, n)))
    config = eagerq.PRESETS[preset]
    modules = {name: m for name, m in deployed.named_modules() if isinstance(m, QuantizedModule)}
    assert modules.keys() == {name for name, m in qat.named_modules() if isinstance(m, QATOp)}
    for module in modules.values():
        assert module.weight_codes.dtype == (torch.int8 if config.weight.signed else torch.uint8)
        assert module.bias_codes.dtype == {None: torch.float32, "int32": torch.int32}.get(config.bias, torch.int8)
        assert not list(module.parameters(recurse=False))
    assert not [m for m in deployed.modules() if isinstance(m, (nn.BatchNorm2d, nn.Conv2d, eagerq.FakeQuantize))]
    assert not any(m.training for m in deployed.modules())


def test_deployed_weights_are_an_eighth_to_a_quarter() -> None:
    class Wide(nn.Sequential):
        pass

    model = Wide(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3))
    qat = qat_of(model, picture())
    qat(picture())
    sizes = []
    for m in (model, eagerq.convert(qat)):
        buffer = io.BytesIO()
        torch.save(m.state_dict(), buffer)
        sizes.append(len(buffer.getvalue()))
    assert sizes[1] < sizes[0] / 3


def test_fake_quantization_is_what_integers_compute() -> None:
    """One deployed convolution against its integer arithmetic, done in int64."""
    qat = eagerq.convert_qat(nn.Sequential(conv(), bn(), nn.ReLU()), example_inputs=image())
    qat = qat_of(randomise(nn.Sequential(conv(), bn(), nn.ReLU())), image())
    for _ in range(3):
        qat(image())
    deployed = eagerq.convert(qat)
    first = deployed[0]
    source, target = first.input_fake_quant, first.activation_post_process
    x = image()
    codes = torch.round(x / source.scale).add(source.zero_point).clamp(0, 255).long() - source.zero_point.long()
    accumulated = F.conv2d(codes.double(), first.weight_codes.double(), first.bias_codes.double(), padding=1)
    real = accumulated * (source.scale.double() * first.weight_scale.double()).reshape(1, -1, 1, 1)
    expected = torch.round(real.clamp_min(0) / target.scale.double()).add(target.zero_point).clamp(0, 255)
    given = torch.round(deployed(x).double() / target.scale.double()).add(target.zero_point)
    assert (expected - given).abs().max() <= 1  # a code of difference where float32 rounds the other way
    assert (expected != given).double().mean() < 0.02


# --- copying, pickling, compiling


@pytest.mark.parametrize("form", ["fused", "qat", "deployed"])
def test_forms_copy_pickle_and_load(form: str) -> None:
    fused = eagerq.fuse_modules(small(), example_inputs=picture())
    model: nn.Module = fused
    if form != "fused":
        model = train(eagerq.convert_qat(fused))
    if form == "deployed":
        model = eagerq.convert(model)
    model.eval()
    expected = model(picture(9))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(picture(9)), expected)
        assert not {id(t) for t in state_tensors(other)} & {id(t) for t in state_tensors(model)}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for t in (*other.parameters(), *other.buffers()):
            t.fill_(1)
    assert not torch.equal(other(picture(9)), expected)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(picture(9)), expected)


def test_a_copied_qat_model_trains_and_deploys_by_itself() -> None:
    qat = train(qat_of(small(), picture()))
    other = pickle.loads(pickle.dumps(copy.deepcopy(qat)))
    before = snapshot(qat)
    train(other)
    assert snapshot(qat) == before
    assert torch.equal(eagerq.convert(other)(picture(9)), other.eval()(picture(9)))
    assert not torch.equal(other(picture(9)), qat.eval()(picture(9)))


def test_a_trained_state_loads_into_a_fresh_qat_model() -> None:
    trained = train(qat_of(small(), picture()), 5)
    fresh = qat_of(small(), picture())
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(picture(9)), trained.eval()(picture(9)))
    assert torch.equal(eagerq.convert(fresh)(picture(9)), trained(picture(9)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_whole_qat_model_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    eager, other = (qat_of(randomise(Visions(nn.ReLU(inplace=True))), image()) for _ in range(2))
    other.load_state_dict(eager.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        out, expected = compiled(image()), eager(image())
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        out.square().sum().backward()
        expected.square().sum().backward()
    for (name, p), q in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3, msg=name)
    torch._dynamo.reset()


def test_autocast_trains_a_whole_model() -> None:
    qat = qat_of(small(), picture())
    for seed in (0, 1):  # before and after a range is known
        qat.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = qat(picture(seed))
            loss = F.cross_entropy(out.float(), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in qat.parameters())


# --- states that convert and convert_qat refuse


def test_converting_twice() -> None:
    qat = train(qat_of(small(), picture()))
    deployed = eagerq.convert(qat)
    for verb, model, words in (
        (eagerq.convert_qat, qat, "already converted"),
        (eagerq.convert_qat, deployed, "found a deployed one"),
        (eagerq.convert, deployed, "found a deployed one"),
        (eagerq.convert, small(), "found a float one"),
        (eagerq.fuse_modules, qat, "fuse first"),
        (eagerq.fuse_modules, deployed, "fuse first"),
    ):
        before = snapshot(model)
        with pytest.raises(StateError, match=words):
            verb(model, inplace=True)
        assert snapshot(model) == before


def test_converting_before_observing() -> None:
    qat = qat_of(small(), picture())
    before = snapshot(qat)
    for inplace in (True, False):
        with pytest.raises(
            StateError, match=r"stem\.0\.\w+ was to hold an observed range, but its observer saw nothing; run training"
        ):
            eagerq.convert(qat, inplace=inplace)
        assert snapshot(qat) == before
    qat.eval()(picture())  # eval observes nothing
    with pytest.raises(StateError, match="saw nothing"):
        eagerq.convert(qat, inplace=True)


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "saw only zeros"), (float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity")]
)
def test_converting_what_saw_nothing_usable(value: float, words: str) -> None:
    qat = eagerq.convert_qat(nn.Sequential(conv(bias=False)), example_inputs=image())
    qat(torch.full((1, C, 6, 6), value))
    before = snapshot(qat)
    with pytest.raises(StateError, match=words):
        eagerq.convert(qat, inplace=True)
    assert snapshot(qat) == before


def test_converting_a_diverged_model() -> None:
    qat = train(qat_of(small(), picture()))
    with torch.no_grad():
        qat.fc.weight[0, 0] = float("nan")
    before = snapshot(qat)
    with pytest.raises(StateError, match=r"fc\.weight.*diverged"):
        eagerq.convert(qat, inplace=True)
    assert snapshot(qat) == before


def test_nothing_to_quantize() -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.ReLU())
    with pytest.raises(StateError, match="found nothing to quantize in Sequential"):
        eagerq.convert_qat(model, example_inputs=image())
