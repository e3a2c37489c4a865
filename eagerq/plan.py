"""Decide which chains to fuse, as data; then fuse them, all or none."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from eagerq import integrations
from eagerq.errors import PatternError, StateError
from eagerq.inputs import Inputs
from eagerq.nn.intrinsic.fused import Fused, type_name
from eagerq.nn.modules.activation import result_may_be_rewritten
from eagerq.nn.modules.hooks import POST_HOOKS, PRE_HOOKS, share_hooks
from eagerq.patterns import Patterns
from eagerq.record import Record, full_name, record_of, renamed_keys
from eagerq.surgery import all_or_nothing, replace_modules
from eagerq.tables import table
from eagerq.trace import upwards


@dataclasses.dataclass(frozen=True)
class Match:
    """A chain to fuse.

    Attributes:
        names: full names of its modules, in order.
        fused: the class they become.
        copied: names among ``names`` whose module is shared: a copy is fused, the original stays.
    """

    names: tuple[str, ...]
    fused: type[Fused]
    copied: frozenset[str] = frozenset()

    def inside(self, parent: str) -> Match:
        """The same chain, seen from a model that holds this one under the name ``parent``."""
        return Match(
            tuple(full_name(parent, name) for name in self.names),
            self.fused,
            frozenset(full_name(parent, name) for name in self.copied),
        )


@dataclasses.dataclass(frozen=True)
class Skip:
    """A chain that registration order or dataflow proposed and that is not fused, with the reason in words."""

    names: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class FusionPlan:
    """What ``fuse_modules`` will do. Printing it gives a table.

    Attributes:
        matches: chains to fuse, in the order they run.
        skips: chains left alone, each with its reason.
        notes: what else there is to know about how the plan was made.
    """

    matches: tuple[Match, ...]
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    patterns: Patterns = dataclasses.field(default=Patterns(()), repr=False, compare=False)
    runs: tuple[Inputs, ...] | None = dataclasses.field(default=None, repr=False, compare=False)
    on_meta: bool = dataclasses.field(default=True, repr=False, compare=False)
    made_for: Mapping[str, str] | None = dataclasses.field(default=None, repr=False, compare=False)

    def for_model(self, model: nn.Module) -> FusionPlan:
        """This plan, to be applied to models only in which the same types stand in and around its chains."""
        return dataclasses.replace(self, made_for=_types_around(model, self.matches))

    def apply(self, model: nn.Module) -> nn.Module:
        """Fuse in place and return ``model``; if anything fails, the model is as it was.

        The modules of the chains and those that hold them must be of the types the plan was made for: their forwards are
        what was watched. What else the model holds, and what its forward does by the values of its attributes, is
        not compared; plan again for a model that may differ there.

        Raises:
            PatternError: if ``model`` is not of the structure the plan was made for.
            StateError: if the plan was applied to ``model`` before.
        """
        with all_or_nothing(model):
            self._check_fits(model)
            built = _build(model, self.matches)
            record = (record_of(model) or Record()).absorbing(model)
            model = replace_modules(model, built.new)
            record.after_fusion(self, built.renames, built.originals, built.inplace).attach(model)
        return model

    def _check_fits(self, model: nn.Module) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        for match in self.matches:
            missing = [name for name in match.names if name not in modules]
            if missing:
                raise PatternError(
                    f"the plan names {missing[0]!r}, which this {type(model).__name__} has not; plan again for this model."
                )
            first = match.names[0]
            if isinstance(modules[first], match.fused):
                raise StateError(
                    f"wanted a model to fuse {' + '.join(match.names)} in, found its {match.fused.__name__} at {first!r} already:"
                    " the plan was applied to this model. Use the model as it is, or plan again for what is left to fuse."
                )
        found = _types_around(model, self.matches)
        for name, wanted in (self.made_for or {}).items():
            if found.get(name, wanted) != wanted:
                where = f"at {name!r}" if name else "as the model"
                raise PatternError(
                    f"wanted the model that the plan was made for, with a {wanted} {where}, found a {found[name]}, whose forward"
                    " may take another way; plan again for this model."
                )

    def without(self, *names: str) -> FusionPlan:
        """This plan less the chains that hold any of these modules, by full name.

        Raises:
            PatternError: for a name that stands in none of its chains.
        """
        known = {name for match in self.matches for name in match.names}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise PatternError(
                f"wanted names of modules that the plan fuses, found {unknown[0]!r}, which stands in none of its"
                f" {len(self.matches)} chains; print(plan) shows them."
            )
        left_out = tuple(match for match in self.matches if not set(names).isdisjoint(match.names))
        skips = tuple(Skip(match.names, "left out by the caller") for match in left_out)
        return dataclasses.replace(
            self, matches=tuple(match for match in self.matches if match not in left_out), skips=(*self.skips, *skips)
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain lists and strings, for JSON."""
        return {
            "matches": [{"names": list(m.names), "fused": m.fused.__name__, "copied": sorted(m.copied)} for m in self.matches],
            "skips": [{"names": list(s.names), "reason": s.reason} for s in self.skips],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        counts = Counter(m.fused.__name__ for m in self.matches)
        head = f"{len(self.matches)} chains to fuse" + "".join(f", {n} {name}" for name, n in sorted(counts.items()))
        parts = [head]
        if self.matches:
            rows = [
                (m.fused.__name__, " + ".join(n + (" (copy)" if n in m.copied else "") for n in m.names)) for m in self.matches
            ]
            parts.append(table(("fused", "modules"), rows))
        if self.skips:
            parts.append(f"{len(self.skips)} skipped")
            parts.append(table(("modules", "reason"), [(" + ".join(s.names), s.reason) for s in self.skips]))
        parts += [f"note: {note}" for note in self.notes]
        return "\n".join(parts)


def _types_around(model: nn.Module, matches: Sequence[Match]) -> dict[str, str]:
    """The types, by full name, of the modules in these chains and of all that hold one, the model (``""``) among them."""
    inside = {outer for match in matches for name in match.names for outer in ("", *upwards(name))}
    return {name: type_name(type(m)) for name, m in model.named_modules(remove_duplicate=False) if name in inside}


@dataclasses.dataclass(frozen=True)
class _Built:
    """New modules by the old ones they replace; new state keys with the old ones; by name, what an adapter took apart
    and what worked in place."""

    new: dict[nn.Module, nn.Module]
    renames: dict[str, str]
    originals: dict[str, nn.Module]
    inplace: frozenset[str]


def _build(model: nn.Module, matches: Sequence[Match]) -> _Built:
    modules = dict(model.named_modules(remove_duplicate=False))
    new: dict[nn.Module, nn.Module] = {}
    renames: dict[str, str] = {}
    originals: dict[str, nn.Module] = {}
    for match in matches:
        members: list[nn.Module] = []
        placed: dict[str, nn.Module] = {}
        taken_apart: list[tuple[nn.Module, nn.Module | None]] = []
        for name in match.names:
            original = modules[name]
            expansion = integrations.expand(original)
            parts = expansion.members
            if name in match.copied:
                parts = tuple(copy.deepcopy(part) for part in parts)
                if getattr(original, "inplace", False):
                    parts[-1].register_forward_hook(result_may_be_rewritten)
            elif parts != (original,):
                originals[name] = original
                taken_apart.append((original, expansion.rest))
            if name not in match.copied:
                placed[name] = expansion.rest or nn.Identity().train(original.training)
            members += parts
        fused = match.fused(*members)
        placed[match.names[0]] = fused
        for original, rest in taken_apart:  # only what begins a chain has the first hooks, only what ends one the others
            share_hooks(fused, [original], PRE_HOOKS)
            share_hooks(rest or fused, [original], POST_HOOKS)
        old_keys = {
            id(tensor): full_name(name, key)
            for name in match.names
            for key, tensor in modules[name].state_dict(keep_vars=True).items()
        }
        for name, module in placed.items():
            new[modules[name]] = module
            renames.update(renamed_keys(name, module, old_keys))
    inplace = frozenset(name for match in matches for name in match.names if getattr(modules[name], "inplace", False))
    return _Built(new, renames, originals, inplace)
