"""Which activations are elementwise, and which may be applied twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Activations that map each element by itself, draw no random numbers and keep shape and dtype.
ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardshrink,
    nn.Softshrink,
    nn.Tanhshrink,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Softsign,
    nn.Threshold,
)

#: Activations that clamp, so that f(f(x)) = f(x): a copy may be fused while the shared original stays in place.
IDEMPOTENT: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: hooks of its own, or hooks on all modules."""
    of_all = torch.nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
    )


#: Those that are ``F.gelu`` in its exact form, by module and name: not all libraries are there.
_GELUS = frozenset({("torch.nn.modules.activation", "GELU"), ("timm.layers.activations", "GELU")})


def is_gelu(act: nn.Module) -> bool:
    """Whether an activation is the exact GELU and does nothing else."""
    kind = type(act)
    if (kind.__module__, kind.__qualname__) not in _GELUS or getattr(act, "approximate", "none") != "none":
        return False
    return not is_hooked(act) and "forward" not in vars(act)


def bounds_of(act: nn.Module) -> tuple[float | None, float | None] | None:
    """Least and greatest value of an activation that clamps and does nothing else (None is no bound); None for any other."""
    if type(act) not in IDEMPOTENT or is_hooked(act) or "forward" in vars(act):
        return None
    return (0.0, None) if type(act) is nn.ReLU else (float(act.min_val), float(act.max_val))  # type: ignore[arg-type]


class _Alias(torch.autograd.Function):
    """The same memory under a version count of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def result_may_be_rewritten(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Forward hook of a copied activation whose shared original runs behind it, in place.

    An activation saves its result for its gradient. The original, being idempotent, writes the very same values
    there again, which autograd would take for a change.
    """
    if not (torch.is_grad_enabled() and output.requires_grad):
        return None
    alias: Tensor = _Alias.apply(output)  # type: ignore[no-untyped-call]
    return alias
