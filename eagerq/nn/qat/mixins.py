"""``WithBn`` and ``WithAct``: what a norm and an activation add to any QAT host; ``LoneNorm``: a norm that is the host."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eagerq.nn.modules.activation import bounds_of, is_gelu, is_hooked
from eagerq.nn.modules.batchnorm import HoldsNorm, is_foldable, is_plain_norm, scale_and_shift
from eagerq.nn.modules.ops import ScaleOp, fold
from eagerq.nn.qat.base import QATBase, QATOp, activated, member
from eagerq.nn.qat.split import SplitActivation, split
from eagerq.quant.fake_quantize import FakeQuantize
from eagerq.quant.operators import Call
from eagerq.quant.spec import QConfigLike

#: A channel whose largest code is below this is trained on its float weight (see ``WithBn``).
_LEAST_HEALTHY_CODE = 8


def _default_norm(op: nn.Module) -> nn.Module:
    dims = op.weight.dim() - 2  # type: ignore[operator]
    norms = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    features = getattr(op, "out_channels", None) or op.out_features
    return norms[dims](features, device=op.weight.device, dtype=op.weight.dtype)  # type: ignore[arg-type]


class WithBn(HoldsNorm, QATOp):
    r"""A QAT op followed by a batch norm, trained as the folded op that will be deployed.

    In eval it is the folded op: weight :math:`a W` and bias :math:`b + a\,bias`, with
    :math:`a = \gamma / \sqrt{\sigma^2 + \epsilon}`, quantized.

    In training, with a weight spec that is per channel, symmetric and narrow, the codes of
    :math:`a W` are those of :math:`W` times :math:`\mathrm{sign}(a)`, so it computes
    :math:`\mathrm{BN}(\mathrm{op}(x, fq(W)))`: no division, no gradient through :math:`a`.

    Any other spec (one scale a tensor; powers of two; grouped transposed convolutions) depends on :math:`a`:
    the textbook form quantizes :math:`a W` and divides by :math:`a` before the norm
    (Krishnamoorthi, 2018, arXiv:1806.08342). A channel whose :math:`a` is so small that its codes
    (nearly) vanish keeps its float weight before the norm, so that statistics stay those of the
    float model, and the deployed weight's error :math:`\mathrm{op}(x, fq(aW) - aW)` is added after it.

    Args:
        bn: the norm, adopted as it is; None makes a new batch norm of the op's width.
    """

    bn: nn.Module

    def __init__(self, *args: Any, bn: nn.Module | None = None, qconfig: QConfigLike | None = None, **kwargs: Any) -> None:
        super().__init__(*args, qconfig=qconfig, **kwargs)
        self.bn = _default_norm(self) if bn is None else bn

    def _adopt(self, members: list[nn.Module]) -> None:
        norm = members.pop()
        super()._adopt(members)
        self.bn = norm
        self.freeze_bn = members[0].training and not norm.training

    def norm(self) -> nn.Module:
        return self.bn

    def is_deployable(self) -> bool:
        return is_foldable(self.bn)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        return fold(self, self.effective_weight(), self.bias, *scale_and_shift(self.bn))

    def weight_factor(self) -> Tensor | None:
        return scale_and_shift(self.bn)[0]

    def quantizes_weight_itself(self) -> bool:
        spec = self.qconfig.weight
        if spec is None:
            return True
        scales_along = spec.per_channel and spec.symmetric and spec.narrow_range and not spec.power_of_two
        return scales_along and self.scale_is_per_output()

    def compute(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.check_norm_input(input)
        return super().compute(input, *args, **kwargs)

    def before_norm(self, input: Tensor, *args: Any, **kwargs: Any) -> tuple[nn.Module, Tensor] | None:
        if not self.ends_with_norm():
            return None
        return member(self, "bn"), self.norm_input(input, *args, **kwargs)

    def norm_input(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.check_norm_input(input)
        return super().train_compute(input, *args, **kwargs)

    def ends_with_norm(self) -> bool:
        """Whether the norm is the last that training computes."""
        return member(self, "weight_fake_quant") is None or self.quantizes_weight_itself() or not is_foldable(self.bn)

    def train_compute(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(part is not None and is_hooked(part) for part in (member(self, "bn"), member(self, "weight_fake_quant"))):
            self.unsettle()
        if self.ends_with_norm():
            out: Tensor = member(self, "bn")(super().train_compute(input, *args, **kwargs))
            return out
        quantizer: Any = self.weight_fake_quant
        scale = scale_and_shift(self.bn)[0].detach().to(self.weight.dtype)
        float_weight = self.effective_weight()
        scaled = self.scale_weight(float_weight, scale)
        quantized = quantizer(scaled)
        if not quantizer.fake_quant_enabled:
            out = self.bn(self.op(input, float_weight, self.bias, *args, **kwargs))
            return out
        with torch.no_grad():
            used = quantizer.scale if quantizer.observed else quantizer.params_for(scaled)[0]
            step = quantizer.along_axis(used, scaled.dim()).to(scaled.dtype)
            healthy = self.output_amax(quantized / step) >= _LEAST_HEALTHY_CODE
            keep = healthy.to(scaled.dtype)
            error = self.scale_weight(quantized - scaled, 1 - keep)
        divided = self.scale_weight(quantized, torch.where(healthy, scale, 1).reciprocal() * keep)
        weight = divided + self.scale_weight(float_weight, 1 - keep)
        out = self.bn(self.op(input, weight, self.bias, *args, **kwargs))
        return out + self.op(input, error, None, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch.ao's oldest layout keeps the norm's entries in the module itself, under its own names
        old = {"gamma": "weight", "beta": "bias"}
        for name in ("gamma", "beta", "running_mean", "running_var", "num_batches_tracked"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}bn.{old.get(name, name)}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoneNorm(WithBn, ScaleOp):
    r"""A batch norm with no linear map before it: itself in training, a depthwise convolution of size 1 in eval.

    Integer engines have no batch norm: :math:`a x + b` is :math:`\mathrm{conv}(x, a \cdot 1) + b`, whose weight codes are
    :math:`\pm 127` of scale :math:`|a|/127` where scales are per channel, which loses nothing: there, training is the float
    norm's, bit for bit, between the quantizers of input and output. With one scale a tensor it is ``WithBn``'s textbook form.

    ``weight`` is ones, ``(C, 1, ..., 1)``, and no parameter; the norm's own, and its settings, are those of ``bn``.
    Arguments: those of the norm and ``qconfig``.
    """

    #: The axes of the input behind its channels.
    spatial: ClassVar[int]

    def __init__(self, *args: Any, qconfig: QConfigLike | None = None, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self._adopt([self._FLOAT_MODULE(*args, **kwargs)])
        self._init_quantizers(qconfig)

    def _adopt(self, members: list[nn.Module]) -> None:
        (self.bn,) = members
        self.take_settings(self.bn)
        self.in_channels = self.out_channels = self.groups = int(self.bn.num_features)  # type: ignore[arg-type]
        self.kernel_size = self.stride = self.dilation = (1,) * self.spatial
        self.padding, self.padding_mode = (0,) * self.spatial, "zeros"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        like = next((t for t in (*self.bn.parameters(), *self.bn.buffers()) if t.is_floating_point()), torch.empty(0))
        return torch.ones((self.groups, *(1,) * (self.spatial + 1)), dtype=like.dtype, device=like.device)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            norm = self.__dict__.get("_modules", {}).get("bn")
            if norm is None or name in ("weight", "bias") or name.startswith("__"):
                raise
            return getattr(norm, name)  # running_mean and the like, for code that reads them from outside

    def before_norm(self, input: Tensor, *args: Any, **kwargs: Any) -> tuple[nn.Module, Tensor] | None:
        return None if args or kwargs or not self.ends_with_norm() else (member(self, "bn"), self.norm_input(input))

    def norm_input(self, input: Tensor) -> Tensor:  # type: ignore[override]  # a norm takes nothing else
        self.check_norm_input(input)
        return input

    def train_compute(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        quantizer = member(self, "weight_fake_quant")
        if self.ends_with_norm() or not quantizer.fake_quant_enabled:  # a convolution by ones changes nothing
            out: Tensor = member(self, "bn")(input, *args, **kwargs)
            return out
        return super().train_compute(input, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):  # a float norm's own keys; the statistics' are torch.ao's oldest too
            if prefix + name in state_dict:
                state_dict[f"{prefix}bn.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _split_of(act: nn.Module) -> SplitActivation | None:
    """The activation, if it is a gate or a sigmoid in quantized steps."""
    return act if type(act) is SplitActivation and (act.gate is not None or act.squash is not None) else None


class HoldsAct(QATBase):
    """An activation behind what ``preactivation`` computes, in one pass with the output's quantizer where there is one."""

    act: nn.Module

    def preactivation(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the activation is applied to."""
        raise NotImplementedError  # pragma: no cover

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if type(self).compute is not HoldsAct.compute:  # a class of the user's own says what it computes
            return super().forward(input, *args, **kwargs)
        quantizes_input, act = member(self, "input_fake_quant"), member(self, "act")
        quantizer = member(self, "activation_post_process")
        if quantizes_input is not None:
            input = quantizes_input(input)
        alone = not (args or kwargs)
        settled = self.settled() if alone else None
        before: tuple[nn.Module, Tensor] | None = None
        if settled is not None:
            x = self.norm_input(input) if settled.with_norm else self.preactivation(input)
            if settled.serves(x, settled.with_norm):
                return settled.call(x)
            before = (member(self, "bn"), x) if settled.with_norm else None
        bounds, steps = bounds_of(act), _split_of(act)
        if settled is None:
            ends_norm = bounds is not None or (steps is not None and steps.gate is not None)
            if ends_norm and self.asks_kernels(input, quantizer):
                before = self.before_norm(input, *args, **kwargs)
            x = self.preactivation(input, *args, **kwargs) if before is None else before[1]
        done: Tensor | None = None
        if before is not None:
            norm, _ = before
            if is_plain_norm(norm, x):
                done = quantizer.of_norm(norm, x, bounds) if steps is None else steps.of_norm(norm, x, quantizer)
            if done is not None:
                if alone:
                    self.settle_end(x, quantizer, norm, act)
                return done
            x = norm(x)
        if steps is not None and (done := steps.in_one_pass(x, quantizer)) is not None:
            if before is None and alone:
                self.settle_end(x, quantizer, None, act)
            return done
        if bounds is None and is_gelu(act) and type(quantizer) is FakeQuantize and not is_hooked(quantizer):
            done = quantizer.of_gelu(x)
            if done is not None:
                if alone:
                    self.settle_end(x, quantizer, None, act)
                return done
        return activated(act, bounds, quantizer, x)

    def end_call(self, x: Tensor, quantizer: FakeQuantize, norm: nn.Module | None, act: nn.Module | None) -> Call | None:
        if isinstance(act, SplitActivation):
            return act.call(x, quantizer, norm)
        if norm is None or act is None:
            return quantizer.gelu_call(x)
        bounds = bounds_of(act)
        return None if bounds is None else quantizer.norm_call(x, norm, bounds)

    def compute(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.act(self.preactivation(input, *args, **kwargs))
        return out


class WithAct(HoldsAct):
    """A QAT module followed by an activation, adopted as it is; None makes a ReLU."""

    weight: Tensor

    def __init__(self, *args: Any, act: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.act = nn.ReLU() if act is None else act

    def _adopt(self, members: list[nn.Module]) -> None:
        act = members.pop()
        super()._adopt(members)
        self.act = act

    def split_activation(self) -> None:
        """Quantize before the activation too, if the config asks for it; for where the output is quantized."""
        self.act = split(self.act, self.qconfig, self.weight)

    def _runs_itself(self) -> tuple[nn.Module, ...]:
        return (self.act, *super()._runs_itself())

    def preactivation(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super(HoldsAct, self).compute(input, *args, **kwargs)  # of what stands behind this mixin


class NormActQAT(HoldsNorm, HoldsAct):
    """A batch norm and an activation with no op before them: float arithmetic, quantized output.

    Args:
        bn, act: adopted as they are.
        qconfig: a ``QConfig`` or preset name.
    """

    def __init__(self, bn: nn.Module, act: nn.Module | None = None, *, qconfig: QConfigLike | None = None) -> None:
        super().__init__()
        self.bn = bn
        self.act = nn.ReLU() if act is None else act
        self._init_quantizers(qconfig)

    def _adopt(self, members: list[nn.Module]) -> None:
        self.bn, self.act = members
        self.freeze_bn = members[1].training and not members[0].training

    def _runs_itself(self) -> tuple[nn.Module, ...]:
        return (self.bn, self.act)

    def norm(self) -> nn.Module:
        return self.bn

    def preactivation(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_hooked(self.bn):
            self.unsettle()
        out: Tensor = self.bn(input, *args, **kwargs)
        return out

    def before_norm(self, input: Tensor, *args: Any, **kwargs: Any) -> tuple[nn.Module, Tensor] | None:
        return None if args or kwargs else (self.bn, input)

    def norm_input(self, input: Tensor) -> Tensor:
        return input
