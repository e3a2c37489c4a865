"""Triton kernels: activation, observation and fake quantization in one pass, its backward, and a weight's in one launch; and what
all kernels are made of.

Each computes what its plain form in ``plain_kernels.py`` does, bit for bit (but for a GELU's error function and exponential):
quotients are rounded as IEEE divisions are, codes half to even, and products are not contracted into sums. Tensors are read in
the order they lie in memory; offsets are 64 bits wide.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagerq.quant import plain_kernels as plain
from eagerq.quant.layout import dense
from eagerq.quant.memory import Held, address, empty
from eagerq.quant.triton_launch import Over, Plan, planned, remember, stream_of

#: Values of one program's step, a multiple of 8: eight neighbours share a byte of the mask.
_BLOCK = 2048
#: Programs for each multiprocessor, each of which takes every so many-th block: of whole blocks of 16 bits as many as have
#: registers there at once, of others what was fastest.
_WAVES = 5
_FEWER_WAVES = 3
_WARPS = 8
#: Programs of a pass that takes no part in a range.
_COPIES = 16
#: Steps whose values are on their way at once.
_STAGES = 3
#: 1.5 * 2^23: of a float32 of that size the last digits are units, so that adding it rounds half to even.
UNITS = tl.constexpr(12582912.0)


@triton.jit
def _key(x):
    """Unsigned integers in the order of float32 values; zero is below all of them."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _value(key):
    """Inverse of ``_key``."""
    bits = tl.where(key >> 31 != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _round(x):
    """Half to even, for magnitudes up to 2^22: a float32 of 2^23 and more has no fraction."""
    return (x + UNITS) - UNITS


@triton.jit
def _clamp(x, low, high):
    """Between low and high; NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _params(
    least, greatest, QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """``functional.quantization_params`` of one range."""
    low = tl.minimum(least, 0.0)
    high = tl.maximum(greatest, 0.0)
    if SYMMETRIC:
        scale = tl.math.div_rn(tl.maximum(-low, high), LEVELS * 1.0)
    else:
        scale = tl.math.div_rn(high - low, (QMAX - QMIN) * 1.0)
    scale = tl.maximum(scale, 9.094947017729282e-13)
    if POWER_OF_TWO:
        below = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(below == scale, scale, below * 2.0)
    if SYMMETRIC:
        zero = tl.zeros_like(scale) + FIXED_ZERO
    else:
        zero = QMIN - _round(tl.math.div_rn(low, scale))
        zero = tl.minimum(tl.maximum(zero, QMIN * 1.0), QMAX * 1.0)
    return scale, zero.to(tl.int32)


@triton.jit
def _merged(low, high, least, greatest, constant, MIN_MAX: tl.constexpr):
    """``observer.merged_range``: the range after one more batch."""
    if MIN_MAX:
        new_low = tl.minimum(least, low)
        new_high = tl.maximum(greatest, high)
    else:
        new_low = tl.where(constant == 1.0, low, least + constant * (low - least))
        new_high = tl.where(constant == 1.0, high, greatest + constant * (high - greatest))
    first = (least == 0.0) & (greatest == 0.0)
    new_low = tl.where(first, low, new_low)
    new_high = tl.where(first, high, new_high)
    finite = tl.abs(high - low) < float("inf")
    return tl.where(finite, new_low, least), tl.where(finite, new_high, greatest)


@triton.jit
def _code(x, scale, inverse, least, most, FUSED: tl.constexpr):
    """Codes less the zero point of x between ``least`` and ``most``, which lie within the grid or one code beyond."""
    return _nearest(_clamp(x, least, most), scale, inverse, FUSED)


@triton.jit
def _nearest(x, scale, inverse, FUSED: tl.constexpr):
    """``_code`` of what is clamped already."""
    return _raised(x, scale, inverse, FUSED) - UNITS


@triton.jit
def _raised(x, scale, inverse, FUSED: tl.constexpr):
    """``_nearest`` and ``UNITS``.

    The quotient is corrected twice by its residual, which a fused product has exactly: it is then the one nearest to x / scale
    (Markstein, 1990).
    """
    if FUSED:
        v = x * inverse
        v = tl.fma(tl.fma(v, -scale, x), inverse, v)
        v = tl.fma(tl.fma(v, -scale, x), inverse, v)
    else:  # an interpreter has no fused product
        v = tl.math.div_rn(x, scale)
    return v + UNITS


@triton.jit
def _coded(x, scale, inverse, low, high, FUSED: tl.constexpr):
    """Codes less the zero point from ``low`` to ``high``, and whether x is of these without clipping."""
    q = _code(x, scale, inverse, (low - 1.0) * scale, (high + 1.0) * scale, FUSED)
    clipped = _clamp(q, low, high)
    return clipped, clipped == q


@triton.jit
def _last_clipped(scale, end, side):
    """Of the values beyond the code ``end`` on this side of it the one next to those that need no clipping."""
    tie = (end + 0.5 * side) * scale  # it or a neighbour
    bits = tie.to(tl.int32, bitcast=True) + tl.arange(0, 16) - 8
    near = bits.to(tl.float32, bitcast=True)
    clipped = (_round(tl.math.div_rn(near, scale)) - end) * side > 0.0
    # all of them lie on one side of zero, since half a code does
    return tl.min(tl.where(clipped, near * side, float("inf")), axis=0) * side


@triton.jit
def _passing(
    scale, zero, known, low, high, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr
):  # fmt: skip
    """Between which values the gradient passes an activation and its quantizer: where neither clamp nor clip holds the value."""
    below = tl.where(known, _last_clipped(scale, QMIN - zero, -1.0), float("-inf"))
    above = tl.where(known, _last_clipped(scale, QMAX - zero, 1.0), float("inf"))
    if HAS_LOW:
        below = tl.maximum(below, low)
    if HAS_HIGH:
        above = tl.minimum(above, high)
    return below, above


@triton.jit
def _nearer(x):
    """The next value on the way to zero."""
    return (x.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)


@triton.jit
def _bounded(a, low, high, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr):
    """What an activation that clamps makes of it."""
    if HAS_LOW:
        a = tl.maximum(a, low, propagate_nan=tl.PropagateNan.ALL)
    if HAS_HIGH:
        a = tl.minimum(a, high, propagate_nan=tl.PropagateNan.ALL)
    return a


@triton.jit
def _normal(x):
    """Twice the normal distribution up to x. (How the error function rounds depends on the version of CUDA, and that of Triton
    need not be PyTorch's.)"""
    return 1.0 + tl.erf(x * 0.7071067811865476)


@triton.jit
def _gelu(x, kind: tl.constexpr):
    """Of PyTorch's steps, rounded as its result is."""
    return (x * 0.5 * _normal(x)).to(kind).to(tl.float32)


@triton.jit
def _load(ptr, lanes, start, n, EVEN: tl.constexpr):
    """float32 values; beyond the last one, that one again."""
    if EVEN:
        return tl.load(ptr + start + lanes).to(tl.float32)
    return tl.load(ptr + tl.minimum(start + lanes, n - 1)).to(tl.float32)


@triton.jit
def _store(ptr, lanes, start, n, values, EVEN: tl.constexpr):
    values = values.to(ptr.dtype.element_ty)
    if EVEN:
        tl.store(ptr + start + lanes, values)
    else:
        tl.store(ptr + start + lanes, values, mask=start + lanes < n)


@triton.jit
def _seen(x, low, high):
    """Least and greatest value so far; a NaN stays."""
    low = tl.minimum(low, x, propagate_nan=tl.PropagateNan.ALL)
    return low, tl.maximum(high, x, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _least(x):
    """Of a block; -inf if it holds a NaN, so that the batch is left out."""
    x = tl.where(x != x, float("-inf"), x)
    return tl.min(tl.ravel(x), axis=0)


@triton.jit
def _greatest(x):
    x = tl.where(x != x, float("inf"), x)
    return tl.max(tl.ravel(x), axis=0)


@triton.jit
def _give(scratch_ptr, low, high):
    """Hand a program's range to the others, in words that are zero between launches."""
    words = scratch_ptr.to(tl.pointer_type(tl.uint32))
    tl.atomic_max(words, _key(-_least(low)), sem="relaxed")
    tl.atomic_max(words + 1, _key(_greatest(high)), sem="relaxed")


@triton.jit
def _state(at):
    """Of a quantizer's four pointers: scale, zero point, least and greatest value, and whether there is a range."""
    scale_ptr, zero_ptr, least_ptr, greatest_ptr = at
    least = tl.load(least_ptr)
    greatest = tl.load(greatest_ptr)
    return tl.load(scale_ptr), tl.load(zero_ptr).to(tl.float32), least, greatest, (least != 0.0) | (greatest != 0.0)


@triton.jit
def _learn(
    scratch_ptr, at, state, constant, QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, MIN_MAX: tl.constexpr,
):  # fmt: skip
    """Keep the state that ``_state`` found, then let it learn the range that the programs gave; for the last program alone."""
    scale_ptr, zero_ptr, least_ptr, greatest_ptr = at
    scale, zero, least, greatest, _known = state
    low = -_value(tl.atomic_xchg(scratch_ptr, 0, sem="relaxed").to(tl.uint32, bitcast=True))
    high = _value(tl.atomic_xchg(scratch_ptr + 1, 0, sem="relaxed").to(tl.uint32, bitcast=True))
    tl.store(scratch_ptr + 3, scale.to(tl.int32, bitcast=True))
    tl.store(scratch_ptr + 4, zero.to(tl.int32))
    tl.store(scratch_ptr + 5, least.to(tl.int32, bitcast=True))
    tl.store(scratch_ptr + 6, greatest.to(tl.int32, bitcast=True))
    new_least, new_greatest = _merged(low, high, least, greatest, constant, MIN_MAX)
    new_scale, new_zero = _params(new_least, new_greatest, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO)
    known = (new_least != 0.0) | (new_greatest != 0.0)
    tl.store(least_ptr, new_least)
    tl.store(greatest_ptr, new_greatest)
    tl.store(scale_ptr, tl.where(known, new_scale, scale))
    tl.store(zero_ptr, tl.where(known, new_zero, zero.to(tl.int32)))


@triton.jit
def _activation_values(
    x_ptr, out_ptr, mask_ptr, program, n, low, high, scale, zero, below, above,
    KNOWN: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, GELU: tl.constexpr, OBSERVE: tl.constexpr,
    MASK: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, EVEN: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program's part of ``_activation_forward``; the ends of what it was given."""
    ROWS: tl.constexpr = BLOCK // 8
    programs = tl.num_programs(0)
    blocks = tl.cdiv(n, BLOCK)
    rows = tl.arange(0, ROWS)
    lanes = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    bits = (1 << tl.arange(0, 8))[None, :]
    seen_low = tl.full((ROWS, 8), float("inf"), tl.float32)
    seen_high = tl.full((ROWS, 8), float("-inf"), tl.float32)
    inverse = tl.math.div_rn(1.0, scale)
    if HAS_LOW or HAS_HIGH:
        first = (QMIN - zero) * scale
        last = (QMAX - zero) * scale
        least = _clamp(low, first, last) if HAS_LOW else first
        most = _clamp(high, first, last) if HAS_HIGH else last
    else:  # so that what is not clamped is what needs no clipping
        least = _nearer(below)
        most = _nearer(above)
    start = program.to(tl.int64) * BLOCK
    for _ in tl.range(program, blocks, programs, num_stages=STAGES):
        x = _load(x_ptr, lanes, start, n, EVEN)
        if GELU:
            x = _gelu(x, x_ptr.dtype.element_ty)
        if OBSERVE:
            seen_low, seen_high = _seen(x, seen_low, seen_high)
        if KNOWN:
            within = _clamp(x, least, most)
            out = _nearest(within, scale, inverse, FUSED) * scale
            inside = (x > below) & (x < above) if HAS_LOW or HAS_HIGH else within == x
        else:
            out = _bounded(x, low, high, HAS_LOW, HAS_HIGH)
            inside = (x == x) | (not (HAS_LOW or HAS_HIGH))
            if HAS_LOW:
                inside = inside & (x > low)
            if HAS_HIGH:
                inside = inside & (x < high)
        if MASK:
            if not EVEN:
                inside = inside & (start + lanes < n)
            byte = tl.sum(tl.where(inside, bits, 0), axis=1).to(tl.uint8)
            if EVEN:
                tl.store(mask_ptr + start // 8 + rows, byte)
            else:
                tl.store(mask_ptr + start // 8 + rows, byte, mask=start + rows * 8 < n)
        _store(out_ptr, lanes, start, n, out, EVEN)
        start += programs.to(tl.int64) * BLOCK
    return seen_low, seen_high


@triton.jit(do_not_specialize_on_alignment=[f"{n}_ptr" for n in ("scale", "zero", "least", "greatest", "scratch")])
def _activation_forward(
    x_ptr, out_ptr, mask_ptr, scale_ptr, zero_ptr, least_ptr, greatest_ptr, scratch_ptr, n, low, high, constant,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, GELU: tl.constexpr, OBSERVE: tl.constexpr, MASK: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, MIN_MAX: tl.constexpr,
    EVEN: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    quantizer = scale_ptr, zero_ptr, least_ptr, greatest_ptr
    state = _state(quantizer)
    scale, zero, _least, _greatest, known = state
    below, above = _passing(scale, zero, known, low, high, HAS_LOW, HAS_HIGH, QMIN, QMAX)
    if known:
        seen_low, seen_high = _activation_values(
            x_ptr, out_ptr, mask_ptr, program, n, low, high, scale, zero, below, above,
            True, HAS_LOW, HAS_HIGH, GELU, OBSERVE, MASK, QMIN, QMAX, EVEN, FUSED, BLOCK, STAGES,
        )  # fmt: skip
    else:
        seen_low, seen_high = _activation_values(
            x_ptr, out_ptr, mask_ptr, program, n, low, high, scale, zero, below, above,
            False, HAS_LOW, HAS_HIGH, GELU, OBSERVE, MASK, QMIN, QMAX, EVEN, FUSED, BLOCK, STAGES,
        )  # fmt: skip
    if OBSERVE:
        # the ends of what is clamped are the clamped ends
        _give(
            scratch_ptr, _bounded(seen_low, low, high, HAS_LOW, HAS_HIGH), _bounded(seen_high, low, high, HAS_LOW, HAS_HIGH)
        )
        tl.debug_barrier()
        # all programs have read the state and given their range
        if tl.atomic_add(scratch_ptr + 2, 1) == tl.num_programs(0) - 1:
            tl.atomic_xchg(scratch_ptr + 2, 0)
            _learn(
                scratch_ptr, quantizer, state, constant, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO, MIN_MAX
            )  # fmt: skip


@triton.jit
def _passed(grad_ptr, mask_ptr, rows, lanes, start, n, EVEN: tl.constexpr):
    """The gradient where the mask's bit is set, else zero."""
    if EVEN:
        byte = tl.load(mask_ptr + start // 8 + rows)
        grad = tl.load(grad_ptr + start + lanes)
    else:
        byte = tl.load(mask_ptr + start // 8 + rows, mask=start + rows * 8 < n, other=0)
        grad = tl.load(grad_ptr + start + lanes, mask=start + lanes < n, other=0.0)
    inside = (byte.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.where(inside != 0, grad, 0.0)


@triton.jit
def _masked_gradient(grad_ptr, mask_ptr, out_ptr, n, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    ROWS: tl.constexpr = BLOCK // 8
    rows = tl.arange(0, ROWS)
    lanes = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    start = program.to(tl.int64) * BLOCK
    for _ in range(program, tl.cdiv(n, BLOCK), programs):
        _store(out_ptr, lanes, start, n, _passed(grad_ptr, mask_ptr, rows, lanes, start, n, EVEN), EVEN)
        start += programs.to(tl.int64) * BLOCK


@triton.jit
def _gelu_gradient(grad_ptr, x_ptr, mask_ptr, out_ptr, n, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    ROWS: tl.constexpr = BLOCK // 8
    rows = tl.arange(0, ROWS)
    lanes = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    start = program.to(tl.int64) * BLOCK
    for _ in range(program, tl.cdiv(n, BLOCK), programs):
        x = _load(x_ptr, lanes, start, n, EVEN)
        slope = 0.5 * _normal(x) + x * (tl.exp(-0.5 * x * x) * 0.3989422804014327)
        grad = _passed(grad_ptr, mask_ptr, rows, lanes, start, n, EVEN).to(tl.float32)
        _store(out_ptr, lanes, start, n, grad * slope, EVEN)
        start += programs.to(tl.int64) * BLOCK


@triton.jit(do_not_specialize_on_alignment=[f"{n}_ptr" for n in ("scale", "zero", "least", "greatest")])
def _weight_forward(
    weight_ptr, out_ptr, scale_ptr, zero_ptr, least_ptr, greatest_ptr, length,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0)
    start = channel.to(tl.int64) * length
    lanes = tl.arange(0, BLOCK)
    seen_low = tl.full((BLOCK,), float("inf"), tl.float32)
    seen_high = tl.full((BLOCK,), float("-inf"), tl.float32)
    for offset in range(0, length, BLOCK):
        w = _load(weight_ptr + start, lanes, offset, length, False)
        seen_low, seen_high = _seen(w, seen_low, seen_high)
    low = _least(seen_low)
    high = _greatest(seen_high)
    finite = tl.abs(high - low) < float("inf")
    least = tl.where(finite, low, tl.load(least_ptr + channel))
    greatest = tl.where(finite, high, tl.load(greatest_ptr + channel))
    scale, zero = _params(least, greatest, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO)
    tl.store(least_ptr + channel, least)
    tl.store(greatest_ptr + channel, greatest)
    tl.store(scale_ptr + channel, scale)
    tl.store(zero_ptr + channel, zero)
    inverse = tl.math.div_rn(1.0, scale)
    z = zero.to(tl.float32)
    for offset in range(0, length, BLOCK):
        w = _load(weight_ptr + start, lanes, offset, length, False)
        q = _code(w, scale, inverse, (QMIN - z) * scale, (QMAX - z) * scale, FUSED)
        _store(out_ptr + start, lanes, offset, length, q * scale, False)


# --- launches


@functools.cache
def _interprets() -> bool:
    return not isinstance(_code, triton.runtime.JITFunction)


@functools.cache
def _activations(*before: Any) -> Over:
    return Over(_activation_forward, before, (not _interprets(), _BLOCK, _STAGES), _BLOCK, _WAVES, _WARPS, _FEWER_WAVES)


class Activation:
    """The launch bound to all but x; arguments as of ``plain_kernels.activation``.

    Args:
        x: of the dtype of all that are given later.
    """

    _gelu = False

    def __init__(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, scratch: Tensor | None,
        low: float | None, high: float | None, constant: float | None, *grid: Any,
    ) -> None:  # fmt: skip
        low, high = plain.held(low, x.dtype), plain.held(high, x.dtype)
        self.held = Held(scale, zero_point, min_val, max_val, scale if scratch is None else scratch)
        self._scalars = (float(low or 0), float(high or 0), float(constant or 0))  # of an integer Triton may make a constant
        self._before = low is not None, high is not None, self._gelu, scratch is not None
        self._after = *grid, constant is None
        self._launches: dict[bool, Over] = {}

    def __call__(self, x: Tensor, needs_mask: bool) -> tuple[Tensor, Tensor]:
        """The result and the mask, which lie in memory as ``x`` does."""
        x = dense(x)
        out, mask = torch.empty_like(x), plain.mask_like(x, needs_mask, empty)
        self.launch(x, out, mask if needs_mask else None)
        return out, mask

    def launch(self, x: Tensor, out: Tensor, mask: Tensor | None) -> None:
        """Launch: ``out`` and ``mask`` of ``x``, which lie in memory as ``x`` does; with ``scratch`` the state learns."""
        needs_mask = mask is not None
        launch = self._launches.get(needs_mask)
        if launch is None:
            launch = self._launches[needs_mask] = _activations(*self._before, needs_mask, *self._after)
        launch((x, out, out if mask is None else mask), self._scalars, self.held)


class Gelu(Activation):
    """As ``Activation``, of ``plain_kernels.gelu``, which has no bounds."""

    _gelu = True

    def __init__(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, scratch: Tensor | None,
        constant: float | None, *grid: Any,
    ) -> None:  # fmt: skip
        super().__init__(x, scale, zero_point, min_val, max_val, scratch, None, None, constant, *grid)


_masked, _through_gelu = (Over(of, (), (_BLOCK,), _BLOCK, _COPIES, _WARPS) for of in (_masked_gradient, _gelu_gradient))


def masked_gradient(grad: Tensor, mask: Tensor, out: Tensor) -> None:
    """Launch: ``out`` is ``grad`` where the mask's bit is set, else zero; both lie in memory alike."""
    _masked((grad, mask, out))


def gelu_gradient(grad: Tensor, x: Tensor, mask: Tensor, out: Tensor) -> None:
    """Launch: ``out`` is ``grad`` through the mask and GELU's slope at ``x``; all lie in memory alike."""
    _through_gelu((grad, x, mask, out))


def weight_forward(
    weight: Tensor, out: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, grid: tuple[int, ...]
) -> None:
    """Launch: one program for each channel, whose values lie together."""
    shape, stream = weight.shape, stream_of(weight)
    if stream is None:
        with torch.cuda.device(weight.device):
            weight_forward(weight, out, scale, zero_point, min_val, max_val, grid)
        return
    key = (
        "weight", shape, weight.dtype, out.dtype, weight.get_device(), address(weight) & 15, address(out) & 15, scale.shape, grid,
    )  # fmt: skip
    plan, length = planned(key) or remember(key, _weight_plan(weight.numel(), scale.numel(), grid))
    if length:
        plan.launch(stream, scale.numel(), (weight, out, scale, zero_point, min_val, max_val), (length,))


def _weight_plan(n: int, channels: int, grid: tuple[int, ...]) -> tuple[Plan, int]:
    length = n // max(channels, 1)
    block = min(4096, triton.next_power_of_2(max(length, 1)))
    warps = 8 if block > 1024 else 4 if block > 256 else 1
    return Plan(_weight_forward, (*grid, not _interprets(), block), num_warps=warps), length
