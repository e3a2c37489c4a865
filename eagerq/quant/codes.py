"""A tensor that carries integer codes through a model's own, unmodified forward.

What an engine computes on codes, a ``CodeTensor`` computes on codes; a result whose grid is not known yet (a sum, a
convolution) waits for the quantizer behind it. Any other function runs on real values, and is listed. What is written in
place is seen by every tensor that shares the memory in the float model.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from eagerq.quant.code_functions import HANDLERS, VIEWS, InPlace
from eagerq.quant.code_values import Coded, Real, Value, note_float
from eagerq.quant.engine import EngineProfile, Grid
from eagerq.quant.pieces import in_pieces
from eagerq.quant.spec import QuantSpec

#: Facts about a tensor that need no values.
_FACTS = frozenset(
    "dtype device layout is_cuda is_cpu is_meta is_sparse is_mkldnn is_quantized is_nested requires_grad grad_fn grad is_leaf"
    " is_complex is_floating_point is_signed element_size get_device names is_inference itemsize nbytes is_xla is_mps is_xpu"
    " is_vulkan is_ipu is_ort is_mtia is_maia is_neg is_conj data_ptr _version requires_grad_ value is_same_size"
    " has_names".split()
)
#: Those that a tensor's shape and strides tell.
_LAYOUT = frozenset("shape ndim dim size numel nelement stride is_contiguous storage_offset __len__".split())
_PROPERTIES = {"T": "permute_reversed", "mT": "mT"}


class CodeTensor(Tensor):
    """A tensor of codes, or of a result that waits for its quantizer; see the module's text."""

    value: Value
    #: Shared with the tensors that share its memory in the float model.
    memory: Memory

    @staticmethod
    def __new__(cls, value: Value) -> CodeTensor:
        """A float32 tensor of the value's shape, without storage of its own."""
        made: CodeTensor = Tensor._make_wrapper_subclass(cls, value.shape(), dtype=torch.float32, device=value.device())  # type: ignore[attr-defined]
        made.hold(value)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CodeTensor({type(self.value).__name__}, {tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):  # a property
            of = getattr(getattr(func, "__self__", None), "__name__", "")
            if (name, of) == ("__set__", "data") and isinstance(args[0], CodeTensor):
                args[0].set_data(args[1])
                return None
            name = _PROPERTIES.get(of, of) if name == "__get__" else name
        if name in _LAYOUT and args and isinstance(args[0], CodeTensor):
            return func(args[0].value.laid_out(), *args[1:], **kwargs)
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = HANDLERS.get(name)
        if handler is not None and kwargs.get("out") is None:
            if not args and "input" in kwargs:
                args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
            found = handler(func, _values(args), _values(kwargs))
            if isinstance(found, InPlace):
                if not args[0].memory.is_seen_beside(args[0]):
                    args[0].hold(found.value)
                    return args[0]
            elif args and isinstance(args[0], CodeTensor) and found is args[0].value:
                return args[0]
            elif found is not NotImplemented:
                out = _tensors(found)
                if name in VIEWS:
                    args[0].memory.share(out, args[0], _on(func, args[1:], kwargs))
                return out
        return _on_real(func, name, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_real(args), **_real(kwargs or {}))

    def hold(self, value: Value) -> None:
        """Stand for ``value`` from now on, in memory of its own."""
        self.value = value
        self.memory = Memory(self)

    def set_data(self, data: Tensor) -> None:
        """``self.data = data``."""
        if isinstance(data, CodeTensor):
            self.value = data.value
            data.memory.share(self, data, lambda real: real)
        else:
            self.hold(Real(_counting(data), self.value.profile))

    def take_written(self, real: Tensor) -> None:
        """Stand for values that a function wrote in place to ``real``, a copy of this tensor's."""
        if real.shape == self.value.shape() and self.memory.is_seen_beside(self):
            self.memory.make_real()
            self.value.real().copy_(real)
        else:
            self.hold(Real(real, self.value.profile))


class Memory:
    """Code tensors that share memory in the float model.

    Each has a value of its own until something is written that another sees: from then on they are views of one plain tensor.
    """

    def __init__(self, first: CodeTensor) -> None:
        self.value = first.value
        #: Each with the function that makes it of the first.
        self.members: list[tuple[weakref.ref[CodeTensor], Callable[[Tensor], Any]]] = [(weakref.ref(first), lambda real: real)]

    def living(self) -> list[tuple[CodeTensor, Callable[[Tensor], Any]]]:
        """Members that are read by someone, and were not moved to other memory."""
        held = [(ref, ref(), view) for ref, view in self.members]
        self.members = [(ref, view) for ref, tensor, view in held if tensor is not None and tensor.memory is self]
        return [(tensor, view) for _, tensor, view in held if tensor is not None and tensor.memory is self]

    def share(self, out: Any, source: CodeTensor, view: Callable[[Tensor], Any]) -> None:
        """Take in what of ``out``, one or more code tensors that ``view`` makes of ``source``, is no copy."""
        to_source = next(view for tensor, view in self.living() if tensor is source)
        first = self.laid_out()
        own = view(to_source(first))
        for place, (made, seen) in enumerate(zip(out, own, strict=True) if isinstance(out, (tuple, list)) else [(out, own)]):
            if is_view(seen, first):
                made.memory = self
                which = place if made is not out else None
                self.members.append((weakref.ref(made), _composed(to_source, view, which)))

    def is_seen_beside(self, written: CodeTensor) -> bool:
        """Whether what is written to a member changes another one."""
        living = self.living()
        if len(living) == 1:
            return False
        first = self.laid_out().zero_()
        next(view for tensor, view in living if tensor is written)(first).fill_(1.0)
        return any(bool(view(first).any()) for tensor, view in living if tensor is not written)

    def make_real(self) -> None:
        """Let every member be a view of one plain tensor."""
        first = self.laid_out().copy_(self.value.real())
        for tensor, view in self.living():
            tensor.hold(Real(view(first), self.value.profile))

    def laid_out(self) -> Tensor:
        """A tensor of any values that lies in memory as the first does in the float model."""
        like = self.value.laid_out()
        if self.value.profile.kernels != "float":  # those leave codes in other orders
            like = torch.empty(like.shape, device="meta")
        with torch.inference_mode(False):  # so that it counts what is written to it
            return torch.empty_like(like, dtype=torch.float32, device=self.value.device())


def _composed(first: Callable[[Tensor], Any], then: Callable[[Tensor], Any], place: int | None) -> Callable[[Tensor], Any]:
    return lambda real: then(first(real)) if place is None else then(first(real))[place]


def is_view(tensor: Any, of: Tensor) -> bool:
    """Whether a function's result is a tensor of the same dtype in the memory of ``of``."""
    if not isinstance(tensor, Tensor) or tensor.dtype != of.dtype or tensor.layout != torch.strided:
        return False
    return tensor.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def _counting(real: Tensor) -> Tensor:
    """The tensor, or a copy where it does not count what is written to it."""
    if not real.is_inference():
        return real
    with torch.inference_mode(False):
        return real.clone()


def _on(func: Any, args: Any, kwargs: Any) -> Callable[[Tensor], Any]:
    """The function of its first argument; it does not keep the one that it was called with."""
    return lambda real: func(real, *args, **kwargs)


def _on_real(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """``func`` of real values; what it writes to them is written to the code tensors it was given."""
    given: dict[int, tuple[CodeTensor, Tensor, int]] = {}

    def real_of(x: CodeTensor) -> Tensor:
        if id(x) not in given:
            real = _counting(x.value.real())
            given[id(x)] = x, real, real._version
        return given[id(x)][1]

    real_args, real_kwargs = _real(args, real_of), _real(kwargs, real_of)
    if any(not isinstance(x.value, Real) for x, _, _ in given.values()):
        note_float(name)
    out = func(*real_args, **real_kwargs)
    for x, real, version in given.values():
        if real._version != version:
            x.take_written(real)
    for x, real, _ in given.values():
        if out is real:
            return x
    first = args[0] if args else None
    return _wrapped(out, first, given[id(first)][1], _on(func, args[1:], kwargs)) if isinstance(first, CodeTensor) else out


def _wrapped(out: Any, x: CodeTensor, real: Tensor, view: Callable[[Tensor], Any]) -> Any:
    """A result that is one or more views of ``real``, as code tensors that share the memory of ``x``; any other as it is."""
    if isinstance(x.value, Real) and len(x.memory.living()) == 1:
        return out  # a plain view sees what is written to x
    parts = out if type(out) in (tuple, list) else [out]
    if not parts or not all(is_view(part, real) for part in parts):
        return out
    made = [CodeTensor(Real(part, x.value.profile)) for part in parts]
    held = made[0] if parts is not out else type(out)(made)
    x.memory.share(held, x, view)
    return held


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


def _real_of(x: CodeTensor) -> Tensor:
    return x.value.real()


def _real(obj: Any, of: Callable[[CodeTensor], Tensor] = _real_of) -> Any:
    """The object with ``of`` each code tensor in its place."""
    if isinstance(obj, CodeTensor):
        return of(obj)
    if isinstance(obj, Mapping):
        held = {key: _real(value, of) for key, value in obj.items()}
        if type(obj) is dict:
            return held
        if any(held[key] is not obj[key] for key in held):
            for key, value in held.items():  # a ModelOutput keeps its class
                obj[key] = value  # type: ignore[index]
        return obj
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        return type(obj)(*(_real(value, of) for value in obj))
    if type(obj) in (list, tuple):
        return type(obj)(_real(value, of) for value in obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        changed = {f.name: _real(getattr(obj, f.name), of) for f in dataclasses.fields(obj) if f.init}
        if any(changed[key] is not getattr(obj, key) for key in changed):
            return dataclasses.replace(obj, **changed)
    return obj
