"""ONNX Runtime: the float network beside the integer one."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_OPSET = 18
WARM_UP, ROUNDS = 20, 300


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the ONNX exporter, which prints its progress and warns of its own internals."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def export_float(model: nn.Module, path: Path, example: Tensor) -> None:
    """Write the float model as ONNX with a dynamic batch."""
    shapes = ({0: torch.export.Dim.AUTO},)
    with quiet(), torch.no_grad():
        torch.onnx.export(
            model.eval(),
            (example,),
            path,
            dynamo=True,
            opset_version=_OPSET,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )


def scores(engine: Any, images: Tensor) -> Tensor:
    """The network's outputs for all ``images``, ``(N, 10)``."""
    name = engine.get_inputs()[0].name
    return torch.from_numpy(engine.run(None, {name: images.numpy()})[0])


def latencies(engines: dict[str, Any], image: Tensor, on_round: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Median milliseconds of one run on ``image``; the engines take turns, so that they share whatever else the machine does."""
    feeds = {key: {engine.get_inputs()[0].name: image.numpy()} for key, engine in engines.items()}
    times: dict[str, list[float]] = {key: [] for key in engines}
    for i in range(WARM_UP + ROUNDS):
        for key, engine in engines.items():
            start = time.perf_counter()
            engine.run(None, feeds[key])
            if i >= WARM_UP:
                times[key].append(1e3 * (time.perf_counter() - start))
        on_round()
    return {key: statistics.median(values) for key, values in times.items()}
