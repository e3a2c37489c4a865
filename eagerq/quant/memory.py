"""Where what a kernel is given lies, and new memory that it writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Triton asks the driver about each tensor that it is given, and nothing about addresses.
address: Any = Tensor.data_ptr


class Held:
    """Tensors that a kernel is given in each launch, and where they lie: who launches later asks first whether they still do."""

    __slots__ = ("addresses", "tensors")

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors, self.addresses = tensors, [*map(address, tensors)]


# what Inductor's code calls, which takes a third of what the dispatcher does; where it is gone, the slower one serves
_on_current_device: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None)


def empty(x: Tensor, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory where ``x`` lies, which is no subclass; for kernels, so no mode of the dispatcher sees it.

    Args:
        x: on any device.
        size, stride: tuples, and no ``torch.Size``.
        dtype: of the values, which are not set.
    """
    if x.is_cuda and _on_current_device is not None and x.get_device() == torch._C._cuda_getDevice():
        memory: Tensor = _on_current_device(size, stride, dtype)
        return memory
    return torch.empty_strided(size, stride, dtype=dtype, device=x.device)
