"""Triton kernels of a batch norm in training with what follows it: activation, observation and fake quantization.

Forward: a pass over x finds each channel's mean, squares about it, least and greatest value; a small launch makes of them the
statistics and, since a norm is monotone in each channel, the ends of its output, from which the quantizer learns; a second pass
writes the result. Backward: a pass sums the gradient, a small launch adds the sums, a second pass writes the gradient of x. Both
backward passes find again from x where the gradient passes, so nothing but x is kept.

Values lie as rows of channels (channels last) or, with LENGTH values of a channel side by side, as contiguous tensors do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagerq.quant import plain_kernels as plain
from eagerq.quant.functional import Bounds
from eagerq.quant.spec import Grid
from eagerq.quant.triton_kernels import (
    _code,
    _give,
    _interprets,
    _learn,
    _processors,
    _round,
    _seen,
    _value,
    address,
    device_of,
)

#: Values of one program's step and programs for each multiprocessor, which share the rows: of passes that sum, and that write.
_FORWARD_SUMS = (2048, 4)
_BACKWARD_SUMS = (4096, 2)
_WRITES = (4096, 12)
#: Most channels of a step.
_WIDE = 64
_WARPS = 8
#: Where in what a forward keeps mean and inverse deviation of each channel begin.
KEPT = tl.constexpr(plain.KEPT)
#: Channels of one program of a small launch, and the parts of a sum that it reads at once.
_FEW = 16
_PARTS = 256

_SMALL = [
    f"{name}_ptr"
    for name in (
        "part", "weight", "bias", "kept", "running_mean", "running_var", "batches", "scale", "zero", "least", "greatest",
        "scratch", "grad_weight", "grad_bias",
    )
]  # fmt: skip
_INTEGERS = ["rows", "chunk", "length", "parts"]


@triton.jit
def _place(pid, channels, BC: tl.constexpr):
    """Which rows' part and which channels a program has; neighbours share rows."""
    blocks = tl.cdiv(channels, BC)
    return pid // blocks, (pid % blocks) * BC + tl.arange(0, BC)


@triton.jit
def _offsets(row, column, channels, length, LAST: tl.constexpr):
    """Where values lie: 64 bits wide."""
    if LAST:
        return row.to(tl.int64)[:, None] * channels + column[None, :]
    image = row // length
    return (row + image.to(tl.int64) * (channels - 1) * length)[:, None] + column.to(tl.int64)[None, :] * length


@triton.jit
def _values(ptr, at, here):
    """float32 values; nothing is read elsewhere."""
    return tl.load(ptr + at, mask=here, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _norm_sums(
    x_ptr, part_ptr, rows, chunk, length, parts, channels, LAST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Of a part of the rows, for each channel: mean, squares about it, least and greatest value."""
    part, column = _place(tl.program_id(0), channels, BC)
    inside = column < channels
    first = part * chunk
    end = tl.minimum(first + chunk, rows)
    lanes = tl.arange(0, BR)
    row = first + lanes
    x = _values(x_ptr, _offsets(row, column, channels, length, LAST), (row < end)[:, None] & inside[None, :])
    near = tl.sum(x, axis=0) / tl.minimum(end - first, BR)  # values less one near their mean have sums without cancellation
    total = tl.zeros((BR, BC), tl.float32)
    squares = tl.zeros((BR, BC), tl.float32)
    low = tl.full((BR, BC), float("inf"), tl.float32)
    high = tl.full((BR, BC), float("-inf"), tl.float32)
    for start in range(first, end, BR):
        row = start + lanes
        within = (row < end)[:, None]
        x = _values(x_ptr, _offsets(row, column, channels, length, LAST), within & inside[None, :])
        new_low, new_high = _seen(x, low, high)
        low = tl.where(within, new_low, low)
        high = tl.where(within, new_high, high)
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
    tl.store(at + 2 * step, tl.min(tl.where(low != low, float("-inf"), low), axis=0), mask=inside)
    tl.store(at + 3 * step, tl.max(tl.where(high != high, float("inf"), high), axis=0), mask=inside)


@triton.jit
def _affine(x, mean, factor, bias, KIND: tl.constexpr):
    """The norm's output, rounded as its own tensor is: monotone in x."""
    return ((x - mean) * factor + bias).to(KIND).to(tl.float32)


@triton.jit
def _bounded(a, low, high, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr):
    if HAS_LOW:
        a = tl.maximum(a, low, propagate_nan=tl.PropagateNan.ALL)
    if HAS_HIGH:
        a = tl.minimum(a, high, propagate_nan=tl.PropagateNan.ALL)
    return a


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


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _norm_finish(
    x_ptr, part_ptr, kept_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr, scale_ptr, zero_ptr,
    least_ptr, greatest_ptr, scratch_ptr, rows, chunk, parts, channels, momentum, eps, low, high, constant,
    AFFINE: tl.constexpr, TRACKS: tl.constexpr, OBSERVE: tl.constexpr, LEARN: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, MIN_MAX: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Statistics of the parts, running statistics, and what the quantizer learns."""
    pid = tl.program_id(0)
    scale = tl.load(scale_ptr)
    zero = tl.load(zero_ptr).to(tl.float32)
    least = tl.load(least_ptr)
    greatest = tl.load(greatest_ptr)
    if pid == 0:
        slot = tl.arange(0, KEPT)
        known = ((least != 0.0) | (greatest != 0.0)).to(tl.float32)
        below = tl.where(known != 0.0, _last_clipped(scale, QMIN - zero, -1.0), float("-inf"))
        above = tl.where(known != 0.0, _last_clipped(scale, QMAX - zero, 1.0), float("inf"))
        if HAS_LOW:
            below = tl.maximum(below, low)
        if HAS_HIGH:
            above = tl.minimum(above, high)
        used = tl.where(slot == 0, scale, tl.where(slot == 1, zero, tl.where(slot == 2, known, 0.0)))
        tl.store(kept_ptr + slot, tl.where(slot == 6, below, tl.where(slot == 7, above, used)))
        if TRACKS:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    column = pid * BC + tl.arange(0, BC)
    inside = column < channels
    lanes = tl.arange(0, BP)
    step = parts.to(tl.int64) * channels
    total = tl.zeros((BP, BC), tl.float32)
    for start in range(0, parts, BP):
        part = start + lanes
        at = part.to(tl.int64)[:, None] * channels + column[None, :]
        count = tl.minimum(chunk, rows - part * chunk).to(tl.float32)
        total += _values(part_ptr, at, (part < parts)[:, None] & inside[None, :]) * count[:, None]
    n = rows.to(tl.float32)
    mean = tl.sum(total, axis=0) / n
    squares = tl.zeros((BP, BC), tl.float32)
    seen_low = tl.full((BP, BC), float("inf"), tl.float32)
    seen_high = tl.full((BP, BC), float("-inf"), tl.float32)
    for start in range(0, parts, BP):
        part = start + lanes
        at = part.to(tl.int64)[:, None] * channels + column[None, :]
        here = (part < parts)[:, None] & inside[None, :]
        count = tl.minimum(chunk, rows - part * chunk).to(tl.float32)
        away = _values(part_ptr, at, here) - mean[None, :]
        squares += tl.where(here, _values(part_ptr, at + step, here) + count[:, None] * (away * away), 0.0)
        seen_low = tl.minimum(seen_low, tl.load(part_ptr + at + 2 * step, mask=here, other=float("inf")))
        seen_high = tl.maximum(seen_high, tl.load(part_ptr + at + 3 * step, mask=here, other=float("-inf")))
    deviation = tl.sum(squares, axis=0)
    inverse = tl.math.div_rn(1.0, tl.sqrt_rn(deviation / n + eps))
    tl.store(kept_ptr + KEPT + column, mean, mask=inside)
    tl.store(kept_ptr + KEPT + channels + column, inverse, mask=inside)
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
        first = tl.sum(tl.where(tl.arange(0, BC) == 0, one_low, 0.0), axis=0)
        _give(scratch_ptr, tl.where(inside, one_low, first), tl.where(inside, one_high, first))
        tl.debug_barrier()
        if tl.atomic_add(scratch_ptr + 2, 1) == tl.num_programs(0) - 1:
            tl.atomic_xchg(scratch_ptr + 2, 0)
            if LEARN:
                _learn(
                    scratch_ptr, scale_ptr, zero_ptr, least_ptr, greatest_ptr, scale, zero, least, greatest,
                    constant, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO, MIN_MAX,
                )  # fmt: skip
            else:
                tl.store(kept_ptr + 4, -_value(tl.atomic_xchg(scratch_ptr, 0, sem="relaxed").to(tl.uint32, bitcast=True)))
                tl.store(kept_ptr + 5, _value(tl.atomic_xchg(scratch_ptr + 1, 0, sem="relaxed").to(tl.uint32, bitcast=True)))


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _norm_forward(
    x_ptr, out_ptr, weight_ptr, bias_ptr, kept_ptr, rows, chunk, length, channels, low, high,
    AFFINE: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, QMIN: tl.constexpr,
    QMAX: tl.constexpr, FUSED: tl.constexpr, LAST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
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
    for start in range(first, end, BR):
        row = start + lanes
        at = _offsets(row, column, channels, length, LAST)
        here = (row < end)[:, None] & inside[None, :]
        x = _values(x_ptr, at, here)
        y = _affine(x, mean[None, :], factor[None, :], bias[None, :], x_ptr.dtype.element_ty)
        a = _bounded(y, low, high, HAS_LOW, HAS_HIGH)
        q, _inside = _code(a, scale, reciprocal, QMIN - zero, QMAX - zero, FUSED)
        tl.store(out_ptr + at, tl.where(known, q * scale, a).to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _passed(grad, x, mean, factor, bias, below, above, KIND: tl.constexpr):
    """The gradient where neither clamp nor clip held the value."""
    y = _affine(x, mean, factor, bias, KIND)
    return tl.where((y > below) & (y < above), grad, 0.0)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _norm_backward_sums(
    x_ptr, grad_ptr, part_ptr, weight_ptr, bias_ptr, kept_ptr, rows, chunk, length, parts, channels,
    AFFINE: tl.constexpr, LAST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of a part of the rows, for each channel: the sum of the gradient, and of its product with the normalised x."""
    part, column = _place(tl.program_id(0), channels, BC)
    inside = column < channels
    below = tl.load(kept_ptr + 6)
    above = tl.load(kept_ptr + 7)
    mean, inverse, factor, bias = _statistics(kept_ptr, weight_ptr, bias_ptr, channels, column, inside, AFFINE)
    first = part * chunk
    end = tl.minimum(first + chunk, rows)
    lanes = tl.arange(0, BR)
    total = tl.zeros((BR, BC), tl.float32)
    products = tl.zeros((BR, BC), tl.float32)
    for start in range(first, end, BR):
        row = start + lanes
        at = _offsets(row, column, channels, length, LAST)
        here = (row < end)[:, None] & inside[None, :]
        x = _values(x_ptr, at, here)
        grad = _values(grad_ptr, at, here)
        kind: tl.constexpr = x_ptr.dtype.element_ty
        grad = _passed(grad, x, mean[None, :], factor[None, :], bias[None, :], below, above, kind)
        total += grad
        products += grad * (x - mean[None, :])
    at = part_ptr + part.to(tl.int64) * channels + column
    tl.store(at, tl.sum(total, axis=0), mask=inside)
    tl.store(at + parts.to(tl.int64) * channels, tl.sum(products, axis=0) * inverse, mask=inside)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _norm_backward_finish(
    part_ptr, grad_weight_ptr, grad_bias_ptr, parts, channels, AFFINE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = column < channels
    lanes = tl.arange(0, BP)
    total = tl.zeros((BP, BC), tl.float32)
    products = tl.zeros((BP, BC), tl.float32)
    for start in range(0, parts, BP):
        part = start + lanes
        here = (part < parts)[:, None] & inside[None, :]
        at = part.to(tl.int64)[:, None] * channels + column[None, :]
        total += _values(part_ptr, at, here)
        products += _values(part_ptr, at + parts.to(tl.int64) * channels, here)
    all_of_it = tl.sum(total, axis=0)
    all_products = tl.sum(products, axis=0)
    sum_ptr = part_ptr + 2 * parts.to(tl.int64) * channels
    tl.store(sum_ptr + column, all_of_it, mask=inside)
    tl.store(sum_ptr + channels + column, all_products, mask=inside)
    if AFFINE:
        tl.store(grad_bias_ptr + column, all_of_it.to(grad_bias_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_weight_ptr + column, all_products.to(grad_weight_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _norm_backward(
    x_ptr, grad_ptr, out_ptr, part_ptr, weight_ptr, bias_ptr, kept_ptr, rows, chunk, length, parts, channels,
    AFFINE: tl.constexpr, LAST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part, column = _place(tl.program_id(0), channels, BC)
    inside = column < channels
    below = tl.load(kept_ptr + 6)
    above = tl.load(kept_ptr + 7)
    mean, inverse, factor, bias = _statistics(kept_ptr, weight_ptr, bias_ptr, channels, column, inside, AFFINE)
    n = rows.to(tl.float32)
    sum_ptr = part_ptr + 2 * parts.to(tl.int64) * channels
    shift = _values(sum_ptr, column, inside) / n
    slope = _values(sum_ptr + channels, column, inside) / n * inverse
    first = part * chunk
    end = tl.minimum(first + chunk, rows)
    lanes = tl.arange(0, BR)
    for start in range(first, end, BR):
        row = start + lanes
        at = _offsets(row, column, channels, length, LAST)
        here = (row < end)[:, None] & inside[None, :]
        x = _values(x_ptr, at, here)
        grad = _values(grad_ptr, at, here)
        kind: tl.constexpr = x_ptr.dtype.element_ty
        grad = _passed(grad, x, mean[None, :], factor[None, :], bias[None, :], below, above, kind)
        out = (grad - shift[None, :] - (x - mean[None, :]) * slope[None, :]) * factor[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=here)


# --- launches


class _Plan:
    """How the programs of a pass share x, ``parts`` of ``chunk`` rows each in tiles of (rows, channels), and the kernels compiled
    for all that is as it was: a launch then looks nothing up."""

    def __init__(self, x: Tensor, tile: int, waves: int) -> None:
        self.channels = x.shape[1]
        self.length = math.prod(x.shape[2:])
        self.rows = x.shape[0] * self.length
        self.last = self.length == 1 or not x.is_contiguous()
        wide = min(_WIDE, triton.next_power_of_2(self.channels)) if self.last else 1
        self.tile = (tile // wide, wide)
        blocks = -(-self.channels // wide)
        most = max(1, _processors(x) * waves // blocks)
        steps = -(-self.rows // self.tile[0])
        self.chunk = -(-steps // most) * self.tile[0]
        self.parts = -(-self.rows // self.chunk)
        self.programs = self.parts * blocks
        self.few = -(-self.channels // _FEW)
        self.layout = (self.last, *self.tile)
        self.compiled: dict[Any, Any] = {}

    def launch(
        self, kernel: Any, programs: int, stream: int, tensors: tuple[Tensor, ...], scalars: tuple[float, ...],
        constants: tuple[Any, ...], warps: int,
    ) -> None:  # fmt: skip
        compiled = self.compiled.get(id(kernel))
        if compiled is None:
            made = kernel[(programs,)](*tensors, *scalars, *constants, num_warps=warps, enable_fp_fusion=False)
            self.compiled[id(kernel)] = made and (made.run, made.function, made.packed_metadata)
        else:
            run, function, metadata = compiled
            run(programs, 1, 1, stream, function, metadata, None, None, None, *map(address, tensors), *scalars, *constants)


_PLANS: dict[Any, tuple[_Plan, _Plan]] = {}
_MOST_PLANS = 4096


def _plans(x: Tensor, other: Tensor, sums: tuple[int, int], *key: Any) -> tuple[_Plan, _Plan]:
    """Of the pass that sums and the one that writes."""
    aligned = (x.data_ptr() & 15, other.data_ptr() & 15)
    key = (x.shape, x.is_contiguous(), x.dtype, other.dtype, x.get_device(), aligned, sums, key)
    plans = _PLANS.get(key)
    if plans is None:
        if len(_PLANS) >= _MOST_PLANS:  # of images of ever new sizes
            _PLANS.clear()
        _PLANS[key] = plans = _Plan(x, *sums), _Plan(x, *_WRITES)
    return plans


def forward(
    x: Tensor, out: Tensor, kept: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    batches: Tensor | None, momentum: float, eps: float, state: tuple[Tensor, ...], scratch: Tensor | None, learns: bool,
    bounds: Bounds, constant: float | None, grid: Grid,
) -> None:  # fmt: skip
    """Launch: ``out`` of ``x``, which lie in memory alike, and what their backward needs; with ``scratch`` the range of the
    batch is taken: the state learns it, or it is kept."""
    low, high = bounds
    key = (weight is not None, batches is not None, scratch is not None, learns, low is not None, high is not None)
    rest = (kept if weight is None else weight, kept if bias is None else bias)
    kinds = (rest[0].dtype, rest[1].dtype, running_mean.dtype, running_var.dtype, batches is not None and batches.dtype)
    with device_of(x) as stream:
        sums, writes = _plans(x, out, _FORWARD_SUMS, key, kinds, constant is None, grid)
        channels = sums.channels
        low, high = low or 0.0, high or 0.0
        part = torch.empty(4, sums.parts, channels, dtype=torch.float32, device=x.device)
        sums.launch(
            _norm_sums, sums.programs, stream, (x, part), (sums.rows, sums.chunk, sums.length, sums.parts, channels),
            sums.layout, _WARPS,
        )  # fmt: skip
        small = (running_mean, running_var, kept if batches is None else batches, *state, kept if scratch is None else scratch)
        sums.launch(
            _norm_finish, sums.few, stream, (x, part, kept, *rest, *small),
            (sums.rows, sums.chunk, sums.parts, channels, momentum, eps, low, high, float(constant or 0)),
            (*key, *grid, constant is None, _PARTS, _FEW), 4,
        )  # fmt: skip
        writes.launch(
            _norm_forward, writes.programs, stream,
            (x, out, *rest, kept), (writes.rows, writes.chunk, writes.length, channels, low, high),
            (key[0], *key[4:], grid.quant_min, grid.quant_max, not _interprets(), *writes.layout), _WARPS,
        )  # fmt: skip


def backward(
    grad: Tensor, x: Tensor, out: Tensor, grad_weight: Tensor, grad_bias: Tensor, weight: Tensor | None, bias: Tensor | None,
    kept: Tensor,
) -> None:  # fmt: skip
    """Launch: the gradients of ``forward``; ``grad``, ``x`` and ``out`` lie in memory alike."""
    affine = weight is not None
    rest = (kept if weight is None else weight, kept if bias is None else bias)
    with device_of(x) as stream:
        sums, writes = _plans(x, grad, _BACKWARD_SUMS, affine, rest[0].dtype, rest[1].dtype)
        channels = sums.channels
        part = torch.empty(2 * sums.parts + 2, channels, dtype=torch.float32, device=x.device)
        sums.launch(
            _norm_backward_sums, sums.programs, stream,
            (x, grad, part, *rest, kept), (sums.rows, sums.chunk, sums.length, sums.parts, channels),
            (affine, *sums.layout), _WARPS,
        )  # fmt: skip
        sums.launch(
            _norm_backward_finish, sums.few, stream, (part, grad_weight, grad_bias), (sums.parts, channels),
            (affine, _PARTS, _FEW), 4,
        )  # fmt: skip
        writes.launch(
            _norm_backward, writes.programs, stream,
            (x, grad, out, part, *rest, kept), (writes.rows, writes.chunk, writes.length, sums.parts, channels),
            (affine, *writes.layout), _WARPS,
        )  # fmt: skip
