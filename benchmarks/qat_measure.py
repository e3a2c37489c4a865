"""One training step and what it costs: time on the wall, time in kernels, memory at its peak."""

from __future__ import annotations

import dataclasses
import time
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler_util import DeviceType
from torch.profiler import ProfilerActivity, profile


class Step:
    """Forward, cross entropy on float logits, backward, SGD with momentum, gradients dropped. Called, it returns the loss."""

    def __init__(
        self, module: nn.Module, x: Tensor, y: Tensor, autocast: bool, mode: str, compile_mode: str, filters: bool = False
    ) -> None:
        self.module, self.x, self.y, self.autocast = module, x, y, autocast
        self.forward: Callable[[Tensor], Any] = module
        if mode == "compiled":
            self.forward = compiled(module, compile_mode, filters)
        elif mode == "graphed":
            self.forward = graphed(module, x, autocast)
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)

    def __call__(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(self.forward(self.x).float(), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _forward(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def compiled(module: nn.Module, mode: str, filters: bool = False) -> Callable[[Tensor], Any]:
    """``module`` under torch.compile, with an entry of its own; ``filters`` drops guards by ``eagerq.guard_filter``.

    torch.compile keeps what it compiled by code object, and all instances of a class share theirs: side by side, variants would
    walk each other's guards and use up one limit of recompilations.
    """
    entry = types.FunctionType(_forward.__code__.replace(), globals())
    options: dict[str, Any] = {"mode": mode}
    if filters:  # a mode is a name of options, and goes with none
        from eagerq import guard_filter

        options = {"options": {**torch._inductor.list_mode_options(mode), "guard_filter_fn": guard_filter}}
    inner = torch.compile(entry, **options)
    return lambda x: inner(module, x)


def graphed(module: nn.Module, x: Tensor, autocast: bool) -> Callable[[Tensor], Any]:
    """``module`` whose forward and backward are CUDA graphs: one launch each, whatever Python does in them."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
        made: Callable[[Tensor], Any] = torch.cuda.make_graphed_callables(module, (x,))
    return made


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One step: milliseconds until it is done, and until the host had issued it."""

    wall: float
    host: float


def timed(step: Step, steps: int) -> Turn:
    """So many steps, one behind the other as training issues them, on a device that has nothing else to do; of one of them."""
    device = step.x.device
    synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if device.type == "cuda" else (None, None)
    start = time.perf_counter()
    if begin is not None:
        begin.record()
    for _ in range(steps):
        step()
    if end is not None:
        end.record()
    host = 1e3 * (time.perf_counter() - start)
    synchronize(device)
    wall = host if begin is None else begin.elapsed_time(end)
    return Turn(wall / steps, host / steps)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Device time of one step in milliseconds, launches of one step, and the kernels that take most: (name, ms, launches)."""

    ms: float
    launches: float
    top: list[tuple[str, float, float]]


def kernels(step: Step, steps: int, top: int = 12) -> Kernels | None:
    """Kernels and copies of ``steps`` steps on CUDA, by torch.profiler; None on other devices."""
    if step.x.device.type != "cuda":
        return None
    synchronize(step.x.device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        synchronize(step.x.device)
    rows = [
        row
        for row in found.key_averages()
        if row.device_type == DeviceType.CUDA and not getattr(row, "is_user_annotation", False)  # annotations span kernels
    ]
    rows.sort(key=lambda row: -row.self_device_time_total)
    return Kernels(
        sum(row.self_device_time_total for row in rows) / 1e3 / steps,
        sum(row.count for row in rows) / steps,
        [(row.key[:120], row.self_device_time_total / 1e3 / steps, row.count / steps) for row in rows[:top]],
    )


def held_bytes(device: torch.device) -> int:
    """Bytes that tensors hold on a CUDA device now; 0 elsewhere, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(step: Step, held_by_others: int) -> int | None:
    """Most bytes held during one step: weights, optimizer, batch, activations, gradients.

    On CUDA all that is allocated, less ``held_by_others``. On a CPU what the step allocates, by torch.profiler, plus what the
    variant's tensors hold; None where the profiler does not say.
    """
    device = step.x.device
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held_by_others
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    try:
        events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        changes = [event.nbytes() for event in events]
    except AttributeError:
        return None
    now = most = 0
    for change in changes:
        now += change
        most = max(most, now)
    return most + tensor_bytes(step)


def tensor_bytes(step: Step) -> int:
    """Bytes of the module's and the optimizer's tensors and the batch, each storage once."""
    state = (value for values in step.optimizer.state.values() for value in values.values())
    tensors = [*step.module.parameters(), *step.module.buffers(), *state, step.x, step.y]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())
