"""Steps of training by a kernel, bound to what they read.

Whether kernels serve is asked of some ten modules, which takes longer than to launch them. Here that is asked once; from then on
it is asked whether anything has changed that the answer rests on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.quant import fast_kernels
from eagerq.quant.layout import has_channels_last
from eagerq.quant.observer import Observer
from eagerq.quant.watched import Changes, Watched

#: What decides, of the attributes of modules, norms and activations.
_ATTRIBUTES = ("training", "qconfig", "momentum", "eps", "track_running_stats", "min_val", "max_val", "approximate")
#: What a module holds members in.
_MEMBERS = ("_modules", "_parameters", "_buffers")
#: What a module's kinds of hooks, and behind ``_global`` those on all modules, are held in.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_ALL = vars(torch.nn.modules.module)
_ON_ALL = [f"_global{kind}" for kind in _HOOKS]
#: Attributes that decide nothing: who has them asks hooks themselves.
_BOOKKEEPING = frozenset({"_settled", "_is_full_backward_hook"})
_members = dict.values
_END = object()


def _names(module: nn.Module) -> list[str]:
    """The attributes to look at: of a watched module, which is seldom looked at, all."""
    own = vars(module)
    if isinstance(module, Watched):
        return [name for name in own if name not in _BOOKKEEPING and name not in module.UNCOUNTED]
    return [name for name in (*_ATTRIBUTES, *_MEMBERS) if name in own]


class _Facts:
    """Modules whose types and attributes are the objects they were, with no hooks and no attribute more, such as a ``forward`` of
    one module's own. Of observers, which kernels do not call, hooks are not asked."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules, self._types = modules, [*map(type, modules)]
        self._spaces = [vars(module) for module in modules]
        self._sizes = [*map(len, self._spaces)]
        facts = [(vars(module), name) for module in modules for name in _names(module)]
        self._places, self._names = [place for place, _ in facts], [name for _, name in facts]
        self._values = [*map(getitem, self._places, self._names)]
        hooked = [vars(module) for module in modules if not isinstance(module, Observer)]
        self._hooked, self._hooks = [space for space in hooked for _ in _HOOKS], [*_HOOKS] * len(hooked)

    def hold(self) -> bool:
        """Whether they are."""
        if [*map(len, self._spaces)] != self._sizes:
            return False
        try:
            same = all(map(is_, map(getitem, self._places, self._names), self._values))
        except KeyError:
            return False
        return same and all(map(is_, map(type, self._modules), self._types)) and not any(map(getitem, self._hooked, self._hooks))


class Unchanged:
    """A module and its parts, whose types, attributes, parameters, buffers and members are the objects they were.

    No part has hooks, and none an attribute more. What ``Watched`` parts are is looked at again where one, of whichever module,
    has changed since. Members are compared always, and all of others.

    Args:
        owner: the module, whose hooks and parameters may be any; it is not held, since it holds this.
        parts: the others.
    """

    def __init__(self, owner: nn.Module, parts: list[nn.Module]) -> None:
        self._count = Changes.count
        own = vars(owner)
        self._size, self._own = len(own), [name for name in _names(owner) if name not in (*_HOOKS, "_parameters")]
        self._own_values = [own[name] for name in self._own]
        self._watches_owner = isinstance(owner, Watched)
        self._watched = _Facts([part for part in parts if isinstance(part, Watched)])
        self._others = _Facts([part for part in parts if not isinstance(part, Watched)])
        held = [own["_modules"], own["_buffers"], *(vars(part)[name] for part in parts for name in _MEMBERS)]
        self._held = [members for members in held if members]
        self._values = [*chain.from_iterable(map(_members, self._held)), _END]

    def holds(self, owner: nn.Module) -> bool:
        """Whether all of it is so."""
        count = Changes.count
        if count != self._count:
            if not (self._owner_holds(owner) and self._watched.hold()):
                return False
            self._count = count
        elif not (self._watches_owner or self._owner_holds(owner)):
            return False
        members = chain(chain.from_iterable(map(_members, self._held)), (_END,))  # the end tells that none is gone
        return all(map(is_, members, self._values)) and self._others.hold() and not any(map(_OF_ALL.__getitem__, _ON_ALL))

    def _owner_holds(self, owner: nn.Module) -> bool:
        own = vars(owner)
        try:
            return len(own) == self._size and all(map(is_, map(own.__getitem__, self._own), self._own_values))
        except KeyError:
            return False


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
        call: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        parts = [*parts]
        self._owner, self.call, self.with_norm = weakref.ref(owner), call, norm is not None
        self._cls = type(owner)
        self._methods = attrgetter(*computing) if computing else None
        self._computing = self._methods and self._methods(self._cls)
        self._unchanged = Unchanged(owner, parts)
        self._dtype, self._device, self._shape = x.dtype, x.get_device(), x.shape
        self._scales: list[Any] = [part._buffers["scale"] for part in (owner, *parts) if "scale" in part._buffers]
        held = () if norm is None else (*norm._parameters.values(), *norm._buffers.values())
        self._vectors = [t for t in held if t is not None and t.dim()]

    def holds(self, owner: nn.Module) -> bool:
        """Whether ``owner`` would come to these steps again."""
        return (
            self._owner() is owner
            and (self._methods is None or self._methods(self._cls) == self._computing)
            and torch._C._current_graph_task_id() == -1  # else a backward runs it again, and it must not learn
            and self._unchanged.holds(owner)
        )

    def serves(self, x: Tensor, with_norm: bool = False) -> bool:
        """Whether the steps may be given x, at the norm or behind it."""
        if with_norm is not self.with_norm or not fast_kernels.is_plain(x):
            return False
        device = self._device
        if x.dtype != self._dtype or x.get_device() != device:
            return False
        # a tensor whose data was exchanged is the object it was; kernels are given addresses
        for scale in self._scales:
            if scale.dtype != torch.float32 or scale.get_device() != device:
                return False
        return not with_norm or self._is_for_norm(x)

    def _is_for_norm(self, x: Tensor) -> bool:
        shape = x.shape
        if shape != self._shape:  # of other sizes it is asked anew: norms take not all
            return False
        width, device = shape[1:2], self._device
        for t in self._vectors:
            if not (fast_kernels.is_tensor(t) and t.shape == width and t.get_device() == device and t.is_contiguous()):
                return False
        return has_channels_last(x)


class Settles(nn.Module):
    """Mixin of modules that remember how their steps were settled; copies and pickles do not keep it."""

    def settled(self) -> Settled | None:
        """What this module came to before, if it would come to it again."""
        if torch.compiler.is_compiling():
            return None
        settled: Settled | None = self.__dict__.get("_settled")
        return settled if settled is not None and settled.holds(self) else None

    def settle(
        self, computing: tuple[str, ...], parts: Iterable[nn.Module], norm: nn.Module | None, x: Tensor,
        call: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        """Remember it; arguments as of ``Settled``."""
        self.__dict__["_settled"] = None  # so that its place is there when attributes are counted
        self.__dict__["_settled"] = Settled(self, computing, parts, norm, x, call)

    def unsettle(self) -> None:
        """Remember nothing."""
        self.__dict__.pop("_settled", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_settled"}  # type: ignore[no-untyped-call]
