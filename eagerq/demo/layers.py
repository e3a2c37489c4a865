"""What quantization does to each layer: noise, and the ranges of weights and activations."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

from torch import Tensor, nn

import eagerq
from eagerq.demo.training import outputs
from eagerq.nn.qat.base import QATOp
from eagerq.quant.codes import decode
from eagerq.verify import compare_modules

_SAMPLE = 1_000_000
_MOST = 120.0


@dataclasses.dataclass(frozen=True)
class Range:
    """Lowest and highest value, the 1st and 99th percentile between them, and the ends of the 8-bit grid if it has one."""

    low: float
    high: float
    low_1: float
    high_99: float
    grid_low: float | None = None
    grid_high: float | None = None


def _range_of(values: Tensor, grid: tuple[float, float] | None = None) -> Range:
    flat = values.detach().float().flatten()
    ordered = flat[:: max(1, flat.numel() // _SAMPLE)].sort().values
    at = [ordered[round(share * (ordered.numel() - 1))].item() for share in (0.01, 0.99)]
    return Range(flat.min().item(), flat.max().item(), at[0], at[1], *(grid or (None, None)))


def run_recording(model: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What each named module returns for ``images``, as real values in the exact mode too."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        seen[name] = decode(output).detach().clone()  # what reads it may change it in place

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(functools.partial(keep, name)) for name in names]
    try:
        outputs(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def noise(qat: nn.Module, images: Tensor) -> dict[str, float]:
    """Signal-to-quantization-noise ratio of each quantized layer's output in dB, at most 120.

    The signal is that of the same network with its fake quantizers switched off; the noise of all
    layers before is in the ratio.
    """
    unquantized = copy.deepcopy(qat).apply(eagerq.disable_fake_quant)
    layers = {name for name, module in qat.named_modules() if isinstance(module, QATOp)}
    rows = compare_modules(unquantized, qat, images).rows
    return {row.name: max(-_MOST, min(row.sqnr, _MOST)) for row in rows if row.name in layers}


def weight_ranges(qat: nn.Module) -> dict[str, Range]:
    """Of each quantized layer's weight, with the batch norm folded in."""
    return {name: _range_of(module.folded()[0]) for name, module in qat.named_modules() if isinstance(module, QATOp)}


def quantizers_of(qat: nn.Module) -> dict[str, eagerq.FakeQuantize]:
    """The quantizers of activations by full name, in the order they were registered."""
    modules = qat.named_modules()
    return {name: module for name, module in modules if isinstance(module, eagerq.FakeQuantize) and not module.memoryless}


def activation_ranges(qat: nn.Module, images: Tensor) -> dict[str, Range]:
    """Of each quantized tensor before it is quantized, on ``images``, beside the grid it is quantized on."""
    quantizers = quantizers_of(qat)
    unquantized = copy.deepcopy(qat).apply(eagerq.disable_fake_quant)
    seen = run_recording(unquantized, images, list(quantizers))
    ranges = {}
    for name, values in seen.items():
        spec, scale, zero = quantizers[name].spec, quantizers[name].scale.item(), quantizers[name].zero_point.item()
        ranges[tensor_name(name)] = _range_of(values, ((spec.quant_min - zero) * scale, (spec.quant_max - zero) * scale))
    return ranges


def tensor_name(quantizer: str) -> str:
    """A quantized tensor's name in the pictures."""
    if quantizer.startswith("input_fake_quant"):
        return "input"
    if quantizer.endswith(".input_fake_quant"):
        return f"input of {quantizer.removesuffix('.input_fake_quant')}"
    return quantizer.removesuffix(".activation_post_process")
