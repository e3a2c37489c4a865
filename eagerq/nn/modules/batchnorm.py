"""Batch normalisation: frozen modules, and the affine map a norm is in eval."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eagerq.errors import ModelError
from eagerq.nn.modules.activation import is_hooked

_Self = TypeVar("_Self", bound="_FrozenBatchNorm")


class _FrozenBatchNorm(nn.Module):
    r"""Batch normalisation whose statistics and affine map are buffers and never change.

    :math:`y_c = x_c\, a_c + (\beta_c - \mu_c a_c)` with
    :math:`a_c = \gamma_c / \sqrt{\sigma^2_c + \epsilon}`.

    Args:
        num_features: number of channels C.
        eps: added to the variance.

    Shape: input and output ``(N, C, *)``.
    Buffers ``weight``, ``bias``, ``running_mean``, ``running_var``, each ``(C,)``: the keys of
    torchvision's FrozenBatchNorm2d.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    _dims: tuple[int, ...] = ()

    def __init__(self, num_features: int, eps: float = 1e-5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), fill, device=device, dtype=dtype))

    @classmethod
    def from_float(cls: type[_Self], mod: nn.Module) -> _Self:
        """The frozen form of a batch norm: the same statistics and affine values, as buffers.

        Raises:
            ModelError: if ``mod`` keeps no running statistics.
        """
        mean, var = getattr(mod, "running_mean", None), getattr(mod, "running_var", None)
        if mean is None or var is None:
            raise ModelError(
                f"{cls.__name__}.from_float wants a norm with running statistics, found {type(mod).__name__} without;"
                " build it with track_running_stats=True."
            )
        frozen = cls(mean.shape[0], mod.eps, device=mean.device, dtype=mean.dtype)  # type: ignore[arg-type]
        frozen.running_mean, frozen.running_var = mean, var
        for name in ("weight", "bias"):
            value = getattr(mod, name, None)
            if value is not None:
                setattr(frozen, name, value.detach() if isinstance(value, nn.Parameter) else value)
        return frozen.train(mod.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in self._dims:
            raise ValueError(
                f"{type(self).__name__} wants an input of {' or '.join(map(str, self._dims))} axes, found {x.dim()}."
            )
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(shape) + shift.reshape(shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class FrozenBatchNorm1d(_FrozenBatchNorm):
    r"""Frozen batch normalisation over ``(N, C)`` or ``(N, C, L)``: statistics and affine map are buffers and never change.

    :math:`y_c = x_c\, a_c + (\beta_c - \mu_c a_c)`, :math:`a_c = \gamma_c / \sqrt{\sigma^2_c + \epsilon}`. ``from_float`` takes
    a batch norm with running statistics.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
    """

    _dims = (2, 3)


class FrozenBatchNorm2d(_FrozenBatchNorm):
    r"""Frozen batch normalisation over ``(N, C, H, W)``: statistics and affine map are buffers and never change.

    :math:`y_c = x_c\, a_c + (\beta_c - \mu_c a_c)`, :math:`a_c = \gamma_c / \sqrt{\sigma^2_c + \epsilon}`. ``from_float`` takes
    a batch norm with running statistics.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
    """

    _dims = (4,)


class FrozenBatchNorm3d(_FrozenBatchNorm):
    r"""Frozen batch normalisation over ``(N, C, D, H, W)``: statistics and affine map are buffers and never change.

    :math:`y_c = x_c\, a_c + (\beta_c - \mu_c a_c)`, :math:`a_c = \gamma_c / \sqrt{\sigma^2_c + \epsilon}`. ``from_float`` takes
    a batch norm with running statistics.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
    """

    _dims = (5,)


#: The norms that fold into the linear map before them, by number of spatial axes.
NORMS_1D: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.SyncBatchNorm, FrozenBatchNorm1d)
NORMS_2D: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
NORMS_3D: tuple[type[nn.Module], ...] = (nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm3d)


def is_foldable(norm: nn.Module) -> bool:
    """Whether the norm has running statistics, so that in eval it is a fixed affine map."""
    return getattr(norm, "running_mean", None) is not None and getattr(norm, "running_var", None) is not None


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    r"""What the norm does in eval, :math:`y_c = a_c x_c + b_c`, as ``(a, b)``, each ``(C,)``.

    :math:`a = \gamma / \sqrt{\sigma^2 + \epsilon},\; b = \beta - \mu a`, in float32 at least.

    Raises:
        ModelError: if the norm keeps no running statistics.
    """
    if not is_foldable(norm):
        raise ModelError(
            f"wanted a norm with running statistics, found {type(norm).__name__} without; it cannot be folded."
            " Build it with track_running_stats=True."
        )
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    var: Tensor = norm.running_var  # type: ignore[assignment]
    dtype = torch.promote_types(mean.dtype, torch.float32)
    scale = torch.rsqrt(var.to(dtype) + norm.eps)  # type: ignore[operator]
    weight, bias = norm.weight, norm.bias
    if isinstance(weight, Tensor):
        scale = scale * weight.to(dtype)
    shift = -mean.to(dtype) * scale
    if isinstance(bias, Tensor):
        shift = shift + bias.to(dtype)
    return scale, shift


#: The axes of what PyTorch's own norms take.
_AXES: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


def is_plain_norm(norm: nn.Module, x: Tensor) -> bool:
    """Whether ``norm(x)`` is what PyTorch's own batch norms compute where they learn, and no more."""
    if x.dim() not in _AXES.get(type(norm), ()) or is_hooked(norm):
        return False
    if "forward" in norm.__dict__:  # somebody's own, on this one alone
        return False
    if not (norm.training and norm.track_running_stats) or norm.momentum is None:
        return False
    channels = x.shape[1]
    if not channels < x.numel() < 2**30 * channels:  # of one value a channel the norm says what is wrong
        return False
    parameters, buffers = norm._parameters, norm._buffers
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        held = (weight, bias, buffers["running_mean"], buffers["running_var"])
        batches = buffers["num_batches_tracked"]
    except KeyError:  # one of them is made by other code
        return False
    if (weight is None) != (bias is None) or held[2] is None or held[3] is None:
        return False
    shape, device = x.shape[1:2], x.device
    if batches is not None and (batches.dtype != torch.int64 or batches.device != device):
        return False
    for t in held:  # kernels may read it by its address: one value for each of x's channels, side by side, where x lies
        if t is not None and not (type(t) in _VECTORS and t.shape == shape and t.is_contiguous() and t.device == device):
            return False
    return True


_VECTORS = frozenset({Tensor, nn.Parameter})


class HoldsNorm(nn.Module):
    """Mixin of fused and QAT modules that hold a batch norm and can freeze it.

    ``freeze_bn`` is a Python bool. While it is set, ``train()`` leaves the norm in eval mode, so
    its statistics stay as they are, bit for bit.
    """

    freeze_bn: bool = False

    def norm(self) -> nn.Module:
        """The batch norm."""
        raise NotImplementedError  # pragma: no cover

    def freeze_bn_stats(self) -> HoldsNorm:
        """Normalise with the running statistics, and keep them."""
        self.freeze_bn = True
        self.norm().eval()
        return self

    def update_bn_stats(self) -> HoldsNorm:
        """Normalise with batch statistics in training again, and update the running ones."""
        self.freeze_bn = False
        self.norm().train(self.training)
        return self

    def train(self, mode: bool = True) -> HoldsNorm:
        super().train(mode)
        if self.freeze_bn:
            self.norm().eval()
        return self


def freeze_bn_stats(module: nn.Module) -> None:
    """Keep the statistics of fused and quantized norms as they are; use with ``model.apply(eagerq.freeze_bn_stats)``.

    Norms that no fused or QAT module holds are left to the caller's own ``norm.eval()``.
    """
    if isinstance(module, HoldsNorm):
        module.freeze_bn_stats()


def update_bn_stats(module: nn.Module) -> None:
    """Update the statistics of fused and quantized norms in training again; use with ``model.apply(eagerq.update_bn_stats)``."""
    if isinstance(module, HoldsNorm):
        module.update_bn_stats()
