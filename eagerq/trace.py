"""What one forward did, as data."""

from __future__ import annotations

import dataclasses
import gc
import numbers
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.surgery import BOOKKEEPING

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


#: Where a module holds tensors and other modules.
_MEMBERS = frozenset({"_parameters", "_buffers", "_modules"})

#: How deep the stacks of modes are that see functions and operators.
Modes = tuple[int, int]
#: Gradient mode, number of the checkpoint region (0 is none), and autocast: how deep, and to what on which kinds of device;
#: modes.
Context = tuple[bool, int, tuple[Any, ...], Modes]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a leaf module or a function, in order of time.

    Attributes:
        index: position in ``Trace.calls``.
        name: full module name, or the function's name.
        is_module: whether ``name`` is a module.
        inputs, outputs: values read and given, by number.
        parent: innermost module the call happened in.
        constants: numbers, strings and the like among a function's arguments.
    """

    index: int
    name: str
    is_module: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parent: str
    constants: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"module {self.name!r}" if self.is_module else f"function {self.name} in {self.parent or 'the model'!r}"


@dataclasses.dataclass(frozen=True)
class Exit:
    """A module returned a value as its whole output; ``index`` is the number of calls before."""

    name: str
    index: int


@dataclasses.dataclass(frozen=True)
class Returned:
    """A tensor in what a model returned, by the number of its value."""

    value: int


@dataclasses.dataclass
class Trace:
    """What one forward did.

    Attributes:
        calls: of leaf modules and functions.
        counts: calls of every module, by full name.
        readers: for each value the calls that read it, once for each argument.
        producer: for each value the call that made it.
        exits: for each value the modules that returned it, innermost first.
        inputs, outputs: values the model was given, and those found in what it returned.
        returned: what it returned, flat: types, keys, plain values and ``Returned`` ones, in order.
        arguments: for values given directly, the position (``"0"``) or keyword of the argument.
        kept: values alive after the forward that the output does not show.
        named: for values that were parameters or buffers when it began, their full names.
        shapes: of each value.
        training, gradients: the mode it was watched in.
        rewritten: values whose tensors were changed in place afterwards.
        parameter_readers: for each parameter (by name) that something outside leaf modules read, the first such call.
        contexts: for each leaf module what it ran in: gradient mode, checkpoint region, autocast, modes.
        changed_inputs, changed_outputs: leaf modules whose own hooks changed what they were given, or gave.
        settings: of leaf modules and what is in them, the plain attributes at each call (``training``, ``momentum``).
        reassigned: for leaf modules that ran with another tensor than theirs, put in its place by the forward, its name.
        elsewhere: modules that ran in other threads, where what is read is not seen.
        transformed: leaf modules that ran under ``torch.vmap`` or a transform of ``torch.func``, where that is not seen either.
        unlike_data: whether shapes alone may have gone another way than data: an autocast of the model's own, which casts
            nothing there, a question for the device, or a function that failed and the model went on.
    """

    calls: list[Call] = dataclasses.field(default_factory=list)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    readers: dict[int, list[Call]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    producer: dict[int, Call] = dataclasses.field(default_factory=dict)
    exits: dict[int, list[Exit]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    inputs: tuple[int, ...] = ()
    arguments: dict[int, str] = dataclasses.field(default_factory=dict)
    outputs: frozenset[int] = frozenset()
    returned: tuple[Hashable, ...] = ()
    kept: frozenset[int] = frozenset()
    named: dict[int, str] = dataclasses.field(default_factory=dict)
    shapes: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    rewritten: frozenset[int] = frozenset()
    training: bool = False
    gradients: bool = True
    parameter_readers: dict[str, Call] = dataclasses.field(default_factory=dict)
    contexts: dict[str, set[Context]] = dataclasses.field(default_factory=lambda: defaultdict(set))
    changed_inputs: set[str] = dataclasses.field(default_factory=set)
    changed_outputs: set[str] = dataclasses.field(default_factory=set)
    settings: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    reassigned: dict[str, str] = dataclasses.field(default_factory=dict)
    transformed: set[str] = dataclasses.field(default_factory=set)
    elsewhere: set[str] = dataclasses.field(default_factory=set)
    unlike_data: bool = False

    def calls_of(self, name: str) -> list[Call]:
        """The calls of a leaf module."""
        return self._by_name.get(name, [])

    @property
    def _by_name(self) -> dict[str, list[Call]]:
        cached: dict[str, list[Call]] | None = self.__dict__.get("_index")
        if cached is None:
            cached = defaultdict(list)
            for call in self.calls:
                if call.is_module:
                    cached[call.name].append(call)
            self.__dict__["_index"] = cached
        return cached


def tensors_in(obj: Any, deep: bool = False, _seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, sets and mappings; with ``deep``, in whatever else an object holds too.

    That is its attributes and slots, the items of an iterator or deque, and what a function closes over.
    """
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, Mapping):
        for value in obj.values():
            yield from tensors_in(value, deep, _seen)
    elif isinstance(obj, (list, tuple, set, frozenset)):
        for value in obj:
            yield from tensors_in(value, deep, _seen)
    elif deep and not isinstance(obj, (*_PLAIN, type, types.ModuleType)):
        seen = set() if _seen is None else _seen
        if id(obj) not in seen:
            seen.add(id(obj))
            for part in _held(obj):
                yield from tensors_in(part, deep, seen)


def _held(obj: Any) -> list[Any]:
    """What an object refers to; of a function not the names it is defined among, of a module not its hooks."""
    if isinstance(obj, nn.Module):
        return [value for key, value in vars(obj).items() if key not in BOOKKEEPING or key in _MEMBERS]
    if not isinstance(obj, types.FunctionType):
        return gc.get_referents(obj)
    return [*gc.get_referents(*(obj.__closure__ or ())), obj.__defaults__, obj.__kwdefaults__, vars(obj)]


def plain_in(obj: Any) -> Iterator[str]:
    """The plain values in nested lists, tuples, mappings and slices, as text."""
    if isinstance(obj, (*_PLAIN, numbers.Number)):  # NumPy's too
        yield repr(obj)
    elif isinstance(obj, Mapping):
        for key, value in obj.items():
            yield repr(key)
            yield from plain_in(value)
    elif isinstance(obj, (list, tuple)):
        for value in obj:
            yield from plain_in(value)
    elif isinstance(obj, slice):
        yield from plain_in((obj.start, obj.stop, obj.step))


def outline(obj: Any, number: Callable[[Tensor], int]) -> Iterator[Hashable]:
    """``obj`` flat, as ``Trace.returned`` has it; floats, which may be times, and the order of sets are left out."""
    if isinstance(obj, Tensor):
        yield Returned(number(obj))
    elif isinstance(obj, Mapping):
        yield type(obj), len(obj)
        for key, value in obj.items():
            yield from outline(key, number)
            yield from outline(value, number)
    elif isinstance(obj, (list, tuple)):
        yield type(obj), len(obj)
        for value in obj:
            yield from outline(value, number)
    elif isinstance(obj, _PLAIN):
        yield "a float" if isinstance(obj, (float, complex)) else repr(obj)
    else:
        yield type(obj), sum(1 for _ in tensors_in(obj, deep=True))


def upwards(name: str) -> Iterator[str]:
    """A module's full name, its parent's, and so on, the model's own left out."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module by name."""
    return {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float)) and key[0] != "_"}
