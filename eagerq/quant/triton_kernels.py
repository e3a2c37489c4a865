"""Triton kernels: activation, observation and fake quantization in one pass, its backward, and a weight's in one launch.

Each computes what its plain form in ``plain_kernels.py`` does, bit for bit: quotients are rounded as IEEE divisions are, codes
half to even, and products are not contracted into sums. Tensors are read in the order they lie in memory; offsets are 64
bits wide.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagerq.quant import plain_kernels as plain
from eagerq.quant.spec import Grid

#: The tables of a gate in what its forward keeps: entries of each, where it says that there are any, and where they begin.
CODES = tl.constexpr(plain.CODES)
TABULATED = tl.constexpr(plain.TABULATED)
RESULTS = tl.constexpr(plain.RESULTS)
SLOPES = tl.constexpr(plain.SLOPES)
PRODUCTS = tl.constexpr(plain.PRODUCTS)
#: In place of a slope, where the last quantizer clips: a NaN that arithmetic does not give.
CLIPPED = tl.constexpr(0x7FC00001)

#: Values of one program's step, a multiple of 8: eight neighbours share a byte of the mask.
_BLOCK = 2048
#: Programs for each multiprocessor; each takes every so many-th block.
_WAVES = 16
_WARPS = 8


#: Pointers to one value or a few, whose alignment is no matter.
_SMALL = tuple(f"{of}{name}_ptr" for of in ("", "g_", "y_") for name in ("scale", "zero", "least", "greatest", "scratch"))


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
    return (x + 12582912.0) - 12582912.0


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
def _code(x, scale, inverse, low, high, FUSED: tl.constexpr):
    """Clipped codes of x less the zero point, and whether they are what they were before; ``low`` and ``high`` are such codes.

    The quotient is corrected twice by its residual, which a fused product has exactly: it is then the one nearest to x / scale
    (Markstein, 1990), for x within the grid; further out x is held one code beyond it.
    """
    x = _clamp(x, (low - 1.0) * scale, (high + 1.0) * scale)
    if FUSED:
        v = x * inverse
        v = tl.fma(tl.fma(-v, scale, x), inverse, v)
        v = tl.fma(tl.fma(-v, scale, x), inverse, v)
    else:  # an interpreter has no fused product
        v = tl.math.div_rn(x, scale)
    q = _round(v)
    clipped = _clamp(q, low, high)
    return clipped, clipped == q


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
def _learn(
    scratch_ptr, scale_ptr, zero_ptr, least_ptr, greatest_ptr, scale, zero, least, greatest, constant,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, MIN_MAX: tl.constexpr,
):  # fmt: skip
    """Keep the state, then let it learn the range that the programs gave; for the last program alone."""
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


@triton.jit(do_not_specialize_on_alignment=[f"{n}_ptr" for n in ("scale", "zero", "least", "greatest", "scratch")])
def _activation_forward(
    x_ptr, out_ptr, mask_ptr, scale_ptr, zero_ptr, least_ptr, greatest_ptr, scratch_ptr, n, low, high, constant,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, OBSERVE: tl.constexpr, MASK: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, MIN_MAX: tl.constexpr,
    EVEN: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK // 8
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    scale = tl.load(scale_ptr)
    zero = tl.load(zero_ptr).to(tl.float32)
    least = tl.load(least_ptr)
    greatest = tl.load(greatest_ptr)
    known = (least != 0.0) | (greatest != 0.0)
    unknown = known == 0
    inverse = tl.math.div_rn(1.0, scale)
    rows = tl.arange(0, ROWS)
    lanes = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    bits = (1 << tl.arange(0, 8))[None, :]
    seen_low = tl.full((ROWS, 8), float("inf"), tl.float32)
    seen_high = tl.full((ROWS, 8), float("-inf"), tl.float32)
    start = program.to(tl.int64) * BLOCK
    for _ in range(program, tl.cdiv(n, BLOCK), programs):
        x = _load(x_ptr, lanes, start, n, EVEN)
        a = x
        if HAS_LOW:
            a = tl.maximum(a, low, propagate_nan=tl.PropagateNan.ALL)
        if HAS_HIGH:
            a = tl.minimum(a, high, propagate_nan=tl.PropagateNan.ALL)
        if OBSERVE:
            seen_low, seen_high = _seen(a, seen_low, seen_high)
        q, inside = _code(a, scale, inverse, QMIN - zero, QMAX - zero, FUSED)
        if MASK:
            inside = inside | unknown
            if HAS_LOW:
                inside = inside & (x > low)
            if HAS_HIGH:
                inside = inside & (x < high)
            if not EVEN:
                inside = inside & (start + lanes < n)
            byte = tl.sum(tl.where(inside, bits, 0), axis=1).to(tl.uint8)
            if EVEN:
                tl.store(mask_ptr + start // 8 + rows, byte)
            else:
                tl.store(mask_ptr + start // 8 + rows, byte, mask=start + rows * 8 < n)
        _store(out_ptr, lanes, start, n, tl.where(known, q * scale, a), EVEN)
        start += programs.to(tl.int64) * BLOCK
    if OBSERVE:
        _give(scratch_ptr, seen_low, seen_high)
        tl.debug_barrier()
        if tl.atomic_add(scratch_ptr + 2, 1) == programs - 1:  # all programs have read the state and given their range
            tl.atomic_xchg(scratch_ptr + 2, 0)
            _learn(
                scratch_ptr, scale_ptr, zero_ptr, least_ptr, greatest_ptr, scale, zero, least, greatest,
                constant, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO, MIN_MAX,
            )  # fmt: skip


@triton.jit
def _masked_gradient(grad_ptr, mask_ptr, out_ptr, n, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    ROWS: tl.constexpr = BLOCK // 8
    rows = tl.arange(0, ROWS)
    lanes = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    start = program.to(tl.int64) * BLOCK
    for _ in range(program, tl.cdiv(n, BLOCK), programs):
        if EVEN:
            byte = tl.load(mask_ptr + start // 8 + rows)
            grad = tl.load(grad_ptr + start + lanes)
        else:
            byte = tl.load(mask_ptr + start // 8 + rows, mask=start + rows * 8 < n, other=0)
            grad = tl.load(grad_ptr + start + lanes, mask=start + lanes < n, other=0.0)
        inside = (byte.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
        _store(out_ptr, lanes, start, n, tl.where(inside != 0, grad, 0.0), EVEN)
        start += programs.to(tl.int64) * BLOCK


@triton.jit
def _gate(x, HARD: tl.constexpr, FUSED: tl.constexpr):
    """The gate of SiLU or Hardswish."""
    if HARD:
        return tl.math.div_rn(_clamp(x + 3.0, 0.0, 6.0), 6.0)
    if FUSED:
        # 2^(-x log2 e), whose exponent's last digits are lost in one float32: the more, the larger x is
        log2e = tl.zeros_like(x) + 1.4426950408889634
        exponent = -x * log2e
        rest = (tl.fma(-x, log2e, -exponent) - x * 1.9259629911e-8) * 0.6931471805599453
        exponential = tl.exp2(exponent)
        exponential = tl.where(tl.abs(exponent) < 127.5, tl.fma(exponential, rest, exponential), exponential)
    else:
        exponential = tl.exp(-x)
    return 1.0 / (1.0 + exponential)


@triton.jit
def _state(scale_ptr, zero_ptr, least_ptr, greatest_ptr):
    least = tl.load(least_ptr)
    greatest = tl.load(greatest_ptr)
    return tl.load(scale_ptr), tl.load(zero_ptr).to(tl.float32), least, greatest, (least != 0.0) | (greatest != 0.0)


@triton.jit
def _used(used_ptr, scale, zero, known):
    """What a backward computes with."""
    tl.store(used_ptr, scale)
    tl.store(used_ptr + 1, zero)
    tl.store(used_ptr + 2, known.to(tl.float32))


@triton.jit
def _quantized(
    x, by, QMIN: tl.constexpr, QMAX: tl.constexpr, FUSED: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Real values of codes, rounded as the quantizer's own tensor is, and where the gradient passes; ``by`` is of ``_in_use``."""
    scale, inverse, zero, known = by
    q, inside = _code(x, scale, inverse, QMIN - zero, QMAX - zero, FUSED)
    return tl.where(known, q * scale, x).to(KIND).to(tl.float32), inside | (known == 0)


@triton.jit
def _through_gate(
    x, by, g_by, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, FUSED: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Of SiLU or Hardswish in quantized steps: input, gate before and after it is rounded, quantized gate, product; and where
    the two quantizers let the gradient pass."""
    a, passes = _quantized(x, by, QMIN, QMAX, FUSED, KIND)
    fine = _gate(a, HARD, FUSED)
    gate = fine.to(KIND).to(tl.float32)
    b, gate_passes = _quantized(gate, g_by, QMIN, QMAX, FUSED, KIND)
    return a, fine, gate, b, (a * b).to(KIND).to(tl.float32), passes, gate_passes


@triton.jit
def _slope(a, fine, b, gate_passes, HARD: tl.constexpr):
    """The derivative of the product by its quantized input."""
    if HARD:
        slope = tl.where((a > -3.0) & (a < 3.0), 1.0 / 6.0, 0.0)
    else:
        slope = fine * (1.0 - fine)
    return b + tl.where(gate_passes, a * slope, 0.0)


@triton.jit
def _in_use(used_ptr):
    """Scale, its inverse, zero point and whether there is a range, of what a forward kept for its backward."""
    scale = tl.load(used_ptr)
    return scale, tl.math.div_rn(1.0, scale), tl.load(used_ptr + 1), tl.load(used_ptr + 2) != 0.0


@triton.jit
def _tabulate(
    used_ptr, by, g_by, y_by, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, FUSED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Behind the first quantizer all is a function of a code: the tables of it. Each program writes the same and reads its own.

    Of each code the result and the product before its quantizer, together in one word where they are of 16 bits, and the slope.
    """
    code = tl.arange(0, CODES)
    a, fine, _gate, b, y, _passes, gate_passes = _through_gate(
        (tl.minimum(code + QMIN, QMAX).to(tl.float32) - by[2]) * by[0], by, g_by, HARD, QMIN, QMAX, FUSED, KIND
    )  # fmt: skip
    out, y_passes = _quantized(y, y_by, QMIN, QMAX, FUSED, KIND)
    if KIND.primitive_bitwidth == 16:
        word = y.to(KIND).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        word = word | out.to(KIND).to(tl.uint16, bitcast=True).to(tl.uint32)
        tl.store((used_ptr + RESULTS).to(tl.pointer_type(tl.uint32)) + code, word)
    else:
        tl.store(used_ptr + RESULTS + code, out)
        tl.store(used_ptr + PRODUCTS + code, y)
    slope = _slope(a, fine, b, gate_passes, HARD).to(tl.int32, bitcast=True)
    tl.store((used_ptr + SLOPES).to(tl.pointer_type(tl.int32)) + code, tl.where(y_passes, slope, CLIPPED))
    tl.store(used_ptr + TABULATED, 1.0)
    tl.debug_barrier()


@triton.jit
def _entry(q, zero, QMIN: tl.constexpr):
    """Where in a table a code less the zero point is; of NaN somewhere."""
    return (q - (QMIN - zero) + 12582912.0).to(tl.int32, bitcast=True) & (CODES - 1)


@triton.jit
def _gated(
    x, used_ptr, by, g_by, y_by, LOOKS_UP: tl.constexpr, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    FUSED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """SiLU or Hardswish in quantized steps: result as it is stored, product, and the gate or, of a table, the code that it rises
    with."""
    if LOOKS_UP:
        q, _inside = _code(x, by[0], by[1], QMIN - by[2], QMAX - by[2], FUSED)
        at = _entry(q, by[2], QMIN)
        if KIND.primitive_bitwidth == 16:
            word = tl.load((used_ptr + RESULTS).to(tl.pointer_type(tl.uint32)) + at)
            word = tl.where(q == q, word, 0x7FFF7FFF)  # NaN twice
            return (
                (word & 0xFFFF).to(tl.uint16).to(KIND, bitcast=True),
                (word >> 16).to(tl.uint16).to(KIND, bitcast=True).to(tl.float32),
                q,
            )
        else:  # noqa: RET505  # Triton wants one type of what is returned, unless a constant leaves the other out
            out = tl.load(used_ptr + RESULTS + at)
            y = tl.load(used_ptr + PRODUCTS + at)
            return tl.where(q == q, out, q), tl.where(q == q, y, q), q
    else:
        _a, _fine, gate, _b, y, _passes, _gate_passes = _through_gate(x, by, g_by, HARD, QMIN, QMAX, FUSED, KIND)
        out, _y_passes = _quantized(y, y_by, QMIN, QMAX, FUSED, KIND)
        return out.to(KIND), y, gate


@triton.jit
def _gate_of(q, by, LOOKS_UP: tl.constexpr, HARD: tl.constexpr, FUSED: tl.constexpr, KIND: tl.constexpr):
    """The gate of what ``_gated`` gives."""
    if LOOKS_UP:
        return _gate((q * by[0]).to(KIND).to(tl.float32), HARD, FUSED).to(KIND).to(tl.float32)
    else:  # noqa: RET505
        return q


@triton.jit
def _gated_gradient(
    grad, x, used_ptr, by, g_by, y_by, LOOKS_UP: tl.constexpr, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    FUSED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    if LOOKS_UP:
        q, inside = _code(x, by[0], by[1], QMIN - by[2], QMAX - by[2], FUSED)
        slope = tl.load((used_ptr + SLOPES).to(tl.pointer_type(tl.int32)) + _entry(q, by[2], QMIN))
        return tl.where(inside & (slope != CLIPPED), grad * slope.to(tl.float32, bitcast=True), 0.0)
    else:  # noqa: RET505
        a, fine, _gate, b, y, passes, gate_passes = _through_gate(x, by, g_by, HARD, QMIN, QMAX, FUSED, KIND)
        _out, y_passes = _quantized(y, y_by, QMIN, QMAX, FUSED, KIND)
        return tl.where(passes & y_passes, grad * _slope(a, fine, b, gate_passes, HARD), 0.0)


@triton.jit
def _gated_values(
    x_ptr, out_ptr, used_ptr, program, n, by, g_by, y_by, LOOKS_UP: tl.constexpr, HARD: tl.constexpr, QMIN: tl.constexpr,
    QMAX: tl.constexpr, EVEN: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's part of ``_gated_forward``; the ends of what the three quantizers are given."""
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    g_low = low
    g_high = high
    y_low = low
    y_high = high
    kind: tl.constexpr = x_ptr.dtype.element_ty
    start = program.to(tl.int64) * BLOCK
    for _ in range(program, tl.cdiv(n, BLOCK), programs):
        x = _load(x_ptr, lanes, start, n, EVEN)
        out, y, gate = _gated(x, used_ptr, by, g_by, y_by, LOOKS_UP, HARD, QMIN, QMAX, FUSED, kind)
        low, high = _seen(x, low, high)
        g_low, g_high = _seen(gate, g_low, g_high)
        y_low, y_high = _seen(y, y_low, y_high)
        _store(out_ptr, lanes, start, n, out, EVEN)
        start += programs.to(tl.int64) * BLOCK
    g_low = _gate_of(g_low, by, LOOKS_UP, HARD, FUSED, kind)
    return low, high, g_low, _gate_of(g_high, by, LOOKS_UP, HARD, FUSED, kind), y_low, y_high


@triton.jit(do_not_specialize_on_alignment=["used_ptr", *_SMALL])
def _gated_forward(
    x_ptr, out_ptr, used_ptr, scratch_ptr, g_scratch_ptr, y_scratch_ptr,
    scale_ptr, zero_ptr, least_ptr, greatest_ptr, g_scale_ptr, g_zero_ptr, g_least_ptr, g_greatest_ptr,
    y_scale_ptr, y_zero_ptr, y_least_ptr, y_greatest_ptr, n, constant, HARD: tl.constexpr, OBSERVE: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, MIN_MAX: tl.constexpr,
    EVEN: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    scale, zero, least, greatest, known = _state(scale_ptr, zero_ptr, least_ptr, greatest_ptr)
    g_scale, g_zero, g_least, g_greatest, g_known = _state(g_scale_ptr, g_zero_ptr, g_least_ptr, g_greatest_ptr)
    y_scale, y_zero, y_least, y_greatest, y_known = _state(y_scale_ptr, y_zero_ptr, y_least_ptr, y_greatest_ptr)
    by = scale, tl.math.div_rn(1.0, scale), zero, known
    g_by = g_scale, tl.math.div_rn(1.0, g_scale), g_zero, g_known
    y_by = y_scale, tl.math.div_rn(1.0, y_scale), y_zero, y_known
    if program == 0:
        _used(used_ptr, scale, zero, known)
        _used(used_ptr + 3, g_scale, g_zero, g_known)
        _used(used_ptr + 6, y_scale, y_zero, y_known)
    looks_up = known & (QMAX - QMIN < CODES)
    if looks_up:
        _tabulate(used_ptr, by, g_by, y_by, HARD, QMIN, QMAX, FUSED, x_ptr.dtype.element_ty)
        low, high, g_low, g_high, y_low, y_high = _gated_values(
            x_ptr, out_ptr, used_ptr, program, n, by, g_by, y_by, True, HARD, QMIN, QMAX, EVEN, FUSED, BLOCK
        )  # fmt: skip
    else:
        tl.store(used_ptr + TABULATED, 0.0)
        low, high, g_low, g_high, y_low, y_high = _gated_values(
            x_ptr, out_ptr, used_ptr, program, n, by, g_by, y_by, False, HARD, QMIN, QMAX, EVEN, FUSED, BLOCK
        )  # fmt: skip
    if OBSERVE:
        _give(scratch_ptr, low, high)
        _give(g_scratch_ptr, g_low, g_high)
        _give(y_scratch_ptr, y_low, y_high)
        tl.debug_barrier()
        if tl.atomic_add(scratch_ptr + 2, 1) == programs - 1:
            tl.atomic_xchg(scratch_ptr + 2, 0)
            _learn(
                scratch_ptr, scale_ptr, zero_ptr, least_ptr, greatest_ptr, scale, zero, least, greatest,
                constant, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO, MIN_MAX,
            )  # fmt: skip
            _learn(
                g_scratch_ptr, g_scale_ptr, g_zero_ptr, g_least_ptr, g_greatest_ptr, g_scale, g_zero,
                g_least, g_greatest, constant, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO, MIN_MAX,
            )  # fmt: skip
            _learn(
                y_scratch_ptr, y_scale_ptr, y_zero_ptr, y_least_ptr, y_greatest_ptr, y_scale, y_zero,
                y_least, y_greatest, constant, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO, MIN_MAX,
            )  # fmt: skip


@triton.jit
def _gated_gradients(
    grad_ptr, x_ptr, out_ptr, used_ptr, program, n, by, g_by, y_by, LOOKS_UP: tl.constexpr, HARD: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, EVEN: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's part of ``_gated_backward``."""
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    start = program.to(tl.int64) * BLOCK
    for _ in range(program, tl.cdiv(n, BLOCK), programs):
        x = _load(x_ptr, lanes, start, n, EVEN)
        grad = _load(grad_ptr, lanes, start, n, EVEN)
        kind: tl.constexpr = x_ptr.dtype.element_ty
        grad = _gated_gradient(grad, x, used_ptr, by, g_by, y_by, LOOKS_UP, HARD, QMIN, QMAX, FUSED, kind)
        _store(out_ptr, lanes, start, n, grad, EVEN)
        start += programs.to(tl.int64) * BLOCK


@triton.jit(do_not_specialize_on_alignment=["used_ptr"])
def _gated_backward(
    grad_ptr, x_ptr, out_ptr, used_ptr, n, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    EVEN: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    by = _in_use(used_ptr)
    g_by = _in_use(used_ptr + 3)
    y_by = _in_use(used_ptr + 6)
    if tl.load(used_ptr + TABULATED) != 0.0:
        _gated_gradients(
            grad_ptr, x_ptr, out_ptr, used_ptr, program, n, by, g_by, y_by, True, HARD, QMIN, QMAX, EVEN, FUSED, BLOCK
        )  # fmt: skip
    else:
        _gated_gradients(
            grad_ptr, x_ptr, out_ptr, used_ptr, program, n, by, g_by, y_by, False, HARD, QMIN, QMAX, EVEN, FUSED, BLOCK
        )  # fmt: skip


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
        q, _inside = _code(w, scale, inverse, QMIN - z, QMAX - z, FUSED)
        _store(out_ptr + start, lanes, offset, length, q * scale, False)


# --- launches

_COMPILED: dict[Any, Any] = {}
_PROCESSORS: dict[int, int] = {}


@functools.cache
def _interprets() -> bool:
    return not isinstance(_code, triton.runtime.JITFunction)


#: Triton asks the driver about each tensor that it is given, and nothing about addresses.
address: Any = Tensor.data_ptr


def _launch(
    kernel: Any, programs: int, tensors: tuple[Tensor, ...], scalars: tuple[float, ...], n: int, constants: tuple[Any, ...],
    warps: int,
) -> None:  # fmt: skip
    """``kernel`` by its arguments and its compile-time ``constants``, in the order of its parameters.

    Triton looks a compiled kernel up by all its arguments, which takes longer than a small kernel runs. Here what decides is
    looked up: the constants, the device, the dtypes of the large tensors, which come first, and whether their addresses and
    ``n``, the one integer among the arguments, divide by 16. Pointers to one value are not specialized on.
    """
    first, second = tensors[0], tensors[1]
    stream = stream_of(first)
    if stream is None:
        with torch.cuda.device(first.device):
            _launch(kernel, programs, tensors, scalars, n, constants, warps)
        return
    addresses = [*map(address, tensors)]
    aligned = (addresses[0] & 15, addresses[1] & 15, addresses[2] & 15)
    # of the kernel its number: Triton hashes its text
    key = (id(kernel), first.get_device(), constants, warps, first.dtype, second.dtype, aligned, n & 15 == 0, n == 1, n >> 31)
    compiled = _COMPILED.get(key)
    if compiled is None:
        made = kernel[(programs,)](*tensors, *scalars, *constants, num_warps=warps, enable_fp_fusion=False)
        _COMPILED[key] = made and (made.run, made.function, made.packed_metadata)  # an interpreter gives None
    else:
        run, function, metadata = compiled
        run(programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *scalars, *constants)


def stream_of(x: Tensor) -> int | None:
    """Where Triton, which launches on the current device, launches on what lies as x does: the stream; None on other devices."""
    if not x.is_cuda:
        return 0
    device = x.get_device()
    return torch._C._cuda_getCurrentRawStream(device) if device == torch.cuda.current_device() else None


def _processors(x: Tensor) -> int:
    index = x.get_device()
    if index not in _PROCESSORS:
        _PROCESSORS[index] = torch.cuda.get_device_properties(index).multi_processor_count if x.is_cuda else 1
    return _PROCESSORS[index]


def _programs(x: Tensor, n: int, block: int) -> int:
    return min(-(-n // block), _processors(x) * _WAVES)


def activation_forward(
    x: Tensor, out: Tensor, mask: Tensor | None, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor,
    scratch: Tensor | None, low: float | None, high: float | None, constant: float | None, grid: Grid,
) -> None:  # fmt: skip
    """Launch: ``out`` and ``mask`` of ``x``, which lie in memory as ``x`` does; with ``scratch`` the state learns."""
    n = x.numel()
    if n:
        state = (scale, zero_point, min_val, max_val, scale if scratch is None else scratch)
        ends = (float(low or 0), float(high or 0), float(constant or 0))
        _launch(
            _activation_forward, _programs(x, n, _BLOCK), (x, out, out if mask is None else mask, *state), (n, *ends), n,
            (low is not None, high is not None, scratch is not None, mask is not None, *grid, constant is None,
             n % _BLOCK == 0, not _interprets(), _BLOCK), _WARPS,
        )  # fmt: skip


def masked_gradient(grad: Tensor, mask: Tensor, out: Tensor) -> None:
    """Launch: ``out`` is ``grad`` where the mask's bit is set, else zero; both lie in memory alike."""
    n = grad.numel()
    if n:
        _launch(_masked_gradient, _programs(grad, n, _BLOCK), (grad, mask, out), (n,), n, (n % _BLOCK == 0, _BLOCK), _WARPS)


def gated_forward(
    x: Tensor, out: Tensor, used: Tensor, scratch: list[Tensor], state: list[Tensor], hard: bool, constant: float | None,
    grid: Grid,
) -> None:  # fmt: skip
    """Launch: ``out`` of ``x``, and ``used``, what its backward needs; with ``scratch`` the state learns."""
    n = x.numel()
    if n:
        block = _BLOCK // 2
        _launch(
            _gated_forward, _programs(x, n, block),
            (x, out, used, *(scratch or [used] * 3), *state), (n, float(constant or 0)), n,
            (hard, bool(scratch), *grid, constant is None, n % block == 0, not _interprets(), block), 4,
        )  # fmt: skip


def gated_backward(grad: Tensor, x: Tensor, out: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> None:
    """Launch: the gradient of ``gated_forward``; all lie in memory alike."""
    n = x.numel()
    if n:
        block = _BLOCK // 2
        _launch(
            _gated_backward, _programs(x, n, block), (grad, x, out, used), (n,), n,
            (hard, quant_min, quant_max, n % block == 0, not _interprets(), block), 4,
        )  # fmt: skip


def weight_forward(
    weight: Tensor, out: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, grid: Grid
) -> None:
    """Launch: one program for each channel, whose values lie together."""
    channels = scale.numel()
    length = weight.numel() // max(channels, 1)
    if length:
        block = min(4096, 1 << (length - 1).bit_length())  # Triton's own function of that takes as long as a launch
        _launch(
            _weight_forward, channels, (weight, out, scale, zero_point, min_val, max_val), (length,), length,
            (*grid, not _interprets(), block), 8 if block > 1024 else 4 if block > 256 else 1,
        )  # fmt: skip
