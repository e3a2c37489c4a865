"""Watch one eager forward: who reads whose output, and how often each module is called.

A value is a tensor at one version: an in-place operation makes a new value. Module hooks see
modules, a ``TorchFunctionMode`` sees functions, and a ``TorchDispatchMode`` sees operators that reach
PyTorch past both. What is still alive after the forward was kept by somebody. So nothing depends
on how the model is written; there is no tracing.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import sys
import types
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eagerq.errors import InputsError
from eagerq.inputs import Inputs
from eagerq.surgery import full_copy, meta_copy, names_of

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: Properties of a tensor that give values; every other property is a fact about it.
_VALUE_PROPERTIES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag", "grad", "_base"})
#: Functions that read facts about a tensor, not its values.
_FACTS = frozenset(
    "size dim ndimension stride numel nelement is_contiguous is_floating_point is_complex is_signed"
    " element_size get_device storage_offset is_same_size is_tensor result_type can_cast is_inference"
    " is_conj is_neg __len__ __hash__".split()
)
#: Functions that may return their very argument; when they do, nothing happened.
_MAYBE_NOTHING = frozenset(
    "contiguous to float double half bfloat16 type type_as cpu cuda dropout dropout1d dropout2d dropout3d"
    " alpha_dropout feature_alpha_dropout requires_grad_ expand view_as".split()
)


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
        parameter_readers: for each parameter (by name) that something outside leaf modules read, the first such call.
        contexts: for each leaf module the gradient modes and checkpoint regions it ran in.
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
    training: bool = False
    parameter_readers: dict[str, Call] = dataclasses.field(default_factory=dict)
    contexts: dict[str, set[tuple[bool, int]]] = dataclasses.field(default_factory=lambda: defaultdict(set))

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


class _Values:
    """Numbers the values: a tensor that is alive, at one version."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._next = 0
        self.shapes: dict[int, tuple[int, ...]] = {}

    def number(self, tensor: Tensor) -> int:
        found = self._tensors.get(id(tensor))
        if found is None or found[0]() is not tensor:
            self._next += 1
            found = (weakref.ref(tensor), self._next)
            self._tensors[id(tensor)] = found
        try:
            version = tensor._version
        except RuntimeError:  # inference tensors count no versions, so no two looks at one are the same value
            self._next += 1
            version = self._next
        key = (found[1], version)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self.shapes[self._numbers[key]] = tuple(tensor.shape)
        return self._numbers[key]

    def alive(self) -> set[int]:
        numbers = set()
        for ref, uid in self._tensors.values():
            tensor = ref()
            if tensor is not None and not tensor.is_inference():
                number = self._numbers.get((uid, tensor._version))
                if number is not None:
                    numbers.add(number)
        return numbers


class _Recorder:
    """Fills a ``Trace`` while a forward runs."""

    def __init__(self, model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        self.trace = Trace(training=model.training)
        self.values = _Values()
        self.names = {module: names[0] for module, names in names_of(model).items()}
        self.leaves = {module for module in self.names if is_leaf(module)}
        self.stack: list[str] = []
        self.leaf: nn.Module | None = None  # the leaf that runs now,
        self.leaf_inputs: tuple[int, ...] = ()  # and what it was given
        self.inside = 0  # within a leaf or a function: what runs there is its own business

    def record(self, name: str, is_module: bool, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        trace = self.trace
        call = Call(len(trace.calls), name, is_module, inputs, outputs, self.stack[-1] if self.stack else "")
        trace.calls.append(call)
        for value in inputs:
            trace.readers[value].append(call)
        for value in outputs:
            trace.producer.setdefault(value, call)

    def numbers(self, obj: Any) -> tuple[int, ...]:
        return tuple(self.values.number(t) for t in tensors_in(obj))

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self.names[module]
        self.trace.counts[name] += 1
        if self.inside:
            return
        if module in self.leaves:
            self.inside += 1
            self.leaf, self.leaf_inputs = module, self.numbers((args, kwargs))
            self.trace.contexts[name].add(_context())
        else:
            if not self.stack and name == "":
                self.trace.inputs = tuple(self.values.number(t) for t in tensors_in((args, kwargs), deep=True))
                direct = [*((str(i), a) for i, a in enumerate(args)), *kwargs.items()]
                self.trace.arguments = {self.values.number(a): key for key, a in direct if isinstance(a, Tensor)}
            self.stack.append(name)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self.names[module]
        if module is self.leaf:
            self.inside -= 1
            self.leaf = None
            self.record(name, True, self.leaf_inputs, self.numbers(output))
        elif self.inside:
            return
        else:
            self.stack.pop()
        if isinstance(output, Tensor):
            self.trace.exits[self.values.number(output)].append(Exit(name, len(self.trace.calls)))

    def function(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.inside:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            prop = getattr(getattr(func, "__self__", None), "__name__", "")
            if prop not in _VALUE_PROPERTIES:
                return func(*args, **kwargs)
            name = prop
        elif name in _FACTS or name == "__set__":
            return func(*args, **kwargs)
        inputs = self.numbers((args, kwargs))
        self.inside += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside -= 1
        outputs = self.numbers(result)
        if not (name in _MAYBE_NOTHING and outputs and outputs == inputs[: len(outputs)]):
            self.record(name.strip("_"), False, inputs, outputs)
        return result


def _context() -> tuple[bool, int]:
    """Whether gradients are recorded here, and which hooks hold back saved tensors (an activation checkpoint's)."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), id(hooks[0]) if hooks else 0


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.function(func, args, kwargs or {})


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators called past torch functions and leaf modules (scripted functions, custom extensions)."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder = self.recorder
        if recorder.inside:
            return func(*args, **(kwargs or {}))
        inputs = recorder.numbers((args, kwargs))
        result = func(*args, **(kwargs or {}))
        recorder.record(str(func), False, inputs, recorder.numbers(result))
        return result


class _SavedState:
    """Random number generators, put back as they were."""

    def __enter__(self) -> None:
        self.cpu = torch.get_rng_state()
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self.cuda = torch.cuda.get_rng_state_all() if in_use else None
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = numpy.random.get_state() if numpy is not None else None

    def __exit__(self, *exc: object) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def record_forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_leaf: Callable[[nn.Module], bool]
) -> Trace:
    """Run ``model(*args, **kwargs)`` once and say what it did; changes what a forward changes.

    Gradient mode is on, so that the model's own ``no_grad`` shows; no graph is kept.
    """
    recorder = _Recorder(model, is_leaf)
    handles = []
    for module in recorder.names:
        # around all other hooks, so that those of a leaf are the leaf's own business
        handles.append(module.register_forward_pre_hook(recorder.enter, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leave, with_kwargs=True))
    try:
        with _SavedState(), torch.enable_grad(), _Operators(recorder), _Functions(recorder):
            output = model(*args, **kwargs)
            if isinstance(output, types.GeneratorType):
                output = list(output)
    finally:
        for handle in handles:
            handle.remove()
    trace = recorder.trace
    trace.shapes = recorder.values.shapes
    trace.outputs = frozenset(recorder.values.number(t) for t in tensors_in(output, deep=True))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        readers = trace.readers.get(recorder.values.number(parameter), [])
        if readers:
            trace.parameter_readers[name] = readers[0]
    del output  # and with it the graph, if there is one
    made = set(trace.producer)
    kept = (recorder.values.alive() & made) - trace.outputs
    if kept:
        gc.collect()  # reference cycles of the forward itself keep nothing
        kept = (recorder.values.alive() & made) - trace.outputs
    trace.kept = frozenset(kept)
    return trace


@dataclasses.dataclass(frozen=True)
class Watched:
    """Traces of all runs, and how they were taken."""

    traces: tuple[Trace, ...]
    on_meta: bool
    notes: tuple[str, ...] = ()


def watch(model: nn.Module, runs: Sequence[Inputs], is_leaf: Callable[[nn.Module], bool], modes: Sequence[bool]) -> Watched:
    """Watch each of ``runs`` in each of ``modes`` (``training`` or not) on a copy, leaving no trace on ``model``.

    The copy is on the meta device if the model runs there, else it holds the data. At least one mode
    must run; a mode that does not is noted.

    Raises:
        InputsError: if the model rejects the inputs in every mode.
    """
    on_meta = True
    traces, errors = watch_copy(meta_copy(model), runs, is_leaf, modes, on_meta=True)
    if errors:  # what fails on meta may still run on data
        on_meta = False
        traces, errors = watch_copy(full_copy(model), runs, is_leaf, modes, on_meta=False)
    if not traces:
        error = errors.get(model.training) or next(iter(errors.values()))
        raise InputsError(
            f"{type(model).__name__} was to run once on example_inputs and raised {type(error).__name__}: {error}."
            " Pass example_inputs that model(...) accepts: a tensor, a tuple of positional or a dict of keyword arguments."
        ) from error
    notes = tuple(
        f"not watched in {'train' if mode else 'eval'} mode, where the forward raises {type(error).__name__}: {error}"
        for mode, error in errors.items()
    )
    return Watched(traces, on_meta, notes)


def watch_copy(
    copied: nn.Module, runs: Sequence[Inputs], is_leaf: Callable[[nn.Module], bool], modes: Sequence[bool], *, on_meta: bool
) -> tuple[tuple[Trace, ...], dict[bool, Exception]]:
    """Watch ``runs`` on a copy that may be used up: the traces of the modes that ran, and the errors of the others."""
    flags = [(module, module.training) for module in copied.modules()]
    if on_meta:
        for module, _ in flags:
            if type(module) in _BATCH_NORMS and not any(
                getattr(module, group) for group in ("_forward_pre_hooks", "_forward_hooks")
            ):
                module.forward = torch.empty_like  # PyTorch's meta batch norm costs more than all else in the forward
    parameters = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)  # gradient mode without a graph, which would keep every tensor alive
    traces: list[Trace] = []
    errors: dict[bool, Exception] = {}
    for mode in modes:
        if mode != copied.training:
            copied.train(mode)
        try:
            arguments = [run.copied("meta" if on_meta else None) for run in runs]
            traces += [_watched(copied, run, is_leaf, parameters if mode and on_meta else []) for run in arguments]
        except Exception as error:  # whatever the model's own code raises
            errors[mode] = error
        for module, training in flags:
            module.training = training
    for parameter in parameters:
        parameter.requires_grad_(True)
    return tuple(traces), errors


def _watched(model: nn.Module, run: Inputs, is_leaf: Callable[[nn.Module], bool], parameters: Sequence[nn.Parameter]) -> Trace:
    """One trace; with ``parameters`` that record gradients, so that models take their activation checkpoints.

    The graph keeps tensors alive, so where anything is kept a second forward without it says what.
    """
    recorded: Trace | None = None
    if parameters:
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            recorded = record_forward(model, run.args, run.kwargs, is_leaf)
        except Exception:  # what fails with gradients only fails in the caller's training as well
            recorded = None
        for parameter in parameters:
            parameter.requires_grad_(False)
    if recorded is not None and not recorded.kept:
        return recorded
    trace = record_forward(model, run.args, run.kwargs, is_leaf)
    if recorded is not None:
        trace.contexts = recorded.contexts
    return trace
