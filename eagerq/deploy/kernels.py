"""Which operations of an exported file run as integer kernels in ONNX Runtime, and why others do not."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eagerq.deploy.rewrites import KEPT
from eagerq.deploy.runtime import session
from eagerq.extras import require
from eagerq.tables import table

_INTEGER = frozenset("QGemm ConvInteger MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul NhwcMaxPool".split())
#: Operators that only move values, or that compute shapes: what type they move is that of their input.
_MOVING = frozenset(
    "Transpose Reshape Flatten Squeeze Unsqueeze Identity Slice Split Gather Concat Expand Tile Pad DepthToSpace SpaceToDepth"
    " Resize MaxPool ReorderInput ReorderOutput Shape Size Constant ConstantOfShape Cast Range".split()
)
_EDGES = frozenset(("QuantizeLinear", "DequantizeLinear"))
_LINEAR = frozenset("Conv FusedConv ConvTranspose Gemm FusedGemm MatMul FusedMatMul".split())
#: What ends a name that ONNX Runtime's optimiser made of an operation's own.
_MADE = ("_quant", "_nchwc", "_nhwc", "_token", "_fused", "/fused", "_transformed")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One operation as the engine runs it.

    Attributes:
        op: the engine's operator, such as ``"QLinearConv"``.
        module: full name of the module it came from; ``""`` for the model itself.
        integer: whether it runs on codes.
        reason: why it runs in float; ``""`` for integers.
        expected: whether a float one is known to be so: a norm or a layer that stayed float, or arithmetic on what is not
            quantized.
    """

    op: str
    module: str
    integer: bool
    reason: str = ""
    expected: bool = True


@dataclasses.dataclass(frozen=True)
class Export:
    """What ``export_onnx`` wrote. It is a path (``os.fspath``); printing it gives a table of the kernels.

    Attributes:
        path: the file.
        engine: name and version of the engine that was asked; None if ONNX Runtime is not installed.
        kernels: its operations, without those that only move values.
    """

    path: Path
    engine: str | None
    kernels: tuple[Kernel, ...]

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @property
    def floats(self) -> tuple[Kernel, ...]:
        """The operations that run in float."""
        return tuple(kernel for kernel in self.kernels if not kernel.integer)

    def __str__(self) -> str:
        if self.engine is None:
            return f"{self.path}; install eagerq[onnx] to see which operations become integer kernels"
        lines = [f"{self.path}: {len(self.kernels) - len(self.floats)} of {len(self.kernels)} operations are integer kernels"]
        counts = Counter(kernel.op for kernel in self.kernels if kernel.integer)
        lines[0] += f" in {self.engine}"
        lines += [f"integer: {', '.join(f'{n} {op}' for op, n in sorted(counts.items()))}"] if counts else []
        if self.floats:
            rows = [(k.op, k.module or "(model)", k.reason) for k in self.floats]
            lines.append(table(("float", "module", "why"), rows))
        return "\n".join(lines)


def kernels_of(proto: Any, modules: Mapping[str, str], quantized: frozenset[str], norms: frozenset[str]) -> list[Kernel]:
    """What ONNX Runtime, at optimisation level ALL, makes of a graph.

    Args:
        proto: the model.
        modules: full module name by the names of nodes and of their results.
        quantized: names of the modules with integer weights.
        norms: names of the norms that stayed float, which have no integer kernel.

    Raises:
        MissingExtraError: without ``onnx`` or ``onnxruntime``.
    """
    onnx = require("onnx", "onnx")
    with tempfile.TemporaryDirectory() as folder:
        optimized = os.path.join(folder, "optimized.onnx")
        session(proto.SerializeToString(), optimized=optimized)
        graph = onnx.load(optimized).graph
    return list(_classified(graph, modules, quantized, norms))


def _classified(
    graph: Any, modules: Mapping[str, str], quantized: frozenset[str], norms: frozenset[str]
) -> Iterator[Kernel]:
    constants = {initializer.name for initializer in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    shapes: set[str] = set()  # values that are shapes or indices

    def moves(node: Any) -> bool:
        return node.op_type in _MOVING or node.name.endswith(KEPT)

    def through(name: str) -> Any:
        """The operation that made a value, past those that move it."""
        node = producers.get(name)
        while node is not None and moves(node) and node.input:
            node = producers.get(node.input[0])
        return node

    def read_by(name: str) -> list[Any]:
        found = []
        for node in readers[name]:
            found += read_by(node.output[0]) if moves(node) else [node]
        return found

    for node in graph.node:
        given = [name for name in node.input if name and name not in constants]
        if node.op_type in ("Shape", "Size") or (given and all(name in shapes for name in given)):
            shapes.update(node.output)
            continue
        if node.op_type in _EDGES or moves(node):
            continue
        module = _module_of(node.name, modules)
        if node.op_type.startswith("QLinear") or node.op_type in _INTEGER:
            yield Kernel(node.op_type, module, True)
            continue
        sources = [through(name) for name in given]
        from_codes = bool(sources) and all(source is not None and source.op_type == "DequantizeLinear" for source in sources)
        after = [reader for name in node.output for reader in read_by(name)]
        to_codes = bool(after) and all(reader.op_type == "QuantizeLinear" for reader in after)
        linear = node.op_type in _LINEAR and module in quantized
        stays = node.op_type in _LINEAR and not linear and node.input[1] in constants
        if stays:
            reason = "its weights are float"
        elif not from_codes:
            reason = "reads a tensor that is not quantized"
        elif not to_codes:
            reason = "its result is not quantized"
        else:
            reason = f"the engine has no integer kernel for {node.op_type} here"
        known = stays or module in norms
        yield Kernel(node.op_type, module, False, reason, not (linear or (from_codes and to_codes and not known)))


def _module_of(name: str, modules: Mapping[str, str]) -> str:
    """By the name of the node that this one was made of."""
    while name not in modules:
        ends = [name.rfind(end) for end in _MADE if name.rfind(end) > 0]
        if not ends:
            return ""
        name = name[: max(ends)]
    return modules[name]
