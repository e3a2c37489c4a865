"""Watch a model's eager forwards on a copy, in train and in eval mode, leaving no trace on the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from eagerq.errors import InputsError, ModelError
from eagerq.inputs import Inputs, misfit
from eagerq.recorder import record_forward
from eagerq.surgery import full_copy, meta_copy, state_tensors
from eagerq.trace import Trace


class Mode(NamedTuple):
    """How a forward is watched: in train or eval mode, with gradients or, as who only evaluates runs it, without."""

    training: bool
    gradients: bool = True

    def __str__(self) -> str:
        return f"{'train' if self.training else 'eval'} mode{'' if self.gradients else ' without gradients'}"


@dataclasses.dataclass(frozen=True)
class Failure:
    """What a forward raised, on which of how many inputs."""

    error: Exception
    index: int
    of: int

    def __str__(self) -> str:
        where = f" (on input {self.index} of {self.of}, counted from 0)" if self.of > 1 else ""
        return f"{type(self.error).__name__}: {self.error}{where}"


@dataclasses.dataclass(frozen=True)
class Watched:
    """Traces of ``runs``, those of the inputs that differ in what is seen, in each mode that ran; and how they were taken.

    ``positions`` are those of the runs among the inputs.
    """

    traces: tuple[Trace, ...]
    on_meta: bool
    runs: tuple[Inputs, ...]
    positions: tuple[int, ...]
    notes: tuple[str, ...] = ()


def watch(model: nn.Module, runs: Sequence[Inputs], is_leaf: Callable[[nn.Module], bool], modes: Sequence[Mode]) -> Watched:
    """Watch each of ``runs`` in each of ``modes`` on a copy, leaving no trace on ``model``.

    The copy is on the meta device if the model runs there, where inputs of one form count as one; else it
    holds the data. At least one mode must run; a mode that does not is noted.

    Raises:
        InputsError: if the model rejects the inputs in every mode, or some of them in one.
        ModelError: if the copy's forward reads tensors of ``model``.
    """
    on_meta = True
    positions: dict[Any, int] = {}
    for i, run in enumerate(runs):
        positions.setdefault(run.form(), i)
    watched = tuple(runs[i] for i in positions.values())
    traces, failures = watch_copy(meta_copy(model), watched, is_leaf, modes, on_meta=True, original=model)
    if failures or any(trace.unlike_data for trace in traces):  # what fails on meta may still run on data
        on_meta = False
        watched, positions = tuple(runs), dict(enumerate(range(len(runs))))
        traces, failures = watch_copy(full_copy(model), watched, is_leaf, modes, on_meta=False, original=model)
    partly = next((failure for failure in failures.values() if failure.index > 0), None)
    if not traces or partly is not None:
        failure = partly or failures.get(Mode(model.training)) or next(iter(failures.values()))
        if not watched[failure.index].have_data():
            raise InputsError(
                f"{type(model).__name__} was to run once on example inputs without data and raised {failure}. Pass example_inputs"
                " with data: a fused model remembers those it was fused with as tensors on the meta device."
            ) from failure.error
        raise InputsError(
            f"{type(model).__name__} was to run once on example_inputs and raised {failure}."
            " Pass example_inputs that model(...) accepts: a tensor, a tuple of positional or a dict of keyword arguments, or"
            f" several such in a list.{misfit(model, watched[failure.index])}"
        ) from failure.error
    notes = tuple(
        f"not watched in {mode}, where the forward raises {failure}"
        for mode, failure in failures.items()
        if mode.gradients or Mode(mode.training) not in failures
    )
    return Watched(traces, on_meta, watched, tuple(positions.values()), notes)


def watch_copy(
    copied: nn.Module,
    runs: Sequence[Inputs],
    is_leaf: Callable[[nn.Module], bool],
    modes: Sequence[Mode],
    *,
    on_meta: bool,
    original: nn.Module | None = None,
) -> tuple[tuple[Trace, ...], dict[Mode, Failure]]:
    """Watch ``runs`` on a copy that may be used up: the traces of the modes that ran, and the failures of the others.

    Raises:
        ModelError: if the forward reads tensors of ``original`` that the copy does not share.
    """
    own = {id(tensor) for tensor in state_tensors(copied)}
    named = () if original is None else (*original.named_parameters(), *original.named_buffers())
    foreign = {id(tensor): name for name, tensor in named if id(tensor) not in own}
    flags = [(module, module.training) for module in copied.modules()]
    for module, _ in flags:  # no backward is run, and full hooks would wrap what modules give in views
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    for module, _ in flags:
        if on_meta and getattr(module, "momentum", 0.0) is None:
            vars(module)["momentum"] = 0.0  # an average over all batches reads their count, which has no value here
    parameters = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)  # gradient mode without a graph, which would keep every tensor alive
    traces: list[Trace] = []
    failures: dict[Mode, Failure] = {}
    for mode in modes:
        seen: list[Trace] = []
        try:
            if mode.training != copied.training:
                copied.train(mode.training)
            for run in runs:
                seen.append(_watched(copied, run, "meta" if on_meta else None, is_leaf, parameters, mode, foreign))
            traces += seen
        except ModelError:
            raise
        except Exception as error:  # whatever the model's own code raises
            failures[mode] = Failure(error, len(seen), len(runs))
        for module, training in flags:
            module.training = training
    for parameter in parameters:
        parameter.requires_grad_(True)
    return tuple(traces), failures


@contextlib.contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters record gradients meanwhile."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _watched(
    model: nn.Module,
    run: Inputs,
    device: str | None,
    is_leaf: Callable[[nn.Module], bool],
    parameters: Sequence[nn.Parameter],
    mode: Mode,
    foreign: Mapping[int, str],
) -> Trace:
    """One trace, in training with parameters that record gradients, so that models take their activation checkpoints.

    The graph keeps tensors alive, so where anything is kept a second forward without it says what.
    """
    recorded: Trace | None = None
    given = run.copied(device)
    if not mode.gradients:
        with _learning(parameters):
            return record_forward(model, given.args, given.kwargs, is_leaf, foreign, gradients=False)
    if mode.training and parameters:
        try:
            with _learning(parameters):
                recorded = record_forward(model, given.args, given.kwargs, is_leaf, foreign)
        except Exception:  # what fails with gradients only fails in the caller's training as well
            recorded = None
        if recorded is not None and not recorded.kept:
            return recorded
        given = run.copied(device)
    trace = record_forward(model, given.args, given.kwargs, is_leaf, foreign)
    if recorded is not None:
        trace.contexts = recorded.contexts
    return trace
