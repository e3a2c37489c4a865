"""Graph rewrites: the same numbers, in forms that ONNX Runtime runs on codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import Tensor, nn

import eagerq
from eagerq.deploy.rewrites import pair_moves, sum_hardsigmoids
from eagerq.deploy.runtime import saturates, session
from eagerq.quant.code_values import Coded
from eagerq.quant.codes import CodeTensor
from eagerq.quant.engine import PROFILES, Grid, hardsigmoid_terms
from tests.nets import Made, randomise

PROFILE = PROFILES["onnxruntime-x64"]
SHAPE = (1, 4, 6, 6)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def model(nodes: list[Any], outputs: str, shape: tuple[int | str, ...] = ("n", *SHAPE[1:]), **constants: Any) -> Any:
    """A graph of float input ``x`` with the quantizers' constants ``s``, ``z`` and more."""
    held = {"s": np.float32(0.11), "z": np.uint8(7), "s2": np.float32(0.13), **constants}
    kinds = {"y": onnx.TensorProto.FLOAT, "y2": onnx.TensorProto.FLOAT, "codes": helper.np_dtype_to_tensor_dtype(held["z"].dtype)}
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, kinds[name], None) for name in outputs.split()],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )


def run(proto: Any, x: np.ndarray) -> list[np.ndarray]:
    """What the graph computes as it is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    engine = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return engine.run(None, {"x": x})  # type: ignore[no-any-return]


def optimized(proto: Any, folder: Path) -> Any:
    session(proto.SerializeToString(), optimized=str(folder / "optimized.onnx"))
    return onnx.load(folder / "optimized.onnx").graph


def in_float(graph: Any) -> list[str]:
    """The operations that read real values of codes."""
    real = {name for n in graph.node if n.op_type == "DequantizeLinear" for name in n.output}
    return [n.op_type for n in graph.node if real & {*n.input}]


def rewritten(proto: Any, rewrite: Callable[..., None], *args: Any) -> Any:
    new = onnx.ModelProto()
    new.CopyFrom(proto)
    rewrite(onnx, new, *args)
    return new


# --- what only moves codes --------------------------------------------------------------------------

QUANTIZED = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d")]


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


FACTORS = np.array([1, 1, 2, 1.5], np.float32)


def resize(**attributes: Any) -> Any:
    return helper.make_node("Resize", ["d", "", "a"], ["y"], **attributes)


MOVES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "resize": ([resize(nearest_mode="floor", coordinate_transformation_mode="asymmetric")], {"a": FACTORS}),
    "split": ([node("Split", "d a", "y y2", axis=1)], {"a": ints(1, 3)}),
    "gather": ([node("Gather", "d a", "y", axis=2)], {"a": ints(3)}),
    "depth_to_space": ([node("DepthToSpace", "d", "y", blocksize=2)], {}),
    "expand": ([node("Expand", "d a", "y")], {"a": ints(3, 4, 6, 6)}),
    "tile": ([node("Tile", "d a", "y")], {"a": ints(1, 2, 1, 1)}),
    "reduce_max": ([node("ReduceMax", "d a", "y")], {"a": ints(2, 3)}),
    "flatten": ([node("Flatten", "d", "y")], {}),
    "concat": ([node("Concat", "d d", "y", axis=1)], {}),
    "passed by": ([node("Transpose", "d", "t", perm=[0, 2, 1, 3]), node("Gather", "t a", "y", axis=2)], {"a": ints(0, 1)}),
    "pooled": (
        [node("MaxPool", "d", "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1]), node("Concat", "p d", "y", axis=1)],
        {},
    ),
    "in a row": ([node("Split", "d a", "t y2", axis=1), node("Tile", "t b", "y")], {"a": ints(2, 2), "b": ints(1, 1, 2, 1)}),
    "a moved shape": (
        [node("Tile", "d a", "t"), node("Shape", "t", "n"), node("Expand", "t n", "y")],
        {"a": ints(1, 1, 2, 1)},
    ),
    "its shape": (
        [node("Shape", "d", "n"), node("Concat", "n", "n1", axis=0), node("Expand", "d n1", "y")],
        {},
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_of_codes_give_the_same_and_run_on_codes(name: str, tmp_path: Path) -> None:
    nodes, constants = MOVES[name]
    outputs = " ".join(o for o in ("y", "y2") if any(o in n.output for n in nodes))
    before = model([*QUANTIZED, *nodes], outputs, **constants)
    after = rewritten(before, pair_moves)
    x = np.random.default_rng(0).normal(0, 9, SHAPE).astype("f")
    for ours, theirs in zip(run(after, x), run(before, x), strict=True):
        assert np.array_equal(ours, theirs)
    assert in_float(optimized(before, tmp_path)), "it ran on codes without the rewrite"
    assert not in_float(optimized(after, tmp_path))


SECOND = [node("QuantizeLinear", "x s2 z", "r"), node("DequantizeLinear", "r s2 z", "e")]
LEFT_ALONE: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "values of its own": ([*QUANTIZED, resize(mode="linear")], {"a": FACTORS}),
    "two grids": ([*QUANTIZED, *SECOND, node("Concat", "d e", "y", axis=1)], {}),
    "a weight": (
        [node("DequantizeLinear", "w s z", "d"), node("Tile", "d a", "t"), node("Add", "x t", "y")],
        {"w": np.ones(SHAPE, np.uint8), "a": ints(1, 1, 1, 1)},
    ),
    "a quantizer behind it": (
        [*QUANTIZED, node("Tile", "d a", "t"), node("QuantizeLinear", "t s2 z", "u"), node("DequantizeLinear", "u s2 z", "y")],
        {"a": ints(1, 2, 1, 1)},
    ),
    "real values": ([node("Tile", "x a", "y")], {"a": ints(1, 2, 1, 1)}),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_no_move_of_codes_is_left_alone(name: str) -> None:
    nodes, constants = LEFT_ALONE[name]
    before = model(nodes, "y", **constants)
    assert rewritten(before, pair_moves) == before


@given(st.floats(2.0**-60, 2.0**60, width=32), st.integers(0, 255), st.booleans())
def test_a_code_quantized_again_is_itself(scale: float, zero: int, signed: bool) -> None:
    low = -128 if signed else 0
    codes = torch.arange(low, low + 256).float()
    grid = Grid(torch.tensor(scale), torch.tensor(float(low + zero)), low, low + 255)
    assert torch.equal(PROFILE.quantize(PROFILE.dequantize(codes, grid), grid), codes)


#: Channels of the result, and the function.
PRESERVING: tuple[tuple[int, Callable[[Tensor], Tensor]], ...] = (
    (4, lambda x: x.chunk(2, 1)[1]),
    (5, lambda x: x.split([3, 5], 1)[1]),
    (8, lambda x: F.interpolate(x, scale_factor=2.0)),
    (8, lambda x: F.interpolate(x, size=(5, 7), mode="nearest")),
    (8, lambda x: F.max_pool2d(x, 3, 2, 1)),
    (8, lambda x: F.adaptive_max_pool2d(x, 1)),
    (8, lambda x: x.permute(0, 1, 3, 2)),
    (2, lambda x: F.pixel_shuffle(x, 2)),
    (16, lambda x: x.repeat(1, 2, 1, 1)),
    (8, lambda x: x[:, :, :1].expand(-1, -1, 4, -1)),
    (8, lambda x: x.roll(1, 2)),
    (4, lambda x: x.view(x.shape[0], 2, 4, 8, 8)[:, 1]),
    (16, lambda x: torch.cat([x, F.max_pool2d(x, 5, 1, 2)], 1)),
    (8, lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
)


class Branches(nn.Module):
    """Convolutions that read the same values, moved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.readers = nn.ModuleList(nn.Conv2d(channels, 3, 1) for channels, _ in PRESERVING)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.act(self.stem(x))
        return [reader(move(x)) for reader, (_, move) in zip(self.readers, PRESERVING, strict=True)]


def test_whatever_moves_values_is_on_its_input_s_grid_and_runs_on_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    qat = eagerq.convert_qat(Branches().train(), example_inputs=x)
    qat(x)
    assert all(reader.input_fake_quant is None for reader in qat.readers)
    deployed = eagerq.convert(qat)
    path = eagerq.export_onnx(deployed, tmp_path / "model.onnx", x, strict=True)
    found = eagerq.verify_deployment(deployed, path, torch.randn(3, 3, 8, 8))
    assert found.differing == 0, str(found)
    assert not found.exact.floats, str(found)
    assert not in_float(optimized(onnx.load(path), tmp_path))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
def test_an_interpolation_is_on_its_input_s_grid_if_it_takes_the_nearest(mode: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    convs = {"one": nn.Conv2d(3, 8, 3), "two": nn.Conv2d(8, 4, 1)}
    net = Made(lambda net, x: net.two(F.interpolate(net.one(x), scale_factor=2, mode=mode)), **convs)
    qat = eagerq.convert_qat(net, example_inputs=x)
    assert (qat.two.input_fake_quant is None) == (mode == "nearest")


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
factors = st.sampled_from([0.25, 0.3, 0.5, 2 / 3, 0.9, 1.0, 1.1, 1.5, 1.7, 2.0, 2.3, 3.0, 4.0, 5.6])


@example((4, 5), 1.1, False)  # to the same size
@given(sizes, st.one_of(st.tuples(st.integers(1, 120), st.integers(1, 120)), factors), st.booleans())
def test_the_nearest_place_is_the_engine_s(size: tuple[int, int], to: tuple[int, int] | float, recompute: bool) -> None:
    how: dict[str, Any] = {"size": to} if isinstance(to, tuple) else {"scale_factor": to, "recompute_scale_factor": recompute}
    codes = torch.arange(size[0] * size[1]).remainder(251).reshape(1, 1, *size).float()
    shape = F.interpolate(torch.empty(1, 1, *size), **how).shape if isinstance(to, tuple) or min(size) * to >= 1 else None
    assume(shape is not None)
    found = F.interpolate(
        CodeTensor(Coded(codes, Grid.of(eagerq.QuantSpec(), torch.tensor(0.1), torch.tensor(7)), PROFILE)), **how
    )
    by_size = isinstance(to, tuple) or recompute
    given_to = np.array(shape, np.int64) if by_size else np.array([1, 1, to, to], np.float32)
    resized = helper.make_node(
        "Resize", ["x", "", "", "a"] if by_size else ["x", "", "a"], ["y"], nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )  # fmt: skip
    (theirs,) = run(model([resized], "y", tuple(codes.shape), a=given_to), codes.numpy())
    assume(theirs.shape == shape)  # the engine's own size, of the factor in float32, is one more at times
    assert torch.equal(found.value.codes, torch.from_numpy(theirs))


# --- hard sigmoids ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gate:
    """Grids of a hard sigmoid's input and result."""

    scale: float
    zero: int
    to_scale: float
    to_zero: int
    signed: bool

    @property
    def grids(self) -> tuple[Grid, Grid]:
        low = -128 if self.signed else 0
        pairs = ((self.scale, self.zero), (self.to_scale, self.to_zero))
        of_x, grid = (Grid(torch.tensor(s), torch.tensor(float(z + low)), low, low + 255) for s, z in pairs)
        return of_x, grid

    def graph(self) -> Any:
        of_x, grid = self.grids
        kind = np.int8 if self.signed else np.uint8
        nodes = [
            node("QuantizeLinear", "x s z", "q"),
            node("DequantizeLinear", "q s z", "d"),
            node("HardSigmoid", "d", "g", name="gate", alpha=1 / 6, beta=0.5),
            node("QuantizeLinear", "g t u", "codes"),
            node("DequantizeLinear", "codes t u", "y"),
        ]
        constants = {"s": of_x.scale.numpy(), "z": kind(of_x.zero_point), "t": grid.scale.numpy(), "u": kind(grid.zero_point)}
        return model(nodes, "codes y", (1, 256), **constants)


def code(x: Fraction, grid: Grid) -> int:
    """The nearest code, exactly."""
    return min(max(round(x / Fraction(grid.scale.item())) + int(grid.zero_point), grid.low), grid.high)


edges = st.sampled_from([1 / 255, 1 / 254.6, 1 / 254.4, 1 / 127.5])  # of the scales that clip at 1
gates = st.builds(
    Gate,
    scale=st.floats(2.0**-9, 0.5, width=32),
    zero=st.integers(0, 255),
    to_scale=st.one_of(st.floats(2.0**-14, 2.0**-5, width=32), edges),
    to_zero=st.sampled_from([0, 0, 0, 1, 128, 255]),
    signed=st.booleans(),
)


@given(gates)
def test_a_grid_clips_as_a_hard_sigmoid_just_if_no_value_says_otherwise(gate: Gate) -> None:
    of_x, grid = gate.grids
    values = [Fraction(x) for x in (-(2**20), -0.75, -(2**-14), 0, 0.5, 1, 1.25, 2**20)]
    same = all(code(x, grid) == code(min(max(x, Fraction(0)), Fraction(1)), grid) for x in values)
    assert grid.clips_to_unit() == same
    assert (hardsigmoid_terms(of_x, grid) is not None) == same
    narrower_x, narrower = (dataclasses.replace(g, high=g.low + 15) for g in gate.grids)
    for pair in ((of_x, narrower), (narrower_x, grid), (narrower_x, narrower)):
        assert hardsigmoid_terms(*pair) is None


@given(gates)
@example(Gate(2.0**-8, 0, 2.0**-8, 0, True))  # of ties
def test_a_hard_sigmoid_of_all_codes_is_that_of_the_engine_and_the_nearest(gate: Gate) -> None:
    of_x, grid = gate.grids
    codes = torch.arange(of_x.low, of_x.high + 1).float()
    before = gate.graph()
    after = rewritten(before, sum_hardsigmoids, {"gate"})
    is_sum = hardsigmoid_terms(of_x, grid) is not None
    assert ("Add" in {n.op_type for n in after.graph.node}) == is_sum
    assert ("HardSigmoid" in {n.op_type for n in after.graph.node}) != is_sum
    assert rewritten(before, sum_hardsigmoids, ()) == before
    x = PROFILE.dequantize(codes, of_x).reshape(1, 256).numpy()
    ours = PROFILE.hardsigmoid_sum(codes, of_x, grid)
    theirs, _ = session(after.SerializeToString()).run(None, {"x": x})
    theirs = torch.from_numpy(theirs).float().reshape(-1)
    real = F.hardsigmoid((codes - of_x.zero_point).double() * of_x.scale.double())
    place = (real / grid.scale.double() + grid.zero_point.double()).clamp(grid.low, grid.high)
    for found in (ours, theirs):
        assert ((found.double() - place).abs() <= 0.5 + 2e-3).all()
    if not (gate.signed and saturates()):  # there the sum stays float, whose ties go another way
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reader", [None, "Neg", "QuantizeLinear"])
def test_a_hard_sigmoid_that_is_read_otherwise_stays(reader: str | None) -> None:
    before = Gate(0.1, 100, 1 / 255, 0, False).graph()
    name = "g" if reader is None else "other"
    if reader is not None:
        before.graph.node.append(node(reader, "g t u" if reader == "QuantizeLinear" else "g", name))
    before.graph.output.append(onnx.ValueInfoProto(name=name))
    assert rewritten(before, sum_hardsigmoids, {"gate"}) == before


def act_of(name: str) -> nn.Module:
    return {"hardsigmoid": nn.Hardsigmoid, "of timm": timm.layers.activations.HardSigmoid, "hardswish": nn.Hardswish}[name]()


@pytest.mark.parametrize("gates_named", [("sigmoid", "hardsigmoid"), ("sigmoid",)])
@pytest.mark.parametrize("act", ["hardsigmoid", "of timm", "hardswish"])
def test_a_hard_sigmoid_is_a_sum_where_the_config_names_its_gate(act: str, gates_named: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    qconfig = dataclasses.replace(eagerq.PRESETS["onnxruntime"], gates=gates_named)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), act_of(act), nn.Conv2d(8, 4, 1))
    qat = eagerq.convert_qat(eagerq.fuse_modules(randomise(net.train()), example_inputs=x), qconfig, x)
    qat(3 * x)
    deployed = eagerq.convert(qat)
    path = eagerq.export_onnx(deployed, tmp_path / "model.onnx", x)
    proto = onnx.load(path)
    assert ("half/scale" in {i.name for i in proto.graph.initializer}) == ("hardsigmoid" in gates_named)
    assert bool(in_float(optimized(proto, tmp_path))) == ("hardsigmoid" not in gates_named)
    for held in (qat.eval(), deployed):
        verified = eagerq.verify_deployment(held, path, 3 * torch.randn(4, 3, 12, 12))
        assert verified.differing == 0, str(verified)
        assert verified.missing == ()
