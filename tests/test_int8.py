"""Exact mode in integer kernels: the codes of the float exact mode bit for bit, one byte each, and the weights int8."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import ROWS, Row
from strategies import geometries
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import eagerq
from eagerq.nn import int8, integer
from eagerq.nn.int8 import Sums, integer_sums
from eagerq.nn.integer import integer_map
from eagerq.nn.quantized import QuantizeDequantize, QuantizedModule
from eagerq.quant import FakeQuantize, pieces
from eagerq.quant.code_values import Coded
from eagerq.quant.codes import CodeTensor, encode
from eagerq.quant.engine import PROFILES, EngineProfile, Grid
from tests.nets import Made, conv, image
from tests.test_exact import MOVES, NETS, Added, qat_of

PROFILE = PROFILES["onnxruntime-x64"]
BYTES = EngineProfile("onnxruntime-x64", 1, "int8")
OP_ROWS = [row for row in ROWS if (row.norm is None or row.op is None) and row.act is None and row.op is not nn.Embedding]
in_kernels = pytest.mark.skipif(bool(int8.refusal()), reason=f"no exact integer kernels here: {int8.refusal()}")

signs = st.booleans()
#: Zero points, cut to the grid; and which codes and weights are drawn: all, or the ends of the grid, where sums are largest.
zeros = st.one_of(st.sampled_from([-128, 0, 127, 128, 255]), st.integers(-128, 255))
ends = st.sampled_from(["all", "low", "high"])


def drawn(seed: int, low: int, high: int, shape: Any, end: str) -> Tensor:
    """Whole numbers between ``low`` and ``high``, or near one of them, int64."""
    span = (high - low) // 8
    bounds = {"all": (low, high), "low": (low, low + span), "high": (high - span, high)}[end]
    return torch.randint(bounds[0], bounds[1] + 1, tuple(shape), generator=torch.Generator().manual_seed(seed))


def grid_of(signed: bool, zero: int, scale: float = 0.5) -> Grid:
    """A grid of bytes."""
    low, high = (-128, 127) if signed else (0, 255)
    dtype = torch.int8 if signed else torch.uint8
    return Grid(torch.tensor(scale), torch.tensor(float(min(max(zero, low), high))), low, high, dtype)


def exact_sums(op: Any, x: Tensor, zero: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The slow oracle: whole numbers in float64, where every sum here is exact; the engine's rounding of it."""
    total = op.op(x.double() - zero, weight.double(), None).round()
    if bias is not None:
        total = total + bias.double().reshape([-1 if axis == op.output_axis % total.dim() else 1 for axis in range(total.dim())])
    return total.float()


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", OP_ROWS, ids=str)
@given(data=st.data(), seed=st.integers(0, 999), signed=signs, zero=zeros, end=ends, of_weights=ends, wide=signs, last=signs)
def test_maps_of_bytes_are_those_of_exact_integers(
    row: Row, data: st.DataObject, seed: int, signed: bool, zero: int, end: str, of_weights: str, wide: bool, last: bool
) -> None:
    """Any geometry, zero point and bias; scales one a tensor or a channel; weights of one byte less a zero point."""
    g = data.draw(geometries(row))
    op = row.to_qat(row.chain(g))
    grid = grid_of(signed, zero)
    out = grid_of(data.draw(signs), zero, data.draw(st.sampled_from([8.0, 900.0])))
    x = drawn(seed, grid.low, grid.high, row.input(g).shape, end).to(grid.dtype)
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    weight = drawn(seed + 1, -255 if wide else -127, 255 if wide else 127, op.weight.shape, of_weights).float()
    reach = data.draw(st.sampled_from([100, 2**24, 2**30]))
    bias = drawn(seed + 2, -reach, reach, (g.out_channels,), "all").to(torch.int32) if g.bias else None
    channels = op.weight.shape[op.channel_axis] if data.draw(signs) else 1
    scale = torch.rand(channels, generator=torch.Generator().manual_seed(seed)) + 0.5

    found = integer_map(op, Coded(x, grid, BYTES), weight if wide else weight.to(torch.int8), scale, bias, (), {}).value
    total = exact_sums(op, x, float(grid.zero_point), weight, bias)
    factor = (grid.scale * scale).repeat(g.out_channels // channels)
    factor = factor.reshape([-1 if axis == op.output_axis % total.dim() else 1 for axis in range(total.dim())])
    assert found.shape() == total.shape
    assert torch.equal(found.real(), total * factor)
    codes = found.on(out)
    assert codes.dtype == out.dtype
    assert torch.equal(codes.float(), PROFILE.requantize(total, factor, Grid(out.scale, out.zero_point, out.low, out.high)))


#: What oneDNN's convolution was seen to sum wrongly, or to crash at, when left to itself; and the input's size.
TRAPS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "a stride that is never taken": (nn.Conv2d(3, 48, (1, 3), (1, 3), groups=3), (2, 3)),
    "the same, one channel": (nn.Conv2d(1, 16, (3, 5), (1, 2), (2, 0)), (4, 6)),
    "a window in the padding": (nn.Conv1d(1, 2, 2, 2, 3, 2), (1,)),
    "wider than the input": (nn.Conv2d(33, 66, (5, 2), (1, 3), (4, 1)), (4, 1)),
    "padding on both sides": (nn.Conv3d(16, 80, (3, 3, 2), (2, 3, 3), (2, 2, 1), (1, 2, 1), groups=16), (1, 1, 1)),
    "groups, a zero point and two threads": (nn.Conv2d(2, 64, (1, 5), (3, 1), groups=2), (21, 7)),
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("zero", [0, 255])
def test_where_the_convolution_alone_is_wrong(trap: str, zero: int) -> None:
    host, sizes = TRAPS[trap]
    op: Any = getattr(eagerq.nn.qat, type(host).__name__).from_float(host)
    x = drawn(0, 0, 255, (3, host.in_channels, *sizes), "all").to(torch.uint8)
    weight = drawn(1, -128, 127, op.weight.shape, "all").to(torch.int8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = integer_map(op, Coded(x, grid_of(False, zero, 1.0), BYTES), weight, torch.ones(1), None, (), {}).value.real()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, exact_sums(op, x, zero, weight, None))


@in_kernels
@given(
    seed=st.integers(0, 99),
    inputs=st.sampled_from([513, 5000, 2**16]),
    signed=signs,
    zero=zeros,
    end=ends,
    of_weights=ends,
    bias=signs,
    wide=signs,
)
def test_sums_beyond_float32_are_rounded_once(
    seed: int, inputs: int, signed: bool, zero: int, end: str, of_weights: str, bias: bool, wide: bool
) -> None:
    op = eagerq.nn.qat.Linear.from_float(nn.Linear(inputs, 3))
    grid = grid_of(signed, zero)
    x = drawn(seed, grid.low, grid.high, (2, inputs), end).to(grid.dtype)
    weight = drawn(seed + 1, *((-255, 255) if wide else (-128, 127)), (3, inputs), of_weights).float()
    offset = drawn(seed + 2, -(2**30), 2**30, (3,), "all").to(torch.int32) if bias else None
    sums = integer_sums(op, Coded(x, grid, BYTES), weight, (), offset, True)
    assert isinstance(sums, Sums)
    wanted = exact_sums(op, x, float(grid.zero_point), weight, offset)
    assert torch.equal(sums.of(x), wanted)


@pytest.mark.skipif("fails" in int8.refusal() or "has no" in int8.refusal(), reason=f"no kernels here: {int8.refusal()}")
@pytest.mark.parametrize("shape", [(3, 17, 5, 7), (2, 32, 1, 1), (2, 5, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("zero", [0, 113])
def test_a_norm_that_folds_into_nothing_has_integer_kernels(
    shape: tuple[int, ...], zero: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum has one product, which saturates on no processor."""
    monkeypatch.setattr(int8, "refusal", str)
    channels = shape[1]
    op = (eagerq.nn.qat.BatchNorm2d if len(shape) == 4 else eagerq.nn.qat.BatchNorm3d)(channels)
    weight = (127 * drawn(0, 0, 1, op.weight.shape, "all") * 2 - 127).to(torch.int8)
    bias = drawn(1, -(2**20), 2**20, (channels,), "all").to(torch.int32)
    x = drawn(2, 0, 255, shape, "all").to(torch.uint8)
    sums = integer_sums(op, Coded(x, grid_of(False, zero), BYTES), weight, (), bias, True)
    assert isinstance(sums, Sums)
    along = (-1, *(1,) * (len(shape) - 2))
    assert torch.equal(sums.of(x), ((x.long() - zero) * weight.long().reshape(along) + bias.reshape(along)).float())


@in_kernels
def test_rows_of_more_axes_and_pieces_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "PIECE", 60)
    monkeypatch.setattr(integer, "PIECE", 60)
    monkeypatch.setattr(pieces, "PIECE", 25)
    to = grid_of(False, 3, 900.0)
    for op, shape in (
        (eagerq.nn.qat.Linear.from_float(nn.Linear(7, 5)), (6, 2, 3, 7)),
        (eagerq.nn.qat.Conv2d.from_float(nn.Conv2d(6, 4, 3, 2, 1, groups=2)), (7, 6, 5, 6)),
    ):
        x = drawn(0, 0, 255, shape, "all").to(torch.uint8)
        weight = drawn(1, -127, 127, op.weight.shape, "all").to(torch.int8)
        bias = torch.arange(len(weight), dtype=torch.int32)
        found = integer_map(op, Coded(x, grid_of(False, 9), BYTES), weight, torch.ones(1), bias, (), {}).value
        total = exact_sums(op, x, 9.0, weight, bias)
        assert total.numel() > 60
        assert torch.equal(found.real(), total * 0.5)
        assert torch.equal(found.on(to), PROFILE.requantize(total, torch.tensor(0.5), to))


def linear(cin: int, cout: int) -> Any:
    return eagerq.nn.qat.Linear.from_float(nn.Linear(cin, cout))


REFUSED: dict[str, tuple[Callable[[], Any], tuple[int, ...], dict[str, Any]]] = {
    "only convolutions": (lambda: eagerq.nn.qat.ConvTranspose2d.from_float(nn.ConvTranspose2d(4, 4, 3)), (2, 4, 5, 5), {}),
    "no batch": (lambda: eagerq.nn.qat.Conv2d.from_float(conv()), (4, 5, 5), {}),
    "has 65537 products": (lambda: linear(2**16 + 1, 2), (2, 2**16 + 1), {}),
    "no whole number": (lambda: linear(4, 2), (2, 4), {"bias": torch.tensor([0.5, 1.0]).double()}),
}


@in_kernels
@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernels_do_not_take_is_summed_in_float(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape, more = REFUSED[reason]
    seen: list[str] = []
    monkeypatch.setattr(integer, "on_refusal", seen.append)
    op = make()
    x = drawn(0, 0, 255, shape, "all").to(torch.uint8)
    weight = drawn(1, -127, 127, op.weight.shape, "all").float()
    results = [
        integer_map(op, Coded(codes, grid, profile), weight, torch.ones(1), more.get("bias"), (), {}).value.real()
        for codes, grid, profile in ((x, grid_of(False, 7), BYTES), (x.float(), grid_of(False, 7), PROFILE))
    ]
    assert torch.equal(*results)
    assert len(seen) == 1
    assert reason in seen[0]


@in_kernels
def test_other_devices_are_summed_in_float() -> None:
    x = Coded(torch.empty(2, 4, dtype=torch.uint8, device="meta"), grid_of(False, 0), BYTES)
    assert integer_sums(linear(4, 2), x, torch.zeros(2, 4), (), None, True) == "the integer kernels run on CPUs"


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (2, 4, 2, 6)], ids=["channels", "too small"])
def test_inputs_that_do_not_fit_raise_what_pytorch_raises(shape: tuple[int, ...]) -> None:
    op = eagerq.nn.qat.Conv2d.from_float(nn.Conv2d(4, 4, 3))
    x = Coded(torch.zeros(shape, dtype=torch.uint8), grid_of(False, 0), BYTES)
    with pytest.raises(RuntimeError, match=r"channels|Kernel size"):
        integer_map(op, x, torch.zeros(4, 4, 3, 3, dtype=torch.int8), torch.ones(1), None, (), {})


# --- whole nets -----------------------------------------------------------------------------------


@contextmanager
def quantized(model: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Collects the codes that each quantizer gives."""

    def take(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, CodeTensor) and isinstance(output.value, Coded):
            seen.append(output.value.codes)

    kinds = (QuantizeDequantize, FakeQuantize)
    handles = [m.register_forward_hook(take) for m in model.modules() if isinstance(m, kinds)]
    yield
    for handle in handles:
        handle.remove()


def assert_same_codes(model: nn.Module, x: Tensor) -> eagerq.ExactRun:
    """The int8 mode gives the float mode's codes, in bytes, and its output."""
    results = {}
    for kernels in ("float", "int8"):
        seen: list[Tensor] = []
        with torch.no_grad(), eagerq.exact_mode(model, kernels=kernels) as run, quantized(model, seen):
            results[kernels] = model(x), seen
    assert len(seen) == len(results["float"][1]) > 0
    for ours, wanted in zip(seen, results["float"][1], strict=True):
        assert ours.element_size() == 1
        assert wanted.dtype == torch.float32
        assert torch.equal(ours.float(), wanted)
    assert torch.equal(results["int8"][0], results["float"][0])
    return run


@pytest.mark.parametrize("name", NETS)
def test_nets_have_the_codes_and_outputs_of_the_float_mode(name: str) -> None:
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    qat = qat_of(NETS[name](), x)
    for model in (qat, eagerq.convert(qat)):
        run = assert_same_codes(model, x)
        assert not run.floats, str(run)
        assert set(run.refused.values()) == ({int8.refusal()} if int8.refusal() else set())


@pytest.mark.parametrize("preset", eagerq.PRESETS)
def test_presets_have_the_codes_of_the_float_mode(preset: str) -> None:
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    fused = eagerq.fuse_modules(Added().train(), example_inputs=x)
    qat = eagerq.convert_qat(fused, preset, example_inputs=x)
    with torch.no_grad():
        qat(x)
    run = assert_same_codes(eagerq.convert(qat.eval()), x)
    asks = preset != "tensorrt"  # whose biases are float, so that its maps are none of integers
    assert bool(run.refused) == (asks and bool(int8.refusal())), run.refused


def viewed(net: Any, x: Tensor) -> Tensor:
    """``view``, which takes no other memory format than the model's own."""
    y = net.one(x)
    return net.head(net.two(F.adaptive_max_pool2d(y, 3)).view(len(x), -1))


def transposed(net: Any, x: Tensor) -> Tensor:
    return net.two(net.up(net.one(x)))


BY_HAND = {
    "viewed": lambda: Made(viewed, one=conv(), two=conv(), head=nn.Linear(36, 3)),
    "transposed": lambda: Made(transposed, one=conv(), up=nn.ConvTranspose2d(4, 4, 2, 2), two=conv()),
    "softmax": lambda: Made(lambda net, x: net.two(net.one(x).softmax(1)), one=conv(), two=conv()),
    "split": lambda: Made(
        lambda net, x: net.two(torch.cat([part.relu() for part in net.one(x).split(1, 1)], 1)), one=conv(), two=conv()
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_parts_outside_the_kernels_have_the_codes_too(name: str) -> None:
    run = assert_same_codes(eagerq.convert(qat_of(BY_HAND[name](), image())), image())
    if name == "transposed" and not int8.refusal():
        assert list(run.refused) == ["up"]
        assert "only convolutions" in str(run)
    assert ("softmax" in str(run)) == (name == "softmax")


@in_kernels
def test_weights_that_are_written_to_count_at_once() -> None:
    x = image()
    model = eagerq.convert(qat_of(Made(lambda net, x: net.two(net.one(x)), one=conv(), two=conv()), x))
    changed = copy.deepcopy(model.state_dict())
    changed["two.weight_codes"] = -changed["two.weight_codes"]
    with torch.no_grad(), eagerq.exact_mode(model, kernels="int8"):
        before = model(x)
        assert torch.equal(model(x[:1]), before[:1])
        assert torch.equal(model(x), before)
        model.load_state_dict(changed)
        after = model(x)
        copied = copy.deepcopy(model)
    with torch.no_grad(), eagerq.exact_mode(model):
        assert torch.equal(model(x), after)
    assert not torch.equal(before, after)
    with torch.inference_mode(), eagerq.exact_mode(copied, kernels="int8"):
        assert torch.equal(copied(x), after)


def test_only_known_kernels() -> None:
    with (
        pytest.raises(eagerq.errors.SpecError, match=r"'float' or 'int8', found 'int4'"),
        eagerq.exact_mode(qat_of(Added(), torch.randn(2, 3, 32, 32)), kernels="int4"),
    ):
        pass


# --- memory ---------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Shapes and dtypes of all that operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[torch.Size, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {(t.shape, t.dtype) for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)}
        return out


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that a call holds at a time of PyTorch's CPU memory."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def wide_net() -> tuple[nn.Module, Tensor]:
    """A deployed net whose activations and weights are both large."""
    front = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    model = nn.Sequential(*front, nn.Conv2d(32, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 4, 3, 8))
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return eagerq.convert(qat_of(model, x, 1)), x


@in_kernels
def test_codes_are_bytes_and_no_weight_is_copied_to_float() -> None:
    model, x = wide_net()
    weights = {m.weight_codes.shape for m in model.modules() if isinstance(m, QuantizedModule)}
    floats = {}
    for kernels in ("float", "int8"):
        with torch.no_grad(), eagerq.exact_mode(model, kernels=kernels), Watch() as made:
            model(x)  # packs the weights, once
            model(x)
        floats[kernels] = {shape for shape, dtype in made.seen if shape in weights and dtype.is_floating_point}
    assert floats["float"] == weights
    assert not floats["int8"] - {torch.Size((32, 3, 3, 3))}  # no more than 64 rows at a time
    assert all(t.element_size() == 1 for m in model.modules() for n, t in m.named_buffers(recurse=False) if n == "weight_codes")


@in_kernels
def test_memory_is_that_of_bytes() -> None:
    model, x = wide_net()
    peaks = {}
    for kernels in ("float", "int8"):
        with torch.no_grad(), eagerq.exact_mode(model, kernels=kernels):
            model(x)
            peaks[kernels] = peak_bytes(lambda: model(x))
    codes = 8 * 256 * 32 * 32
    assert peaks["float"] > 3 * 4 * codes
    assert peaks["int8"] < 3 * codes  # in parts, and joined; its sums alone would be four


@in_kernels
def test_packed_weights_are_given_back() -> None:
    model, x = wide_net()
    modules = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    with torch.no_grad(), eagerq.exact_mode(model, kernels="int8"):
        model(x)
        packed = [int8._PACKED[m] for m in modules]  # type: ignore[index]
        model(x)
        assert [int8._PACKED[m] for m in modules] == packed  # type: ignore[index]
    assert not any(m in int8._PACKED for m in modules)


# --- machines whose kernels are not exact ------------------------------------------------------------


def test_a_machine_without_exact_kernels_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Tensor:
        raise NotImplementedError("no such kernel\nsecond line")

    def saturates(image: Tensor, *args: Any) -> Tensor:
        return true(image, *args).clamp(max=2.0**15)

    true = getattr(torch.ops.onednn, "qconv_pointwise", None)
    prepack = getattr(torch.ops.onednn, "qconv_prepack", None)
    for ops, words in (
        ({}, "has no integer convolution"),
        ({"qconv_prepack": fails, "qconv_pointwise": fails}, "fails: no such kernel"),
        *([({"qconv_prepack": prepack, "qconv_pointwise": saturates}, "is not exact")] if not int8.refusal() else []),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops, "onednn", types.SimpleNamespace(**ops))
            reason = int8.refusal.__wrapped__()
        assert words in reason


def test_without_the_kernels_codes_are_the_same_and_each_map_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "refusal", lambda: "this machine is old")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    run = assert_same_codes(eagerq.convert(qat_of(Added(), x)), x)
    assert run.refused == dict.fromkeys(("one", "two", "last", "head"), "this machine is old")


SATURATING = """
import eagerq, torch
from torch import nn
torch.manual_seed(0)
x = torch.rand(2, 16, 8, 8)
qat = eagerq.convert_qat(nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)), example_inputs=x)
qat(x)
model, outputs = eagerq.convert(qat.eval()), []
for kernels in ("float", "int8"):
    with torch.no_grad(), eagerq.exact_mode(model, kernels=kernels) as run:
        outputs.append(model(x))
print(torch.equal(*outputs), *run.refused.values(), sep="\\n")
"""


def test_a_processor_that_saturates() -> None:
    """oneDNN held to AVX2, whose u8 x s8 products saturate: found out, and the codes are the same."""
    done = subprocess.run(
        [sys.executable, "-c", SATURATING],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
    )
    same, *reason = done.stdout.splitlines()
    assert same == "True"
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert "saturate" in reason[0]


# --- moving, pooling and elementwise functions of bytes -------------------------------------------------


@pytest.mark.parametrize("move", MOVES, ids=range(len(MOVES)))
@given(seed=st.integers(0, 99), signed=signs, zero=zeros, last=signs)
def test_bytes_move_as_float_codes_do(move: Callable[[Tensor], Any], seed: int, signed: bool, zero: int, last: bool) -> None:
    grid = grid_of(signed, zero)
    spec = eagerq.QuantSpec(signed=signed)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed)) * 50
    x = x.to(memory_format=torch.channels_last) if last else x
    held, wanted = (move(encode(x, spec, grid.scale, grid.zero_point, p)) for p in (BYTES, PROFILE))
    assert isinstance(held.value, Coded)
    assert held.value.codes.dtype == grid.dtype
    assert held.shape == wanted.shape
    assert torch.equal(held.value.codes.float(), wanted.value.codes)


@given(
    seed=st.integers(0, 99),
    dims=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.one_of(st.none(), st.integers(1, 3)),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    ceil=signs,
    signed=signs,
)
def test_max_pools_of_bytes(
    seed: int, dims: int, kernel: int, stride: int | None, padding: int, dilation: int, ceil: bool, signed: bool
) -> None:
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    grid = grid_of(signed, 0)
    x = drawn(seed, grid.low, grid.high, (2, 3, *(7, 6, 8)[:dims]), "all").to(grid.dtype)
    args = (kernel, stride, min(padding, kernel // 2), dilation, ceil)
    found = pool(CodeTensor(Coded(x, grid, BYTES)), *args).value.codes
    assert found.dtype == grid.dtype
    assert torch.equal(found.float(), pool(x.float(), *args))
    _, places = pool(CodeTensor(Coded(x, grid, BYTES)), *args, True)  # type: ignore[misc]
    assert torch.equal(places, pool(x.float(), *args, True)[1])  # type: ignore[index]


def test_grids_of_other_bounds_are_other_grids() -> None:
    """Codes below zero on a grid that begins there."""
    of, to = grid_of(True, 0), grid_of(False, 0)
    x = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(Coded(x, of, BYTES).on(to).long(), x.long().clamp(min=0))
    assert not of.is_same(to)
    assert of.is_same(grid_of(True, 0))


@settings(max_examples=50)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    ones=st.lists(signs, min_size=4, max_size=4),
    cut=st.integers(0, 3),
    piece=st.integers(1, 30),
    turned=signs,
)
def test_pieces_make_the_whole(shape: list[int], ones: list[bool], cut: int, piece: int, turned: bool) -> None:
    a = torch.randn(shape)
    b = torch.randn([1 if one else n for n, one in zip(shape, ones, strict=False)])
    b = b[(0,) * min(cut, b.dim() - 1)] if cut else b
    if turned:
        a = a.permute(*range(a.dim())[::-1]).contiguous().permute(*range(a.dim())[::-1])
    before = pieces.PIECE
    sizes: list[int] = []

    def function(p: Tensor, q: Tensor) -> Tensor:
        out = p * q + 1
        sizes.append(out.numel())
        return out

    try:
        pieces.PIECE = piece
        assert torch.equal(pieces.in_pieces(function, a, b), a * b + 1)
        assert torch.equal(pieces.in_pieces(function, b, a), b * a + 1)
    finally:
        pieces.PIECE = before
    least = a.numel() // min((n for n in shape if n > 1), default=1)  # one step along an axis
    assert max(sizes) <= max(piece, least)
