"""What functions do to shapes, for watched forwards on the meta device.

PyTorch's own forms of these are many calls each, or a step a token, and would cost more than all else in a forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """What the function gives; on the meta device by its shape alone where that is known."""
    alone = _ON_META.get(func)
    if alone is not None and args and isinstance(args[0], Tensor) and args[0].is_meta:
        result = alone(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return func(*args, **kwargs)


def _learning(out: Tensor, *sources: Any) -> Tensor:
    """``out``, with a gradient if one of ``sources`` has: models ask that before they checkpoint."""
    if torch.is_grad_enabled():
        for source in sources:
            if isinstance(source, Tensor) and source.requires_grad:
                alike = (source.shape, source.stride(), source.device) == (out.shape, out.stride(), out.device)
                return source.clone() if alike else out + source.sum()
    return out


def _fits(parameter: Any, shape: tuple[int, ...], x: Tensor) -> bool:
    """Whether it is no parameter or one that PyTorch takes: for all others PyTorch says what is wrong."""
    return parameter is None or (tuple(parameter.shape) == shape and parameter.dtype == x.dtype and parameter.is_meta)


def _batch_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What batch norm does to shapes."""
    return _learning(torch.empty_like(x), x, *args, *kwargs.values())


def _lstm(x: Tensor, hx: Any, *args: Any) -> Any:
    """What an LSTM does to shapes."""
    if not isinstance(hx, (tuple, list)):  # packed sequences come with their batch sizes second
        return NotImplemented
    directions = 2 if args[5] else 1
    leading = x.shape[1::-1] if args[6] else x.shape[:-1]  # batch first is a view of steps first
    out = x.new_empty(*leading, directions * hx[0].shape[-1])
    out = out.transpose(0, 1) if args[6] else out
    return tuple(_learning(t, x, *args[0]) for t in (out, torch.empty_like(hx[0]), torch.empty_like(hx[1])))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """What a linear layer does to shapes."""
    if x.dim() < 2 or weight.dim() != 2 or not _fits(weight, (weight.shape[0], x.shape[-1]), x):
        return NotImplemented
    if not _fits(bias, (weight.shape[0],), x):
        return NotImplemented
    return _learning(x.new_empty(*x.shape[:-1], weight.shape[0]), x, weight, bias)


def _layer_norm(x: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    """What layer norm does to shapes."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else ()
    if not shape or x.shape[-len(shape) :] != shape or not (_fits(weight, shape, x) and _fits(bias, shape, x)):
        return NotImplemented
    return _learning(torch.empty_like(x, memory_format=torch.contiguous_format), x, weight, bias)


def _gelu(x: Tensor, *, approximate: str = "none") -> Any:
    """What GELU does to shapes."""
    known = approximate in ("none", "tanh") and x.is_floating_point()
    return _learning(torch.empty_like(x), x) if known else NotImplemented


def _normalize(x: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None) -> Any:
    """What normalising to length one does to shapes."""
    known = out is None and x.is_floating_point() and isinstance(dim, int) and -x.dim() <= dim < x.dim()
    return _learning(torch.empty_like(x), x) if known else NotImplemented


_ON_META: dict[Any, Any] = {
    torch.batch_norm: _batch_norm,
    F.batch_norm: _batch_norm,
    torch.lstm: _lstm,
    F.linear: _linear,
    torch.layer_norm: _layer_norm,
    F.layer_norm: _layer_norm,
    F.normalize: _normalize,
    F.gelu: _gelu,
}
