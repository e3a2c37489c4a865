"""``verify_deployment``: does the engine compute, code for code, what the model computes?"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.checks import check_model
from eagerq.deploy.runtime import session
from eagerq.errors import ExportError, InputsError, StateError
from eagerq.exactness import ExactRun, exact_mode
from eagerq.extras import require
from eagerq.inputs import Inputs, as_runs
from eagerq.nn.quantized import QuantizeDequantize, is_deployed, is_qat
from eagerq.quant.code_values import Coded
from eagerq.quant.codes import CodeTensor
from eagerq.quant.engine import EngineProfile
from eagerq.quant.fake_quantize import FakeQuantize
from eagerq.tables import table
from eagerq.trace import tensors_in

#: What ``export_onnx`` adds to a quantizer's full name to name the tensor of its codes.
CODES = ".codes"


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """One quantized tensor, in the model and in the engine.

    Attributes:
        name: full name of its quantizer.
        compared: number of codes.
        differing: number of codes that differ.
        largest: largest difference, in codes.
    """

    name: str
    compared: int
    differing: int
    largest: int


@dataclasses.dataclass(frozen=True)
class Verification:
    """What ``verify_deployment`` found. Printing it gives a table of the tensors that differ, and a summary.

    Attributes:
        rows: quantized tensors in the order they are computed.
        output_difference: largest absolute difference of the model's float outputs, in real values.
        exact: the exact mode's run: its profile, and what it computed in float.
        engine: name and version of the engine.
        missing: quantizers of the model that the file has no tensor for; the engine may have dropped them.
    """

    rows: tuple[TensorDifference, ...]
    output_difference: float
    exact: ExactRun
    engine: str
    missing: tuple[str, ...]

    @property
    def compared(self) -> int:
        """Number of codes compared."""
        return sum(row.compared for row in self.rows)

    @property
    def differing(self) -> int:
        """Number of codes that differ."""
        return sum(row.differing for row in self.rows)

    @property
    def first(self) -> TensorDifference | None:
        """Where the first difference arises; None if there is none."""
        return next((row for row in self.rows if row.differing), None)

    @property
    def same(self) -> bool:
        """Whether codes were compared and none differs, and no output either; where a part ran in float, codes alone count."""
        return bool(self.compared) and not self.differing and (self.output_difference == 0 or bool(self.exact.floats))

    @property
    def summary(self) -> str:
        """The counts in one sentence."""
        sides = f"{self.engine} and the exact mode ({self.exact.profile.name}, formulas {self.exact.profile.version})"
        if not self.compared:
            return f"no code could be compared between {sides}"
        return (
            f"{self.differing:,} of {self.compared:,} codes in {len(self.rows)} tensors differ between {sides};"
            f" outputs differ by at most {self.output_difference:g}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The result as plain lists, numbers and strings, for JSON; an ``output_difference`` that is not finite is None."""
        return {
            "engine": self.engine,
            "profile": {"name": self.exact.profile.name, "version": self.exact.profile.version},
            "same": self.same,
            "compared": self.compared,
            "differing": self.differing,
            "first": None if self.first is None else self.first.name,
            "output_difference": self.output_difference if math.isfinite(self.output_difference) else None,
            "tensors": [dataclasses.asdict(row) for row in self.rows],
            "in_float": [
                {"function": function, "module": module, "times": times}
                for (function, module), times in self.exact.floats.items()
            ],
            "missing": list(self.missing),
        }

    def __str__(self) -> str:
        lines = [self.summary]
        differing = [row for row in self.rows if row.differing]
        if differing:
            shown = [(r.name, f"{r.compared:,}", f"{r.differing:,}", str(r.largest)) for r in differing]
            lines += [f"first difference: {differing[0].name}", table(("tensor", "codes", "differing", "largest"), shown)]
        if self.exact.floats:
            lines += ["computed in float, where engines may round otherwise:", str(self.exact)]
        if self.missing:
            lines.append(f"not in the file: {', '.join(self.missing)}")
        return "\n".join(lines)


def verify_deployment(
    model: nn.Module, path: str | os.PathLike[str], batches: Any, *, profile: EngineProfile | str = "onnxruntime-x64"
) -> Verification:
    """Run ``path`` in ONNX Runtime beside the model's exact mode and compare every quantized tensor code by code.

    The engine runs on one thread at optimisation level ALL, once as it is for the outputs and once with
    every quantized tensor tapped.

    Args:
        model: the QAT model, or the deployed one that was exported.
        path: what ``export_onnx`` wrote.
        batches: inputs to compare on, as ``example_inputs`` of ``plan_fusion``; of an iterable that is
            no list, all items are taken.
        profile: an ``EngineProfile`` or its name.

    Raises:
        StateError: for a float model, or one whose quantizers observed nothing.
        InputsError: if there are no batches, or the file does not take them.
        ExportError: if the file cannot be read, or holds no quantized tensor of this model.
        MissingExtraError: without ``onnx`` or ``onnxruntime``.
    """
    onnx, runtime = require("onnx", "onnx"), require("onnxruntime", "onnx")
    check_model(model)
    if not (is_qat(model) or is_deployed(model)):
        raise StateError("wanted a QAT or deployed model, found a float one; call eagerq.convert_qat first.")
    try:
        proto = onnx.load(os.fspath(path))
    except Exception as error:
        raise ExportError(f"cannot read {os.fspath(path)} as ONNX: {error}; write it with eagerq.export_onnx.") from error
    taps = [name for node in proto.graph.node for name in node.output if name.endswith(CODES)]
    quantizers = {m: n for n, m in model.named_modules() if isinstance(m, QuantizeDequantize) or _is_activations(m)}
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if module in quantizers}
    of: dict[nn.Module, list[str]] = {module: [] for module in quantizers}  # by whatever name a call reached it, in their order
    for tap in taps:
        name = tap.removesuffix(CODES)
        first, _, number = name.rpartition(".")
        module = named.get(name) or (named.get(first) if number.isdigit() else None)
        if module is not None:
            of[module].append(tap)
    if not any(of.values()):
        raise ExportError(
            f"{os.fspath(path)} holds no quantized tensor of this model; write it with eagerq.export_onnx from this very model."
        )
    whole = session(proto.SerializeToString())
    outputs = [output.name for output in proto.graph.output]
    kinds = {v.name: v for v in proto.graph.value_info}
    for tap in taps:
        proto.graph.output.append(kinds[tap] if tap in kinds else onnx.ValueInfoProto(name=tap))
    tapped = session(proto.SerializeToString())

    found: dict[str, list[int]] = {}
    largest = 0.0
    modes = [(module, module.training) for module in model.modules()]
    seen: list[tuple[nn.Module, Tensor]] = []
    try:
        model.eval()
        with torch.no_grad(), exact_mode(model, profile) as exact, _codes_of(quantizers, seen):
            for run in as_runs(batches, limit=2**62):
                seen.clear()
                feeds = _feeds(whole, run)
                try:
                    given = list(tensors_in(model(*run.args, **run.kwargs), deep=True))
                except Exception as error:
                    raise InputsError(f"the model does not take these inputs: {type(error).__name__}: {error}") from error
                try:
                    theirs = whole.run(outputs, feeds)
                    codes = dict(zip(taps, tapped.run(taps, feeds), strict=True))
                except Exception as error:
                    raise InputsError(f"the engine does not take these inputs: {error}") from error
                if len(given) != len(theirs):
                    raise ExportError(
                        f"the model gives {len(given)} tensors, the file {len(theirs)} ({', '.join(outputs)});"
                        " write it with eagerq.export_onnx from this very model."
                    )
                for ours, other in zip(given, theirs, strict=True):
                    largest = max(largest, _apart(ours.cpu(), torch.from_numpy(other)))
                calls = {module: iter(names) for module, names in of.items()}
                for module, ours in seen:
                    tap = next(calls[module], None)
                    if tap is not None:
                        _compare(found.setdefault(tap.removesuffix(CODES), [0, 0, 0]), ours, torch.from_numpy(codes[tap]))
    finally:
        for module, training in modes:
            module.training = training
    if not found:
        raise StateError(
            "none of the model's quantizers gave codes, since they have observed nothing yet;"
            " run some batches in train mode before you compare."
        )
    rows = tuple(TensorDifference(name, *counts) for name, counts in found.items())
    missing = tuple(n for m, n in quantizers.items() if not any(tap.removesuffix(CODES) in found for tap in of[m]))
    return Verification(rows, largest, exact, f"ONNX Runtime {runtime.__version__}", missing)


def _is_activations(module: nn.Module) -> bool:
    return isinstance(module, FakeQuantize) and not module.memoryless


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of two outputs; infinite for another shape, or a NaN that only one has."""
    if ours.shape != theirs.shape:
        return math.inf
    a, b = ours.double(), theirs.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return 0.0 if bool(same.all()) else float((a - b)[~same].abs().nan_to_num(nan=math.inf).max())


def _compare(counts: list[int], ours: Tensor, theirs: Tensor) -> None:
    apart = (ours.cpu().double() - theirs.double()).abs()
    counts[0] += apart.numel()
    counts[1] += int((apart > 0).sum())
    counts[2] = max(counts[2], int(apart.max()) if apart.numel() else 0)


def numbered(name: str, calls: dict[str, int]) -> str:
    """The name of the codes of a quantizer's next call."""
    calls[name] = calls.get(name, 0) + 1
    return f"{name}{CODES}" if calls[name] == 1 else f"{name}.{calls[name]}{CODES}"


@contextlib.contextmanager
def _codes_of(quantizers: Iterable[nn.Module], seen: list[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, CodeTensor) and isinstance(output.value, Coded):
            seen.append((module, output.value.codes))

    handles = [module.register_forward_hook(keep) for module in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _feeds(engine: Any, run: Inputs) -> dict[str, Any]:
    names = [given.name for given in engine.get_inputs()]
    named = {key: value for key, value in run.kwargs.items() if key in names and isinstance(value, Tensor)}
    rest = list(tensors_in((run.args, {key: value for key, value in run.kwargs.items() if key not in named}), deep=True))
    if len(rest) + len(named) != len(names):
        found = len(rest) + len(named)
        raise InputsError(f"the file takes {len(names)} tensors ({', '.join(names)}), found {found}; pass as many.")
    tensors = named | dict(zip((name for name in names if name not in named), rest, strict=True))
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
