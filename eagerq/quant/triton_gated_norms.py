"""Triton kernels of a batch norm in training and the SiLU or Hardswish behind it: the second pass of the forward.

The first is the norm's own; the backward is in ``triton_norms.py`` too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagerq.quant import plain_kernels as plain
from eagerq.quant.memory import Held, address, empty
from eagerq.quant.triton_gates import CODES, _by, _gate_of, _gated, _in_use, _learn_both, _product_of, _tabulate, _used
from eagerq.quant.triton_kernels import _give, _interprets, _seen, _state
from eagerq.quant.triton_launch import planned, remember, stream_of
from eagerq.quant.triton_norms import _INTEGERS, _SMALL, Norm, Pass, _affine, _in_a_row, _is_last, _statistics, _values

#: As ``triton_norms._GATED_SUMS``.
_WRITES = (2048, 3, 1, 80)
_POINTERS = [*_SMALL, *(f"{of}_{name}_ptr" for of in "gy" for name in ("scale", "zero", "least", "greatest", "scratch"))]


@triton.jit
def _gated_rows(
    x_ptr, out_ptr, used_ptr, part, line, column, rows, chunk, channels, mean, factor, bias, by, g_by, y_by,
    LOOKS_UP: tl.constexpr, HARD: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, FUSED: tl.constexpr,
    STAGES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A program's part of ``_norm_gated_forward``; the ends of what the quantizers of gate and product are given."""
    first = part * chunk
    end = tl.minimum(first + chunk, rows)
    inside = column < channels
    kind: tl.constexpr = x_ptr.dtype.element_ty
    g_low = tl.full((BR * BC,), float("inf"), tl.float32)
    g_high = tl.full((BR * BC,), float("-inf"), tl.float32)
    y_low = g_low
    y_high = g_high
    for start in tl.range(first, end, BR, num_stages=STAGES):
        row = start + line
        # rows behind the last are as that one, for nobody to see; channels stay as they lie, to be read many at once
        x = _values(x_ptr, tl.minimum(row, end - 1).to(tl.int64) * channels + column, inside)
        out, y, gate = _gated(
            _affine(x, mean, factor, bias, kind), used_ptr, by, g_by, y_by, LOOKS_UP, HARD, QMIN, QMAX, FUSED, kind
        )  # fmt: skip
        g_low, g_high = _seen(gate, g_low, g_high)
        y_low, y_high = _seen(y, y_low, y_high)
        tl.store(out_ptr + row.to(tl.int64) * channels + column, out.to(out_ptr.dtype.element_ty), mask=(row < end) & inside)
    g_low = tl.where(inside, _gate_of(g_low, by, LOOKS_UP, HARD, FUSED, kind), float("inf"))
    g_high = tl.where(inside, _gate_of(g_high, by, LOOKS_UP, HARD, FUSED, kind), float("-inf"))
    y_low = tl.where(inside, _product_of(y_low, LOOKS_UP, kind), float("inf"))
    return g_low, g_high, y_low, tl.where(inside, _product_of(y_high, LOOKS_UP, kind), float("-inf"))


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def _norm_gated_forward(
    x_ptr, out_ptr, kept_ptr, used_ptr, weight_ptr, bias_ptr, g_scratch_ptr, y_scratch_ptr, g_scale_ptr, g_zero_ptr,
    g_least_ptr, g_greatest_ptr, y_scale_ptr, y_zero_ptr, y_least_ptr, y_greatest_ptr, rows, chunk, channels, constant,
    AFFINE: tl.constexpr, HARD: tl.constexpr, OBSERVE: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, FIXED_ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, MIN_MAX: tl.constexpr,
    FUSED: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """SiLU or Hardswish of the norm in quantized steps; the quantizers of gate and product learn."""
    program = tl.program_id(0)
    part, line, column = _in_a_row(program, channels, BR, BC)
    by = _in_use(kept_ptr)
    of_gate = g_scale_ptr, g_zero_ptr, g_least_ptr, g_greatest_ptr
    of_y = y_scale_ptr, y_zero_ptr, y_least_ptr, y_greatest_ptr
    g_state = _state(of_gate)
    y_state = _state(of_y)
    g_by = _by(g_state)
    y_by = _by(y_state)
    if program == 0:
        _used(used_ptr, by, g_by, y_by, tl.load(kept_ptr + 6), tl.load(kept_ptr + 7))
    inside = column < channels
    mean, _inverse, factor, bias = _statistics(kept_ptr, weight_ptr, bias_ptr, channels, column, inside, AFFINE)
    if by[3] & (QMAX - QMIN < CODES):
        _tabulate(used_ptr, by, g_by, y_by, HARD, QMIN, QMAX, FUSED, x_ptr.dtype.element_ty)
        g_low, g_high, y_low, y_high = _gated_rows(
            x_ptr, out_ptr, used_ptr, part, line, column, rows, chunk, channels, mean, factor, bias, by, g_by, y_by,
            True, HARD, QMIN, QMAX, FUSED, STAGES, BR, BC,
        )  # fmt: skip
    else:
        g_low, g_high, y_low, y_high = _gated_rows(
            x_ptr, out_ptr, used_ptr, part, line, column, rows, chunk, channels, mean, factor, bias, by, g_by, y_by,
            False, HARD, QMIN, QMAX, FUSED, STAGES, BR, BC,
        )  # fmt: skip
    if OBSERVE:
        _give(g_scratch_ptr, g_low, g_high)
        _give(y_scratch_ptr, y_low, y_high)
        if _is_last(g_scratch_ptr + 2, tl.num_programs(0)):
            _learn_both(
                (g_scratch_ptr, y_scratch_ptr), (of_gate, of_y), (g_state, y_state), constant, QMIN, QMAX, LEVELS, FIXED_ZERO,
                SYMMETRIC, POWER_OF_TWO, MIN_MAX,
            )  # fmt: skip


# --- launches


class GatedNorm:
    """The forward's launches, bound to all but x; arguments as of ``Norm`` and ``plain_kernels.norm_gated``.

    The running statistics learn, and where it ``learns``, the three quantizers' state.
    """

    def __init__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
        batches: Tensor | None, momentum: float, eps: float, state: list[Tensor], scratch: list[Tensor], learns: bool,
        hard: bool, constant: float | None, *grid: Any,
    ) -> None:  # fmt: skip
        scale, zero_point, min_val, max_val = state[:4]
        self._norm = Norm(
            x, weight, bias, running_mean, running_var, batches, momentum, eps, scale, zero_point, min_val, max_val, scratch[0],
            learns, learns, None, None, constant, *grid,
        )  # fmt: skip
        self._of_writes, self._constant = Held(*self._norm.affine, scratch[1], scratch[2], *state[4:]), float(constant or 0)
        self.held = Held(*self._norm.held.tensors, scratch[1], scratch[2], *state[4:])
        self._constants = (weight is not None, hard, learns, *grid, constant is None, not _interprets())
        self._key = ("gated norm", x.get_device(), (x.dtype, *(t.dtype for t in self._norm.affine)), self._constants)
        self._plans: dict[Any, Pass] = {}

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The result, which lies in memory as x does, and what its backward needs: ``used`` and ``kept``."""
        stream = stream_of(x)
        if stream is None:
            with torch.cuda.device(x.device):
                return self(x)
        kept, _ = self._norm.statistics(x, stream)
        at = x.shape, address(x) & 15
        writes = self._plans.get(at) or self._plan(x, at)
        out, used = torch.empty_like(x), empty(x, (plain.USED,), (1,), torch.float32)
        writes.launch(
            stream, writes.programs, (x, out, kept, used), (writes.rows, writes.chunk, writes.channels, self._constant),
            self._of_writes,
        )  # fmt: skip
        return out, used, kept

    def _plan(self, x: Tensor, at: tuple[Any, ...]) -> Pass:
        key = self._key, at
        plan: Pass = planned(key) or remember(key, Pass(x, _norm_gated_forward, self._constants, False, *_WRITES))
        self._plans[at] = plan
        return plan
