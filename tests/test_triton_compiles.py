"""Each Triton kernel compiles to machine code, on machines without a GPU too, where the other tests interpret it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton: Any = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from eagerq.quant import (  # noqa: E402
    triton_gated_norms,
    triton_gates,
    triton_kernels,
    triton_launch,
    triton_norms,
    triton_sigmoids,
)
from eagerq.quant.memory import Held  # noqa: E402

#: What a launch may leave out, here all or nothing; a range that is symmetric, or not.
FLAGS = (
    "HAS_LOW", "HAS_HIGH", "OBSERVE", "LEARN", "MASK", "GATED", "AFFINE", "TRACKS", "SYMMETRIC", "POWER_OF_TWO",
    "MIN_MAX", "EVEN",
)  # fmt: skip
SIZES = {
    "QMIN": 0, "QMAX": 255, "LEVELS": 127, "FIXED_ZERO": 128, "FUSED": True, "BLOCK": 1024,
    "BP": 8, "STAGES": 3, "BR": 32, "BC": 32,
}  # fmt: skip
#: Those of one tensor's values, and of codes and counts; other pointers are to float32.
VALUES = frozenset(("x_ptr", "out_ptr", "grad_ptr", "weight_ptr"))
INTEGERS = {"mask_ptr": "*u8", "batches_ptr": "*i64"}
NUMBERS = frozenset(("n", "rows", "chunk", "parts", "channels", "length"))


def launched() -> dict[str, Any]:
    """The functions that ask which program they are: kernels, not what kernels call."""
    found = {}
    for module in (triton_kernels, triton_gates, triton_sigmoids, triton_norms, triton_gated_norms):
        for node in ast.parse(Path(str(module.__file__)).read_text()).body:
            if isinstance(node, ast.FunctionDef) and "program_id" in ast.dump(node):
                found[node.name] = getattr(module, node.name)
    return found


def typed(name: str, kind: str) -> str:
    """The type of an argument."""
    if name in NUMBERS:
        return "i32"
    if not name.endswith("_ptr"):
        return "fp32"
    if name in VALUES:
        return f"*{kind}"
    return INTEGERS.get(name, "*i32" if "zero" in name or "scratch" in name else "*fp32")


def test_there_are_kernels() -> None:
    some = {"_activation_forward", "_gelu_gradient", "_gated_backward", "_norm_statistics", "_norm_gated_forward"}
    some |= {"_sigmoid_forward", "_sigmoid_backward"}
    assert some <= launched().keys()


@pytest.mark.parametrize(
    ("kind", "capability", "flag", "hard"), [("fp32", 80, True, False), ("bf16", 90, False, True), ("fp16", 90, True, True)]
)
@pytest.mark.parametrize("name", launched())
def test_a_kernel_compiles(name: str, kind: str, capability: int, flag: bool, hard: bool) -> None:
    kernel = launched()[name]
    given = {**SIZES, **dict.fromkeys(FLAGS, flag), "HARD": hard, "GELU": False}
    compile_for(kernel, given, kind, capability)


@pytest.mark.parametrize(("kind", "capability", "flag"), [("fp32", 80, True), ("bf16", 90, True), ("fp16", 90, False)])
def test_a_kernel_compiles_behind_a_gelu(kind: str, capability: int, flag: bool) -> None:
    given = {**SIZES, **dict.fromkeys(FLAGS, flag), "HAS_LOW": False, "HAS_HIGH": False, "GELU": True}
    compile_for(triton_kernels._activation_forward, given, kind, capability)


def compile_for(kernel: Any, given: dict[str, Any], kind: str, capability: int) -> None:
    signature = {p.name: "constexpr" if p.is_constexpr else typed(p.name, kind) for p in kernel.params}
    constants = {(i,): given[p.name] for i, p in enumerate(kernel.params) if p.is_constexpr}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    assert made.asm["cubin"]
    assert kernel.__name__ in made.asm["ptx"]
    assert_launched_as_compiled(kernel, made)


def assert_launched_as_compiled(kernel: Any, made: Any) -> None:
    """What the launcher is told of the arguments is what the machine code takes."""
    entry = made.asm["ptx"].partition(".entry")[2].partition(")")[0]
    given, sent = sum(not p.is_constexpr for p in kernel.params), list[Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "_launcher", lambda *arguments: sent.append(arguments))
        launches = triton_launch._launches(SimpleNamespace(src=made.src, metadata=made.metadata, function=7), given)
        assert launches is not None
        launches(5, 11, *range(given))
    ((function, *programs, warps, shared, types, arguments, stream),) = sent
    assert [{"O": "u64", "l": "u64", "i": "u32", "f": "f32"}[kind] for kind in types] == re.findall(r"\.param \.(\w+)", entry)
    assert (function, programs, warps, shared, stream) == (7, [5, 1, 1], made.metadata.num_warps, made.metadata.shared, 11)
    assert arguments[:given] == (*range(given),) and len(arguments) == len(types)


@pytest.mark.parametrize(
    "metadata",
    [{"num_ctas": 2}, {"launch_pdl": True}, {"launch_cooperative_grid": True}, {"global_scratch_size": 8}, {"kind": "i16"}],
)
def test_what_the_launcher_does_not_know_triton_launches(metadata: dict[str, Any]) -> None:
    kind = metadata.pop("kind", "i32")
    usual = {"num_ctas": 1, "launch_pdl": False, "launch_cooperative_grid": False, "global_scratch_size": 0}
    usual |= {"num_warps": 4, "shared": 0}
    source = SimpleNamespace(signature={"x_ptr": "*fp32", "n": kind, "BLOCK": "constexpr"})
    made = SimpleNamespace(src=source, metadata=SimpleNamespace(**{**usual, **metadata}), function=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "_launcher", print)
        assert triton_launch._launches(made, 2) is None
        made.metadata, made.src = SimpleNamespace(**usual), SimpleNamespace(signature={**source.signature, "n": "i32"})
        assert triton_launch._launches(made, 2) is not None
        patch.setattr(triton_launch, "_launcher", None)
        assert triton_launch._launches(made, 2) is None


def test_what_was_compiled_is_launched_by_triton_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launch compiles; the next has addresses and numbers, and for Triton's launcher the constants too."""
    monkeypatch.setattr(triton_launch, "_launcher", None)
    sent: list[Any] = []

    class Kernel:
        def __getitem__(self, programs: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **options: Any) -> Any:
                sent.append((programs, arguments, options))
                source = SimpleNamespace(signature={"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"})
                return SimpleNamespace(
                    src=source, metadata=SimpleNamespace(), run=lambda *a: sent.append(a), function=7, packed_metadata="packed"
                )

            return launch

    x, y = torch.zeros(3), torch.zeros(4)
    plan = triton_launch.Plan(Kernel(), (64,), num_warps=2)
    for _ in range(2):
        plan.launch(11, 5, (x,), (3,), Held(y))
    assert sent[0] == ((5,), (x, y, 3, 64), {"enable_fp_fusion": False, "num_warps": 2})
    assert sent[1:] == [(5, 1, 1, 11, 7, "packed", None, None, None, x.data_ptr(), y.data_ptr(), 3, 64)]
