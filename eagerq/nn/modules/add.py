"""A sum that has a name."""

from __future__ import annotations

from torch import Tensor, nn


class Add(nn.Module):
    """:math:`a + b` as a module: what torch.ao's ``FloatFunctional.add`` is, called like any other module.

    A quantizer is held by the module in which a tensor is made. A sum that a forward writes between other things has none, so
    an engine adds such in float; called as a module of its own, for each place one, it has: where both operands are quantized
    and of one shape, and something quantized reads it, its result is quantized and it is added in integers.
    Shapes: any two that broadcast.
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b
