"""PyTorch's kernels of the meta device, called once for each form of their arguments.

Many are Python that computes shapes through a hundred calls: most of the time of a forward on the meta device, and the layers
of a model are alike. What a kernel gave is made anew from its shape, strides and type; nothing is known here of any operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Those that took the time; none returns a view of an argument, and what batch norm writes has no value here.
OPERATORS = (
    "native_batch_norm", "native_layer_norm", "native_group_norm", "addmm", "gelu", "_softmax", "_safe_softmax", "mul.Tensor",
    "add.Tensor", "mean.dim", "cat", "roll", "convolution",
)  # fmt: skip
_LIMIT = 10_000


def remembered(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A functional kernel of the meta device that is called once for each form of its arguments."""
    known: dict[Any, Any] = {}

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            key = (_form(args), tuple((name, _form(value)) for name, value in kwargs.items()))
            found = known.get(key)
        except TypeError:  # an argument of another kind
            return kernel(*args, **kwargs)
        if found is None:
            result = kernel(*args, **kwargs)
            several = isinstance(result, (tuple, list))
            results = result if several else (result,)
            if len(known) < _LIMIT and all(type(t) is Tensor and t.storage_offset() == 0 for t in results):
                known[key] = several, tuple((t.shape, t.stride(), t.dtype) for t in results)
            return result
        several, forms = found
        made = tuple(torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in forms)
        return made if several else made[0]

    return call


def _form(value: Any) -> Any:
    """All of an argument that a result's shape may depend on, with its type, as 1, 1.0 and True are equal."""
    if isinstance(value, Tensor):
        plain = value.is_meta and value.layout is torch.strided and type(value) in (Tensor, torch.nn.Parameter)
        if not plain or value.is_complex():
            raise TypeError
        return value.shape, value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_form, value))
    return type(value), value


@functools.cache
def remember() -> torch.library.Library:
    """Let this process's kernels of the meta device remember."""
    library = torch.library.Library("aten", "IMPL")
    for name in OPERATORS:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        kernel = operator.py_kernels.get(torch._C.DispatchKey.Meta)
        if kernel is not None:
            library.impl(name, remembered(kernel), "Meta", allow_override=True)
    return library
