"""Forms that do in one pass what modules do in many: on CPUs, for compilers, and through a net with the Triton kernels."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import activations as activations_of_timm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eagerq
from eagerq.nn.modules.activation import is_gelu
from eagerq.nn.qat import activations
from eagerq.nn.qat.base import activated
from eagerq.nn.qat.split import SplitActivation
from eagerq.quant import FakeQuantize, QConfig, QuantSpec, fast_kernels, plain_kernels
from eagerq.quant.functional import (
    Bounds,
    _first_clipped,
    fake_quantize,
    fake_quantize_on_cpu,
    float32,
    traced_fake_quantize,
)

# --- float32 by Python's numbers

singles = st.floats(width=32)
OPERATIONS: dict[str, Any] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "product": lambda a, b: a * b,
    "quotient": lambda a, b: a / b if isinstance(b, Tensor) or b else math.nan,
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(a=singles, b=singles)
def test_one_operation_is_float32s(name: str, a: float, b: float) -> None:
    if name == "quotient" and b == 0:
        return  # Python has none
    operation = OPERATIONS[name]
    wanted = float(operation(torch.tensor(a), torch.tensor(b)))
    np.testing.assert_array_equal(float32(operation(a, b)), wanted)


@given(x=st.floats())
def test_float32_is_the_nearest(x: float) -> None:
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(float32(x), float(np.float32(x)))


# --- the form for CPUs


def neighbourhood(values: Tensor, reach: int = 3) -> Tensor:
    """The values and those next to them."""
    found, up, down = [values], values, values
    for _ in range(reach):
        up, down = (torch.nextafter(x, torch.full_like(x, end)) for x, end in ((up, math.inf), (down, -math.inf)))
        found += [up, down]
    return torch.cat(found)


def passed(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    (grad,) = torch.autograd.grad(out, leaf, torch.full_like(out, 3.0))
    return out.detach(), grad


def clamped(x: Tensor, bounds: Bounds) -> Tensor:
    low, high = (end if end is not None else sign * math.inf for end, sign in zip(bounds, (-1, 1), strict=True))
    return x if bounds == (None, None) else nn.functional.hardtanh(x, low, high)


scales = st.one_of(
    st.integers(-40, 60).map(lambda k: 2.0**k), st.floats(2.0**-40, 2.0**100, width=32), st.sampled_from([0.1, 1 / 3, 1.0, 3e-5])
)
bounds_of: Any = st.sampled_from([(None, None), (0.0, None), (0.0, 6.0), (-1.0, 1.0), (-0.1, 0.3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(spec=strategies.specs(per_channel=False), scale=scales, data=st.data(), bounds=bounds_of)
def test_the_cpus_form_is_the_plain_one_around_every_tie(
    dtype: torch.dtype, spec: QuantSpec, scale: float, data: st.DataObject, bounds: Bounds
) -> None:
    """Value and gradient at each tie between two codes, clipped ones too, at the bounds, and at the neighbours of all."""
    first, last = oracles.integer_range(spec)
    zero = data.draw(st.sampled_from([0, first, last, spec.fixed_zero_point]) | st.integers(first, last))
    s, z = torch.tensor(scale, dtype=dtype), None if zero == 0 else torch.tensor(zero, dtype=torch.int32)
    ties = (torch.arange(first - zero - 2, last - zero + 3, dtype=torch.float64) + 0.5) * s.double()
    ends = torch.tensor([end for end in bounds if end is not None] + [0.0, 1e38, -1e38], dtype=torch.float64)
    x = neighbourhood(torch.cat([ties, ends]).to(dtype))
    x = torch.cat([x, torch.tensor([math.inf, -math.inf], dtype=dtype)])
    wanted = passed(lambda leaf: fake_quantize(clamped(leaf, bounds), s, z, first, last), x)
    found = passed(lambda leaf: fake_quantize_on_cpu(leaf, s, z, first, last, bounds), x)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0)
    if bounds == (None, None):
        below, above = _first_clipped(s, z, first, last)
        inside = (x > below) & (x < above)
        assert torch.equal(inside, wanted[1] != 0)


@pytest.mark.parametrize("zero", [None, 3])
def test_the_cpus_form_passes_a_nans_gradient(zero: int | None) -> None:
    """Where the plain form stops it; the value is NaN in both, so training is lost either way."""
    z = None if zero is None else torch.tensor(zero, dtype=torch.int32)
    out, grad = passed(lambda x: fake_quantize_on_cpu(x, torch.tensor(0.1), z, 0, 15), torch.tensor([math.nan, 0.2]))
    assert out.isnan().tolist() == [True, False]
    assert grad.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@given(spec=strategies.specs(per_channel=False), scale=scales, data=st.data(), bounds=bounds_of, known=st.booleans())
def test_the_compilers_form_is_the_plain_one_around_every_tie(
    dtype: torch.dtype, spec: QuantSpec, scale: float, data: st.DataObject, bounds: Bounds, known: bool
) -> None:
    """While no range is known both are the identity, but for half of the step that stands for no scale."""
    first, last = oracles.integer_range(spec)
    zero = spec.fixed_zero_point if spec.symmetric else data.draw(st.integers(first, last))
    s, z = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    ties = ((torch.arange(first - zero - 2, last - zero + 3) + 0.5) * s.double()).clamp(-(2.0**15), 2.0**15)
    x = neighbourhood(torch.cat([ties, torch.zeros(1)]).to(dtype)) if dtype.itemsize > 2 else ties.to(dtype)
    if bounds == (-0.1, 0.3) and dtype.itemsize == 2:
        bounds = (-0.125, 0.375)  # PyTorch's own clamp and its gradient round others in two ways
    args = s, z, first, last, torch.tensor(known)
    wanted = passed(lambda leaf: fake_quantize(clamped(leaf, bounds), *args), x)
    found = passed(lambda leaf: traced_fake_quantize(leaf, *args, bounds), x)
    half = 0.0 if known else 2.0**-601 if dtype == torch.float64 else 2.0**-101
    for mine, theirs, slack in zip(found, wanted, (half, 0.0), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=slack)


@given(
    spec=strategies.specs(per_channel=False), observer=st.sampled_from(["min_max", "moving_average"]), bounds=bounds_of,
    double=st.booleans(), sizes=st.lists(st.sampled_from([0.0, 0.1, 1.0, 10.0, math.inf, math.nan]), min_size=2, max_size=5),
)  # fmt: skip
def test_on_cpus_a_quantizer_in_one_pass_learns_as_step_by_step(
    spec: QuantSpec, observer: Any, bounds: Bounds, double: bool, sizes: list[float]
) -> None:
    """Behind an activation that clamps, in any order of batches, those without a range among them."""
    one = FakeQuantize(QuantSpec(**{**vars(spec), "observer": observer}))
    one = one.double() if double else one
    many = copy.deepcopy(one)
    many._is_fast_on_cpu = lambda x: False  # type: ignore[method-assign]
    for i, size in enumerate(sizes):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(i)).to(one.scale.dtype)
        x[0, 0] *= size
        if math.isfinite(size):
            x *= size
        wanted = passed(lambda leaf: many(clamped(leaf, bounds)), x)
        found = passed(lambda leaf: activated(lambda y: clamped(y, bounds), bounds, one, leaf), x)
        assert torch.equal(found[0].nan_to_num(7.0), wanted[0].nan_to_num(7.0))
        assert torch.equal(found[1][~x.isnan()], wanted[1][~x.isnan()])
        for key, value in many.state_dict().items():
            assert torch.equal(one.state_dict()[key], value), key


@pytest.mark.parametrize("spec", [QuantSpec(observer="min_max"), QuantSpec(averaging_constant=1.0), QuantSpec()], ids=str)
def test_on_cpus_a_range_ends_at_the_bounds_dtype_has(spec: QuantSpec) -> None:
    """A bound of Python has more digits than the range: the scale is that of the range, to the last bit."""
    for seed, reach in enumerate(np.linspace(0.1, 2.0, 97).tolist()):
        bounds = (-reach, reach / 3)
        one, many = FakeQuantize(spec), FakeQuantize(spec)
        many._is_fast_on_cpu = lambda x: False  # type: ignore[method-assign]
        for step in range(3):
            x = torch.randn(64, generator=torch.Generator().manual_seed(3 * seed + step))
            many(clamped(x, bounds))
            activated(lambda y: clamped(y, bounds), bounds, one, x)  # noqa: B023
        for mine, theirs in zip(one.state, many.state, strict=True):
            assert torch.equal(mine, theirs), bounds


# --- activations that stand alone

ALONE: list[tuple[nn.Module, type[nn.Module]]] = [
    (nn.ReLU(), activations.ReLU),
    (nn.ReLU(inplace=True), activations.ReLU),
    (nn.ReLU6(), activations.ReLU6),
    (nn.Hardtanh(-0.5, 0.75), activations.Hardtanh),
]


def test_every_activation_that_clamps_has_its_class() -> None:
    assert {type(act): kind for act, kind in ALONE} == activations.QUANTIZING


@pytest.mark.parametrize(("act", "kind"), ALONE, ids=[str(act) for act, _ in ALONE])
def test_a_lone_activation_keeps_what_it_was_and_quantizes(act: nn.Module, kind: type[nn.Module]) -> None:
    act = copy.deepcopy(act)
    seen: list[str] = []
    act.register_forward_hook(lambda *_: seen.append("own"))
    act.eval()
    module: Any = kind.from_float(act, FakeQuantize(QuantSpec()).eval())  # type: ignore[attr-defined]
    assert type(module) is kind and isinstance(module, type(act)) and not module.training
    assert {k: v for k, v in vars(module).items() if k != "_modules"} == {k: v for k, v in vars(act).items() if k != "_modules"}
    other = FakeQuantize(QuantSpec())
    module.train()
    plain = type(act)(act.min_val, act.max_val) if type(act) is nn.Hardtanh else type(act)()
    for size in (1.0, 3.0, 0.5):
        x = size * torch.randn(4, 5)
        torch.testing.assert_close(module(x.clone()), other(plain(x)), rtol=0.0, atol=0.0)
        assert all(torch.equal(a, b) for a, b in zip(module.activation_post_process.state, other.state, strict=True))
    assert seen == ["own"] * 3


# --- through modules


class Small(nn.Module):
    """Every way to a kernel: clamps behind a convolution, depthwise and gated, a residual's ReLU, a linear head."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.depthwise, self.second, self.gate = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), gate
        self.one, self.six = nn.Conv2d(8, 8, 1), nn.ReLU6()
        self.two, self.exit = nn.Conv2d(8, 8, 1), nn.ReLU()
        self.head = nn.Linear(8, 5)
        self.reentrant: bool | None = None

    def inner(self, x: Tensor) -> Tensor:
        y = self.gate(self.second(self.depthwise(x)))
        return self.exit(self.two(self.six(self.one(y))) + x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


QCONFIGS: dict[str, Any] = {
    **{name: name for name in ("onnxruntime", "onnxruntime-arm", "tensorrt", "vitis", "qnn", "openvino")},
    **{
        name: QConfig(QuantSpec(observer=name), eagerq.PRESETS["onnxruntime"].weight, split_activations=True)
        for name in ("min_max", "mse")
    },
}


def small(gate: nn.Module, qconfig: Any = "onnxruntime") -> Any:
    torch.manual_seed(0)
    model, x = Small(gate), torch.randn(2, 3, 8, 8)
    return eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x), qconfig, example_inputs=x).train()


def trained(model: Any, steps: int = 3) -> list[dict[str, Tensor]]:
    """Output, gradients and state of each step, and of eval behind."""
    seen = []
    for step in range(steps):
        model.zero_grad()
        x = (1 + step) * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        x = x.contiguous(memory_format=torch.channels_last if step % 2 else torch.contiguous_format).requires_grad_()
        out = model(x)
        out.square().mean().backward()
        grads = {f"gradient of {name}": p.grad for name, p in (("input", x), *model.named_parameters()) if p.grad is not None}
        seen.append({"output": out.detach(), **grads, **{k: v.clone() for k, v in model.state_dict().items()}})
    model.eval()
    with torch.no_grad():
        seen.append({"output": model(x)})
    model.train()
    return seen


def assert_close(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]], exact: bool = False) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(mine[key], value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")


GATES = {"SiLU": nn.SiLU, "Hardswish": nn.Hardswish}
WANTED: dict[tuple[Any, ...], list[dict[str, Tensor]]] = {}


def wanted_of(gate: str, qconfig: str) -> list[dict[str, Tensor]]:
    """What the ordinary way gives."""
    if (gate, qconfig) not in WANTED:
        with pytest.MonkeyPatch.context() as plain:
            plain.setattr(fast_kernels, "are_fast", lambda x: False)
            WANTED[gate, qconfig] = trained(small(GATES[gate](), QCONFIGS[qconfig]))
    return WANTED[gate, qconfig]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_a_net_trains_by_kernels_as_without(qconfig: str, gate: str, launches: dict[str, int]) -> None:
    wanted = wanted_of(gate, qconfig)
    assert not launches
    model = small(GATES[gate](), QCONFIGS[qconfig])
    assert_close(trained(model), wanted)
    modules = list(model.modules())
    assert launches["activation_forward"] and launches["masked_gradient"]
    by_ends = QCONFIGS[qconfig] != QCONFIGS["mse"]  # that observer needs more than a kernel learns
    # the stem's and the one before the gate, in the one step in channels last
    normed = by_ends and model.stem.ends_with_norm()
    gated = [m for m in modules if isinstance(m, SplitActivation) and m.gate is not None]
    with_gate = int(normed and bool(gated))
    assert launches.get("norm_forward", 0) == launches.get("norm_backward", 0) == normed + with_gate
    assert launches.get("norm_gated_forward", 0) == with_gate
    # a kernel for each weight with a scale a channel, in each of three steps
    rows = [m for m in modules if isinstance(m, FakeQuantize) and m.memoryless and m.channels]
    assert launches.get("weight_forward", 0) == 3 * len(rows)
    assert launches.get("gated_backward", 0) == 3 * len(gated) * by_ends - with_gate
    assert launches.get("gated_forward", 0) >= 3 * len(gated) * by_ends - with_gate


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("qconfig", "reentrant", "frozen"),
    [("onnxruntime", True, True), ("onnxruntime", False, True), ("vitis", True, True), ("mse", False, True),
     ("onnxruntime", True, False), ("onnxruntime", False, False), ("mse", False, False)],
)
def test_a_checkpointed_net_trains_by_kernels_as_without(
    qconfig: str, reentrant: bool, gate: str, frozen: bool, launches: dict[str, int]
) -> None:
    """To the last bit; where norms learn but for their own statistics, which PyTorch's learn twice in a checkpoint, and eval.
    (vitis' weights are folded with those.)"""
    plain, model = (small(GATES[gate](), QCONFIGS[qconfig]) for _ in range(2))
    if frozen:
        plain.apply(eagerq.freeze_bn_stats)
        model.apply(eagerq.freeze_bn_stats)
    wanted = trained(plain)
    model.reentrant = reentrant
    found = trained(model)
    if not frozen:
        own = ("running_mean", "running_var", "num_batches_tracked")
        found, wanted = ([{k: v for k, v in step.items() if not k.endswith(own)} for step in of[:-1]] for of in (found, wanted))
    assert_close(found, wanted, exact=True)


def test_every_switch_reaches_the_kernels(launches: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    switches = (eagerq.disable_observer, eagerq.disable_fake_quant, eagerq.enable_observer, eagerq.enable_fake_quant)
    fast, plain = (small(nn.Hardswish()) for _ in range(2))
    for switch in (lambda m: None, *switches):
        found = trained(fast.apply(switch), 2)
        with monkeypatch.context() as patch:
            patch.setattr(fast_kernels, "are_fast", lambda x: False)
            wanted = trained(plain.apply(switch), 2)
        assert_close(found, wanted)
        assert [m.observed for m in fast.modules() if isinstance(m, FakeQuantize)] == [
            m.observed for m in plain.modules() if isinstance(m, FakeQuantize)
        ]


# --- where a gate is computed in one pass


def parts(gate: type[nn.Module] = nn.SiLU, spec: QuantSpec = QuantSpec()) -> tuple[SplitActivation, FakeQuantize]:  # noqa: B008
    config = QConfig(spec, eagerq.PRESETS["onnxruntime"].weight, split_activations=True)
    return SplitActivation(gate(), config, torch.zeros(1)), FakeQuantize(spec)


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_in_one_pass_is_its_modules_one_after_the_other(gate: str, launches: dict[str, int]) -> None:
    (module, last), (other, other_last) = (parts(GATES[gate]) for _ in range(2))
    other.in_one_pass = lambda *_: None  # type: ignore[method-assign,assignment]
    for step in range(3):
        x = torch.randn(3, 7) * (1 + step)
        one, many = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, wanted = module.in_one_pass(one, last), other_last(other(many))
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        grad = torch.randn(3, 7)
        found.backward(grad)
        wanted.backward(grad)
        torch.testing.assert_close(one.grad, many.grad, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip((*module.buffers(), *last.buffers()), (*other.buffers(), *other_last.buffers()), strict=True):
            if mine.shape != (plain_kernels.WORDS,):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gate", GATES)
def test_a_norm_and_its_gate_in_one_pass_are_their_modules_one_after_the_other(
    gate: str, launches: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (module, last), (other, other_last) = (parts(GATES[gate]) for _ in range(2))
    norm, other_norm = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    monkeypatch.setattr(other, "in_one_pass", lambda *_: None)
    for step in range(3):
        x = torch.randn(3, 5, 4, 2).contiguous(memory_format=torch.channels_last) * (1 + step)
        one, many = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, wanted = module.of_norm(norm, one, last), other_last(other(other_norm(many)))
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        grad = torch.randn_like(x)
        found.backward(grad)
        wanted.backward(grad)
        for a, b in ((one, many), *zip(norm.parameters(), other_norm.parameters(), strict=True)):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        sides = (norm, module, last), (other_norm, other, other_last)
        mine, theirs = ([b for part in side for b in part.buffers()] for side in sides)
        for a, b in zip(mine, theirs, strict=True):
            if a.shape != (plain_kernels.WORDS,):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert module.of_norm(norm, torch.randn(3, 5, 4, 2), last) is None  # channels that lie apart


class _Subclass(FakeQuantize):
    """A quantizer of a user's own, which may do anything."""


def _changes() -> dict[str, Any]:
    def hook(of: nn.Module) -> None:
        of.register_forward_hook(lambda *_: None)

    def replace(m: Any, q: Any) -> None:
        m.gate_fake_quant = _Subclass(QuantSpec())

    return {
        "a hook on the module": lambda m, q: hook(m),
        "a hook on the activation": lambda m, q: hook(m.act),
        "a hook on the input's quantizer": lambda m, q: hook(m.input_fake_quant),
        "a hook on the gate's quantizer": lambda m, q: hook(m.gate_fake_quant),
        "a hook on the output's quantizer": lambda m, q: hook(q),
        "a quantizer of another class": replace,
        "another spec": lambda m, q: setattr(q, "spec", QuantSpec(bits=4)),
        "one that does not quantize": lambda m, q: eagerq.disable_fake_quant(m.gate_fake_quant),
        "one that does not learn": lambda m, q: eagerq.disable_observer(m.input_fake_quant),
        "one in eval": lambda m, q: q.eval(),
        "one in float64": lambda m, q: q.double(),
    }


@pytest.mark.parametrize("what", _changes())
def test_what_a_kernel_does_not_know_is_left_to_the_modules(what: str, launches: dict[str, int]) -> None:
    module, last = parts()
    assert module.in_one_pass(torch.randn(4), last) is not None
    norm, x = nn.BatchNorm1d(4), torch.randn(3, 4)
    assert module.of_norm(norm, x, last) is not None
    _changes()[what](module, last)
    assert module.in_one_pass(torch.randn(4), last) is None
    assert module.of_norm(norm, x, last) is None


@pytest.mark.parametrize("observer", ["mse", "percentile"])
def test_what_a_kernel_does_not_learn_is_left_to_the_modules(observer: Any, launches: dict[str, int]) -> None:
    """In training; in eval, and with observers off, nothing is learned and a kernel serves."""
    module, last = parts(spec=QuantSpec(observer=observer))
    x = torch.randn(9)
    assert module.in_one_pass(x, last) is None
    last(module(x))
    for trains, verb in ((False, eagerq.enable_observer), (True, eagerq.disable_observer)):
        for part in (module, last):
            part.train(trains).apply(verb)
        found = module.in_one_pass(x, last)
        assert found is not None
        torch.testing.assert_close(found, last(module(x)), rtol=1e-5, atol=1e-6)


def test_other_tensors_are_left_to_the_modules() -> None:
    """As CPU tensors are, where nothing is patched, and dtypes that no kernel has."""
    module, last = parts()
    for dtype, other in itertools.product((torch.float32, torch.float64), (last, None, nn.Identity())):
        assert module.in_one_pass(torch.randn(4, dtype=dtype), other) is None


# --- where a sigmoid is computed in one pass with its two quantizers

SIGMOIDS: dict[str, Any] = {
    "Sigmoid": nn.Sigmoid,
    "Hardsigmoid": nn.Hardsigmoid,
    "timm's Sigmoid": activations_of_timm.Sigmoid,
    "timm's HardSigmoid": activations_of_timm.HardSigmoid,
}


@pytest.mark.parametrize("name", SIGMOIDS)
def test_a_sigmoid_in_one_pass_is_its_modules_one_after_the_other(name: str, launches: dict[str, int]) -> None:
    (module, last), (other, other_last) = (parts(SIGMOIDS[name]) for _ in range(2))
    for step in range(3):
        x = torch.randn(3, 7) * (1 + step)
        one, many = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, wanted = module.in_one_pass(one, last), other_last(other(many))
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        grad = torch.randn(3, 7)
        found.backward(grad)
        wanted.backward(grad)
        torch.testing.assert_close(one.grad, many.grad, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip((*module.buffers(), *last.buffers()), (*other.buffers(), *other_last.buffers()), strict=True):
            if mine.shape != (plain_kernels.WORDS,):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert launches["sigmoid_forward"] == launches["sigmoid_backward"] == 3
    assert all(q.observed for q in (module.input_fake_quant, last))
    assert module.of_norm(nn.BatchNorm1d(7), torch.randn(3, 7), last) is None  # that is of gates
    assert "squash" not in "".join(module.state_dict())


def _of_sigmoid() -> dict[str, Any]:
    return {
        **{what: change for what, change in _changes().items() if "gate" not in what and "class" not in what},
        "a quantizer of another class": lambda m, q: setattr(m, "input_fake_quant", _Subclass(QuantSpec())),
        "one that does not quantize": lambda m, q: eagerq.disable_fake_quant(m.input_fake_quant),
        "another activation": lambda m, q: setattr(m, "act", nn.Tanh()),
        "no squash": lambda m, q: setattr(m, "squash", None),
    }


@pytest.mark.parametrize("what", _of_sigmoid())
def test_what_a_sigmoids_kernel_does_not_know_is_left_to_the_modules(what: str, launches: dict[str, int]) -> None:
    module, last = parts(nn.Sigmoid)
    assert module.in_one_pass(torch.randn(4), last) is not None
    _of_sigmoid()[what](module, last)
    assert module.in_one_pass(torch.randn(4), last) is None


def test_other_functions_of_codes_are_left_to_the_modules(launches: dict[str, int]) -> None:
    module, last = parts(nn.LeakyReLU)
    assert module.squash is None
    assert module.in_one_pass(torch.randn(4), last) is None
    module, last = parts(nn.Sigmoid, QuantSpec(observer="mse"))
    assert module.in_one_pass(torch.randn(4), last) is None
    module, _ = parts(nn.SiLU)
    assert module.squash is None


def split_linear(act: nn.Module) -> Any:
    q = linear(act)
    q.split_activation()
    assert isinstance(q.act, SplitActivation)
    return q.train()


@pytest.mark.parametrize("name", SIGMOIDS)
def test_a_sigmoid_trains_by_kernels_as_without(name: str, launches: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, other = split_linear(SIGMOIDS[name]()), split_linear(SIGMOIDS[name]())
    with monkeypatch.context() as patch:
        patch.setattr(fast_kernels, "are_fast", lambda x: False)
        wanted = trained_linear(other)
    assert_close(trained_linear(q), wanted)
    assert launches["sigmoid_forward"] == launches["sigmoid_backward"] == 4
    assert "masked_gradient" not in launches
    assert q.activation_post_process.observed and q.act.input_fake_quant.observed


@pytest.mark.parametrize("name", ["Sigmoid", "Hardsigmoid"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_sigmoid_trains_as_without(reentrant: bool, name: str, launches: dict[str, int]) -> None:
    plain, again = split_linear(SIGMOIDS[name]()), split_linear(SIGMOIDS[name]())
    inner = again.forward
    again.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    assert_close(trained_linear(again), trained_linear(plain), exact=True)
    assert launches["sigmoid_forward"] == 3 * 4  # each step of the one twice


# --- where a GELU is computed in one pass with what quantizes it

GELUS: dict[str, Any] = {"torch": nn.GELU, "timm": activations_of_timm.GELU}


def linear(act: nn.Module, spec: QuantSpec = QuantSpec()) -> Any:  # noqa: B008
    torch.manual_seed(0)
    q = eagerq.nn.intrinsic.qat.LinearAct.from_float(eagerq.nn.intrinsic.LinearAct(nn.Linear(7, 5), act))
    q.activation_post_process = FakeQuantize(spec)
    return q.train()


def trained_linear(q: Any) -> list[dict[str, Tensor]]:
    """Output, gradients and state of three steps, and of eval behind, with gradients too."""
    seen = []
    for step in range(4):
        q.train(step < 3)
        q.zero_grad()
        x = ((1 + step) * torch.randn(3, 7, generator=torch.Generator().manual_seed(step))).requires_grad_()
        out = q(x)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)))
        grads = {f"gradient of {name}": p.grad for name, p in (("input", x), *q.named_parameters())}
        seen.append({"output": out.detach(), **grads, **{k: v.clone() for k, v in q.state_dict().items()}})
    return seen


@pytest.mark.parametrize("name", GELUS)
def test_a_gelu_trains_by_kernels_as_without(name: str, launches: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, other = linear(GELUS[name]()), linear(GELUS[name]())
    with monkeypatch.context() as patch:
        patch.setattr(fast_kernels, "are_fast", lambda x: False)
        wanted = trained_linear(other)
    assert_close(trained_linear(q), wanted)
    assert launches["activation_forward"] == launches["gelu_gradient"] == 4
    assert "masked_gradient" not in launches
    assert q.activation_post_process.observed


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_gelu_trains_as_without(reentrant: bool, launches: dict[str, int]) -> None:
    plain, again = linear(nn.GELU()), linear(nn.GELU())
    inner = again.forward
    again.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    assert_close(trained_linear(again), trained_linear(plain), exact=True)


def _not_in_one_pass() -> dict[str, Any]:
    return {
        "a tanh": lambda q: setattr(q, "act", nn.GELU(approximate="tanh")),
        "a class of a user's own": lambda q: setattr(q, "act", type("GELU", (nn.GELU,), {})()),
        "a hook on the activation": lambda q: q.act.register_forward_hook(lambda *_: None),
        "a hook on the quantizer": lambda q: q.activation_post_process.register_forward_hook(lambda *_: None),
        "a quantizer of another class": lambda q: setattr(q, "activation_post_process", _Subclass(QuantSpec())),
        "one that does not quantize": lambda q: q.apply(eagerq.disable_fake_quant),
        "one that learns more": lambda q: setattr(q, "activation_post_process", FakeQuantize(QuantSpec(observer="mse"))),
        "one in float64": lambda q: q.activation_post_process.double(),
        "no quantizer": lambda q: setattr(q, "activation_post_process", None),
        "a function": lambda q: (delattr(q, "act"), setattr(q, "act", nn.functional.gelu)),
    }


@pytest.mark.parametrize("what", _not_in_one_pass())
def test_another_gelu_is_left_to_the_modules(what: str, launches: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, other = linear(nn.GELU()), linear(nn.GELU())
    for module in (q, other):
        _not_in_one_pass()[what](module)
    x = torch.randn(3, 7)
    with monkeypatch.context() as patch:
        patch.setattr(fast_kernels, "gelu", None)
        found = [q(x), q(2 * x)]
        patch.setattr(fast_kernels, "are_fast", lambda x: False)
        wanted = [other(x), other(2 * x)]
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_what_learns_nothing_is_in_one_pass_whatever_its_observer(launches: dict[str, int]) -> None:
    q = FakeQuantize(QuantSpec(observer="mse"))
    x = torch.randn(9)
    assert q.of_gelu(x) is None
    q(x)
    eagerq.disable_observer(q)
    found = q.of_gelu(x)
    assert found is not None
    torch.testing.assert_close(found, q(nn.functional.gelu(x)), rtol=1e-5, atol=1e-6)


def test_on_cpus_a_gelu_is_the_modules_own() -> None:
    quantizer, q = FakeQuantize(QuantSpec()), linear(nn.GELU())
    assert quantizer.of_gelu(torch.randn(4)) is None
    for step in range(3):
        x = (1 + step) * torch.randn(3, 7)
        weight = q.weight_fake_quant.of_weight(q.weight)
        wanted = quantizer(nn.functional.gelu(nn.functional.linear(x, weight, q.bias)))
        assert torch.equal(q(x), wanted)
        assert all(torch.equal(a, b) for a, b in zip(q.activation_post_process.state, quantizer.state, strict=True))


@pytest.mark.parametrize("name", GELUS)
def test_a_gelu_by_name_is_pytorchs(name: str) -> None:
    act, x = GELUS[name](), torch.linspace(-9.0, 9.0, 999)
    assert is_gelu(act)
    assert torch.equal(act(x), nn.functional.gelu(x))
