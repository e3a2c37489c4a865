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

#: Activations f with f(f(x)) = f(x): a copy may be fused while the shared original stays in place.
IDEMPOTENT: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


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
