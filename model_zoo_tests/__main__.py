"""``python -m model_zoo_tests run``: the whole zoo; ``accept``: take what was found as the table; ``deploy``: the engine."""

from __future__ import annotations

import fnmatch
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import timm
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track
from rich.table import Table

from .engine import NETS, verified
from .zoo import QUICK, RESULTS, Store, differences, quick_cover, read_table, rows_of, run_checks, write_table

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console(width=None if sys.stdout.isatty() else 150)


def _memory_mb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


@app.command()
def run(
    models: Annotated[str, typer.Option(help="names of timm models, wildcards allowed")] = "*",
    kind: Annotated[str, typer.Option(help="structure, real or both")] = "both",
    jobs: Annotated[int, typer.Option(help="processes")] = os.cpu_count() or 1,
    memory: Annotated[float, typer.Option(help="MB all checks together may take; 0 for 85 % of the machine's")] = 0.0,
    folder: Annotated[Path, typer.Option(help="where results are kept")] = RESULTS,
    any_code: Annotated[bool, typer.Option(help="let right results of other code or versions stand")] = False,
) -> None:
    """Check every model that has no result yet, then print the summary; the exit code says whether all is right."""
    names = fnmatch.filter(timm.list_models(), models)
    kinds = ("structure", "real") if kind == "both" else (kind,)
    store = Store(folder, any_code=any_code)
    wanted = [(k, name) for k in kinds for name in names]
    todo = [task for task in wanted if task not in store.results or (any_code and not store.results[task]["right"])]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("zoo", total=len(wanted), completed=len(wanted) - len(todo))

        def done(result: dict[str, Any]) -> None:
            if not result["right"]:
                console.print(f"[red]{result['kind']} {result['model']}[/]: {_wrong(result)}", highlight=False, markup=True)
            progress.advance(bar)

        unfit = run_checks(todo, store, jobs, memory or 0.85 * _memory_mb(), done)
    sys.exit(summary(store, names, kinds, unfit))


def _wrong(result: dict[str, Any]) -> str:
    verdict = {key: value for key, value in result.get("verdict", {}).items() if isinstance(value, list) and value}
    return str(result.get("crash") or result.get("problems") or verdict).replace("[", "\\[")


def uncovered(results: list[dict[str, Any]], quick: list[str]) -> list[str]:
    """The classes with a convolution that no model of the normal tests holds."""
    held = {cls for result in results if result["model"] in quick for cls in result["classes"]}
    return sorted({cls for result in results for cls in result["classes"]} - held)


def summary(store: Store, names: list[str], kinds: tuple[str, ...], unfit: list[tuple[str, str]]) -> int:
    """Print what was found over all models; 0 if everything is right and as in the table."""
    found = {kind: [store.results[kind, n] for n in names if (kind, n) in store.results] for kind in kinds}
    wrong = sum(not result["right"] for results in found.values() for result in results)
    lines = []
    if "structure" in kinds:
        rows = [r for r in found["structure"] if "row" in r]
        verdicts = [r["verdict"] for r in rows]
        chains = sum(int(cell.split()[0]) for r in rows for cell in r["row"]["fused"].split("; ") if cell)
        lines += [
            f"{len(rows)} rows; {sum(int(r['row']['links']) for r in rows)} true links of claimed types; {chains} chains fused",
            f"{sum(len(v['false']) for v in verdicts)} false fusions, {sum(len(v['missed']) for v in verdicts)} missed links of"
            f" claimed types, {sum(len(v['unexplained']) for v in verdicts)} unexplained (beside"
            f" {sum(len(v.get('chainless', ())) for v in verdicts)} links whose types begin no chain),"
            f" {sum('crash' in r for r in found['structure'])} crashes",
            f"torch.fx traces {sum(v['fx'] is not None for v in verdicts)} and disagrees on"
            f" {sum(len(v['fx'] or ()) for v in verdicts)} links",
            f"planning took at most {max((v['plan_s'] for v in verdicts), default=0):.1f} s, shapes remembered, and"
            f" {max((v['grown_mb'] for v in verdicts), default=0):.0f} MB more memory",
        ]
        if len(rows) == len(timm.list_models()):
            changed = differences(rows_of(store), read_table())
            left = uncovered(rows, QUICK.read_text().split())
            lines += [
                f"{len(changed)} differences from the table (python -m model_zoo_tests accept takes them)",
                *changed[:40],
                f"{len(left)} classes of timm with a convolution are in no model of {QUICK.name}" + (f": {left}" if left else ""),
            ]
            wrong += len(changed) + len(left)
    if "real" in kinds:
        real = found["real"]
        lines += [
            f"{sum(r['right'] for r in real)} of {len(real)} models keep every law on real tensors,"
            f" {sum(str(r.get('dtype')) == 'float64' for r in real)} of them in float64;"
            f" {sum('crash' in r for r in real)} crashes",
            f"largest difference while learning: {max((r.get('learning', 0.0) for r in real), default=0.0):.1e}",
        ]
        if unfit:
            lines.append(f"{len(unfit)} do not fit the memory: {', '.join(name for _, name in unfit)}")
    for line in lines:
        console.print(line, highlight=False, markup=False)
    return int(wrong > 0)


@app.command()
def accept(folder: Annotated[Path, typer.Option(help="where results are kept")] = RESULTS, any_code: bool = False) -> None:
    """Write the table and the list of models the normal tests run, from the results of the last run."""
    store = Store(folder, any_code=any_code)
    rows = rows_of(store)
    if len(rows) < len(timm.list_models()):
        console.print(f"{len(rows)} of {len(timm.list_models())} models have a result; run first")
        sys.exit(1)
    for line in differences(rows, read_table()):
        console.print(line, highlight=False, markup=False)
    write_table(rows)
    QUICK.write_text("\n".join(quick_cover(store)) + "\n")


@app.command()
def deploy(
    nets: Annotated[list[str] | None, typer.Argument(help="names of timm models; left out: those of engine.py")] = None,
    size: Annotated[int, typer.Option(help="pixels")] = 224,
    batches: Annotated[int, typer.Option(help="random batches of two images each")] = 1,
) -> None:
    """Compare every code of each net in ONNX Runtime with the exact mode; the exit code says whether all are equal."""
    table = Table("net", "tensors", "codes", "differing", "largest output difference", "integer", "float", "file / float")
    wrong = 0
    for name in track(nets or NETS, "deploying", transient=True, console=console):
        with tempfile.TemporaryDirectory() as folder:
            found = verified(name, size, Path(folder), batches)
        result = found.verification
        wrong += not result.same
        cells = (len(result.rows), f"{result.compared:,}", f"{result.differing:,}", f"{result.output_difference:g}")
        kernels = (len(found.export.kernels) - len(found.export.floats), len(found.export.floats), f"{found.size_ratio:.3f}")
        table.add_row(name, *map(str, (*cells, *kernels)))
        if not result.same:
            console.print(str(result), highlight=False, markup=False)
    console.print(table)
    console.print(f"{wrong} of {table.row_count} nets differ between the exact mode and the engine", highlight=False)
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    app()
