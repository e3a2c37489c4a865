"""What eagerq knows of other libraries' types: one adapter a library, loaded only if the library is.

An adapter module may define ``expand(module)``, ``open_sums(module)``, ``ACTIVATIONS`` and ``example_inputs(model)``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

_M = TypeVar("_M", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Expansion:
    """A module taken apart into modules of exactly known types.

    Attributes:
        members: the known modules, run in this order; they hold the original's own parameters.
        rest: what remains in the original's place when the members are fused away, or None.
    """

    members: tuple[nn.Module, ...]
    rest: nn.Module | None = None


def adapters() -> list[ModuleType]:
    """The adapters of those libraries that the program has loaded."""
    names = {"timm": "timm", "torchvision": "torchvision", "transformers": "transformers"}
    return [importlib.import_module(f"eagerq.integrations.{name}") for name, lib in names.items() if lib in sys.modules]


def expand(module: nn.Module) -> Expansion:
    """What ``module`` is made of; itself, if no adapter knows it."""
    for adapter in adapters():
        if hasattr(adapter, "expand"):
            found: Expansion | None = adapter.expand(module)
            if found is not None:
                return found
    return Expansion((module,))


@contextlib.contextmanager
def sums_as_modules(model: nn.Module, *, keeps: bool) -> Iterator[int]:
    """Let those modules of ``model`` that an adapter knows call each of their sums as a module, which can hold a quantizer.

    They stay the same objects and compute the same. Yields how many there are. Afterwards they are as they were, unless it
    ``keeps`` them and nothing was raised.
    """
    closing: list[Callable[[], None]] = []
    try:
        openers = [adapter.open_sums for adapter in adapters() if hasattr(adapter, "open_sums")]
        for module in list(model.modules()):
            closing += [close for open_sums in openers if (close := open_sums(module)) is not None]
        yield len(closing)
    except BaseException:
        keeps = False
        raise
    finally:
        if not keeps:
            for close in closing:
                close()


def activations() -> tuple[type[nn.Module], ...]:
    """Elementwise activation types of the loaded libraries, beyond PyTorch's."""
    return tuple(t for adapter in adapters() for t in getattr(adapter, "ACTIVATIONS", ()))


def example_inputs(model: nn.Module) -> Any | None:
    """Example inputs that follow from what the model says of itself, or None."""
    for adapter in adapters():
        if hasattr(adapter, "example_inputs"):
            found = adapter.example_inputs(model)
            if found is not None:
                return found
    return None


def retyped(module: nn.Module, cls: type[_M]) -> _M:
    """A ``cls`` with the attributes, parameters and buffers (the same objects) of ``module``, without its children and hooks."""
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    fresh = frozenset(vars(new)) - {"training"}
    for name, value in vars(module).items():
        if name not in fresh:
            new.__dict__[name] = value
    new._parameters.update(module._parameters)
    new._buffers.update(module._buffers)
    new._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return new
