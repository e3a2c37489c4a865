"""Modules that count their changes: who remembers what it found in them need not look at each of them again."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import nn


class Changes:
    """How many there were, of all watched modules together; it never falls."""

    count: ClassVar[int] = 0


_ABSENT = object()


def _counted(method: Any) -> Any:
    @functools.wraps(method)
    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        Changes.count += 1
        return method(self, *args, **kwargs)

    return counted


class Watched(nn.Module):
    """Mixin of modules of which each change is counted: of attributes, members, hooks and class.

    What is written past a module into PyTorch's dicts of its members is not, as ``torch.func.functional_call`` exchanges buffers:
    who remembers compares those.
    """

    #: Attributes that a forward writes, and that decide nothing.
    UNCOUNTED: ClassVar[frozenset[str]] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if torch.compiler.is_compiling():
            super().__setattr__(name, value)
            return
        before = self.__dict__.get(name, _ABSENT)
        super().__setattr__(name, value)
        if value is not before and name not in self.UNCOUNTED:
            Changes.count += 1

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        Changes.count += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        Changes.count += 1

    register_forward_hook = _counted(nn.Module.register_forward_hook)
    register_forward_pre_hook = _counted(nn.Module.register_forward_pre_hook)
    register_backward_hook = _counted(nn.Module.register_backward_hook)
    register_full_backward_hook = _counted(nn.Module.register_full_backward_hook)
    register_full_backward_pre_hook = _counted(nn.Module.register_full_backward_pre_hook)
