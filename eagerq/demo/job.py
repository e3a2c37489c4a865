"""The demo from beginning to end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import eagerq
from eagerq.demo import engine, exactness, layers, plots, report
from eagerq.demo.data import Digits, load
from eagerq.demo.training import accuracy, fit, network, outputs, steps_per_epoch
from eagerq.deploy.runtime import session
from eagerq.errors import ExportError, SpecError

_NETWORK = "timm resnet18, one block a stage and 48 to 384 channels"
_RATE, _QAT_RATE = 0.05, 0.005
_LAYER_IMAGES = 256
_FLOAT_TARGET, _INT8_DROP = 0.97, 0.005


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The same sums on any number of cores; two threads wait for each other on a busy machine, and gain little here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(
    out: str | os.PathLike[str], seed: int, *, epochs: int, qat_epochs: int, images: int | None, console: Console | None
) -> dict[str, Any]:
    """``eagerq.demo.run_demo``, once its packages are there."""
    for name, value, least in (("seed", seed, 0), ("epochs", epochs, 1), ("qat_epochs", qat_epochs, 1), ("images", images, 100)):
        if value is not None and value < least:
            raise SpecError(f"the demo wants {name} of at least {least}, found {value}.")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staged = tempfile.TemporaryDirectory(prefix=".demo-", dir=folder)
    except OSError as error:
        raise ExportError(f"cannot write into {folder}: {error.strerror or error}; choose another --out.") from error
    console = console or Console()
    with staged as name, torch.random.fork_rng(devices=[]), _one_thread():
        figures = _run(Path(name), seed, epochs, qat_epochs, images, console)
        for file in ("model.int8.onnx", "curves.png", "report.html", "figures.json"):
            os.replace(Path(name, file), folder / file)
    report.show(figures, console)
    console.print(f"{figures['seconds']['total']:.0f} s; files in {folder}", markup=False, highlight=False)
    return figures


def _run(folder: Path, seed: int, epochs: int, qat_epochs: int, images: int | None, console: Console) -> dict[str, Any]:
    start = time.perf_counter()
    torch.manual_seed(seed)
    digits = load(seed, images)
    model = network()
    with _progress(console) as bars:
        bar = bars.add_task("training in float", total=epochs * steps_per_epoch(digits))
        history = fit(model, digits, stage="float", epochs=epochs, rate=_RATE, seed=seed, on_step=lambda: bars.advance(bar))
    trained = time.perf_counter()
    model.train()

    example = digits.test_images[:2]
    plan = eagerq.plan_fusion(model, example_inputs=example)
    console.print(str(plan), markup=False, highlight=False, soft_wrap=True)
    fused = eagerq.fuse_modules(model, example_inputs=example)
    qat = eagerq.convert_qat(fused)

    def hold(epoch: int) -> None:
        """In the last epoch statistics and ranges stay as they are; in a first one they must be learned."""
        if epoch and epoch == qat_epochs - 1:
            qat.apply(eagerq.freeze_bn_stats)
            qat.apply(eagerq.disable_observer)

    with _progress(console) as bars:
        bar = bars.add_task("fine-tuning with QAT", total=qat_epochs * steps_per_epoch(digits))
        history += fit(
            qat,
            digits,
            stage="qat",
            epochs=qat_epochs,
            rate=_QAT_RATE,
            seed=seed + 1,
            on_step=lambda: bars.advance(bar),
            before_epoch=hold,
        )
    tuned = time.perf_counter()

    deployed = eagerq.convert(qat)
    measured, verification = _deploy(folder, model, qat, deployed, digits, console)
    summary = eagerq.report(qat)
    figures: dict[str, Any] = {
        "seed": seed,
        "versions": {
            "eagerq": eagerq.__version__,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
        "images": {"train": len(digits.train_labels), "test": len(digits.test_labels)},
        **measured,
        "chains": {"fused": len(plan.matches), "skipped": len(plan.skips)},
        "modules": {"quantized": sum(row[2] == "QAT" for row in summary.rows), "float": len(summary.left_float)},
        "history": [dataclasses.asdict(epoch) for epoch in history],
        "noise_db": layers.noise(qat, digits.test_images[:_LAYER_IMAGES]),
    }
    weights, activations = layers.weight_ranges(qat), layers.activation_ranges(qat, digits.test_images[:_LAYER_IMAGES])
    figures["weight_ranges"] = {name: dataclasses.asdict(found) for name, found in weights.items()}
    figures["activation_ranges"] = {name: dataclasses.asdict(found) for name, found in activations.items()}
    pictures = _pictures(figures, history, weights, activations)
    (folder / "curves.png").write_bytes(plots.curves(history, figures["accuracy"], figures["noise_db"]))
    end = time.perf_counter()
    figures["seconds"] = {
        "float": trained - start,
        "qat": tuned - trained,
        "deploy_and_report": end - tuned,
        "total": end - start,
    }
    texts = {"Exact mode and ONNX Runtime": verification, "Fusion plan": str(plan), "Quantized modules": str(summary)}
    (folder / "report.html").write_text(report.page(figures, _NETWORK, pictures, texts), encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def _deploy(
    folder: Path, model: nn.Module, qat: nn.Module, deployed: nn.Module, digits: Digits, console: Console
) -> tuple[dict[str, Any], str]:
    """Write both ONNX files, run them, and compare: figures, and the verification as text."""
    labels, example = digits.test_labels, digits.test_images[:2]
    paths = {"float": folder / "model.float.onnx", "int8": folder / "model.int8.onnx"}
    with _progress(console) as bars:
        bar = bars.add_task("exporting to ONNX", total=2)
        engine.export_float(model, paths["float"], example)
        bars.advance(bar)
        with engine.quiet():
            eagerq.export_onnx(deployed, paths["int8"], example)
        bars.advance(bar)
        engines = {key: session(path) for key, path in paths.items()}
        bar = bars.add_task("timing in ONNX Runtime", total=engine.WARM_UP + engine.ROUNDS)
        latency = engine.latencies(engines, digits.test_images[:1], lambda: bars.advance(bar))
        of_int8 = engine.scores(engines["int8"], digits.test_images)
        bar = bars.add_task("comparing every code", total=1)
        exact, verification = exactness.measure(qat, paths["int8"], digits.test_images, labels, of_int8)
        bars.advance(bar)
    of_qat = outputs(qat, digits.test_images)
    accuracies = {
        "float": accuracy(outputs(model, digits.test_images), labels),
        "qat": accuracy(of_qat, labels),
        "int8": accuracy(of_int8, labels),
    }
    size = {key: path.stat().st_size for key, path in paths.items()}
    figures = {
        "accuracy": accuracies,
        "agreement": float((of_qat.argmax(1) == of_int8.argmax(1)).double().mean()),
        "targets": {
            "float_accuracy": accuracies["float"] >= _FLOAT_TARGET,
            "int8_accuracy": accuracies["int8"] >= accuracies["float"] - _INT8_DROP,
            "exact": exactness.is_met(exact),
        },
        "exactness": exact,
        "bytes": size,
        "size_ratio": size["float"] / size["int8"],
        "latency_ms": latency,
        "latency_ratio": latency["float"] / latency["int8"],
    }
    return figures, verification


def _pictures(
    figures: dict[str, Any], history: list[Any], weights: dict[str, layers.Range], activations: dict[str, layers.Range]
) -> list[report.Plot]:
    fake = figures["exactness"]["fake_quant"]
    return [
        report.Plot(
            "Training curves",
            "Float training, then quantization-aware fine-tuning (shaded); in its last epoch batch-norm statistics and"
            " ranges are held.",
            plots.training(history, figures["accuracy"]),
        ),
        report.Plot(
            "Signal to quantization noise by layer",
            "Power of each layer's output over the power of what quantization adds to it, on test images: the QAT network against"
            " itself with its fake quantizers off. The noise of all layers before is in it; 6 dB more is half the error.",
            plots.noise_by_layer(figures["noise_db"]),
        ),
        report.Plot(
            "Codes that differ by tensor",
            "Codes on all test images against those of the exact mode. Fake quantization sums in float: where a sum lies near"
            " the edge between two codes it may take the other one, and every layer behind sees that. Here"
            f" {fake['differing']:,} of {fake['compared']:,} codes differ, in {fake['images']} of {figures['images']['test']}"
            f" images, and outputs by up to {fake['output_difference']:.2g}; ONNX Runtime's differ in"
            f" {figures['exactness']['differing']:,}.",
            plots.codes_apart(fake["tensors"], figures["exactness"]["tensors"]),
        ),
        report.Plot(
            "Weight ranges by layer",
            "Weights with the batch norm folded in: all of them (pale) and 98 % of them (dark).",
            plots.ranges(weights, "Folded weights", "float"),
        ),
        report.Plot(
            "Activation ranges by tensor",
            "Values of each quantized tensor on test images: all of them (pale), 98 % of them (dark), and the ends of the"
            " 8-bit grid they are quantized on (black).",
            plots.ranges(activations, "Activations", "qat"),
        ),
    ]


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)
