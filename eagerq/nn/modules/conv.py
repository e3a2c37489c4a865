"""Float convolutions PyTorch does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def same_pads(sizes: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
    r"""What TensorFlow's ``SAME`` adds to the last axes, as ``F.pad`` takes it: :math:`out = \lceil in / stride \rceil`.

    The odd element of padding goes to the end.
    """
    pads: list[int] = []
    for size, k, s, d in zip(reversed(sizes), reversed(kernel_size), reversed(stride), reversed(dilation), strict=False):
        total = max((-(size // -s) - 1) * s + (k - 1) * d + 1 - size, 0)
        pads += [total // 2, total - total // 2]
    return pads


def pad_same(x: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """``x`` with zeros added as ``same_pads`` says."""
    return F.pad(x, same_pads(x.shape, kernel_size, stride, dilation))


class Conv2dSame(nn.Conv2d):
    """A Conv2d that pads to TensorFlow's ``SAME`` by the size of each input. Shapes: ``(N, C, H, W)``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.same_padding = True

    def forward(self, input: Tensor) -> Tensor:
        input = pad_same(input, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(input, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
