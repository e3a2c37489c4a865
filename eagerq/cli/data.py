"""Batches for ``eagerq verify``: read from files, or random."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.cli.inputs import inputs_for
from eagerq.errors import InputsError
from eagerq.extras import require
from eagerq.inputs import Inputs, as_runs
from eagerq.record import record_of
from eagerq.trace import tensors_in

FORMS = ".npy, .npz or .pt"


def read_batches(path: Path, model: nn.Module, batch: int | None) -> list[Inputs]:
    """The batches in a file, cut along axis 0 into batches of at most ``batch`` examples if that is given.

    - ``.npy``: one batch.
    - ``.npz``: one batch, if its names are arguments of ``model.forward``; else each array is a batch.
    - ``.pt``: what ``torch.save`` wrote of a tensor, a tuple (positional arguments), a dict (keyword arguments) or a
      list of these. It is read with ``weights_only=True``, so that no code of the file runs.

    Floats of NumPy's files become the model's dtype.

    Raises:
        InputsError: if the file is absent, damaged, empty, of another kind, or holds objects that are no numbers.
        MissingExtraError: without NumPy.
    """
    if path.suffix not in (".npy", ".npz", ".pt"):
        raise InputsError(f"--data wants a {FORMS} file, found {str(path)!r}.")
    if not path.is_file():
        raise InputsError(f"wanted a file of inputs at {path}, found none; check the path.")
    try:
        if path.suffix == ".pt":
            held = torch.load(path, map_location="cpu", weights_only=True)
        else:
            held = _arrays(path, model)
    except Exception as error:  # of many kinds
        raise InputsError(
            f"{path} is damaged or holds more than numbers: reading it raises {type(error).__name__}."
            " Save tensors with torch.save, or arrays with numpy.save or numpy.savez."
        ) from error
    return [part for run in as_runs(held) for part in _cut(run, batch)]


def random_batches(model: nn.Module, number: int, batch: int, seed: int, shapes: Sequence[str]) -> list[Inputs]:
    """Normal numbers, as ``shapes`` say (``3x224x224``, without the batch), else as the inputs the model was converted with.

    Raises:
        InputsError: if no shape is known, or the model takes whole numbers, whose range nobody knows.
    """
    record = record_of(model)
    example = inputs_for(model, shapes, batch) if shapes or record is None or record.runs is None else list(record.runs)
    if example is None:
        raise InputsError("--random wants the shape of an example, and this model does not tell it; pass --input, or --data.")
    run = as_runs(example)[0]
    generator = torch.Generator().manual_seed(seed)

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor) and next(tensors_in(value, deep=True), None) is None:
            return value
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise InputsError(f"--random draws tensors of floats, and this model was converted with {what}; pass --data.")
        return torch.randn((batch, *value.shape[1:]) if value.dim() else (), generator=generator).to(value.dtype)

    return [
        Inputs(tuple(drawn(value) for value in run.args), {key: drawn(value) for key, value in run.kwargs.items()})
        for _ in range(number)
    ]


def _arrays(path: Path, model: nn.Module) -> Any:
    numpy = require("numpy", "onnx")
    dtype = next((p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()), torch.float32)

    def tensor(array: Any) -> Tensor:
        found = torch.from_numpy(array)
        return found.to(dtype) if found.is_floating_point() else found

    held = numpy.load(path, allow_pickle=False)
    if path.suffix == ".npy":
        return tensor(held)
    with held:
        arrays = {name: tensor(held[name]) for name in held.files}
    names = [name for name in inspect.signature(model.forward).parameters if name in arrays]
    return {name: arrays[name] for name in names} if arrays.keys() == set(names) and names else list(arrays.values())


def _cut(run: Inputs, batch: int | None) -> Iterator[Inputs]:
    sizes = {value.shape[0] for value in (*run.args, *run.kwargs.values()) if isinstance(value, Tensor) and value.dim()}
    if batch is None or not sizes:
        yield run
        return
    if len(sizes) > 1:
        raise InputsError(f"--batch cuts arguments of one length, found {', '.join(map(str, sorted(sizes)))}; leave it out.")
    for start in range(0, sizes.pop(), batch):
        rows = slice(start, start + batch)
        yield Inputs(tuple(_rows(value, rows) for value in run.args), {k: _rows(value, rows) for k, value in run.kwargs.items()})


def _rows(value: Any, rows: slice) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.dim() else value
