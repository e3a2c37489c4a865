"""Code by code on every test image: the exact mode beside ONNX Runtime, and beside ordinary fake quantization."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eagerq
from eagerq.demo.layers import quantizers_of, run_recording
from eagerq.demo.training import accuracy, chunks, outputs
from eagerq.deploy.verification import TensorDifference


def measure(qat: nn.Module, path: Path, images: Tensor, labels: Tensor, of_int8: Tensor) -> tuple[dict[str, Any], str]:
    """The exact mode beside what ONNX Runtime makes of ``path``: figures, and the verification as text.

    Args:
        qat: the trained network.
        path: its ONNX file.
        images, labels: all test images.
        of_int8: ONNX Runtime's outputs on them, ``(N, 10)``.
    """
    with eagerq.exact_mode(qat):
        of_exact = outputs(qat, images)
    found = eagerq.verify_deployment(qat, path, list(chunks(images)))
    same = of_exact.argmax(1) == of_int8.argmax(1)
    figures = {
        **found.as_dict(),
        "accuracy": accuracy(of_exact, labels),
        "agreement": float(same.double().mean()),
        "predictions_equal": bool(same.all()),
        "outputs_equal": torch.equal(of_exact, of_int8),
        "fake_quant": flips(qat, images),
    }
    return figures, str(found)


def is_met(figures: dict[str, Any]) -> bool:
    """Whether ``measure`` found no difference: in no code, prediction or output, and no tensor that it could not compare."""
    return bool(figures["same"] and not figures["missing"] and figures["predictions_equal"] and figures["outputs_equal"])


def flips(qat: nn.Module, images: Tensor) -> dict[str, Any]:
    """What ordinary fake quantization gives other than the exact mode: by tensor, in how many images, and in the outputs."""
    quantizers = quantizers_of(qat)
    counts: dict[str, list[int]] = {}
    touched = predictions = 0
    largest = 0.0
    for part in chunks(images):
        fake = run_recording(qat, part, [*quantizers, ""])
        with eagerq.exact_mode(qat):
            exact = run_recording(qat, part, [*quantizers, ""])
        flipped = torch.zeros(len(part), dtype=torch.bool)
        for name in filter(None, exact):  # in the order they are computed
            count, scale = counts.setdefault(name, [0, 0, 0]), quantizers[name].scale
            apart = (torch.round(fake[name] / scale) - torch.round(exact[name] / scale)).abs()
            flipped |= apart.flatten(1).any(1)
            count[0] += apart.numel()
            count[1] += int((apart > 0).sum())
            count[2] = max(count[2], int(apart.max()))
        touched += int(flipped.sum())
        predictions += int((fake[""].argmax(1) != exact[""].argmax(1)).sum())
        largest = max(largest, float((fake[""] - exact[""]).abs().max()))
    rows = [TensorDifference(name, *count) for name, count in counts.items()]
    return {
        "compared": sum(row.compared for row in rows),
        "differing": sum(row.differing for row in rows),
        "images": touched,
        "predictions": predictions,
        "output_difference": largest,
        "tensors": [dataclasses.asdict(row) for row in rows],
    }
