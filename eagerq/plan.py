"""Decide which chains to fuse, as data; then fuse them, all or none."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from eagerq import integrations
from eagerq.errors import PatternError
from eagerq.inputs import Inputs
from eagerq.nn.intrinsic.fused import Fused
from eagerq.nn.modules.activation import result_may_be_rewritten
from eagerq.nn.modules.hooks import POST_HOOKS, PRE_HOOKS, share_hooks
from eagerq.patterns import Patterns
from eagerq.record import Record, full_name, record_of, renamed_keys
from eagerq.surgery import replace_modules
from eagerq.tables import table


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

    def apply(self, model: nn.Module) -> nn.Module:
        """Fuse in place and return ``model``; if anything fails, the model is as it was.

        Raises:
            PatternError: if ``model`` is not of the structure the plan was made for.
        """
        new, renames = _build(model, self.matches)
        record = (record_of(model) or Record()).absorbing(model)
        model = replace_modules(model, new)
        record.after_fusion(self, renames).attach(model)
        return model

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


def _build(model: nn.Module, matches: Sequence[Match]) -> tuple[dict[nn.Module, nn.Module], dict[str, str]]:
    """New modules by the old ones they replace, and new state keys with the old ones; touches nothing."""
    modules = dict(model.named_modules(remove_duplicate=False))
    new: dict[nn.Module, nn.Module] = {}
    renames: dict[str, str] = {}
    moves: list[tuple[nn.Module, nn.Module, tuple[str, ...]]] = []
    for match in matches:
        missing = [name for name in match.names if name not in modules]
        if missing:
            raise PatternError(
                f"the plan names {missing[0]!r}, which this {type(model).__name__} has not; plan again for this model."
            )
        members: list[nn.Module] = []
        placed: dict[str, nn.Module] = {}
        for name in match.names:
            original = modules[name]
            expansion = integrations.expand(original)
            parts = expansion.members
            if name in match.copied:
                parts = tuple(copy.deepcopy(part) for part in parts)
                if getattr(original, "inplace", False):
                    parts[-1].register_forward_hook(result_may_be_rewritten)
            elif parts != (original,):
                moves += [(parts[0], original, PRE_HOOKS), (parts[-1], original, POST_HOOKS)]
            if name not in match.copied:
                placed[name] = expansion.rest or nn.Identity().train(original.training)
            members += parts
        fused = match.fused(*members)
        placed[match.names[0]] = fused
        old_keys = {
            id(tensor): full_name(name, key)
            for name in match.names
            for key, tensor in modules[name].state_dict(keep_vars=True).items()
        }
        for name, module in placed.items():
            new[modules[name]] = module
            renames.update(renamed_keys(name, module, old_keys))
    for target, source, groups in moves:
        share_hooks(target, [source], groups)
    return new, renames
