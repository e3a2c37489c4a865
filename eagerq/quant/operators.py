r"""Fake quantization as ``torch.library`` operators that do in one pass what the plain form does in ten.

- ``eagerq::fake_quantize_activation``: an activation that clamps (ReLU, ReLU6, Hardtanh, none), fake quantization by the
  scale known before the batch, and observation: :math:`a = \mathrm{clamp}(x, low, high)`,
  :math:`\hat a = (\mathrm{clip}(\mathrm{rint}(a/s)+z) - z)\,s`; then the range, scale and zero point learn :math:`\min a,
  \max a`. While no range is known the result is :math:`a`. It gives :math:`\hat a` and a mask, a bit a value in the order of
  memory, that says where the gradient passes: where neither clamp nor clip held the value.
- ``eagerq::masked_gradient``: its backward, which needs no saved activation.
- ``eagerq::fake_quantize_gelu``: the same of :math:`a = \mathrm{gelu}(x)`, in the exact form; its backward
  ``eagerq::gelu_gradient`` needs :math:`x`, which the float form keeps too, and the mask.
- ``eagerq::fake_quantize_gated``: SiLU or Hardswish as engines compute it, :math:`Q_y(Q_x(x)\, Q_g(g(Q_x(x))))`, with its three
  quantizers; its backward ``eagerq::gated_gradient`` finds them again from :math:`x`, which the float form keeps too.
- ``eagerq::fake_quantize_sigmoid``: a sigmoid or hard sigmoid that is a table over codes, :math:`Q_y(f(Q_x(x)))`, with its two
  quantizers; its backward ``eagerq::sigmoid_gradient`` finds them again from :math:`x`.
- ``eagerq::batch_norm_activation``: a batch norm in training before all that, in the passes that it takes itself: statistics and
  the ends of each channel of x, then :math:`\hat a` of :math:`a = \mathrm{clamp}((x - \mu)\,\gamma/\sigma + \beta, low, high)`.
  A norm is monotone in each channel, after every rounding too, so the ends of its output are images of those of x. Its backward
  finds :math:`a` again from x, which a norm keeps anyway, and needs no mask. Compilers see ``eagerq::batch_norm_statistics`` and
  ``eagerq::batch_norm_sums``, the first pass of either way, and PyTorch's own functions, to be fused with what surrounds them.
- ``eagerq::batch_norm_gated``: a batch norm in training before SiLU or Hardswish in quantized steps, in as many passes; its
  backward ``eagerq::batch_norm_gated_gradient`` finds all of it again from x.
- ``eagerq::fake_quantize_weight``: range, scale and fake quantization of a weight by its own range, a scale for each of its
  outermost channels, in the dtype asked for. It never clips, so the gradient passes whole.

CUDA tensors take the kernels of ``fast_kernels.py``, all others those of ``plain_kernels.py``. The state is float32 and int32,
and written in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagerq.quant import fast_kernels as fast
from eagerq.quant import plain_kernels as plain
from eagerq.quant.functional import Bounds, straight_through
from eagerq.quant.layout import dense, memory_format
from eagerq.quant.plain_kernels import State
from eagerq.quant.spec import Grid

#: An operator of one tensor, bound to all else that it takes.
Call = Callable[[Tensor], Tensor]

_GRID = "int quant_min, int quant_max, int levels, int fixed_zero_point, bool symmetric, bool power_of_two"
_STATE = "Tensor(a!) scale, Tensor(b!) zero_point, Tensor(c!) min_val, Tensor(d!) max_val"
_NORM = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(f!) running_mean, Tensor(g!) running_var, Tensor(h!)? batches,"
    f" float momentum, float eps, {_STATE}, Tensor(e!) scratch, bool observes, bool learns, float? low, float? high,"
    f" float? constant, {_GRID})"
)

_SCHEMAS = {
    "fake_quantize_activation": f"(Tensor x, {_STATE}, Tensor(e!)? scratch, float? low, float? high, float? constant, {_GRID},"
    " bool needs_mask) -> (Tensor, Tensor)",
    "masked_gradient": "(Tensor grad, Tensor mask) -> Tensor",
    "fake_quantize_gelu": f"(Tensor x, {_STATE}, Tensor(e!)? scratch, float? constant, {_GRID}, bool needs_mask)"
    " -> (Tensor, Tensor)",
    "gelu_gradient": "(Tensor grad, Tensor x, Tensor mask) -> Tensor",
    "fake_quantize_gated": f"(Tensor x, Tensor(a!)[] state, Tensor(b!)[] scratch, bool hard, float? constant, {_GRID})"
    " -> (Tensor, Tensor)",
    "gated_gradient": "(Tensor grad, Tensor x, Tensor used, bool hard, int quant_min, int quant_max) -> Tensor",
    "fake_quantize_sigmoid": f"(Tensor x, Tensor(a!)[] state, Tensor(b!)[] scratch, bool hard, float? constant, {_GRID})"
    " -> (Tensor, Tensor)",
    "sigmoid_gradient": "(Tensor grad, Tensor x, Tensor used, bool hard, int quant_min, int quant_max) -> Tensor",
    "batch_norm_activation": f"{_NORM} -> (Tensor, Tensor)",
    "batch_norm_statistics": f"{_NORM} -> Tensor",
    "batch_norm_sums": "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor kept, float? low, float? high,"
    " int quant_min, int quant_max) -> Tensor",
    "batch_norm_gated": "(Tensor x, Tensor? weight, Tensor? bias, Tensor(f!) running_mean, Tensor(g!) running_var,"
    " Tensor(h!)? batches, float momentum, float eps, Tensor(a!)[] state, Tensor(b!)[] scratch, bool learns, bool hard,"
    f" float? constant, {_GRID}) -> (Tensor, Tensor, Tensor)",
    "batch_norm_gated_gradient": "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor kept, Tensor used, bool hard,"
    " int quant_min, int quant_max) -> (Tensor, Tensor)",
    "fake_quantize_weight": f"(Tensor weight, {_STATE}, {_GRID}, ScalarType dtype) -> Tensor",
}
#: Behind the name of an operator with a gradient, the same without one: what compiled code holds, since for the first PyTorch's
#: dispatcher would enter Python twice.
BELOW = "_below_autograd"
_WITH_BELOW = (
    "fake_quantize_activation", "masked_gradient", "fake_quantize_gelu", "fake_quantize_gated", "fake_quantize_sigmoid",
    "batch_norm_gated", "fake_quantize_weight",
)  # fmt: skip

_LIBRARY: Any = torch.library.Library("eagerq", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    if _name in _WITH_BELOW:
        _LIBRARY.define(_name + BELOW + _schema)

_activation = torch.ops.eagerq.fake_quantize_activation.default
_activation_below = torch.ops.eagerq.fake_quantize_activation_below_autograd.default
_gradient = torch.ops.eagerq.masked_gradient.default
_gradient_below = torch.ops.eagerq.masked_gradient_below_autograd.default
_gelu = torch.ops.eagerq.fake_quantize_gelu.default
_gelu_below = torch.ops.eagerq.fake_quantize_gelu_below_autograd.default
_gelu_gradient = torch.ops.eagerq.gelu_gradient.default
_gated = torch.ops.eagerq.fake_quantize_gated.default
_gated_below = torch.ops.eagerq.fake_quantize_gated_below_autograd.default
_gated_gradient = torch.ops.eagerq.gated_gradient.default
_sigmoid = torch.ops.eagerq.fake_quantize_sigmoid.default
_sigmoid_below = torch.ops.eagerq.fake_quantize_sigmoid_below_autograd.default
_sigmoid_gradient = torch.ops.eagerq.sigmoid_gradient.default
_weight = torch.ops.eagerq.fake_quantize_weight.default
_weight_below = torch.ops.eagerq.fake_quantize_weight_below_autograd.default
_norm = torch.ops.eagerq.batch_norm_activation.default
_norm_gated = torch.ops.eagerq.batch_norm_gated.default
_norm_gated_below = torch.ops.eagerq.batch_norm_gated_below_autograd.default
_norm_gated_gradient = torch.ops.eagerq.batch_norm_gated_gradient.default
_norm_statistics = torch.ops.eagerq.batch_norm_statistics.default
_norm_sums = torch.ops.eagerq.batch_norm_sums.default


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
    if fast.is_plain(x):
        return activation_call(state, scratch, bounds, constant, grid)(x)
    rest = (*state, scratch, *bounds, constant, *grid, torch.is_grad_enabled() and x.requires_grad)
    out: Tensor = _activation(x, *rest)[0]
    return out


def activation_call(state: State, scratch: Tensor | None, bounds: Bounds, constant: float | None, grid: Grid) -> Call:
    """``fake_quantize_activation`` of tensors that are plain, bound to all else."""
    return _masking(_ActivationNow.apply, (*state, scratch, *bounds, constant, *grid))


def fake_quantize_gelu(x: Tensor, state: State, scratch: Tensor | None, constant: float | None, grid: Grid) -> Tensor:
    """GELU, fake quantization and observation; see the module's text.

    Args:
        x, state, scratch, constant, grid: as of ``fake_quantize_activation``.
    """
    if fast.is_plain(x):
        return gelu_call(state, scratch, constant, grid)(x)
    out: Tensor = _gelu(x, *state, scratch, constant, *grid, torch.is_grad_enabled() and x.requires_grad)[0]
    return out


def gelu_call(state: State, scratch: Tensor | None, constant: float | None, grid: Grid) -> Call:
    """``fake_quantize_gelu`` of tensors that are plain, bound to all else."""
    return _masking(_GeluNow.apply, (*state, scratch, constant, *grid))


def _masking(apply: Any, rest: tuple[Any, ...]) -> Call:
    """An operator whose last argument is whether there is to be a mask."""
    without, masked = (*rest, False), (*rest, True)
    return lambda x: apply(x, masked if x.requires_grad and torch.is_grad_enabled() else without)


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
    if fast.is_plain(x):
        return gated_call(states, scratch, hard, constant, grid)(x)
    out: Tensor = _gated(x, [t for state in states for t in state], scratch, hard, constant, *grid)[0]
    return out


def gated_call(
    states: tuple[State, State, State], scratch: list[Tensor], hard: bool, constant: float | None, grid: Grid
) -> Call:
    """``fake_quantize_gated`` of tensors that are plain, bound to all else."""
    rest = ([t for state in states for t in state], scratch, hard, constant, *grid)
    apply: Any = _GatedNow.apply
    return lambda x: apply(x, rest)


def fake_quantize_sigmoid(
    x: Tensor, states: tuple[State, State], scratch: list[Tensor], hard: bool, constant: float | None, grid: Grid
) -> Tensor:
    """Sigmoid of codes; see the module's text.

    Args:
        x: as of ``fake_quantize_activation``.
        states: of the quantizers of x and of the result.
        scratch: theirs; none quantizes and learns nothing.
        hard: it is a hard sigmoid.
        constant, grid: of both.
    """
    if fast.is_plain(x):
        return sigmoid_call(states, scratch, hard, constant, grid)(x)
    out: Tensor = _sigmoid(x, [t for state in states for t in state], scratch, hard, constant, *grid)[0]
    return out


def sigmoid_call(states: tuple[State, State], scratch: list[Tensor], hard: bool, constant: float | None, grid: Grid) -> Call:
    """``fake_quantize_sigmoid`` of tensors that are plain, bound to all else."""
    rest = ([t for state in states for t in state], scratch, hard, constant, *grid)
    apply: Any = _SigmoidNow.apply
    return lambda x: apply(x, rest)


def batch_norm_activation(
    x: Tensor, norm: Any, state: State, scratch: Tensor, observes: bool, learns: bool, bounds: Bounds, constant: float | None,
    grid: Grid,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Batch norm in training, activation, fake quantization and observation; see the module's text.

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
        found: tuple[Tensor, Tensor] = _Norm.apply(x, weight, bias, rest)  # type: ignore[no-untyped-call]
        return found
    found = _norm(x, weight, bias, *rest)
    return found


def batch_norm_gated(
    x: Tensor, norm: Any, states: tuple[State, State, State], scratch: list[Tensor], learns: bool, hard: bool,
    constant: float | None, grid: Grid,
) -> Tensor:  # fmt: skip
    """Batch norm in training, and SiLU or Hardswish in quantized steps; see the module's text.

    Args:
        x, norm: as of ``batch_norm_activation``.
        states, hard, constant, grid: as of ``fake_quantize_gated``.
        scratch: of the three quantizers.
        learns: whether their states learn.
    """
    if fast.is_plain(x):
        return norm_gated_call(norm, states, scratch, learns, hard, constant, grid)(x)
    weight, bias, of_norm = _of(norm)
    states_ = [t for state in states for t in state]
    out: Tensor = _norm_gated(x, weight, bias, *of_norm, states_, scratch, learns, hard, constant, *grid)[0]
    return out


def norm_call(
    norm: Any, state: State, scratch: Tensor, learns: bool, bounds: Bounds, constant: float | None, grid: Grid
) -> Call:
    """``batch_norm_activation`` of tensors that are plain, bound to all else; for where the state learns what is observed."""
    weight, bias, of_norm = _of(norm)
    rest = (*of_norm, *state, scratch, learns, learns, *bounds, constant, *grid)
    apply: Any = _NormNow.apply
    return lambda x: apply(x, weight, bias, rest)


def norm_gated_call(
    norm: Any, states: tuple[State, State, State], scratch: list[Tensor], learns: bool, hard: bool, constant: float | None,
    grid: Grid,
) -> Call:  # fmt: skip
    """``batch_norm_gated`` of tensors that are plain, bound to all else."""
    weight, bias, of_norm = _of(norm)
    rest = (*of_norm, [t for state in states for t in state], scratch, learns, hard, constant, *grid)
    apply: Any = _NormGatedNow.apply
    return lambda x: apply(x, weight, bias, rest)


def _of(norm: Any) -> tuple[Any, ...]:
    """Weight and bias, and what else kernels take of a norm."""
    parameters, buffers = norm._parameters, norm._buffers
    held = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    return parameters["weight"], parameters["bias"], (*held, float(norm.momentum), float(norm.eps))


def fake_quantize_weight(weight: Tensor, state: State, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Fake quantization of a weight by its own range, a scale for each entry of axis 0; see the module's text.

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


# --- shapes alone


def _fake_activation(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), plain.mask_like(x, rest[-1])


def _fake_gelu_gradient(grad: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(dense(x), dtype=grad.dtype)


def _fake_gated(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), plain.used_of(x)


def _fake_gated_gradient(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(dense(x))


def _fake_sigmoid(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), plain.used_of(x, plain.SIGMOID_USED)


def _fake_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), plain.kept_of(x)


def _fake_norm_gated(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_gated(x), plain.kept_of(x)


def _fake_norm_gated_gradient(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x), dtype=grad.dtype), plain.sums_of(x)


def _fake_statistics(x: Tensor, *rest: Any) -> Tensor:
    return plain.kept_of(x)


def _fake_sums(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return plain.sums_of(x)


def _fake_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(dense(grad))


def _fake_weight(weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(dense(weight), dtype=rest[-1])


# --- gradients


def _below(x: Tensor, operator: Any, kernel: Any, *args: Any) -> Any:
    if fast.is_plain(x):
        return kernel(x, *args)
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
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        out, mask = _below(x, _activation_below, fast.activation, *rest)
        ctx.save_for_backward(mask)
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        ctx.format = memory_format(out)
        return out, mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad is None:
            return None, None
        (mask,) = ctx.saved_tensors
        if not fast.is_tensor(grad):
            return _traced_gradient(grad, mask, ctx.format), None
        gradient: Any = fast.masked_gradient if not torch.is_grad_enabled() and fast.is_plain(grad) else _gradient
        return gradient(grad.contiguous(memory_format=ctx.format), mask), None


class _ActivationNow(_Activation):
    """Of a plain tensor, the result alone: what else an operator gives autograd would wrap too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        out, mask = fast.activation(x, *rest)
        ctx.save_for_backward(mask)
        ctx.set_materialize_grads(False)
        ctx.format = memory_format(out)
        return out


class _Gradient(torch.autograd.Function):
    """Linear in the gradient, so it is its own derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, rest: tuple[Tensor]) -> Tensor:
        out: Tensor = _below(grad, _gradient_below, fast.masked_gradient, *rest)
        ctx.save_for_backward(*rest)
        ctx.format = memory_format(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gradient(grad.contiguous(memory_format=ctx.format), ctx.saved_tensors[0]), None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        out, mask = _below(x, _gelu_below, fast.gelu, *rest)
        ctx.save_for_backward(x, mask)
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        ctx.format = memory_format(out)
        return out, mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad is None:
            return None, None
        x, mask = ctx.saved_tensors
        if not fast.is_tensor(grad):
            return torch.ops.aten.gelu_backward(_traced_gradient(grad, mask, ctx.format), x), None
        if torch.is_grad_enabled():  # somebody will differentiate the gradient, by x too
            passed = _gradient(grad.contiguous(memory_format=ctx.format), mask)
            return torch.ops.aten.gelu_backward(passed, x), None
        gradient: Any = fast.gelu_gradient if fast.is_plain(grad) else _gelu_gradient
        return gradient(grad, x, mask), None


class _GeluNow(_Gelu):
    """As ``_ActivationNow``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        out, mask = fast.gelu(x, *rest)
        ctx.save_for_backward(x, mask)
        ctx.set_materialize_grads(False)
        ctx.format = memory_format(out)
        return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        out, used = _below(x, _gated_below, fast.gated, *rest)
        ctx.mark_non_differentiable(used)
        _Gated.keep(ctx, x, used, rest)
        return out, used

    @staticmethod
    def keep(ctx: Any, x: Tensor, used: Tensor, rest: tuple[Any, ...]) -> None:
        ctx.save_for_backward(x, used)
        ctx.set_materialize_grads(False)
        _, _, hard, _, quant_min, quant_max, *_ = rest
        ctx.arguments = hard, quant_min, quant_max

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad is None:
            return None, None
        gradient: Any = fast.gated_gradient if not torch.is_grad_enabled() and fast.is_plain(grad) else _gated_gradient
        return gradient(grad, *ctx.saved_tensors, *ctx.arguments), None


class _GatedNow(_Gated):
    """As ``_ActivationNow``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        out, used = fast.gated(x, *rest)
        _Gated.keep(ctx, x, used, rest)
        return out


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        out, used = _below(x, _sigmoid_below, fast.sigmoid, *rest)
        ctx.mark_non_differentiable(used)
        _Gated.keep(ctx, x, used, rest)
        return out, used

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad is None:
            return None, None
        x, used = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate the gradient, by x too
            with torch.no_grad():
                a, passes = plain.sigmoid_passing(x, used, *ctx.arguments)
            passed, a = torch.where(passes, grad, 0.0), straight_through(x, a)
            if ctx.arguments[0]:
                return torch.ops.aten.hardsigmoid_backward(passed, a), None
            return torch.ops.aten.sigmoid_backward(passed, torch.sigmoid(a)), None
        gradient: Any = fast.sigmoid_gradient if fast.is_plain(grad) else _sigmoid_gradient
        return gradient(grad, x, used, *ctx.arguments), None


class _SigmoidNow(_Sigmoid):
    """As ``_ActivationNow``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        out, used = fast.sigmoid(x, *rest)
        _Gated.keep(ctx, x, used, rest)
        return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...]) -> Any:
        low, high, _, quant_min, quant_max, *_ = rest[12:]
        ctx.arguments, ctx.eps = (low, high, quant_min, quant_max), rest[4]
        if fast.is_plain(x):
            out, kept = fast.norm_activation(x, weight, bias, *rest)
        else:
            kept = _norm_statistics(x, weight, bias, *rest)
            out, _ = plain.norm_applied(dense(x), weight, bias, kept, *ctx.arguments)
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        return out, kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return None, None, None, None
        if torch.is_grad_enabled():  # somebody will differentiate the gradient
            return *_norms_own_gradient(ctx, grad), None
        x, weight, bias, kept = ctx.saved_tensors  # once: a checkpoint allows no more
        if fast.is_plain(grad):
            out, found = fast.norm_gradient(grad, x, weight, bias, kept, *ctx.arguments)
        else:
            found = _norm_sums(grad, x, weight, bias, kept, *ctx.arguments)
            out = plain.norm_gradient(grad, x, weight, bias, kept, found, *ctx.arguments)
        return out, *_parameters_gradient(ctx, found, weight, bias), None


class _NormNow(_Norm):
    """As ``_ActivationNow``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...]) -> Any:
        out, kept = fast.norm_activation(x, weight, bias, *rest)
        low, high, _, quant_min, quant_max, *_ = rest[12:]
        ctx.arguments, ctx.eps = (low, high, quant_min, quant_max), rest[4]
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.set_materialize_grads(False)
        return out


class _NormGated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...]
    ) -> Any:
        out, used, kept = _below(x, _norm_gated_below, fast.norm_gated, weight, bias, *rest)
        ctx.mark_non_differentiable(used, kept)
        _NormGated.keep(ctx, (x, weight, bias, kept, used), rest)
        return out, used, kept

    @staticmethod
    def keep(ctx: Any, saved: tuple[Tensor | None, ...], rest: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        hard, _, quant_min, quant_max, *_ = rest[8:]
        ctx.arguments, ctx.eps = (hard, quant_min, quant_max), rest[4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return None, None, None, None
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # the norm's derivatives are of any order; of the gate's gradient PyTorch says it has none
            x, weight, bias, _, used = saved
            y = _norm_of(ctx, x, weight, bias)
            return *_through_norm(ctx, y, (x, weight, bias), _gated_gradient(grad, y, used, *ctx.arguments)), None
        gradient: Any = fast.norm_gated_gradient if fast.is_plain(grad) else _norm_gated_gradient
        out, found = gradient(grad, *saved, *ctx.arguments)
        return out, *_parameters_gradient(ctx, found, *saved[1:3]), None


class _NormGatedNow(_NormGated):
    """As ``_ActivationNow``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...]) -> Any:
        out, used, kept = fast.norm_gated(x, weight, bias, *rest)
        _NormGated.keep(ctx, (x, weight, bias, kept, used), rest)
        return out


def _parameters_gradient(ctx: Any, found: Tensor, weight: Any, bias: Any) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias, of what ``norm_sums`` finds."""
    needs = ctx.needs_input_grad
    if not (needs[1] or needs[2]):
        return None, None
    of_bias, of_weight = found.unbind()
    if weight.dtype != found.dtype:
        of_weight = of_weight.to(weight.dtype)
    if bias.dtype != found.dtype:
        of_bias = of_bias.to(bias.dtype)
    return of_weight if needs[1] else None, of_bias if needs[2] else None


def _norms_own_gradient(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Of x, weight and bias through PyTorch's norm, which has derivatives of any order."""
    x, weight, bias, kept = ctx.saved_tensors
    with torch.no_grad():
        _, passes = plain.norm_applied(dense(x), weight, bias, kept, *ctx.arguments)
    return _through_norm(ctx, _norm_of(ctx, x, weight, bias), (x, weight, bias), torch.where(passes, grad, 0.0))


def _norm_of(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps)


def _through_norm(ctx: Any, y: Tensor, of: tuple[Any, ...], passed: Tensor) -> list[Tensor | None]:
    """The gradients wanted of x, weight and bias by that of y, with a graph of their own."""
    needs = ctx.needs_input_grad[:3]
    wanted = [t for t, needed in zip(of, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, passed, create_graph=True))
    return [next(found) if needed else None for needed in needs]


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rest: tuple[Any, ...]) -> Tensor:
        out: Tensor = _below(weight, _weight_below, fast.weight_by_its_range, *rest)
        ctx.dtype = weight.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None


def _autograd(function: Any) -> Any:
    if function in (_Norm, _NormGated):
        return lambda x, weight, bias, *rest: function.apply(x, weight, bias, rest)
    return lambda x, *rest: function.apply(x, rest)


for _name, _function, _plain, _fast, _fake in (
    ("fake_quantize_activation", _Activation, plain.activation, fast.activation, _fake_activation),
    ("masked_gradient", _Gradient, plain.masked_gradient, fast.masked_gradient, _fake_gradient),
    ("fake_quantize_gelu", _Gelu, plain.gelu, fast.gelu, _fake_activation),
    ("gelu_gradient", None, plain.gelu_gradient, fast.gelu_gradient, _fake_gelu_gradient),
    ("fake_quantize_gated", _Gated, plain.gated, fast.gated, _fake_gated),
    ("gated_gradient", None, plain.gated_gradient, fast.gated_gradient, _fake_gated_gradient),
    ("fake_quantize_sigmoid", _Sigmoid, plain.sigmoid, fast.sigmoid, _fake_sigmoid),
    ("sigmoid_gradient", None, plain.sigmoid_gradient, fast.sigmoid_gradient, _fake_gated_gradient),
    ("batch_norm_activation", _Norm, plain.norm_activation, fast.norm_activation, _fake_norm),
    ("batch_norm_gated", _NormGated, plain.norm_gated, fast.norm_gated, _fake_norm_gated),
    ("batch_norm_gated_gradient", None, plain.norm_gated_gradient, fast.norm_gated_gradient, _fake_norm_gated_gradient),
    ("batch_norm_statistics", None, plain.norm_statistics, fast.norm_statistics, _fake_statistics),
    ("batch_norm_sums", None, plain.norm_sums, fast.norm_sums, _fake_sums),
    ("fake_quantize_weight", _Weight, plain.weight_by_its_range, fast.weight_by_its_range, _fake_weight),
):
    for _each in (_name, _name + BELOW) if _name in _WITH_BELOW else (_name,):
        _LIBRARY.impl(_each, _plain, "CompositeExplicitAutograd")
        _LIBRARY.impl(_each, _fast, "CUDA")
        torch.library.register_fake(f"eagerq::{_each}", _fake, lib=_LIBRARY)
    if _function is not None:  # a gradient of the other gradients is not defined, and PyTorch says so
        _LIBRARY.impl(_name, _autograd(_function), "Autograd")
