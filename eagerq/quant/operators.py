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

CUDA tensors take the kernels of ``triton_kernels.py`` where Triton is installed, all others those of ``plain_kernels.py``. The
state is float32 and int32, and written in place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from eagerq.quant import plain_kernels as plain
from eagerq.quant.functional import Bounds
from eagerq.quant.plain_kernels import State, memory_format
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


_has_triton = importlib.util.find_spec("triton") is not None


@functools.cache
def _triton() -> ModuleType | None:
    """The kernels, or None where Triton is not installed."""
    return importlib.import_module("eagerq.quant.triton_kernels") if _has_triton else None


def are_fast(x: Tensor) -> bool:
    """Whether kernels of its own serve this tensor."""
    return x.is_cuda and x.dtype in _DTYPES and _has_triton


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
        return plain.activation(x, scale, zero_point, min_val, max_val, scratch, low, high, constant, *rest)
    x = plain.dense(x)
    if x.dtype != torch.float32:  # PyTorch clamps by the bounds that the dtype holds
        low, high = _held(low, x.dtype), _held(high, x.dtype)
    out, mask = torch.empty_like(x), plain.mask_like(x, rest[-1])
    kernels.activation_forward(
        x, out, mask if rest[-1] else None, scale, zero_point, min_val, max_val, scratch, low, high, constant, Grid(*rest[:-1])
    )
    return out, mask


def _fast_gated(
    x: Tensor, state: list[Tensor], scratch: list[Tensor], hard: bool, constant: float | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    kernels = _triton()
    if kernels is None or x.dtype not in _DTYPES:
        return plain.gated(x, state, scratch, hard, constant, *rest)
    x = plain.dense(x)
    out, used = torch.empty_like(x), torch.empty(9, device=x.device)
    kernels.gated_forward(x, out, used, scratch, state, hard, constant, Grid(*rest))
    return out, used


def _fast_gated_gradient(grad: Tensor, x: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> Tensor:
    kernels = _triton()
    if kernels is None or grad.dtype not in _DTYPES:
        return plain.gated_gradient(grad, x, used, hard, quant_min, quant_max)
    x = plain.dense(x)
    out = torch.empty_like(x)
    kernels.gated_backward(grad.contiguous(memory_format=memory_format(x)), x, out, used, hard, quant_min, quant_max)
    return out


def _fast_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    kernels = _triton()
    if kernels is None or grad.dtype not in _DTYPES:
        return plain.masked_gradient(grad, mask)
    grad = plain.dense(grad)
    out = torch.empty_like(grad)
    kernels.masked_gradient(grad, mask, out)
    return out


def _fast_weight(weight: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, *rest: Any) -> Tensor:
    kernels = _triton()
    if kernels is None or weight.dtype not in _DTYPES:
        return plain.weight_by_its_range(weight, scale, zero_point, min_val, max_val, *rest)
    weight = plain.dense(weight)
    out = torch.empty_like(weight, dtype=rest[-1])
    kernels.weight_forward(weight, out, scale, zero_point, min_val, max_val, Grid(*rest[:-1]))
    return out


# --- shapes alone


def _fake_activation(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(plain.dense(x)), plain.mask_like(x, rest[-1])


def _fake_gated(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(plain.dense(x)), torch.empty(9, dtype=torch.float32, device=x.device)


def _fake_gated_gradient(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(plain.dense(x))


def _fake_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(plain.dense(grad))


def _fake_weight(weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(plain.dense(weight), dtype=rest[-1])


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
    ("fake_quantize_activation", _Activation, plain.activation, _fast_activation, _fake_activation),
    ("masked_gradient", _Gradient, plain.masked_gradient, _fast_gradient, _fake_gradient),
    ("fake_quantize_gated", _Gated, plain.gated, _fast_gated, _fake_gated),
    ("gated_gradient", None, plain.gated_gradient, _fast_gated_gradient, _fake_gated_gradient),
    ("fake_quantize_weight", _Weight, plain.weight_by_its_range, _fast_weight, _fake_weight),
):
    _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _fast, "CUDA")
    if _function is not None:  # a gradient of the gated form's gradient is not defined, and PyTorch says so
        _LIBRARY.impl(_name, _autograd(_function), "Autograd")
    torch.library.register_fake(f"eagerq::{_name}", _fake, lib=_LIBRARY)
