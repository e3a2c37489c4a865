"""Who can take a model, and who fuses wrongly: torch.fx, torch.export, neighbour rules and eagerq, side by side.

timm's models (by the zoo's results, so run ``tox -e zoo`` first; torch.export on the part of the zoo that the normal tests
run, since it takes many seconds a model), torchvision's, transformers', and the untraceable ones written for the suite.

Usage: python benchmarks/comparison.py    writes docs/comparison.md and prints it
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from rich.progress import track
from torch import nn

import eagerq
from eagerq.inputs import runs_for
from eagerq.surgery import meta_copy
from model_zoo_tests.beyond import BEYOND, TORCHVISION, Beyond
from model_zoo_tests.oracle import claimed_links, true_chains
from model_zoo_tests.rules import claims, neighbours, siblings, torch_export_refuses, torch_fx_refuses
from model_zoo_tests.structure import judged, looks_for
from model_zoo_tests.untraceable import UNTRACEABLE
from model_zoo_tests.zoo import QUICK, Store, on_meta

PAGE = Path(__file__).resolve().parent.parent / "docs" / "comparison.md"


@dataclasses.dataclass
class Set:
    """Counts over one set of models."""

    name: str
    models: int = 0
    links: int = 0
    fx: int = 0
    exported: int = 0
    export_tried: int = 0
    eagerq: int = 0
    wrong: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(("neighbours", "siblings", "eagerq"), 0))
    hit: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(("neighbours", "siblings", "eagerq"), 0))

    def add_wrong(self, who: str, links: int) -> None:
        self.wrong[who] += links
        self.hit[who] += bool(links)


def zoo() -> Set:
    """timm, from the stored results; torch.export is asked here."""
    found = Set("timm")
    results = [r for (kind, _), r in Store(any_code=True).results.items() if kind == "structure" and "row" in r]
    for result in results:
        verdict = result["verdict"]
        found.models += 1
        found.links += int(result["row"]["links"])
        found.fx += verdict["plain_fx"] is None
        found.eagerq += result["right"]
        found.add_wrong("eagerq", len(verdict["false"]))
        for rule, (_, wrong) in verdict["rules"].items():
            found.add_wrong(rule, wrong)
    for name in track(QUICK.read_text().split(), "torch.export on timm", transient=True):
        model = on_meta(name).eval()
        runs = [run.copied("meta") for run in runs_for(model, None) or ()]
        found.export_tried += 1
        found.exported += all(torch_export_refuses(model, run.args, run.kwargs) is None for run in runs)
    return found


def others(name: str, models: Iterable[tuple[Callable[[], nn.Module], Any]]) -> Set:
    """Any models with their example inputs."""
    found = Set(name)
    for build, inputs in track(list(models), name, transient=True):
        model = build()
        plan = eagerq.plan_fusion(model, example_inputs=inputs)
        looks = looks_for(model, plan, inputs)
        links, (chains, _) = claimed_links(model, looks), true_chains(model, looks)
        fused = {match.names for match in plan.matches}
        found.models += 1
        found.links += len(links)
        found.eagerq += fused == chains
        found.add_wrong("eagerq", len(fused - chains))
        for rule in (neighbours, siblings):
            found.add_wrong(rule.__name__, judged(claims(model, rule(model), looks), links)[1])
        found.fx += torch_fx_refuses(model) is None
        found.export_tried += 1
        place = "meta" if plan.on_meta else None
        model = meta_copy(model) if plan.on_meta else model
        runs = [run.copied(place) for run in runs_for(model, inputs) or ()]
        found.exported += all(torch_export_refuses(model.eval(), run.args, run.kwargs) is None for run in runs)
    return found


def untraceable() -> Set:
    """The suite's own set, where what the tools say is a tested row: a wrong graph is no graph."""
    found = others("untraceable", [(row.build, row.inputs()) for row in UNTRACEABLE])
    found.fx = sum(row.fx.kind == "takes" for row in UNTRACEABLE)
    found.exported = sum("takes" in (row.export.kind, row.strict.kind) for row in UNTRACEABLE)
    return found


def given(row: Beyond) -> tuple[Callable[[], nn.Module], Any]:
    """A model with its inputs: eagerq's own guess where the table relies on it."""
    return row.build, None if row.guessed or row.inputs is None else row.inputs()


def share(n: int, of: int) -> str:
    return f"{n} of {of} ({100 * n / max(of, 1):.1f} %)"


def page(sets: list[Set]) -> str:
    """The page as Markdown."""
    lines = [
        "# Who can take a model, and who fuses wrongly",
        "",
        f"torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}, Python"
        f" {platform.python_version()}; written by `python benchmarks/comparison.py` from the results of `tox -e zoo`.",
        "",
        "## Models handled",
        "",
        "torch.fx: `symbolic_trace` takes the model. torch.export: `export` takes it, non-strict or strict. eagerq: the plan is"
        " exactly what the operator-level oracle finds. On the untraceable set a graph that does not compute what the model"
        " does is not counted.",
        "",
        "| set | models | torch.fx | torch.export | eagerq |",
        "|---|---|---|---|---|",
        *(
            f"| {s.name} | {s.models} | {share(s.fx, s.models)} | {share(s.exported, s.export_tried)} |"
            f" {share(s.eagerq, s.models)} |"
            for s in sets
        ),
        "",
        "## Wrong fusions",
        "",
        "Links (conv or linear -> norm, -> activation, norm -> activation) that a rule would fuse and that are not there, and the"
        " number of models that hold one. Registration order: neighbours in flattened `named_modules`. Same parent: adjacent"
        " children of one parent, SparseML's rule. `nn.Identity` is skipped in both.",
        "",
        "| set | true links | registration order | same parent | eagerq |",
        "|---|---|---|---|---|",
        *(
            f"| {s.name} | {s.links} | "
            + " | ".join(f"{s.wrong[who]} wrong in {s.hit[who]}" for who in ("neighbours", "siblings", "eagerq"))
            + " |"
            for s in sets
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write the page and print it."""
    torch.set_num_threads(1)
    vision = [given(row) for row in BEYOND if row.name in TORCHVISION]
    hugging = [given(row) for row in BEYOND if row.name.startswith("hf_")]
    text = page([zoo(), others("torchvision", vision), others("transformers", hugging), untraceable()])
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
