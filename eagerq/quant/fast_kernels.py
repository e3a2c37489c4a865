"""The kernels that serve CUDA tensors: those of the modules ``triton_*.py`` where Triton is installed and they know dtype and
layout, else those of ``plain_kernels.py``. Names and arguments are the latter's, but ``norm_gradient`` makes the sums itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from eagerq.quant import plain_kernels as plain
from eagerq.quant.layout import dense, has_channels_last, memory_format
from eagerq.quant.memory import Held, empty

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


class Bound(Protocol):
    """A kernel bound to all but the tensor that it is given and, where it makes a mask if one is needed, whether it is."""

    held: Held

    def __call__(self, x: Tensor, *needs_mask: bool) -> tuple[Tensor, ...]: ...


class Plain:
    """A plain kernel as a ``Bound``."""

    def __init__(self, kernel: Callable[..., Any], *rest: Any) -> None:
        self._kernel, self._rest = kernel, rest
        flat = (t for given in rest for t in (given if isinstance(given, list) else [given]))
        self.held = Held(*(t for t in flat if isinstance(t, Tensor)))

    def __call__(self, x: Tensor, *needs_mask: bool) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self._kernel(x, *self._rest, *needs_mask)
        return found


def _bound(kernels: ModuleType | None, name: str, otherwise: Callable[..., Any], x: Tensor, *rest: Any) -> Bound:
    bound: Bound = Plain(otherwise, *rest) if kernels is None else getattr(kernels, name)(x, *rest)
    return bound


def _kernels_of(x: Tensor, name: str) -> ModuleType | None:
    """The kernels, where they know x's dtype."""
    return _triton(name) if x.dtype in DTYPES else None


def bound_activation(x: Tensor, *rest: Any) -> Bound:
    """``activation`` of tensors like x."""
    return _bound(_kernels_of(x, "kernels"), "Activation", plain.activation, x, *rest)


def activation(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return bound_activation(x, *rest[:-1])(x, rest[-1])


def masked_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    kernels = _triton("kernels")
    if kernels is None or grad.dtype not in DTYPES:
        return plain.masked_gradient(grad, mask)
    grad = dense(grad)
    out = torch.empty_like(grad)
    kernels.masked_gradient(grad, mask, out)
    return out


def bound_gelu(x: Tensor, *rest: Any) -> Bound:
    """``gelu`` of tensors like x."""
    return _bound(_kernels_of(x, "kernels"), "Gelu", plain.gelu, x, *rest)


def gelu(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return bound_gelu(x, *rest[:-1])(x, rest[-1])


def gelu_gradient(grad: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    kernels = _triton("kernels")
    if kernels is None or not {grad.dtype, x.dtype} <= DTYPES:
        return plain.gelu_gradient(grad, x, mask)
    x = dense(x)
    out = torch.empty_like(x, dtype=grad.dtype)
    kernels.gelu_gradient(grad.contiguous(memory_format=memory_format(x)), x, mask, out)
    return out


def bound_gated(x: Tensor, *rest: Any) -> Bound:
    """``gated`` of tensors like x."""
    return _bound(_kernels_of(x, "gates"), "Gated", plain.gated, x, *rest)


def gated(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return bound_gated(x, *rest)(x)


def gated_gradient(grad: Tensor, x: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> Tensor:
    kernels = _triton("gates")
    if kernels is None or not {grad.dtype, x.dtype} <= DTYPES:  # else the forward was plain, and made no tables
        return plain.gated_gradient(grad, x, used, hard, quant_min, quant_max)
    x = dense(x)
    out = torch.empty_like(x)
    kernels.backward(grad.contiguous(memory_format=memory_format(x)), x, out, used, hard, quant_min, quant_max)
    return out


def bound_sigmoid(x: Tensor, *rest: Any) -> Bound:
    """``sigmoid`` of tensors like x."""
    return _bound(_kernels_of(x, "sigmoids"), "Sigmoid", plain.sigmoid, x, *rest)


def sigmoid(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return bound_sigmoid(x, *rest)(x)


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


def norm_statistics(x: Tensor, *rest: Any) -> Tensor:
    kernels = _of_norm(x)
    if kernels is None:
        return plain.norm_statistics(x, *rest)
    kept: Tensor = kernels.Norm(x, *rest).kept(x)
    return kept


def bound_norm(x: Tensor, *rest: Any) -> Bound:
    """``norm_activation`` of tensors like x, which lie in memory as x does."""
    return _bound(_of_norm(x), "Norm", plain.norm_activation, x, *rest)


def norm_activation(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return bound_norm(x, *rest)(x)


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


def bound_norm_gated(x: Tensor, *rest: Any) -> Bound:
    """``norm_gated``, as ``bound_norm``."""
    return _bound(_of_norm(x, "gated_norms"), "GatedNorm", plain.norm_gated, x, *rest)


def norm_gated(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return bound_norm_gated(x, *rest)(x)


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
