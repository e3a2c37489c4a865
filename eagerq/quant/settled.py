"""Steps of training by a kernel, bound to what they read.

Whether kernels serve is asked of some ten modules, which takes longer than to launch them. Here that is asked once; from then on
it is asked whether anything has changed that the answer rests on.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.quant import fast_kernels
from eagerq.quant.layout import has_channels_last
from eagerq.quant.memory import address
from eagerq.quant.observer import Observer
from eagerq.quant.operators import Call

#: What decides, of the attributes of modules, quantizers, norms and activations, and of observers.
_ATTRIBUTES = (
    "training", "fake_quant_enabled", "observer_enabled", "observed", "spec", "qconfig",
    "momentum", "eps", "track_running_stats", "gate", "squash", "min_val", "max_val", "approximate", "profile",
)  # fmt: skip
_OF_OBSERVERS = ("ranks",)
#: What a module holds members in.
_MEMBERS = ("_modules", "_parameters", "_buffers")
#: What a module's kinds of hooks, and behind ``_global`` those on all modules, are held in.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_members = dict.values
_dtype = attrgetter("dtype")
_size, _lies_together = Tensor.size, Tensor.is_contiguous
_END = object()

class Unchanged:
    """A module and its parts, whose attributes, parameters, buffers and members are the objects they were, and the parts' types.

    No part has hooks, and none an attribute more, such as a ``forward`` of one module's own.

    Args:
        owner: the module, whose hooks and parameters may be any; it is not held, since it holds this.
        parts: the others. Of observers, which kernels do not call, only what they hold is asked.
    """

    def __init__(self, owner: nn.Module, parts: Iterable[nn.Module]) -> None:
        own = vars(owner)
        self._size, self._own = len(own), [*(name for name in _ATTRIBUTES if name in own), "_modules", "_buffers"]
        self._own_values = [own[name] for name in self._own]
        facts: list[tuple[dict[str, Any], str]] = []
        dicts, called = [own["_modules"], own["_buffers"]], []
        for part in parts:
            space = vars(part)
            names = _OF_OBSERVERS if isinstance(part, Observer) else _ATTRIBUTES
            full = [name for name in _MEMBERS if space[name]]
            facts += [(space, name) for name in (*names, *full) if name in space]
            dicts += [space[name] for name in full]
            if not isinstance(part, Observer):
                called.append(part)
        self._places, self._names = [place for place, _ in facts], [name for _, name in facts]
        self._values = [*map(getitem, self._places, self._names)]
        self._dicts = [members for members in dicts if members]
        self._members = [*self._all_members()]
        self._parts, self._types, self._spaces = called, [*map(type, called)], [*map(vars, called)]
        self._sizes = [*map(len, self._spaces)]
        hooks = [(vars(torch.nn.modules.module), f"_global{kind}") for kind in _HOOKS]
        hooks += [(space, kind) for space in self._spaces for kind in _HOOKS]
        self._hooked, self._hooks = [place for place, _ in hooks], [name for _, name in hooks]

    def _all_members(self) -> Iterable[Any]:
        """By way of the dicts themselves: looked up by name they take longer than all else. The end tells that none is gone."""
        return chain(chain.from_iterable(map(_members, self._dicts)), (_END,))

    def holds(self, owner: nn.Module) -> bool:
        """Whether all of it is so."""
        own = vars(owner)
        if len(own) != self._size or [*map(len, self._spaces)] != self._sizes:
            return False
        try:
            same = all(map(is_, map(getitem, self._places, self._names), self._values))
            same = same and all(map(is_, map(own.__getitem__, self._own), self._own_values))
        except KeyError:
            return False
        if not (same and all(map(is_, self._all_members(), self._members))):
            return False
        return all(map(is_, map(type, self._parts), self._types)) and not any(map(getitem, self._hooked, self._hooks))


class Settled:
    """Steps that one module comes to in training, of tensors of one dtype on one device, and at a norm of one shape.

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
        call: Call,
    ) -> None:  # fmt: skip
        self._owner, self.call, self.with_norm = weakref.ref(owner), call.run, norm is not None
        self._cls = type(owner)
        self._methods = attrgetter(*computing) if computing else None
        self._computing = self._methods and self._methods(self._cls)
        self._unchanged = Unchanged(owner, parts)
        self._dtype, self._device, self._shape = x.dtype, x.get_device(), x.shape
        self._held, self._addresses = call.held.tensors, call.held.addresses
        self._kinds, self._dtypes = [*map(type, self._held)], [*map(_dtype, self._held)]
        self._vectors = [t for t in self._held if norm is not None and t.numel() > 1]
        self._sizes = [*map(_size, self._vectors)]

    def holds(self, owner: nn.Module) -> bool:
        """Whether ``owner`` would come to these steps again."""
        return (
            self._owner() is owner
            and type(owner) is self._cls
            and (self._methods is None or self._methods(self._cls) == self._computing)
            and self._unchanged.holds(owner)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # to a module of a user's own, which copies or pickles all that it holds

    def serves(self, x: Tensor, with_norm: bool = False) -> bool:
        """Whether the steps may be given x, at the norm or behind it."""
        owner = self._owner()
        if owner is None or owner.__dict__.get("_settled") is not self:  # forgotten on the way to x
            return False
        if with_norm is not self.with_norm or not fast_kernels.is_plain(x):
            return False
        if x.dtype != self._dtype or x.get_device() != self._device:
            return False
        # a tensor whose data or class was exchanged is the object it was; kernels are given addresses
        held = self._held
        if [*map(address, held)] != self._addresses or [*map(_dtype, held)] != self._dtypes or [*map(type, held)] != self._kinds:
            return False
        if not with_norm:
            return True
        # another view of a vector's memory may begin where it did
        if [*map(_size, self._vectors)] != self._sizes or not all(map(_lies_together, self._vectors)):
            return False
        return x.shape == self._shape and has_channels_last(x)  # of other sizes it is asked anew


class Settles(nn.Module):
    """Mixin of modules that remember how their steps were settled; copies and pickles do not keep it."""

    def settled(self) -> Settled | None:
        """What this module came to before, if it would come to it again."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return None  # a backward that runs it again must not learn
        settled: Settled | None = self.__dict__.get("_settled")
        if settled is None or settled.holds(self):
            return settled
        self.unsettle()  # it would hold what is no longer used
        return None

    def settle(
        self, computing: tuple[str, ...], parts: Iterable[nn.Module], norm: nn.Module | None, x: Tensor,
        call: Call,
    ) -> None:  # fmt: skip
        """Remember it; arguments as of ``Settled``."""
        self.__dict__["_settled"] = None  # so that its place is there when attributes are counted
        self.__dict__["_settled"] = Settled(self, computing, parts, norm, x, call)

    def unsettle(self) -> None:
        """Remember nothing; also where what runs next is not this library's, and may change what was asked before it."""
        if not torch.compiler.is_compiling():
            self.__dict__.pop("_settled", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_settled"}  # type: ignore[no-untyped-call]
