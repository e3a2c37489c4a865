"""Triton kernels of a sigmoid or hard sigmoid over codes, with its two quantizers, and of the gradient.

Where such a sigmoid stands tensors are small, so all is computed and nothing looked up.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from eagerq.quant import plain_kernels as plain
from eagerq.quant.triton_gates import Steps, _by, _gate, _gates_slope, _in_use, _learn_both, _note, _quantized
from eagerq.quant.triton_kernels import _give, _interprets, _load, _seen, _state, _store
from eagerq.quant.triton_launch import Over

#: Values of one program's step, its warps, and programs for each multiprocessor.
_BLOCK = 1024
_WARPS = 4
_WAVES = 5

#: Pointers to one value or a few, whose alignment is no matter.
_SMALL = tuple(f"{of}{name}_ptr" for of in ("", "y_") for name in ("scale", "zero", "least", "greatest", "scratch"))


@triton.jit
def _through_sigmoid(
    x, by, y_by, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, FUSED: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Of a sigmoid over codes: input, sigmoid before and after it is rounded, result; and where the gradient passes."""
    a, passes = _quantized(x, by, QMIN, QMAX, FUSED, KIND)
    fine = _gate(a, HARD, FUSED)
    y = fine.to(KIND).to(tl.float32)
    out, y_passes = _quantized(y, y_by, QMIN, QMAX, FUSED, KIND)
    return a, fine, y, out, passes & y_passes


@triton.jit(do_not_specialize_on_alignment=["used_ptr", *_SMALL])
def _sigmoid_forward(
    x_ptr, out_ptr, used_ptr, scratch_ptr, y_scratch_ptr, scale_ptr, zero_ptr, least_ptr, greatest_ptr,
    y_scale_ptr, y_zero_ptr, y_least_ptr, y_greatest_ptr, n, constant, HARD: tl.constexpr, OBSERVE: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, MIN_MAX: tl.constexpr,
    EVEN: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    quantizer = scale_ptr, zero_ptr, least_ptr, greatest_ptr
    of_y = y_scale_ptr, y_zero_ptr, y_least_ptr, y_greatest_ptr
    state = _state(quantizer)
    y_state = _state(of_y)
    by = _by(state)
    y_by = _by(y_state)
    if program == 0:
        _note(used_ptr, by)
        _note(used_ptr + 3, y_by)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    y_low = low
    y_high = high
    start = program.to(tl.int64) * BLOCK
    for _ in range(program, tl.cdiv(n, BLOCK), programs):
        x = _load(x_ptr, lanes, start, n, EVEN)
        _a, _fine, y, out, _passes = _through_sigmoid(x, by, y_by, HARD, QMIN, QMAX, FUSED, x_ptr.dtype.element_ty)
        low, high = _seen(x, low, high)
        y_low, y_high = _seen(y, y_low, y_high)
        _store(out_ptr, lanes, start, n, out, EVEN)
        start += programs.to(tl.int64) * BLOCK
    if OBSERVE:
        _give(scratch_ptr, low, high)
        _give(y_scratch_ptr, y_low, y_high)
        tl.debug_barrier()
        if tl.atomic_add(scratch_ptr + 2, 1) == programs - 1:
            tl.atomic_xchg(scratch_ptr + 2, 0)
            _learn_both(
                (scratch_ptr, y_scratch_ptr), (quantizer, of_y), (state, y_state), constant, QMIN, QMAX, LEVELS, FIXED_ZERO,
                SYMMETRIC, POWER_OF_TWO, MIN_MAX,
            )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["used_ptr"])
def _sigmoid_backward(
    grad_ptr, x_ptr, out_ptr, used_ptr, n, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    EVEN: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    by = _in_use(used_ptr)
    y_by = _in_use(used_ptr + 3)
    start = program.to(tl.int64) * BLOCK
    for _ in range(program, tl.cdiv(n, BLOCK), programs):
        x = _load(x_ptr, lanes, start, n, EVEN)
        grad = _load(grad_ptr, lanes, start, n, EVEN)
        a, fine, _y, _out, passes = _through_sigmoid(x, by, y_by, HARD, QMIN, QMAX, FUSED, x_ptr.dtype.element_ty)
        _store(out_ptr, lanes, start, n, tl.where(passes, grad * _gates_slope(a, fine, HARD), 0.0), EVEN)
        start += programs.to(tl.int64) * BLOCK


# --- launches


@functools.cache
def _forwards(*before: Any) -> Over:
    return Over(_sigmoid_forward, before, (not _interprets(), _BLOCK), _BLOCK, _WAVES, _WARPS)


@functools.cache
def _backwards(*before: Any) -> Over:
    return Over(_sigmoid_backward, before, (not _interprets(), _BLOCK), _BLOCK, _WAVES, _WARPS)


class Sigmoid(Steps):
    """Arguments as of ``plain_kernels.sigmoid``."""

    forwards, used = staticmethod(_forwards), plain.SIGMOID_USED


def backward(grad: Tensor, x: Tensor, out: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> None:
    """Launch: the gradient of the forward; all lie in memory alike."""
    _backwards(hard, quant_min, quant_max)((grad, x, out, used))
