"""How tensors lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

#: Fewest values of a row: an end of each is one more value that a compiled kernel writes and the next one reads.
FEWEST_IN_ROW = 32

_CHANNELS_LAST = {2: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which ``x`` lies without gaps, or to which it must be copied."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def has_channels_last(x: Tensor) -> bool:
    """Whether the channels of ``(N, C, *)`` lie side by side."""
    format = _CHANNELS_LAST.get(x.dim())
    return format is not None and x.is_contiguous(memory_format=format)


def dense(x: Tensor) -> Tensor:
    """``x`` without gaps in memory; itself if it has none."""
    return x if x.is_contiguous() else x.contiguous(memory_format=memory_format(x))


def rows_of(x: Tensor) -> list[int]:
    """The fewest innermost axes, but not the first, whose values lie side by side and are ``FEWEST_IN_ROW`` or more; none where
    there are no such. It asks nothing of the first axis, so that compilers may hold the size of a batch open."""
    if x.is_contiguous():
        inner = 1
        for axis in range(x.dim() - 1, 0, -1):
            inner *= x.shape[axis]
            if inner >= FEWEST_IN_ROW:
                return [*range(axis, x.dim())]
    elif has_channels_last(x) and x.shape[1] >= FEWEST_IN_ROW:
        return [1]
    return []
