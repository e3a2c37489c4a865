"""What a tensor of codes holds: codes on a grid, or a result that waits for the quantizer behind it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from eagerq.quant.engine import EngineProfile, Grid
from eagerq.quant.pieces import in_pieces

#: Called with the name of each function that ran on real values though it was given codes.
on_float: Callable[[str], None] | None = None


def note_float(function: str) -> None:
    """Tell who asked that this function runs on real values."""
    if on_float is not None:
        on_float(function)


class Value:
    """What a ``CodeTensor`` stands for."""

    profile: EngineProfile

    def real(self) -> Tensor:
        """The real values, as the engine has them where no quantizer follows."""
        raise NotImplementedError  # pragma: no cover

    def on(self, grid: Grid) -> Tensor:
        """The codes after a quantizer with this grid."""
        raise NotImplementedError  # pragma: no cover

    def shape(self) -> torch.Size:
        """Of the tensor."""
        raise NotImplementedError  # pragma: no cover

    def device(self) -> torch.device:
        """Of the tensor."""
        raise NotImplementedError  # pragma: no cover

    def laid_out(self) -> Tensor:
        """A tensor of this shape as it lies in memory."""
        raise NotImplementedError  # pragma: no cover


@dataclasses.dataclass
class Real(Value):
    """Real values that a function wrote in place: a plain tensor, whose views see what is written next."""

    tensor: Tensor
    profile: EngineProfile

    def real(self) -> Tensor:
        return self.tensor

    def on(self, grid: Grid) -> Tensor:
        return in_pieces(lambda part: self.profile.quantize(part, grid), self.tensor)

    def shape(self) -> torch.Size:
        return self.tensor.shape

    def device(self) -> torch.device:
        return self.tensor.device

    def laid_out(self) -> Tensor:
        return self.tensor


@dataclasses.dataclass
class Coded(Value):
    """Codes on a grid."""

    codes: Tensor
    grid: Grid
    profile: EngineProfile

    def real(self) -> Tensor:
        return self.profile.dequantize(self.codes, self.grid)

    def on(self, grid: Grid) -> Tensor:
        return self.codes if self.grid.is_same(grid) else self.profile.quantize(self.real(), grid)

    def shape(self) -> torch.Size:
        return self.codes.shape

    def device(self) -> torch.device:
        return self.codes.device

    def laid_out(self) -> Tensor:
        return self.codes

    def about_zero(self) -> Tensor:
        """q - z."""
        return self.codes - self.grid.zero_point


@dataclasses.dataclass
class Pending(Value):
    """A result of integer operands that waits for its grid, perhaps with an activation that clips it.

    Attributes:
        size, place: shape and device of the result.
        value: its real value without the quantizer.
        codes: its codes on a grid.
        kind: what engines compute in float if no quantizer follows; ``""`` if they give this very value.
        low, high: real bounds of the activation.
    """

    size: torch.Size
    place: torch.device
    value: Callable[[], Tensor]
    codes: Callable[[Grid], Tensor]
    profile: EngineProfile
    kind: str = ""
    low: float = -math.inf
    high: float = math.inf

    def real(self) -> Tensor:
        if self.kind:
            note_float(self.kind)
        value = self.value()
        return value if self.low == -math.inf and self.high == math.inf else value.clamp(self.low, self.high)

    def on(self, grid: Grid) -> Tensor:
        codes = self.codes(grid)
        if self.low == -math.inf and self.high == math.inf:
            return codes
        bounds = torch.tensor([self.low, self.high], device=codes.device)
        low, high = self.profile.quantize(bounds, grid).tolist()
        return codes if (low, high) == (grid.low, grid.high) else codes.clamp(low, high)

    def shape(self) -> torch.Size:
        return self.size

    def device(self) -> torch.device:
        return self.place

    def laid_out(self) -> Tensor:
        return torch.empty(self.size, device="meta")

    def clipped(self, low: float, high: float) -> Pending:
        """The same after a clip."""
        return dataclasses.replace(self, low=min(max(self.low, low), self.high), high=max(min(self.high, high), self.low))
