"""Observers that agree across the ranks of ``torch.distributed``: in each forward, or when asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from eagerq.quant.fake_quantize import FakeQuantize
from eagerq.quant.observer import Observer
from eagerq.quant.ranks import Ranks, hull, mean


def enable_observer_sync(module: nn.Module, process_group: Any = None) -> None:
    """Let observers take all ranks' batches as one; use with ``model.apply(eagerq.enable_observer_sync)``.

    In training each activation's range is all-reduced before it enters the running state (see ``Observer`` for the
    formula), so the ranks quantize alike, as one process would on the union of their batches. A single process
    computes what it did. It costs a forward one all-reduce of two numbers a quantized tensor (``"percentile"``: three;
    ``"mse"``: two and then forty), which waits for the slowest rank as SyncBatchNorm's does; ``sync_observers`` costs one
    for the whole model. Every rank must run every quantizer in each training forward.

    Args:
        module: changed if it is an activation's observer; weights are equal on all ranks.
        process_group: the ranks that agree; None is all of them. Pass it through ``functools.partial``.
    """
    if isinstance(module, Observer) and not module.memoryless:
        module.ranks = Ranks(process_group)


def disable_observer_sync(module: nn.Module) -> None:
    """Let each rank's observers learn from its own batches; use with ``model.apply(eagerq.disable_observer_sync)``."""
    if isinstance(module, Observer):
        module.ranks = None


@torch.no_grad()
def sync_observers(model: nn.Module, process_group: Any = None) -> None:
    r"""Make the running ranges, scales and zero points of activations equal on all ranks, in one all-reduce.

    For use after each training forward or step in the place of ``enable_observer_sync``, where that costs too much: a
    batch is quantized by the scales known before it, so the ranks quantize alike if they agree after each. With the
    ranges :math:`l_r, h_r` of rank :math:`r` they agree on

    - ``"min_max"``, ``"moving_average"``: :math:`\min_r l_r,\; \max_r h_r`. A running minimum or moving average never falls
      where its batch's value rises, so this is the state after the union of the last batches, to the last bit, if the
      states were equal before; for ``"min_max"`` however many batches ago that was. A rank whose batch was left out
      (NaN, infinity) or that did not run holds its old range against the others'.
    - ``"percentile"``, ``"mse"``: the mean of :math:`l_r` and of :math:`h_r` over the ranks that hold a range.

    DistributedDataParallel copies rank 0's buffers to all ranks when a training forward begins, so a call after that
    comes too late. A single process is left as it is.

    Args:
        model: any model with quantizers; on all ranks the same.
        process_group: the ranks that agree; None is all of them.
    """
    ranks = Ranks(process_group)
    if not ranks.are_several():
        return
    together: dict[tuple[bool, torch.device, torch.dtype], list[FakeQuantize]] = {}
    for module in model.modules():
        if isinstance(module, FakeQuantize) and not module.memoryless:
            observer = module.activation_post_process
            averages = module.spec.observer in ("percentile", "mse")
            together.setdefault((averages, observer.min_val.device, observer.min_val.dtype), []).append(module)
    for (averages, _, _), quantizers in together.items():
        observers = [quantizer.activation_post_process for quantizer in quantizers]
        low, high = (torch.cat([o.get_buffer(name).reshape(-1) for o in observers]) for name in ("min_val", "max_val"))
        if averages:
            seen = ((low != 0) | (high != 0)).to(low.dtype)
            low, high = (ends.nan_to_num(nan=0.0) for ends in mean(low, high, seen, ranks))  # 0 / 0 where no rank holds a range
        else:
            low, high = hull(low, high, ranks)
        sizes = [o.min_val.numel() for o in observers]
        for quantizer, own_low, own_high in zip(quantizers, torch.split(low, sizes), torch.split(high, sizes), strict=True):
            observer = quantizer.activation_post_process
            observer.min_val.copy_(own_low.reshape(observer.min_val.shape))
            observer.max_val.copy_(own_high.reshape(observer.max_val.shape))
            quantizer.take_range()
