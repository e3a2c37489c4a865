"""Whether a fused copy, watched, ran as the model did: each chain, and all that was computed from what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from torch import nn

from eagerq.plan import Match
from eagerq.record import full_name
from eagerq.trace import Returned, Trace, upwards


def broken(match: Match, before: Trace, after: Trace, widths: Sequence[int]) -> str | None:
    """What is wrong with the fused module's run beside the chain's, or None.

    ``widths`` says of how many members each module of the chain is.
    """
    first, *rest = match.names
    if after.counts[first] != before.counts[first]:
        how = (
            ""
            if after.counts[first]
            else "; the model calls it past its name (a bound method or function keeps it), out of reach; call it by its name"
        )
        return f"{first} ran {before.counts[first]} times and runs {after.counts[first]} times once fused{how}"
    for call in after.calls_of(first):
        seen = {e.name for value in call.outputs for e in after.exits.get(value, [])}
        seen.update(parent for value in call.outputs for r in after.readers.get(value, []) for parent in upwards(r.parent))
        for name in rest:
            if name not in match.copied and name not in seen:
                return f"what {first} gives once fused does not arrive where {name} was"
    for i in range(len(match.fused.chain)):
        if after.counts[full_name(first, str(i))] != before.counts[first]:
            return f"a member of {' + '.join(match.names)} is also run from outside its place"
    for name, member in members(match, widths):
        for old, new in zip(before.settings[name], after.settings[member], strict=False):
            for key in sorted(old.keys() & new.keys()):
                if old[key] != new[key] and name not in match.copied:
                    return (
                        f"{name}.{key} is {old[key]} when {name} runs and {new[key]} once fused: it is set by name, which then is"
                        " a placeholder's; set it before the forward, and fuse in the mode it is for"
                    )
    return None


def members(match: Match, widths: Sequence[int]) -> list[tuple[str, str]]:
    """Each module of a chain with the name of the fused module's member that its own attributes go to."""
    return [(name, full_name(match.names[0], str(sum(widths[:i])))) for i, name in enumerate(match.names)]


def other_modes(match: Match, widths: Sequence[int], model: nn.Module, fused: nn.Module) -> str | None:
    """What ``train()`` and ``eval()`` of the whole do to a module of the chain and not once it is fused, or None.

    A model's own ``train`` may set modules, and freeze parameters, by name; both models are used up.
    """
    for mode in (False, True):
        for one in (model, fused):
            one.train(True) if mode else one.eval()
        frozen = getattr(fused.get_submodule(match.names[0]), "freeze_bn", False)  # its norm stays in eval mode
        for name, member in members(match, widths):
            if name in match.copied:
                continue
            old, new = model.get_submodule(name), fused.get_submodule(member)
            if old.training != new.training and not frozen:
                return (
                    f"the model's train({mode}) leaves {name} in {'train' if old.training else 'eval'} mode, which it does not"
                    " reach once fused; call model.train() before fusing, so that a norm it keeps in eval mode stays so"
                )
            for key, parameter in old._parameters.items():
                now = new._parameters.get(key)
                if parameter is not None and now is not None and parameter.requires_grad != now.requires_grad:
                    return (
                        f"the model's train({mode}) sets {name}.{key}.requires_grad to {parameter.requires_grad}, which it does"
                        " not reach once fused; call model.train() before fusing, so that a parameter it freezes stays so"
                    )
    return None


class Wiring:
    """What a run computed from what, each chain as one step, so that the model's run and its fused copy's can be compared."""

    def __init__(self, matches: Mapping[Match, Sequence[int]]) -> None:
        self.heads = {match.names[0]: match for match in matches}
        self.absorbed = {name for match in matches for name in match.names}
        self.old_names = {member: name for match, widths in matches.items() for name, member in members(match, widths)}
        self.numbers: dict[Hashable, int] = {}

    def of(self, trace: Trace) -> tuple[Counter[Hashable], list[Hashable]]:
        """The steps, each with what it read, and what was returned; equal where two runs of one model computed the same."""
        steps: Counter[Hashable] = Counter()
        results: dict[int, int] = {}
        inputs = {value: i for i, value in enumerate(trace.inputs)}
        chains: dict[int, Match] = {}  # by the result

        def result(value: int) -> int:
            if value not in results:
                given = inputs[value] if value in inputs else self._named(trace.named.get(value))
                results[value] = self._number((given, trace.shapes[value]))
            return results[value]

        for call in trace.calls:
            read = tuple(result(value) for value in call.inputs)
            around = self.absorbed.intersection(upwards(call.name if call.is_module else call.parent))
            of_chain = [r for r in read if r in chains and not around.isdisjoint(chains[r].names)]
            head = self.heads.get(call.name) if call.is_module else None
            if head is None and of_chain:  # a later member, its placeholder or what an adapter left there
                results.update((value, of_chain[0]) for value in call.outputs)
                continue
            step = (call.name, "" if call.is_module else call.parent, call.constants, read)
            steps[step] += 1
            for i, value in enumerate(call.outputs):
                results.setdefault(value, self._number((step, i)))
                if head is not None:
                    chains[results[value]] = head
        returned = [
            (trace.shapes[item.value], result(item.value)) if isinstance(item, Returned) else item for item in trace.returned
        ]
        return steps, returned

    def _number(self, what: Hashable) -> int:
        return self.numbers.setdefault(what, len(self.numbers))

    def _named(self, name: str | None) -> str | None:
        """A parameter's or buffer's name before it was fused."""
        owner, _, last = (name or "").rpartition(".")
        return full_name(self.old_names[owner], last) if owner in self.old_names else name
