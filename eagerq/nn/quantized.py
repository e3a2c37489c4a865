"""Deployed modules: integer weights and fixed scales, evaluated in float or written as ONNX integers."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.nn.integer import codes_of, integer_map
from eagerq.nn.modules.hooks import POST_HOOKS, PRE_HOOKS, share_hooks
from eagerq.nn.modules.ops import Op
from eagerq.nn.qat.base import QATBase, QATOp, on_sums
from eagerq.quant.codes import encode
from eagerq.quant.engine import FollowsEngine
from eagerq.quant.fake_quantize import FakeQuantize
from eagerq.quant.functional import dequantize, fake_quantize
from eagerq.quant.observer import QuantState
from eagerq.quant.spec import QuantSpec

_OPSET = 17


def code_dtype(spec: QuantSpec) -> torch.dtype:
    """int8 or uint8."""
    return torch.int8 if spec.signed else torch.uint8


def _onnx(op: str, inputs: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype, attrs: dict[str, Any] | None = None) -> Tensor:
    return torch.onnx.ops.symbolic(op, inputs, attrs or {}, dtype=dtype, shape=like.shape, version=_OPSET)


class QuantizeDequantize(FollowsEngine, QuantState):
    """A fixed quantizer: the fake quantizer's scale and zero point, for good.

    Buffers ``scale`` (float, ``()``) and ``zero_point`` (int8 or uint8, ``()``). In an ONNX export it
    is QuantizeLinear and DequantizeLinear.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("scale", scale.detach().clone().reshape(()))
        self.register_buffer("zero_point", zero_point.detach().reshape(()).to(code_dtype(spec)))

    def forward(self, x: Tensor, move: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Quantize, ``move`` and dequantize; an export moves the codes themselves."""
        if move is not None and not torch.onnx.is_in_onnx_export():
            x = move(x)
        if self.profile is not None:
            return encode(x, self.spec, self.scale, self.zero_point, self.profile)
        low, high = self.spec.quant_min, self.spec.quant_max
        if not torch.onnx.is_in_onnx_export():
            return fake_quantize(x, self.scale, self.zero_point.to(torch.int32), low, high)
        info = torch.iinfo(self.zero_point.dtype)
        if (low, high) != (info.min, info.max):  # QuantizeLinear clips to the dtype; a narrower grid clips before
            zero = self.zero_point.to(self.scale.dtype)
            x = torch.clamp(x, (low - zero) * self.scale, (high - zero) * self.scale)
        codes = _onnx("QuantizeLinear", (x, self.scale, self.zero_point), x, self.zero_point.dtype)
        codes = codes if move is None else move(codes)
        return _onnx("DequantizeLinear", (codes, self.scale, self.zero_point), codes, self.scale.dtype)

    def extra_repr(self) -> str:
        return str(self.spec)


class QuantizedModule(FollowsEngine, QuantState):
    r"""One linear map with integer weights, its activation and its quantizers; built by ``from_qat``.

    :math:`y = Q(f(op(x, (q_w - z_w) s_w) + q_b s_b))`, with the batch norm folded into
    :math:`q_w, q_b`. ``op`` is that of the QAT class the module came from.

    Buffers: ``weight_codes`` (int8 or uint8, shape of the float weight), ``weight_scale`` and
    ``weight_zero_point`` (``(1,)`` or ``(channels,)``), ``bias_codes`` (``(C_out,)``; int32, or int8 on a grid of
    its own) and ``bias_scale``. Where the input is not quantized, or the qconfig keeps the bias float, it is real
    and ``bias_scale`` None; where the qconfig keeps the weight float, it is real and ``weight_scale`` None.
    ``weight`` and ``bias`` are the real values of the codes, for code that reads them from outside.
    """

    weight_codes: Tensor
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    bias_codes: Tensor | None
    bias_scale: Tensor | None

    def __init__(self, qat: QATOp) -> None:
        super().__init__()
        self.op_class: type[Op] = type(qat)
        for name, value in vars(qat).items():
            if not name.startswith("_") and isinstance(value, (int, float, str, tuple, list, type(None))):
                self.__dict__.setdefault(name, value)
        if hasattr(qat, "_reversed_padding_repeated_twice"):
            self._reversed_padding_repeated_twice = qat._reversed_padding_repeated_twice
        self.same_padding = getattr(qat, "same_padding", False)
        self.input_fake_quant = qat.input_fake_quant
        self.act: nn.Module | None = getattr(qat, "act", None)
        self.activation_post_process = qat.activation_post_process
        self.dtype = qat.weight.dtype
        for name in ("weight_scale", "weight_zero_point", "bias_scale"):
            self.register_buffer(name, None)
        if qat.weight_fake_quant is None:
            weight, bias = qat.folded()
            self.register_buffer("weight_codes", weight.detach().to(qat.weight.dtype).clone())
            self.register_buffer("bias_codes", None if bias is None else bias.detach().clone())
            return
        stored = qat.quantized_weight()
        code = code_dtype(qat.weight_fake_quant.spec)
        self.register_buffer("weight_codes", stored.codes.to(code))
        self.weight_scale = stored.scale.clone()
        self.weight_zero_point = stored.zero_point.to(code)
        of_bias = qat.qconfig.bias
        bias_code = code_dtype(of_bias) if isinstance(of_bias, QuantSpec) else torch.int32
        bias = stored.bias if stored.bias_codes is None else stored.bias_codes.to(bias_code)
        self.register_buffer("bias_codes", None if bias is None else bias.detach().clone())
        self.bias_scale = stored.bias_scale
        self.axis = qat.weight_fake_quant.axis

    @classmethod
    def from_qat(cls, qat: QATOp) -> QuantizedModule:
        """The deployed form of a QAT module; its activation and hooks are shared, its quantizers are still to be fixed.

        Raises:
            StateError: if the QAT module cannot be folded or stored.
        """
        self = cls(qat)
        self.training = False  # that of what it shares with the QAT module stays as it was
        share_hooks(self, [qat], (*PRE_HOOKS, *POST_HOOKS))
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_codes.device)).dtype
        return self

    def _weight_about_zero(self) -> Tensor:
        """Codes less their zero point, float32; int8, and the codes themselves, where that is what they are."""
        shape = [1] * self.weight_codes.dim()
        zero: Tensor = self.weight_zero_point  # type: ignore[assignment]
        if self.weight_codes.dtype == torch.int8 and not zero.any():
            return self.weight_codes
        if zero.numel() > 1:
            shape[self.axis] = -1
        return self.weight_codes.float() - zero.float().reshape(shape)

    @property
    def weight(self) -> Tensor:
        """The weight as real values, of the model's dtype."""
        codes, scale, zero_point = self.weight_codes, self.weight_scale, self.weight_zero_point
        if scale is None or zero_point is None:
            return codes.to(self.dtype)
        if torch.onnx.is_in_onnx_export():
            return self._dequantized(codes, scale, zero_point, self.axis)
        shape = [1] * codes.dim()
        if scale.numel() > 1:
            shape[self.axis] = -1
        scale = scale.reshape(shape)
        return dequantize(codes.to(scale.dtype), scale, zero_point.to(torch.int32).reshape(shape)).to(self.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias as real values, of the model's dtype."""
        codes, scale = self.bias_codes, self.bias_scale
        if codes is None or scale is None:
            return None if codes is None else codes.to(self.dtype)
        if torch.onnx.is_in_onnx_export():
            return self._dequantized(codes, scale, torch.zeros_like(codes), 0)
        return (codes.double() * scale.double()).to(scale.dtype).to(self.dtype)

    def _dequantized(self, codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
        if scale.numel() == 1:
            return _onnx("DequantizeLinear", (codes, scale.reshape(()), zero_point.reshape(-1)[0]), codes, scale.dtype)
        return _onnx("DequantizeLinear", (codes, scale, zero_point), codes, scale.dtype, {"axis": axis})

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.input_fake_quant is not None:
            input = self.input_fake_quant(input)
        codes = None if self.profile is None else codes_of(input)
        bias = None
        if codes is not None and self.weight_scale is not None and self.bias_codes is not None:
            shifts = self.bias_codes.dtype != torch.int32
            bias = on_sums(self.bias_codes, self.bias_scale, codes, self.weight_scale, shifts)
        if codes is not None and self.weight_scale is not None and (bias is not None or self.bias_codes is None):
            kept = self.weight_codes, self.weight_zero_point
            out: Tensor = integer_map(self, codes, self._weight_about_zero, self.weight_scale, bias, args, kwargs, kept)  # type: ignore[arg-type]
        else:
            op: Any = self.op_class.op
            out = op(self, input, self.weight, self.bias, *args, **kwargs)
        if self.act is not None:
            out = self.act(out)
        if self.activation_post_process is not None:
            out = self.activation_post_process(out)
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            op_class = self.__dict__.get("op_class")
            method = getattr(op_class, name, None) if op_class is not None and not name.startswith("__") else None
            if isinstance(method, int) and hasattr(Op, name):
                return method  # which axis is whose
            if not isinstance(method, FunctionType):
                raise
            return method.__get__(self)  # helpers that the QAT class's op calls on itself

    def extra_repr(self) -> str:
        return f"{self.op_class.__name__}, weight {tuple(self.weight_codes.shape)} {self.weight_codes.dtype}"


def fixed_quantizer(quantizer: FakeQuantize, name: str) -> QuantizeDequantize:
    """The fixed form of an activation's fake quantizer.

    Raises:
        StateError: if it observed nothing usable; ``name`` is in the text.
    """
    return QuantizeDequantize(quantizer.spec, *quantizer.fixed_params(name))


def is_deployed(model: nn.Module) -> bool:
    """Whether ``convert`` made this model."""
    return any(isinstance(m, (QuantizedModule, QuantizeDequantize)) for m in model.modules())


def is_qat(model: nn.Module) -> bool:
    """Whether ``convert_qat`` made this model."""
    return any(isinstance(m, QATBase) for m in model.modules())
