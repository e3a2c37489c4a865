"""Codes, scales and the fake-quantization operator, as plain functions of tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagerq.quant.spec import Grid, QuantSpec

#: Least and greatest value of an activation that clamps; None is no bound.
Bounds = tuple[float | None, float | None]

#: The least scale: it keeps division defined where a tensor is all zeros.
MIN_SCALE = 2.0**-40


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype quantization arithmetic runs in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def power_of_two(x: Tensor) -> Tensor:
    r""":math:`2^{\lceil \log_2 x \rceil}` of positive ``x``, exactly: the least power of two that is not below it."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa 2^exponent, the mantissa in [1/2, 1)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


def quantization_params(spec: QuantSpec | Grid, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    r"""Scale and zero point of the grid that covers ``[low, high]`` and holds zero exactly.

    Symmetric: :math:`s = \max(|low|, |high|) / n` with :math:`n = q_{max}` (signed) or
    :math:`2^{bits-1} - 1`. Affine: :math:`s = (h - l) / (q_{max} - q_{min})`,
    :math:`z = \mathrm{clip}(q_{min} - \mathrm{rint}(l / s))` with
    :math:`l = \min(low, 0), h = \max(high, 0)`. Power of two: :math:`s` is raised to the next :math:`2^k`.

    Args:
        spec: the integer grid.
        low, high: real values, of one shape: ``()`` or ``(1,)`` for a tensor, ``(C,)`` for channels.

    Returns:
        ``scale`` (real) and ``zero_point`` (int32 codes), of the shape of ``low``.
    """
    low = low.clamp(max=0.0)
    high = high.clamp(min=0.0)
    # by a tensor: CUDA multiplies by the reciprocal of a Python number, which is another bit now and then
    steps = torch.full_like(low, spec.levels if spec.symmetric else spec.quant_max - spec.quant_min)
    if spec.symmetric:
        scale = (torch.maximum(-low, high) / steps).clamp_min(MIN_SCALE)
        scale = power_of_two(scale) if spec.power_of_two else scale
        return scale, torch.full_like(scale, spec.fixed_zero_point, dtype=torch.int32)
    scale = ((high - low) / steps).clamp_min(MIN_SCALE)
    scale = power_of_two(scale) if spec.power_of_two else scale
    zero_point = (spec.quant_min - torch.round(low / scale)).clamp(spec.quant_min, spec.quant_max)
    return scale, zero_point.to(torch.int32)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    r"""Codes :math:`\mathrm{clip}(\mathrm{rint}(x / s) + z, q_{min}, q_{max})`, held in a float tensor.

    ``scale`` and ``zero_point`` broadcast against ``x``. It divides, as integer engines do, and
    rounds half to even. NaN stays NaN. The arithmetic is float32, or float64 if ``x`` or ``scale`` is.
    """
    dtype = computing_dtype(torch.promote_types(x.dtype, scale.dtype))
    q = torch.round(x.to(dtype) / scale.to(dtype))
    return q.add_(zero_point).clamp_(quant_min, quant_max)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    r"""Real values :math:`(q - z)\, s` of codes."""
    return (q - zero_point) * scale


def float32(x: float) -> float:
    """The nearest float32: of one sum, product or quotient of float32 values their float32 result, as float64 has the digits."""
    try:
        return struct.unpack("f", struct.pack("f", x))[0]  # type: ignore[no-any-return]
    except OverflowError:
        return math.copysign(math.inf, x)


def _next(x: float, towards: float, single: bool) -> float:
    """The neighbour of a float32 or float64 value that is not zero."""
    if not single:
        return math.nextafter(x, towards)
    (bits,) = struct.unpack("i", struct.pack("f", x))
    away = (towards > x) == (x > 0)
    return struct.unpack("f", struct.pack("i", bits + (1 if away else -1)))[0]  # type: ignore[no-any-return]


def _first_clipped(scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> tuple[float, float]:
    """The greatest value below, and the least above, those whose code needs no clipping; of one scale."""
    s, z, single = float(scale), 0 if zero_point is None else int(zero_point), scale.dtype == torch.float32
    nearest = float32 if single else float
    ends = []
    for end, outwards in ((quant_min - z, -math.inf), (quant_max - z, math.inf)):
        sign = math.copysign(1.0, outwards)
        x = nearest((end + 0.5 * sign) * s)  # the tie; it and its neighbours go either way
        if math.isfinite(x):
            while (round(nearest(x / s)) - end) * sign > 0:
                x = _next(x, -outwards, single)
            while (round(nearest(x / s)) - end) * sign <= 0:
                x = _next(x, outwards, single)
        ends.append(x)
    return ends[0], ends[1]


def scalar_params(grid: Grid, low: float, high: float, nearest: Callable[[float], float]) -> tuple[float, int]:
    """``quantization_params`` of one range in Python's numbers, each result rounded by ``nearest``: the same bits, sooner."""
    low, high = min(low, 0.0), max(high, 0.0)
    if grid.symmetric:
        scale = nearest(max(-low, high) / grid.levels)
    else:
        scale = nearest(nearest(high - low) / (grid.quant_max - grid.quant_min))
    scale = max(scale, MIN_SCALE)
    if grid.power_of_two:
        mantissa, exponent = math.frexp(scale)
        scale = math.ldexp(1.0, exponent - (mantissa == 0.5))
    if grid.symmetric:
        return scale, grid.fixed_zero_point
    return scale, min(max(grid.quant_min - round(nearest(low / scale)), grid.quant_min), grid.quant_max)


def _fresh(out: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor in this dtype: of a function's result that a write or a conversion to the dtype it has gave, torch.compile of
    PyTorch 2.11 drops the gradient without a word (pytorch issue 180642)."""
    return out if out.dtype == dtype else out.to(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, which takes no function with a gradient of its own as they are here."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _plainly(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, known: Tensor | None,
    bounds: Bounds = (None, None), clips: bool = True,
) -> Tensor:  # fmt: skip
    """``fake_quantize`` of ``x.clamp(*bounds)`` in functions that ``torch.func`` knows."""
    dtype = computing_dtype(x.dtype)
    x = x if bounds == (None, None) else x.clamp(*bounds)
    a, scale = x.detach().to(dtype), scale.to(dtype)
    zero = 0 if zero_point is None else zero_point.to(dtype)
    q = torch.round(a / scale) + zero
    clipped = q.clamp(quant_min, quant_max)
    inside, real = clipped == q, (clipped - zero) * scale
    if known is not None:
        inside, real = inside | ~known, torch.where(known, real, a)
    passing = x - x.detach() if not clips else torch.where(inside & a.isfinite(), x - x.detach(), 0.0)
    return real.to(x.dtype) + passing


class _FakeQuantizeOnCpu(torch.autograd.Function):
    """``_FakeQuantize`` by one scale: the backward clamps as a hard tanh's does, since comparisons that make a mask take PyTorch
    longer on CPUs than all arithmetic here. A NaN's gradient passes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, bounds: Bounds
    ) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x)
            below, above = _first_clipped(scale, zero_point, quant_min, quant_max)
            low, high = bounds
            ctx.ends = below if low is None else max(below, low), above if high is None else min(above, high)
        # written over itself: on CPUs new memory takes longer than arithmetic
        q = torch.round_(x.div(scale) if bounds == (None, None) else x.clamp(*bounds).div_(scale))
        if zero_point is None:
            return q.clamp_(quant_min, quant_max).mul_(scale)
        return q.add_(zero_point).clamp_(quant_min, quant_max).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, *ctx.ends), *[None] * 5


class _FakeQuantize(torch.autograd.Function):
    """Forward: quantize and dequantize. Backward: straight through, zero where the code was clipped."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        quant_min: int,
        quant_max: int,
        known: Tensor | None,
        clips: bool,
    ) -> Tensor:
        dtype = computing_dtype(x.dtype)
        scale = scale.to(dtype)
        q = torch.round_(x.to(dtype) / scale)
        if zero_point is not None:
            q.add_(zero_point)
        if clips and ctx.needs_input_grad[0]:
            clipped = q.clamp(quant_min, quant_max)
            inside = clipped == q
            ctx.save_for_backward(inside if known is None else inside | ~known)
            q = clipped
        else:
            q.clamp_(quant_min, quant_max)
        if zero_point is not None:
            q.sub_(zero_point)
        # over itself: on CPUs new memory takes longer than arithmetic
        out = _fresh(q * scale if torch.compiler.is_compiling() else q.mul_(scale), x.dtype)
        return out if known is None else torch.where(known, out, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:  # type: ignore[override]
        saved = ctx.saved_tensors
        return grad * saved[0] if saved else grad, None, None, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    known: Tensor | None = None,
    *,
    clips: bool = True,
) -> Tensor:
    r"""The real value of ``x``'s code: :math:`(\mathrm{clip}(\mathrm{rint}(x/s)+z) - z)\,s`.

    The gradient passes straight through where the code was not clipped and is zero elsewhere
    (straight-through estimator, Bengio et al., 2013, arXiv:1308.3432). The arithmetic is float32
    (float64 for float64 input); the result has ``x``'s dtype and shape.

    Args:
        x: real values, any shape ``(*)``.
        scale, zero_point: broadcast against ``x``; None is zero.
        quant_min, quant_max: lowest and highest code.
        known: a bool tensor ``()``: where it is false, ``x`` and its gradient pass as they are.
        clips: whether codes can be clipped; False where the scale is that of ``x``'s own range, and the gradient passes whole.
    """
    if is_transformed():
        return _plainly(x, scale, zero_point, quant_min, quant_max, known, clips=clips)
    out: Tensor = _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max, known, clips)  # type: ignore[no-untyped-call]
    return out


def fake_quantize_on_cpu(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, bounds: Bounds = (None, None)
) -> Tensor:
    """``fake_quantize`` of ``x.clamp(*bounds)`` by one scale, both of one dtype, float32 or float64."""
    if is_transformed():
        return _plainly(x, scale, zero_point, quant_min, quant_max, None, bounds)
    out: Tensor = _FakeQuantizeOnCpu.apply(x, scale, zero_point, quant_min, quant_max, bounds)  # type: ignore[no-untyped-call]
    return out


class _TracedFakeQuantize(torch.autograd.Function):
    """``_FakeQuantize`` of a clamped x as one chain from x to the result and one from x to the gradient.

    A compiler then keeps one mask at most, and writes no value that two of its kernels would read.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, known: Tensor, bounds: Bounds
    ) -> Tensor:
        dtype = computing_dtype(x.dtype)
        scale, zero_point = scale.to(dtype), zero_point.to(dtype)
        ctx.save_for_backward(x, scale, zero_point, known)
        ctx.ends, ctx.bounds = (quant_min, quant_max), bounds
        a = (x if bounds == (None, None) else x.clamp(*bounds)).to(dtype)
        q = torch.clamp(torch.round(a / scale), quant_min - zero_point, quant_max - zero_point)
        return _fresh(torch.where(known, q * scale, a), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, zero_point, known = ctx.saved_tensors
        (least, greatest), (low, high) = ctx.ends, ctx.bounds
        q = torch.round(x.to(scale.dtype) / scale)
        inside = ((q >= least - zero_point) & (q <= greatest - zero_point)) | ~known
        if low is not None:
            inside = inside & (x > low)
        if high is not None:
            inside = inside & (x < high)
        return torch.where(inside, grad, 0.0), *[None] * 6


def traced_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, known: Tensor, bounds: Bounds = (None, None)
) -> Tensor:
    """``fake_quantize`` of ``x.clamp(*bounds)`` by one scale, for compilers."""
    if is_transformed():
        return _plainly(x, scale, zero_point, quant_min, quant_max, known, bounds)
    out: Tensor = _TracedFakeQuantize.apply(x, scale, zero_point, quant_min, quant_max, known, bounds)  # type: ignore[no-untyped-call]
    return out


class _StraightThrough(torch.autograd.Function):
    """The second tensor's values with the first tensor's gradient."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def straight_through(real: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` with the gradient of ``real``, both of one shape."""
    if real is quantized or not (torch.is_grad_enabled() and real.requires_grad):
        return quantized
    if is_transformed():
        return quantized.detach() + (real - real.detach())
    out: Tensor = _StraightThrough.apply(real, quantized)  # type: ignore[no-untyped-call]
    return out
