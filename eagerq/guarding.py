"""``guard``: check while a fused model runs that each forward goes a way its fused chains survive."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from eagerq.chains import ChainWatch, FunctionsSeen, OperatorsSeen, chains_of
from eagerq.checks import check_model
from eagerq.errors import StateError
from eagerq.record import records_in
from eagerq.recorder import watching

_SWITCH = "EAGERQ_GUARD"


@contextlib.contextmanager
def guard(model: nn.Module) -> Iterator[None]:
    """Within ``with eagerq.guard(model):`` each forward of a fused model is checked for ways that break a chain.

    A chain was confirmed on ``example_inputs``; a branch they did not take may use a module without
    the others. Checked in every call, of the fused model and of the QAT and deployed models made of it:
    each placeholder of a fused-away module is given the very tensor its fused module gave, unchanged;
    it is reached in every forward in which the fused module ran; and nothing else reads, changes
    or returns that tensor on its way.

    Outside the context nothing is hooked and nothing is asked. Within it modules run with hooks under a
    ``TorchFunctionMode`` and a ``TorchDispatchMode``, of the thread that entered; what ``torch.compile`` made of the
    model is not checked (compiled with ``fullgraph=True`` it does not run there), and recomputation in a backward is not
    checked again.

    With the environment variable ``EAGERQ_GUARD=1`` at the time of ``fuse_modules``, the fused
    model, and what is converted from it, guards every forward by itself.

    Raises:
        ModelError: for something that is no eager model.
        StateError: if ``model`` holds no record of a fusion.
        GuardError: out of the forward, naming both modules, if a chain is broken.
    """
    check_model(model)
    with ExitStack() as stack:
        guarding = stack.enter_context(_entered(model))
        yield
        guarding.finish("the block")
        if not guarding.seen:
            warnings.warn(
                f"eagerq.guard saw no module of this {type(model).__name__} run, so it checked nothing;"
                " run the very model given to it, eagerly (not compiled, not a copy), in the thread that entered.",
                stacklevel=3,
            )


class _Here(threading.local):
    """Of this thread: the fused modules under guard, and the guards that models opened by themselves."""

    def __init__(self) -> None:
        self.guarded: set[nn.Module] = set()
        self.open: list[tuple[nn.Module, ExitStack, ChainWatch]] = []


_HERE = _Here()


class _Hook:
    """A guard's hook on one module; a copy of the module gets one that only takes itself off."""

    def __init__(self, call: Any, module: nn.Module) -> None:
        self.call = call
        self.module = module

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return self.call(module, *args) if module is self.module else None  # a replica shares the hooks of its model

    def __deepcopy__(self, memo: Any) -> _LeftOver:
        return _LeftOver()

    def __reduce__(self) -> Any:
        return _LeftOver, ()


class _LeftOver:
    """What a copy made within a guard carries in place of the guard's hook, until its next call."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        _take_off(module, lambda hook: hook is self)


@contextlib.contextmanager
def _entered(model: nn.Module, *, by_itself: bool = False) -> Iterator[ChainWatch]:
    """A guard; one that the model opens ``by_itself`` puts no hooks on it, whose own are being run when it closes."""
    if not any(True for _ in records_in(model)):
        raise StateError(
            f"wanted a fused model, found a {type(model).__name__} without a record of fuse_modules; fuse it first,"
            " or guard the model that fuse_modules returned."
        )
    guarding = ChainWatch([chain for chain in chains_of(model) if chain.modules[0] not in _HERE.guarded])
    with ExitStack() as stack:
        _HERE.guarded.update(guarding.starts)
        stack.callback(_HERE.guarded.difference_update, tuple(guarding.starts))

        def before(module: nn.Module, call: Any, **options: Any) -> None:
            stack.callback(module.register_forward_pre_hook(_Hook(call, module), prepend=True, **options).remove)

        def after(module: nn.Module, call: Any, **options: Any) -> None:
            stack.callback(module.register_forward_hook(_Hook(call, module), **options).remove)

        for module in guarding.starts:
            after(module, guarding.gave)
        for module in guarding.stages:
            before(module, guarding.reached, with_kwargs=True)
            after(module, guarding.left, always_call=True)
        if not by_itself:
            before(model, guarding.begin)
            after(model, guarding.returned)
            after(model, guarding.end, always_call=True)
        functions = FunctionsSeen(guarding)
        stack.enter_context(OperatorsSeen(functions))
        stack.enter_context(functions)
        yield guarding


# --- switched on for good


def guard_if_asked(model: nn.Module) -> nn.Module:
    """Let the model guard each of its forwards if ``EAGERQ_GUARD`` is set to anything but 0; returns it."""
    for part in model.modules():
        if part is not model:
            _take_off(part, lambda hook: hook in _ITS_OWN)  # the record is the whole model's now
    if os.environ.get(_SWITCH, "0") not in ("", "0") and _open not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_open, prepend=True)
        model.register_forward_hook(_check)
        model.register_forward_hook(_close, always_call=True)
    return model


def stop_guarding(module: nn.Module) -> None:
    """Take off what any guard put on this module."""
    _take_off(module, lambda hook: hook in _ITS_OWN or isinstance(hook, (_Hook, _LeftOver)))


def _take_off(module: nn.Module, wanted: Callable[[Any], bool]) -> None:
    for group in ("_forward_pre_hooks", "_forward_hooks"):
        for key in [key for key, hook in getattr(module, group).items() if wanted(hook)]:
            for name in (group, f"{group}_with_kwargs", f"{group}_always_called"):
                getattr(module, name, {}).pop(key, None)


def _open(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling() or watching.get() or not any(True for _ in records_in(module)):
        return
    if _HERE.open and _HERE.open[-1][0] is module:  # left open by an interrupt
        _HERE.open.pop()[1].close()
    stack = ExitStack()
    guarding = stack.enter_context(_entered(module, by_itself=True))
    _HERE.open.append((module, stack, guarding))
    guarding.depth = 1


def _check(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    guarding = next((guarding for opened, _, guarding in reversed(_HERE.open) if opened is module), None)
    if guarding is not None:
        guarding.returned(module, args, output)


def _close(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling() or not any(entry[0] is module for entry in _HERE.open):
        return
    while True:
        opened, stack, guarding = _HERE.open.pop()
        with stack:
            if opened is module:
                guarding.end(module, args, output)
                return


#: What a model that guards itself carries.
_ITS_OWN = (_open, _check, _close)
