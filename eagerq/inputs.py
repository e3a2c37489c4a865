"""Example inputs: the arguments of the forwards to watch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eagerq import integrations
from eagerq.errors import InputsError


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of one forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def copied(self, device: str | None) -> Inputs:
        """The same inputs with copied tensors; on ``device`` if given."""
        with _CopyTensors(device):
            args, kwargs = copy.deepcopy((self.args, self.kwargs))
        return Inputs(args, kwargs)


class _CopyTensors(TorchFunctionMode):
    def __init__(self, device: str | None) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            x = args[0].detach()
            return torch.empty_like(x, device="meta") if self.device == "meta" else x.clone()
        return func(*args, **(kwargs or {}))


def as_runs(example_inputs: Any) -> tuple[Inputs, ...]:
    """``example_inputs`` as forwards to run: a tensor, a tuple (positional), a dict (keywords) or a list of these.

    Raises:
        InputsError: for any other type, or an empty list.
    """
    if isinstance(example_inputs, Inputs):
        return (example_inputs,)
    if isinstance(example_inputs, Tensor):
        return (Inputs((example_inputs,), {}),)
    if isinstance(example_inputs, tuple):
        return (Inputs(example_inputs, {}),)
    if isinstance(example_inputs, Mapping):
        return (Inputs((), dict(example_inputs)),)
    if isinstance(example_inputs, Iterable) and not isinstance(example_inputs, (str, bytes)):
        runs = tuple(run for item in example_inputs for run in as_runs(item))
        if runs:
            return runs
    raise InputsError(
        "example_inputs must be a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of"
        f" such inputs; found {type(example_inputs).__name__}{' (empty)' if isinstance(example_inputs, Sequence) else ''}."
    )


def runs_for(model: nn.Module, example_inputs: Any) -> tuple[Inputs, ...] | None:
    """The forwards to watch: those given, else those the model's library says; None if neither.

    Raises:
        InputsError: if ``example_inputs`` are of no known form.
    """
    if example_inputs is None:
        example_inputs = integrations.example_inputs(model)
    return None if example_inputs is None else as_runs(example_inputs)
