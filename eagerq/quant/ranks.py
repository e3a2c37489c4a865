"""Several processes that train one model: what the ranges of their batches are together."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes whose batches count as one.

    Args:
        group: a ``torch.distributed.ProcessGroup``; None is all processes.
    """

    group: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # PyTorch cannot copy a process group, and a copied model belongs to the same one

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        return Ranks, ()  # nor write it to a file: a loaded model's ranks are all processes

    def are_several(self) -> bool:
        """Whether ``torch.distributed`` is initialised and this process is one of two or more in the group."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def least(self, values: Tensor) -> Tensor:
        """Elementwise least of the ranks' values, in place; the same bits everywhere."""
        dist.all_reduce(values, op=dist.ReduceOp.MIN, group=self.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        """Elementwise sum of the ranks' values, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values


def hull(low: Tensor, high: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    r"""The range that holds every rank's: :math:`\min_r low_r` and :math:`\max_r high_r`, in one all-reduce.

    A rank without values gives ``(inf, -inf)``. NaN on one rank makes the range infinite on all, since
    an all-reduce's minimum may pass NaN over.

    Args:
        low, high: of this rank, each ``(n,)``.
    """
    values = ranks.least(torch.cat([low, -high]).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf))
    return values[: low.numel()], -values[low.numel() :]


def mean(low: Tensor, high: Tensor, weight: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    r""":math:`\sum_r w_r\, low_r / \sum_r w_r`, and the same of ``high``, in one all-reduce; NaN where all weights are zero.

    Args:
        low, high: of this rank, each ``(n,)``.
        weight: of this rank, ``(n,)``; where it is zero, ``low`` and ``high`` may be anything.
    """
    parts = [torch.where(weight > 0, value * weight, 0.0) for value in (low, high)]
    low, high, weight = ranks.total(torch.stack([*parts, weight]))
    return low / weight, high / weight
