"""The rows of ``qat_step.py``: as a table, as JSON, as a plot."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass
class Row:
    """One variant of one model in one precision and mode. What was not measured is None; ratios are to float beside it."""

    model: str
    precision: str
    mode: str
    variant: str
    error: str | None = None
    note: str = ""
    build_s: float | None = None
    first_step_s: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    peak_bytes: int | None = None
    peak_ratio: float | None = None
    kernel_ms: float | None = None
    kernel_ratio: float | None = None
    launches: float | None = None
    top_kernels: list[tuple[str, float, float]] = dataclasses.field(default_factory=list)
    rounds: int = 0
    wall_ms: float | None = None
    host_ms: float | None = None
    wall_ratio: float | None = None
    wall_ratio_quartiles: tuple[float, float] | None = None

    def add_note(self, text: str) -> None:
        """One more thing to know."""
        self.note = f"{self.note}; {text}" if self.note else text

    def compare(self, float_row: Row, walls: list[float], float_walls: list[float]) -> None:
        """Fill in the ratios to the float row; the lists are milliseconds of the same rounds."""
        if self.peak_bytes and float_row.peak_bytes:
            self.peak_ratio = self.peak_bytes / float_row.peak_bytes
        if self.kernel_ms and float_row.kernel_ms:
            self.kernel_ratio = self.kernel_ms / float_row.kernel_ms
        ratios = sorted(a / b for a, b in zip(walls, float_walls, strict=False))
        if ratios:
            self.wall_ratio = statistics.median(ratios)
            self.wall_ratio_quartiles = (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4])


def installed(package: str) -> str | None:
    """A package's version, None where it is not installed; eagerq may also run from its source tree."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers are of."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = ("torch", "triton", "timm", "torchao", "brevitas", "eagerq")
    versions = {"python": platform.python_version(), **{name: installed(name) for name in packages}, "torch": torch.__version__}
    found: dict[str, Any] = {
        "device": "cpu",
        "cpu": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": versions,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "device_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def in_words(machine: dict[str, Any], options: dict[str, Any]) -> str:
    """One line over the table."""
    where = machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['threads']} threads"
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    return f"{where}; batch {options['batch']}, {options['size']} px, {options['memory_format']}; {versions}"


def write_json(path: Path, machine: dict[str, Any], options: dict[str, Any], rows: list[Row]) -> None:
    """All that is known so far, in one file that is always whole."""
    text = json.dumps(
        {"machine": machine, "options": options, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1, default=str
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(path.suffix + ".part")
    draft.write_text(text + "\n")
    draft.replace(path)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def show(rows: list[Row], width: int = 160) -> None:
    """The table."""
    heads = ("net", "step", "variant", "ms", "x float", "kernel ms", "x float", "MiB", "x float", "first s", "note")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head in ("net", "step", "variant", "note") else "right")
    last = None
    for row in rows:
        group = (row.model, row.precision, row.mode)
        if last not in (None, group):
            table.add_section()
        table.add_row(
            row.model if group != last else "",
            f"{row.precision} {row.mode}" if group != last else "",
            row.variant,
            _shown(row.wall_ms, ".1f"),
            _shown(row.wall_ratio, ".2f"),
            _shown(row.kernel_ms, ".1f"),
            _shown(row.kernel_ratio, ".2f"),
            _shown(row.peak_bytes and row.peak_bytes / 2**20, ".0f"),
            _shown(row.peak_ratio, ".2f"),
            _shown(row.first_step_s, ".1f"),
            "; ".join(filter(None, (row.error, row.note))),
        )
        last = group
    Console(width=width, markup=False, highlight=False).print(table)


def plot(path: Path, title: str, rows: list[Row]) -> bool:
    """Bars of the ratios to float; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = {"wall_ratio": "step time", "kernel_ratio": "kernel time", "peak_ratio": "peak memory"}
    present = {key: label for key, label in measures.items() if any(getattr(row, key) for row in rows)}
    groups = list(dict.fromkeys((row.model, row.precision, row.mode) for row in rows if row.wall_ms))
    variants = list(dict.fromkeys(row.variant for row in rows if row.variant != "float"))
    by = {((row.model, row.precision, row.mode), row.variant): row for row in rows}
    if not present or not variants:
        return True
    width = 0.8 / len(variants)
    size = (max(7.0, 1.5 + 1.1 * len(groups)), 2.6 * len(present) + 0.8)
    figure, axes = plt.subplots(len(present), 1, figsize=size, sharex=True, squeeze=False)
    for axis, (key, label) in zip(axes[:, 0], present.items(), strict=True):
        for i, variant in enumerate(variants):
            found = [getattr(by.get((group, variant)), key, None) for group in groups]
            places = [j + (i - (len(variants) - 1) / 2) * width for j in range(len(groups))]
            bars = axis.bar(places, [value or 0.0 for value in found], width, label=variant)
            axis.bar_label(bars, [f"{value:.2f}" if value else "" for value in found], fontsize=7, rotation=90, padding=2)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.margins(y=0.2)
        axis.set_ylabel(f"{label} / float")
    axes[-1, 0].set_xticks(range(len(groups)), [f"{model}\n{precision}\n{mode}" for model, precision, mode in groups], fontsize=8)
    axes[0, 0].legend(ncols=len(variants), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.suptitle(title, fontsize=8, wrap=True)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
