"""Floor 8: the main job on real data, from a float network to an integer one in ONNX Runtime."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from eagerq.extras import require

if TYPE_CHECKING:
    from rich.console import Console

_NEEDS = ("rich", "sklearn", "timm", "onnx", "onnxscript", "onnxruntime", "matplotlib", "jinja2")


def run_demo(
    out: str | os.PathLike[str],
    seed: int = 0,
    *,
    epochs: int = 8,
    qat_epochs: int = 4,
    images: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a small timm CNN on scikit-learn's digits, fuse, fine-tune with QAT, deploy, and measure the result.

    Args:
        out: folder for ``model.int8.onnx``, ``figures.json``, ``report.html`` and ``curves.png``; made if absent.
        seed: fixes the split, the initial weights and the order of the images.
        epochs: of float training.
        qat_epochs: of fine-tuning; in the last one statistics and ranges are held.
        images: use only so many of the 1,797 images.
        console: where to print; None is standard output.

    Returns:
        What ``figures.json`` holds.

    Raises:
        SpecError: if a number makes no sense.
        ExportError: if ``out`` cannot be written.
        MissingExtraError: if a package of the ``demo`` extra is absent.
    """
    for module in _NEEDS:
        require(module, "demo")
    from eagerq.demo.job import run

    return run(out, seed, epochs=epochs, qat_epochs=qat_epochs, images=images, console=console)
