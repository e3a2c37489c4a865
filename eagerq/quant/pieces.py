"""Elementwise, moving and pooling functions of codes that keep what lies between them small.

A code is a byte or a float32 number; what is computed between codes is wider, and so are the copies that PyTorch's own
functions make where they take no bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: How many values are computed at a time.
PIECE = 2**18


def in_pieces(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """An elementwise function of tensors that broadcast, computed in pieces along the axis that is outermost in memory."""
    if max(operand.numel() for operand in operands) <= PIECE:
        return function(*operands)
    shape = torch.broadcast_shapes(*(operand.shape for operand in operands))  # type: ignore[no-untyped-call]
    views = [operand.reshape(*[1] * (len(shape) - operand.dim()), *operand.shape) for operand in operands]
    axis = max(range(len(shape)), key=lambda i: max(v.stride(i) if v.shape[i] > 1 else 0 for v in views))
    length = max(1, shape[axis] * PIECE // shape.numel())
    pieces = range(0, shape[axis], length)
    parts = ([v if v.shape[axis] == 1 else v[(slice(None),) * axis + (slice(i, i + length),)] for v in views] for i in pieces)
    return torch.cat([function(*part) for part in parts], axis)


def moved(function: Callable[..., Any], codes: Tensor, args: Any, kwargs: Any) -> Any:
    """What ``function`` moves; through float32 where it takes no bytes, or not in the memory format a kernel left them in."""
    if codes.is_floating_point():
        return function(codes, *args, **kwargs)
    try:
        return function(codes, *args, **kwargs)
    except RuntimeError:
        out = function(codes.contiguous().float(), *args, **kwargs)
        return out.to(codes.dtype) if isinstance(out, Tensor) else type(out)(part.to(codes.dtype) for part in out)


def max_pool(
    codes: Tensor,
    out: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
) -> Tensor:
    """Max pooling of bytes, without the indices that PyTorch's computes: one window's place after the other.

    Args:
        codes: ``(*, *S)``, S the pooled axes.
        out: the result's pooled axes, which tell how it was rounded.
        kernel_size, stride, padding, dilation: as of ``torch.nn.functional.max_pool2d``.
    """
    dims = len(out)
    sizes = codes.shape[-dims:]
    kernel = _each(kernel_size, dims)
    steps, low, gaps = _each(stride or kernel, dims), _each(padding, dims), _each(dilation, dims)
    pads: list[int] = []
    for n, size, k, s, p, d in reversed(list(zip(out, sizes, kernel, steps, low, gaps, strict=True))):
        pads += [p, (n - 1) * s + d * (k - 1) + 1 - size - p]
    padded = F.pad(codes, pads, value=torch.iinfo(codes.dtype).min)
    result: Tensor | None = None
    for place in itertools.product(*map(range, kernel)):
        axes = zip(place, gaps, out, steps, strict=True)
        taken: Any = (Ellipsis, *(slice(i * d, i * d + (n - 1) * s + 1, s) for i, d, n, s in axes))
        values = padded[taken]
        result = values.clone() if result is None else torch.maximum(result, values, out=result)
    return codes if result is None else result


def _each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values
