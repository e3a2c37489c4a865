"""Activations that an integer engine runs as a kernel of its own, behind the linear map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq.nn.modules.activation import is_hooked
from eagerq.quant import fast_kernels
from eagerq.quant.code_functions import hardsigmoid_sum
from eagerq.quant.code_values import Coded
from eagerq.quant.codes import CodeTensor
from eagerq.quant.fake_quantize import FakeQuantize, is_recomputing
from eagerq.quant.functional import is_transformed
from eagerq.quant.layout import has_channels_last
from eagerq.quant.operators import (
    Call,
    batch_norm_gated,
    fake_quantize_gated,
    fake_quantize_sigmoid,
    gated_call,
    norm_gated_call,
    sigmoid_call,
)
from eagerq.quant.plain_kernels import state_before
from eagerq.quant.spec import QConfig

#: f(x) = x g(x), as the engine multiplies; torch's class of f, f and g.
_GATED: tuple[tuple[type[nn.Module], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (
    (nn.SiLU, F.silu, torch.sigmoid),
    (nn.Hardswish, F.hardswish, F.hardsigmoid),
)
#: Functions that are a table over the codes of their input.
_TABLED: tuple[tuple[type[nn.Module], Callable[[Tensor], Tensor] | None], ...] = (
    (nn.Sigmoid, torch.sigmoid),
    (nn.Hardsigmoid, F.hardsigmoid),
    (nn.LeakyReLU, None),
)


def _computes(act: nn.Module, function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a library's own activation is this function by another name; it is elementwise, or it would not be fused."""
    if next(act.parameters(), None) is not None or type(act).__module__.startswith("torch."):
        return False
    probe = torch.linspace(-8.0, 8.0, 129)
    with torch.no_grad():
        return torch.allclose(act(probe.clone()), function(probe), rtol=0.0, atol=1e-6)


def _gate_of(act: nn.Module) -> Callable[[Tensor], Tensor] | None:
    return next((g for kind, f, g in _GATED if type(act) is kind or _computes(act, f)), None)


def _squash_of(act: nn.Module) -> Callable[[Tensor], Tensor] | None:
    return next((f for kind, f in _TABLED if f is not None and (type(act) is kind or _computes(act, f))), None)


def _is_tabled(act: nn.Module) -> bool:
    return type(act) in [kind for kind, _ in _TABLED] or _squash_of(act) is not None


class SplitActivation(nn.Module):
    r"""``act`` of a quantized input; SiLU and Hardswish as :math:`Q(x)\,Q(g(Q(x)))`, where the config names their gate.

    The output is quantized by the module that holds this one. ``input_fake_quant`` quantizes what the linear map
    gives, ``gate_fake_quant`` the gate (None without one). ``squash`` is a sigmoid or hard sigmoid, which a kernel computes with
    the quantizers around it (None for other functions). Where the config names ``"hardsigmoid"``, a hard sigmoid is
    exported as :math:`x/6 + 1/2` if its quantizer clips as it does (``sums``).
    """

    gate_fake_quant: nn.Module | None

    def __init__(self, act: nn.Module, qconfig: QConfig, like: Tensor) -> None:
        super().__init__()
        self.act = act
        self.input_fake_quant: nn.Module = _quantizer(qconfig, like)
        gate = _gate_of(act)
        self.gate = gate if gate is not None and gate.__name__ in qconfig.gates else None
        self.gate_fake_quant = None if self.gate is None else _quantizer(qconfig, like)
        self.squash, self._squashes = _squash_of(act), type(act)
        self.sums = self._is_hard and "hardsigmoid" in qconfig.gates
        self.train(act.training)

    @property
    def _is_hard(self) -> bool:
        return self.gate is F.hardsigmoid or self.squash is F.hardsigmoid

    def _of(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function``, which may be a hard sigmoid, of x."""
        if self.sums and isinstance(x, CodeTensor) and isinstance(x.value, Coded):
            return CodeTensor(hardsigmoid_sum(x.value))
        if self.sums and torch.onnx.is_in_onnx_export():  # by its name, whatever the library calls it
            return F.hardsigmoid(x)
        if function is F.hardsigmoid and is_transformed():  # whose gradients have gradients, which PyTorch's own has not
            return F.relu6(x + 3) / 6
        return function(x)

    def in_one_pass(self, x: Tensor, quantizer: nn.Module | None) -> Tensor | None:
        """``quantizer(self(x))`` where a kernel serves a gate and its three quantizers, or a sigmoid and its two; None where none
        does."""
        quantizers = self._one_pass(x, quantizer)
        if quantizers is None:
            return None
        states, scratch, learns = self._given(quantizers, x)
        first, operator = quantizers[0], fake_quantize_sigmoid if self.gate is None else fake_quantize_gated
        return operator(x, states, scratch if learns else [], self._is_hard, first.constant, first.spec.grid)

    def of_norm(self, norm: nn.Module, x: Tensor, quantizer: nn.Module | None) -> Tensor | None:
        """``quantizer(self(norm(x)))`` of a gate in the passes that the norm takes; None where its kernels do not serve.

        Args:
            norm: PyTorch's own batch norm, as ``is_plain_norm`` says; its statistics learn.
        """
        quantizers = self._one_pass(x, quantizer) if self.gate is not None and has_channels_last(x) else None
        if quantizers is None:
            return None
        states, scratch, learns = self._given(quantizers, x)
        first = quantizers[0]
        return batch_norm_gated(x, norm, states, scratch, learns, self._is_hard, first.constant, first.spec.grid)

    def call(self, x: Tensor, quantizer: FakeQuantize, norm: nn.Module | None) -> Call | None:
        """What ``of_norm`` does, or without a norm ``in_one_pass``, while nothing changes that they look at; None where
        something does with each batch."""
        quantizers = self._around(quantizer)
        if not all(isinstance(q, FakeQuantize) and q.may_settle for q in quantizers):
            return None
        states: tuple[Any, ...] = tuple(q.state for q in quantizers)
        first, scratch = quantizers[0], [q.scratch for q in quantizers]
        learns, hard, constant, grid = first.learns, self._is_hard, first.constant, first.spec.grid
        if norm is None:
            bound = sigmoid_call if self.gate is None else gated_call
            return bound(x, states, scratch if learns else [], hard, constant, grid)
        return norm_gated_call(x, norm, states, scratch, learns, hard, constant, grid)

    def _around(self, quantizer: nn.Module | None) -> tuple[Any, ...]:
        """The quantizers of input, gate, if there is one, and result."""
        gates = () if self.gate is None else (self.gate_fake_quant,)
        return self.input_fake_quant, *gates, quantizer

    def _one_pass(self, x: Tensor, quantizer: nn.Module | None) -> tuple[FakeQuantize, ...] | None:
        """Those, if kernels may compute them together."""
        # compilers fuse a sigmoid themselves
        if self.gate is None and (self.squash is None or torch.compiler.is_compiling() or type(self.act) is not self._squashes):
            return None
        quantizers = self._around(quantizer)
        if not all(type(q) is FakeQuantize for q in quantizers):
            return None
        first = quantizers[0]
        like = (first.spec, first.learns)
        if not fast_kernels.are_fast(x) or any((q.spec, q.learns) != like or not q.is_one_pass(x) for q in quantizers):
            return None
        if not all(q.has_kernels_state(x) for q in quantizers):  # which compilers have not asked yet
            return None
        if first.learns and not all(q.is_learned_by_kernels for q in quantizers):
            return None
        return None if any(map(is_hooked, (self, self.act, *quantizers))) else quantizers

    @staticmethod
    def _given(quantizers: tuple[FakeQuantize, ...], x: Tensor) -> tuple[tuple[Any, ...], list[Tensor], bool]:
        """States, scratch memory, and whether the states learn."""
        scratch, learns = [q.scratch for q in quantizers], quantizers[0].learns
        if learns and is_recomputing():
            return tuple(map(state_before, scratch)), scratch, False
        if learns and x.numel():
            for q in quantizers:
                q.observed = True
        return tuple(q.state for q in quantizers), scratch, learns

    def forward(self, x: Tensor, *move: Callable[[Tensor], Tensor]) -> Tensor:
        x = self.input_fake_quant(x, *move)  # a fixed quantizer moves what it quantizes
        if self.gate is None or self.gate_fake_quant is None:
            return self._of(self.act, x)
        if _quantizes(self.gate_fake_quant):
            return x * self.gate_fake_quant(self._of(self.gate, x))  # type: ignore[no-any-return]
        if self.training:  # it may learn its range
            with torch.no_grad():
                self.gate_fake_quant(self.gate(x))
        return self.act(x)  # type: ignore[no-any-return]  # bit for bit what the float model computes


def _quantizes(quantizer: nn.Module) -> bool:
    if not isinstance(quantizer, FakeQuantize):  # deployed
        return True
    learns = quantizer.training and quantizer.observer_enabled
    return quantizer.fake_quant_enabled and (learns or quantizer.is_ready())


def _quantizer(qconfig: QConfig, like: Tensor) -> FakeQuantize:
    if qconfig.activation is None:
        raise ValueError("an activation is split between quantizers, but the qconfig has no spec for them")
    quantizer = FakeQuantize(qconfig.activation, device=like.device)
    return quantizer.double() if like.dtype == torch.float64 else quantizer


def split(act: nn.Module, qconfig: QConfig, like: Tensor) -> nn.Module:
    """``act``, split if the config asks for it and the activation is of a kind that can be and has no hooks of its own."""
    wanted = qconfig.split_activations and qconfig.activation is not None and qconfig.placement == "outputs"
    hooked = act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks
    if not wanted or hooked or (_gate_of(act) is None and not _is_tabled(act)):
        return act
    return SplitActivation(act, qconfig, like)
