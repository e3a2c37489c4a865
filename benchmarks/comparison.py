"""Who can take a model, and who fuses wrongly: torch.fx, torch.export, neighbour rules and eagerq, side by side.

timm's models (by the zoo's results, so run ``tox -e zoo`` first; torch.export on the part of the zoo that the normal tests
run, since it takes many seconds a model), torchvision's, transformers', and the untraceable ones written for the suite.

Usage: python benchmarks/comparison.py    writes docs/comparison.md and prints it
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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
from model_zoo_tests.beyond import BEYOND, Beyond
from model_zoo_tests.oracle import claimed_links, true_chains
from model_zoo_tests.rules import claims, neighbours, siblings, torch_export_refuses, torch_fx_refuses
from model_zoo_tests.structure import judged, looks_for
from model_zoo_tests.untraceable import UNTRACEABLE, Untraceable
from model_zoo_tests.zoo import QUICK, Store, fingerprint, on_meta

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

    def add(self, other: Set) -> None:
        """The counts of other models of this set."""
        for field in ("models", "links", "fx", "exported", "export_tried", "eagerq"):
            setattr(self, field, getattr(self, field) + getattr(other, field))
        for mine, theirs in ((self.wrong, other.wrong), (self.hit, other.hit)):
            for who, n in theirs.items():
                mine[who] += n


def stored() -> list[dict[str, Any]]:
    """The structure results of the zoo, whatever code they are of: the page says which."""
    store = Store(any_code=True)
    found = [r for (kind, _), r in store.results.items() if kind == "structure" and "row" in r]
    if not found:
        sys.exit(
            f"wanted the zoo's results, found none of timm's structure in {store.path};"
            " run `tox -e zoo -- --kind structure` first."
        )
    return found


def from_results(results: Sequence[dict[str, Any]]) -> Set:
    """timm but for torch.export, from the stored results."""
    found = Set("timm")
    for result in results:
        verdict = result["verdict"]
        found.models += 1
        found.links += int(result["row"]["links"])
        found.fx += verdict["plain_fx"] is None
        found.eagerq += result["right"]
        found.add_wrong("eagerq", len(verdict["false"]))
        for rule, (_, wrong) in verdict["rules"].items():
            found.add_wrong(rule, wrong)
    return found


def origins(results: Sequence[dict[str, Any]]) -> str:
    """What the stored results come from: the marks of the code, with torch's version, and how many of each where several."""
    found = Counter((r["code"], r["torch"]) for r in results)
    mark = fingerprint()
    told = [
        f"{f'{n} ' if len(found) > 1 else ''}of code {code}{'' if code == mark else ', which is not what lies here now,'}"
        f" under torch {version}"
        for (code, version), n in sorted(found.items())
    ]
    return "; ".join(told)


def timm_export(name: str) -> Set:
    """Whether torch.export takes one timm model."""
    model = on_meta(name).eval()
    runs = [run.copied("meta") for run in runs_for(model, None) or ()]
    exported = all(torch_export_refuses(model, run.args, run.kwargs) is None for run in runs)
    return Set("timm", exported=exported, export_tried=1)


def measured(name: str, build: Callable[[], nn.Module], inputs: Any) -> Set:
    """Any model with its example inputs."""
    model = build()
    plan = eagerq.plan_fusion(model, example_inputs=inputs)
    looks = looks_for(model, plan, inputs)
    links, (chains, _) = claimed_links(model, looks), true_chains(model, looks)
    fused = {match.names for match in plan.matches}
    found = Set(name, models=1, links=len(links), eagerq=fused == chains, export_tried=1)
    found.add_wrong("eagerq", len(fused - chains))
    for rule in (neighbours, siblings):
        found.add_wrong(rule.__name__, judged(claims(model, rule(model), looks), links)[1])
    found.fx = torch_fx_refuses(model) is None
    place = "meta" if plan.on_meta else None
    model = meta_copy(model) if plan.on_meta else model
    runs = [run.copied(place) for run in runs_for(model, inputs) or ()]
    found.exported = all(torch_export_refuses(model.eval(), run.args, run.kwargs) is None for run in runs)
    return found


def beyond(row: Beyond) -> Set:
    """A model of torchvision or transformers; eagerq's own guess of inputs where the table relies on it."""
    name = "transformers" if row.name.startswith("hf_") else "torchvision"
    return measured(name, row.build, None if row.guessed or row.inputs is None else row.inputs())


def untraceable(row: Untraceable) -> Set:
    """The suite's own set, where what the tools say is a tested row: a wrong graph is no graph."""
    found = measured("untraceable", row.build, row.inputs())
    found.fx = row.fx.kind == "takes"
    found.exported = "takes" in (row.export.kind, row.strict.kind)
    return found


def one(kind: str, name: str) -> Set:
    """The counts of one model, in a process of its own thread."""
    torch.set_num_threads(1)
    if kind == "timm":
        return timm_export(name)
    if kind == "untraceable":
        return untraceable(next(row for row in UNTRACEABLE if row.name == name))
    return beyond(next(row for row in BEYOND if row.name == name))


def share(n: int, of: int, models: int | None = None) -> str:
    """``n`` of ``of``; where fewer than ``models`` were asked, that too."""
    asked = "" if models is None or of == models else f", asked of {of} of the {models}"
    return f"{n} of {of} ({100 * n / max(of, 1):.1f} %){asked}"


def page(sets: list[Set], origin: str) -> str:
    """The page as Markdown."""
    lines = [
        "# Who can take a model, and who fuses wrongly",
        "",
        f"torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}, Python"
        f" {platform.python_version()}; written by `python benchmarks/comparison.py` from the results of `tox -e zoo`"
        f" ({origin}).",
        "",
        "## Models handled",
        "",
        "torch.fx: `symbolic_trace` takes the model. torch.export: `export` takes it, non-strict or strict (of timm, asked of"
        " the models that the normal tests run, which hold every timm class with a convolution). eagerq: the plan is"
        " exactly what the operator-level oracle finds. On the untraceable set a graph that does not compute what the model"
        " does is not counted.",
        "",
        "| set | models | torch.fx | torch.export | eagerq |",
        "|---|---|---|---|---|",
        *(
            f"| {s.name} | {s.models} | {share(s.fx, s.models)} | {share(s.exported, s.export_tried, s.models)} |"
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
    results = stored()
    tasks = [
        *(("timm", name) for name in QUICK.read_text().split()),
        *(("beyond", row.name) for row in BEYOND),
        *(("untraceable", row.name) for row in UNTRACEABLE),
    ]
    sets = {name: Set(name) for name in ("timm", "torchvision", "transformers", "untraceable")}
    sets["timm"].add(from_results(results))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(one, *task) for task in tasks]
        for future in track(as_completed(futures), "comparing", len(futures), transient=True):
            found = future.result()
            sets[found.name].add(found)
    text = page(list(sets.values()), origins(results))
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
