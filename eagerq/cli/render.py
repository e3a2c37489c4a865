"""Plans and verifications in a terminal."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.nn.modules.conv import _ConvNd

from eagerq.deploy import Verification
from eagerq.plan import FusionPlan, Match


def _is_conv(match: Match) -> bool:
    return all(issubclass(cls, _ConvNd) for cls in match.fused.chain[0])


def _activation(match: Match) -> str | None:
    """``"ReLU"``, ``"other"``, or None where the chain ends in no activation."""
    last = match.fused.chain[-1]
    if any(issubclass(cls, (_ConvNd, nn.Linear)) or "Norm" in cls.__name__ for cls in last):
        return None
    return "ReLU" if last == (nn.ReLU,) else "other"


def summary(plan: FusionPlan) -> dict[str, Any]:
    """Counts of what a plan fuses."""
    convs = Counter(_activation(match) for match in plan.matches if _is_conv(match))
    return {
        "conv_chains": convs.total(),
        "conv_chains_with_relu": convs["ReLU"],
        "conv_chains_with_other_activation": convs["other"],
        "other_chains": len(plan.matches) - convs.total(),
        "skipped": len(plan.skips),
        "fused": dict(sorted(Counter(match.fused.__name__ for match in plan.matches).items())),
    }


def summary_line(plan: FusionPlan) -> str:
    """The counts in one sentence."""
    counts = summary(plan)
    line = f"{counts['conv_chains']} conv chains fused, {counts['conv_chains_with_relu']} of them with ReLU"
    if counts["conv_chains_with_other_activation"]:
        line += f", {counts['conv_chains_with_other_activation']} with another activation"
    if counts["other_chains"]:
        line += f"; {counts['other_chains']} other chains fused"
    return f"{line}; {counts['skipped']} skipped"


def show_plan(plan: FusionPlan) -> None:
    """Print a plan and its summary: as tables in a terminal, as plain text elsewhere."""
    console = Console()
    if not console.is_terminal:
        print(plan)
        print(summary_line(plan))
        return
    if plan.matches:
        table = Table("fused", "modules", title="Chains to fuse", title_justify="left")
        for match in plan.matches:
            names = (name + (" (copy)" if name in match.copied else "") for name in match.names)
            table.add_row(Text(match.fused.__name__, "green"), Text(" + ".join(names)))
        console.print(table)
    if plan.skips:
        table = Table("modules", "reason", title="Skipped", title_justify="left")
        for skip in plan.skips:
            table.add_row(Text(" + ".join(skip.names)), Text(skip.reason, "yellow"))
        console.print(table)
    for note in plan.notes:
        console.print(Text(f"note: {note}"))
    console.print(Text(summary_line(plan), "bold"))


def show_verification(found: Verification) -> None:
    """Print a verification: as tables in a terminal, as plain text elsewhere."""
    console = Console()
    if not console.is_terminal:
        print(found)
        return
    differing = [row for row in found.rows if row.differing]
    if differing:
        table = Table("tensor", title="Tensors that differ, in the order they are computed", title_justify="left")
        for column in ("codes", "differing", "share", "largest, in codes"):
            table.add_column(column, justify="right")
        for row in differing:
            share = f"{100 * row.differing / row.compared:.2g} %"
            table.add_row(Text(row.name, "red"), f"{row.compared:,}", f"{row.differing:,}", share, str(row.largest))
        console.print(table)
    if found.exact.floats:
        table = Table("function", "module", title="Computed in float, where engines may round otherwise", title_justify="left")
        table.add_column("times", justify="right")
        for (function, module), times in found.exact.floats.items():
            table.add_row(Text(function, "yellow"), Text(module or "(model)"), str(times))
        console.print(table)
    if found.missing:
        console.print(Text(f"not in the file: {', '.join(found.missing)}", "yellow"))
    console.print(Text(found.summary, "bold green" if found.same else "bold red"))
