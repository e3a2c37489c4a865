"""Optional dependencies: brought in where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from eagerq.errors import MissingExtraError

#: What each extra of pyproject.toml is for.
_PURPOSE = {"onnx": "ONNX export", "cli": "the eagerq command", "timm": "a timm or torchvision model", "demo": "eagerq demo"}

#: Packages whose name is not that of their module.
_PACKAGE = {"sklearn": "scikit-learn"}


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which comes with the extra named.

    Raises:
        MissingExtraError: naming the pip command, if it is not installed or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision beside another torch raises RuntimeError
        root = module.partition(".")[0]
        command = f"run: pip install 'eagerq[{extra}]'"
        what = f"{_PURPOSE.get(extra, 'eagerq')} needs {_PACKAGE.get(root, root)}"
        name = getattr(error, "name", None)
        if (
            isinstance(error, ImportError)
            and (name is None or name.partition(".")[0] == root)
            and "cannot import" not in str(error)
        ):
            raise MissingExtraError(f"{what}; {command}") from error
        cause = " ".join(str(error).split())
        raise MissingExtraError(f"{what}, which cannot be imported ({type(error).__name__}: {cause}); {command}") from error
