"""Each Triton kernel compiles to machine code, on machines without a GPU too, where the other tests interpret it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

triton: Any = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from eagerq.quant import triton_gated_norms, triton_gates, triton_kernels, triton_norms, triton_sigmoids  # noqa: E402

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
