r"""Fake quantization as ``torch.library`` operators that do in one pass what the plain form does in ten.

- ``eagerq::fake_quantize_activation``: an activation that clamps (ReLU, ReLU6, Hardtanh, none), fake quantization by the
  scale known before the batch, and observation: :math:`a = \mathrm{clamp}(x, low, high)`,
  :math:`\hat a = (\mathrm{clip}(\mathrm{rint}(a/s)+z) - z)\,s`; then the range, scale and zero point learn :math:`\min a,
  \max a`. While no range is known the result is :math:`a`. It gives :math:`\hat a` and a mask, a bit a value in the order of
  memory, that says where the gradient passes: where neither clamp nor clip held the value.
- ``eagerq::masked_gradient``: its backward, which needs no saved activation.
- ``eagerq::fake_quantize_gated``: SiLU or Hardswish as engines compute it, :math:`Q_y(Q_x(x)\, Q_g(g(Q_x(x))))`, with its three
  quantizers; its backward ``eagerq::gated_gradient`` computes them again from :math:`x`, which the float form keeps too.
- ``eagerq::fake_quantize_weight``: range, scale and fake quantization of a weight by its own range, a scale for each of its
  outermost channels, in the dtype asked for. It never clips, so the gradient passes whole.

The kernels here are plain PyTorch, for every device: the oracle of those in ``triton_kernels.py``, which CUDA tensors take
where Triton is installed. The state is float32 and int32, and written in place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from eagerq.quant.functional import Bounds, dequantize, quantization_params, quantize
from eagerq.quant.observer import merged_range
from eagerq.quant.spec import Grid

_GRID = "int quant_min, int quant_max, int levels, int fixed_zero_point, bool symmetric, bool power_of_two"
_STATE = "Tensor(a!) scale, Tensor(b!) zero_point, Tensor(c!) min_val, Tensor(d!) max_val"

_LIBRARY: Any = torch.library.Library("eagerq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    f"fake_quantize_activation(Tensor x, {_STATE}, Tensor(e!)? scratch, float? low, float? high, float? constant, {_GRID},"
    " bool needs_mask) -> (Tensor, Tensor)"
)
_LIBRARY.define("masked_gradient(Tensor grad, Tensor mask) -> Tensor")
_LIBRARY.define(
    f"fake_quantize_gated(Tensor x, Tensor(a!)[] state, Tensor(b!)[] scratch, bool hard, float? constant, {_GRID})"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define("gated_gradient(Tensor grad, Tensor x, Tensor used, bool hard, int quant_min, int quant_max) -> Tensor")
_LIBRARY.define(f"fake_quantize_weight(Tensor weight, {_STATE}, {_GRID}, ScalarType dtype) -> Tensor")

_activation = torch.ops.eagerq.fake_quantize_activation.default
_gradient = torch.ops.eagerq.masked_gradient.default
_gated = torch.ops.eagerq.fake_quantize_gated.default
_gated_gradient = torch.ops.eagerq.gated_gradient.default
_weight = torch.ops.eagerq.fake_quantize_weight.default

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
#: A quantizer's scale, zero point, least and greatest value.
State = tuple[Tensor, Tensor, Tensor, Tensor]
#: Words of scratch memory of a quantizer, int32 and zero at first: what the programs of one launch share (the batch's range,
#: how many are done), and the state that the launch found.
WORDS = 7


_has_triton = importlib.util.find_spec("triton") is not None


@functools.cache
def _triton() -> ModuleType | None:
    """The kernels, or None where Triton is not installed."""
    return importlib.import_module("eagerq.quant.triton_kernels") if _has_triton else None


def are_fast(x: Tensor) -> bool:
    """Whether kernels of its own serve this tensor."""
    return x.is_cuda and x.dtype in _DTYPES and _has_triton


def state_before(scratch: Tensor) -> State:
    """The state that the last launch which learned found."""
    floats = scratch.view(torch.float32)
    return floats[3:4], scratch[4:5], floats[5], floats[6]


def fake_quantize_activation(
    x: Tensor, state: State, scratch: Tensor | None, bounds: Bounds, constant: float | None, grid: Grid
) -> Tensor:
    """Activation, fake quantization and observation; see the module's text.

    Args:
        x: ``(*)``, float32, bfloat16 or float16; another memory layout than contiguous or channels last is copied.
        state: one value each.
        scratch: the quantizer's ``WORDS``; None quantizes and learns nothing.
        bounds: least and greatest value of the activation.
        constant: of the moving average; None takes the least and greatest of all batches.
        grid: the codes.
    """
    needs_mask = torch.is_grad_enabled() and x.requires_grad
    if _is_plain(x):
        out: Tensor = _Activation.apply(x, (*state, scratch, *bounds, constant, *grid, needs_mask))[0]  # type: ignore[no-untyped-call]
        return out
    out = _activation(x, *state, scratch, *bounds, constant, *grid, needs_mask)[0]
    return out


def fake_quantize_gated(
    x: Tensor, states: tuple[State, State, State], scratch: list[Tensor], hard: bool, constant: float | None, grid: Grid
) -> Tensor:
    """SiLU or Hardswish in quantized steps; see the module's text.

    Args:
        x: as of ``fake_quantize_activation``.
        states: of the quantizers of x, of the gate and of the product.
        scratch: theirs; none quantizes and learns nothing.
        hard: the gate is a hard sigmoid.
        constant, grid: of all three.
    """
    flat = [t for state in states for t in state]
    if _is_plain(x):
        out: Tensor = _Gated.apply(x, (flat, scratch, hard, constant, *grid))[0]  # type: ignore[no-untyped-call]
        return out
    out = _gated(x, flat, scratch, hard, constant, *grid)[0]
    return out


def fake_quantize_weight(weight: Tensor, state: State, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Fake quantization of a weight by its own range, a scale for each entry of axis 0; see the module's text.

    Args:
        weight: ``(C, *)``.
        state: ``(C,)`` each.
        grid: the codes.
        dtype: of the result.
    """
    if _is_plain(weight):
        out: Tensor = _Weight.apply(weight, (*state, *grid, dtype))  # type: ignore[no-untyped-call]
        return out
    out = _weight(weight, *state, *grid, dtype)
    return out


# --- memory


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which ``x`` lies without gaps, or to which it must be copied."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=memory_format(x))


def _mask_like(x: Tensor, needs_mask: bool) -> Tensor:
    return torch.empty((x.numel() + 7) // 8 if needs_mask else 0, dtype=torch.uint8, device=x.device)


def _bits(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, device=device)


def _packed(inside: Tensor) -> Tensor:
    """A bit for each value in the order of memory, eight a byte, the lowest first."""
    flat = inside.as_strided((inside.numel(),), (1,))
    flat = torch.nn.functional.pad(flat.to(torch.int64), (0, -flat.numel() % 8))
    return (flat.reshape(-1, 8) * _bits(inside.device)).sum(1).to(torch.uint8)


def _unpacked(mask: Tensor, like: Tensor) -> Tensor:
    flat = (mask.unsqueeze(1).to(torch.int64) & _bits(mask.device)).ne(0).reshape(-1)
    return flat[: like.numel()].as_strided(like.shape, like.stride())


# --- the plain kernels


def _fake_quantized(x: Tensor, state: State, grid: Grid) -> tuple[Tensor, Tensor]:
    """Real values of codes (x itself while no range is known), and whether the gradient passes."""
    scale, zero_point, low, high = (t.reshape(()) for t in state)
    known = (low != 0) | (high != 0)
    q = quantize(x, scale, zero_point, -(2**20), 2**20)
    real = dequantize(q.clamp(grid.quant_min, grid.quant_max), scale, zero_point).to(x.dtype)
    return torch.where(known, real, x), ((q >= grid.quant_min) & (q <= grid.quant_max)) | ~known


def _learn(x: Tensor, state: State, before: State, constant: float | None, grid: Grid) -> None:
    """Keep the state in ``before``, then let it learn the range of x."""
    for word, value in zip(before, state, strict=True):
        word.copy_(value.reshape(word.shape))
    scale, zero_point, min_val, max_val = state
    low, high = (end.float().reshape(min_val.shape) for end in x.aminmax())
    new = merged_range(min_val, max_val, low, high, constant)
    new_scale, new_zero = (t.reshape(scale.shape) for t in quantization_params(grid, *new))
    known = (new[0] != 0) | (new[1] != 0)
    scale.copy_(torch.where(known, new_scale, scale))
    zero_point.copy_(torch.where(known, new_zero, zero_point))
    min_val.copy_(new[0])
    max_val.copy_(new[1])


def _plain_activation(
    x: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, scratch: Tensor | None,
    low: float | None, high: float | None, constant: float | None, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    state, grid, needs_mask = (scale, zero_point, min_val, max_val), Grid(*rest[:-1]), rest[-1]
    x = _dense(x)
    a = x if low is None and high is None else x.clamp(low, high)
    out, inside = _fake_quantized(a, state, grid)
    mask = _mask_like(x, needs_mask)
    if needs_mask:
        for bound, passes in ((low, torch.gt), (high, torch.lt)):
            if bound is not None:
                inside &= passes(x, bound)
        mask = _packed(inside)
    if scratch is not None and x.numel():
        _learn(a, state, state_before(scratch), constant, grid)
    return out, mask


def _states(flat: list[Tensor]) -> list[State]:
    return [(flat[i], flat[i + 1], flat[i + 2], flat[i + 3]) for i in range(0, len(flat), 4)]


def _gate(x: Tensor, hard: bool) -> Tensor:
    return torch.nn.functional.hardsigmoid(x) if hard else torch.sigmoid(x)


def _plain_gated(
    x: Tensor, state: list[Tensor], scratch: list[Tensor], hard: bool, constant: float | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    grid, (of_x, of_gate, of_y) = Grid(*rest), _states(state)
    x = _dense(x)
    used = torch.stack(
        [t.reshape(()).float() for s, z, low, high in _states(state) for t in (s, z, (low != 0) | (high != 0))]
    )
    a, _ = _fake_quantized(x, of_x, grid)
    gate = _gate(a, hard)
    b, _ = _fake_quantized(gate, of_gate, grid)
    y = a * b
    out, _ = _fake_quantized(y, of_y, grid)
    if scratch and x.numel():
        for seen, own, kept in zip((x, gate, y), _states(state), scratch, strict=True):
            _learn(seen, own, state_before(kept), constant, grid)
    return out, used


def _plain_gated_gradient(grad: Tensor, x: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> Tensor:
    grid = Grid(quant_min, quant_max, 0, 0, False, False)
    x = _dense(x)
    of_x, of_gate, of_y = ((s, z.to(torch.int32), k, k) for s, z, k in used.reshape(3, 3))
    a, passes = _fake_quantized(x, of_x, grid)
    gate = _gate(a, hard)
    b, gate_passes = _fake_quantized(gate, of_gate, grid)
    _, y_passes = _fake_quantized(a * b, of_y, grid)
    wide, fine = a.float(), _gate(a.float(), hard)
    slope = torch.where((wide > -3) & (wide < 3), 1 / 6, 0.0) if hard else fine * (1 - fine)
    slope = b.float() + torch.where(gate_passes, wide * slope, 0.0)
    return torch.where(passes & y_passes, grad.float() * slope, 0.0).to(grad.dtype)


def _plain_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    grad = _dense(grad)
    return torch.where(_unpacked(mask, grad), grad, 0.0)


def _plain_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, *rest: Any
) -> Tensor:
    grid, dtype = Grid(*rest[:-1]), rest[-1]
    weight = _dense(weight)
    rows = weight.float().flatten(1)
    new = merged_range(min_val, max_val, rows.amin(1), rows.amax(1), 1.0)
    for state, value in zip((scale, zero_point, min_val, max_val), (*quantization_params(grid, *new), *new), strict=True):
        state.copy_(value)
    shape = (-1,) + (1,) * (weight.dim() - 1)
    s, z = scale.reshape(shape), zero_point.reshape(shape)
    return dequantize(quantize(weight, s, z, grid.quant_min, grid.quant_max), s, z).to(dtype)


# --- the Triton kernels


@functools.cache
def _held(bound: float | None, dtype: torch.dtype) -> float | None:
    return None if bound is None else float(torch.tensor(bound, dtype=dtype))


def _fast_activation(
    x: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, scratch: Tensor | None,
    low: float | None, high: float | None, constant: float | None, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernels = _triton()
    if kernels is None or x.dtype not in _DTYPES:
        return _plain_activation(x, scale, zero_point, min_val, max_val, scratch, low, high, constant, *rest)
    x = _dense(x)
    if x.dtype != torch.float32:  # PyTorch clamps by the bounds that the dtype holds
        low, high = _held(low, x.dtype), _held(high, x.dtype)
    out, mask = torch.empty_like(x), _mask_like(x, rest[-1])
    kernels.activation_forward(
        x, out, mask if rest[-1] else None, scale, zero_point, min_val, max_val, scratch, low, high, constant, Grid(*rest[:-1])
    )
    return out, mask


def _fast_gated(
    x: Tensor, state: list[Tensor], scratch: list[Tensor], hard: bool, constant: float | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    kernels = _triton()
    if kernels is None or x.dtype not in _DTYPES:
        return _plain_gated(x, state, scratch, hard, constant, *rest)
    x = _dense(x)
    out, used = torch.empty_like(x), torch.empty(9, device=x.device)
    kernels.gated_forward(x, out, used, scratch, state, hard, constant, Grid(*rest))
    return out, used


def _fast_gated_gradient(grad: Tensor, x: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> Tensor:
    kernels = _triton()
    if kernels is None or grad.dtype not in _DTYPES:
        return _plain_gated_gradient(grad, x, used, hard, quant_min, quant_max)
    x = _dense(x)
    out = torch.empty_like(x)
    kernels.gated_backward(grad.contiguous(memory_format=memory_format(x)), x, out, used, hard, quant_min, quant_max)
    return out


def _fast_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    kernels = _triton()
    if kernels is None or grad.dtype not in _DTYPES:
        return _plain_gradient(grad, mask)
    grad = _dense(grad)
    out = torch.empty_like(grad)
    kernels.masked_gradient(grad, mask, out)
    return out


def _fast_weight(weight: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, *rest: Any) -> Tensor:
    kernels = _triton()
    if kernels is None or weight.dtype not in _DTYPES:
        return _plain_weight(weight, scale, zero_point, min_val, max_val, *rest)
    weight = _dense(weight)
    out = torch.empty_like(weight, dtype=rest[-1])
    kernels.weight_forward(weight, out, scale, zero_point, min_val, max_val, Grid(*rest[:-1]))
    return out


# --- shapes alone


def _fake_activation(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_dense(x)), _mask_like(x, rest[-1])


def _fake_gated(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_dense(x)), torch.empty(9, dtype=torch.float32, device=x.device)


def _fake_gated_gradient(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(_dense(x))


def _fake_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(_dense(grad))


def _fake_weight(weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(_dense(weight), dtype=rest[-1])


# --- gradients


def _is_plain(x: Tensor) -> bool:
    """Whether a kernel may be launched on x at once: the dispatcher takes longer than a small kernel."""
    if torch.compiler.is_compiling():
        return False
    return x.is_cuda and type(x) in _PLAIN and not torch._C._len_torch_dispatch_stack()


def _below(x: Tensor, operator: Any, fast: Any, *args: Any) -> Any:
    if _is_plain(x):
        return fast(x, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(x, *args)


def _traced_gradient(grad: Tensor, mask: Tensor, format: torch.memory_format) -> Tensor:
    """``masked_gradient`` of PyTorch's own views and functions, for compilers to fuse with the backward that follows."""
    axes = list(range(grad.dim()))
    if format != torch.contiguous_format:
        axes.append(axes.pop(1))
    moved = grad.permute(axes)
    bits = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    inside = bits.reshape(-1)[: grad.numel()].reshape(moved.shape).ne(0)
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return torch.where(inside, moved, 0.0).permute(back)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        out, mask = _below(x, _activation, _fast_activation, *rest)
        ctx.save_for_backward(mask)
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        ctx.format = memory_format(out)
        return out, mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad is None:
            return None, None
        (mask,) = ctx.saved_tensors
        if type(grad) not in _PLAIN:
            return _traced_gradient(grad, mask, ctx.format), None
        gradient: Any = _fast_gradient if not torch.is_grad_enabled() and _is_plain(grad) else _gradient
        return gradient(grad.contiguous(memory_format=ctx.format), mask), None


class _Gradient(torch.autograd.Function):
    """Linear in the gradient, so it is its own derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, rest: tuple[Tensor]) -> Tensor:
        out: Tensor = _below(grad, _gradient, _fast_gradient, *rest)
        ctx.save_for_backward(*rest)
        ctx.format = memory_format(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gradient(grad.contiguous(memory_format=ctx.format), ctx.saved_tensors[0]), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        out, used = _below(x, _gated, _fast_gated, *rest)
        ctx.save_for_backward(x, used)
        ctx.mark_non_differentiable(used)
        ctx.set_materialize_grads(False)
        _, _, hard, _, quant_min, quant_max, *_ = rest
        ctx.arguments = hard, quant_min, quant_max
        return out, used

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad is None:
            return None, None
        gradient: Any = _fast_gated_gradient if not torch.is_grad_enabled() and _is_plain(grad) else _gated_gradient
        return gradient(grad, *ctx.saved_tensors, *ctx.arguments), None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rest: tuple[Any, ...]) -> Tensor:
        out: Tensor = _below(weight, _weight, _fast_weight, *rest)
        ctx.dtype = weight.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None


def _autograd(function: Any) -> Any:
    return lambda x, *rest: function.apply(x, rest)


for _name, _function, _plain, _fast, _fake in (
    ("fake_quantize_activation", _Activation, _plain_activation, _fast_activation, _fake_activation),
    ("masked_gradient", _Gradient, _plain_gradient, _fast_gradient, _fake_gradient),
    ("fake_quantize_gated", _Gated, _plain_gated, _fast_gated, _fake_gated),
    ("gated_gradient", None, _plain_gated_gradient, _fast_gated_gradient, _fake_gated_gradient),
    ("fake_quantize_weight", _Weight, _plain_weight, _fast_weight, _fake_weight),
):
    _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _fast, "CUDA")
    if _function is not None:  # a gradient of the gated form's gradient is not defined, and PyTorch says so
        _LIBRARY.impl(_name, _autograd(_function), "Autograd")
    torch.library.register_fake(f"eagerq::{_name}", _fake, lib=_LIBRARY)
