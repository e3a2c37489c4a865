"""The operators of ``library.py`` as the modules call them: with a state, bounds and a grid, and a plain tensor at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagerq.quant import fast_kernels as fast
from eagerq.quant.functional import Bounds
from eagerq.quant.gradients import ActivationNow, GatedNow, GeluNow, Norm, NormGatedNow, NormNow, SigmoidNow, direct
from eagerq.quant.memory import Held
from eagerq.quant.plain_kernels import State
from eagerq.quant.spec import Grid


@dataclasses.dataclass(frozen=True)
class Call:
    """An operator of one tensor, bound to all else that it takes.

    Attributes:
        run: the operator.
        held: of what it is bound to, the tensors that kernels read and write where they lay.
    """

    run: Callable[[Tensor], Tensor]
    held: Held


_activation_now, _gelu_now, _gated_now, _sigmoid_now = map(direct, (ActivationNow, GeluNow, GatedNow, SigmoidNow))
_norm_now, _norm_gated_now = map(direct, (NormNow, NormGatedNow))
_activation = torch.ops.eagerq.fake_quantize_activation.default
_gelu = torch.ops.eagerq.fake_quantize_gelu.default
_gated = torch.ops.eagerq.fake_quantize_gated.default
_sigmoid = torch.ops.eagerq.fake_quantize_sigmoid.default
_state = torch.ops.eagerq.quantizer_state.default
_weight = torch.ops.eagerq.fake_quantize_weight.default
_norm = torch.ops.eagerq.batch_norm_activation.default
_norm_gated = torch.ops.eagerq.batch_norm_gated.default


def fake_quantize_activation(
    x: Tensor, state: State, scratch: Tensor | None, bounds: Bounds, constant: float | None, grid: Grid
) -> Tensor:
    """Activation, fake quantization and observation; see ``library.py``.

    Args:
        x: ``(*)``, float32, bfloat16 or float16; another memory layout than contiguous or channels last is copied.
        state: one value each.
        scratch: the quantizer's ``WORDS``; None quantizes and learns nothing.
        bounds: least and greatest value of the activation.
        constant: of the moving average; None takes the least and greatest of all batches.
        grid: the codes.
    """
    if fast.is_plain(x):
        return activation_call(x, state, scratch, bounds, constant, grid).run(x)
    rest = (*state, scratch, *bounds, constant, *grid, torch.is_grad_enabled() and x.requires_grad)
    out: Tensor = _activation(x, *rest)[0]
    return out


def activation_call(
    x: Tensor, state: State, scratch: Tensor | None, bounds: Bounds, constant: float | None, grid: Grid
) -> Call:
    """``fake_quantize_activation`` of tensors that are plain, of x's dtype and device, bound to all else."""
    return _masking(_activation_now, fast.bound_activation(x, *state, scratch, *bounds, constant, *grid))


def quantizer_state(state: State) -> State:
    """A copy that compilers keep for a backward; see ``library.py``. All in the scale's dtype."""
    scale, zero_point, min_val, max_val = _state(*state).unbind()
    return scale, zero_point, min_val.reshape(state[2].shape), max_val.reshape(state[3].shape)


def fake_quantize_gelu(x: Tensor, state: State, scratch: Tensor | None, constant: float | None, grid: Grid) -> Tensor:
    """GELU, fake quantization and observation; see ``library.py``.

    Args:
        x, state, scratch, constant, grid: as of ``fake_quantize_activation``.
    """
    if fast.is_plain(x):
        return gelu_call(x, state, scratch, constant, grid).run(x)
    out: Tensor = _gelu(x, *state, scratch, constant, *grid, torch.is_grad_enabled() and x.requires_grad)[0]
    return out


def gelu_call(x: Tensor, state: State, scratch: Tensor | None, constant: float | None, grid: Grid) -> Call:
    """``fake_quantize_gelu``, as ``activation_call``."""
    return _masking(_gelu_now, fast.bound_gelu(x, *state, scratch, constant, *grid))


def _masking(apply: Any, bound: Any) -> Call:
    """An operator that asks whether there is to be a mask."""
    without, masked = (bound, False), (bound, True)
    return Call(lambda x: apply(x, masked if x.requires_grad and torch.is_grad_enabled() else without), bound.held)


def fake_quantize_gated(
    x: Tensor, states: tuple[State, State, State], scratch: list[Tensor], hard: bool, constant: float | None, grid: Grid
) -> Tensor:
    """SiLU or Hardswish in quantized steps; see ``library.py``.

    Args:
        x: as of ``fake_quantize_activation``.
        states: of the quantizers of x, of the gate and of the product.
        scratch: theirs; none quantizes and learns nothing.
        hard: the gate is a hard sigmoid.
        constant, grid: of all three.
    """
    if fast.is_plain(x):
        return gated_call(x, states, scratch, hard, constant, grid).run(x)
    out: Tensor = _gated(x, [t for state in states for t in state], scratch, hard, constant, *grid)[0]
    return out


def gated_call(
    x: Tensor, states: tuple[State, State, State], scratch: list[Tensor], hard: bool, constant: float | None, grid: Grid
) -> Call:
    """``fake_quantize_gated``, as ``activation_call``."""
    bound = fast.bound_gated(x, [t for state in states for t in state], scratch, hard, constant, *grid)
    rest = bound, (hard, grid.quant_min, grid.quant_max)
    return Call(lambda x: _gated_now(x, rest), bound.held)


def fake_quantize_sigmoid(
    x: Tensor, states: tuple[State, State], scratch: list[Tensor], hard: bool, constant: float | None, grid: Grid
) -> Tensor:
    """Sigmoid of codes; see ``library.py``.

    Args:
        x: as of ``fake_quantize_activation``.
        states: of the quantizers of x and of the result.
        scratch: theirs; none quantizes and learns nothing.
        hard: it is a hard sigmoid.
        constant, grid: of both.
    """
    if fast.is_plain(x):
        return sigmoid_call(x, states, scratch, hard, constant, grid).run(x)
    out: Tensor = _sigmoid(x, [t for state in states for t in state], scratch, hard, constant, *grid)[0]
    return out


def sigmoid_call(
    x: Tensor, states: tuple[State, State], scratch: list[Tensor], hard: bool, constant: float | None, grid: Grid
) -> Call:
    """``fake_quantize_sigmoid``, as ``activation_call``."""
    bound = fast.bound_sigmoid(x, [t for state in states for t in state], scratch, hard, constant, *grid)
    rest = bound, (hard, grid.quant_min, grid.quant_max)
    return Call(lambda x: _sigmoid_now(x, rest), bound.held)


def batch_norm_activation(
    x: Tensor, norm: Any, state: State, scratch: Tensor, observes: bool, learns: bool, bounds: Bounds, constant: float | None,
    grid: Grid,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Batch norm in training, activation, fake quantization and observation; see ``library.py``.

    Args:
        x: ``(N, C, *)``, less than 2^30 values a channel, more than one.
        norm: one of which ``is_plain_norm``; its statistics learn.
        state, bounds, constant, grid: as of ``fake_quantize_activation``.
        scratch: the quantizer's ``WORDS``.
        observes: the range of the batch is taken.
        learns: the state learns it.

    Returns:
        the result, and what was kept, in which, where a range is taken that the state does not learn, 4 and 5 are its ends.
    """
    weight, bias, of_norm = _of(norm)
    rest = (*of_norm, *state, scratch, observes, learns, *bounds, constant, *grid)
    if fast.is_plain(x):
        found: tuple[Tensor, Tensor] = Norm.apply(x, weight, bias, rest)  # type: ignore[no-untyped-call]
        return found
    found = _norm(x, weight, bias, *rest)
    return found


def batch_norm_gated(
    x: Tensor, norm: Any, states: tuple[State, State, State], scratch: list[Tensor], learns: bool, hard: bool,
    constant: float | None, grid: Grid,
) -> Tensor:  # fmt: skip
    """Batch norm in training, and SiLU or Hardswish in quantized steps; see ``library.py``.

    Args:
        x, norm: as of ``batch_norm_activation``.
        states, hard, constant, grid: as of ``fake_quantize_gated``.
        scratch: of the three quantizers.
        learns: whether their states learn.
    """
    if fast.is_plain(x):
        return norm_gated_call(x, norm, states, scratch, learns, hard, constant, grid).run(x)
    weight, bias, of_norm = _of(norm)
    states_ = [t for state in states for t in state]
    out: Tensor = _norm_gated(x, weight, bias, *of_norm, states_, scratch, learns, hard, constant, *grid)[0]
    return out


def norm_call(
    x: Tensor, norm: Any, state: State, scratch: Tensor, learns: bool, bounds: Bounds, constant: float | None, grid: Grid
) -> Call:
    """``batch_norm_activation`` of tensors that are plain, and of x's dtype, device and layout, bound to all else; for where the
    state learns what is observed."""
    weight, bias, of_norm = _of(norm)
    bound = fast.bound_norm(x, weight, bias, *of_norm, *state, scratch, learns, learns, *bounds, constant, *grid)
    rest = bound, (*bounds, grid.quant_min, grid.quant_max), of_norm[-1]
    return Call(lambda x: _norm_now(x, weight, bias, rest), bound.held)


def norm_gated_call(
    x: Tensor, norm: Any, states: tuple[State, State, State], scratch: list[Tensor], learns: bool, hard: bool,
    constant: float | None, grid: Grid,
) -> Call:  # fmt: skip
    """``batch_norm_gated``, as ``norm_call``."""
    weight, bias, of_norm = _of(norm)
    flat = [t for state in states for t in state]
    bound = fast.bound_norm_gated(x, weight, bias, *of_norm, flat, scratch, learns, hard, constant, *grid)
    rest = bound, (hard, grid.quant_min, grid.quant_max), of_norm[-1]
    return Call(lambda x: _norm_gated_now(x, weight, bias, rest), bound.held)


def _of(norm: Any) -> tuple[Any, ...]:
    """Weight and bias, and what else kernels take of a norm."""
    parameters, buffers = norm._parameters, norm._buffers
    held = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    return parameters["weight"], parameters["bias"], (*held, float(norm.momentum), float(norm.eps))


def fake_quantize_weight(weight: Tensor, state: State, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Fake quantization of a weight by its own range, a scale for each entry of axis 0; see ``library.py``.

    Args:
        weight: ``(C, *)``.
        state: ``(C,)`` each.
        grid: the codes.
        dtype: of the result.
    """
    kernel = fast.of_weight(weight)
    out: Tensor
    if kernel is None:
        out = _weight(weight, *state, *grid, dtype)
        return out
    # a copy, whose gradient passes whole in PyTorch's own node, which the kernel then writes by its address
    out = weight.clone() if dtype == weight.dtype else weight.to(dtype)
    kernel(weight, out, *state, grid)
    return out
