"""The operators' gradients, as functions of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq.quant import fast_kernels as fast
from eagerq.quant import plain_kernels as plain
from eagerq.quant.functional import straight_through
from eagerq.quant.layout import dense, memory_format
from eagerq.quant.library import LIBRARY

_activation_below = torch.ops.eagerq.fake_quantize_activation_below_autograd.default
_gradient = torch.ops.eagerq.masked_gradient.default
_gradient_below = torch.ops.eagerq.masked_gradient_below_autograd.default
_gelu_below = torch.ops.eagerq.fake_quantize_gelu_below_autograd.default
_gelu_gradient = torch.ops.eagerq.gelu_gradient.default
_gated_below = torch.ops.eagerq.fake_quantize_gated_below_autograd.default
_gated_gradient = torch.ops.eagerq.gated_gradient.default
_sigmoid_below = torch.ops.eagerq.fake_quantize_sigmoid_below_autograd.default
_sigmoid_gradient = torch.ops.eagerq.sigmoid_gradient.default
_weight_below = torch.ops.eagerq.fake_quantize_weight_below_autograd.default
_norm_gated_below = torch.ops.eagerq.batch_norm_gated_below_autograd.default
_norm_gated_gradient = torch.ops.eagerq.batch_norm_gated_gradient.default
_norm_statistics = torch.ops.eagerq.batch_norm_statistics.default
_norm_sums = torch.ops.eagerq.batch_norm_sums.default


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


class Activation(torch.autograd.Function):
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


class ActivationNow(Activation):
    """Of a plain tensor by a kernel that is bound to all else, the result alone: what else an operator gives autograd would wrap
    too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        bound, needs_mask = rest
        out, mask = bound(x, needs_mask)
        ctx.save_for_backward(mask)
        ctx.set_materialize_grads(False)
        ctx.format = memory_format(out)
        return out


class Gradient(torch.autograd.Function):
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


class Gelu(torch.autograd.Function):
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
        x = x.contiguous(memory_format=ctx.format)  # hooks on saved tensors may lay it out anew, and the mask is by memory
        if not fast.is_tensor(grad):
            return torch.ops.aten.gelu_backward(_traced_gradient(grad, mask, ctx.format), x), None
        if torch.is_grad_enabled():  # somebody will differentiate the gradient, by x too
            passed = _gradient(grad.contiguous(memory_format=ctx.format), mask)
            return torch.ops.aten.gelu_backward(passed, x), None
        gradient: Any = fast.gelu_gradient if fast.is_plain(grad) else _gelu_gradient
        return gradient(grad, x, mask), None


class GeluNow(Gelu):
    """As ``ActivationNow``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        bound, needs_mask = rest
        out, mask = bound(x, needs_mask)
        ctx.save_for_backward(x, mask)
        ctx.set_materialize_grads(False)
        ctx.format = memory_format(out)
        return out


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        out, used = _below(x, _gated_below, fast.gated, *rest)
        ctx.mark_non_differentiable(used)
        _, _, hard, _, quant_min, quant_max, *_ = rest
        Gated.keep(ctx, x, used, (hard, quant_min, quant_max))
        return out, used

    @staticmethod
    def keep(ctx: Any, x: Tensor, used: Tensor, arguments: tuple[Any, ...]) -> None:
        ctx.save_for_backward(x, used)
        ctx.set_materialize_grads(False)
        ctx.arguments = arguments

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad is None:
            return None, None
        gradient: Any = fast.gated_gradient if not torch.is_grad_enabled() and fast.is_plain(grad) else _gated_gradient
        return gradient(grad, *ctx.saved_tensors, *ctx.arguments), None


class GatedNow(Gated):
    """As ``ActivationNow``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        bound, arguments = rest
        out, used = bound(x)
        Gated.keep(ctx, x, used, arguments)
        return out


class Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        out, used = _below(x, _sigmoid_below, fast.sigmoid, *rest)
        ctx.mark_non_differentiable(used)
        _, _, hard, _, quant_min, quant_max, *_ = rest
        Gated.keep(ctx, x, used, (hard, quant_min, quant_max))
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


class SigmoidNow(Sigmoid):
    """As ``ActivationNow``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Any:
        bound, arguments = rest
        out, used = bound(x)
        Gated.keep(ctx, x, used, arguments)
        return out


class Norm(torch.autograd.Function):
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


class NormNow(Norm):
    """As ``ActivationNow``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...]) -> Any:
        bound, ctx.arguments, ctx.eps = rest
        out, kept = bound(x)
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.set_materialize_grads(False)
        return out


class NormGated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...]
    ) -> Any:
        out, used, kept = _below(x, _norm_gated_below, fast.norm_gated, weight, bias, *rest)
        ctx.mark_non_differentiable(used, kept)
        ctx.save_for_backward(x, weight, bias, kept, used)
        ctx.set_materialize_grads(False)
        hard, _, quant_min, quant_max, *_ = rest[8:]
        ctx.arguments, ctx.eps = (hard, quant_min, quant_max), rest[4]
        return out, used, kept

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


class NormGatedNow(NormGated):
    """As ``ActivationNow``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...]) -> Any:
        bound, ctx.arguments, ctx.eps = rest
        out, used, kept = bound(x)
        ctx.save_for_backward(x, weight, bias, kept, used)
        ctx.set_materialize_grads(False)
        return out


def direct(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` of a plain tensor and others that no transform of ``torch.func`` made: PyTorch looks for such in Python,
    which takes as long as a small kernel."""
    apply: Any = super(torch.autograd.Function, function).apply  # type: ignore[misc]  # inherited of C
    alive = torch._C._functorch.unwrap_if_dead

    def applied(x: Tensor, *args: Any) -> Any:
        return apply(alive(x), *args)

    return applied


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


class Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rest: tuple[Any, ...]) -> Tensor:
        out: Tensor = _below(weight, _weight_below, fast.weight_by_its_range, *rest)
        ctx.dtype = weight.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None


def _autograd(function: Any) -> Any:
    if function in (Norm, NormGated):
        return lambda x, weight, bias, *rest: function.apply(x, weight, bias, rest)
    return lambda x, *rest: function.apply(x, rest)


for _name, _function in {  # a gradient of the other gradients is not defined, and PyTorch says so
    "fake_quantize_activation": Activation,
    "masked_gradient": Gradient,
    "fake_quantize_gelu": Gelu,
    "fake_quantize_gated": Gated,
    "fake_quantize_sigmoid": Sigmoid,
    "batch_norm_activation": Norm,
    "batch_norm_gated": NormGated,
    "fake_quantize_weight": Weight,
}.items():
    LIBRARY.impl(_name, _autograd(_function), "Autograd")
