"""What a training step costs under QAT, beside the float step: eagerq, torch.ao's eager mode, torchao's pt2e and Brevitas.

All variants of one net, precision and mode stand in one process of their own and take turns, the first of a round changing.
A turn is a few steps, issued as training issues them: nothing waits for the device in between. A ratio of step times is the
median over rounds of variant / float in the same round. A step is forward, cross entropy on float
logits, backward, SGD with momentum, gradients dropped. Kernel time is the device time of all kernels and copies of a step, by
torch.profiler; memory is the peak of one step with what the other variants hold taken off; the first step holds what
torch.compile, Triton and lazy set-up cost, from empty caches. An unmeasured float step goes first, so that cuDNN's search is in
no variant's first step. A variant that is not installed or fails is a row that says why.

Precisions: fp32 (TF32 on CUDA), bf16 (autocast), pure-bf16 (weights too). Modes: eager, graphed (eager, with
forward and backward each a CUDA graph; CUDA only), compiled (torch.compile). ``--guard-filter`` and ``--one-thread`` are for all
variants alike.

Usage: python benchmarks/qat_step.py [--models NAME ...] [--batch N] [--size PX] [--precisions fp32 bf16 pure-bf16]
           [--modes eager graphed compiled] [--variants float eagerq ...] [--rounds N] [--budget-seconds S] [--json PATH]
           [--plot PATH]

The peers come with ``pip install eagerq[bench]``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from qat_measure import Step, Turn, held_bytes, kernels, peak_bytes, synchronize, timed
from qat_output import Row, in_words, machine, plot, show, write_json
from qat_variants import VARIANTS, float_model
from torch import Tensor
from torch._dynamo.utils import counters

CUDA_NETS = ["resnet50", "mobilenetv2_100", "efficientnet_b0", "convnext_tiny"]
PRECISIONS = ("fp32", "bf16", "pure-bf16")
FEWEST_ROUNDS = 5  # even when the budget is spent
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def arguments() -> argparse.Namespace:
    """Options, with the defaults of the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help=f"timm's names; on CUDA {' '.join(CUDA_NETS)}, on a CPU resnet18")
    parser.add_argument("--batch", type=int, help="128 on CUDA, 16 on a CPU")
    parser.add_argument("--size", type=int, help="224 on CUDA, 96 on a CPU")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="bf16 fp32 on CUDA, fp32 on a CPU")
    parser.add_argument("--modes", nargs="+", choices=("eager", "graphed", "compiled"), help="all on CUDA, eager on a CPU")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--compiled-variants", nargs="+", choices=list(VARIANTS), help="in compiled mode; else as --variants")
    parser.add_argument("--rounds", type=int, help="turns of each variant; 30 on CUDA, 12 on a CPU")
    parser.add_argument("--turn", type=int, help="steps of a turn; 4 on CUDA, 1 on a CPU")
    parser.add_argument("--warm-up", type=int, default=5, help="steps after the first that are not measured")
    parser.add_argument("--profiled-steps", type=int, default=3)
    parser.add_argument("--compile-mode", default="default")
    parser.add_argument("--guard-filter", action="store_true", help="compiled code drops guards by eagerq.guard_filter")
    parser.add_argument("--one-thread", action="store_true", help="backward runs in the thread that calls it")
    parser.add_argument("--memory-format", choices=list(FORMATS), help="channels_last on CUDA, contiguous on a CPU")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU form")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--budget-seconds", type=float, help="after these nothing new is begun")
    parser.add_argument("--keep-caches", action="store_true", help="use what was compiled by earlier runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = options.device.type == "cuda"
    defaults = {
        "models": CUDA_NETS if cuda else ["resnet18"],
        "batch": 128 if cuda else 16,
        "size": 224 if cuda else 96,
        "precisions": ["bf16", "fp32"] if cuda else ["fp32"],
        "modes": ["eager", "graphed", "compiled"] if cuda else ["eager"],
        "compiled_variants": options.variants,
        "rounds": 30 if cuda else 12,
        "turn": 4 if cuda else 1,
        "memory_format": "channels_last" if cuda else "contiguous",
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def in_one_line(error: BaseException) -> str:
    """What went wrong, for a row."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def variants_of(options: argparse.Namespace, mode: str) -> list[str]:
    """What is compared in a mode."""
    names: list[str] = options.compiled_variants if mode == "compiled" else options.variants
    return names


class Group:
    """One net in one precision and mode: each variant alone, then all in turns."""

    def __init__(self, options: argparse.Namespace, model: str, precision: str, mode: str, late: Callable[[], bool]) -> None:
        self.options, self.model, self.precision, self.mode, self.late = options, model, precision, mode, late
        dtype = torch.bfloat16 if precision == "pure-bf16" else torch.float32
        torch.manual_seed(0)
        batch = torch.randn(options.batch, 3, options.size, options.size, device=options.device, dtype=dtype)
        self.x: Tensor = batch.contiguous(memory_format=FORMATS[options.memory_format])
        self.y = torch.randint(0, 1000, (options.batch,), device=options.device)
        self.batch_bytes = sum(t.numel() * t.element_size() for t in (self.x, self.y))
        self.steps: dict[str, Step] = {}
        self.rows = {name: Row(model, precision, mode, name, error="not begun") for name in variants_of(options, mode)}

    def step_of(self, variant: str, mode: str) -> tuple[Step, str]:
        """A variant ready to take its first step, and its note."""
        built = VARIANTS[variant](float_model(self.model, self.x, FORMATS[self.options.memory_format]), self.x)
        step = Step(
            built.module, self.x, self.y, self.precision == "bf16", mode, self.options.compile_mode, self.options.guard_filter
        )
        return step, built.note

    def run(self) -> None:
        """Measure."""
        with contextlib.suppress(Exception):  # then each variant says it in its row
            self.step_of("float", "eager")[0]()
        self.forget()
        for row in self.rows.values():
            if self.late():
                row.error = "not begun: the budget is spent"
                continue
            try:
                row.error = None
                self.alone(row)
            except Exception as error:  # whatever a peer raises is its row's
                row.error = in_one_line(error)
                self.steps.pop(row.variant, None)
            self.forget()
            state = row.error or f"first step {row.first_step_s:.1f} s"
            print(f"{self.model} {self.precision} {self.mode} {row.variant}: {state}", file=sys.stderr, flush=True)
        turns = self.in_turns()
        for name, step in self.steps.items():
            self.profile(self.rows[name], step)
        walls = {name: [turn.wall for turn in found] for name, found in turns.items()}
        for name in turns if "float" in turns else ():
            self.rows[name].compare(self.rows["float"], walls[name], walls["float"])

    def forget(self) -> None:
        """Free what nothing holds."""
        gc.collect()
        if self.x.device.type == "cuda":
            torch.cuda.empty_cache()

    def alone(self, row: Row) -> None:
        """Build a variant, take its first step, warm it, and read its memory."""
        device = self.x.device
        held = held_bytes(device) - self.batch_bytes
        start = time.perf_counter()
        step, row.note = self.step_of(row.variant, self.mode)
        synchronize(device)
        self.forget()
        row.build_s = time.perf_counter() - start
        counters.clear()
        start = time.perf_counter()
        loss = step()
        synchronize(device)
        row.first_step_s = time.perf_counter() - start
        row.first_loss = float(loss)
        if self.mode == "compiled":
            graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
            row.add_note(f"{graphs} graphs, {breaks} breaks")
        for _ in range(self.options.warm_up):
            loss = step()
        row.last_loss = float(loss)
        if not math.isfinite(row.last_loss):
            row.add_note(f"the loss is {row.last_loss}")
        if device.type == "cuda" and self.mode != "graphed":  # a graph keeps its memory to itself, where nobody counts it
            row.peak_bytes = peak_bytes(step, held)
        self.steps[row.variant] = step

    def profile(self, row: Row, step: Step) -> None:
        """Read a variant's kernels, and on a CPU its memory, behind all that is timed: torch.profiler may leave costs behind."""
        try:
            found = kernels(step, self.options.profiled_steps)
            if row.peak_bytes is None and self.mode != "graphed":
                row.peak_bytes = peak_bytes(step, 0)
        except Exception as error:  # a profiler that does not work here leaves the times on the wall
            row.add_note(f"not profiled: {in_one_line(error)}")
            return
        if found is not None:
            row.kernel_ms, row.launches, row.top_kernels = found.ms, found.launches, found.top

    def in_turns(self) -> dict[str, list[Turn]]:
        """Rounds in which each variant takes one turn."""
        turns: dict[str, list[Turn]] = {name: [] for name in self.steps}
        for i in range(-1, self.options.rounds):  # the round before the first is not measured
            if i >= FEWEST_ROUNDS and self.late():
                break
            names = list(self.steps)
            first = i % len(names) if names else 0
            for name in names[first:] + names[:first]:
                try:
                    turn = timed(self.steps[name], self.options.turn)
                except Exception as error:
                    self.rows[name].error = in_one_line(error)
                    del self.steps[name]
                    continue
                if i >= 0:
                    turns[name].append(turn)
        for name, found in turns.items():
            row = self.rows[name]
            if found:
                row.rounds = len(found)
                row.wall_ms = statistics.median(turn.wall for turn in found)
                row.host_ms = statistics.median(turn.host for turn in found)
        return turns


def ready(options: argparse.Namespace) -> None:
    """Set PyTorch up."""
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its word of every start and stop
    if options.device.type == "cpu":
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    torch.autograd.set_multithreading_enabled(not options.one_thread)
    with contextlib.suppress(Exception):  # then its rows say why
        importlib.import_module("eagerq")


def measured(options: argparse.Namespace, names: tuple[str, str, str], seconds: float | None) -> list[Row]:
    """The rows of one net in one precision and mode."""
    caches = tempfile.TemporaryDirectory(prefix="qat_step", ignore_cleanup_errors=True)
    if not options.keep_caches:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{caches.name}/inductor", "TRITON_CACHE_DIR": f"{caches.name}/triton"}
    ready(options)
    begun = time.perf_counter()
    group = Group(options, *names, lambda: seconds is not None and time.perf_counter() - begun > seconds)
    group.run()
    caches.cleanup()
    return [*group.rows.values()]


def main() -> None:
    """Print a table, write JSON and a plot."""
    options = arguments()
    begun = time.perf_counter()
    ready(options)
    about, given = machine(options.device), {key: value for key, value in vars(options).items() if key not in ("json", "plot")}
    title = in_words(about, given)
    print(title, flush=True)
    rows: list[Row] = []

    def left() -> float | None:
        return None if options.budget_seconds is None else options.budget_seconds - (time.perf_counter() - begun)

    groups = [(m, p, k) for m in options.models for p in options.precisions for k in options.modes]
    for i, names in enumerate(groups):
        seconds = left()
        if seconds is not None and seconds <= 0:
            print(f"budget of {options.budget_seconds:.0f} s spent; not run: {', '.join(' '.join(g) for g in groups[i:])}")
            break
        # a process of its own: what torch.profiler leaves behind is in no other's times
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                rows += pool.submit(measured, options, names, seconds).result()
            except Exception as error:  # the process died
                rows += [Row(*names, variant, error=in_one_line(error)) for variant in variants_of(options, names[2])]
        if options.json:
            write_json(options.json, about, given, rows)
        print(f"{' '.join(names)}: done after {time.perf_counter() - begun:.0f} s", flush=True)
    show(rows)
    if options.plot and not plot(options.plot, title, rows):
        print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
