"""Random small nets as data: a Hypothesis strategy, and the module that runs one.

Every value has the shape of the input, so that any wiring runs. The chains that truly exist in a
program are found by ``program_truth.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eagerq.nn import Conv2dSame, FrozenBatchNorm2d
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
INPLACE = frozenset({"relu_", "relu6_", "hardswish_", "leaky_"})
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
TWO = frozenset({"add", "add_", "mean"})


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``values.append(what(values[i], values[j]))``.

    Attributes:
        what: a module's number, those of a group of modules that run one after another, or a function's name.
        sources: the values read; only some functions read the second.
        modes, flags: it runs only in these modes (train is True) and with these values of the input ``flag``;
            else the first source is passed on.
        style: how a group runs: an ``nn.Sequential`` (a nested one), or a loop over an ``nn.ModuleList``.
        times: how often a loop runs.
        context: what it runs under.
    """

    what: int | str | tuple[int, ...]
    sources: tuple[int, int]
    modes: tuple[bool, ...] = (True, False)
    flags: tuple[bool, ...] = (True, False)
    style: Literal["sequential", "nested", "loop", "reversed"] = "sequential"
    times: int = 1
    context: Literal["", "checkpoint", "no_grad"] = ""

    def steps(self) -> tuple[int | str, ...]:
        """Modules and functions in the order they run."""
        return self.what * self.times if isinstance(self.what, tuple) else (self.what,)


@dataclasses.dataclass(frozen=True)
class Program:
    """A net: kinds of modules, where and in which order they are registered, what runs, what is returned.

    With ``by_type``, what the last module of that type gave (or the input) is added to the first result.
    """

    kinds: tuple[str, ...]
    places: tuple[int, ...]
    order: tuple[int, ...]
    aliased: frozenset[int]
    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    form: str
    reads_values: bool
    hooks: frozenset[tuple[int, str]] = frozenset()
    takes: Literal["tensor", "dict", "keyword"] = "tensor"
    by_type: str = ""

    @property
    def flags(self) -> tuple[bool, ...]:
        """The values of the input ``flag`` that make a difference."""
        return (True, False) if any(len(i.flags) < 2 for i in self.instructions) else (True,)

    def given(self, x: Tensor, flag: bool = True) -> Any:
        """The inputs of one forward, as ``example_inputs`` takes them."""
        match self.takes:
            case "dict":
                return ({"image": x, "flag": flag},)
            case "keyword":
                return {"x": x, "flag": flag}
            case _:
                return (x, flag)

    def runs(self, x: Tensor) -> list[Any]:
        """Example inputs that take every way."""
        return [self.given(x, flag) for flag in self.flags]

    def build(self, seed: int = 0) -> RandomNet:
        """The net with random weights and norms, in train mode; the same for the same seed."""
        torch.manual_seed(seed)
        net = RandomNet(self)
        randomise(net, seed)
        return net


class Holder(nn.Module):
    """A child that only holds modules."""


def scaled_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Forward pre-hook that changes what the module reads."""
    return (args[0] * 0.5,)


def scaled_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Forward hook that changes what the module gives."""
    return output * 1.5


class RandomNet(nn.Module):
    """Runs a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.left, self.right = Holder(), Holder()
        self.kept: Any = None
        self.tap: Tensor | None = None
        self.unused = nn.Parameter(torch.zeros(1))
        self.paths: dict[int, str] = {}
        modules = [KINDS[kind]() for kind in program.kinds]
        groups = {i.what[0]: i for i in program.instructions if isinstance(i.what, tuple)}
        grouped = {i for g in groups.values() for i in g.what if isinstance(g.what, tuple)}
        for i in program.order:
            if i in groups:
                self._add_group(groups[i], modules)
            elif i not in grouped:
                where = program.places[i]
                [self, self.left, self.right][where].add_module(f"m{i}", modules[i])
                self.paths[i] = ["", "left.", "right."][where] + f"m{i}"
        for i in sorted(program.aliased):
            self.right.add_module(f"alias{i}", modules[i])
        for i, kind in sorted(program.hooks):
            if kind == "pre":
                modules[i].register_forward_pre_hook(scaled_input)
            else:
                modules[i].register_forward_hook(scaled_output)

    def _add_group(self, group: Instruction, modules: list[nn.Module]) -> None:
        numbers = group.what
        name = f"group{numbers[0]}"
        members = [modules[i] for i in numbers]
        if group.style == "nested":
            self.add_module(name, nn.Sequential(nn.Sequential(*members[:2]), *members[2:]))
            inner = [f"0.{k}" for k in range(len(members[:2]))] + [str(k) for k in range(1, len(members) - 1)]
        elif group.style == "reversed":
            self.add_module(name, nn.ModuleList(members[::-1]))
            inner = [str(k) for k in reversed(range(len(members)))]
        else:
            self.add_module(name, nn.ModuleList(members) if group.style == "loop" else nn.Sequential(*members))
            inner = [str(k) for k in range(len(members))]
        self.paths.update({i: f"{name}.{k}" for i, k in zip(numbers, inner, strict=True)})

    def at(self, i: int) -> nn.Module:
        """Module number ``i``, or what stands in its place."""
        return self.get_submodule(self.paths[i])

    def _run(self, instruction: Instruction, x: Tensor, y: Tensor) -> Tensor:
        what = instruction.what
        if isinstance(what, str):
            return FUNCTIONS[what](x, y)
        if isinstance(what, int):
            return self._called(self.at(what), x)
        group = getattr(self, f"group{what[0]}")
        if instruction.style in ("sequential", "nested"):
            return group(x)
        for _ in range(instruction.times):
            for layer in reversed(group) if instruction.style == "reversed" else group:
                x = self._called(layer, x)
        return x

    def _called(self, layer: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = layer(x)
        if type(layer).__name__ == self.program.by_type:
            self.tap = result
        return result

    def forward(self, x: Any, flag: bool = True) -> Any:
        if isinstance(x, dict):
            x, flag = x["image"], x["flag"]
        values = [x]
        for instruction in self.program.instructions:
            first, second = (values[i] for i in instruction.sources)
            if self.training not in instruction.modes or flag not in instruction.flags:
                values.append(first)
            elif instruction.context == "checkpoint":
                values.append(checkpoint(self._run, instruction, first, second, use_reentrant=False))
            else:
                with torch.set_grad_enabled(torch.is_grad_enabled() and instruction.context != "no_grad"):
                    values.append(self._run(instruction, first, second))
        if self.program.reads_values and bool(values[1].sum().isnan()):
            raise ValueError("NaN")
        results = [values[i] for i in self.program.outputs]
        tap, self.tap = self.tap, None
        if self.program.by_type:
            results[0] = results[0] + (x if tap is None else tap)
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


_LIKELY = {"conv": ("norm", "norm", "act"), "norm": ("act", "conv", "function"), "act": ("conv", "conv", "function")}
_GROUPS = {"conv": _CONVS, "norm": _NORMS, "act": _ACTS, "other": _OTHERS}


@st.composite
def _group(draw: st.DrawFn) -> list[str]:
    """Kinds of 2 to 4 modules, the first of which makes a new value."""
    groups = [draw(st.sampled_from(("conv", "conv", "norm")))]
    while len(groups) < 4 and (len(groups) < 2 or draw(st.booleans())):
        groups.append(draw(st.sampled_from((*_LIKELY[groups[-1]], "act", "other"))))
        groups[-1] = "conv" if groups[-1] == "function" else groups[-1]
        if groups[-1] == "other":
            break
    return [draw(st.sampled_from(_GROUPS[group])) for group in groups]


@st.composite
def programs(draw: st.DrawFn, flagged: bool = False, typed: bool = False) -> Program:
    """Nets of 2 to 12 steps; most steps read the newest value, so that chains are common.

    Args:
        flagged: draw some steps that depend on the input ``flag``.
        typed: draw some nets that ask modules for their type.
    """
    kinds: list[str] = []
    instructions: list[Instruction] = []
    n = draw(st.integers(2, 12))
    untouchable = {0}  # the input and its aliases: a leaf that requires a gradient cannot be changed in place
    previous = None
    flags = st.sampled_from(((True, False),) * (4 if flagged else 30) + ((True,), (False,)))
    modes = st.sampled_from(((True, False),) * 8 + ((True,), (False,)))
    contexts = st.sampled_from(("",) * 12 + ("checkpoint", "no_grad"))
    while len(instructions) < n:
        newest = len(instructions)
        source = max(0, newest - draw(st.sampled_from((0, 0, 0, 0, 0, 0, 1, 2, 4))))
        other = draw(st.integers(0, newest))
        likely = _LIKELY.get(previous or "", ("conv",)) * 4
        group = draw(st.sampled_from(("conv", "norm", "act", "function", "other", "group", *likely)))
        what: int | str | tuple[int, ...]
        style: Any = "sequential"
        times = 1
        if group == "function":
            what = kind = draw(st.sampled_from(tuple(FUNCTIONS)))
        elif group == "group":
            kind, added = "group", draw(_group())
            what = tuple(range(len(kinds), len(kinds) + len(added)))
            kinds += added
            style = draw(st.sampled_from(("sequential", "nested", "loop", "loop", "reversed")))
            times = draw(st.sampled_from((1, 1, 1, 2))) if style in ("loop", "reversed") else 1
        else:
            kind = draw(st.sampled_from(_GROUPS[group]))
            used = [i for i, k in enumerate(kinds) if k == kind]
            if used and draw(st.integers(0, 2)) == 0:
                what = draw(st.sampled_from(used))
            else:
                what = len(kinds)
                kinds.append(kind)
        inplace = kind in INPLACE or kind.endswith("_")
        if source in untouchable and inplace:
            kinds = kinds[:-1] if what == len(kinds) - 1 and not _used(instructions, what) else kinds
            continue
        runs_in, runs_if = draw(modes), draw(flags)
        if source in untouchable and (kind in {"identity", "nothing", "dropout"} or len(runs_in) < 2 or len(runs_if) < 2):
            untouchable.add(newest + 1)
        context = draw(contexts)
        if context == "checkpoint" and (inplace or group == "function"):  # it would be run again on what it has changed
            context = ""
        instructions.append(Instruction(what, (source, other), runs_in, runs_if, style, times, context))
        previous = group
    extra = draw(st.lists(st.integers(1, n), max_size=2))
    count = len(kinds)
    hookable = [i for i in range(count) if kinds[i] not in _OTHERS]
    hooks = (
        st.sets(st.tuples(st.sampled_from(hookable), st.sampled_from(("pre", "post"))), max_size=2)
        if hookable
        else st.just(set())
    )
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
        frozenset(draw(hooks)) if draw(st.integers(0, 3)) == 0 else frozenset(),
        draw(st.sampled_from(("tensor", "tensor", "dict", "keyword"))),
        draw(st.sampled_from(("", "Conv2d", "BatchNorm2d", "ReLU", "Identity"))) if typed else "",
    )


def _used(instructions: list[Instruction], module: Any) -> bool:
    return any(module in i.steps() for i in instructions)


def described(program: Program) -> Iterator[str]:
    """The program as lines of code, for a failing example's report."""
    for number, i in enumerate(program.instructions, 1):
        name = " ".join(f"m{w}:{program.kinds[w]}" if isinstance(w, int) else w for w in i.steps())
        if isinstance(i.what, tuple):
            name = f"{i.style}[{name}]"
        conditions = [f"{'train' if i.modes[0] else 'eval'}"] * (len(i.modes) < 2) + [f"flag is {i.flags[0]}"] * (
            len(i.flags) < 2
        )
        conditions += [i.context] * bool(i.context)
        args = f"v{i.sources[0]}{f', v{i.sources[1]}' if i.what in TWO else ''}"
        yield f"v{number} = {name}({args}){'  # ' + ', '.join(conditions) if conditions else ''}"
    yield f"return {program.form} {program.outputs}; hooks {sorted(program.hooks)}; by type {program.by_type!r}"
