"""The kernels that serve CUDA tensors: those of the modules ``triton_*.py`` where Triton is installed and they know dtype and
layout, else those of ``plain_kernels.py``. Names and arguments are the latter's, but ``norm_gradient`` makes the sums itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from eagerq.quant import plain_kernels as plain
from eagerq.quant.layout import dense, has_channels_last, memory_format
from eagerq.quant.memory import empty

#: What Triton's kernels compute in.
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_has_triton = importlib.util.find_spec("triton") is not None


@functools.cache
def _triton(name: str) -> ModuleType | None:
    """The module of kernels ``triton_<name>``, or None where Triton is not installed."""
    return importlib.import_module(f"eagerq.quant.triton_{name}") if _has_triton else None


def are_fast(x: Tensor) -> bool:
    """Whether kernels of its own serve this tensor."""
    return x.is_cuda and x.dtype in DTYPES and _has_triton


def is_watched() -> bool:
    """Whether somebody is to see what is computed: a compiler, a mode, a transform of ``torch.func``, or ``torch.jit.trace``, by
    which TensorBoard's ``add_graph`` sees a model."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._is_tracing()


def is_plain(x: Tensor) -> bool:
    """Whether a kernel may be launched on x at once: the dispatcher takes longer than a small kernel."""
    return not is_watched() and x.is_cuda and type(x) in _PLAIN


def is_tensor(x: Any) -> bool:
    """Whether x is one of PyTorch's own tensors and no subclass."""
    return type(x) in _PLAIN


def activation(
    x: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, scratch: Tensor | None,
    low: float | None, high: float | None, constant: float | None, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernels = _triton("kernels")
    if kernels is None or x.dtype not in DTYPES:
        return plain.activation(x, scale, zero_point, min_val, max_val, scratch, low, high, constant, *rest)
    x = dense(x)
    if low is not None or high is not None:
        low, high = plain.held(low, x.dtype), plain.held(high, x.dtype)
    out, mask = torch.empty_like(x), plain.mask_like(x, rest[-1], empty)
    kernels.activation_forward(
        x, out, mask if rest[-1] else None, scale, zero_point, min_val, max_val, scratch, low, high, constant, rest[:-1]
    )
    return out, mask


def masked_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    kernels = _triton("kernels")
    if kernels is None or grad.dtype not in DTYPES:
        return plain.masked_gradient(grad, mask)
    grad = dense(grad)
    out = torch.empty_like(grad)
    kernels.masked_gradient(grad, mask, out)
    return out


def gelu(
    x: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, scratch: Tensor | None,
    constant: float | None, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernels = _triton("kernels")
    if kernels is None or x.dtype not in DTYPES:
        return plain.gelu(x, scale, zero_point, min_val, max_val, scratch, constant, *rest)
    x = dense(x)
    out, mask = torch.empty_like(x), plain.mask_like(x, rest[-1], empty)
    state, written = (scale, zero_point, min_val, max_val), mask if rest[-1] else None
    kernels.activation_forward(x, out, written, *state, scratch, None, None, constant, rest[:-1], gelu=True)
    return out, mask


def gelu_gradient(grad: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    kernels = _triton("kernels")
    if kernels is None or not {grad.dtype, x.dtype} <= DTYPES:
        return plain.gelu_gradient(grad, x, mask)
    x = dense(x)
    out = torch.empty_like(x, dtype=grad.dtype)
    kernels.gelu_gradient(grad.contiguous(memory_format=memory_format(x)), x, mask, out)
    return out


def gated(
    x: Tensor, state: list[Tensor], scratch: list[Tensor], hard: bool, constant: float | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    kernels = _triton("gates")
    if kernels is None or x.dtype not in DTYPES:
        return plain.gated(x, state, scratch, hard, constant, *rest)
    x = dense(x)
    out, used = torch.empty_like(x), plain.used_of(x, new=empty)
    kernels.forward(x, out, used, scratch, state, hard, constant, rest)
    return out, used


def gated_gradient(grad: Tensor, x: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> Tensor:
    kernels = _triton("gates")
    if kernels is None or not {grad.dtype, x.dtype} <= DTYPES:  # else the forward was plain, and made no tables
        return plain.gated_gradient(grad, x, used, hard, quant_min, quant_max)
    x = dense(x)
    out = torch.empty_like(x)
    kernels.backward(grad.contiguous(memory_format=memory_format(x)), x, out, used, hard, quant_min, quant_max)
    return out


def sigmoid(
    x: Tensor, state: list[Tensor], scratch: list[Tensor], hard: bool, constant: float | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    kernels = _triton("sigmoids")
    if kernels is None or x.dtype not in DTYPES:
        return plain.sigmoid(x, state, scratch, hard, constant, *rest)
    x = dense(x)
    out, used = torch.empty_like(x), plain.used_of(x, plain.SIGMOID_USED, empty)
    kernels.forward(x, out, used, scratch, state, hard, constant, rest)
    return out, used


def sigmoid_gradient(grad: Tensor, x: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> Tensor:
    kernels = _triton("sigmoids")
    if kernels is None or not {grad.dtype, x.dtype} <= DTYPES:
        return plain.sigmoid_gradient(grad, x, used, hard, quant_min, quant_max)
    x = dense(x)
    out = torch.empty_like(x)
    kernels.backward(grad.contiguous(memory_format=memory_format(x)), x, out, used, hard, quant_min, quant_max)
    return out


def _of_norm(x: Tensor, name: str = "norms") -> ModuleType | None:
    """The kernels of norms, where they serve: of channels that lie side by side."""
    return _triton(name) if x.dtype in DTYPES and has_channels_last(x) else None


def norm_statistics(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Tensor:
    kernels = _of_norm(x)
    if kernels is None:
        return plain.norm_statistics(x, weight, bias, *rest)
    kept = plain.kept_of(x, empty)
    kernels.forward(x, None, kept, weight, bias, *rest)
    return kept


def norm_activation(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    kernels = _of_norm(x)
    if kernels is None:
        return plain.norm_activation(x, weight, bias, *rest)
    out, kept = torch.empty_like(x), plain.kept_of(x, empty)
    kernels.forward(x, out, kept, weight, bias, *rest)
    return out, kept


def norm_sums(grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor, *rest: Any) -> Tensor:
    kernels = _of_norm(x) if grad.dtype in DTYPES else None
    if kernels is None:
        return plain.norm_sums(grad, x, weight, bias, kept, *rest)
    found = plain.sums_of(x, empty)
    kernels.backward(grad.contiguous(memory_format=memory_format(x)), x, None, found, weight, bias, kept)
    return found


def norm_gradient(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and what ``norm_sums`` finds."""
    kernels = _of_norm(x) if grad.dtype in DTYPES else None
    if kernels is None:
        found = plain.norm_sums(grad, x, weight, bias, kept, *rest)
        return plain.norm_gradient(grad, x, weight, bias, kept, found, *rest), found
    grad = grad.contiguous(memory_format=memory_format(x))
    out, found = torch.empty_like(grad), plain.sums_of(x, empty)
    kernels.backward(grad, x, out, found, weight, bias, kept)
    return out, found


def norm_gated(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _of_norm(x, "gated_norms")
    if kernels is None:
        return plain.norm_gated(x, weight, bias, *rest)
    out, used, kept = torch.empty_like(x), plain.used_of(x, new=empty), plain.kept_of(x, empty)
    kernels.forward(x, out, kept, used, weight, bias, *rest)
    return out, used, kept


def norm_gated_gradient(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    kernels = _of_norm(x) if grad.dtype in DTYPES else None
    if kernels is None:
        return plain.norm_gated_gradient(grad, x, weight, bias, kept, *rest)
    grad = grad.contiguous(memory_format=memory_format(x))
    out, found = torch.empty_like(grad), plain.sums_of(x, empty)
    kernels.backward(grad, x, out, found, weight, bias, kept, *rest)
    return out, found


def weight_by_its_range(
    weight: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, *rest: Any
) -> Tensor:
    kernels = _triton("kernels")
    if kernels is None or weight.dtype not in DTYPES:
        return plain.weight_by_its_range(weight, scale, zero_point, min_val, max_val, *rest)
    weight = dense(weight)
    out = torch.empty_like(weight, dtype=rest[-1])
    kernels.weight_forward(weight, out, scale, zero_point, min_val, max_val, rest[:-1])
    return out


def of_weight(weight: Tensor) -> Callable[..., None] | None:
    """The kernel that writes what ``weight_by_its_range`` gives over a copy of the weight; None where none serves."""
    serves = is_plain(weight) and weight.dtype in DTYPES and dense(weight) is weight
    kernels = _triton("kernels") if serves else None
    return None if kernels is None else kernels.weight_forward
