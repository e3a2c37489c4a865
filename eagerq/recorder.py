"""Record one eager forward: who reads whose output, and how often each module is called.

A value is a tensor at one version: an in-place operation makes a new value. Module hooks see
modules, a ``TorchFunctionMode`` sees functions, and a ``TorchDispatchMode`` sees operators that reach
PyTorch past both. What is still alive after the forward was kept by somebody. So nothing depends
on how the model is written; there is no tracing.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
import types
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eagerq import meta_forms
from eagerq.errors import ModelError
from eagerq.surgery import names_of
from eagerq.trace import Call, Context, Exit, Trace, outline, plain_in, settings_of, tensors_in
from eagerq.values import MAYBE_NOTHING, Values, asks_for_device, reading_function

#: Whether a forward is being watched here.
watching: ContextVar[bool] = ContextVar("eagerq_watching", default=False)


class _Recorder:
    """Fills a ``Trace`` while a forward runs."""

    def __init__(self, model: nn.Module, is_leaf: Callable[[nn.Module], bool], foreign: Mapping[int, str]) -> None:
        self.trace = Trace(training=model.training)
        self.foreign = foreign
        self.values = Values()
        self.names = {module: names[0] for module, names in names_of(model).items()}
        self.leaves = {module for module in self.names if is_leaf(module)}
        self.hooked = {m for m in self.leaves if m._forward_pre_hooks or m._forward_hooks}
        self.stack: list[str] = []
        self.leaf: nn.Module | None = None  # the leaf that runs now,
        self.leaf_inputs: tuple[int, ...] = ()  # and what it was given
        self.leaf_outputs: tuple[int, ...] = ()  # and gave, where it has hooks
        self.regions: list[Any] = []  # hooks on saved tensors that leaves ran under
        self.inside = 0  # within a leaf or a function: what runs there is its own business,
        self.given: list[set[int]] = []  # unless it reads what that was not given
        self.own = {m: {**m._parameters, **m._buffers} for leaf in self.leaves for m in leaf.modules()}
        self.thread = threading.get_ident()
        self.autocast = _autocast()

    def record(
        self, name: str, is_module: bool, inputs: tuple[int, ...], outputs: tuple[int, ...], constants: tuple[str, ...] = ()
    ) -> None:
        trace = self.trace
        call = Call(len(trace.calls), name, is_module, inputs, outputs, self.stack[-1] if self.stack else "", constants)
        trace.calls.append(call)
        for value in inputs:
            trace.readers[value].append(call)
        for value in outputs:
            trace.producer.setdefault(value, call)

    def numbers(self, obj: Any) -> tuple[int, ...]:
        found = list(tensors_in(obj))
        for tensor in found:
            if id(tensor) in self.foreign:
                raise ModelError(
                    f"eagerq works on a copy of the model, and the copy's forward reads {self.foreign[id(tensor)]!r} of the"
                    " original: a lambda or function that holds the model or a module of it (a closure over self) is not"
                    " copied with it. Make it a method or functools.partial(function, self), or let it take the module as"
                    " an argument."
                )
        self.inside += 1  # to look at a view's base is no reading of it
        for tensor in found:
            if tensor._base is not None:  # what is written to a view is written to its base
                self.values.number(tensor._base)
        self.inside -= 1
        return tuple(map(self.values.number, found))

    def read(self, obj: Any) -> tuple[int, ...]:
        """The numbers of what is read: of a tensor that nobody was seen to make, of those too whose memory it is."""
        found = (t for t in tensors_in(obj) if not t.is_inference())  # each look at one of those is a new value
        fresh = [t for t in found if t._base is None and self.values.known(t) is None]
        shared: list[int] = []
        if fresh:
            self.inside += 1
            shared = [value for tensor in fresh for value in self.values.sharing(tensor)]
            self.inside -= 1
        return (*self.numbers(obj), *shared)

    def noted(self, item: Any, values: set[int]) -> Any:
        """``item``; its values as they are now, whatever is done to them later, are added to ``values``."""
        values.update(self.values.number(tensor) for tensor in tensors_in(item, deep=True))
        return item

    def context(self) -> Context:
        """Whether gradients are recorded, the number of the hooks on saved tensors (a checkpoint's) or 0, autocast; modes."""
        autocast = _autocast()
        self.trace.unlike_data |= autocast[1:] != self.autocast[1:] and len(autocast) > 1
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
        if not hooks:
            return torch.is_grad_enabled(), 0, autocast, modes
        if not any(hooks[0] is region for region in self.regions):
            self.regions.append(hooks[0])  # alive, so that no later one has its address
        region = 1 + next(i for i, region in enumerate(self.regions) if region is hooks[0])
        return torch.is_grad_enabled(), region, autocast, modes

    def is_elsewhere(self, module: nn.Module) -> bool:
        """Whether this call is in another thread, where modes do not see functions; if so, it is noted."""
        here = threading.get_ident() == self.thread
        if not here:
            self.trace.elsewhere.add(self.names.get(module, ""))
        return not here

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.is_elsewhere(module):
            return
        name = self.names[module]
        self.trace.counts[name] += 1
        if self.inside or module in self.leaves:
            self.trace.settings[name].append(settings_of(module))
        if self.inside:
            return
        if module in self.leaves:
            self._look_at_tensors(module, name)
            self.inside += 1
            self.leaf, self.leaf_inputs = module, self.read((args, kwargs))
            self.given.append(set(self.leaf_inputs))
        else:
            if not self.stack and name == "":
                self.trace.inputs = tuple(self.values.number(t) for t in tensors_in((args, kwargs), deep=True))
                direct = [*((str(i), a) for i, a in enumerate(args)), *kwargs.items()]
                self.trace.arguments = {self.values.number(a): key for key, a in direct if isinstance(a, Tensor)}
            self.stack.append(name)

    def _look_at_tensors(self, leaf: nn.Module, name: str) -> None:
        """Note a tensor that is not the leaf's own any more."""
        for module in leaf.modules():
            own = self.own.get(module, {})
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not own.get(key):
                    self.trace.reassigned[name] = key

    def reads_inside(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note what an operator within a leaf or a function reads that was made before and not given to it: a hook's or a
        callback's doing."""
        for tensor in tensors_in((args, kwargs)):
            value = self.values.known(tensor)
            if value is not None and value in self.trace.producer and not any(value in given for given in self.given):
                self.given[-1].add(value)
                self.record(str(func), False, (value,), ())

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Behind the leaf's own pre-hooks."""
        if module is self.leaf and self.read((args, kwargs)) != self.leaf_inputs:
            self.trace.changed_inputs.add(self.names[module])

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Before the leaf's own hooks."""
        if module is self.leaf:
            self.leaf_outputs = self.numbers(output)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.is_elsewhere(module):
            return
        name = self.names[module]
        if output is None and self.inside:  # it raised, and the model may go another way: it has read, and did not run
            self.trace.counts[name] -= 1
        if module is self.leaf:
            self.inside -= 1
            self.leaf = None
            self.given.pop()
            if output is None:
                self.record(f"{name} (which raised)", False, self.leaf_inputs, ())
            else:
                self.trace.contexts[name].add(self.context())
                self.record(name, True, self.leaf_inputs, self.numbers(output))
                if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors_in(output))):
                    self.trace.transformed.add(name)
                if module in self.hooked and self.leaf_outputs != self.trace.calls[-1].outputs:
                    self.trace.changed_outputs.add(name)
        elif self.inside:
            return
        else:
            self.stack.pop()
        if isinstance(output, Tensor):
            self.trace.exits[self.values.number(output)].append(Exit(name, len(self.trace.calls)))

    def function(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.inside:
            return meta_forms.run(func, args, kwargs)
        name = reading_function(func)
        if name is None:
            self.trace.unlike_data |= asks_for_device(func)
            return func(*args, **kwargs)
        inputs = self.read((args, kwargs))
        self.inside += 1
        self.given.append(set(inputs))
        try:
            result = meta_forms.run(func, args, kwargs)
        except Exception:
            self.trace.unlike_data = True  # should the model catch it
            raise
        finally:
            self.inside -= 1
            self.given.pop()
        outputs = self.numbers(result)
        if not (name in MAYBE_NOTHING and outputs and outputs == inputs[: len(outputs)]):
            self.record(name.strip("_"), False, inputs, outputs, tuple(plain_in((args, kwargs))))
        return result


def _autocast() -> tuple[Any, ...]:
    """How many autocasts are open here, and for each kind of device that casts the type it casts to."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    on = (kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(kind))
    return depth, *((kind, torch.get_autocast_dtype(kind)) for kind in on)


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
            if recorder.given:
                recorder.reads_inside(func, args, kwargs)
            return func(*args, **(kwargs or {}))
        inputs = recorder.read((args, kwargs))
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
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_leaf: Callable[[nn.Module], bool],
    foreign: Mapping[int, str] = types.MappingProxyType({}),
    gradients: bool = True,
) -> Trace:
    """Run ``model(*args, **kwargs)`` once and say what it did; changes what a forward changes.

    With ``gradients`` gradient mode is on, so that the model's own ``no_grad`` shows; no graph is kept.

    Raises:
        ModelError: before it reads one of the ``foreign`` tensors (name by id), those of another model.
    """
    recorder = _Recorder(model, is_leaf, foreign)
    recorder.trace.gradients = gradients
    named = (*model.named_parameters(), *model.named_buffers())
    recorder.trace.named = {recorder.values.number(tensor): name for name, tensor in named}
    handles = []
    for module in recorder.names:
        if module in recorder.hooked:
            handles.append(module.register_forward_pre_hook(recorder.begin, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.end, prepend=True))
        # around all other hooks, so that those of a leaf are the leaf's own business
        handles.append(module.register_forward_pre_hook(recorder.enter, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leave, with_kwargs=True, always_call=True))
    token = watching.set(True)
    try:
        with _SavedState(), torch.set_grad_enabled(gradients), _Operators(recorder), _Functions(recorder):
            output = model(*args, **kwargs)
            yielded: set[int] = set()
            if isinstance(output, types.GeneratorType):
                output = [recorder.noted(item, yielded) for item in output]
    finally:
        watching.reset(token)
        for handle in handles:
            handle.remove()
    trace = recorder.trace
    trace.shapes = recorder.values.shapes
    trace.rewritten = recorder.values.rewritten()
    trace.outputs = frozenset((*yielded, *(recorder.values.number(t) for t in tensors_in(output, deep=True))))
    trace.returned = tuple(outline(output, recorder.values.number))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        readers = trace.readers.get(recorder.values.number(parameter), [])
        if readers:
            trace.parameter_readers[name] = readers[0]
    del output  # and with it the graph, if there is one
    recorder.regions.clear()
    made = set(trace.producer)
    kept = (recorder.values.alive() & made) - trace.outputs
    if kept:
        gc.collect()  # reference cycles of the forward itself keep nothing
        kept = (recorder.values.alive() & made) - trace.outputs
    trace.kept = frozenset(kept)
    return trace
