"""The chains that truly exist in a random program, by simulating values and versions, without PyTorch.

The slow, obvious twin of the planner, and of what a guard refuses.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import timm.layers
from torch import nn

import eagerq
from eagerq.nn import FrozenBatchNorm2d
from eagerq.nn.modules.activation import IDEMPOTENT
from tests.programs import INPLACE, TWO, Program

Chain = tuple[tuple[str, ...], str, frozenset[str]]
NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


class Truth:
    """What a program does with the given values of its flag, in train and in eval mode."""

    def __init__(self, program: Program, flags: Sequence[bool]) -> None:
        net = program.build()
        names = {id(m): name for name, m in net.named_modules()}
        self.program = program
        self.name = [names[id(net.at(i))] for i in range(len(program.kinds))]
        self.runs = [_Simulation(program, mode, flag) for mode in (True, False) for flag in flags]
        self.parts = [_types(net.at(i)) for i in range(len(program.kinds))]
        self.shared = [i in program.aliased or max(len(run.calls[i]) for run in self.runs) > 1 for i in range(len(program.kinds))]

    def chains(self) -> set[Chain]:
        """(names, fused class, copied names) of the chains that exist."""
        table = eagerq.DEFAULT_PATTERNS.chains
        parts, shared, runs, name = self.parts, self.shared, self.runs, self.name
        order = sorted(range(len(parts)), key=lambda i: issubclass(parts[i][0], NORMS))
        first_call = {i: n for run in reversed(runs) for n, i in reversed(list(enumerate(run.order)))}
        order.sort(key=lambda i: (issubclass(parts[i][0], NORMS), first_call.get(i, 10**6 + i)))
        taken: set[int] = set()
        found = set()
        for first in order:
            if first in taken or shared[first] or not any(run.calls[first] for run in runs):
                continue
            members = [first]
            best = ((first,), table[parts[first]].__name__) if parts[first] in table else None  # a norm that holds its activation
            while (following := self._link(members[-1])) is not None and following not in taken:
                types = tuple(t for i in (*members, following) for t in parts[i])
                if not any(chain[: len(types)] == types for chain in table) or not self._may_follow(members, following):
                    break
                members.append(following)
                if types in table:
                    best = (tuple(members), table[types].__name__)
            if best is not None:
                taken.update(i for i in best[0] if not shared[i])
                found.add((tuple(name[i] for i in best[0]), best[1], frozenset(name[i] for i in best[0] if shared[i])))
        return found

    def _link(self, module: int) -> int | None:
        """The module that alone reads what ``module`` gives, wherever it runs."""
        readers: set[int | None] = set()
        for run in self.runs:
            for value in run.calls[module]:
                readers.add(run.only_reader(value))
        return readers.pop() if len(readers) == 1 else None

    def _may_follow(self, members: list[int], following: int) -> bool:
        """Whether nothing but the wiring speaks against this next member."""
        hooks, last = self.program.hooks, members[-1]
        is_norm = issubclass(self.parts[following][0], NORMS)
        if self.shared[following]:
            if self.parts[following][0] not in IDEMPOTENT or {(following, "pre"), (following, "post")} & hooks:
                return False
        elif any(len(run.calls[following]) != len(run.calls[members[0]]) for run in self.runs):
            return False
        if (last, "post") in hooks or (following, "pre") in hooks:
            return False  # it would see another tensor, or none
        if len(members) > 1 and (last, "pre") in hooks:
            return False
        if is_norm and self.program.kinds[last] == "linear":
            return False  # (N, C, H, W) has its channels on axis 1, a Linear's are on axis 3
        for run in self.runs:
            before, after = run.contexts[last], run.contexts[following]
            if not is_norm and not any(run.rewritten(value) for value in run.calls[following]):
                # no statistics, which a checkpoint would update twice, and no result that changes while autograd keeps it
                before, after = ({gradients for gradients, _ in c} for c in (before, after))
            if not before <= after:
                return False
        return True

    def holds(self, chain: Chain, mode: bool) -> bool:
        """Whether a chain that was fused survives these runs in one mode: its members run one after the other, or not at all."""
        names, _, copied = chain
        members = [self.name.index(n) for n in names]
        for run in [run for run in self.runs if run.mode is mode]:
            for a, b in itertools.pairwise(members):
                if any(run.only_reader(value) != b for value in run.calls[a]):
                    return False
                if self.name[b] not in copied and len(run.calls[a]) != len(run.calls[b]):
                    return False
        return True


def _types(module: nn.Module) -> tuple[type, ...]:
    if isinstance(module, timm.layers.BatchNormAct2d):
        return (nn.BatchNorm2d, nn.ReLU)
    return (type(module),)


class _Simulation:
    """Values as (object, version) in one run: who reads them, which leave the net."""

    def __init__(self, program: Program, mode: bool, flag: bool) -> None:
        self.program, self.mode = program, mode
        self.reads: dict[tuple[int, int], list[int | str]] = defaultdict(list)
        self.calls: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.contexts: dict[int, set[tuple[bool, int]]] = defaultdict(set)
        self.order: list[int] = []
        self.versions = [0]
        self.views: dict[int, int] = {}  # objects with the memory of others
        objects = [0]
        for number, instruction in enumerate(program.instructions, 1):
            x, y = (objects[i] for i in instruction.sources)
            if mode in instruction.modes and flag in instruction.flags:
                context = (instruction.context != "no_grad", number if instruction.context == "checkpoint" else 0)
                for what in instruction.steps():
                    x = self._step(what, x, y, context)
            objects.append(x)
        if program.reads_values:
            self.reads[self._value(objects[1])].append("sum")
        self.leaving = {self._value(objects[i]) for i in program.outputs}
        if program.form == "views":
            for i in program.outputs:
                self.reads[self._value(objects[i])].append("getitem")

    def _value(self, x: int) -> tuple[int, int]:
        return x, self.versions[x]

    def _fresh(self) -> int:
        self.versions.append(0)
        return len(self.versions) - 1

    def _step(self, what: int | str, x: int, y: int, context: tuple[bool, int]) -> int:
        """The object that a module or function gives."""
        hooks = self.program.hooks
        kind = self.program.kinds[what] if isinstance(what, int) else what
        if kind in {"identity", "nothing"} or (kind == "dropout" and not self.mode):
            return x
        reader: int | str = what if isinstance(what, int) and kind != "dropout" else kind
        self.reads[self._value(x)].append(reader)
        if what in TWO:
            self.reads[self._value(y)].append(reader)
        inplace = kind in INPLACE or (isinstance(what, str) and what.endswith("_"))
        result = x if inplace and (what, "pre") not in hooks else self._fresh()
        if result == x:
            self.versions[x] += 1
        elif kind == "views":
            self.views[result] = self.views.get(x, x)
        if (what, "post") in hooks:
            result = self._fresh()
        if isinstance(reader, int):
            self.calls[reader].append(self._value(result))
            self.contexts[reader].add(context)
            self.order.append(reader)
        return result

    def rewritten(self, value: tuple[int, int]) -> bool:
        """Whether something changes it in place afterwards, itself or through a view."""
        return value[1] < self.versions[value[0]] or any(
            base == value[0] and self.versions[view] for view, base in self.views.items()
        )

    def only_reader(self, value: tuple[int, int]) -> int | None:
        """The module that alone reads a value which does not leave the net."""
        seen = self.reads[value]
        (reader,) = seen if len(seen) == 1 else (None,)
        return reader if isinstance(reader, int) and value not in self.leaving else None
