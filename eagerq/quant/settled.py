"""Steps of training by a kernel, bound to what they read.

Whether kernels serve is asked of some ten modules, which takes longer than to launch them. Here that is asked once; from then on
it is asked whether anything has changed that the answer rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.quant import fast_kernels
from eagerq.quant.plain_kernels import has_channels_last

#: What decides, of the attributes of modules, quantizers, observers, norms and activations.
_ATTRIBUTES = (
    "training", "fake_quant_enabled", "observer_enabled", "observed", "spec", "ranks",
    "momentum", "eps", "track_running_stats", "gate", "squash", "min_val", "max_val", "approximate",
)  # fmt: skip


class Unchanged:
    """Modules whose types, attributes, parameters, buffers and members are the objects they were, and that have no hooks.

    Nor have they an attribute more, such as a ``forward`` of one module's own.

    Args:
        owner: whose hooks and parameters may be any.
        parts: the others.
    """

    def __init__(self, owner: nn.Module, parts: Iterable[nn.Module]) -> None:
        self._modules = [owner, *parts]
        self._types = [*map(type, self._modules)]
        self._spaces = [vars(module) for module in self._modules]
        self._sizes = [*map(len, self._spaces)]
        of_all = torch.nn.modules.module
        self._hooks: list[Any] = [
            of_all._global_forward_hooks, of_all._global_forward_pre_hooks, of_all._global_backward_hooks,
            of_all._global_backward_pre_hooks,
        ]  # fmt: skip
        facts: list[tuple[Any, str]] = []
        for module, space in zip(self._modules, self._spaces, strict=True):
            facts += [(space, name) for name in _ATTRIBUTES if name in space]
            facts += [(held, name) for held in (module._modules, module._buffers) for name in held]
            if module is not owner:
                facts += [(module._parameters, name) for name in module._parameters]
                self._hooks += (
                    module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
                )  # fmt: skip
        self._places, self._names = [place for place, _ in facts], [name for _, name in facts]
        self._values = [*map(getitem, self._places, self._names)]

    def holds(self) -> bool:
        """Whether all of it is so."""
        if any(self._hooks) or [*map(len, self._spaces)] != self._sizes:
            return False
        try:
            same = all(map(is_, map(getitem, self._places, self._names), self._values))
        except KeyError:
            return False
        return same and all(map(is_, map(type, self._modules), self._types))


class Settled:
    """Steps that one module comes to in training, of tensors of one dtype on one device.

    Args:
        owner: the module; a copy of it has none of this, nor has a replica that shares its attributes.
        computing: methods of its class that say what it computes.
        parts: the other modules that take part.
        norm: the batch norm that is the first of the steps, or None.
        x: what the steps were given.
        call: the steps.
    """

    def __init__(
        self, owner: nn.Module, computing: tuple[str, ...], parts: Iterable[nn.Module], norm: nn.Module | None, x: Tensor,
        call: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.owner, self.call, self.with_norm = owner, call, norm is not None
        self._cls = type(owner)
        self._methods = attrgetter(*computing)
        self._computing = self._methods(self._cls)
        self._unchanged = Unchanged(owner, parts)
        self._dtype, self._device, self._shape = x.dtype, x.get_device(), x.shape
        held = () if norm is None else (*norm._parameters.values(), *norm._buffers.values())
        self._vectors = [t for t in held if t is not None and t.dim()]

    def holds(self, owner: nn.Module) -> bool:
        """Whether ``owner`` would come to these steps again."""
        return (
            owner is self.owner
            and self._methods(self._cls) == self._computing
            and torch._C._current_graph_task_id() == -1  # else a backward runs it again, and it must not learn
            and self._unchanged.holds()
        )

    def serves(self, x: Tensor, with_norm: bool = False) -> bool:
        """Whether the steps may be given x, at the norm or behind it."""
        if with_norm is not self.with_norm or not fast_kernels.is_plain(x):
            return False
        if x.dtype != self._dtype or x.get_device() != self._device:
            return False
        return not with_norm or self._is_for_norm(x)

    def _is_for_norm(self, x: Tensor) -> bool:
        shape, device = x.shape, self._device
        if shape != self._shape:
            channels = shape[1] if len(shape) == len(self._shape) else 0
            if channels != self._shape[1] or not channels < x.numel() < 2**30 * channels:  # see ``is_plain_norm``
                return False
            self._shape = shape
        # a parameter whose data was exchanged is the object it was; kernels are given addresses
        width = shape[1:2]
        if not all(t.shape == width and t.get_device() == device and t.is_contiguous() for t in self._vectors):
            return False
        return has_channels_last(x)


class Settles:
    """Mixin of modules that remember how their steps were settled; copies and pickles do not keep it."""

    def settled(self) -> Settled | None:
        """What this module came to before, if it would come to it again."""
        if torch.compiler.is_compiling():
            return None
        settled: Settled | None = self.__dict__.get("_settled")
        return settled if settled is not None and settled.holds(self) else None  # type: ignore[arg-type]

    def settle(
        self, computing: tuple[str, ...], parts: Iterable[nn.Module], norm: nn.Module | None, x: Tensor,
        call: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        """Remember it; arguments as of ``Settled``."""
        self.__dict__["_settled"] = None  # so that its place is there when attributes are counted
        self.__dict__["_settled"] = Settled(self, computing, parts, norm, x, call)  # type: ignore[arg-type]

    def unsettle(self) -> None:
        """Remember nothing."""
        self.__dict__.pop("_settled", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_settled"}  # type: ignore[misc]
