"""A tensor that carries integer codes through a model's own, unmodified forward.

What an engine computes on codes, a ``CodeTensor`` computes on codes; a result whose grid is not known yet (a sum, a
convolution) waits for the quantizer behind it. Any other function runs on real values, and is listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eagerq.quant.code_functions import HANDLERS, InPlace
from eagerq.quant.code_values import Coded, Value, note_float
from eagerq.quant.engine import EngineProfile, Grid
from eagerq.quant.pieces import in_pieces
from eagerq.quant.spec import QuantSpec

#: Facts about a tensor that need no values.
_FACTS = frozenset(
    "shape dtype device layout ndim dim size numel nelement stride is_cuda is_cpu is_meta is_sparse is_mkldnn is_quantized"
    " is_nested requires_grad grad_fn grad is_leaf is_complex is_floating_point is_signed is_contiguous element_size"
    " storage_offset get_device names is_inference itemsize nbytes is_xla is_mps is_xpu is_vulkan is_ipu is_ort is_mtia"
    " is_maia is_neg is_conj data_ptr __len__ _version requires_grad_ value is_same_size has_names".split()
)
_PROPERTIES = {"T": "permute_reversed", "mT": "mT"}


class CodeTensor(Tensor):
    """A tensor of codes, or of a result that waits for its quantizer; see the module's text."""

    value: Value

    @staticmethod
    def __new__(cls, value: Value) -> CodeTensor:
        """A float32 tensor of the value's shape, without storage of its own."""
        made: CodeTensor = Tensor._make_wrapper_subclass(cls, value.shape(), dtype=torch.float32, device=value.device())  # type: ignore[attr-defined]
        made.value = value
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CodeTensor({type(self.value).__name__}, {tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name in _PROPERTIES:
                name = _PROPERTIES[name]
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = HANDLERS.get(name)
        if handler is not None:
            found = handler(func, _values(args), _values(kwargs))
            if isinstance(found, InPlace):
                args[0].value = found.value
                return args[0]
            if found is not NotImplemented:
                return _tensors(found)
        note_float(name)
        return func(*_real(args), **_real(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_real(args), **_real(kwargs or {}))


def encode(x: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor, profile: EngineProfile) -> Tensor:
    """``x`` behind a quantizer: codes of real values, or of a result that waited for this grid."""
    grid = Grid.of(spec, scale, zero_point, profile.kernels)
    codes = x.value.on(grid) if isinstance(x, CodeTensor) else in_pieces(lambda part: profile.quantize(part, grid), x)
    return CodeTensor(Coded(codes, grid, profile))


def decode(obj: Any) -> Any:
    """The object with plain tensors in the place of code tensors, inside tuples, lists, dicts and dataclasses."""
    return _real(obj)


def _values(obj: Any) -> Any:
    """A function's arguments with values in the place of code tensors."""
    if isinstance(obj, CodeTensor):
        return obj.value
    if type(obj) in (list, tuple):
        return type(obj)(map(_values, obj))
    return {key: _values(value) for key, value in obj.items()} if type(obj) is dict else obj


def _tensors(found: Any) -> Any:
    """A handler's result with code tensors in the place of values."""
    if isinstance(found, Value):
        return CodeTensor(found)
    return type(found)(map(_tensors, found)) if isinstance(found, (list, tuple)) else found


def _real(obj: Any) -> Any:
    if isinstance(obj, CodeTensor):
        return obj.value.real()
    if isinstance(obj, Mapping):
        held = {key: _real(value) for key, value in obj.items()}
        if type(obj) is dict:
            return held
        if any(held[key] is not obj[key] for key in held):
            for key, value in held.items():  # a ModelOutput keeps its class
                obj[key] = value  # type: ignore[index]
        return obj
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        return type(obj)(*map(_real, obj))
    if type(obj) in (list, tuple):
        return type(obj)(map(_real, obj))
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        changed = {f.name: _real(getattr(obj, f.name)) for f in dataclasses.fields(obj) if f.init}
        if any(changed[key] is not getattr(obj, key) for key in changed):
            return dataclasses.replace(obj, **changed)
    return obj
