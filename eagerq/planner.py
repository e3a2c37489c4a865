"""Find the chains to fuse: follow the watched links, refuse with reasons, and try the fused copy once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from eagerq.dataflow import Mode, watch_copy
from eagerq.errors import PatternError
from eagerq.evidence import NORMS, PARAMETRIZED, Evidence
from eagerq.inputs import Inputs
from eagerq.nn.intrinsic.fused import Fused, type_name
from eagerq.nn.modules.batchnorm import HoldsNorm
from eagerq.nn.qat.base import QATBase
from eagerq.patterns import Patterns, chain_name
from eagerq.plan import FusionPlan, Match, Skip
from eagerq.surgery import full_copy, meta_copy
from eagerq.trial import Wiring, broken, other_modes


class Planner(Evidence):
    """Follows the watched links from each first member of a chain."""

    def __init__(self, model: nn.Module, patterns: Patterns, runs: tuple[Inputs, ...] | None) -> None:
        super().__init__(model, patterns, runs)
        self.skips: list[Skip] = []
        self.watched_again = False

    def plan(self, listed: Sequence[Sequence[str]] | None = None) -> FusionPlan:
        """Find the chains (or judge the listed ones), try the fused copy, and say what to do."""
        if listed is None:
            matches = self._find()
        else:
            matches = [match for names in listed if (match := self._judge(tuple(names)))]
            uses = Counter(name for names in listed for name in names)
            copied = {name for match in matches for name in match.copied}
            for name, times in uses.items():
                if times > 1 and name not in copied and not self._may_be_copied(name):
                    raise PatternError(
                        f"the listed chains are in conflict: {name!r} stands {times} times in them, and one module can be"
                        " fused once. List each module in one chain."
                    )
        matches = self._tried(matches)
        return FusionPlan(tuple(matches), tuple(self.skips), tuple(self.notes), self.patterns, self.runs, self.on_meta)

    def _find(self) -> list[Match]:
        starts = {chain[0] for chain in self.chains}
        bases = tuple(starts | (NORMS & self.vocabulary))
        ordered = list(self.modules)
        if self.traces:
            first_call = {
                call.name: call.index for trace in reversed(self.traces) for call in reversed(trace.calls) if call.is_module
            }
            ordered.sort(key=lambda name: first_call.get(name, len(first_call) + len(ordered)))
        ordered.sort(key=lambda name: self.types[name][0] in NORMS)  # an op has first claim on a norm
        matches: list[Match] = []
        taken: set[str] = set()
        for name in ordered:
            module, types = self.modules[name], self.types[name]
            if name in taken or isinstance(module, (Fused, QATBase)):
                continue
            if types[0] not in starts:
                if types[0] not in self.vocabulary and isinstance(module, bases):
                    self.skips.append(Skip((name,), _unknown(module, bases)))
                continue
            match = self._follow(name, taken)
            if match is not None:
                matches.append(match)
                taken.update(n for n in match.names if n not in match.copied)
        return matches

    def _follow(self, start: str, taken: set[str]) -> Match | None:
        """The longest chain from ``start`` that the watch confirms."""
        names, types = [start], self.types[start]
        reason = self.refusal(start, first=True)
        alone = self.chains.get(types) if reason is None else None  # a norm that holds its activation is a chain by itself
        best = None if alone is None else Match((start,), alone)
        proposed: str | None = None
        while True:
            following, why = self.follower(names[-1]) if reason is None else (None, reason)
            if following is None or following in taken or following not in self.types:
                proposed = self._proposal(names, types)
                reason = why or (f"{following} is already part of another chain" if following in taken else why)
                break
            longer = types + self.types[following]
            if longer not in self.prefixes:
                proposed = self._proposal(names, types)
                reason = f"the output of {names[-1]} goes to {following}, a {type(self.modules[following]).__name__}"
                if proposed == following:
                    reason = f"no fused class for {chain_name(longer)}"
                break
            proposed = following
            reason = (
                self.refusal(following, first=False)
                or self.apart(names[0], following)
                or self.channels([*names, following])
                or self.lost_hooks(names[-1], first=len(names) == 1, last=False)
                or self.lost_hooks(following, first=False, last=True)
                or self.other_context(names[-1], following)
                or self.hooks_around(names[-1], following)
            )
            if reason is not None:
                break
            names.append(following)
            types = longer
            fused = self.chains.get(types)
            if fused is not None:
                best = Match(tuple(names), fused, frozenset(n for n in names[1:] if self.is_shared(n)))
            if self.leaves_rest(following):
                proposed = None
                break
        if proposed is not None:
            self.skips.append(Skip((*names, proposed), reason or ""))
        elif best is not None and best.names != tuple(names):
            self.skips.append(Skip(tuple(names), f"no fused class for {chain_name(types)}"))
        return best

    def _proposal(self, names: Sequence[str], types: tuple[type[nn.Module], ...]) -> str | None:
        """The next module in registration order, or that which reads the output, if its type would lengthen the chain."""
        for candidate in (self.next_sibling.get(names[-1]), self.follower(names[-1])[0]):
            if candidate is not None and candidate in self.types and types + self.types[candidate] in self.prefixes:
                return candidate
        return None

    def _judge(self, names: tuple[str, ...]) -> Match | None:
        """A chain the user listed by name: a match, or a skip with the reason."""
        canonical = {alias: names_[0] for names_ in self.names.values() for alias in names_}
        for name in names:
            if name not in canonical:
                close = [n for n in canonical if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:3]
                hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
                raise PatternError(f"the model has no module {name!r}.{hint} Names are those of model.named_modules().")
        names = tuple(canonical[name] for name in names)
        types = tuple(t for name in names for t in self.types.get(name, (type(None),)))
        fused = self.chains.get(types)
        if fused is None:
            raise PatternError(
                f"no fused class is known for {' + '.join(names)} ({chain_name(types)});"
                " add one with eagerq.DEFAULT_PATTERNS.extended(YourFusedClass)."
            )
        for i, name in enumerate(names):
            last = i == len(names) - 1
            reason = self.refusal(name, first=i == 0) or self.lost_hooks(name, first=i == 0, last=last)
            if reason is None and not last and self.leaves_rest(name):
                reason = f"{name} does more after its norm, before {names[i + 1]}"
            if reason is None and not last and self.traces:
                following, why = self.follower(name)
                if following != names[i + 1]:
                    reason = why or f"the output of {name} goes to {following}"
                else:
                    reason = self.apart(names[0], following) or self.other_context(name, following)
            if reason is None and not last:
                reason = self.hooks_around(name, names[i + 1])
            if reason is None and last:
                reason = self.channels(names)
            if reason is not None:
                self.skips.append(Skip(names, reason))
                return None
        if not self.traces:
            self.notes.append(f"{' + '.join(names)} is taken on the caller's word; pass example_inputs to have it confirmed")
        return Match(names, fused, frozenset(n for n in names[1:] if self.is_shared(n)))

    # --- trying it out

    def _tried(self, matches: list[Match]) -> list[Match]:
        """Those matches whose fused copy still runs as the original; the others become skips."""
        if not matches or not self.traces:
            return matches
        bad, reason = self._trial(matches)
        if bad:
            self.skips += [Skip(match.names, why) for match, why in bad.items()]
            return self._tried([match for match in matches if match not in bad])
        if reason is None:
            return matches
        if len(matches) == 1:
            self.skips.append(Skip(matches[0].names, f"the model does not run the same with this chain fused: {reason}"))
            return []
        half = len(matches) // 2
        kept = self._tried(matches[:half]) + self._tried(matches[half:])
        if len(kept) == len(matches):
            self.skips += [Skip(m.names, f"the model does not run the same with all chains fused: {reason}") for m in kept]
            return []
        return self._tried(kept)

    def _trial(self, matches: Sequence[Match]) -> tuple[dict[Match, str], str | None]:
        """Fuse a copy and watch it run: the chains that broke, each with its reason, or a reason that names none."""
        copied = self._copy()
        modes = list(dict.fromkeys(Mode(trace.training, trace.gradients) for trace in self.traces))
        try:
            copied = FusionPlan(tuple(matches), patterns=self.patterns).apply(copied)
        except Exception as error:  # whatever building a module of the user's raises
            return {}, f"{type(error).__name__}: {error}"
        traces, failures = watch_copy(copied, self.runs or (), self._is_leaf, modes, on_meta=self.on_meta)
        if failures:
            return {}, "; ".join(map(str, failures.values()))
        bad: dict[Match, str] = {}
        widths = {match: [len(self.types[name]) for name in match.names] for match in matches}
        pairs = list(zip(self.traces, traces, strict=True))
        if any(_has_modes_of_its_own(m) for m in self.names):
            model = self._copy()
            try:
                bad = {m: why for m in matches if (why := other_modes(m, widths[m], model, copied))}
            except Exception as error:  # a train() of the user's that reads a module's parts by name
                return {}, f"train() or eval() raises {type(error).__name__}: {error}"
        for before, after in pairs:
            for match in matches:
                reason = broken(match, before, after, widths[match])
                if reason is not None:
                    bad.setdefault(match, reason)
        wiring = Wiring(widths)
        found = [(wiring.of(before), wiring.of(after)) for before, after in pairs]
        if any(before[0] != after[0] for before, after in found):
            reason = (
                "other modules and functions run than before, or with other arguments; does it ask modules for their type, or go"
                " another way each time?"
            )
        elif any(before[1] != after[1] for before, after in found):
            reason = "it returns other things than before; does it ask modules for their type?"
        else:
            return bad, None
        return self._trial(matches) if self._watch_again() else (bad, reason)

    def _copy(self) -> nn.Module:
        return meta_copy(self.model) if self.on_meta else full_copy(self.model)

    def _watch_again(self) -> bool:
        """Once: take the traces anew, since a first forward may fill a cache that all copies share (a memoised function)."""
        if self.watched_again:
            return False
        self.watched_again = True
        copied = self._copy()
        modes = list(dict.fromkeys(Mode(trace.training, trace.gradients) for trace in self.traces))
        traces, failures = watch_copy(copied, self.runs or (), self._is_leaf, modes, on_meta=self.on_meta)
        if failures:
            return False
        self.traces = traces
        return True


def _has_modes_of_its_own(module: nn.Module) -> bool:
    """Whether ``train()`` or ``eval()`` of this module does more than PyTorch's."""
    kind = type(module)
    usual = kind.train in (nn.Module.train, HoldsNorm.train) and kind.eval is nn.Module.eval
    return not usual or not {"train", "eval"}.isdisjoint(vars(module))


def _unknown(module: nn.Module, bases: tuple[type[nn.Module], ...]) -> str:
    base = next(t for t in type(module).__mro__ if t in bases)
    if type(module).__module__ == "torch.nn.utils.parametrize":
        return f"it {PARAMETRIZED}"
    return (
        f"its type {type_name(type(module))} is a {base.__name__} with code of its own, not known exactly;"
        " add a pattern for it with eagerq.DEFAULT_PATTERNS.extended(...)"
    )
