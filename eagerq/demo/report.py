"""The table in the terminal and the HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

CAPTION = (
    "int8 by ONNX Runtime; latency of one image on one thread, median; exact mode: QAT evaluated in the engine's"
    " arithmetic; codes off: those of quantized tensors that differ from the exact mode's"
)


class Plot(NamedTuple):
    """One picture of the page."""

    title: str
    text: str
    png: bytes


def table(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The figures that matter, header first."""
    accuracy, size, latency, exact = figures["accuracy"], figures["bytes"], figures["latency_ms"], figures["exactness"]
    return [
        ("", "float", "QAT", "int8", "int8 to float"),
        (
            "test accuracy",
            *(f"{100 * accuracy[key]:.2f} %" for key in ("float", "qat", "int8")),
            f"{100 * (accuracy['int8'] - accuracy['float']):+.2f} points",
        ),
        ("accuracy in exact mode", "", f"{100 * exact['accuracy']:.2f} %", "", ""),
        ("predictions equal to QAT", "", "", f"{100 * figures['agreement']:.2f} %", ""),
        ("equal to exact mode", "", "", f"{100 * exact['agreement']:.2f} %", ""),
        (f"codes off, of {exact['compared']:,}", "", f"{exact['fake_quant']['differing']:,}", f"{exact['differing']:,}", ""),
        (
            "ONNX file",
            f"{size['float'] / 1e6:.2f} MB",
            "",
            f"{size['int8'] / 1e6:.2f} MB",
            f"{figures['size_ratio']:.2f}x smaller",
        ),
        ("latency", f"{latency['float']:.3f} ms", "", f"{latency['int8']:.3f} ms", speed(figures["latency_ratio"])),
    ]


def speed(ratio: float) -> str:
    """A ratio of latencies, float to int8, in words."""
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def targets(figures: dict[str, Any]) -> list[tuple[str, bool]]:
    """What the demo promises, and whether this run kept it."""
    texts = {
        "float_accuracy": "float accuracy at least 97 %",
        "int8_accuracy": "int8 accuracy within 0.5 points of float",
        "exact": "exact mode and ONNX Runtime the same in every code, output and prediction",
    }
    return [(texts[key], met) for key, met in figures["targets"].items()]


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the table and whether the targets were met."""
    header, *rows = table(figures)
    printed = Table(caption=CAPTION, caption_justify="left")
    for i, cell in enumerate(header):
        printed.add_column(cell, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        printed.add_row(*row)
    console.print(printed)
    for text, met in targets(figures):
        console.print(Text(f"{text}: {'met' if met else 'missed'}", "green" if met else "bold red"))


def page(figures: dict[str, Any], network: str, plots: Sequence[Plot], texts: Mapping[str, str]) -> str:
    """The report as one self-contained HTML page; ``texts`` are printed results by their headings."""
    source = files("eagerq.demo").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)
    return template.render(
        figures=figures,
        network=network,
        caption=CAPTION,
        table=table(figures),
        targets=targets(figures),
        plots=[{"title": p.title, "text": p.text, "data": base64.b64encode(p.png).decode()} for p in plots],
        texts=texts,
    )
