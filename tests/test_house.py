"""The house: floors, imports without side effects, public names with docstrings, examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import eagerq

ROOT = Path(eagerq.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

#: A module may import modules of its own floor's package and of lower floors only.
FLOORS = (
    ("errors", "tables", "extras"),
    ("quant",),
    ("nn",),
    ("integrations", "surgery", "inputs", "trace", "values", "meta_forms", "recorder", "dataflow", "checks"),
    ("patterns",),
    ("record", "plan", "evidence", "trial", "planner", "placement", "conversion", "chains", "guarding", "unfusing"),
    ("workflow", "verify", "checkpoint", "exactness", "compiling"),
    ("deploy",),
    ("cli", "demo", "__main__"),
)
FLOOR_OF = {name: i for i, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """The eagerq modules a file imports when it runs (imports for type checkers aside)."""
    tree = ast.parse(path.read_text())
    guarded = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "eagerq":
            rest = node.module.split(".")[1:]
            found |= {".".join(rest)} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("eagerq.") for a in node.names if a.name.startswith("eagerq.")}
    return found


@pytest.mark.parametrize("path", [f for f in FILES if f != ROOT / "__init__.py"], ids=module_name)
def test_a_floor_imports_only_floors_below(path: Path) -> None:
    own = FLOOR_OF[module_name(path).split(".")[0]]
    for target in imports(path):
        assert FLOOR_OF[target.split(".")[0]] <= own, f"{module_name(path)} imports {target}"


def test_every_file_has_a_floor() -> None:
    assert {module_name(f).split(".")[0] for f in FILES} - {""} == set(FLOOR_OF)


def test_float_fused_modules_know_nothing_of_quantization() -> None:
    for name in ("nn/intrinsic/fused.py", "nn/intrinsic/modules.py", "nn/modules/batchnorm.py", "nn/modules/ops.py"):
        assert not {t for t in imports(ROOT / name) if t.startswith(("quant", "nn.qat"))}, name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_assert_and_no_tracer(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"assert on line {node.lineno}"
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert not dotted.startswith(("torch.fx", "torch.jit")), f"{dotted} on line {node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            text = ast.unparse(node)
            assert "torch.fx" not in text, text
            assert "torch.jit" not in text, text


def test_importing_loads_no_extra() -> None:
    code = (
        "import sys, eagerq\n"
        "extras = {'timm', 'torchvision', 'transformers', 'onnx', 'onnxscript', 'onnxruntime', 'rich', 'typer', 'sklearn',"
        " 'matplotlib', 'jinja2'}\n"
        "print(sorted(extras & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_public_names_resolve_and_are_documented() -> None:
    packages = ["eagerq", "eagerq.nn", "eagerq.nn.intrinsic", "eagerq.nn.intrinsic.qat", "eagerq.nn.qat", "eagerq.quant"]
    for package in packages:
        module = importlib.import_module(package)
        assert module.__doc__, package
        assert len(set(module.__all__)) == len(module.__all__), package
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert value.__doc__, f"{package}.{name}"
                assert value.__doc__ != getattr(value.__base__, "__doc__", "") if inspect.isclass(value) else True, name


def test_errors_are_what_a_caller_would_catch() -> None:
    for name, cls in vars(eagerq.errors).items():
        if inspect.isclass(cls) and issubclass(cls, eagerq.EagerqError) and cls is not eagerq.EagerqError:
            assert issubclass(cls, (TypeError, ValueError, RuntimeError, ImportError)), name


@pytest.mark.parametrize("name", [m.name for m in pkgutil.walk_packages([str(ROOT)], "eagerq.") if "__main__" not in m.name])
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
