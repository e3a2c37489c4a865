"""Activations that stand alone and clamp, with the quantizer of their output behind them: one pass where a kernel serves both."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from eagerq.nn.qat.base import activated

_Self = TypeVar("_Self", bound="_Quantizing")


class _Quantizing(nn.Module):
    """An activation and the quantizer of its output, ``activation_post_process``."""

    activation_post_process: nn.Module

    @classmethod
    def from_float(cls: type[_Self], mod: nn.Module, quantizer: nn.Module) -> _Self:
        """``mod``, with its hooks and mode, and the quantizer behind it."""
        self = cls.__new__(cls)
        self.__dict__.update(vars(mod))
        self.__dict__["_modules"] = {**mod._modules, "activation_post_process": quantizer}
        return self


class ReLU(_Quantizing, nn.ReLU):
    """``nn.ReLU`` with a quantizer of its output."""

    def forward(self, input: Tensor) -> Tensor:
        return activated(super().forward, (0.0, None), self.activation_post_process, input)


class Hardtanh(_Quantizing, nn.Hardtanh):
    """``nn.Hardtanh`` with a quantizer of its output."""

    def forward(self, input: Tensor) -> Tensor:
        return activated(super().forward, (self.min_val, self.max_val), self.activation_post_process, input)


class ReLU6(_Quantizing, nn.ReLU6):
    """``nn.ReLU6`` with a quantizer of its output."""

    def forward(self, input: Tensor) -> Tensor:
        return activated(super().forward, (self.min_val, self.max_val), self.activation_post_process, input)


#: What an activation that stands alone becomes where its output is quantized.
QUANTIZING: dict[type[nn.Module], type[_Quantizing]] = {nn.ReLU: ReLU, nn.ReLU6: ReLU6, nn.Hardtanh: Hardtanh}
