"""Whether a fused copy, watched, ran as the model did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from eagerq.plan import Match
from eagerq.record import full_name
from eagerq.trace import Trace


def broken(match: Match, before: Trace, after: Trace) -> str | None:
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


def beside(trace: Trace, absorbed: set[str]) -> Counter[tuple[str, str]]:
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
