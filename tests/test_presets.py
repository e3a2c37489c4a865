"""Each preset's evidence: run in an engine where there is one here, else the file against the engine's documented rules."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import preset_rules
import pytest
import strategies
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed
from torch import Tensor, nn

import eagerq
from eagerq.deploy.runtime import saturates, session
from eagerq.nn.qat import QATOp
from eagerq.nn.quantized import QuantizeDequantize, QuantizedModule
from eagerq.quant import PRESETS, FakeQuantize, Observer, QuantSpec, quantization_params
from eagerq.quant.functional import power_of_two
from tests.nets import randomise
from tests.test_exact import Added, Block, Branches, Gate, plus

NETS: dict[str, Callable[[], nn.Module]] = {
    "added": Added,
    "relu": lambda: Block(plus, nn.ReLU()),
    "silu": lambda: Block(plus, nn.SiLU()),
    "hardswish": lambda: Block(plus, nn.Hardswish()),
    "leaky": lambda: Block(plus, nn.LeakyReLU(0.1)),
    "gate": lambda: Gate(nn.Sigmoid()),
    "hard_gate": lambda: Gate(nn.Hardsigmoid()),
    "branches": Branches,
    "resnet": lambda: timm.create_model("resnet10t", num_classes=10),
}
every_net = pytest.mark.parametrize("net", NETS)
one_of_each_kind = pytest.mark.parametrize("net", ["added", "silu", "hardswish", "gate", "branches"])


@functools.cache
def qat_of(net: str, preset: str) -> nn.Module:
    """A QAT model in eval mode whose quantizers have seen some data; not to be changed."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    qat = eagerq.convert_qat(eagerq.fuse_modules(randomise(NETS[net]().train()), example_inputs=x), preset, x)
    with torch.no_grad():
        for _ in range(3):
            qat(torch.randn(2, 3, 32, 32))
    return qat.eval()


def maps_of(net: str, preset: str) -> int:
    """How many linear maps the QAT model has: convolutions, matrix products, norms that fold into none of them."""
    return sum(isinstance(module, QATOp) for module in qat_of(net, preset).modules())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The file of a net under a preset, written once."""
    folder = tmp_path_factory.mktemp("presets")

    def get(net: str, preset: str) -> Path:
        path = folder / f"{net}-{preset}.onnx"
        if not path.exists():
            eagerq.export_onnx(eagerq.convert(qat_of(net, preset)), path, torch.randn(2, 3, 32, 32))
        return path

    return get


Files = Callable[[str, str], Path]


# --- ONNX Runtime on x64: every code is the exact mode's ----------------------------------------------


@one_of_each_kind
@pytest.mark.parametrize("preset", ["onnxruntime-arm", "per_tensor", "qnn", "vitis"])
def test_onnxruntime_computes_the_exact_modes_codes(net: str, preset: str, file: Files) -> None:
    """Of vitis it computes the maps in float, on multiples of powers of two that float32 holds, so that no digit is lost."""
    if preset == "onnxruntime-arm" and saturates():
        pytest.skip("s8 x s8 sums saturate on this processor")
    qat = qat_of(net, preset)
    for model in (qat, eagerq.convert(qat)):
        found = eagerq.verify_deployment(model, file(net, preset), torch.randn(3, 3, 32, 32))
        assert found.compared > 20_000
        assert found.differing == 0, str(found)
        assert found.output_difference == 0.0
        assert not found.exact.floats, str(found)
        assert found.missing == ()


@pytest.mark.parametrize("net", ["added", "silu", "gate", "branches"])
def test_onnxruntime_has_int8_kernels_for_the_arm_preset(net: str, file: Files, tmp_path: Path) -> None:
    session(file(net, "onnxruntime-arm"), optimized=str(tmp_path / "optimized.onnx"))
    proto = onnx.load(tmp_path / "optimized.onnx")
    kernels = Counter(node.op_type for node in proto.graph.node)
    if saturates():  # then the file runs all the same, some of it in float, and the export says so
        assert {"Conv", "Gemm"} & set(kernels)
        model, path = eagerq.convert(qat_of(net, "onnxruntime-arm")), tmp_path / "model.onnx"
        assert eagerq.export_onnx(model, path, torch.randn(2, 3, 32, 32)).floats
        return
    assert kernels["QLinearConv"] + kernels["QGemm"] == maps_of(net, "onnxruntime-arm")
    assert not {"Conv", "Gemm", "Relu"} & set(kernels)


# --- what an engine computes, by its own inputs ---------------------------------------------------------

#: What float32 arithmetic may move a result by before it is rounded to a code: quotients of at most 2^8 codes and sums of at
#: most 2^12 terms hold 2^-12 of a code; one and a half digits more for terms of both signs.
SLACK = 2.0**-10


@dataclasses.dataclass(frozen=True)
class Engine:
    """What an engine gave.

    Attributes:
        output: the model's.
        codes: of quantizers, by full name.
        clipped: quantizers whose results it clips to their range but does not round.
        unseen: quantizers that round, whose codes it does not show.
    """

    output: Tensor
    codes: Mapping[str, Tensor]
    clipped: frozenset[str] = frozenset()
    unseen: frozenset[str] = frozenset()


def check(qat: nn.Module, x: Tensor, engine: Engine) -> None:
    """Every code is a nearest one of the exact result of the engine's own inputs, and the output is their exact result's.

    The deployed model runs in float64 with the engine's codes in the place of its own: each quantizer takes what the layers
    before it make of the engine's codes, and hands on the engine's code of it. So each layer is seen by itself, and a result
    on the edge between two codes may be either. Codes that are not shown are taken rounded both ways at such an edge.
    """
    model = eagerq.convert(qat).double()
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizeDequantize)}
    assert set(engine.codes) | engine.clipped | engine.unseen == set(quantizers)
    apart: dict[str, list[Tensor]] = {name: [] for name in engine.codes}
    edge = 0.0

    def forward_of(name: str, quantizer: QuantizeDequantize) -> Callable[[Tensor], Tensor]:
        scale, zero = quantizer.scale.double(), quantizer.zero_point.double()

        def forward(value: Tensor) -> Tensor:
            place = (value / scale + zero).clamp(quantizer.spec.quant_min, quantizer.spec.quant_max)
            if name in engine.codes:
                codes = engine.codes[name].double()
                apart[name].append((codes - place).abs())
                place = codes
            elif name in engine.unseen:
                place = torch.floor(place + 0.5 + edge)
            return (place - zero) * scale

        return forward

    for name, module in quantizers.items():
        module.forward = forward_of(name, module)  # type: ignore[method-assign]
    for edge in (SLACK, -SLACK):  # noqa: B007
        with torch.no_grad():
            wanted = model(x.double())
    nearest = {name: float(torch.stack(found).amin(0).max()) for name, found in apart.items()}
    assert max(nearest.values()) <= 0.5 + SLACK, nearest
    torch.testing.assert_close(engine.output.double(), wanted, rtol=1e-5, atol=1e-6)


def tapped(path: Path, leave: frozenset[str] = frozenset()) -> tuple[Any, list[str]]:
    """The file with its quantized tensors as outputs too, and their quantizers' names; those to leave are not."""
    proto = onnx.load(path)
    names = [name for node in proto.graph.node for name in node.output if name.endswith(".codes")]
    names = [name for name in names if name.removesuffix(".codes") not in leave]
    kinds = {v.name: v for v in proto.graph.value_info}
    proto.graph.output.extend(kinds.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return proto, [name.removesuffix(".codes") for name in names]


def run_as_written(path: Path, x: Tensor) -> Engine:
    """ONNX Runtime without optimisations: each node by itself, the maps in float."""
    proto, names = tapped(path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    engine = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output, *codes = map(torch.from_numpy, engine.run(None, {engine.get_inputs()[0].name: x.numpy()}))
    return Engine(output, dict(zip(names, codes, strict=True)))


@pytest.mark.parametrize("net", ["added", "gate", "resnet"])
def test_onnxruntime_computes_what_the_tensorrt_file_says(net: str, file: Files) -> None:
    """Not code for code: its biases are float, so that no engine here has integer kernels for it."""
    x = torch.randn(3, 3, 32, 32)
    check(qat_of(net, "tensorrt"), x, run_as_written(file(net, "tensorrt"), x))


def test_a_wrong_code_is_found_out(file: Files) -> None:
    x = torch.randn(1, 3, 32, 32)
    engine = run_as_written(file("added", "tensorrt"), x)
    check(qat_of("added", "tensorrt"), x, engine)
    next(reversed(engine.codes.values())).view(-1)[0] += 1
    with pytest.raises(AssertionError, match="head"):
        check(qat_of("added", "tensorrt"), x, engine)


# --- OpenVINO, which runs here ---------------------------------------------------------------------------

CORE = openvino.Core()


def compiled(model: bytes | Path) -> Any:
    """On one thread, in float32 where it is not integers."""
    read = CORE.read_model(model if isinstance(model, bytes) else str(model))
    return CORE.compile_model(read, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})


def kernels(engine: Any) -> list[tuple[str, str, list[str]]]:
    """(kind, precision, names of the ONNX nodes inside) of what the engine runs."""
    infos = [node.get_rt_info() for node in engine.get_runtime_model().get_ordered_ops()]
    keys = ("layerType", "runtimePrecision", "originalLayersNames")
    rows = [[info[key].astype(str) if key in info else "" for key in keys] for info in infos]
    return [(kind, precision, names.split(",")) for kind, precision, names in rows]


def run_in_openvino(path: Path, x: Tensor) -> Engine:
    """The file as it is, and once more with its quantized tensors shown, but for those that would change what is computed.

    Where OpenVINO adds a residual inside the convolution's kernel, it clips the convolution's result to its quantizer's range
    and does not round it. It names the quantizers inside a kernel itself; all but the last are of that kind. Showing them, or
    the other operand, which the kernel overwrites, would make it add outside.
    """
    g = preset_rules.Graph(path)
    quantizer_of = {node.name: node.output[0].removesuffix(".codes") for node in g.of("QuantizeLinear")}
    whole = compiled(path)
    inside = [[quantizer_of[name] for name in names if name in quantizer_of] for _, _, names in kernels(whole)]
    clipped = frozenset(name for names in inside for name in names[:-1])
    made = [[g.source(name) for name in add.input if g.is_dequantized(name, ())] for add in g.of("Add")]
    operands = [[node.input[0].removesuffix(".codes") for node in pair] for pair in made]
    unseen = frozenset(name for pair in operands if clipped & set(pair) for name in pair) - clipped
    proto, names = tapped(path, leave=clipped | unseen)
    shown = compiled(proto.SerializeToString())(x.numpy())
    output, *codes = (torch.from_numpy(np.array(shown[i])) for i in range(len(names) + 1))
    assert np.array_equal(output, whole(x.numpy())[0])  # showing them changes nothing
    return Engine(output, dict(zip(names, codes, strict=True)), clipped, unseen)


@pytest.mark.skipif(saturates(), reason="u8 x s8 sums saturate on this processor")
@every_net
def test_openvino_gives_the_nearest_codes(net: str, file: Files) -> None:
    x = torch.randn(3, 3, 32, 32)
    engine = run_in_openvino(file(net, "openvino"), x)
    if net != "branches":  # whose residual OpenVINO adds inside the kernel on some processors
        assert bool(engine.clipped) == (net in ("relu", "silu", "hardswish", "leaky", "resnet"))  # the law is met both ways
    check(qat_of(net, "openvino"), x, engine)


@every_net
def test_openvino_runs_every_map_on_integers_without_a_split(net: str, file: Files) -> None:
    ran = kernels(compiled(file(net, "openvino")))
    maps = [precision for kind, precision, _ in ran if kind in ("Convolution", "FullyConnected")]
    assert maps == ["u8"] * maps_of(net, "openvino")


# --- engines that cannot be run here: the file against their rules ----------------------------------------

Graphs = Callable[[str, str], preset_rules.Graph]

RULES: Mapping[str, Callable[[preset_rules.Graph], list[str]]] = {
    "onnxruntime-arm": preset_rules.onnxruntime_arm,
    "tensorrt": preset_rules.tensorrt,
    "qnn": preset_rules.qnn,
    "vitis": preset_rules.vitis,
}


@pytest.fixture(scope="module")
def graph(file: Files) -> Graphs:
    """The graph of a net under a preset; of one batch where the engine wants no open shapes."""

    @functools.cache
    def get(net: str, preset: str) -> preset_rules.Graph:
        proto = onnx.load(file(net, preset))
        if preset == "qnn":
            make_dim_param_fixed(proto.graph, proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param, 1)
        return preset_rules.Graph(proto)

    return get


@one_of_each_kind
@pytest.mark.parametrize("preset", RULES)
def test_the_file_keeps_the_engines_rules(net: str, preset: str, graph: Graphs) -> None:
    assert RULES[preset](graph(net, preset)) == []


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_rules_tell_engines_apart(preset: str, graph: Graphs) -> None:
    g = graph("added", preset)
    assert [name for name, rules in RULES.items() if not rules(g)] == [name for name in RULES if name == preset]


def test_the_one_rule_that_qnn_has_and_a_preset_cannot_keep(graph: Graphs) -> None:
    """docs/presets.md says it."""
    assert preset_rules.qnn(graph("hard_gate", "qnn")) == ["HardSigmoid is no operator of the provider"]


def node_of(g: preset_rules.Graph, kind: str, operand: int | None = None) -> Any:
    """The first node of a kind, or the DequantizeLinear that gives it an operand."""
    node = next(g.of(kind))
    return node if operand is None else g.source(node.input[operand], preset_rules.MOVING)


def times(factor: float, kind: str, operand: int) -> Callable[[preset_rules.Graph], None]:
    """A change: the scale of an operand, apart from all others that share it."""

    def change(g: preset_rules.Graph) -> None:
        node = node_of(g, kind, operand)
        g.constants["changed"] = (g.scale(node) * factor).astype(np.float32)
        node.input[1] = "changed"

    return change


def shift_zero(kind: str, operand: int) -> Callable[[preset_rules.Graph], None]:
    def change(g: preset_rules.Graph) -> None:
        node = node_of(g, kind, operand)
        g.constants["changed"] = g.zero_point(node) + np.ones_like(g.zero_point(node))
        node.input[2] = "changed"

    return change


def past(kind: str, operand: int) -> Callable[[preset_rules.Graph], None]:
    """A change: the operand's quantizer is left out."""

    def change(g: preset_rules.Graph) -> None:
        node = node_of(g, kind)
        node.input[operand] = g.source(node_of(g, kind, operand).input[0]).input[0]

    return change


def open_shape(g: preset_rules.Graph) -> None:
    g.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def fewer_zeros(g: preset_rules.Graph) -> None:
    g.constants["changed"] = np.zeros((), np.int8)
    node_of(g, "Conv", 1).input[2] = "changed"


def no_output_quantizer(g: preset_rules.Graph) -> None:
    """The first quantizer behind a map becomes something else."""
    node = node_of(g, "Gemm")
    g.readers[node.output[0]][0].op_type = "Cast"


CHANGES: tuple[tuple[str, Callable[[preset_rules.Graph], None], str], ...] = (
    ("onnxruntime-arm", times(2.0, "Conv", 2), "is on another grid than"),
    ("onnxruntime-arm", shift_zero("Conv", 2), "the bias of"),
    ("onnxruntime-arm", shift_zero("Conv", 1), "the weight of .* has a zero point"),
    ("onnxruntime-arm", past("Conv", 0), "the input of .* is not quantized"),
    ("tensorrt", shift_zero("Conv", 0), "zero point other than 0"),
    ("tensorrt", times(-1.0, "Conv", 0), "not positive float32"),
    ("tensorrt", fewer_zeros, "8 scales and 1 zero points"),
    ("tensorrt", past("Add", 1), "the shortcut of .* is not quantized"),
    ("qnn", open_shape, "open shape"),
    ("qnn", past("Add", 0), "an operand of .* is not quantized"),
    ("qnn", no_output_quantizer, "the output of .* is not quantized"),
    ("vitis", times(1.5, "Conv", 0), "no power of two"),
    ("vitis", times(2.0**20, "Conv", 2), "shifts its bias by"),
    ("vitis", times(2.0**-30, "Conv", 1), "shifts its sum by"),
    ("vitis", times(2.0**30, "Add", 1), "too far apart"),
    ("vitis", no_output_quantizer, "the output of .* is not quantized"),
)


@pytest.mark.parametrize(("preset", "change", "fault"), CHANGES, ids=[f"{p}-{f}" for p, _, f in CHANGES])
def test_each_rule_can_be_broken(preset: str, change: Callable[[preset_rules.Graph], None], fault: str, graph: Graphs) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(graph("added", preset).proto)
    g = preset_rules.Graph(proto)
    assert not RULES[preset](g)
    change(g)
    assert re.search(fault, "; ".join(RULES[preset](g)))


def test_tensorrt_quantizes_the_shortcut_and_not_the_sum_it_is_added_to(graph: Graphs) -> None:
    for net, adds in (("added", 1), ("silu", 1), ("resnet", 4)):
        g = graph(net, "tensorrt")
        found = list(preset_rules.adds_with_a_convolution(g))
        assert len(found) == adds
        assert all(g.is_dequantized(other) for _, _, other in found)
        readers = [g.readers[add.output[0]] for add, _, _ in found]
        assert all(r.op_type in ("Relu", "QuantizeLinear", "GlobalAveragePool") for rs in readers for r in rs)


# --- powers of two ------------------------------------------------------------------------------------------


@given(x=st.floats(2.0**-40, 2.0**40, width=32))
def test_the_next_power_of_two(x: float) -> None:
    for dtype in (torch.float32, torch.float64):
        found = Fraction(float(power_of_two(torch.tensor(x, dtype=dtype))))
        assert found.numerator == 1 or found.denominator == 1
        assert found.numerator & (found.numerator - 1) == found.denominator & (found.denominator - 1) == 0
        assert found / 2 < Fraction(x) <= found


@given(spec=strategies.specs(), seed=st.integers(0, 99))
def test_a_scale_that_is_a_power_of_two_overflows_nothing(spec: QuantSpec, seed: int) -> None:
    """And none is needlessly large: half of it would leave the range."""
    low, high = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(0).values
    exact, _ = quantization_params(spec, low, high)
    if not spec.power_of_two:
        return
    assert (torch.frexp(exact).mantissa == 0.5).all()
    plain, _ = quantization_params(QuantSpec(spec.bits, spec.signed, spec.symmetric), low, high)
    assert ((plain <= exact) & (exact < 2 * plain)).all()


def test_observers_quantizers_and_folded_weights_keep_to_powers_of_two() -> None:
    for observer in ("min_max", "moving_average", "percentile", "mse"):
        spec = QuantSpec(signed=True, symmetric=True, power_of_two=True, observer=observer)  # type: ignore[arg-type]
        module = FakeQuantize(spec)
        for seed in range(3):
            module(torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 3**seed)
            assert math.frexp(float(module.scale))[0] == 0.5
    # the least squared error picks a smaller power of two where few values lie outside
    data = torch.cat([torch.randn(4000), torch.tensor([9.0])])
    scales = []
    for observer in ("min_max", "mse"):
        spec = QuantSpec(bits=4, signed=True, symmetric=True, power_of_two=True, observer=observer)  # type: ignore[arg-type]
        seen = Observer(spec)
        seen(data)
        scales.append(float(quantization_params(spec, seen.min_val, seen.max_val)[0]))
    assert scales[1] < scales[0]


@pytest.mark.parametrize("tiny", [False, True], ids=["trained", "a bias beside tiny weights"])
def test_folded_vitis_weights_and_biases_are_shifts_apart(tiny: bool) -> None:
    qat = copy.deepcopy(qat_of("silu", "vitis"))
    if tiny:
        with torch.no_grad():
            qat.right[0].weight.mul_(1e-9)  # type: ignore[union-attr,index]
            qat.right[0].bn.bias.fill_(50.0)  # type: ignore[union-attr,index]
    for module in eagerq.convert(qat).modules():
        if not isinstance(module, QuantizedModule):
            continue
        assert module.bias_codes is not None
        assert module.bias_scale is not None
        assert module.weight_scale is not None
        assert (module.weight_codes.dtype, module.bias_codes.dtype) == (torch.int8, torch.int8)
        scales = torch.stack([module.weight_scale.reshape(()), module.bias_scale.reshape(())])
        assert (torch.frexp(scales).mantissa == 0.5).all()
