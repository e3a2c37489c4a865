"""The verbs: plan_fusion, fuse_modules, convert_qat, convert, report."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eagerq import integrations
from eagerq.checks import check_model
from eagerq.conversion import Conversion
from eagerq.errors import StateError
from eagerq.guarding import guard_if_asked
from eagerq.inputs import notes_on, runs_for
from eagerq.nn.intrinsic.fused import type_name
from eagerq.nn.qat.base import QATBase, QATOp
from eagerq.nn.quantized import QuantizedModule, fixed_quantizer, is_deployed, is_qat
from eagerq.patterns import DEFAULT_PATTERNS, Patterns, parse_patterns
from eagerq.plan import FusionPlan
from eagerq.planner import Planner
from eagerq.quant.fake_quantize import FakeQuantize
from eagerq.quant.spec import QConfigLike, QConfigMapping, Rule, as_mapping
from eagerq.record import Record, record_of
from eagerq.surgery import all_or_nothing, computed_tensor, full_copy, replace_modules
from eagerq.tables import table


def plan_fusion(model: nn.Module, patterns: Any = None, example_inputs: Any = None) -> FusionPlan:
    """Decide which chains ``fuse_modules`` would fuse; the model is not touched.

    The forward that is watched is a copy's, with the model's own hooks: a hook's function is the same object for both, so
    what it collects outside of the model is collected then too (on the meta device tensors without data). Register
    such hooks afterwards, or clear what they collected.

    Args:
        model: any eager ``nn.Module``.
        patterns: None for ``eagerq.DEFAULT_PATTERNS``, a ``Patterns``, tuples of module types
            (``[(nn.Conv2d, nn.BatchNorm2d, nn.ReLU)]``) or lists of module names
            (``[["conv1", "bn1", "relu"]]``).
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; or a list or
            other iterable of such, each a run, and a chain holds only if it held in every one. A
            DataLoader's batches are positional arguments: leave labels out, ``(x for x, _ in loader)``. A
            list is taken whole, of any other iterable the first 8 items. None where the model itself
            says what it takes (timm, torchvision, transformers). Each run is watched in train and in eval
            mode, on the meta device where the model can (runs of equal shapes once), else on data. Without any, only
            a model that is all ``nn.Sequential`` is known to run as it is registered, and only its chains are fused.

    Raises:
        ModelError: for something that is no eager float model.
        PatternError: for unknown chains, types or names, or empty patterns.
        InputsError: if the model rejects the inputs.
    """
    check_model(model)
    if is_qat(model) or is_deployed(model):
        raise StateError("wanted a float model to fuse, found one that convert_qat has converted; fuse first, then convert.")
    parsed, listed = parse_patterns(patterns, DEFAULT_PATTERNS)
    runs = runs_for(model, example_inputs)
    plan = Planner(model, parsed, runs).plan(listed)
    return dataclasses.replace(plan, notes=(*plan.notes, *notes_on(example_inputs, runs))).for_model(model)


def fuse_modules(model: nn.Module, patterns: Any = None, example_inputs: Any = None, *, inplace: bool = False) -> nn.Module:
    """Wrap each confirmed chain in an ``nni`` module; the model computes what it did.

    The fused module stands at the chain's first name and the others become ``nn.Identity``.
    ``unfuse_modules`` gives the float model back. ``guard`` checks ways that ``example_inputs`` did not
    take; with the environment variable ``EAGERQ_GUARD=1`` the fused model checks each of its forwards.
    Arguments and errors are those of ``plan_fusion``; a listed chain that the watched forward
    refutes is left alone with a warning.

    Args:
        inplace: change ``model`` itself rather than a copy.
    """
    plan = plan_fusion(model, patterns, example_inputs)
    if parse_patterns(patterns, DEFAULT_PATTERNS)[1] is not None:
        for skip in plan.skips:
            warnings.warn(f"{' + '.join(skip.names)} is not fused: {skip.reason}", stacklevel=2)
    return guard_if_asked(plan.apply(model if inplace else full_copy(model)))


def convert_qat(
    model: nn.Module,
    qconfig: QConfigLike | QConfigMapping | Mapping[Rule, QConfigLike | None] | None = None,
    example_inputs: Any = None,
    *,
    patterns: Patterns | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Turn fused and standalone modules into their QAT modules, and quantize each tensor once.

    Args:
        model: a float model, usually fused.
        qconfig: a ``QConfig``, a preset's name, a ``QConfigMapping``, or a mapping of rules with the
            default under ``""``; None is ``"onnxruntime"``.
        example_inputs: as for ``plan_fusion``; None takes those the model was fused with. Without any,
            every quantized module quantizes its own input.
        patterns: None takes those the model was fused with.
        inplace: change ``model`` itself rather than a copy.

    Raises:
        ModelError, InputsError: as ``plan_fusion``.
        SpecError: for a qconfig that makes no sense, or a rule that selects no module.
        StateError: if the model was converted before, or holds nothing to convert.
    """
    check_model(model)
    if is_deployed(model):
        raise StateError("wanted a float model, found a deployed one; convert_qat takes the float or fused model.")
    if is_qat(model):
        raise StateError("wanted a float model, found one that convert_qat has already converted; call it once.")
    mapping = as_mapping(qconfig)
    record = record_of(model) or Record()
    runs = runs_for(model, example_inputs, record.runs)
    with integrations.sums_as_modules(model, keeps=inplace) as opened:
        conversion = Conversion(model, patterns or record.patterns, mapping)
        conversion.notes += notes_on(example_inputs, runs)
        if opened:
            conversion.notes.append(f"{opened} modules call each of their sums as a module that can hold a quantizer")
        conversion.decide(runs)
        return conversion.apply(model if inplace else full_copy(model), record)


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of each module; printing it gives a table.

    Attributes:
        rows: (name, type, ``"QAT"`` or ``"float"``, reason).
        quantizers: (kind of place, name) of each quantized tensor.
        notes: what else there is to know.
    """

    rows: tuple[tuple[str, str, str, str], ...]
    quantizers: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def left_float(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of what stays float."""
        return tuple((name, reason) for name, _, state, reason in self.rows if state == "float")

    def __str__(self) -> str:
        qat = sum(row[2] == "QAT" for row in self.rows)
        head = f"{qat} QAT modules, {len(self.quantizers)} quantized tensors, {len(self.left_float)} left float"
        return "\n".join([head, table(("name", "type", "state", "reason"), self.rows), *(f"note: {n}" for n in self.notes)])


def report(model: nn.Module) -> Report:
    """What ``convert_qat`` did to ``model`` and why the rest stayed float.

    Raises:
        StateError: if the model was not converted.
    """
    record = record_of(model) if isinstance(model, nn.Module) else None
    if record is None or record.stage == "fused":
        raise StateError("wanted a model that convert_qat returned, found none of its records on this one; convert first.")
    rows = record.rows if record.stage == "deployed" else tuple(_as_it_is(row, model) for row in record.rows)
    return Report(rows, record.sites, record.notes)


def _as_it_is(row: tuple[str, str, str, str], model: nn.Module) -> tuple[str, str, str, str]:
    """A row of what became a QAT module and is none by now: somebody put another module in its place."""
    name, _, state, _ = row
    if state != "QAT":
        return row
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return (*row[:2], "float", "is in the model no longer")
    if isinstance(module, QATBase):
        return row
    return name, type(module).__name__, "float", "replaced since convert_qat; one of eagerq.nn.qat would be quantized"


def convert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The deployed model: batch norms folded, integer weights and biases, fixed scales; in eval mode.

    Its forward equals the QAT model's eval forward.

    Args:
        model: what ``convert_qat`` returned, after training.
        inplace: change ``model`` itself rather than a copy.

    Raises:
        StateError: if the model is no QAT model, was converted before, or a quantizer observed
            nothing, only zeros, NaN or infinity, or a weight is computed before each forward (pruning); the model is then as
            it was.
    """
    check_model(model)
    if is_deployed(model):
        raise StateError("wanted a QAT model, found a deployed one; call convert once.")
    if not is_qat(model):
        raise StateError("wanted a QAT model, found a float one; call eagerq.convert_qat and train first.")
    off = [name for name, m in model.named_modules() if isinstance(m, FakeQuantize) and not m.fake_quant_enabled]
    if off:
        raise StateError(
            f"wanted every quantizer switched on, found fake quantization disabled in {len(off)}, first {off[0]};"
            " run model.apply(eagerq.enable_fake_quant), or keep that module float by a qconfig rule."
        )
    target = model if inplace else full_copy(model)
    with all_or_nothing(target):
        return _deployed(target).eval()


def _is_finite(weight: Tensor) -> bool:
    """Whether it holds no NaN, which its ends then are, and no infinity; ``isfinite`` writes three tensors of its size."""
    return not weight.numel() or bool(torch.isfinite(weight.amin()) & torch.isfinite(weight.amax()))


def _deployed(target: nn.Module) -> nn.Module:
    new: dict[nn.Module, nn.Module] = {}
    for name, module in target.named_modules():
        if isinstance(module, QATOp):
            for inner, part in module.named_modules(prefix=name):
                if (computed := computed_tensor(part)) is not None:
                    raise StateError(
                        f"{inner or type_name(type(part))} was to hold a {computed}, but computes it before each forward; make"
                        " that permanent first, by prune.remove, remove_weight_norm or remove_spectral_norm of torch.nn.utils."
                    )
            if not module.is_deployable():
                raise StateError(
                    f"{name} has a norm without running statistics, which cannot be folded; use track_running_stats=True."
                )
            if not _is_finite(module.weight):
                raise StateError(f"{name}.weight was to hold finite values, but holds NaN or infinity; training has diverged.")
            new[module] = QuantizedModule.from_qat(module)
        elif isinstance(module, FakeQuantize) and not module.memoryless:
            new[module] = fixed_quantizer(module, name)
    record = (record_of(target) or Record()).renamed({}, stage="deployed")
    for module in new.values():
        if isinstance(module, QuantizedModule):
            for slot in ("input_fake_quant", "activation_post_process"):
                quantizer = getattr(module, slot)
                if quantizer is not None:
                    setattr(module, slot, new[quantizer])
    target = replace_modules(target, new)
    record.attach(target)
    return target
