"""Triton kernels of a batch norm in training with what follows it: activation, observation and fake quantization.

Forward: a pass over x finds each channel's mean, squares about it, least and greatest value, and makes of them the statistics
and, since a norm is monotone in each channel, the ends of its output, from which the quantizer learns; a second pass writes the
result. Backward: a pass sums the gradient, a second pass writes the gradient of x. Both backward passes find again from x where
the gradient passes, so nothing but x is kept. A SiLU or Hardswish behind the norm is computed in the second pass and, of the
gradient, in the first, which then hands on what has passed; the forward's second pass is in ``triton_gated_norms.py``.

Values lie as rows of channels. Programs that share channels sum a part of the rows each; the last of them adds the parts up.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagerq.quant import plain_kernels as plain
from eagerq.quant.memory import Held, address, empty
from eagerq.quant.triton_gates import CODES, _first_in_use, _gated_gradient, _in_use
from eagerq.quant.triton_kernels import (
    _bounded,
    _code,
    _give,
    _interprets,
    _learn,
    _passing,
    _seen,
    _state,
    _value,
)
from eagerq.quant.triton_launch import Plan, planned, processors, remember, stream_of

#: Values of one program's step, programs for each multiprocessor, which share the rows, and steps whose values are on their way
#: at once, since memory answers late: of passes that sum, and that write.
_FORWARD_SUMS = (4096, 2, 4)
_BACKWARD_SUMS = (2048, 3, 3)
_WRITES = (4096, 8, 3)
#: Where a gate is looked up: loads of a table are not to be on their way ahead. With fewer registers a thread, more of them hide
#: that memory answers late.
_GATED_SUMS = (2048, 4, 1, 64)
#: Most channels of a step of a pass that sums, unless there would be too many blocks of them, and of one that writes.
_SUMMED = 32
_WRITTEN = 64
_WARPS = 8
#: Where in what a forward keeps mean and inverse deviation of each channel begin.
KEPT = tl.constexpr(plain.KEPT)
#: Where in a quantizer's scratch memory a count for each block of channels begins.
COUNTS = tl.constexpr(plain.COUNTS)
#: Values that are added up at once.
_ADDED = 1024

_SMALL = [
    f"{name}_ptr"
    for name in (
        "part", "weight", "bias", "kept", "running_mean", "running_var", "batches", "scale", "zero", "least", "greatest",
        "scratch", "sums", "used",
    )
]  # fmt: skip
_INTEGERS = ["rows", "chunk", "parts"]


@triton.jit
def _place(pid, channels, BC: tl.constexpr):
    """Which rows' part and which channels a program has; neighbours share rows."""
    blocks = tl.cdiv(channels, BC)
    return pid // blocks, (pid % blocks) * BC + tl.arange(0, BC)


@triton.jit
def _in_a_row(pid, channels, BR: tl.constexpr, BC: tl.constexpr):
    """``_place``, and row and channel of each value of a tile in a row: Triton reads tables for values that lie so as it reads
    them, and for a tile moves them to other threads and back."""
    blocks = tl.cdiv(channels, BC)
    lane = tl.arange(0, BR * BC)
    return pid // blocks, lane // BC, (pid % blocks) * BC + lane % BC


@triton.jit
def _offsets(row, column, channels):
    """Where values lie: 64 bits wide."""
    return row.to(tl.int64)[:, None] * channels + column[None, :]


@triton.jit
def _values(ptr, at, here):
    """float32 values; nothing is read elsewhere."""
    return tl.load(ptr + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _affine(x, mean, factor, bias, KIND: tl.constexpr):
    """The norm's output, rounded as its own tensor is: monotone in x."""
    return ((x - mean) * factor + bias).to(KIND).to(tl.float32)


@triton.jit
def _factor(weight_ptr, bias_ptr, inverse, column, inside, AFFINE: tl.constexpr):
    if AFFINE:
        return inverse * _values(weight_ptr, column, inside), _values(bias_ptr, column, inside)
    return inverse, tl.zeros_like(inverse)


@triton.jit
def _statistics(kept_ptr, weight_ptr, bias_ptr, channels, column, inside, AFFINE: tl.constexpr):
    """What a forward kept of a program's channels, and their affine map."""
    mean = _values(kept_ptr + KEPT, column, inside)
    inverse = _values(kept_ptr + KEPT + channels, column, inside)
    factor, bias = _factor(weight_ptr, bias_ptr, inverse, column, inside, AFFINE)
    return mean, inverse, factor, bias


@triton.jit
def _is_last(count_ptr, of):
    """Whether a program is the last of so many that come here; what the others wrote before is then seen."""
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr, 1) == of - 1
    if last:
        tl.atomic_xchg(count_ptr, 0)
    return last


@triton.jit
def _norm_finish(
    x_ptr, part_ptr, kept_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr, scale_ptr, zero_ptr,
    least_ptr, greatest_ptr, scratch_ptr, rows, chunk, parts, channels, momentum, eps, low, high, constant, column,
    AFFINE: tl.constexpr, TRACKS: tl.constexpr, OBSERVE: tl.constexpr, LEARN: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, MIN_MAX: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of one block of channels: statistics of the parts, running statistics, and what the quantizer learns."""
    inside = column < channels
    quantizer = scale_ptr, zero_ptr, least_ptr, greatest_ptr
    state = _state(quantizer)
    scale, zero, _least, _greatest, has_range = state
    first = tl.min(column, axis=0) == 0
    if first:
        slot = tl.arange(0, 8)
        known = has_range.to(tl.float32)
        below, above = _passing(scale, zero, has_range, low, high, HAS_LOW, HAS_HIGH, QMIN, QMAX)
        used = tl.where(slot == 0, scale, tl.where(slot == 1, zero, tl.where(slot == 2, known, 0.0)))
        tl.store(kept_ptr + slot, tl.where(slot == 6, below, tl.where(slot == 7, above, used)))
        if TRACKS:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    lanes = tl.arange(0, BP)
    step = parts.to(tl.int64) * channels
    near = tl.load(part_ptr + column, mask=inside, other=0.0, cache_modifier=".cg")
    total = tl.zeros((BP, BC), tl.float32)
    squares = tl.zeros((BP, BC), tl.float32)
    seen_low = tl.full((BP, BC), float("inf"), tl.float32)
    seen_high = tl.full((BP, BC), float("-inf"), tl.float32)
    for start in range(0, parts, BP):
        part = start + lanes
        at = part_ptr + _offsets(part, column, channels)
        here = (part < parts)[:, None] & inside[None, :]
        count = tl.where(part < parts, tl.minimum(chunk, rows - part * chunk), 0).to(tl.float32)[:, None]
        mean = tl.load(at, mask=here, other=0.0, cache_modifier=".cg")
        about = tl.load(at + step, mask=here, other=0.0, cache_modifier=".cg")
        seen_low = tl.minimum(seen_low, tl.load(at + 2 * step, mask=here, other=float("inf"), cache_modifier=".cg"))
        seen_high = tl.maximum(seen_high, tl.load(at + 3 * step, mask=here, other=float("-inf"), cache_modifier=".cg"))
        away = tl.where(here, mean - near[None, :], 0.0)
        total += count * away
        squares += about + count * (away * away)
    n = rows.to(tl.float32)
    sums = tl.sum(total, axis=0)
    shift = sums / n
    mean = near + shift
    deviation = tl.sum(squares, axis=0) - sums * shift
    deviation = tl.where(deviation < 0.0, 0.0, deviation)
    inverse = tl.math.div_rn(1.0, tl.sqrt_rn(deviation / n + eps))
    tl.store(kept_ptr + KEPT + column, mean, mask=inside)
    tl.store(kept_ptr + KEPT + channels + column, inverse, mask=inside)
    tl.store(kept_ptr + 8 + tl.min(column, axis=0) // BC, 0.0)  # where a backward counts
    kept = _values(running_mean_ptr, column, inside)
    kept = mean * momentum + (1.0 - momentum) * kept
    tl.store(running_mean_ptr + column, kept.to(running_mean_ptr.dtype.element_ty), mask=inside)
    kept = _values(running_var_ptr, column, inside)
    kept = deviation / (n - 1.0) * momentum + (1.0 - momentum) * kept
    tl.store(running_var_ptr + column, kept.to(running_var_ptr.dtype.element_ty), mask=inside)
    if OBSERVE:
        kind: tl.constexpr = x_ptr.dtype.element_ty
        factor, bias = _factor(weight_ptr, bias_ptr, inverse, column, inside, AFFINE)
        one = _bounded(_affine(tl.min(seen_low, axis=0), mean, factor, bias, kind), low, high, HAS_LOW, HAS_HIGH)
        two = _bounded(_affine(tl.max(seen_high, axis=0), mean, factor, bias, kind), low, high, HAS_LOW, HAS_HIGH)
        one_low, one_high = _seen(one, two, two)
        # what lies beyond the last channel is as the first
        head = tl.sum(tl.where(tl.arange(0, BC) == 0, one_low, 0.0), axis=0)
        _give(scratch_ptr, tl.where(inside, one_low, head), tl.where(inside, one_high, head))
        if _is_last(scratch_ptr + 2, tl.cdiv(channels, BC)):
            if LEARN:
                _learn(
                    scratch_ptr, quantizer, state, constant, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO, MIN_MAX
                )  # fmt: skip
            else:
                tl.store(kept_ptr + 4, -_value(tl.atomic_xchg(scratch_ptr, 0, sem="relaxed").to(tl.uint32, bitcast=True)))
                tl.store(kept_ptr + 5, _value(tl.atomic_xchg(scratch_ptr + 1, 0, sem="relaxed").to(tl.uint32, bitcast=True)))


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _norm_statistics(
    x_ptr, part_ptr, kept_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr, scale_ptr, zero_ptr,
    least_ptr, greatest_ptr, scratch_ptr, rows, chunk, parts, channels, momentum, eps, low, high, constant,
    AFFINE: tl.constexpr, TRACKS: tl.constexpr, OBSERVE: tl.constexpr, LEARN: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, MIN_MAX: tl.constexpr,
    BP: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of a part of the rows, for each channel: mean, squares about it, least and greatest value; then of all parts."""
    part, column = _place(tl.program_id(0), channels, BC)
    inside = column < channels
    first = part * chunk
    end = tl.minimum(first + chunk, rows)
    lanes = tl.arange(0, BR)
    row = first + lanes
    x = _values(x_ptr, _offsets(row, column, channels), (row < end)[:, None] & inside[None, :])
    near = tl.sum(x, axis=0) / tl.minimum(end - first, BR)  # values less one near their mean have sums without cancellation
    total = tl.zeros((BR, BC), tl.float32)
    squares = tl.zeros((BR, BC), tl.float32)
    low_seen = tl.full((BR, BC), float("inf"), tl.float32)
    high_seen = tl.full((BR, BC), float("-inf"), tl.float32)
    for start in tl.range(first, end, BR, num_stages=STAGES):
        row = start + lanes
        within = (row < end)[:, None]
        x = _values(x_ptr, _offsets(row, column, channels), within & inside[None, :])
        new_low, new_high = _seen(x, low_seen, high_seen)
        low_seen = tl.where(within, new_low, low_seen)
        high_seen = tl.where(within, new_high, high_seen)
        apart = tl.where(within, x - near[None, :], 0.0)
        total += apart
        squares += apart * apart
    count = (end - first).to(tl.float32)
    sums = tl.sum(total, axis=0)
    away = sums / count
    step = parts.to(tl.int64) * channels
    at = part_ptr + part.to(tl.int64) * channels + column
    tl.store(at, near + away, mask=inside)
    tl.store(at + step, tl.maximum(tl.sum(squares, axis=0) - sums * away, 0.0), mask=inside)
    tl.store(at + 2 * step, tl.min(tl.where(low_seen != low_seen, float("-inf"), low_seen), axis=0), mask=inside)
    tl.store(at + 3 * step, tl.max(tl.where(high_seen != high_seen, float("inf"), high_seen), axis=0), mask=inside)
    if _is_last(scratch_ptr + COUNTS + tl.program_id(0) % tl.cdiv(channels, BC), parts):
        _norm_finish(
            x_ptr, part_ptr, kept_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr, scale_ptr,
            zero_ptr, least_ptr, greatest_ptr, scratch_ptr, rows, chunk, parts, channels, momentum, eps, low, high, constant,
            column, AFFINE, TRACKS, OBSERVE, LEARN, HAS_LOW, HAS_HIGH, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO,
            MIN_MAX, BP, BC,
        )  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _norm_forward(
    x_ptr, out_ptr, kept_ptr, weight_ptr, bias_ptr, rows, chunk, channels, low, high,
    AFFINE: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, QMIN: tl.constexpr,
    QMAX: tl.constexpr, FUSED: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part, column = _place(tl.program_id(0), channels, BC)
    inside = column < channels
    scale = tl.load(kept_ptr)
    zero = tl.load(kept_ptr + 1)
    known = tl.load(kept_ptr + 2) != 0.0
    reciprocal = tl.math.div_rn(1.0, scale)
    mean, _inverse, factor, bias = _statistics(kept_ptr, weight_ptr, bias_ptr, channels, column, inside, AFFINE)
    first = part * chunk
    end = tl.minimum(first + chunk, rows)
    lanes = tl.arange(0, BR)
    for start in tl.range(first, end, BR, num_stages=STAGES):
        row = start + lanes
        at = _offsets(row, column, channels)
        here = (row < end)[:, None] & inside[None, :]
        x = _values(x_ptr, at, here)
        y = _affine(x, mean[None, :], factor[None, :], bias[None, :], x_ptr.dtype.element_ty)
        a = _bounded(y, low, high, HAS_LOW, HAS_HIGH)
        q = _code(a, scale, reciprocal, (QMIN - zero) * scale, (QMAX - zero) * scale, FUSED)
        tl.store(out_ptr + at, tl.where(known, q * scale, a).to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _between(grad, y, below, above):
    """The gradient where neither clamp nor clip held the value."""
    return tl.where((y > below) & (y < above), grad, 0.0)


@triton.jit
def _sums_of_rows(
    x_ptr, grad_ptr, part, column, rows, chunk, channels, mean, factor, bias, below, above,
    STAGES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A program's part of ``_norm_sums``."""
    inside = column < channels
    first = part * chunk
    end = tl.minimum(first + chunk, rows)
    lanes = tl.arange(0, BR)
    total = tl.zeros((BR, BC), tl.float32)
    products = tl.zeros((BR, BC), tl.float32)
    for start in tl.range(first, end, BR, num_stages=STAGES):
        row = start + lanes
        at = _offsets(row, column, channels)
        here = (row < end)[:, None] & inside[None, :]
        x = _values(x_ptr, at, here)
        y = _affine(x, mean[None, :], factor[None, :], bias[None, :], x_ptr.dtype.element_ty)
        grad = _between(_values(grad_ptr, at, here), y, below, above)
        total += grad
        products += grad * (x - mean[None, :])
    return tl.sum(total, axis=0), tl.sum(products, axis=0)


@triton.jit
def _sums_past_gate(
    x_ptr, grad_ptr, out_ptr, used_ptr, part, line, column, rows, chunk, channels, mean, factor, bias, by, g_by, y_by,
    LOOKS_UP: tl.constexpr, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, FUSED: tl.constexpr,
    STAGES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``_sums_of_rows`` of what passes a gate, which is written down, rounded as its own tensor is."""
    inside = column < channels
    first = part * chunk
    end = tl.minimum(first + chunk, rows)
    kind: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros((BR * BC,), tl.float32)
    products = tl.zeros((BR * BC,), tl.float32)
    for start in tl.range(first, end, BR, num_stages=STAGES):
        row = start + line
        at = row.to(tl.int64) * channels + column
        here = (row < end) & inside
        x = _values(x_ptr, at, here)
        y = _affine(x, mean, factor, bias, kind)
        grad = _values(grad_ptr, at, here)
        grad = _gated_gradient(grad, y, used_ptr, by, g_by, y_by, LOOKS_UP, HARD, QMIN, QMAX, FUSED, kind)
        grad = grad.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, grad, mask=here)
        total += grad.to(tl.float32)
        products += grad.to(tl.float32) * (x - mean)
    return tl.sum(tl.reshape(total, (BR, BC)), axis=0), tl.sum(tl.reshape(products, (BR, BC)), axis=0)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _norm_sums(
    x_ptr, grad_ptr, out_ptr, part_ptr, sums_ptr, weight_ptr, bias_ptr, kept_ptr, used_ptr, rows, chunk, parts, channels,
    AFFINE: tl.constexpr, GATED: tl.constexpr, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, FUSED: tl.constexpr,
    BP: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of a part of the rows, for each channel: the sum of the gradient, and of its product with the normalised x; then of all
    parts. What passes a gate is written down, since to find it again takes longer than to read it."""
    part, column = _place(tl.program_id(0), channels, BC)
    inside = column < channels
    mean, inverse, factor, bias = _statistics(kept_ptr, weight_ptr, bias_ptr, channels, column, inside, AFFINE)
    if GATED:
        by = _first_in_use(used_ptr)
        g_by = _in_use(used_ptr + 3)
        y_by = _in_use(used_ptr + 6)
        _part, line, channel = _in_a_row(tl.program_id(0), channels, BR, BC)
        mean, _inverse, factor, bias = _statistics(kept_ptr, weight_ptr, bias_ptr, channels, channel, channel < channels, AFFINE)
        if by[3] & (QMAX - QMIN < CODES):
            total, products = _sums_past_gate(
                x_ptr, grad_ptr, out_ptr, used_ptr, part, line, channel, rows, chunk, channels, mean, factor, bias,
                by, g_by, y_by, True, HARD, QMIN, QMAX, FUSED, STAGES, BR, BC,
            )  # fmt: skip
        else:
            total, products = _sums_past_gate(
                x_ptr, grad_ptr, out_ptr, used_ptr, part, line, channel, rows, chunk, channels, mean, factor, bias,
                by, g_by, y_by, False, HARD, QMIN, QMAX, FUSED, STAGES, BR, BC,
            )  # fmt: skip
    else:
        total, products = _sums_of_rows(
            x_ptr, grad_ptr, part, column, rows, chunk, channels, mean, factor, bias,
            tl.load(kept_ptr + 6), tl.load(kept_ptr + 7), STAGES, BR, BC,
        )  # fmt: skip
    at = part_ptr + part.to(tl.int64) * channels + column
    step = parts.to(tl.int64) * channels
    tl.store(at, total, mask=inside)
    tl.store(at + step, products * inverse, mask=inside)
    counts = (kept_ptr + 8).to(tl.pointer_type(tl.int32))
    if _is_last(counts + tl.program_id(0) % tl.cdiv(channels, BC), parts):
        rows_of_parts = tl.arange(0, BP)
        all_of_it = tl.zeros((BP, BC), tl.float32)
        all_products = tl.zeros((BP, BC), tl.float32)
        for start in range(0, parts, BP):
            one = start + rows_of_parts
            here = (one < parts)[:, None] & inside[None, :]
            its = part_ptr + _offsets(one, column, channels)
            all_of_it += tl.load(its, mask=here, other=0.0, cache_modifier=".cg")
            all_products += tl.load(its + step, mask=here, other=0.0, cache_modifier=".cg")
        tl.store(sums_ptr + column, tl.sum(all_of_it, axis=0), mask=inside)
        tl.store(sums_ptr + channels + column, tl.sum(all_products, axis=0), mask=inside)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _norm_backward(
    x_ptr, grad_ptr, out_ptr, sums_ptr, weight_ptr, bias_ptr, kept_ptr, rows, chunk, channels,
    AFFINE: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of x; of one that has passed a gate already, over it."""
    part, column = _place(tl.program_id(0), channels, BC)
    inside = column < channels
    below = tl.load(kept_ptr + 6)
    above = tl.load(kept_ptr + 7)
    mean, inverse, factor, bias = _statistics(kept_ptr, weight_ptr, bias_ptr, channels, column, inside, AFFINE)
    n = rows.to(tl.float32)
    shift = _values(sums_ptr, column, inside) / n
    slope = _values(sums_ptr + channels, column, inside) / n * inverse
    first = part * chunk
    end = tl.minimum(first + chunk, rows)
    lanes = tl.arange(0, BR)
    for start in tl.range(first, end, BR, num_stages=STAGES):
        row = start + lanes
        at = _offsets(row, column, channels)
        here = (row < end)[:, None] & inside[None, :]
        x = _values(x_ptr, at, here)
        grad = _values(grad_ptr, at, here)
        if not GATED:
            y = _affine(x, mean[None, :], factor[None, :], bias[None, :], x_ptr.dtype.element_ty)
            grad = _between(grad, y, below, above)
        out = (grad - shift[None, :] - (x - mean[None, :]) * slope[None, :]) * factor[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=here)


# --- launches


class Pass(Plan):
    """A plan in which programs share x, ``parts`` of ``chunk`` rows each in tiles of (rows, channels).

    Args:
        x: ``(N, C, *)``.
        kernel: whose last constants are ``stages`` and a tile's rows and channels.
        constants: those before, less how many parts are added up at once.
        adds: it sums over rows, and adds its parts up.
        tile, waves, stages: as of ``_WRITES``.
        registers: the most of a thread.
    """

    def __init__(
        self, x: Tensor, kernel: Any, constants: tuple[Any, ...], adds: bool, tile: int, waves: int, stages: int,
        registers: int | None = None,
    ) -> None:  # fmt: skip
        self.channels = x.shape[1]
        self.rows = x.shape[0] * math.prod(x.shape[2:])
        widest = max(_SUMMED, triton.next_power_of_2(-(-self.channels // plain.BLOCKS))) if adds else _WRITTEN
        wide = min(triton.next_power_of_2(self.channels), widest)
        height = max(tile // wide, 1)
        blocks = -(-self.channels // wide)
        most = max(1, processors(x) * waves // blocks)
        steps = -(-self.rows // height)
        self.chunk = -(-steps // most) * height
        self.parts = -(-self.rows // self.chunk)
        if adds:
            constants = (*constants, min(max(_ADDED // wide, 1), triton.next_power_of_2(self.parts)))
        options = {"maxnreg": registers} if registers else {}
        self.programs = self.parts * blocks
        super().__init__(kernel, (*constants, stages, height, wide), num_warps=_WARPS, **options)


class Norm:
    """The forward's launches, bound to all but x.

    Args:
        x: of the dtype and on the device of all that are given later.
        others: as of ``plain_kernels.norm_activation``. The running statistics learn. Where it ``observes``, the range of the
            batch is taken: the state learns it, or it is kept.
    """

    def __init__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
        batches: Tensor | None, momentum: float, eps: float, scale: Tensor, zero_point: Tensor, min_val: Tensor,
        max_val: Tensor, scratch: Tensor, observes: bool, learns: bool, low: float | None, high: float | None,
        constant: float | None, *grid: Any,
    ) -> None:  # fmt: skip
        # for what there is not, an address at which nothing is read
        self.affine = scale if weight is None else weight, scale if bias is None else bias
        counted = scale if batches is None else batches
        self.held = Held(*self.affine, running_mean, running_var, counted, scale, zero_point, min_val, max_val, scratch)
        self._affine = Held(*self.affine)
        self._ends = float(plain.held(low, x.dtype) or 0), float(plain.held(high, x.dtype) or 0)
        self._numbers = (momentum, eps, *self._ends, float(constant or 0))  # of an integer Triton may make a constant
        self._flags = (weight is not None, batches is not None, observes, learns, low is not None, high is not None)
        self._grid, self._min_max = grid, constant is None
        kinds = (x.dtype, *(t.dtype for t in (*self.affine, running_mean, running_var)))
        self._key = ("norm", x.get_device(), kinds, self._flags, self._min_max, grid)
        self._plans: dict[Any, Any] = {}

    def kept(self, x: Tensor) -> Tensor:
        """What later passes read."""
        stream = stream_of(x)
        if stream is None:
            with torch.cuda.device(x.device):
                return self.kept(x)
        return self.statistics(x, stream)[0]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result, which lies in memory as x does, and what later passes read."""
        stream = stream_of(x)
        if stream is None:
            with torch.cuda.device(x.device):
                return self(x)
        kept, writes = self.statistics(x, stream)
        out = torch.empty_like(x)
        numbers = (writes.rows, writes.chunk, writes.channels, *self._ends)
        writes.launch(stream, writes.programs, (x, out, kept), numbers, self._affine)
        return out, kept

    def statistics(self, x: Tensor, stream: int) -> tuple[Tensor, Pass]:
        """What later passes read, on a stream of x's device, which is the current one; and the pass that writes the result."""
        at = x.shape, address(x) & 15
        sums, writes, of_parts, of_kept, numbers = self._plans.get(at) or self._plan(x, at)
        part, kept = empty(x, of_parts, (1,), torch.float32), empty(x, of_kept, (1,), torch.float32)
        sums.launch(stream, sums.programs, (x, part, kept), numbers, self.held)
        return kept, writes

    def _plan(self, x: Tensor, at: tuple[Any, ...]) -> Any:
        flags, grid = self._flags, self._grid
        sums, writes = planned((self._key, at)) or remember(
            (self._key, at),
            (
                Pass(x, _norm_statistics, (*flags, *grid, self._min_max), True, *_FORWARD_SUMS),
                Pass(x, _norm_forward, (flags[0], *flags[4:], *grid[:2], not _interprets()), False, *_WRITES),
            ),
        )
        channels = sums.channels
        sizes = (4 * sums.parts * channels,), (plain.KEPT + 2 * channels,)
        plan = self._plans[at] = (sums, writes, *sizes, (sums.rows, sums.chunk, sums.parts, channels, *self._numbers))
        return plan


def backward(
    grad: Tensor, x: Tensor, out: Tensor | None, found: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor,
    used: Tensor | None = None, hard: bool = False, quant_min: int = 0, quant_max: int = 0,
) -> None:  # fmt: skip
    """Launch: ``found``, of the gradient that passes, for each channel, the sum and that of its product with the normalised x;
    and where it is asked for ``out``, the gradient of x. ``grad``, ``x`` and ``out`` lie in memory alike. With what a
    gate's forward ``used`` the gradient passes its gate."""
    stream = stream_of(x)
    if stream is None:
        with torch.cuda.device(x.device):
            backward(grad, x, out, found, weight, bias, kept, used, hard, quant_min, quant_max)
        return
    first, second = kept if weight is None else weight, kept if bias is None else bias
    flags = (weight is not None, used is not None, hard, quant_min, quant_max)
    aligned = (x.data_ptr() & 15, grad.data_ptr() & 15)
    key = ("norm's gradient", x.shape, x.get_device(), aligned, x.dtype, grad.dtype, first.dtype, second.dtype, flags)
    sums, writes = planned(key) or remember(
        key,
        (
            Pass(x, _norm_sums, (*flags, not _interprets()), True, *(_BACKWARD_SUMS if used is None else _GATED_SUMS)),
            Pass(x, _norm_backward, flags[:2], False, *_WRITES),
        ),
    )
    channels = sums.channels
    part = empty(x, (2 * sums.parts * channels,), (1,), torch.float32)
    passed, more = grad, kept
    if used is not None:  # the sums write what passes the gate
        passed, more = torch.empty_like(grad) if out is None else out, used
    sums.launch(
        stream, sums.programs, (x, grad, passed, part, found, first, second, kept, more),
        (sums.rows, sums.chunk, sums.parts, channels),
    )
    if out is not None:
        tensors = (x, passed, out, found, first, second, kept)
        writes.launch(stream, writes.programs, tensors, (writes.rows, writes.chunk, channels))
