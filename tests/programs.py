"""Random small nets as data: a Hypothesis strategy, the module that runs one, and the chains that truly exist in it.

Every value has the shape of the input, so that any wiring runs. ``Program.chains`` finds the chains by
simulating values and versions, without PyTorch; it is the slow, obvious twin of the planner.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import eagerq
from eagerq.nn import Conv2dSame, FrozenBatchNorm2d
from eagerq.nn.modules.activation import IDEMPOTENT
from tests.nets import C, randomise

SHAPE = (2, C, 4, 4)

#: How each kind of module is built.
KINDS: dict[str, Any] = {
    "conv": lambda: nn.Conv2d(C, C, 3, padding=1),
    "conv_grouped": lambda: nn.Conv2d(C, C, 3, padding=1, groups=2, bias=False, padding_mode="circular"),
    "conv_point": lambda: nn.Conv2d(C, C, 1, bias=False),
    "conv_same": lambda: Conv2dSame(C, C, 3),
    "conv_transpose": lambda: nn.ConvTranspose2d(C, C, 3, padding=1, groups=2),
    "linear": lambda: nn.Linear(SHAPE[3], SHAPE[3]),
    "bn": lambda: nn.BatchNorm2d(C),
    "bn_average": lambda: nn.BatchNorm2d(C, momentum=None, affine=False),
    "bn_eval": lambda: nn.BatchNorm2d(C).eval(),
    "bn_frozen": lambda: FrozenBatchNorm2d(C),
    "bn_act": lambda: timm.layers.BatchNormAct2d(C),
    "relu": lambda: nn.ReLU(),
    "relu_": lambda: nn.ReLU(inplace=True),
    "relu6_": lambda: nn.ReLU6(inplace=True),
    "hardswish_": lambda: nn.Hardswish(inplace=True),
    "leaky_": lambda: nn.LeakyReLU(0.1, inplace=True),
    "silu": lambda: nn.SiLU(),
    "prelu": lambda: nn.PReLU(C),
    "identity": lambda: nn.Identity(),
    "dropout": lambda: nn.Dropout(0.3),
}
_INPLACE = frozenset({"relu_", "relu6_", "hardswish_", "leaky_"})
_CONVS = tuple(k for k in KINDS if k.startswith("conv")) + ("linear",)
_NORMS = ("bn", "bn", "bn", "bn_average", "bn_eval", "bn_frozen", "bn_act")
_ACTS = ("relu", "relu_", "relu_", "relu6_", "hardswish_", "leaky_", "silu", "prelu")
_OTHERS = ("identity", "dropout")

#: Functions of one or two values; those that end in an underscore change their first argument.
FUNCTIONS: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "add_": lambda x, y: x.add_(y),
    "mean": lambda x, y: x * y.mean(),
    "relu_function": lambda x, y: F.relu(x),
    "relu_function_": lambda x, y: F.relu_(x),
    "views": lambda x, y: x.flatten(1).view(x.shape),
    "parts": lambda x, y: torch.cat(x.chunk(2, 1)[::-1], 1),
    "clone": lambda x, y: x.clone(),
    "scaled": lambda x, y: x * 0.5,
    "nothing": lambda x, y: x.contiguous().to(x.dtype),
}
_TWO = frozenset({"add", "add_", "mean"})


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``values.append(what(values[i], values[j]))``; ``what`` is a module's number or a function's name."""

    what: int | str
    sources: tuple[int, int]
    modes: tuple[bool, ...] = (True, False)


@dataclasses.dataclass(frozen=True)
class Program:
    """A net: kinds of modules, where and in which order they are registered, what runs, what is returned."""

    kinds: tuple[str, ...]
    places: tuple[int, ...]
    order: tuple[int, ...]
    aliased: frozenset[int]
    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    form: str
    reads_values: bool

    def build(self, seed: int = 0) -> RandomNet:
        """The net with random weights and norms, in train mode; the same for the same seed."""
        torch.manual_seed(seed)
        net = RandomNet(self)
        randomise(net, seed)
        return net

    # --- the truth

    def chains(self) -> set[tuple[tuple[str, ...], str, frozenset[str]]]:
        """(names, fused class, copied names) of the chains that exist."""
        net = self.build()
        names = {id(m): name for name, m in net.named_modules()}
        name = [names[id(net.at(i))] for i in range(len(self.kinds))]
        runs = [_Simulation(self, mode) for mode in (True, False)]
        table = eagerq.DEFAULT_PATTERNS.chains
        parts = [self._types(net.at(i)) for i in range(len(self.kinds))]
        shared = [i in self.aliased or max(len(run.calls[i]) for run in runs) > 1 for i in range(len(self.kinds))]
        order = sorted(range(len(self.kinds)), key=lambda i: issubclass(parts[i][0], (nn.BatchNorm2d, FrozenBatchNorm2d)))
        taken: set[int] = set()
        found = set()
        for first in order:
            if first in taken or shared[first]:
                continue
            if not any(run.calls[first] for run in runs):
                continue
            members = [first]
            best = ((first,), table[parts[first]].__name__) if parts[first] in table else None  # a norm that holds its activation
            while (following := self._link(members[-1], runs)) is not None:
                types = tuple(t for i in (*members, following) for t in parts[i])
                copied = shared[following]
                if copied and parts[following][0] not in IDEMPOTENT:
                    break
                if not any(chain[: len(types)] == types for chain in table) or following in taken:
                    break
                is_norm = issubclass(parts[following][0], (nn.BatchNorm2d, FrozenBatchNorm2d))
                if is_norm and self.kinds[members[-1]] == "linear":
                    break  # (N, C, H, W) has its channels on axis 1, a Linear's are on axis 3
                if not copied and any(len(run.calls[following]) != len(run.calls[first]) for run in runs):
                    break
                members.append(following)
                if types in table:
                    best = (tuple(members), table[types].__name__)
            if best is not None:
                taken.update(i for i in best[0] if not shared[i])
                found.add((tuple(name[i] for i in best[0]), best[1], frozenset(name[i] for i in best[0] if shared[i])))
        return found

    def _types(self, module: nn.Module) -> tuple[type, ...]:
        if isinstance(module, timm.layers.BatchNormAct2d):
            return (nn.BatchNorm2d, nn.ReLU)
        return (type(module),)

    def _link(self, module: int, runs: list[_Simulation]) -> int | None:
        """The module that alone reads what ``module`` gives, in every mode it runs in."""
        readers: set[int | None] = set()
        for run in runs:
            for value in run.calls[module]:
                seen = run.reads[value]
                alone = len(seen) == 1 and value not in run.leaving and isinstance(seen[0], int)
                readers.add(seen[0] if alone else None)
        return readers.pop() if len(readers) == 1 else None


class _Simulation:
    """Values as (object, version) in one mode: who reads them, which leave the net."""

    def __init__(self, program: Program, mode: bool) -> None:
        self.reads: dict[tuple[int, int], list[int | str]] = defaultdict(list)
        self.calls: dict[int, list[tuple[int, int]]] = defaultdict(list)
        versions = [0]
        objects = [0]

        def fresh() -> int:
            versions.append(0)
            return len(versions) - 1

        for instruction in program.instructions:
            what = instruction.what
            x, y = (objects[i] for i in instruction.sources)
            kind = program.kinds[what] if isinstance(what, int) else what
            if mode not in instruction.modes or kind in {"identity", "nothing"} or (kind == "dropout" and not mode):
                objects.append(x)
                continue
            reader: int | str = what if isinstance(what, int) and kind != "dropout" else kind
            self.reads[x, versions[x]].append(reader)
            if what in _TWO:
                self.reads[y, versions[y]].append(reader)
            if kind in _INPLACE or (isinstance(what, str) and what.endswith("_")):
                versions[x] += 1
                result = x
            else:
                result = fresh()
            if isinstance(reader, int):
                self.calls[reader].append((result, versions[result]))
            objects.append(result)
        if program.reads_values:
            self.reads[objects[1], versions[objects[1]]].append("sum")
        self.leaving = {(objects[i], versions[objects[i]]) for i in program.outputs}
        if program.form == "views":
            for i in program.outputs:
                self.reads[objects[i], versions[objects[i]]].append("getitem")


class Holder(nn.Module):
    """A child that only holds modules."""


class RandomNet(nn.Module):
    """Runs a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.left, self.right = Holder(), Holder()
        self.kept: Any = None
        self.unused = nn.Parameter(torch.zeros(1))
        modules = [KINDS[kind]() for kind in program.kinds]
        for i in program.order:
            [self, self.left, self.right][program.places[i]].add_module(f"m{i}", modules[i])
        for i in sorted(program.aliased):
            self.right.add_module(f"alias{i}", modules[i])

    def at(self, i: int) -> nn.Module:
        """Module number ``i``, or what stands in its place."""
        return getattr([self, self.left, self.right][self.program.places[i]], f"m{i}")

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for instruction in self.program.instructions:
            first, second = (values[i] for i in instruction.sources)
            if self.training not in instruction.modes:
                values.append(first)
            elif isinstance(instruction.what, int):
                values.append(self.at(instruction.what)(first))
            else:
                values.append(FUNCTIONS[instruction.what](first, second))
        if self.program.reads_values and bool(values[1].sum().isnan()):
            raise ValueError("NaN")
        results = [values[i] for i in self.program.outputs]
        match self.program.form:
            case "dict":
                return {"nested": [{"a": r} for r in results]}
            case "views":
                return [r[:, 1:] for r in results]
            case "self":
                self.kept = results[1:]
                return results[0]
            case _:
                return results[0] if len(results) == 1 else tuple(results)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Nets of 2 to 12 steps; most steps read the newest value, so that chains are common."""
    kinds: list[str] = []
    instructions: list[Instruction] = []
    n = draw(st.integers(2, 12))
    untouchable = {0}  # the input and its aliases: a leaf that requires a gradient cannot be changed in place
    previous = None
    while len(instructions) < n:
        newest = len(instructions)
        source = max(0, newest - draw(st.sampled_from((0, 0, 0, 0, 0, 0, 1, 2, 4))))
        other = draw(st.integers(0, newest))
        likely = {"conv": ("norm", "norm", "act"), "norm": ("act", "conv", "function"), "act": ("conv", "conv", "function")}
        group = draw(st.sampled_from(("conv", "norm", "act", "function", "other", *likely.get(previous, ("conv",)) * 4)))
        what: int | str
        if group == "function":
            what = kind = draw(st.sampled_from(tuple(FUNCTIONS)))
        else:
            kind = draw(st.sampled_from({"conv": _CONVS, "norm": _NORMS, "act": _ACTS, "other": _OTHERS}[group]))
            used = [i for i, k in enumerate(kinds) if k == kind]
            if used and draw(st.integers(0, 2)) == 0:
                what = draw(st.sampled_from(used))
            else:
                what = len(kinds)
                kinds.append(kind)
        if source in untouchable and (kind in _INPLACE or kind.endswith("_")):
            kinds = kinds[:-1] if isinstance(what, int) and what == len(kinds) - 1 and not _used(instructions, what) else kinds
            continue
        modes = draw(st.sampled_from(((True, False),) * 8 + ((True,), (False,))))
        if source in untouchable and (kind in {"identity", "nothing", "dropout"} or len(modes) < 2):
            untouchable.add(newest + 1)
        instructions.append(Instruction(what, (source, other), modes))
        previous = group
    extra = draw(st.lists(st.integers(1, n), max_size=2))
    count = len(kinds)
    return Program(
        tuple(kinds),
        tuple(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))),
        tuple(draw(st.permutations(range(count)))),
        frozenset(draw(st.sets(st.integers(0, count - 1), max_size=1)))
        if count and draw(st.integers(0, 3)) == 0
        else frozenset(),
        tuple(instructions),
        (n, *extra),
        draw(st.sampled_from(("tuple", "tuple", "dict", "views", "self"))),
        draw(st.integers(0, 9)) == 0,
    )


def _used(instructions: list[Instruction], module: int) -> bool:
    return any(i.what == module for i in instructions)


def described(program: Program) -> Iterator[str]:
    """The program as lines of code, for a failing example's report."""
    for number, i in enumerate(program.instructions, 1):
        name = f"m{i.what}:{program.kinds[i.what]}" if isinstance(i.what, int) else i.what
        condition = "" if len(i.modes) == 2 else f"  # only in {'train' if i.modes[0] else 'eval'}"
        yield f"v{number} = {name}(v{i.sources[0]}{f', v{i.sources[1]}' if i.what in _TWO else ''}){condition}"
    yield f"return {program.form} {program.outputs}"
