"""Time and memory of a deployed model in PyTorch: fake-quantized, in the exact mode, and in its int8 kernels, side by side.

Usage: python benchmarks/int8_inference.py [--model resnet18] [--batch 1 8] [--size 224] [--repeat 9] [--threads 1]
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import eagerq


def deployed_model(name: str, size: int) -> tuple[nn.Module, nn.Module]:
    """A float model, and the deployed one after two batches were observed."""
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # timm begins with zeros
    x = torch.randn(2, 3, size, size)
    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x), example_inputs=x)
    with torch.no_grad():
        for _ in range(2):
            qat(torch.randn(2, 3, size, size))
    return model.eval(), eagerq.convert(qat.eval())


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that a call holds at a time of PyTorch's CPU memory, beyond what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0  # of what is allocated and freed, in order
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    """Alternate the ways to run, and print the median of each one's time beside that of the fake-quantized forward."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, deployed = deployed_model(options.model, options.size)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {platform.machine()}, {options.threads} threads")
    print(
        f"{options.model} at {options.size} px; weights: float {held_bytes(model) / 2**20:.1f} MiB, int8 "
        f"{held_bytes(deployed) / 2**20:.1f} MiB"
    )
    print(f"{'batch':>5}  {'run':22} {'ms':>8} {'of fake-quant':>14} {'peak MiB beyond weights':>24}")
    for batch in options.batch:
        x = torch.randn(batch, 3, options.size, options.size)
        report(model, deployed, x, options.repeat)


def report(model: nn.Module, deployed: nn.Module, x: Tensor, repeat: int) -> None:
    """One table's rows."""
    ways: dict[str, tuple[nn.Module, Callable[[], Any]]] = {
        "float model": (model, contextlib.nullcontext),
        "deployed, fake-quant": (deployed, contextlib.nullcontext),
        "deployed, exact float": (deployed, lambda: eagerq.exact_mode(deployed)),
        "deployed, exact int8": (deployed, lambda: eagerq.exact_mode(deployed, kernels="int8")),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks, outputs = {}, {}
    for way, (net, mode) in ways.items():
        with torch.no_grad(), mode():
            peaks[way] = peak_bytes(lambda net=net: net(x))  # the first call: the int8 mode packs its weights in it
    for _ in range(repeat):
        for way, (net, mode) in ways.items():
            with torch.no_grad(), mode():
                outputs[way] = net(x)
                start = time.perf_counter()
                net(x)
                times[way].append(time.perf_counter() - start)
    if not torch.equal(outputs["deployed, exact float"], outputs["deployed, exact int8"]):
        raise SystemExit("the int8 mode's outputs are not those of the float mode")
    for way in ways:
        ratio = statistics.median(a / b for a, b in zip(times[way], times["deployed, fake-quant"], strict=True))
        ms = 1000 * statistics.median(times[way])
        print(f"{len(x):>5}  {way:22} {ms:>8.1f} {ratio:>13.2f}x {peaks[way] / 2**20:>24.1f}")


if __name__ == "__main__":
    main()
