"""What one forward did, as data."""

from __future__ import annotations

import dataclasses
import types
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a leaf module or a function, in order of time.

    Attributes:
        index: position in ``Trace.calls``.
        name: full module name, or the function's name.
        is_module: whether ``name`` is a module.
        inputs, outputs: values read and given, by number.
        parent: innermost module the call happened in.
    """

    index: int
    name: str
    is_module: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parent: str

    def __str__(self) -> str:
        return f"module {self.name!r}" if self.is_module else f"function {self.name} in {self.parent or 'the model'!r}"


@dataclasses.dataclass(frozen=True)
class Exit:
    """A module returned a value as its whole output; ``index`` is the number of calls before."""

    name: str
    index: int


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
        arguments: for values given directly, the position (``"0"``) or keyword of the argument.
        kept: values alive after the forward that the output does not show.
        shapes: of each value.
        rewritten: values whose tensors were changed in place afterwards.
        parameter_readers: for each parameter (by name) that something outside leaf modules read, the first such call.
        contexts: for each leaf module the gradient modes and checkpoint regions it ran in.
        changed_inputs, changed_outputs: leaf modules whose own hooks changed what they were given, or gave.
    """

    calls: list[Call] = dataclasses.field(default_factory=list)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    readers: dict[int, list[Call]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    producer: dict[int, Call] = dataclasses.field(default_factory=dict)
    exits: dict[int, list[Exit]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    inputs: tuple[int, ...] = ()
    arguments: dict[int, str] = dataclasses.field(default_factory=dict)
    outputs: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()
    shapes: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    rewritten: frozenset[int] = frozenset()
    training: bool = False
    parameter_readers: dict[str, Call] = dataclasses.field(default_factory=dict)
    contexts: dict[str, set[tuple[bool, int]]] = dataclasses.field(default_factory=lambda: defaultdict(set))
    changed_inputs: set[str] = dataclasses.field(default_factory=set)
    changed_outputs: set[str] = dataclasses.field(default_factory=set)

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
    """The tensors in nested lists, tuples, sets and mappings; with ``deep``, in objects' attributes too."""
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, Mapping):
        for value in obj.values():
            yield from tensors_in(value, deep, _seen)
    elif isinstance(obj, (list, tuple, set, frozenset)):
        for value in obj:
            yield from tensors_in(value, deep, _seen)
    elif deep and hasattr(obj, "__dict__") and not isinstance(obj, (type, nn.Module, types.ModuleType, types.FunctionType)):
        seen = set() if _seen is None else _seen
        if id(obj) not in seen:
            seen.add(id(obj))
            yield from tensors_in(vars(obj), deep, seen)
