"""The pictures of the report and of the README."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context as style
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from eagerq.demo.layers import Range, tensor_name
from eagerq.demo.training import Epoch

_COLOURS = {"float": "#33608c", "qat": "#d97a1e", "int8": "#1f8f63"}
_NAMES = {"float": "float", "qat": "QAT", "int8": "int8"}
_MARKS = {"float": "●", "qat": "●", "int8": "◆"}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa4ae",
    "axes.labelcolor": "#4a545e",
    "xtick.color": "#4a545e",
    "ytick.color": "#4a545e",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e8ec",
    "figure.facecolor": "white",
    "legend.frameon": False,
}
_DPI = 200


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    with style(["default", _STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def curves(history: Sequence[Epoch], accuracies: Mapping[str, float], noise: Mapping[str, float]) -> bytes:
    """Loss, accuracy and noise by layer, side by side."""
    with _figure(9, 3.5) as figure:
        loss, accuracy, layers = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
        _draw_loss(loss, history)
        _draw_accuracy(accuracy, history, accuracies)
        _draw_noise(layers, noise)
        return _png(figure)


def training(history: Sequence[Epoch], accuracies: Mapping[str, float]) -> bytes:
    """Loss and accuracy, float then QAT."""
    with _figure(9, 3.4) as figure:
        loss, accuracy = figure.subplots(1, 2)
        _draw_loss(loss, history)
        _draw_accuracy(accuracy, history, accuracies)
        return _png(figure)


def noise_by_layer(noise: Mapping[str, float]) -> bytes:
    """Signal-to-quantization-noise ratio, a bar a layer."""
    with _figure(9, 0.9 + 0.24 * len(noise)) as figure:
        _draw_noise(figure.subplots(), noise)
        return _png(figure)


def codes_apart(fake: Sequence[Mapping[str, Any]], engine: Sequence[Mapping[str, Any]]) -> bytes:
    """Codes in a million that differ from the exact mode's: a bar a tensor for fake quantization, a mark for the engine."""
    with _figure(9, 1.3 + 0.24 * len(fake)) as figure:
        axes = figure.subplots()
        names = [row["name"] for row in fake]
        shares, of_engine = ([1e6 * row["differing"] / row["compared"] for row in rows] for rows in (fake, engine))
        axes.barh(range(len(fake)), shares, color=_COLOURS["qat"], height=0.68, label=f"QAT, fake quantization: {_total(fake)}")
        for row, found in enumerate(fake):
            text = f"{found['differing']:,} of {found['compared']:,}"
            if found["differing"]:
                text += f", up to {found['largest']} apart"
            label = axes.annotate(text, (shares[row], row), (8, 0), textcoords="offset points", va="center", fontsize=7.5)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        places = [names.index(row["name"]) for row in engine]
        (marks,) = axes.plot(of_engine, places, "D", color=_COLOURS["int8"], label=f"int8, ONNX Runtime: {_total(engine)}")
        marks.set(markersize=5, clip_on=False, zorder=5)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, 50 * max(1.0, *shares, *of_engine))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_yticks(range(len(fake)), [tensor_name(name) for name in names])
        axes.set_ylim(len(fake) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_title("Codes unlike those of the exact mode, per million")
        axes.legend(loc="upper right")
        return _png(figure)


def _total(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(row['differing'] for row in rows):,} of {sum(row['compared'] for row in rows):,}"


def ranges(values: Mapping[str, Range], title: str, colour: str) -> bytes:
    """A bar a layer: all values, 98 % of them, and the ends of the grid."""
    with _figure(9, 1.3 + 0.24 * len(values)) as figure:
        axes = figure.subplots()
        axes.use_sticky_edges = False
        for row, found in enumerate(values.values()):
            axes.barh(row, found.high - found.low, left=found.low, height=0.62, color=_COLOURS[colour], alpha=0.3)
            axes.barh(row, found.high_99 - found.low_1, left=found.low_1, height=0.62, color=_COLOURS[colour])
            if found.grid_low is not None and found.grid_high is not None:
                axes.plot(
                    [found.grid_low, found.grid_low, math.nan, found.grid_high, found.grid_high],
                    [row - 0.4, row + 0.4, math.nan, row - 0.4, row + 0.4],
                    color="black",
                    linewidth=1.4,
                )
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_title(title)
        axes.grid(visible=False, axis="y")
        axes.axvline(0, color="#9aa4ae", linewidth=0.8)
        return _png(figure)


def _by_stage(history: Sequence[Epoch]) -> dict[str, list[tuple[int, Epoch]]]:
    stages: dict[str, list[tuple[int, Epoch]]] = {}
    for number, epoch in enumerate(history, 1):
        stages.setdefault(epoch.stage, []).append((number, epoch))
    return stages


def _epoch_axis(axes: Any, history: Sequence[Epoch]) -> None:
    floats = sum(epoch.stage == "float" for epoch in history)
    axes.axvspan(floats + 0.5, len(history) + 0.5, color=_COLOURS["qat"], alpha=0.08, linewidth=0)
    axes.set_xlim(0.5, len(history) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("epoch")


def _draw_loss(axes: Any, history: Sequence[Epoch]) -> None:
    for stage, epochs in _by_stage(history).items():
        axes.plot(
            [n for n, _ in epochs], [e.loss for _, e in epochs], "o-", color=_COLOURS[stage], label=_NAMES[stage], markersize=4
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title("Training loss")
    _epoch_axis(axes, history)
    axes.legend(loc="upper right")


def _draw_accuracy(axes: Any, history: Sequence[Epoch], accuracies: Mapping[str, float]) -> None:
    for stage, epochs in _by_stage(history).items():
        axes.plot([n for n, _ in epochs], [100 * e.accuracy for _, e in epochs], "o-", color=_COLOURS[stage], markersize=4)
    axes.set_title("Test accuracy, %")
    _epoch_axis(axes, history)
    end = len(history)
    axes.plot([end], [100 * accuracies["int8"]], "D", color=_COLOURS["int8"], markersize=7, zorder=5, clip_on=False)
    lowest = min(100 * e.accuracy for e in history[len(history) // 3 :])
    axes.set_ylim(max(0.0, min(90.0, lowest - 2)), 100.4)
    lines = [f"{_MARKS[key]} {_NAMES[key]}  {100 * value:.2f} %" for key, value in accuracies.items()]
    for i, (line, key) in enumerate(zip(lines, accuracies, strict=True)):
        axes.text(0.97, 0.24 - 0.085 * i, line, transform=axes.transAxes, ha="right", color=_COLOURS[key], weight="bold")


def _draw_noise(axes: Any, noise: Mapping[str, float]) -> None:
    values = list(noise.values())
    axes.barh(range(len(noise)), values, color=_COLOURS["int8"], height=0.68)
    axes.set_yticks(range(len(noise)), list(noise), fontsize=7.5)
    axes.set_ylim(len(noise) - 0.4, -0.6)
    for row, value in enumerate(values):
        axes.text(value - 0.6, row, f"{value:.0f}", va="center", ha="right", color="white", fontsize=7.5)
    axes.grid(visible=False, axis="y")
    axes.set_title("Quantization SNR by layer, dB")
