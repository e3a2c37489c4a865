"""Putting a module in the place of another, under every name it has."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eagerq.errors import ModelError


def names_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module with all its full names, in registration order; a shared module has several."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {module: tuple(found) for module, found in names.items()}


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules (keys) by others (values) under every parent and name, all at once.

    Plain lists, tuples and dicts among a parent's attributes that hold one are built anew. Returns ``model``, or its
    replacement if it is itself a key. New modules are not searched, so a key may live on inside its replacement.
    """
    slots: list[tuple[dict[str, Any], str, Any]] = []
    rebuilt: dict[int, Any] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                slots.append((parent._modules, name, new[child]))
        for name, value in vars(parent).items():
            if type(value) in (list, tuple, dict) and name not in BOOKKEEPING:
                slots.append((vars(parent), name, _with_replaced(value, new, rebuilt)))
    for place, name, found in slots:
        place[name] = found
    return new.get(model, model)


def _with_replaced(value: Any, new: Mapping[nn.Module, nn.Module], rebuilt: dict[int, Any]) -> Any:
    """A container with the modules in it replaced: itself where none is, and one result for one object."""
    if isinstance(value, nn.Module):
        return new.get(value, value)
    if type(value) not in (list, tuple, dict):
        return value
    if id(value) not in rebuilt:
        rebuilt[id(value)] = value  # for what holds itself
        keys, items = (list(value), list(value.values())) if type(value) is dict else (None, list(value))
        found = [_with_replaced(item, new, rebuilt) for item in items]
        if any(a is not b for a, b in zip(found, items, strict=True)):
            rebuilt[id(value)] = type(value)(found if keys is None else zip(keys, found, strict=True))
    return rebuilt[id(value)]


#: Attributes every module has; those that are dicts or sets are changed in place.
BOOKKEEPING = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def all_or_nothing(*models: nn.Module) -> Iterator[None]:
    """If an exception passes, put all modules of ``models`` back as they were: children, tensors, hooks and attributes.

    Containers get their old contents back and stay the same objects, so handles of hooks still work.
    """
    saved = []
    for module in {m: None for model in models for m in model.modules()}:
        attributes = dict(vars(module))
        held = [(v, copy.copy(v)) for k, v in attributes.items() if k in BOOKKEEPING and isinstance(v, (dict, set))]
        saved.append((module, attributes, held))
    try:
        yield
    except BaseException:
        for module, attributes, held in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for container, contents in held:
                container.clear()
                container.update(contents)
        raise


def own_method(module: nn.Module) -> str | None:
    """The name of a method that this very module has in place of its class's, or None."""
    return next((k for k, v in vars(module).items() if callable(v) and callable(getattr(type(module), k, None))), None)


def computed_tensor(module: nn.Module) -> str | None:
    """``"weight"`` or ``"bias"`` if that is no parameter but a tensor set anew before each forward, or None."""
    return next((k for k in ("weight", "bias") if isinstance(vars(module).get(k), Tensor)), None)


def is_parametrized(module: nn.Module) -> bool:
    """Whether it carries parametrizations of ``torch.nn.utils.parametrize``."""
    return type(module).__module__ == "torch.nn.utils.parametrize" or bool(getattr(module, "parametrizations", None))


def state_tensors(model: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


class _ToMeta(TorchFunctionMode):
    """While a module is copied: plain tensors among its attributes become meta tensors too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__deepcopy__, Tensor.clone) and isinstance(args[0], Tensor):
            return torch.empty_like(args[0], device="meta", requires_grad=args[0].requires_grad)
        return func(*args, **(kwargs or {}))


class _WithoutGraph(TorchFunctionMode):
    """While a module is copied: results of operations, which PyTorch does not copy, become plain tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose tensors are all on the meta device: structure and shapes without data.

    Raises:
        ModelError: as ``full_copy``.
    """
    memo: dict[int, Any] = {}
    for tensor in state_tensors(model):
        with torch.no_grad():
            empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    with _ToMeta():
        return _deepcopy(model, memo)


def full_copy(model: nn.Module) -> nn.Module:
    """A deep copy, data included; tensors that an earlier forward left behind are copied without their graph.

    Raises:
        ModelError: if the model cannot be copied, or the copy would share modules with it.
    """
    with _WithoutGraph():
        return _deepcopy(model, {})


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"eagerq works on a copy, and copy.deepcopy of {type(model).__name__} failed:"
            f" {type(error).__name__}: {error}. Make the model copyable (keep no graph tensors, locks or files in it)."
        ) from error
    own = set(model.modules())
    for name, module in copied.named_modules():
        if module in own:  # what is fused, hooked or run in the copy would be so in the model
            kind = type(module).__name__
            raise ModelError(
                f"eagerq works on a copy, and copy.deepcopy of {type(model).__name__} gives"
                f" {f'its {name!r} (a {kind})' if name else 'the model'} itself, not a copy of it; work on the copy would change"
                f" the model. Let {kind}.__deepcopy__ make a new module, or keep this one out of the model's modules."
            )
    return copied
