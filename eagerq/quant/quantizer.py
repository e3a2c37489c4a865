"""What a quantizer knows: its range, scale and zero point, how a batch changes them, and how checkpoints hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagerq.errors import StateError
from eagerq.quant.engine import FollowsEngine
from eagerq.quant.functional import Bounds, is_transformed, quantization_params
from eagerq.quant.observer import Observer, QuantState
from eagerq.quant.plain_kernels import WORDS, State
from eagerq.quant.spec import QuantSpec


class Quantizer(FollowsEngine, QuantState):
    """The state of a ``FakeQuantize``, whose arguments and buffers are these."""

    scale: Tensor
    zero_point: Tensor
    scratch: Tensor
    #: What the last batch was quantized by.
    _before: State | None = None
    _before_was_fast = False
    #: That the buffers hold a range, once seen: looking waits for the device.
    _known = False

    def __init__(
        self, spec: QuantSpec, channels: int | None = None, axis: int = 0, *, memoryless: bool = False, device: Any = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self._grid = spec.grid
        self.axis = axis
        self.channels = channels
        self.memoryless = memoryless
        self.fake_quant_enabled = True
        self.observer_enabled = True
        self.observed = False
        self.activation_post_process = Observer(spec, channels, axis, memoryless=memoryless, device=device)
        size = channels or 1
        self.register_buffer("scale", torch.ones(size, device=device))
        zero_point = torch.full((size,), self._unlearned()["zero_point"], dtype=torch.int32, device=device)
        self.register_buffer("zero_point", zero_point)
        if channels is None and not memoryless:
            self.register_buffer("scratch", torch.zeros(WORDS, dtype=torch.int32, device=device), persistent=False)

    def _unlearned(self) -> dict[str, float]:
        return {"scale": 1.0, "zero_point": self.spec.fixed_zero_point if self.spec.symmetric else 0, "scratch": 0}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        was_meta = self.scale.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.scale.is_meta:
            self._forget()
        return self

    def _forget(self) -> None:
        self.observed = self._known = False
        self._before = None

    def reset_parameters(self) -> None:
        """Forget every batch: no scale is known, and tensors pass through until one is."""
        self._fill(self._unlearned())
        self.activation_post_process.reset_parameters()
        self._forget()

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
    def observe(self, x: Tensor, bounds: Bounds = (None, None)) -> None:
        """Update the range, scale and zero point from ``x.clamp(*bounds)``; an empty tensor teaches nothing."""
        observer = self.activation_post_process
        if not x.numel() and observer.others() is None:
            return
        observer(x.detach(), bounds)
        self.take_range()
        if x.numel():
            self._note_observed()

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

    def _range_known(self) -> Tensor:
        """Where a range was learned: ``()`` or ``(channels,)``."""
        observer = self.activation_post_process
        return (observer.min_val != 0) | (observer.max_val != 0)

    def has_range(self) -> bool:
        """Whether the buffers hold an observed range; reads them, so it waits for the device."""
        return bool(self._range_known().any())

    def is_ready(self) -> bool:
        """Whether there is a scale to quantize with."""
        if self.memoryless or self._known:
            return True
        if not self._may_look() or type(known := self._range_known()) is not Tensor:
            return self.observed
        # an averaged copy of the model (EMA) got its buffers from another that observed
        ready = bool(known.any())
        # a moving average of the newest batch alone forgets its range in a batch of zeros
        self._known = ready and self.spec.averaging_constant < 1.0 and bool(known.all())
        self.observed = self.observed or ready
        return ready

    def _may_look(self) -> bool:
        """Whether Python may decide by what buffers hold."""
        return not (torch.compiler.is_compiling() or is_transformed() or self.scale.is_meta)

    def _unknown(self) -> Tensor | None:
        """Where a range may not be known yet, a tensor that says so; None where it is."""
        if self._may_look() and (self._known or (self.is_ready() and self._known)):
            return None
        return self._range_known()

    @property
    def learns(self) -> bool:
        """Whether a forward teaches the observer."""
        return self.training and self.observer_enabled

    @property
    def state(self) -> State:
        """What operators read and write."""
        own, observers = self._buffers, self._modules["activation_post_process"]._buffers  # type: ignore[union-attr]
        # of the dicts themselves: nn.Module looks attributes up four times as long
        return own["scale"], own["zero_point"], observers["min_val"], observers["max_val"]  # type: ignore[return-value]

    @property
    def constant(self) -> float | None:
        """Of the moving average; None takes the least and greatest of all batches."""
        return None if self.spec.observer == "min_max" else self.spec.averaging_constant

    def _note_observed(self) -> None:
        if torch.compiler.is_compiling() or not self.observed:  # compiled code is not to look, or it is compiled twice
            self.observed = True

    @torch.no_grad()
    def _remember(self) -> None:
        """Keep what this batch is quantized by, for a forward that is computed again in the backward."""
        if not torch.compiler.is_compiling():
            scale, zero_point, low, high = self.state
            self._before = scale.clone(), zero_point.clone(), low.clone(), high.clone()
            self._before_was_fast = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_before": None}

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
        if "scratch" in self._buffers:  # no checkpoint holds it, and a model built without memory (to_empty) never wrote it
            self.scratch = torch.zeros(WORDS, dtype=torch.int32, device=self.scale.device)
        loaded = [state_dict.get(f"{prefix}activation_post_process.{name}") for name in ("min_val", "max_val")]
        if all(isinstance(value, Tensor) for value in loaded):
            self._known = False
            self.observed = any(bool((torch.isfinite(value) & (value != 0)).any()) for value in loaded if value is not None)

    def extra_repr(self) -> str:
        off = [f for f in ("fake_quant_enabled", "observer_enabled") if not getattr(self, f)]
        return str(self.spec) + "".join(f", {f}=False" for f in off)
