"""Models named on the command line."""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagerq.errors import ModelError
from eagerq.extras import require

_FORMS = "timm:NAME or package.module:factory, such as timm:resnet50 or torchvision.models:resnet18"


def load_model(spec: str) -> nn.Module:
    """The model that ``spec`` names: ``timm:NAME``, or ``package.module:factory`` called without arguments.

    Raises:
        ModelError: if there is no such module, attribute or timm model, if the factory fails or gives no ``nn.Module``.
        MissingExtraError: if timm or torchvision is asked for and absent.
    """
    library, colon, name = spec.partition(":")
    if not (colon and library and name):
        raise ModelError(f"wanted {_FORMS}, found {spec!r}.")
    return _from_timm(name) if library == "timm" else _from_factory(library, name)


def is_model_file(spec: str) -> bool:
    """Whether ``spec`` names a file of a saved model rather than a factory."""
    return Path(spec).suffix in (".pt", ".pth")


def read_model(path: str, trusted: bool) -> nn.Module:
    """The model that ``torch.save(model, path)`` wrote.

    Such a file is a pickle, which runs whatever code its writer chose while it is read. It is read only if the caller
    trusts it, else with ``weights_only=True``, which refuses all classes that the program has not allowed by name
    (``torch.serialization.add_safe_globals``).

    Raises:
        ModelError: if there is no such file, it cannot be read, is not trusted, or holds no ``nn.Module``.
    """
    if not Path(path).is_file():
        raise ModelError(f"wanted a model saved at {path}, found no file; check the path.")
    _look_in_working_folder()
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=not trusted)
    except Exception as error:  # pickles raise anything
        if trusted:
            raise ModelError(
                f"{path} cannot be read: {type(error).__name__}: {error}; run where its classes can be imported, or name a"
                " factory."
            ) from error
        raise ModelError(
            f"{path} cannot be read as tensors alone (weights_only=True). A whole model is a pickle, which may run any code while"
            " it is read: pass --trust if the file is your own, or name a factory that builds the model and loads its weights."
        ) from error
    if not isinstance(found, nn.Module):
        raise ModelError(
            f"wanted a whole model in {path}, found a {type(found).__name__}; save it with torch.save(model, path), or name a"
            " factory that builds the model and loads its weights."
        )
    return found


def _from_timm(name: str) -> nn.Module:
    timm = require("timm", "timm")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them."
        raise ModelError(f"timm has no model {name!r}; {hint}")
    return _called(functools.partial(timm.create_model, name, pretrained=False), f"timm.create_model({name!r})")


def _from_factory(library: str, name: str) -> nn.Module:
    if library.partition(".")[0] in ("timm", "torchvision"):
        require(library.partition(".")[0], "timm")
    _look_in_working_folder()
    try:
        found: Any = importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{library}.".startswith(f"{error.name}."):
            raise ModelError(f"{library} cannot be imported, since it needs {error.name}; install that first.") from error
        raise ModelError(f"there is no module {error.name!r} to take {name!r} from; install it, or run where it lies.") from error
    except Exception as error:  # the user's module
        raise ModelError(f"{library} cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else "."
            raise ModelError(f"{library} has no {name!r}{hint}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ModelError(f"wanted a function or class to call in {library}:{name}, found a {type(found).__name__}.")
    return _called(found, f"{library}:{name}")


def _look_in_working_folder() -> None:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _called(factory: Any, label: str) -> nn.Module:
    try:
        model = factory()
    except Exception as error:  # the user's factory
        raise ModelError(
            f"{label} called without arguments raised {type(error).__name__}: {error}; wrap it in a factory that takes none."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"wanted an nn.Module from {label}, found a {type(model).__name__}; name a factory that returns a model."
        )
    return model
