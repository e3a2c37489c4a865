"""Example inputs from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eagerq import integrations
from eagerq.errors import InputsError


def inputs_for(model: nn.Module, shapes: Sequence[str], batch: int) -> Any:
    """Zeros of the shapes given (``3x224x224``, without the batch), else what the model's library says, or None."""
    if shapes:
        return tuple(torch.zeros(batch, *_parsed(shape)) for shape in shapes)
    derived = integrations.example_inputs(model)
    return derived.new_zeros(batch, *derived.shape[1:]) if isinstance(derived, Tensor) else derived


def _parsed(shape: str) -> tuple[int, ...]:
    parts = shape.lower().split("x")
    if not all(part.isdigit() and int(part) for part in parts):
        raise InputsError(f"--input wants sizes joined by 'x', such as 3x224x224 (without the batch), found {shape!r}.")
    return tuple(int(part) for part in parts)
