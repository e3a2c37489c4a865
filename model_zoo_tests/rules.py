"""How others decide what to fuse, for the comparison page: neighbours in registration order, and who can trace what."""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch import nn

from .oracle import Link, Seen, fits, is_leaf


def neighbours(model: nn.Module) -> set[Link]:
    """Adjacent modules without children in flattened ``named_modules``, identities aside."""
    names = [name for name, module in model.named_modules() if is_leaf(module) or not list(module.children())]
    return _adjacent(model, [name for name in names if type(model.get_submodule(name)) is not nn.Identity])


def siblings(model: nn.Module) -> set[Link]:
    """Adjacent children of one parent, identities aside (SparseML's rule)."""
    found: set[Link] = set()
    for parent_name, parent in model.named_modules():
        prefix = f"{parent_name}." if parent_name else ""
        names = [prefix + name for name, child in parent.named_children() if type(child) is not nn.Identity]
        found |= _adjacent(model, names)
    return found


def _adjacent(model: nn.Module, names: list[str]) -> set[Link]:
    return {(a, b) for a, b in itertools.pairwise(names) if is_leaf(model.get_submodule(a)) and is_leaf(model.get_submodule(b))}


def claims(model: nn.Module, links: set[Link], looks: list[Seen]) -> set[Link]:
    """Those links whose types a fused class exists for."""
    axes = {name: n for look in looks for name, n in look.axes.items()}
    modules = dict(model.named_modules())
    return {(a, b) for a, b in links if fits(modules[a], modules[b], axes.get(a))}


def torch_fx_refuses(model: nn.Module) -> str | None:
    """None if plain ``torch.fx.symbolic_trace`` takes the model, else the first line of its error."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            torch.fx.symbolic_trace(model)
    except Exception as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])[:160]


def torch_export_refuses(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """None if ``torch.export.export`` takes the model, in non-strict or else in strict mode; else the first line of its error."""
    message = ""
    for strict in (False, True):
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.export.export(model, args, dict(kwargs), strict=strict)
        except Exception as error:
            message = message or _first_line(error)
        else:
            return None
    return message
