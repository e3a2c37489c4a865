"""Compare two models module by module: before and after fusing, float and QAT, QAT and deployed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.errors import InputsError
from eagerq.inputs import as_runs
from eagerq.record import record_of
from eagerq.tables import table
from eagerq.trace import tensors_in


@dataclasses.dataclass(frozen=True)
class ModuleDifference:
    """How far one output is from its reference.

    Attributes:
        name: full module name; ``""`` is the whole model.
        kind: the module's class in the compared model.
        sqnr: signal-to-quantization-noise ratio, :math:`10 \\log_{10}(\\sum r^2 / \\sum (r - y)^2)`, in dB;
            infinite if the outputs are equal.
        max_abs: largest absolute difference, in real values.
        equal: whether the outputs are equal bit for bit.
    """

    name: str
    kind: str
    sqnr: float
    max_abs: float
    equal: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The differences in the order the modules ran, the whole model last. Printing it gives a table."""

    rows: tuple[ModuleDifference, ...]

    @property
    def whole(self) -> ModuleDifference:
        """The difference of the models' own outputs."""
        return self.rows[-1]

    def __str__(self) -> str:
        rows = [(r.name or "(model)", r.kind, f"{r.sqnr:.1f}", f"{r.max_abs:.3g}", "yes" if r.equal else "no") for r in self.rows]
        return table(("module", "type", "SQNR dB", "largest difference", "equal"), rows)


def compare_modules(reference: nn.Module, model: nn.Module, example_inputs: Any) -> Comparison:
    """Run both models in eval mode on the same inputs and compare what modules of the same name return.

    A fused module is compared with the last module of its chain if the reference is not fused. Modes
    are put back afterwards.

    Args:
        reference: the model to be near to.
        model: for example the fused, QAT or deployed form of it.
        example_inputs: as for ``plan_fusion``; the first run is used.

    Raises:
        InputsError: if the models return no tensors to compare.
    """
    run = as_runs(example_inputs, limit=1)[0]
    record = record_of(model)
    own = dict(reference.named_modules())
    last: dict[str, str] = {}
    if record is not None and record_of(reference) is None:
        last = {match.names[0]: match.names[-1] for match in record.matches}
    pairs = {name: last.get(name, name) for name, _ in model.named_modules() if last.get(name, name) in own}
    ours, whole = _outputs(model, set(pairs), run.args, run.kwargs)
    theirs, whole_reference = _outputs(reference, set(pairs.values()), run.args, run.kwargs)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    rows = []
    for name, output in ours.items():
        other = theirs.get(pairs[name])
        if name and other is not None and other.shape == output.shape:
            rows.append(_difference(name, kinds[name], other, output))
    if whole is None or whole_reference is None or whole.shape != whole_reference.shape:
        raise InputsError(
            "wanted models whose outputs hold tensors of one shape, found none or others; compare models of one task."
        )
    rows.append(_difference("", type(model).__name__, whole_reference, whole))
    return Comparison(tuple(rows))


def _difference(name: str, kind: str, reference: Tensor, output: Tensor) -> ModuleDifference:
    reference, output = reference.double(), output.double()
    error = reference - output
    noise, signal = float(error.square().sum()), float(reference.square().sum())
    sqnr = math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)
    return ModuleDifference(
        name, kind, sqnr, float(error.abs().max()) if error.numel() else 0.0, bool(torch.equal(reference, output))
    )


def _outputs(
    model: nn.Module, names: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The last tensor each named module returned, in order of first return, and the model's first tensor."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found[name] = output.detach().clone()

        return hook

    flags = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name in names]
    try:
        model.eval()
        with torch.no_grad():
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in flags:
            module.training = training
    return found, next(iter(tensors_in(output, deep=True)), None)
