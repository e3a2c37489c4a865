"""The exported integer model beside ONNX Runtime's own quantize_static and its float model, in one process, taking turns.

One thread, batch 1. ``quantize_static`` is U8S8, QDQ, per channel, calibrated on the batches the QAT model observed, after
ONNX Runtime's own pre-processing. Ratios are medians over rounds in which each session runs once.

Usage: python benchmarks/deploy_speed.py [--size 224] [--rounds 60] [MODEL ...]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table
from torch import Tensor

import eagerq
from eagerq.demo.engine import export_float
from eagerq.deploy.runtime import session
from model_zoo_tests.engine import NETS, qat_of

WARM_UP = 5


class Batches(CalibrationDataReader):  # type: ignore[misc]
    """Calibration data as ONNX Runtime takes it."""

    def __init__(self, name: str, batches: list[Tensor]) -> None:
        self.left: Iterator[dict[str, Any]] = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.left, None)


def files(name: str, size: int, folder: Path) -> dict[str, Path]:
    """The three files of one net."""
    paths = {key: folder / f"{name}.{key}.onnx" for key in ("float", "static", "eagerq")}
    model, qat, batches = qat_of(name, size, num_classes=1000)
    eagerq.export_onnx(eagerq.convert(qat), paths["eagerq"], batches[0][:1])
    export_float(model, paths["float"], batches[0][:2])
    ready = folder / "ready.onnx"
    quant_pre_process(str(paths["float"]), str(ready), skip_symbolic_shape=True)
    given = onnxruntime.InferenceSession(ready, providers=["CPUExecutionProvider"]).get_inputs()[0].name
    quantize_static(
        str(ready),
        str(paths["static"]),
        Batches(given, batches),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return paths


def times(paths: dict[str, Path], size: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round, by file."""
    engines = {key: session(path) for key, path in paths.items()}
    image = torch.randn(1, 3, size, size).numpy()
    found: dict[str, list[float]] = {key: [] for key in engines}
    for i in range(WARM_UP + rounds):
        for key, engine in engines.items():
            feeds = {engine.get_inputs()[0].name: image}
            start = time.perf_counter()
            engine.run(None, feeds)
            if i >= WARM_UP:
                found[key].append(1e3 * (time.perf_counter() - start))
    return found


def main() -> None:
    """Print a row a net."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(NETS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    table = Table("net", "float ms", "eagerq ms", "float / eagerq", "float / static", "static / eagerq", "file / float")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            paths = files(name, options.size, Path(folder))
            found = times(paths, options.size, options.rounds)
            bytes_of = {key: path.stat().st_size for key, path in paths.items()}

        def ratio(a: str, b: str, found: dict[str, list[float]] = found) -> str:
            return f"{statistics.median(x / y for x, y in zip(found[a], found[b], strict=True)):.2f}"

        table.add_row(
            name,
            *(f"{statistics.median(found[key]):.1f}" for key in ("float", "eagerq")),
            ratio("float", "eagerq"),
            ratio("float", "static"),
            ratio("static", "eagerq"),
            f"{bytes_of['eagerq'] / bytes_of['float']:.3f}",
        )
    versions = f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, timm {timm.__version__}"
    print(f"{versions}, {platform.machine()}, 1 thread, batch 1, {options.size} px, median of {options.rounds} rounds")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
