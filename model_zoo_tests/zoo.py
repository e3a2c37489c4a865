"""Running the zoo: two checks a model, in processes of one thread each, kept on disk so that a stopped run goes on.

``structure``: every model on the meta device, against the oracle (``structure.py``). ``real``: every model that fits the
memory, on random data at the smallest input it takes (``laws.py``).
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
import gc
import hashlib
import json
import math
import multiprocessing
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from eagerq import integrations

from . import shapes
from .laws import TOLERANCE, RefusedInput, broken_laws, randomised
from .structure import COLUMNS, examine, holding_conv, on_meta, peak_mb

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("table.csv")
QUICK = Path(__file__).with_name("quick.txt")
RESULTS = ROOT / ".zoo"
BATCH = 4  # a norm over two values, at one position, has no variance left once they are quantized to the same code
SIZES = (32, 28, 48, 56, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)


# --- one model


def check_structure(name: str, _: float = math.inf) -> dict[str, Any]:
    """The row, the verdict and the classes of one model."""
    model = on_meta(name)
    classes = holding_conv(model)
    row, verdict = examine(model, name)
    return {"row": row.cells(), "verdict": dataclasses.asdict(verdict), "right": verdict.is_right, "classes": classes}


def check_real(name: str, granted_mb: float = math.inf) -> dict[str, Any]:
    """The laws on one model with random weights, at the smallest input it takes: float64 where rounding grows in float32.

    One that needs more memory than is granted says how much, and does nothing.
    """
    refused: list[str] = []
    for options, shape in small_inputs(name):
        if granted_mb < math.inf and (needs_mb := working_mb(on_meta(name, **options), shape)) > granted_mb:
            return {"needs_mb": needs_mb}
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))

        def build(options: dict[str, Any] = options) -> nn.Module:
            return timm.create_model(name, num_classes=10, **options)

        try:
            problems, facts = broken_laws(randomised(build), x, torch.float32)
            if facts.get("learning", 0.0) > TOLERANCE[torch.float32]:
                problems, facts = broken_laws(randomised(build), x, torch.float64)
        except RefusedInput as error:  # the meta device takes inputs that kernels refuse
            refused.append(f"{shape}: {error}"[:200])
            continue
        if any("only zeros" in problem for problem in problems) and shape[-1] < 224:
            refused.append(f"{shape}: {problems}"[:200])  # windows of one position have no relative coordinates but 0
            continue
        return {"problems": problems, "right": not problems, "shape": shape, "options": options, **facts}
    raise RuntimeError(f"{name} runs at none of its sizes: {refused}")


def small_inputs(name: str) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Options of ``create_model`` and input shapes that the model takes on the meta device, smallest first."""
    model = on_meta(name)
    guess = integrations.example_inputs(model)
    if not isinstance(guess, Tensor):
        raise TypeError(f"{name}: no example input to begin with")
    full = int(guess.shape[2])
    sizes = [size for size in SIZES if size < full]
    for size in sizes:
        if runs_at(model, (BATCH, guess.shape[1], size, size)):
            yield {}, (BATCH, guess.shape[1], size, size)
    for size in sizes:
        try:
            model = on_meta(name, img_size=size)
        except Exception:  # each model refuses it in a way of its own
            continue
        if runs_at(model, (BATCH, guess.shape[1], size, size)):
            yield {"img_size": size}, (BATCH, guess.shape[1], size, size)
    yield {}, (BATCH, *guess.shape[1:])


def runs_at(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a meta model takes this input, in train and in eval mode."""
    try:
        with torch.no_grad():
            for mode in (True, False):
                model.train(mode)(torch.empty(shape, device="meta"))
    except Exception:
        return False
    return True


def working_mb(model: nn.Module, shape: tuple[int, ...]) -> float:
    """What a training step holds at once: the process, weights and gradients, and what the forward of a meta model saves; zero
    where the meta device does not run it."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(t: Tensor) -> Tensor:
        saved.setdefault(t.untyped_storage()._cdata, t.untyped_storage())
        return t

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model.train()(torch.empty(shape, device="meta"))
    except Exception:
        return 0.0
    weights = 8 * sum(p.numel() for p in model.parameters())
    return 1500 + (weights + sum(s.nbytes() for key, s in saved.items() if key not in own)) / 2**20


CHECKS: dict[str, Callable[[str, float], dict[str, Any]]] = {"structure": check_structure, "real": check_real}


def checked(kind: str, name: str, granted_mb: float, kept_mb: float = math.inf) -> dict[str, Any]:
    """One check in this process: its findings, or the crash it ended in. Afterwards it keeps this much memory at most: memory
    that goes back to the system costs more to touch again than most of what is computed in it."""
    torch.set_num_threads(1)
    shapes.remember()
    start = time.perf_counter()
    try:
        found = CHECKS[kind](name, granted_mb)
    except Exception:
        found = {"right": False, "crash": traceback.format_exc(limit=-4)}
    if held_mb() > kept_mb:
        _give_back_memory()
    return {"kind": kind, "model": name, **found, "seconds": round(time.perf_counter() - start, 2), "peak_mb": round(peak_mb())}


# --- all models


def fingerprint() -> str:
    """Of everything a result depends on: the code of eagerq and of the checks, and the libraries' versions."""
    digest = hashlib.sha256(f"{torch.__version__} {timm.__version__}".encode())
    own = (Path(__file__).with_name(f"{name}.py") for name in ("laws", "oracle", "shapes", "structure", "zoo"))
    for path in sorted([*(ROOT / "eagerq").rglob("*.py"), *own]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Store:
    """Results on disk, a line each; those of other code or other versions do not count."""

    def __init__(self, folder: Path = RESULTS, *, any_code: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self.mark = fingerprint()
        self.results: dict[tuple[str, str], dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                result = json.loads(line)
                if any_code or result["code"] == self.mark:
                    self.results[result["kind"], result["model"]] = result

    def add(self, result: dict[str, Any]) -> None:
        """Keep one more."""
        result |= {"code": self.mark, "torch": torch.__version__, "timm": timm.__version__}
        self.results[result["kind"], result["model"]] = result
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")


def memory_mb(kind: str, name: str, known: Mapping[str, float]) -> float:
    """What one check is expected to need: its process, and on real tensors copies of weights and gradients; activations that
    take more than those show when it begins."""
    if kind == "structure":
        return 1500.0
    millions = known[name] if name in known else sum(p.numel() for p in on_meta(name).parameters()) / 1e6
    return 1500 + millions * 14


def run_checks(
    tasks: Sequence[tuple[str, str]], store: Store, jobs: int, budget_mb: float, done: Callable[[dict[str, Any]], None]
) -> list[tuple[str, str]]:
    """Run (kind, model) tasks within a memory budget; returns those that can never fit it.

    The largest go first, so that none is left running alone at the end.
    """
    known = {row["model"]: float(row["parameters"]) for row in (*read_table(), *rows_of(store))}
    needs = {task: memory_mb(*task, known) for task in tasks}
    waiting = sorted((task for task in tasks if needs[task] <= budget_mb), key=needs.__getitem__, reverse=True)
    running: dict[Future[dict[str, Any]], tuple[str, str]] = {}
    pool = _pool(jobs)
    while waiting or running:
        used = sum(needs[task] for task in running.values())
        while waiting and len(running) < jobs:
            fitting = [i for i, task in enumerate(waiting) if needs[task] + used <= budget_mb]
            if not fitting:
                break
            task = waiting.pop(fitting[0])
            used += needs[task]
            largest = max((needs[other] for other in waiting), default=0.0)
            running[pool.submit(checked, *task, needs[task], (budget_mb - largest) / max(jobs - 1, 1))] = task
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        broken = False
        for future in finished:
            task = running.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool:
                broken = True
                alone = not running and len(finished) == 1
                if not alone:  # whose fault it was is seen when each runs by itself
                    store_alone(task, store, done)
                    continue
                result = {"kind": task[0], "model": task[1], "right": False, "crash": "the process was killed"}
            if "needs_mb" in result:
                needs[task] = result["needs_mb"]
                if needs[task] <= budget_mb:
                    waiting.insert(0, task)
                continue
            store.add(result)
            done(result)
        if broken:
            pool = _pool(jobs)
    pool.shutdown()
    return [task for task in tasks if needs[task] > budget_mb]


def store_alone(task: tuple[str, str], store: Store, done: Callable[[dict[str, Any]], None]) -> None:
    """One check in a process of its own."""
    with _pool(1) as pool:
        try:
            result = pool.submit(checked, *task, math.inf).result()
        except BrokenProcessPool:
            result = {"kind": task[0], "model": task[1], "right": False, "crash": "the process was killed"}
    store.add(result)
    done(result)


def held_mb() -> float:
    """What this process holds now, not its peak, which stays."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:  # Linux's alone
        return peak_mb()


def _give_back_memory() -> None:
    """To the system, so that another process finds it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _pool(jobs: int) -> ProcessPoolExecutor:
    # half of the time went into mapping the same memory anew for every weight-sized result
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**40))
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=100)


# --- the table


def read_table() -> list[dict[str, str]]:
    """The checked-in rows."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of(store: Store) -> list[dict[str, str]]:
    """The rows found, as text, by name."""
    found = [r["row"] for (kind, _), r in store.results.items() if kind == "structure" and "row" in r]
    return sorted(found, key=lambda row: row["model"])


def write_table(rows: Sequence[dict[str, str]]) -> None:
    """Accept these rows."""
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def differences(found: Sequence[dict[str, str]], table: Sequence[dict[str, str]]) -> list[str]:
    """What is new, gone or different, a readable line each."""
    old, new = ({row["model"]: row for row in rows} for rows in (table, found))
    lines = [f"+ {name}: {new[name]['fused'] or 'nothing fused'}" for name in sorted(new.keys() - old.keys())]
    lines += [f"- {name}: no longer there" for name in sorted(old.keys() - new.keys())]
    for name in sorted(new.keys() & old.keys()):
        for column in COLUMNS[1:]:
            if new[name][column] != old[name][column]:
                before, after = (set(re.split("; ", row[name][column])) for row in (old, new))
                lines.append(f"~ {name}, {column}: -[{'; '.join(sorted(before - after))}] +[{'; '.join(sorted(after - before))}]")
    return lines


def quick_cover(store: Store) -> list[str]:
    """Models, quick ones first, that together hold every class of timm with a convolution."""
    found = {name: r for (kind, name), r in store.results.items() if kind == "structure" and r.get("classes")}
    left = {cls for r in found.values() for cls in r["classes"]}
    chosen: list[str] = []

    def worth(name: str) -> float:
        seconds = found[name]["seconds"] + store.results.get(("real", name), {"seconds": 60.0})["seconds"]
        return len(left.intersection(found[name]["classes"])) / (2 + seconds)

    while left:
        best = max(sorted(found), key=worth)
        chosen.append(best)
        left.difference_update(found[best]["classes"])
    return sorted(chosen)
