"""Example inputs: the arguments of the forwards to watch."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eagerq import integrations
from eagerq.errors import InputsError

#: Of an iterable that is no list, so many items are taken: it may be endless, and each is a forward or two.
LIMIT = 8


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

    def have_data(self) -> bool:
        """Whether no tensor among them is on the meta device."""
        leaves = torch.utils._pytree.tree_leaves((self.args, self.kwargs))
        return not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves)

    def form(self) -> Hashable:
        """Equal for inputs that differ in the values of tensors only."""
        return _form((self.args, self.kwargs))


def _form(obj: Any) -> Hashable:
    if isinstance(obj, Tensor):
        return (type(obj), obj.shape, obj.dtype, obj.requires_grad, obj.stride() if obj.layout is torch.strided else obj.layout)
    if isinstance(obj, Mapping):
        return (type(obj), tuple((key, _form(value)) for key, value in obj.items()))
    if isinstance(obj, (list, tuple)):
        return (type(obj), tuple(map(_form, obj)))
    return (type(obj), obj if isinstance(obj, (bool, int, float, str, bytes, type(None))) else id(obj))


class _CopyTensors(TorchFunctionMode):
    def __init__(self, device: str | None) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            x = args[0].detach()
            return torch.empty_like(x, device="meta") if self.device == "meta" else x.clone()
        return func(*args, **(kwargs or {}))


def as_runs(example_inputs: Any, limit: int = LIMIT) -> tuple[Inputs, ...]:
    """``example_inputs`` as forwards to run.

    A tensor, a tuple (positional arguments) or a mapping (keyword arguments) is one forward; a list or
    any other iterable holds such inputs, one forward each. An item that is itself a list, as a
    DataLoader's batches are, holds positional arguments. A list is taken whole, of another iterable
    the first ``limit`` items.

    Raises:
        InputsError: for any other type, or nothing at all.
    """
    run = _one(example_inputs)
    if run is not None:
        return (run,)
    wanted = (
        "example_inputs must be a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list or other"
        " iterable (a DataLoader) of such inputs"
    )
    if not isinstance(example_inputs, Iterable) or isinstance(example_inputs, (str, bytes)) or _is_numpy(example_inputs):
        raise InputsError(f"{wanted}; found {type(example_inputs).__name__}{_as_tensor(example_inputs)}.")
    runs = []
    for i, item in enumerate(example_inputs if isinstance(example_inputs, list) else itertools.islice(example_inputs, limit)):
        run = Inputs(tuple(item), {}) if isinstance(item, list) else _one(item)
        if run is None:
            kinds = f"{type(item).__name__} as item {i} of a {type(example_inputs).__name__}"
            raise InputsError(f"{wanted}; found {kinds}{_as_tensor(item)}.")
        runs.append(run)
    if not runs:
        raise InputsError(f"{wanted}; found {type(example_inputs).__name__} (empty).")
    return tuple(runs)


def _is_numpy(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "numpy"  # which need not be installed


def _as_tensor(value: Any) -> str:
    return "; of an array make a tensor, torch.from_numpy(array)" if _is_numpy(value) else ""


def _one(example_inputs: Any) -> Inputs | None:
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, tuple):
        return Inputs(tuple(example_inputs), {})
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    return None


def notes_on(example_inputs: Any, runs: tuple[Inputs, ...] | None) -> tuple[str, ...]:
    """What to know of the runs taken from ``example_inputs``."""
    if runs is None or len(runs) < LIMIT or _one(example_inputs) is not None or isinstance(example_inputs, list):
        return ()
    try:
        if len(example_inputs) <= LIMIT:
            return ()
    except TypeError:  # a generator, or a loader of a dataset without a length
        pass
    kind = type(example_inputs).__name__
    return (f"of example_inputs, a {kind}, the first {LIMIT} items are watched; pass a list to have all",)


def misfit(model: nn.Module, run: Inputs) -> str:
    """For an error: how the arguments and those that ``model.forward`` takes disagree, and what to pass; ``""`` if unknown."""
    name = f"{type(model).__name__}.forward"
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return ""
    kinds = {p.kind for p in parameters.values()}
    places = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = len(run.args)
    takes = len(places)
    wrap = "(x for x, _ in loader)" if (takes, given) == (1, 2) else f"(batch[:{takes}] for batch in loader)"
    if given > takes and inspect.Parameter.VAR_POSITIONAL not in kinds:
        return (
            f" The inputs are {given} positional arguments, and {name} takes {takes} ({', '.join(places)}). A batch of inputs"
            f" and labels is read as positional arguments: leave the labels out, as in {wrap}."
        )
    unknown = [key for key in run.kwargs if key not in parameters]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        return (
            f" {name} takes no argument named {unknown[0]!r}, but {', '.join(parameters)}: leave it out, as in"
            f" ({{key: batch[key] for key in {[key for key in run.kwargs if key in parameters]}}} for batch in loader)."
        )
    missing = [n for n in places[given:] if parameters[n].default is inspect.Parameter.empty and n not in run.kwargs]
    if missing:
        return (
            f" {name} also wants {', '.join(missing)}: the arguments of one forward are a tuple, ({', '.join(places)}), or a"
            " dict; each item of a list is a forward of its own."
        )
    if given > 1:
        return f" If the last of these {given} positional arguments is a label, leave it out, as in (x for x, _ in loader)."
    return ""


def runs_for(
    model: nn.Module, example_inputs: Any, recorded: tuple[Inputs, ...] | None = None
) -> tuple[Inputs, ...] | None:
    """The forwards to watch: those given, else those recorded, else those the model's library says; None if there are none.

    Raises:
        InputsError: if ``example_inputs`` are of no known form.
    """
    if example_inputs is None:
        example_inputs = integrations.example_inputs(model)
        if recorded is not None and not _is_alike(recorded, example_inputs):  # else in the dtype that the model has by now
            return recorded
    return None if example_inputs is None else as_runs(example_inputs)


def _is_alike(recorded: tuple[Inputs, ...], example: Any) -> bool:
    """Whether the one thing recorded is one tensor of the shape of ``example``."""
    if not isinstance(example, Tensor) or len(recorded) != 1 or recorded[0].kwargs or len(recorded[0].args) != 1:
        return False
    (given,) = recorded[0].args
    return isinstance(given, Tensor) and given.shape == example.shape
