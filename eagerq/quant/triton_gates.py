"""Triton kernels of SiLU and Hardswish in quantized steps, with their three quantizers, and of the gradient.

Behind the first quantizer all is a function of its code. Where there is a range, each program tabulates it and looks values up;
until there is one, all is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagerq.quant import plain_kernels as plain
from eagerq.quant.layout import dense
from eagerq.quant.memory import Held, empty
from eagerq.quant.triton_kernels import (
    UNITS,
    _clamp,
    _coded,
    _give,
    _interprets,
    _learn,
    _load,
    _passing,
    _raised,
    _seen,
    _state,
    _store,
)
from eagerq.quant.triton_launch import Over

#: The tables of a gate in what its forward keeps: entries of each, and where they begin.
CODES = tl.constexpr(plain.CODES)
RESULTS = tl.constexpr(plain.RESULTS)
SLOPES = tl.constexpr(plain.SLOPES)
PRODUCTS = tl.constexpr(plain.PRODUCTS)
#: Where in what its forward keeps the two values begin between which the first quantizer passes the gradient.
LIMITS = tl.constexpr(plain.NUMBERS)
#: Where in a table NaN is, and what it is there.
LAST = tl.constexpr(plain.ENTRIES - 1)
NOT_A_NUMBER = tl.constexpr(0x7FFF7FFF)
#: In place of a slope, where the last quantizer clips: a NaN that arithmetic does not give.
CLIPPED = tl.constexpr(0x7FC00001)

#: Values of one program's step, its warps, and programs for each multiprocessor, forward, where they make tables, and backward.
_BLOCK = 1024
_WARPS = 4
_WAVES = 5
_BACKWARD_WAVES = 10

#: Pointers to one value or a few, whose alignment is no matter.
_SMALL = tuple(f"{of}{name}_ptr" for of in ("", "g_", "y_") for name in ("scale", "zero", "least", "greatest", "scratch"))


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
def _by(state):
    """What a quantizer of this state computes with: scale, its inverse, zero point and whether there is a range."""
    scale, zero, _least, _greatest, known = state
    return scale, tl.math.div_rn(1.0, scale), zero, known


@triton.jit
def _note(used_ptr, by):
    tl.store(used_ptr, by[0])
    tl.store(used_ptr + 1, by[2])
    tl.store(used_ptr + 2, by[3].to(tl.float32))


@triton.jit
def _used(used_ptr, by, g_by, y_by, below, above):
    """What a backward computes with; between ``below`` and ``above`` the first quantizer passes the gradient."""
    tl.store(used_ptr + LIMITS, below)
    tl.store(used_ptr + LIMITS + 1, above)
    _note(used_ptr, by)
    _note(used_ptr + 3, g_by)
    _note(used_ptr + 6, y_by)


@triton.jit
def _quantized(
    x, by, QMIN: tl.constexpr, QMAX: tl.constexpr, FUSED: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Real values of codes, rounded as the quantizer's own tensor is, and where the gradient passes; ``by`` is of ``_by``."""
    q, inside = _coded(x, by[0], by[1], QMIN - by[2], QMAX - by[2], FUSED)
    return tl.where(by[3], q * by[0], x).to(KIND).to(tl.float32), inside | (by[3] == 0)


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
def _gates_slope(a, fine, HARD: tl.constexpr):
    """The gate's derivative by its quantized input."""
    if HARD:
        slope = tl.where((a > -3.0) & (a < 3.0), 1.0 / 6.0, 0.0)
    else:
        slope = fine * (1.0 - fine)
    return slope


@triton.jit
def _slope(a, fine, b, gate_passes, HARD: tl.constexpr):
    """The derivative of the product by its quantized input."""
    return b + tl.where(gate_passes, a * _gates_slope(a, fine, HARD), 0.0)


@triton.jit
def _in_use(used_ptr):
    """``_by`` of what a forward kept for its backward."""
    scale = tl.load(used_ptr)
    return scale, tl.math.div_rn(1.0, scale), tl.load(used_ptr + 1), tl.load(used_ptr + 2) != 0.0


@triton.jit
def _first_in_use(used_ptr):
    """``_in_use`` of the first quantizer, and between which values it passes the gradient."""
    scale, inverse, zero, known = _in_use(used_ptr)
    return scale, inverse, zero, known, tl.load(used_ptr + LIMITS), tl.load(used_ptr + LIMITS + 1)


@triton.jit
def _tabulate(
    used_ptr, by, g_by, y_by, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, FUSED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Behind the first quantizer all is a function of a code: the tables of it. Each program writes the same and reads its own.

    Of each code the result and the product before its quantizer, together in one word where they are of 16 bits, and the slope.
    As a float32 such a word lies between others as its product does.
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
        tl.store((used_ptr + PRODUCTS).to(tl.pointer_type(tl.int32)) + LAST, NOT_A_NUMBER)
    tl.store((used_ptr + RESULTS).to(tl.pointer_type(tl.int32)) + LAST, NOT_A_NUMBER)
    slope = _slope(a, fine, b, gate_passes, HARD).to(tl.int32, bitcast=True)
    tl.store((used_ptr + SLOPES).to(tl.pointer_type(tl.int32)) + code, tl.where(y_passes, slope, CLIPPED))
    tl.debug_barrier()


@triton.jit
def _entry(raised, zero, QMIN: tl.constexpr, FUSED: tl.constexpr):
    """Where in a table the code is that ``_raised`` gives; of NaN, all of whose bits are set on a GPU, ``LAST``, or anywhere."""
    at = (raised + (zero - QMIN)).to(tl.int32, bitcast=True)
    return at & (LAST if FUSED else CODES - 1)


@triton.jit
def _looked_up(table_ptr, raised, at, FUSED: tl.constexpr):
    found = tl.load(table_ptr + at)
    return found if FUSED else tl.where(raised == raised, found, tl.load(table_ptr + LAST))


@triton.jit
def _gated(
    x, used_ptr, by, g_by, y_by, LOOKS_UP: tl.constexpr, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    FUSED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """SiLU or Hardswish in quantized steps: result as it is stored, product, and the gate; of a table, what they rise with."""
    if LOOKS_UP:
        raised = _raised(_clamp(x, (QMIN - by[2]) * by[0], (QMAX - by[2]) * by[0]), by[0], by[1], FUSED)
        at = _entry(raised, by[2], QMIN, FUSED)
        if KIND.primitive_bitwidth == 16:
            word = _looked_up((used_ptr + RESULTS).to(tl.pointer_type(tl.uint32)), raised, at, FUSED)
            return (word & 0xFFFF).to(tl.uint16).to(KIND, bitcast=True), word.to(tl.float32, bitcast=True), raised
        else:  # noqa: RET505  # Triton wants one type of what is returned, unless a constant leaves the other out
            out = _looked_up(used_ptr + RESULTS, raised, at, FUSED)
            return out, _looked_up(used_ptr + PRODUCTS, raised, at, FUSED), raised
    else:
        _a, _fine, gate, _b, y, _passes, _gate_passes = _through_gate(x, by, g_by, HARD, QMIN, QMAX, FUSED, KIND)
        out, _y_passes = _quantized(y, y_by, QMIN, QMAX, FUSED, KIND)
        return out.to(KIND), y, gate


@triton.jit
def _gate_of(raised, by, LOOKS_UP: tl.constexpr, HARD: tl.constexpr, FUSED: tl.constexpr, KIND: tl.constexpr):
    """The gate of what ``_gated`` gives."""
    if LOOKS_UP:
        return _gate(((raised - UNITS) * by[0]).to(KIND).to(tl.float32), HARD, FUSED).to(KIND).to(tl.float32)
    else:  # noqa: RET505
        return raised


@triton.jit
def _product_of(y, LOOKS_UP: tl.constexpr, KIND: tl.constexpr):
    """The product of what ``_gated`` gives."""
    if LOOKS_UP and KIND.primitive_bitwidth == 16:
        return (y.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(KIND, bitcast=True).to(tl.float32)
    else:  # noqa: RET505
        return y


@triton.jit
def _gated_gradient(
    grad, x, used_ptr, by, g_by, y_by, LOOKS_UP: tl.constexpr, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    FUSED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    if LOOKS_UP:
        raised = _raised(_clamp(x, (QMIN - by[2]) * by[0], (QMAX - by[2]) * by[0]), by[0], by[1], FUSED)
        slope = tl.load((used_ptr + SLOPES).to(tl.pointer_type(tl.int32)) + _entry(raised, by[2], QMIN, FUSED))
        inside = (x > by[4]) & (x < by[5])
        return tl.where(inside & (slope != CLIPPED), grad * slope.to(tl.float32, bitcast=True), 0.0)
    else:  # noqa: RET505
        a, fine, _gate, b, y, passes, gate_passes = _through_gate(x, by, g_by, HARD, QMIN, QMAX, FUSED, KIND)
        _out, y_passes = _quantized(y, y_by, QMIN, QMAX, FUSED, KIND)
        return tl.where(passes & y_passes, grad * _slope(a, fine, b, gate_passes, HARD), 0.0)


@triton.jit
def _learn_both(
    scratch, at, state, constant, QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, MIN_MAX: tl.constexpr,
):  # fmt: skip
    """``_learn`` of two quantizers."""
    for i in tl.static_range(2):
        _learn(
            scratch[i], at[i], state[i], constant, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO, MIN_MAX
        )  # fmt: skip


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
    g_high = _gate_of(g_high, by, LOOKS_UP, HARD, FUSED, kind)
    return low, high, g_low, g_high, _product_of(y_low, LOOKS_UP, kind), _product_of(y_high, LOOKS_UP, kind)


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
    quantizer = scale_ptr, zero_ptr, least_ptr, greatest_ptr
    of_gate = g_scale_ptr, g_zero_ptr, g_least_ptr, g_greatest_ptr
    of_y = y_scale_ptr, y_zero_ptr, y_least_ptr, y_greatest_ptr
    state = _state(quantizer)
    g_state = _state(of_gate)
    y_state = _state(of_y)
    by = _by(state)
    g_by = _by(g_state)
    y_by = _by(y_state)
    if program == 0:
        below, above = _passing(by[0], by[2], by[3], 0.0, 0.0, False, False, QMIN, QMAX)
        _used(used_ptr, by, g_by, y_by, below, above)
    if by[3] & (QMAX - QMIN < CODES):
        _tabulate(used_ptr, by, g_by, y_by, HARD, QMIN, QMAX, FUSED, x_ptr.dtype.element_ty)
        low, high, g_low, g_high, y_low, y_high = _gated_values(
            x_ptr, out_ptr, used_ptr, program, n, by, g_by, y_by, True, HARD, QMIN, QMAX, EVEN, FUSED, BLOCK
        )  # fmt: skip
    else:
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
                scratch_ptr, quantizer, state, constant, QMIN, QMAX, LEVELS, FIXED_ZERO, SYMMETRIC, POWER_OF_TWO, MIN_MAX
            )  # fmt: skip
            _learn_both(
                (g_scratch_ptr, y_scratch_ptr), (of_gate, of_y), (g_state, y_state), constant, QMIN, QMAX, LEVELS, FIXED_ZERO,
                SYMMETRIC, POWER_OF_TWO, MIN_MAX,
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
    by = _first_in_use(used_ptr)
    g_by = _in_use(used_ptr + 3)
    y_by = _in_use(used_ptr + 6)
    if by[3] & (QMAX - QMIN < CODES):
        _gated_gradients(
            grad_ptr, x_ptr, out_ptr, used_ptr, program, n, by, g_by, y_by, True, HARD, QMIN, QMAX, EVEN, FUSED, BLOCK
        )  # fmt: skip
    else:
        _gated_gradients(
            grad_ptr, x_ptr, out_ptr, used_ptr, program, n, by, g_by, y_by, False, HARD, QMIN, QMAX, EVEN, FUSED, BLOCK
        )  # fmt: skip


# --- launches


@functools.cache
def _forwards(*before: Any) -> Over:
    return Over(_gated_forward, before, (not _interprets(), _BLOCK), _BLOCK, _WAVES, _WARPS)


@functools.cache
def _backwards(*before: Any) -> Over:
    return Over(_gated_backward, before, (not _interprets(), _BLOCK), _BLOCK, _BACKWARD_WAVES, _WARPS)


class Steps:
    """The launch of a function in quantized steps, bound to all but x; arguments as of ``plain_kernels.gated``."""

    #: Launches of the kernel by its constants, and how many numbers its backward needs.
    forwards: Callable[..., Over]
    used: int

    def __init__(
        self, x: Tensor, state: list[Tensor], scratch: list[Tensor], hard: bool, constant: float | None, *grid: Any
    ) -> None:
        self._launch = self.forwards(hard, bool(scratch), *grid, constant is None)
        # without scratch memory an address at which nothing is read
        self.held, self._scalars = Held(*(scratch or state[::4]), *state), (float(constant or 0),)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result, which lies in memory as ``x`` does, and what its backward needs; with ``scratch`` the state learns."""
        x = dense(x)
        out, used = torch.empty_like(x), plain.used_of(x, self.used, empty)
        self._launch((x, out, used), self._scalars, self.held)
        return out, used


class Gated(Steps):
    """SiLU or Hardswish."""

    forwards, used = staticmethod(_forwards), plain.USED


def backward(grad: Tensor, x: Tensor, out: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> None:
    """Launch: the gradient of the forward; all lie in memory alike."""
    _backwards(hard, quant_min, quant_max)((grad, x, out, used))
