"""One model by structure alone, on the meta device: its row of the table, and what eagerq and the oracle disagree on."""

from __future__ import annotations

import dataclasses
import itertools
import re
import resource
import time
from collections import Counter
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

import eagerq
from eagerq.errors import StateError
from eagerq.inputs import runs_for
from eagerq.surgery import full_copy, meta_copy

from .oracle import Link, Seen, begins_chain, claimed_links, fx_links, operator_links, true_chains
from .rules import claims, neighbours, siblings, torch_fx_refuses


@dataclasses.dataclass(frozen=True)
class Row:
    """What is found in one model.

    Attributes:
        model: its name.
        parameters: in millions.
        links: true links of claimed types, by the oracle.
        fused: chains by fused class.
        skips: skipped chains by reason, names left out.
        float: modules that stay unquantized, by type and reason.
    """

    model: str
    parameters: float
    links: int
    fused: dict[str, int]
    skips: dict[str, int]
    float: dict[str, int]

    def cells(self) -> dict[str, str]:
        """The row as text, a cell a column of the checked-in table."""
        listed = {key: "; ".join(f"{n} {kind}" for kind, n in sorted(getattr(self, key).items())) for key in COLUMNS[3:]}
        return {"model": self.model, "parameters": f"{self.parameters:.1f}", "links": str(self.links), **listed}


COLUMNS = ("model", "parameters", "links", "fused", "skips", "float")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Where eagerq and the oracle part, and what planning cost.

    Attributes:
        false: chains fused that the oracle has not.
        missed: chains of the oracle that are not fused.
        unexplained: claimed links that no fused chain holds and no skip names, less the chainless ones.
        chainless: claimed links whose types begin no chain (a norm with another activation than ReLU) and whose norm is in none.
        fx: links that torch.fx and the operators see differently; None where torch.fx cannot trace.
        plain_fx: what plain ``torch.fx.symbolic_trace`` says of the model; None if it traces.
        rules: links that matching neighbours would fuse, by rule: how many are true and how many wrong.
        plan_s: seconds ``plan_fusion`` took.
        grown_mb: by how much planning raised the process's peak memory.
    """

    false: tuple[str, ...]
    missed: tuple[str, ...]
    unexplained: tuple[str, ...]
    chainless: tuple[str, ...]
    fx: tuple[str, ...] | None
    plain_fx: str | None
    rules: dict[str, tuple[int, int]]
    plan_s: float
    grown_mb: float

    @property
    def is_right(self) -> bool:
        return not (self.false or self.missed or self.unexplained or self.fx)


def without_names(reason: str, names: set[str]) -> str:
    """A reason with module names and numbers left out, so that like ones count together."""
    words = re.split(r"([\s,:;'\"()]+)", reason)
    return "".join("_" if w in names or w.isdigit() or _is_key(w, names) else w for w in words)


def _is_key(word: str, names: set[str]) -> bool:
    return "." in word and any(word.startswith(f"{name}.") for name in names if name)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def looks_for(model: nn.Module, plan: eagerq.FusionPlan, example_inputs: Any) -> list[Seen]:
    """The oracle's looks at every run in the modes that eagerq could watch, on a copy, on meta if eagerq's was."""
    copied = meta_copy(model) if plan.on_meta else full_copy(model)
    looks = []
    for given in runs_for(model, example_inputs) or ():
        for mode in (True, False):
            if any(f"not watched in {'train' if mode else 'eval'} mode" in note for note in plan.notes):
                continue
            run = given.copied("meta" if plan.on_meta else None)
            looks.append(operator_links(copied.train(mode), run.args, run.kwargs))
    return looks


def disagreements(model: nn.Module, graphs: list[Seen], looks: list[Seen]) -> tuple[str, ...]:
    """Links that torch.fx's graphs have and the operators have not, or the other way round where torch.fx looked."""
    axes = {name: n for look in looks for name, n in look.axes.items()}
    theirs = claimed_links(model, [dataclasses.replace(graph, axes=axes) for graph in graphs])
    ours = {a: b for a, b in claimed_links(model, looks).items() if all({a, b} <= graph.calls.keys() for graph in graphs)}
    return tuple(f"{a} -> {b}" for a, b in sorted(theirs.items() ^ ours.items()))


def examine(model: nn.Module, name: str, example_inputs: Any = None) -> tuple[Row, Verdict]:
    """The row and the verdict for a model; its inputs are eagerq's own guess if none are given."""
    before, start = peak_mb(), time.perf_counter()
    plan = eagerq.plan_fusion(model, example_inputs=example_inputs)
    plan_s, grown_mb = time.perf_counter() - start, peak_mb() - before
    found = {match.names for match in plan.matches}
    looks = looks_for(model, plan, example_inputs)
    links = claimed_links(model, looks)
    expected, refused = true_chains(model, looks)
    unexplained, chainless = unheld(model, plan, links, refused)
    training = model.training
    traced = [seen for mode in (True, False) if (seen := fx_links(model.train(mode))) is not None]
    model.train(training)
    fx = disagreements(model, traced, looks) if len(traced) == 2 else None
    plain_fx = torch_fx_refuses(model)
    rules = {rule.__name__: judged(claims(model, rule(model), looks), links) for rule in (neighbours, siblings)}
    names = {n for n, _ in model.named_modules(remove_duplicate=False)}
    skips = Counter(without_names(skip.reason, names) for skip in plan.skips)
    qat_rows: tuple[tuple[str, str, str, str], ...] = ()
    try:
        qat = eagerq.convert_qat(plan.apply(model), example_inputs=example_inputs, inplace=True)
        qat_rows = eagerq.report(qat).rows
    except StateError as error:
        if "found nothing to quantize" not in str(error):
            raise
    left = Counter(f"{kind}: {without_names(reason, names)}" for _, kind, state, reason in qat_rows if state == "float")
    row = Row(
        name,
        sum(p.numel() for p in model.parameters()) / 1e6,
        len(links),
        dict(Counter(match.fused.__name__ for match in plan.matches)),
        dict(skips),
        dict(left),
    )
    false, missed = sorted(found - expected), sorted(expected - found)
    return row, Verdict(
        tuple(" + ".join(c) for c in false),
        tuple(" + ".join(c) for c in missed),
        unexplained,
        chainless,
        fx,
        plain_fx,
        rules,
        plan_s,
        grown_mb,
    )


def unheld(
    model: nn.Module, plan: eagerq.FusionPlan, links: dict[str, str], refused: dict[Link, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The claimed links that no fused chain holds and no skip names: those unexplained, and those whose types begin no chain."""
    modules = dict(model.named_modules())
    held = {link for match in plan.matches for link in itertools.pairwise(match.names)}
    inside = {name for match in plan.matches for name in match.names}
    named = [set(skip.names) for skip in plan.skips]
    unexplained, chainless = [], []
    for a, b in links.items():
        if (a, b) in held or any({a, b} <= names for names in named):
            continue
        types = f"{type(modules[a]).__name__} + {type(modules[b]).__name__}"
        if a not in inside and not begins_chain(modules[a], modules[b]):
            chainless.append(f"{a} -> {b}: {types} begins no chain")
        else:
            unexplained.append(f"{a} -> {b}: {refused.get((a, b), f'{types} is in no chain and named by no skip')}")
    return tuple(unexplained), tuple(chainless)


def judged(claimed: set[Link], links: dict[str, str]) -> tuple[int, int]:
    """How many claims are true and how many wrong."""
    right = sum(links.get(a) == b for a, b in claimed)
    return right, len(claimed) - right


def on_meta(name: str, **options: Any) -> nn.Module:
    """A timm model of shapes alone, in train mode."""
    with torch.device("meta"):
        return timm.create_model(name, **options).train()


def holding_conv(model: nn.Module) -> tuple[str, ...]:
    """timm's classes in this model with a convolution among their children."""
    held = {
        type(module)
        for module in model.modules()
        if type(module).__module__.startswith("timm.") and any(isinstance(child, _ConvNd) for child in module.children())
    }
    return tuple(sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in held))
