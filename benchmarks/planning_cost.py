"""What ``plan_fusion`` costs on timm's largest models: seconds and megabytes, each on the meta device in a process of its own.

Usage: python benchmarks/planning_cost.py [--above 2000] [model ...]    models of more than so many million parameters
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import timm
import torch

import eagerq

TABLE = Path(__file__).resolve().parent.parent / "model_zoo_tests" / "table.csv"


def cost(name: str) -> tuple[float, float, int]:
    """Seconds that planning one model took, by how much it raised the process's peak memory (MB), and the chains found."""
    with torch.device("meta"):
        model = timm.create_model(name)
    before, start = _peak_mb(), time.perf_counter()
    plan = eagerq.plan_fusion(model)
    return time.perf_counter() - start, _peak_mb() - before, len(plan.matches)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """One model after the other, so that none waits for another's share of the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--above", type=float, default=2000.0, help="millions of parameters")
    options = parser.parse_args()
    with TABLE.open(newline="") as file:
        sizes = {row["model"]: float(row["parameters"]) for row in csv.DictReader(file)}
    names = options.models or [name for name, millions in sizes.items() if millions > options.above]
    if not names:
        parser.error(f"wanted models, found none of more than {options.above:g} million parameters in {TABLE}; lower --above")
    unknown = [name for name in names if name not in sizes]
    if unknown:
        parser.error(f"wanted models of {TABLE}, found {unknown[0]!r}; timm.list_models() has their names")
    print(f"torch {torch.__version__}, timm {timm.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    rows = []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in names:
            rows.append(pool.submit(cost, name).result())
            seconds, grown_mb, chains = rows[-1]
            print(f"{name}, {sizes[name]:.0f} million parameters: {chains} chains, {seconds:.1f} s, {grown_mb:.0f} MB")
    print(f"{len(rows)} models: at most {max(row[0] for row in rows):.1f} s and {max(row[1] for row in rows):.0f} MB")


if __name__ == "__main__":
    main()
