"""The fake quantizer: observes in training, quantizes always."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eagerq.errors import StateError
from eagerq.quant.codes import encode
from eagerq.quant.engine import FollowsEngine
from eagerq.quant.functional import fake_quantize, quantization_params
from eagerq.quant.observer import Observer, QuantState
from eagerq.quant.spec import QuantSpec


class FakeQuantize(FollowsEngine, QuantState):
    r"""Replaces each value by the real value of its code (see ``functional.fake_quantize``).

    In training it first observes its input. In eval its state never changes. Until it has observed
    something it passes its input through, so that a fresh QAT model evaluates as the float one.

    Args:
        spec: the grid and the observer.
        channels: number of channels with a scale each; None for one scale a tensor.
        axis: the channels' axis.
        memoryless: for weights: the scale is that of the tensor given, in eval too (there it is
            used but not stored), as long as the observer is enabled.

    Buffers, of their final shape from the start: ``scale`` and ``zero_point`` ``(1,)`` or ``(channels,)``,
    and the observer's. ``fake_quant_enabled`` and ``observer_enabled`` are Python bools (torch.compile
    guards on them) which the state_dict holds under torch.ao's keys.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, spec: QuantSpec, channels: int | None = None, axis: int = 0, *, memoryless: bool = False, device: Any = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.axis = axis
        self.channels = channels
        self.memoryless = memoryless
        self.fake_quant_enabled = True
        self.observer_enabled = True
        self.observed = False
        self.activation_post_process = Observer(spec, channels, axis, memoryless=memoryless, device=device)
        size = channels or 1
        self.register_buffer("scale", torch.ones(size, device=device))
        self.register_buffer(
            "zero_point", torch.full((size,), spec.fixed_zero_point if spec.symmetric else 0, dtype=torch.int32, device=device)
        )

    def along_axis(self, values: Tensor, ndim: int) -> Tensor:
        """A ``(1,)`` or ``(channels,)`` tensor, shaped to broadcast over a tensor of ``ndim`` axes."""
        if self.channels is None:
            return values.reshape(())
        shape = [1] * ndim
        shape[self.axis] = -1
        return values.reshape(shape)

    def params_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that quantize ``x`` in eval; ``(1,)`` or ``(channels,)``."""
        if self.memoryless and (self.observer_enabled or not self.observed):
            observer = self.activation_post_process
            with torch.no_grad():
                scale, zero_point = quantization_params(self.spec, *observer.merged(*observer.batch_range(x)))
            return scale.reshape(self.scale.shape), zero_point.reshape(self.zero_point.shape)
        return self.scale, self.zero_point

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Update the range, scale and zero point from ``x``; an empty tensor teaches nothing."""
        observer = self.activation_post_process
        if not x.numel() and observer.others() is None:
            return
        observer(x.detach())
        self.take_range()
        self.observed = self.observed or bool(x.numel())

    @torch.no_grad()
    def take_range(self) -> None:
        """Set scale and zero point to those of the observer's range."""
        observer = self.activation_post_process
        scale, zero_point = quantization_params(self.spec, observer.min_val, observer.max_val)
        if not self.memoryless:  # without a range the scale stays as it was; a weight of zeros has the least scale
            known = (observer.min_val != 0) | (observer.max_val != 0)
            scale = torch.where(known, scale, self.scale.reshape(scale.shape))
            zero_point = torch.where(known, zero_point, self.zero_point.reshape(scale.shape))
        self.scale.copy_(scale.reshape(self.scale.shape))
        self.zero_point.copy_(zero_point.reshape(self.zero_point.shape))

    def has_range(self) -> bool:
        """Whether the buffers hold an observed range; reads them, so it waits for the device."""
        observer = self.activation_post_process
        return bool((observer.min_val != 0).any() or (observer.max_val != 0).any())

    def is_ready(self) -> bool:
        """Whether there is a scale to quantize with in eval."""
        if not (self.memoryless or self.observed):
            # an averaged copy of the model (EMA) got its buffers from another that observed
            if torch.compiler.is_compiling() or self.scale.is_meta or not self.has_range():
                return False
            self.observed = True
        return True

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.observer_enabled:
            self.observe(x)
            scale, zero_point = self.scale, self.zero_point
        else:
            if not self.is_ready():
                return x
            scale, zero_point = self.params_for(x)
        if not self.fake_quant_enabled:
            return x
        if self.profile is not None and not self.training and not self.memoryless:
            return encode(x, self.spec, scale, zero_point, self.profile)
        ndim = x.dim()
        return fake_quantize(
            x, self.along_axis(scale, ndim), self.along_axis(zero_point, ndim), self.spec.quant_min, self.spec.quant_max
        )

    def fixed_params(self, name: str) -> tuple[Tensor, Tensor]:
        """Scale and zero point for deployment.

        Args:
            name: full name of this quantizer, for the error's text.

        Raises:
            StateError: if nothing was observed, or only zeros, NaN or infinity.
        """
        remedy = (
            "run training steps on representative data with observers enabled, then convert. Where the model itself makes it"
            " always zero (the first queries of a decoder), keep the module that reads it float by a qconfig rule of None."
        )
        if not self.has_range():
            seen = "only zeros, NaN or infinity" if self.observed else "nothing"
            raise StateError(f"{name} was to hold an observed range, but its observer saw {seen}; {remedy}")
        return self.scale, self.zero_point

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for flag in ("fake_quant_enabled", "observer_enabled"):
            destination[prefix + flag] = torch.tensor([getattr(self, flag)], dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for flag in ("fake_quant_enabled", "observer_enabled"):
            value = state_dict.pop(prefix + flag, None)
            if value is not None:
                setattr(self, flag, bool(torch.as_tensor(value).any()))
        self._fit_checkpoint(state_dict, prefix, {"scale": 1.0, "zero_point": 0})
        super()._load_from_state_dict(state_dict, prefix, *args)
        loaded = [state_dict.get(f"{prefix}activation_post_process.{name}") for name in ("min_val", "max_val")]
        if all(isinstance(value, Tensor) for value in loaded):
            self.observed = any(bool((torch.isfinite(value) & (value != 0)).any()) for value in loaded if value is not None)

    def extra_repr(self) -> str:
        off = [f for f in ("fake_quant_enabled", "observer_enabled") if not getattr(self, f)]
        return str(self.spec) + "".join(f", {f}=False" for f in off)


def enable_observer(module: nn.Module) -> None:
    """Let observers learn in training; use with ``model.apply(eagerq.enable_observer)``."""
    if isinstance(module, FakeQuantize):
        module.observer_enabled = True


def disable_observer(module: nn.Module) -> None:
    """Keep every range as it is; use with ``model.apply(eagerq.disable_observer)``."""
    if isinstance(module, FakeQuantize):
        module.observer_enabled = False


def enable_fake_quant(module: nn.Module) -> None:
    """Quantize; use with ``model.apply(eagerq.enable_fake_quant)``."""
    if isinstance(module, FakeQuantize):
        module.fake_quant_enabled = True


def disable_fake_quant(module: nn.Module) -> None:
    """Compute in float; observers go on learning; use with ``model.apply(eagerq.disable_fake_quant)``."""
    if isinstance(module, FakeQuantize):
        module.fake_quant_enabled = False
