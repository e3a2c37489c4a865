"""Find the chains to fuse: follow the watched links, refuse with reasons, and try the fused copy once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from eagerq import integrations
from eagerq.dataflow import Trace, watch, watch_copy
from eagerq.errors import PatternError
from eagerq.inputs import Inputs
from eagerq.nn.intrinsic.fused import Fused, type_name
from eagerq.nn.modules.activation import IDEMPOTENT
from eagerq.nn.modules.batchnorm import NORMS_1D, NORMS_2D, NORMS_3D, is_foldable
from eagerq.nn.modules.hooks import POST_HOOKS, PRE_HOOKS
from eagerq.nn.qat.base import QATBase
from eagerq.patterns import Patterns, chain_name
from eagerq.plan import FusionPlan, Match, Skip
from eagerq.record import full_name
from eagerq.surgery import full_copy, meta_copy, names_of

_NORMS = frozenset((*NORMS_1D, *NORMS_2D, *NORMS_3D))
_PARAMETRIZED = "carries a parametrization, which fusion would lose; remove it first (parametrize.remove_parametrizations)"
_ALL_HOOKS = (*PRE_HOOKS, *POST_HOOKS)


class Planner:
    """Follows the watched links from each first member of a chain."""

    def __init__(self, model: nn.Module, patterns: Patterns, runs: tuple[Inputs, ...] | None) -> None:
        self.model = model
        self.patterns = patterns
        self.runs = runs
        self.chains = patterns.chains
        self.vocabulary = {t for chain in self.chains for t in chain}
        self.prefixes = {chain[:n] for chain in self.chains for n in range(1, len(chain) + 1)}
        self.names = names_of(model)
        inside = {m for leaf in self.names if self._is_leaf(leaf) for m in leaf.modules() if m is not leaf}
        self.modules = {names[0]: m for m, names in self.names.items() if m not in inside}
        self.types = {name: self._types(module) for name, module in self.modules.items()}
        self.notes: list[str] = []
        self.skips: list[Skip] = []
        self.next_sibling = self._siblings()
        self.in_sequential = {
            f"{name}.{child}" if name else child
            for name, m in self.modules.items()
            if type(m) is nn.Sequential
            for child in m._modules
        }
        self.traces: tuple[Trace, ...] = ()
        self.positions: tuple[int, ...] = ()
        self.on_meta = True
        self.watched_again = False
        if runs is not None:
            watched = watch(model, runs, self._is_leaf, (model.training, not model.training))
            self.traces, self.on_meta, self.runs = watched.traces, watched.on_meta, watched.runs
            self.positions = watched.positions
            self.notes += watched.notes
        else:
            self.notes.append("no example inputs: only chains inside an nn.Sequential are fused; pass example_inputs for others")

    # --- facts about single modules

    def _types(self, module: nn.Module) -> tuple[type[nn.Module], ...]:
        return tuple(type(part) for part in integrations.expand(module).members)

    def _is_leaf(self, module: nn.Module) -> bool:
        if isinstance(module, (Fused, QATBase)):
            return True
        return all(t in self.vocabulary for t in self._types(module))

    def _siblings(self) -> dict[str, str]:
        """For each module the next one its parent registers, identities aside."""
        following: dict[str, str] = {}
        for parent_name, parent in self.modules.items():
            if isinstance(parent, (Fused, QATBase)):
                continue
            prefix = f"{parent_name}." if parent_name else ""
            last = None
            for child_name, child in parent._modules.items():
                if child is None or type(child) is nn.Identity:
                    continue
                if last is not None:
                    following[last] = prefix + child_name
                last = prefix + child_name
        return following

    def counts(self, name: str) -> int:
        """The most calls of a module in one run."""
        return max((trace.counts[name] for trace in self.traces), default=0)

    def refusal(self, name: str, first: bool) -> str | None:
        """Why this module cannot be a member of any chain, or None."""
        module = self.modules[name]
        shared = self.names[module]
        idempotent = all(t in IDEMPOTENT for t in self.types[name]) and not first
        if type(module).__module__ == "torch.nn.utils.parametrize" or getattr(module, "parametrizations", None):
            return f"{name} {_PARAMETRIZED}"
        if "weight" in vars(module) and "weight" not in module._parameters:
            return (
                f"{name}.weight is computed before each forward (weight_norm, spectral_norm), which fusion would lose; remove it"
            )
        if first and self.leaves_rest(name):
            return f"{name} does more after its norm, which would be lost"
        if "forward" in vars(module):
            return f"{name} has a forward of its own on the instance (a profiler's or wrapper's patch); remove it first"
        if len(shared) > 1 and not idempotent:
            return f"{name} is shared under several names: {', '.join(shared)}"
        if self.traces:
            calls = self.counts(name)
            if calls == 0:
                return self._never_ran(name)
            if calls > 1 and not idempotent:
                return f"{name} runs {calls} times in one forward"
        return None

    def lost_hooks(self, name: str, first: bool, last: bool) -> str | None:
        """Why this member's hooks keep it out of a chain at that position, or None."""
        module = self.modules[name]
        if self.is_shared(name):
            groups: tuple[str, ...] = _ALL_HOOKS
        else:
            groups = (() if first else PRE_HOOKS) + (() if last else POST_HOOKS)
        if any(getattr(module, group) for group in groups):
            return f"{name} carries hooks, which fusion would lose; remove them, or register them after fusing"
        return None

    def _may_be_copied(self, name: str) -> bool:
        return name in self.types and all(t in IDEMPOTENT for t in self.types[name])

    def is_shared(self, name: str) -> bool:
        """Whether the module has other uses, so that only a copy of it may be fused."""
        return len(self.names[self.modules[name]]) > 1 or self.counts(name) > 1

    def leaves_rest(self, name: str) -> bool:
        """Whether the module does more than its members (drops before its activation), so that no chain goes on behind it."""
        return integrations.expand(self.modules[name]).rest is not None

    # --- links

    def follower(self, name: str) -> tuple[str | None, str]:
        """The one module that reads ``name``'s output in every run, or None and the reason there is none."""
        if not self.traces:
            following = self.next_sibling.get(name)
            if following is not None and name in self.in_sequential:
                return following, ""
            return None, "no forward was watched to confirm the chain; pass example_inputs"
        found: str | None = None
        for trace in self.traces:
            for call in trace.calls_of(name):
                reader, reason = self._reader(trace, name, call.outputs)
                if reader is None:
                    return None, reason
                if found not in (None, reader):
                    return None, f"the output of {name} goes to {found} in one run and to {reader} in another"
                found = reader
        return found, "" if found else self._never_ran(name)

    def _never_ran(self, name: str) -> str:
        runs = len(self.positions)
        return f"{name} did not run in {f'any of the {runs} watched runs' if runs > 1 else 'the watched forward'}"

    def _reader(self, trace: Trace, name: str, outputs: tuple[int, ...]) -> tuple[str | None, str]:
        if len(outputs) != 1:
            return None, f"{name} returns {len(outputs)} tensors"
        (value,) = outputs
        readers = trace.readers.get(value, [])
        others = [str(call) for call in readers[:3]]
        if value in trace.outputs:
            seen = ["an output of the model", *(f"read by {other}" for other in others)]
            return None, f"the output of {name} is also {' and '.join(seen)}"
        if value in trace.kept:
            return None, f"the output of {name} is kept beyond the forward (in an attribute, a list or a hook)"
        if not readers:
            return None, f"nothing reads the output of {name}"
        if len(readers) > 1:
            return None, f"the output of {name} has {len(readers)} readers: {', '.join(others)}"
        (call,) = readers
        if not call.is_module:
            return None, f"the output of {name} is read by {call}"
        if call.inputs != (value,):
            return None, f"{call.name} reads other tensors beside the output of {name}"
        return call.name, ""

    def apart(self, first: str, member: str) -> str | None:
        """Why a chain from ``first`` cannot hold ``member``, which also runs without it, or None."""
        for i, trace in enumerate(self.traces):
            if not self.is_shared(member) and trace.counts[first] != trace.counts[member]:
                mode = "train" if trace.training else "eval"
                which = f" on input {self.positions[i % len(self.positions)]}" if len(self.positions) > 1 else ""
                counts = trace.counts
                return f"in {mode} mode{which} {first} runs {counts[first]} times and {member} {counts[member]} times"
        return None

    def other_context(self, name: str, following: str) -> str | None:
        """Why these two cannot become one module, if gradients or checkpoints treat them differently."""
        normalises = not _NORMS.isdisjoint(self.types[following])  # a checkpoint would count a batch twice in its statistics
        for trace in self.traces:
            before, after = trace.contexts[name], trace.contexts[following]
            written_to = any(v in trace.rewritten for call in trace.calls_of(following) for v in call.outputs)
            if not normalises and not written_to:  # else outside of a checkpoint autograd would keep what is then changed
                before, after = ({(gradients, 0) for gradients, _ in contexts} for contexts in (before, after))
            if not before <= after:
                break
        else:
            return None
        return f"{name} and {following} run under different gradient modes or activation checkpoints"

    def channels(self, chain: Sequence[str]) -> str | None:
        """Why op and norm of this chain do not fit each other, or None."""
        parts = [(n, part) for n in chain for part in integrations.expand(self.modules[n]).members]
        for (op_name, op), (norm_name, norm) in itertools.pairwise(parts):
            if type(norm) not in _NORMS:
                continue
            if not is_foldable(norm):
                return f"{norm_name} keeps no running statistics, so it cannot be folded; use track_running_stats=True"
            width = getattr(op, "out_channels", getattr(op, "out_features", None))
            features = norm.running_mean.shape[0]  # type: ignore[union-attr,index]
            if width is not None and width != features:
                return f"{op_name} gives {width} channels and {norm_name} normalises {features}"
            axes = None if width is None else op.weight.dim()  # type: ignore[operator]
            for trace in self.traces:
                for call in trace.calls_of(op_name):
                    found = len(trace.shapes[call.outputs[0]])
                    if axes is not None and found != axes:
                        return (
                            f"{op_name} gives a tensor of {found} axes, whose channels {norm_name} does not see on axis 1;"
                            f" {axes} axes are wanted"
                        )
        return None

    # --- chains

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
        bases = tuple(starts | (_NORMS & self.vocabulary))
        ordered = list(self.modules)
        if self.traces:
            first_call = {
                call.name: call.index for trace in reversed(self.traces) for call in reversed(trace.calls) if call.is_module
            }
            ordered.sort(key=lambda name: first_call.get(name, len(first_call) + len(ordered)))
        ordered.sort(key=lambda name: self.types[name][0] in _NORMS)  # an op has first claim on a norm
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
        copied = meta_copy(self.model) if self.on_meta else full_copy(self.model)
        modes = list(dict.fromkeys(trace.training for trace in self.traces))
        try:
            copied = FusionPlan(tuple(matches), patterns=self.patterns).apply(copied)
        except Exception as error:  # whatever building a module of the user's raises
            return {}, f"{type(error).__name__}: {error}"
        traces, failures = watch_copy(copied, self.runs or (), self._is_leaf, modes, on_meta=self.on_meta)
        if failures:
            return {}, "; ".join(map(str, failures.values()))
        bad: dict[Match, str] = {}
        absorbed = {name for match in matches for name in match.names}
        pairs = list(zip(self.traces, traces, strict=True))
        for before, after in pairs:
            for match in matches:
                reason = _broken(match, before, after)
                if reason is not None:
                    bad[match] = reason
        if all(_beside(before, absorbed) == _beside(after, absorbed) for before, after in pairs):
            return bad, None
        if self._watch_again():
            return self._trial(matches)
        return bad, "other modules and functions run than before"

    def _watch_again(self) -> bool:
        """Once: take the traces anew, since a first forward may fill a cache that all copies share (a memoised function)."""
        if self.watched_again:
            return False
        self.watched_again = True
        copied = meta_copy(self.model) if self.on_meta else full_copy(self.model)
        modes = list(dict.fromkeys(trace.training for trace in self.traces))
        traces, failures = watch_copy(copied, self.runs or (), self._is_leaf, modes, on_meta=self.on_meta)
        if failures:
            return False
        self.traces = traces
        return True


def _broken(match: Match, before: Trace, after: Trace) -> str | None:
    """What is wrong with the fused module's run beside the chain's, or None."""
    first, *rest = match.names
    if after.counts[first] != before.counts[first]:
        how = "" if after.counts[first] else "; the model calls it past its name (from a list, by a bound method), out of reach"
        return f"{first} ran {before.counts[first]} times and runs {after.counts[first]} times once fused{how}"
    for call in after.calls_of(first):
        seen = {e.name for value in call.outputs for e in after.exits.get(value, [])}
        seen.update(parent for value in call.outputs for r in after.readers.get(value, []) for parent in _upwards(r.parent))
        for name in rest:
            if name not in match.copied and name not in seen:
                return f"what {first} gives once fused does not arrive where {name} was"
    for i in range(len(match.fused.chain)):
        if after.counts[full_name(first, str(i))] != before.counts[first]:
            return f"a member of {' + '.join(match.names)} is also run from outside its place"
    return None


def _beside(trace: Trace, absorbed: set[str]) -> Counter[tuple[str, str]]:
    """What ran beside the chains: functions by the module they ran in, and other leaf modules."""
    return Counter(
        (call.name, "" if call.is_module else call.parent)
        for call in trace.calls
        if not (call.is_module and call.name in absorbed) and absorbed.isdisjoint(_upwards(call.parent))
    )


def _upwards(name: str) -> Iterator[str]:
    """A module's full name, its parent's, and so on, the model's own left out."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _unknown(module: nn.Module, bases: tuple[type[nn.Module], ...]) -> str:
    base = next(t for t in type(module).__mro__ if t in bases)
    if type(module).__module__ == "torch.nn.utils.parametrize":
        return f"it {_PARAMETRIZED}"
    return (
        f"its type {type_name(type(module))} is a {base.__name__} with code of its own, not known exactly;"
        " add a pattern for it with eagerq.DEFAULT_PATTERNS.extended(...)"
    )


def parse_patterns(patterns: Any, default: Patterns) -> tuple[Patterns, list[list[str]] | None]:
    """What ``patterns`` stands for: a ``Patterns``, and the chains listed by module name, if they are.

    Raises:
        PatternError: if it is empty, mixed or of another form.
    """
    if patterns is None:
        return default, None
    if isinstance(patterns, Patterns):
        if not patterns.chains:
            raise PatternError("patterns are empty; pass None for eagerq.DEFAULT_PATTERNS, or name at least one chain.")
        return patterns, None
    wanted = "patterns are a Patterns, tuples of module types, or lists of module names"
    if isinstance(patterns, (str, bytes, Mapping)):
        raise PatternError(f"{wanted}; found a {type(patterns).__name__}.")
    try:
        entries = list(patterns)
    except TypeError:
        raise PatternError(f"{wanted}; found {type(patterns).__name__}.") from None
    if not entries:
        raise PatternError("patterns are empty; pass None for eagerq.DEFAULT_PATTERNS, or name at least one chain.")
    if all(isinstance(e, (str, type)) for e in entries):
        entries = [entries]  # one chain, given bare
    chains: list[list[Any]] = []
    for entry in entries:
        if isinstance(entry, (str, bytes)) or not isinstance(entry, Sequence):
            raise PatternError(f"{wanted}; found {entry!r} among them.")
        chains.append(list(entry))
    if all(chain and all(isinstance(x, str) for x in chain) for chain in chains):
        return default, chains
    for chain in chains:
        for item in chain:
            if not (isinstance(item, type) and issubclass(item, nn.Module)):
                raise PatternError(f"{wanted}, not mixed; found {item!r} in {chain!r}.")
    return default.selecting(chains), None
