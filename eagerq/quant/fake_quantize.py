"""The fake quantizer: observes in training, quantizes always; in one pass where a kernel or a compiler makes it one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.quant import fast_kernels, operators
from eagerq.quant.codes import encode
from eagerq.quant.functional import (
    Bounds,
    fake_quantize,
    fake_quantize_on_cpu,
    float32,
    is_transformed,
    scalar_params,
    traced_fake_quantize,
)
from eagerq.quant.layout import has_channels_last, rows_of
from eagerq.quant.observer import merged_scalars
from eagerq.quant.plain_kernels import State, state_before
from eagerq.quant.quantizer import Quantizer
from eagerq.quant.settled import Settles

#: Values of the least sample of a batch whose quantizer and observer are left to compilers on CUDA; batches of 128 were measured.
FEWEST_FUSED = 2**13


def is_recomputing() -> bool:
    """Whether a backward runs a forward again (activation checkpointing): it must compute what the first did, and not learn."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class FakeQuantize(Settles, Quantizer):
    r"""Replaces each value by the real value of its code (see ``functional.fake_quantize``).

    In training an activation is quantized by the scale known before the batch, and its range learns from the batch in
    the same pass (as FP8 training's delayed scaling; Micikevicius et al., 2022, arXiv:2209.05433); a weight by its own
    range, of the moment. In eval the state never changes. While no range is known the input passes through, so a
    fresh QAT model evaluates as the float one.

    Args:
        spec: the grid and the observer.
        channels: number of channels with a scale each; None for one scale a tensor.
        axis: the channels' axis.
        memoryless: for weights: the scale is that of the tensor given, in eval too (there it is
            used but not stored), as long as the observer is enabled.

    A forward that activation checkpointing runs again, in the backward, computes what the first did and learns nothing. It knows
    the state before the last batch only: where a module is checkpointed twice before one backward, the first of the two is
    quantized again by the state of the second. ``torch.compile`` inside a checkpoint learns twice, as norms there do, and a
    checkpoint inside what is compiled computes again by the state after the batch.

    Buffers, of their final shape from the start: ``scale`` and ``zero_point`` ``(1,)`` or ``(channels,)``,
    and the observer's; ``scratch`` (int32, in no state_dict), in which a kernel's programs meet.
    ``fake_quant_enabled`` and ``observer_enabled`` are Python bools (torch.compile guards on them) which the state_dict
    holds under torch.ao's keys.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.memoryless:
            return self.of_weight(x)
        settled = self.settled()
        if settled is not None and settled.serves(x):
            return settled.call(x)
        if self.is_one_pass(x):
            out = self.of_activation(x)
            if not torch.compiler.is_compiling():
                self._settle_kernel(x)
            return out
        if self.profile is not None and not self.training and self.fake_quant_enabled and self.is_ready():
            return encode(x, self.spec, self.scale, self.zero_point, self.profile)
        if not self.learns:
            if not self.fake_quant_enabled or (self._may_look() and not self.is_ready()):
                return x
            return self._quantized(x, self.scale, self.zero_point, self._unknown())
        if is_recomputing():
            if self._before is None or not self.fake_quant_enabled:
                return x
            scale, zero_point, low, high = self._before
            return self._quantized(x, scale, zero_point, (low != 0) | (high != 0))
        out = x
        if self.fake_quant_enabled:
            self._remember()
            if torch.compiler.is_compiling():
                scale, zero_point, low, high = self._state_for(x)
                out = self._quantized(x, scale, zero_point, (low != 0) | (high != 0))
            else:
                out = self._quantized(x, self.scale, self.zero_point, self._unknown())
        self.observe(x)
        return out

    def _quantized(self, x: Tensor, scale: Tensor, zero_point: Tensor, known: Tensor | None) -> Tensor:
        spec, ndim = self.spec, x.dim()
        zero = None if spec.symmetric and not spec.fixed_zero_point else self.along_axis(zero_point, ndim)
        known = None if known is None else self.along_axis(known, ndim)
        return fake_quantize(x, self.along_axis(scale, ndim), zero, spec.quant_min, spec.quant_max, known)

    def is_one_pass(self, x: Tensor) -> bool:
        """Whether ``of_activation`` serves ``x``: a kernel, or a form that compilers make one of."""
        return (
            self.fake_quant_enabled
            and self.channels is None
            and not self.memoryless
            and (self.training or self.profile is None)
            and (torch.compiler.is_compiling() or (not is_transformed() and self._is_fast(x)))
        )

    def _is_fast(self, x: Tensor) -> bool:
        return (fast_kernels.are_fast(x) and self.has_kernels_state(x)) or self._is_fast_on_cpu(x)

    def has_kernels_state(self, x: Tensor) -> bool:
        """Whether the state is what kernels read, where x lies: they are given addresses."""
        scale, zero_point, low, high = self.state
        real = scale.dtype == low.dtype == high.dtype == torch.float32  # asked of each weight in each step: no loop
        return bool(real and zero_point.dtype == torch.int32 and scale.device == x.device)

    def _is_fast_on_cpu(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or type(x) is not Tensor or x.dtype != self.scale.dtype or not self.is_learned_by_kernels:
            return False
        if self.learns and is_recomputing():  # what the first forward took
            return self._before_was_fast
        return self._known or (self.is_ready() and self._known)

    @property
    def _keeps_ends(self) -> bool:
        """Whether the range is one of least and greatest values."""
        return self.spec.observer in ("min_max", "moving_average")

    @property
    def is_learned_by_kernels(self) -> bool:
        """Whether the observer needs the least and greatest value of this process's batch, and no more."""
        observer: Any = self._modules["activation_post_process"]
        return self._keeps_ends and (observer.ranks is None or observer.others() is None)

    def of_activation(self, x: Tensor, bounds: Bounds = (None, None)) -> Tensor:
        """What the forward makes of ``x.clamp(*bounds)``, in one pass; for where ``is_one_pass``."""
        if torch.compiler.is_compiling():
            return self._traced(x, bounds) if self._compilers_fuse(x, bounds) else self._by_kernel(x, bounds)
        return self._by_kernel(x, bounds) if fast_kernels.are_fast(x) else self._on_cpu(x, bounds)

    def _compilers_fuse(self, x: Tensor, bounds: Bounds) -> bool:
        """Whether to leave it to the compiler to fuse quantizer and observer with what is before and behind them.

        What learns nothing is elementwise. What learns was measured: this is the faster form in convnext_tiny, and the slower one
        behind the ReLUs of resnet50. It takes three launches more than the kernel, so small tensors lose by it.
        """
        if not (self.learns and fast_kernels.are_fast(x)):
            return True
        return bounds == (None, None) and bool(rows_of(x)) and math.prod(x.shape[1:]) >= FEWEST_FUSED

    def of_norm(self, norm: nn.Module, x: Tensor, bounds: Bounds = (None, None)) -> Tensor | None:
        """What the forward makes of ``norm(x).clamp(*bounds)``, in the two passes that the norm takes; None where its kernels do
        not serve.

        They serve where there are only ends to learn, and channels that lie side by side; how fast they read others has not
        been measured.

        Args:
            norm: PyTorch's own batch norm, as ``is_plain_norm`` says; its statistics learn.
        """
        learns = self.learns
        if not (fast_kernels.are_fast(x) and has_channels_last(x) and self.has_kernels_state(x) and self.is_one_pass(x)):
            return None
        if learns and not self._keeps_ends:
            return None
        state, by_kernel = self.state, self.is_learned_by_kernels
        scratch: Any = self._buffers["scratch"]
        if learns and is_recomputing():
            state = state_before(scratch) if by_kernel else self._before or state
            learns = False
        elif learns and not by_kernel:
            self._remember()
        rest = (bounds, self.constant, self._grid)
        out, kept = operators.batch_norm_activation(x, norm, state, scratch, learns, learns and by_kernel, *rest)
        if learns and not by_kernel:
            self.observe(kept[4:6])
        elif learns:
            self._note_observed()
        return out

    def norm_call(self, x: Tensor, norm: nn.Module, bounds: Bounds) -> operators.Call:
        """What ``of_norm`` does while nothing changes that it looks at; for where it ``may_settle``."""
        scratch: Any = self._buffers["scratch"]
        return operators.norm_call(x, norm, self.state, scratch, self.learns, bounds, self.constant, self._grid)

    def activation_call(self, x: Tensor, bounds: Bounds) -> operators.Call:
        """What ``of_activation`` does with what a kernel serves, while nothing changes that it looks at."""
        scratch: Any = self._buffers["scratch"]
        return operators.activation_call(x, self.state, scratch if self.learns else None, bounds, self.constant, self._grid)

    def gelu_call(self, x: Tensor) -> operators.Call:
        """What ``of_gelu`` does with what its kernel serves, while nothing changes that it looks at."""
        scratch: Any = self._buffers["scratch"]
        return operators.gelu_call(x, self.state, scratch if self.learns else None, self.constant, self._grid)

    def _settle_kernel(self, x: Tensor) -> None:
        """Remember that a kernel served x, if it did and would again."""
        if is_recomputing():
            return
        if type(self) is FakeQuantize and self.may_settle and fast_kernels.is_plain(x) and fast_kernels.are_fast(x):
            self.settle((), (self.activation_post_process,), None, x, self.activation_call(x, (None, None)))
        else:
            self.unsettle()

    @property
    def may_settle(self) -> bool:
        """Whether the next batch finds a kernel's state as this one, not empty, did: on one rank."""
        return not self.learns or (self.observed and self.is_learned_by_kernels and self.activation_post_process.ranks is None)

    def of_gelu(self, x: Tensor) -> Tensor | None:
        """What the forward makes of ``gelu(x)``, in one pass; None where its kernel does not serve: on other devices, or where
        there is more than ends to learn."""
        if torch.compiler.is_compiling():  # measured: the GELU that compilers fuse with its neighbours is the faster one
            return None
        if not (self.is_one_pass(x) and fast_kernels.are_fast(x) and self.has_kernels_state(x)):
            return None
        return self._by_kernel(x, (None, None), gelu=True) if self.is_learned_by_kernels or not self.learns else None

    def _by_kernel(self, x: Tensor, bounds: Bounds, gelu: bool = False) -> Tensor:
        state, scratch, learns, by_kernel = self.state, None, self.learns, self.is_learned_by_kernels
        if learns and is_recomputing():
            state = state_before(self.scratch) if by_kernel else self._before or state
            learns = False
        elif learns and by_kernel:
            scratch = self._buffers["scratch"]
        elif learns:
            self._remember()
        if gelu:
            out = operators.fake_quantize_gelu(x, state, scratch, self.constant, self._grid)
        else:
            out = operators.fake_quantize_activation(x, state, scratch, bounds, self.constant, self._grid)
        if learns and not by_kernel:
            self.observe(x, bounds)
        elif learns and x.numel():
            self._note_observed()
        return out

    def _traced(self, x: Tensor, bounds: Bounds) -> Tensor:
        spec, (scale, zero_point, low, high) = self.spec, (t.reshape(()) for t in self._state_for(x))
        known = (low != 0) | (high != 0)
        out = traced_fake_quantize(x, scale, zero_point, spec.quant_min, spec.quant_max, known, bounds)
        if self.learns:
            self.observe(x, bounds)
        return out

    def _state_for(self, x: Tensor) -> State:
        """What compiled code quantizes x by now: where a backward follows that asks for it, a copy."""
        if self.learns and torch.is_grad_enabled() and x.requires_grad:
            return operators.quantizer_state(self.state)
        return self.state

    def _on_cpu(self, x: Tensor, bounds: Bounds) -> Tensor:
        spec, learns, again = self.spec, self.learns, self.learns and is_recomputing()
        scale, zero_point, *_ = self._before if again and self._before is not None else self.state
        zero = None if spec.symmetric and not spec.fixed_zero_point else zero_point.reshape(())
        out = fake_quantize_on_cpu(x, scale.reshape(()), zero, spec.quant_min, spec.quant_max, bounds)
        if learns and not again and x.numel():
            self._learn_on_cpu(x, bounds)
        return out

    @torch.no_grad()
    def _learn_on_cpu(self, x: Tensor, bounds: Bounds) -> None:
        """``observe`` in Python's numbers: thirty operations on one value each take PyTorch as long as the tensor does."""
        self._remember()
        self._before_was_fast = True
        nearest = float32 if self.scale.dtype == torch.float32 else float
        scale, zero_point, min_val, max_val = self.state
        low, high = float(x.amin()), float(x.amax())
        for bound, tighter in zip(bounds, (max, min), strict=True):
            if bound is not None:  # the ends of what is clamped are the clamped ends
                low, high = tighter(low, nearest(bound)), tighter(high, nearest(bound))
        low, high = merged_scalars(float(min_val), float(max_val), low, high, self.constant, nearest)
        min_val.fill_(low)
        max_val.fill_(high)
        if low or high:
            new_scale, new_zero = scalar_params(self._grid, low, high, nearest)
            scale.fill_(new_scale)
            zero_point.fill_(new_zero)
        self._note_observed()

    def of_weight(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``x`` quantized by its own range, in ``dtype`` (``x``'s own if None)."""
        spec = self.spec
        learns = self.learns
        if learns and self.fake_quant_enabled and self._is_fast_weight(x):
            self._note_observed()
            return operators.fake_quantize_weight(x, self.state, self._grid, dtype or x.dtype)
        if learns:
            if not is_recomputing():  # else it has seen this weight
                self.observe(x)
            averaged = torch.compiler.is_compiling() and spec.observer != "min_max"  # else the backward asks for no scale
            scale, zero_point, *_ = self._state_for(x) if averaged else self.state
        else:
            scale, zero_point = self.params_for(x)
        if not self.fake_quant_enabled:
            return x
        own = learns and spec.observer == "min_max"  # nothing lies outside its own range
        zero = None if spec.symmetric and not spec.fixed_zero_point else self.along_axis(zero_point, x.dim())
        return fake_quantize(x, self.along_axis(scale, x.dim()), zero, spec.quant_min, spec.quant_max, clips=not own)

    def _is_fast_weight(self, x: Tensor) -> bool:
        return (
            self.channels is not None
            and self.axis == 0
            and self.spec.observer == "min_max"
            and bool(x.numel())
            and fast_kernels.are_fast(x)
            and self.has_kernels_state(x)
            and not is_transformed()
        )


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
