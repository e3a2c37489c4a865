"""Whether a fused copy, watched, ran as the model did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from torch import nn

from eagerq.plan import Match
from eagerq.record import full_name
from eagerq.trace import Call, Returned, Trace, upwards


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
            one.train() if mode else one.eval()
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


def beside(trace: Trace, absorbed: set[str]) -> Counter[tuple[str, str, tuple[str, ...]]]:
    """What ran beside the chains: functions by the module they ran in and their plain arguments, and other leaf modules."""
    return Counter(
        (call.name, "" if call.is_module else call.parent, call.constants)
        for call in trace.calls
        if not (call.is_module and call.name in absorbed) and absorbed.isdisjoint(upwards(call.parent))
    )


def returned(trace: Trace, chain_of: Mapping[str, str]) -> list[Hashable]:
    """What the model returned, each tensor as its shape and where it comes from: one name for all of a chain."""

    def origin(call: Call | None) -> Hashable:
        if call is None:
            return None
        around = upwards(call.name if call.is_module else call.parent)
        inside = next((chain_of[name] for name in around if name in chain_of), None)
        return inside or (call.name, "" if call.is_module else call.parent)

    return [
        (trace.shapes[item.value], origin(trace.producer.get(item.value))) if isinstance(item, Returned) else item
        for item in trace.returned
    ]
