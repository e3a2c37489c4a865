"""A second copy of the Triton kernels, which Triton's interpreter runs on CPU tensors.

Triton decides at import what ``jit`` makes, for its own library too. So the copy is made, and each of its launches runs, while
the environment asks for the interpreter and the library's functions are interpreted ones; before and after nothing is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import eagerq

FOLDER = Path(eagerq.__file__).parent / "quant"


@functools.cache
def _library() -> dict[ModuleType, dict[str, Any]]:
    """Triton's own functions that kernels call, as interpreted ones."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    modules = [m for name, m in sys.modules.items() if name.split(".")[:2] == ["triton", "language"]]
    return {
        m: {name: InterpretedFunction(f.fn) for name, f in vars(m).items() if type(f) is triton.runtime.JITFunction}
        for m in modules
    }


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    library = _library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in library:
            for name, value in list(vars(module).items()):  # the interpreter leaves some of what it changes as it is
                patch.setitem(vars(module), name, library[module].get(name, value))
        yield


#: The modules of kernels, each with those that it takes from.
NEEDS: dict[str, tuple[str, ...]] = {
    "launch": (),
    "kernels": ("launch",),
    "gates": ("launch", "kernels"),
    "sigmoids": ("launch", "kernels", "gates"),
    "norms": ("launch", "kernels", "gates"),
    "gated_norms": ("launch", "kernels", "gates", "norms"),
}


@functools.cache
def kernels(name: str) -> ModuleType:
    """The copy of the module ``triton_<name>``."""
    with pytest.MonkeyPatch.context() as patch:
        for needed in NEEDS[name]:
            patch.setitem(sys.modules, f"eagerq.quant.triton_{needed}", kernels(needed))
        copy = _copied(f"triton_{name}")
    if name == "launch":
        copy.Plan.launch = _interpreted(copy.Plan.launch)
    return copy


def _interpreted(launch: Any) -> Any:
    def interpreted(*args: Any) -> None:
        with interpreter():
            launch(*args)

    return interpreted


def _copied(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"interpreted_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    with interpreter():
        spec.loader.exec_module(copy)
    return copy
