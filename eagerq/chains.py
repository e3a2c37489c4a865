"""The fused chains of a model, and one run of it watched for ways that break them."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eagerq.errors import GuardError
from eagerq.nn.intrinsic.fused import Fused
from eagerq.nn.qat.base import QATBase
from eagerq.nn.quantized import QuantizedModule
from eagerq.record import full_name, records_in
from eagerq.trace import tensors_in
from eagerq.values import MAYBE_NOTHING, reading_function

_REMEDY = (
    "example_inputs did not take this way; pass inputs that do among them (a list of inputs), so that the plan sees it,"
    " or leave the chain out: plan_fusion(...).without({0!r}).apply(model)"
)


@dataclasses.dataclass(frozen=True)
class Chain:
    """A fused module and, in order, those whose places it has taken; of a copied one the original runs on."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    copied: frozenset[str]
    inplace: frozenset[str]

    def broken(self, what: str) -> GuardError:
        return GuardError(f"the chain {' + '.join(self.names)} is broken: {what}. {_REMEDY.format(self.names[0])}.")


@dataclasses.dataclass
class Value:
    """A tensor that module ``stage`` of a chain gave, for the next one only."""

    ref: weakref.ref[Tensor]
    version: int
    chain: Chain
    stage: int
    taken: bool = False

    @property
    def giver(self) -> str:
        return self.chain.names[self.stage]

    @property
    def reader(self) -> str:
        return self.chain.names[self.stage + 1]


def chains_of(model: nn.Module) -> list[Chain]:
    """The fused chains of a model that are still in place, chains that were fused again as one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    chains: dict[str, tuple[str, ...]] = {}
    copied: set[str] = set()
    inplace: set[str] = set()
    for prefix, _, record in records_in(model):
        for match in record.matches:
            found = [full_name(prefix, name) for name in match.names]
            chains[found[0]] = tuple(n for name in found for n in chains.pop(name, (name,)))
            copied.update(full_name(prefix, name) for name in match.copied)
        inplace.update(full_name(prefix, name) for name in record.inplace)
    kept = []
    for names in chains.values():
        fused = modules.get(names[0])
        if not isinstance(fused, (Fused, QATBase, QuantizedModule)) or any(name not in modules for name in names):
            continue  # replaced or taken away since
        if len(names) > 1:
            parts = tuple(modules[name] for name in names)
            kept.append(Chain(names, parts, frozenset(copied.intersection(names)), frozenset(inplace.intersection(names))))
    return kept


class ChainWatch:
    """What is known in a guarded run: the values given and not to be read by others."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        self.chains = tuple(chains)
        self.thread = threading.get_ident()
        self.values: dict[int, Value] = {}
        self.running: list[tuple[nn.Module, Value | None]] = []
        self.unseen: set[Chain] = set()  # those with full backward hooks, which wrap results out of the guard's sight
        self.trouble: GuardError | None = None
        self.depth = 0  # of the model's own calls
        self.paused = False
        self.seen = False
        self.starts: dict[nn.Module, Chain] = {chain.modules[0]: chain for chain in self.chains}
        self.strict: dict[nn.Module, str] = {}  # modules with no other use than their place in a chain
        self.stages: dict[nn.Module, None] = {}
        for chain in self.chains:
            for name, module in zip(chain.names[1:], chain.modules[1:], strict=True):
                self.stages[module] = None
                if name not in chain.copied:
                    self.strict[module] = name

    def off(self) -> bool:
        """Whether what runs now is none of the guard's business: another thread, or a recomputation in a backward."""
        return self.paused or threading.get_ident() != self.thread or torch._C._current_graph_task_id() != -1

    # --- values

    def find(self, tensor: Tensor) -> Value | None:
        value = self.values.get(id(tensor))
        return value if value is not None and value.ref() is tensor else None

    def give(self, tensor: Tensor, module: nn.Module, chain: Chain, stage: int) -> None:
        if module._backward_hooks or module._backward_pre_hooks:
            self.unseen.add(chain)
            return
        self.values[id(tensor)] = Value(weakref.ref(tensor), _version(tensor), chain, stage)

    def alias(self, tensor: Tensor) -> Tensor:
        """The same values as another object, so that who reads which can be told."""
        self.paused = True
        try:
            if not tensor.requires_grad:
                return tensor.detach()
            with torch.enable_grad():  # a view made without would forbid in-place operations later
                return tensor.view_as(tensor)
        finally:
            self.paused = False

    # --- the model's own forward

    def begin(self, module: nn.Module, args: Any) -> None:
        if not self.off():
            self.seen = True
            if self.depth == 0:
                self.clear()
            self.depth += 1

    def returned(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward came to its end: refuse what must not leave it."""
        if self.off() or self.depth != 1:
            return
        for tensor in tensors_in(output, deep=True):
            value = self.find(tensor)
            if value is not None:
                raise value.chain.broken(f"the model returns the output of {value.giver}, which only {value.reader} was to read")
        self.finish("the forward")

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After ``returned``, or where an exception passes, which ``output`` does not tell from a model that returns None."""
        if self.off() or self.depth == 0:
            return
        self.depth -= 1
        if not self.depth:
            self.clear()

    def clear(self) -> None:
        self.values.clear()
        self.running.clear()
        self.unseen.clear()
        self.trouble = None

    def finish(self, what: str) -> None:
        """Refuse what was seen where nothing can be raised, and values that were given and not taken."""
        if self.trouble is not None:
            raise self.trouble
        for value in self.values.values():
            if not value.taken:
                raise value.chain.broken(f"{value.giver} ran, and {what} ended without its output having reached {value.reader}")

    # --- the modules of chains

    def gave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A fused module returned: hand on an alias, so that hooks may keep what they saw."""
        if self.off() or not isinstance(output, Tensor):
            return None
        self.seen = True
        handed = self.alias(output)
        self.give(handed, module, self.starts[module], 0)
        return handed

    def reached(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A placeholder (or the original of a copied activation) is called."""
        if self.off():
            return None
        self.seen = True
        for tensor in tensors_in((args, kwargs)):
            value = self.find(tensor)
            if value is not None:
                self.take(module, tensor, value)
                if value.reader in value.chain.inplace:  # it gave back what it was given, so that either may be read
                    del self.values[id(tensor)]
                    return None
                own = self.alias(tensor)
                return tuple(own if a is tensor else a for a in args), {k: own if a is tensor else a for k, a in kwargs.items()}
        if module in self.strict:
            name = self.strict[module]
            chain = next(c for c in self.chains if name in c.names)
            if chain in self.unseen:
                return None
            before = chain.names[chain.names.index(name) - 1]
            raise chain.broken(f"{name} was given another tensor than the one {before} gives")
        self.running.append((module, None))
        return None

    def take(self, module: nn.Module, tensor: Tensor, value: Value) -> None:
        """Let ``module`` have a value, if it is for it."""
        if value.chain.modules[value.stage + 1] is not module:
            name = next(n for c in self.chains for n, m in zip(c.names, c.modules, strict=True) if m is module)
            raise value.chain.broken(f"{name} was given the output of {value.giver}, which only {value.reader} was to read")
        if value.taken:
            raise value.chain.broken(f"{value.reader} was given the same output of {value.giver} twice")
        if value.version != _version(tensor):
            raise value.chain.broken(f"the output of {value.giver} was changed in place before it reached {value.reader}")
        value.taken = True
        self.running.append((module, value))

    def left(self, module: nn.Module, args: Any, output: Any) -> None:
        """A placeholder returned; what it gives is the next one's."""
        if self.off() or not self.running or self.running[-1][0] is not module:
            return
        _, value = self.running.pop()
        if value is not None and isinstance(output, Tensor) and value.stage + 2 < len(value.chain.modules):
            self.give(output, module, value.chain, value.stage + 1)

    # --- everything else

    def reads(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function or an operator, which must not read a value that was given to a placeholder."""
        value = None
        if not self.off():
            found = (self.find(tensor) for tensor in tensors_in((args, kwargs)))
            value = next((v for v in found if v is not None), None)
        result = func(*args, **kwargs)
        if value is not None and not (name in MAYBE_NOTHING and result is value.ref()):
            error = value.chain.broken(f"the output of {value.giver}, which only {value.reader} was to read, is read by {name}")
            if isinstance(func, torch._ops.OpOverload):  # TorchScript would turn it into an error of its own
                self.trouble = error
            else:
                raise error
        return result


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class FunctionsSeen(TorchFunctionMode):
    def __init__(self, watch: ChainWatch) -> None:
        super().__init__()
        self.watch = watch
        self.inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = reading_function(func)
        if name is None:
            return func(*args, **(kwargs or {}))
        self.inside += 1
        try:
            return self.watch.reads(name.strip("_"), func, args, kwargs or {})
        finally:
            self.inside -= 1


class OperatorsSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators called past torch functions (scripted functions, custom extensions)."""

    def __init__(self, functions: FunctionsSeen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.functions = functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.functions.inside:
            return func(*args, **(kwargs or {}))
        return self.functions.watch.reads(str(func), func, args, kwargs or {})
