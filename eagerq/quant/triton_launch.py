"""How Triton's kernels are launched.

Triton looks a compiled kernel up by all its arguments, which takes longer than a small kernel runs. Here what decides is a key:
the sizes, dtypes and flags that a launch is given, and whether the large tensors' addresses divide by 16. Under it lies a plan,
and a launch that has one looks nothing else up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Triton asks the driver about each tensor that it is given, and nothing about addresses.
address: Any = Tensor.data_ptr


class Plan:
    """A kernel, its compile-time constants in the order of its parameters, and once it was launched what it was compiled to."""

    def __init__(self, kernel: Any, constants: tuple[Any, ...], **options: Any) -> None:
        self.kernel, self.constants = kernel, constants
        self.options = {"enable_fp_fusion": False, **options}
        self.compiled: Any = None

    def launch(self, stream: int, programs: int, tensors: tuple[Tensor, ...], scalars: tuple[float, ...]) -> None:
        """So many programs, with arguments in the order of the kernel's parameters: tensors, numbers, constants."""
        if self.compiled is None:
            made = self.kernel[(programs,)](*tensors, *scalars, *self.constants, **self.options)
            self.compiled = made and (made.run, made.function, made.packed_metadata)  # an interpreter gives None
        else:
            run, function, metadata = self.compiled
            given = (*map(address, tensors), *scalars, *self.constants)
            run(programs, 1, 1, stream, function, metadata, None, None, None, *given)


_PLANS: dict[Any, Any] = {}
_MOST_PLANS = 4096

#: What lies under a key, or None.
planned: Callable[[Any], Any] = _PLANS.get


def remember(key: Any, plan: Any) -> Any:
    """``plan``, under that key."""
    if len(_PLANS) >= _MOST_PLANS:  # of images of ever new sizes
        _PLANS.clear()
    _PLANS[key] = plan
    return plan


def stream_of(x: Tensor) -> int | None:
    """Where Triton, which launches on the current device, launches on what lies as x does: the stream; None on other devices."""
    if not x.is_cuda:
        return 0
    device = x.get_device()
    return torch._C._cuda_getCurrentRawStream(device) if device == torch._C._cuda_getDevice() else None


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def processors(x: Tensor) -> int:
    """Multiprocessors of the device that x lies on."""
    return _multiprocessors(x.get_device()) if x.is_cuda else 1


def kind_of(n: int, block: int) -> tuple[bool, ...]:
    """What a kernel is compiled for of the number of its values: whether blocks are whole, and what Triton specializes on."""
    return n % block == 0, n % 16 == 0, n == 1, n >= 2**31


def programs(x: Tensor, n: int, block: int, waves: int) -> int:
    """As many as there are blocks of n values, at most so many for each multiprocessor."""
    return min(-(-n // block), processors(x) * waves)
