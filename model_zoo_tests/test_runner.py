"""The runner: what is run, how often, and within which memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from torch import nn

from . import zoo
from .__main__ import uncovered


class Checks:
    """Stands in for the checks: what each needs in truth, and what ran with how much granted."""

    def __init__(self, true_needs: dict[str, float]) -> None:
        self.true_needs = true_needs
        self.runs: list[tuple[str, float]] = []
        self.kept: list[float] = []
        self.now, self.most = 0.0, 0.0
        self.lock = Lock()

    def __call__(self, kind: str, name: str, granted_mb: float, kept_mb: float) -> dict[str, Any]:
        needs = self.true_needs[name]
        self.kept.append(kept_mb)
        result = {"kind": kind, "model": name, "right": True}
        with self.lock:
            self.runs.append((name, granted_mb))
        if needs > granted_mb:
            return {**result, "needs_mb": needs}
        with self.lock:
            self.now += needs
            self.most = max(self.most, self.now)
        time.sleep(0.02)
        with self.lock:
            self.now -= needs
        return result


@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_every_check_runs_within_the_memory_or_is_named(jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = {"small": 10.0, "grown": 20.0, "large": 90.0, "huge": 300.0, "swollen": 30.0}
    checks = Checks({**planned, "grown": 80.0, "swollen": 200.0})
    monkeypatch.setattr(zoo, "checked", checks)
    monkeypatch.setattr(zoo, "_pool", ThreadPoolExecutor)
    monkeypatch.setattr(zoo, "memory_mb", lambda kind, name, known: planned[name])
    store, told = zoo.Store(tmp_path), []
    unfit = zoo.run_checks([("real", name) for name in planned], store, jobs, 100.0, told.append)
    assert unfit == [("real", "huge"), ("real", "swollen")]
    assert sorted(name for _, name in store.results) == sorted(r["model"] for r in told) == ["grown", "large", "small"]
    assert ("grown", 20.0) in checks.runs
    assert ("grown", 80.0) in checks.runs
    assert checks.runs[0] == ("large", 90.0)  # the largest first
    assert checks.most <= 100.0
    # the others keep together what leaves room for the largest that waits
    assert set(checks.kept) <= {(100.0 - waiting) / max(jobs - 1, 1) for waiting in (0.0, *planned.values(), 80.0)}
    assert zoo.Store(tmp_path).results.keys() == store.results.keys()  # and are there when it goes on


def test_what_a_forward_saves_counts_once_and_weights_do_not() -> None:
    """Of a linear layer its input, 4 x 1000 x 1000 values; a ReLU adds its result, which the second saves too."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.ReLU())
    weights = 8 * sum(p.numel() for p in model.parameters()) / 2**20
    values = 4 * 4_000_000 / 2**20
    assert zoo.working_mb(model, (4, 1000, 1000)) == pytest.approx(1500 + weights + 3 * values)


def test_the_quick_models_hold_every_class_with_a_convolution(tmp_path: Path) -> None:
    """As few as cover, quick ones first; one that is left out leaves classes that only it holds."""
    store = zoo.Store(tmp_path)
    held = {"slow": ["A", "B"], "fast": ["A"], "other": ["B", "C"], "none": []}
    seconds = {"slow": 9.0, "fast": 1.0, "other": 1.0, "none": 1.0}
    for name, classes in held.items():
        store.add({"kind": "structure", "model": name, "classes": classes, "seconds": seconds[name], "right": True})
    quick = zoo.quick_cover(store)
    assert quick == ["fast", "other"]
    results = list(store.results.values())
    assert uncovered(results, quick) == []
    assert uncovered(results, ["fast"]) == ["B", "C"]
    assert uncovered(results, []) == ["A", "B", "C"]
