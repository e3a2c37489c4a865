"""What eagerq remembers on a model it changed: old state keys, patterns, example inputs, what stayed float."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from eagerq.errors import StateError
from eagerq.inputs import Inputs
from eagerq.patterns import DEFAULT_PATTERNS, Patterns
from eagerq.quant.fake_quantize import FakeQuantize

if TYPE_CHECKING:
    from eagerq.plan import FusionPlan, Match, Skip

_ATTRIBUTE = "_eagerq_record"


@dataclasses.dataclass(frozen=True)
class Record:
    """The history of one model.

    Attributes:
        stage: ``"fused"``, ``"qat"`` or ``"deployed"``.
        patterns: those the model was fused with.
        matches, skips: of the fusion plans applied.
        originals: modules that an adapter took apart to fuse them, by full name, until the model is converted.
        inplace: full names of fused-away modules that worked in place.
        aliases: state keys with their earlier names, oldest (the float model's) first.
        runs: example inputs; without data, on the meta device, where the model runs on that.
        rows: the report's rows (name, type, state, reason).
        sites: where tensors are quantized (place, reason).
    """

    stage: str = "fused"
    patterns: Patterns = DEFAULT_PATTERNS
    matches: tuple[Match, ...] = ()
    skips: tuple[Skip, ...] = ()
    originals: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict, compare=False)
    inplace: frozenset[str] = frozenset()
    aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    runs: tuple[Inputs, ...] | None = None
    rows: tuple[tuple[str, str, str, str], ...] = ()
    sites: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def after_fusion(
        self, plan: FusionPlan, renames: Mapping[str, str], originals: Mapping[str, nn.Module], inplace: frozenset[str]
    ) -> Record:
        """The record once ``plan`` was applied; state keys changed (new name: old name)."""
        return dataclasses.replace(
            self,
            patterns=plan.patterns,
            matches=(*self.matches, *plan.matches),
            skips=plan.skips,
            originals={**self.originals, **originals},
            inplace=self.inplace | inplace,
            aliases=self._aliased(renames),
            runs=None if plan.runs is None else tuple(run.copied("meta" if plan.on_meta else None) for run in plan.runs),
        )

    def renamed(self, renames: Mapping[str, str], **changes: Any) -> Record:
        """The record once state keys changed (new name: old name)."""
        return dataclasses.replace(self, aliases=self._aliased(renames), **changes)

    def _aliased(self, renames: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        aliases = {new: old for new, old in self.aliases.items() if new not in set(renames.values())}
        for new, old in renames.items():
            aliases[new] = (*self.aliases.get(old, ()), old)
        return aliases

    def absorbing(self, model: nn.Module) -> Record:
        """This record with what those on parts of ``model`` know, which are taken off: one place knows the keys and chains."""
        aliases, originals = dict(self.aliases), dict(self.originals)
        matches, inplace = self.matches, self.inplace
        for name, module, inner in list(records_in(model)):
            if module is model:
                continue
            for new, earlier in inner.aliases.items():
                aliases[f"{name}.{new}"] = tuple(f"{name}.{old}" for old in earlier)
            matches += tuple(match.inside(name) for match in inner.matches)
            originals.update({f"{name}.{key}": original for key, original in inner.originals.items()})
            inplace |= {f"{name}.{key}" for key in inner.inplace}
            detach(module)
        return dataclasses.replace(self, aliases=aliases, matches=matches, originals=originals, inplace=inplace)

    def attach(self, model: nn.Module) -> None:
        """Put this record on ``model``; from the first on, ``load_state_dict`` takes the earlier keys too."""
        if _ATTRIBUTE not in vars(model):
            model.register_load_state_dict_pre_hook(_take_earlier_keys)  # type: ignore[no-untyped-call]
        vars(model)[_ATTRIBUTE] = self


def record_of(model: nn.Module) -> Record | None:
    """The record on ``model``, or None."""
    found: Record | None = vars(model).get(_ATTRIBUTE)
    return found


def records_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, Record]]:
    """The records on ``model`` and its parts, each with the full name and the module it is on."""
    for name, module in model.named_modules():
        record = record_of(module)
        if record is not None:
            yield name, module, record


def detach(model: nn.Module) -> None:
    """Take the record off ``model``; ``load_state_dict`` knows the model's own keys only."""
    vars(model).pop(_ATTRIBUTE, None)
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _take_earlier_keys]:
        del hooks[key]


def renamed_keys(name: str, module: nn.Module, old_keys: Mapping[int, str]) -> dict[str, str]:
    """State keys of ``module``, placed at ``name``, with the old keys of the very same tensors."""
    found = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        old = old_keys.get(id(tensor))
        if old is not None and old != full_name(name, key):
            found[full_name(name, key)] = old
    return found


def full_name(module: str, key: str) -> str:
    """The state key of ``key`` in the module of that name (``""`` is the model)."""
    return f"{module}.{key}" if module else key


def _quantizer_state(model: nn.Module, prefix: str) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FakeQuantize):
            state.update(module.state_dict(prefix=f"{prefix}{name}."))
    return state


def _take_earlier_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Before loading: rename earlier keys to today's; a checkpoint without any quantizer leaves those as they are."""
    record = record_of(module)
    if record is None:
        return
    for new, earlier in record.aliases.items():
        for old in earlier:
            if prefix + old in state_dict and prefix + new not in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
    own = _quantizer_state(module, prefix)
    if own and not any(key in state_dict for key in own):
        state_dict.update(own)


def float_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The float model's state under its own keys, out of the fused or QAT model it became.

    Quantizers are left out. The tensors are those of ``model.state_dict()``.

    Raises:
        StateError: for a deployed model, whose weights are integers.
    """
    state = dict(model.state_dict())
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefix = f"{prefix}." if prefix else ""
        record = record_of(module)
        if record is None:
            continue
        if record.stage == "deployed":
            raise StateError("wanted a fused or QAT model, found a deployed one, whose weights are integers; keep the QAT model.")
        for key in _quantizer_state(module, prefix):
            state.pop(key, None)
        for new, earlier in record.aliases.items():
            if prefix + new in state:
                state[prefix + earlier[0]] = state.pop(prefix + new)
    return state
