"""What every QAT module shares: fake quantizers around an op, ``from_float``, and what it deploys to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from eagerq.errors import ModelError, StateError
from eagerq.nn.integer import codes_of, integer_map
from eagerq.nn.intrinsic.fused import Fused, type_name
from eagerq.nn.modules.activation import is_hooked
from eagerq.nn.modules.batchnorm import HoldsNorm, is_plain_norm
from eagerq.nn.modules.hooks import POST_HOOKS, PRE_HOOKS, release_hooks, share_hooks
from eagerq.nn.modules.ops import Op
from eagerq.quant import fast_kernels
from eagerq.quant.code_values import Coded
from eagerq.quant.engine import FollowsEngine
from eagerq.quant.fake_quantize import FakeQuantize, is_recomputing
from eagerq.quant.functional import MIN_SCALE, Bounds, dequantize, power_of_two, quantization_params, quantize, straight_through
from eagerq.quant.operators import Call
from eagerq.quant.settled import Settles
from eagerq.quant.spec import QConfig, QConfigLike, QuantSpec, get_qconfig

_Self = TypeVar("_Self", bound="QATBase")

#: int32 biases stay below this magnitude, so that the accumulator has room.
_BIAS_LIMIT = 2.0**30
#: The most a bias on a grid of its own is shifted to that of the sums: the DPU compiler's bound on ``shift_bias``
#: (Vitis AI 3.5, vai_q_onnx/refine.py).
_BIAS_SHIFT = 2.0**16

_BOOKKEEPING = frozenset(vars(nn.Module())) | {"training"}

#: The methods that make a QAT module's output, and where this library's are written.
_COMPUTING = (
    "compute", "train_compute", "preactivation", "before_norm", "norm_input", "ends_with_norm", "quantizes_weight_itself"
)  # fmt: skip
#: What runs before them.
_ON_THE_WAY = ("effective_weight", "op", "check_norm_input")
#: What parts are to hold numbers in.
_NUMBERS = ("momentum", "eps", "min_val", "max_val")
_WRITTEN_IN = frozenset({"eagerq.nn.qat.base", "eagerq.nn.qat.mixins"})


def member(module: nn.Module, name: str) -> Any:
    """``getattr``, which takes PyTorch many times as long to find a submodule."""
    members = module._modules
    return members[name] if name in members else getattr(module, name)


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """What an integer engine stores of one linear map.

    Attributes:
        codes: integer codes in a float tensor of the weight's shape.
        scale: real value of one code, ``(1,)`` or ``(channels,)`` along ``axis``.
        zero_point: int32, of the shape of ``scale``.
        bias: real, ``(C_out,)``, or None.
        bias_codes: codes of the bias held in float64, or None where the input's scale is unknown or the qconfig keeps it float.
        bias_scale: real value of one bias code, ``(C_out,)``, ``(1,)`` for a bias on a grid of its own, or None.
        weight: the real weight the codes stand for, of the weight's shape and dtype.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    bias_codes: Tensor | None
    bias_scale: Tensor | None
    weight: Tensor


def on_sums(bias: Tensor | None, bias_scale: Tensor | None, x: Coded, weight_scale: Tensor, shifts: bool) -> Tensor | None:
    r"""Codes of a bias in units of the sums :math:`s_x s_w`; None for one that is in other units.

    Those on a grid of their own are shifted, by a power of two. The units are others where this forward goes a way on which
    another quantizer gave the input.
    """
    if bias is None or bias_scale is None:
        return None
    unit = x.grid.scale * weight_scale.reshape(-1).float()
    unit = unit.repeat(bias.numel() // unit.numel())
    if shifts:
        return bias.double() * (bias_scale.double() / unit.double())
    return bias if torch.allclose(bias_scale.float(), unit, rtol=1e-6, atol=0.0) else None


def activated(act: Callable[[Tensor], Tensor], bounds: Bounds | None, quantizer: nn.Module | None, x: Tensor) -> Tensor:
    """``quantizer(act(x))``; in one pass where ``act`` clamps to ``bounds`` and a kernel serves both."""
    if bounds is not None and type(quantizer) is FakeQuantize and quantizer.is_one_pass(x) and not is_hooked(quantizer):
        return quantizer.of_activation(x, bounds)
    out = act(x)
    return out if quantizer is None else quantizer(out)  # type: ignore[no-any-return]


class QATBase(Settles, FollowsEngine, nn.Module):
    """A module with a QAT form: what it converts, its qconfig and its activation quantizers.

    ``activation_post_process`` quantizes the output, ``input_fake_quant`` the input; each is None
    until ``convert_qat`` decides where a tensor is quantized.
    """

    #: The float class ``from_float`` takes, exactly; torch.ao's name.
    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nn.Module

    qconfig: QConfig
    activation_post_process: nn.Module | None
    input_fake_quant: nn.Module | None

    #: The methods that make the output, if no class of a user's own, however far up, says what is computed.
    _computing: ClassVar[tuple[Any, ...] | None] = None
    #: Whether code of a user's class runs on the way to the last steps.
    _runs_own: ClassVar[bool] = False

    def __init_subclass__(cls, converts: type[nn.Module] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if converts is not None:
            cls._FLOAT_MODULE = converts
        methods = [vars(c)[name] for c in cls.__mro__ for name in _COMPUTING if name in vars(c)]
        # by where they were written: a wrapper takes on the name and the module of what it wraps
        written = all(getattr(method, "__globals__", {}).get("__name__") in _WRITTEN_IN for method in methods)
        users = [c for c in cls.__mro__ if not c.__module__.startswith(("eagerq.", "torch."))]
        cls._runs_own = any(name in vars(c) for c in users for name in _ON_THE_WAY)
        cls._computing = tuple(getattr(cls, name, None) for name in _COMPUTING) if written else None

    def _init_quantizers(self, qconfig: QConfigLike | None) -> None:
        self.qconfig = get_qconfig("onnxruntime" if qconfig is None else qconfig)
        self.register_module("activation_post_process", None)
        self.register_module("input_fake_quant", None)

    def _adopt(self, members: list[nn.Module]) -> None:
        """Take what this class needs from the end of the float chain."""
        raise NotImplementedError  # pragma: no cover

    def _runs_itself(self) -> tuple[nn.Module, ...]:
        """Members that every forward calls as modules, so that their own hooks fire."""
        return ()

    @classmethod
    def from_float(cls: type[_Self], mod: nn.Module, qconfig: QConfigLike | None = None) -> _Self:
        """The QAT form of ``mod``: the same Parameter objects, norm, activation, mode and hooks.

        Args:
            mod: a module of exactly the class this one converts.
            qconfig: a ``QConfig`` or preset name; None takes ``mod.qconfig`` or the default preset.

        Raises:
            ModelError: if ``mod`` is of another class.
        """
        if type(mod) is not cls._FLOAT_MODULE:
            raise ModelError(
                f"{type_name(cls)}.from_float wants a {type_name(cls._FLOAT_MODULE)}, found {type_name(type(mod))};"
                " fuse first, or use the QAT class of that type."
            )
        if qconfig is None:
            given = getattr(mod, "qconfig", None)
            qconfig = given if isinstance(given, QConfig) else None
        members = list(mod) if isinstance(mod, Fused) else [mod]
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt(list(members))
        self.training = mod.training
        self._init_quantizers(qconfig)
        if isinstance(self, HoldsNorm) and getattr(mod, "freeze_bn", False):
            self.freeze_bn_stats()  # frozen in eval mode too, where the norm's own mode does not tell
        own = self._runs_itself()
        share_hooks(self, [m for m in (mod, members[0]) if m not in own], PRE_HOOKS)
        share_hooks(self, [m for m in (members[-1], mod) if m not in own], POST_HOOKS)
        for member_, kinds in ((members[0], PRE_HOOKS), (members[-1], POST_HOOKS)):
            if member_ not in own and member_ in self.children():  # a norm, which runs inside in training: not to fire twice
                release_hooks(member_, kinds)
        return self

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        quantizes_input = member(self, "input_fake_quant")
        if quantizes_input is not None:
            input = quantizes_input(input)
        alone = not (args or kwargs)
        settled = self.settled() if alone else None
        quantizer = member(self, "activation_post_process")
        before: tuple[nn.Module, Tensor] | None = None
        if settled is not None:  # at a norm, since there is nothing else here
            x = self.norm_input(input)
            if settled.serves(x, True):
                return settled.call(x)
            before = member(self, "bn"), x
        elif self.asks_kernels(input, quantizer):
            before = self.before_norm(input, *args, **kwargs)
        if before is not None:
            norm, x = before
            done: Tensor | None = quantizer.of_norm(norm, x) if is_plain_norm(norm, x) else None
            if done is not None:
                if alone:
                    self.settle_end(x, quantizer, norm)
                return done
        out = self.compute(input, *args, **kwargs) if before is None else before[0](before[1])
        if quantizer is not None:
            out = quantizer(out)
        return out

    def compute(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output before its quantizer."""
        raise NotImplementedError  # pragma: no cover

    def before_norm(self, input: Tensor, *args: Any, **kwargs: Any) -> tuple[nn.Module, Tensor] | None:
        """The norm that ends what this module computes in training, and what it is given; None where none does."""
        return None

    def norm_input(self, input: Tensor) -> Tensor:
        """What that norm is given."""
        raise NotImplementedError  # pragma: no cover

    def settle_end(self, x: Tensor, quantizer: FakeQuantize, norm: nn.Module | None, act: nn.Module | None = None) -> None:
        """Remember the last steps of this module, which a kernel did for x, unless something in them is asked in each batch."""
        if torch.compiler.is_compiling() or is_recomputing():
            return
        call = None
        if self._computing is not None and not self._runs_own and quantizer.may_settle and fast_kernels.is_plain(x):
            call = self.end_call(x, quantizer, norm, act)
        held = () if norm is None else norm._parameters.values()
        if call is None or any(t is not None and type(t) is not nn.Parameter for t in held):  # one call's, to be kept by nobody
            self.unsettle()
            return
        inside = [m for part in (norm, act, quantizer) if part is not None for m in part.modules()]
        if any(isinstance(getattr(m, name, None), Tensor) for m in (norm, act) for name in _NUMBERS):  # and be written in place
            self.unsettle()
            return
        self.settle(tuple(name for name in _COMPUTING if hasattr(type(self), name)), inside, norm, x, call)

    def end_call(self, x: Tensor, quantizer: FakeQuantize, norm: nn.Module | None, act: nn.Module | None) -> Call | None:
        """Those steps, bound to what they read; None where something is asked in each batch."""
        return None if norm is None else quantizer.norm_call(x, norm, (None, None))

    def asks_kernels(self, input: Tensor, quantizer: nn.Module | None) -> bool:
        """Whether kernels may compute this module's last steps together: on their devices, of this library's own methods."""
        if not (self.training and type(quantizer) is FakeQuantize and isinstance(input, Tensor) and fast_kernels.are_fast(input)):
            return False
        own, cls, mine = self._computing, type(self), self.__dict__
        if own is None or is_hooked(quantizer):
            return False
        # none was put in its place since, on the class or on this one alone
        return all(getattr(cls, n, None) is method and n not in mine for n, method in zip(_COMPUTING, own, strict=True))


class QATOp(Op, QATBase):
    """A QAT host: an op whose weight is fake-quantized.

    Weights of a spec that is per channel, symmetric and narrow have the same codes whether or not
    a norm is folded in (up to the sign of its scale), so training quantizes the weight itself.
    """

    weight: Tensor
    bias: Any  # Tensor or None; PyTorch's own classes disagree on its type
    weight_fake_quant: FakeQuantize | None

    def __init__(self, *args: Any, qconfig: QConfigLike | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_quantizers(qconfig)

    def _init_quantizers(self, qconfig: QConfigLike | None) -> None:
        super()._init_quantizers(qconfig)
        if "bias" not in self._parameters:  # an Embedding has none
            self.register_parameter("bias", None)
        self.weight_fake_quant = None
        spec = self.qconfig.weight
        if spec is not None:
            channels = self.weight.shape[self.channel_axis] if spec.per_channel else None
            self.weight_fake_quant = FakeQuantize(
                spec, channels, self.channel_axis, memoryless=True, device=self.weight.device
            ).train(self.training)
            if self.weight.dtype == torch.float64:
                self.weight_fake_quant.double()

    def _adopt(self, members: list[nn.Module]) -> None:
        (source,) = members
        self.take_settings(source)
        if getattr(source, "same_padding", False):  # a fact of the float class, which a fused QAT class does not share
            self.same_padding = True
        for name, parameter in source._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in source._buffers.items():
            self.register_buffer(name, buffer, name not in source._non_persistent_buffers_set)

    def take_settings(self, source: nn.Module) -> None:
        """Hold the attributes that ``source`` holds beside its tensors and modules."""
        self.__dict__.update({k: v for k, v in vars(source).items() if k not in _BOOKKEEPING and k != "forward"})

    @property
    def input_quantizer(self) -> nn.Module | None:
        """The quantizer that gives this module its input: its own, or the producer's."""
        if self.input_fake_quant is not None:
            return self.input_fake_quant
        return self.__dict__.get("_producer_quantizer")

    def set_producer_quantizer(self, quantizer: nn.Module | None) -> None:
        """Remember, without owning it, the quantizer where this module's input is produced."""
        self.__dict__["_producer_quantizer"] = quantizer

    def compute(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.training and self.is_deployable():
            codes = None if self.profile is None else codes_of(input)
            if codes is not None and self.weight_fake_quant is not None and self.weight_fake_quant.fake_quant_enabled:
                stored = self.quantized_weight()
                shifts = isinstance(self.qconfig.bias, QuantSpec)
                bias = on_sums(stored.bias_codes, stored.bias_scale, codes, stored.scale, shifts)
                if bias is not None or stored.bias is None:
                    zero = self.weight_fake_quant.along_axis(stored.zero_point, stored.codes.dim())
                    return integer_map(self, codes, stored.codes - zero, stored.scale, bias, args, kwargs)
            weight, bias = self.deployed()
            return self.op(input, weight, bias, *args, **kwargs)
        return self.train_compute(input, *args, **kwargs)

    def train_compute(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output before activation and quantizer, in training."""
        quantizer = member(self, "weight_fake_quant")
        weight = self.effective_weight()
        if quantizer is not None:
            own = type(quantizer) is FakeQuantize and not is_hooked(quantizer)
            if not own:
                self.unsettle()
            weight = quantizer.of_weight(weight, self._cast_to(weight)) if own else quantizer(weight)
        listed = "bias" in self._parameters  # else it is parametrized, or a replica's
        if not listed:
            self.unsettle()
        return self.op(input, weight, self._parameters["bias"] if listed else self.bias, *args, **kwargs)

    def _cast_to(self, weight: Tensor) -> torch.dtype:
        """The dtype the op computes in under autocast: a quantized weight is written in it at once."""
        if self.casts and weight.is_cuda and torch.is_autocast_enabled("cuda") and weight.dtype == torch.float32:
            return torch.get_autocast_dtype("cuda")
        return weight.dtype

    def effective_weight(self) -> Tensor:
        """The real weight the op applies, of the shape of ``weight``; override it where the float module derives one."""
        weight = self._parameters.get("weight")  # where it lies, unless it is parametrized or a replica's
        if weight is None:
            self.unsettle()
            return self.weight
        return weight

    def is_deployable(self) -> bool:
        """Whether the module is one linear map in eval."""
        return True

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Real weight and bias of the one linear map that this module is in eval."""
        return self.effective_weight(), self.bias

    def quantizes_weight_itself(self) -> bool:
        """Whether codes are taken of the weight as it is trained rather than of the folded one."""
        return True

    def weight_factor(self) -> Tensor | None:
        """The norm's scale on the weight, ``(C_out,)``, or None without a norm."""
        return None

    def deployed(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the eval forward: the values of the integers that ``convert`` stores."""
        weight, bias = self.folded()
        quantizer = self.weight_fake_quant
        dtype = self.weight.dtype
        if quantizer is not None and quantizer.fake_quant_enabled:
            stored = self.quantized_weight()
            weight = straight_through(weight.to(dtype), stored.weight)
            if bias is not None and stored.bias is not None:
                bias = straight_through(bias.to(dtype), stored.bias.to(dtype))
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    @torch.no_grad()
    def quantized_weight(self) -> QuantizedWeight:
        """The integers an engine stores of this module: codes of the folded weight and bias.

        The bias has the scale input scale x weight scale where the input's scale is known, or at least that on a grid of
        its own. A weight scale so small that the bias would leave int32 (or its shift) is raised; such weights are
        negligible beside it.

        Raises:
            StateError: if the weight is kept float.
        """
        quantizer = self.weight_fake_quant
        if quantizer is None:
            raise StateError("wanted a quantized weight, but this module's qconfig keeps it float; give QConfig.weight a spec.")
        spec, of_bias = quantizer.spec, self.qconfig.bias
        weight, bias = self.folded()
        weight = weight.to(quantizer.scale.dtype)
        input_scale = self._input_scale()
        itself = self.quantizes_weight_itself()
        factor = self.weight_factor()
        scale, zero_point = quantizer.params_for(self.effective_weight() if itself else weight)
        floor = torch.full_like(scale, MIN_SCALE)
        if bias is not None and input_scale is not None:
            magnitude, limit = bias.abs().to(scale.dtype), _BIAS_LIMIT
            if isinstance(of_bias, QuantSpec):  # one scale for all of it
                magnitude, limit = magnitude.amax().expand_as(magnitude), of_bias.quant_max * _BIAS_SHIFT
            need = magnitude / (input_scale * limit)
            # channel c has scale c % n: one a channel, one for all, or one for the same place in each group
            floor = torch.maximum(floor, need.reshape(-1, floor.numel()).amax(0))
            floor = power_of_two(floor) if spec.power_of_two else floor
        ndim = weight.dim()
        if itself and factor is not None:
            magnitude = factor.abs().to(scale.dtype)
            deployed_scale = torch.maximum(magnitude * scale, floor)
            own_scale = torch.where(magnitude * scale >= floor, scale, floor / magnitude)
            codes = quantize(
                self.effective_weight().to(scale.dtype),
                quantizer.along_axis(own_scale, ndim),
                quantizer.along_axis(zero_point, ndim),
                spec.quant_min,
                spec.quant_max,
            )
            codes = self.scale_weight(codes, torch.sign(factor).to(codes.dtype))
            scale = deployed_scale
        else:
            scale = torch.maximum(scale, floor)
            codes = quantize(
                weight, quantizer.along_axis(scale, ndim), quantizer.along_axis(zero_point, ndim), spec.quant_min, spec.quant_max
            )
        real = dequantize(codes, quantizer.along_axis(scale, ndim), quantizer.along_axis(zero_point, ndim)).to(self.weight.dtype)
        bias_codes = bias_scale = None
        if bias is not None and input_scale is not None and of_bias is not None:
            bias_scale = (input_scale * scale).reshape(-1)
            if isinstance(of_bias, QuantSpec):
                own, _ = quantization_params(of_bias, *bias.to(scale.dtype).aminmax())
                bias_scale = torch.maximum(own, bias_scale.amax()).reshape(1)  # not finer than the sums
            else:
                bias_scale = bias_scale.repeat(bias.shape[0] // bias_scale.numel())
            bias_codes = torch.round(bias.double() / bias_scale.double())
            bias = (bias_codes * bias_scale.double()).to(bias_scale.dtype)
        return QuantizedWeight(codes, scale, zero_point, bias, bias_codes, bias_scale, real)

    def _input_scale(self) -> Tensor | None:
        quantizer = self.input_quantizer
        if quantizer is None or not getattr(quantizer, "fake_quant_enabled", True):
            return None
        if isinstance(quantizer, FakeQuantize) and not (quantizer.observed or quantizer.is_ready()):
            return None
        scale: Tensor = quantizer.scale  # type: ignore[assignment]
        return scale.reshape(())
