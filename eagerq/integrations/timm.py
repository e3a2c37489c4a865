"""timm: norms with activation, padded convolutions, the sums of HRNet, input sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm.layers as layers
import torch
from timm.layers import activations as acts
from timm.layers.norm_act import SyncBatchNormAct
from timm.models.hrnet import HighResolutionModule
from torch import Tensor, nn

from eagerq.integrations import Expansion, retyped
from eagerq.nn.modules.activation import IDEMPOTENT
from eagerq.nn.modules.add import Add
from eagerq.nn.modules.batchnorm import FrozenBatchNorm2d
from eagerq.nn.modules.conv import Conv2dSame
from eagerq.nn.modules.hooks import POST_HOOKS, PRE_HOOKS
from eagerq.surgery import own_method

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    acts.Swish,
    acts.Mish,
    acts.Sigmoid,
    acts.Tanh,
    acts.HardSwish,
    acts.HardSigmoid,
    acts.HardMish,
    acts.PReLU,
    acts.GELU,
    acts.GELUTanh,
    acts.QuickGELU,
)


def _norm_act(module: nn.Module, norm: nn.Module) -> Expansion:
    """A norm with drop and activation inside: (norm, activation), or the norm alone if something is dropped between."""
    drop, act = getattr(module, "drop", nn.Identity()), getattr(module, "act", nn.Identity())
    if type(drop) is not nn.Identity:
        rest = nn.Sequential(drop, act)
        rest.training = module.training  # not train(), which would set the modes of the module's own children
        return Expansion((norm,), rest)
    return Expansion((norm,) if type(act) is nn.Identity else (norm, act))


def expand(module: nn.Module) -> Expansion | None:
    """Take timm's own types apart; None for any other."""
    kind = type(module)
    if kind is layers.BatchNormAct2d:
        return _norm_act(module, retyped(module, nn.BatchNorm2d))
    if kind is SyncBatchNormAct:
        return _norm_act(module, retyped(module, nn.SyncBatchNorm))
    if kind is layers.FrozenBatchNormAct2d:
        norm = retyped(module, FrozenBatchNorm2d)
        norm.num_features = norm.weight.shape[0]
        return _norm_act(module, norm)
    if kind is layers.Conv2dSame:
        conv = retyped(module, Conv2dSame)
        conv.same_padding = True
        return Expansion((conv,))
    if kind is layers.Linear:
        return Expansion((retyped(module, nn.Linear),))
    return None


class HighResolutionModuleWithSums(HighResolutionModule):  # type: ignore[misc]
    """HRNet's exchange between branches: each sum and each activation is a module of its own, which may hold a quantizer."""

    fuse_sums: nn.ModuleList
    fuse_acts: nn.ModuleList

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        for i, branch in enumerate(self.branches):
            x[i] = branch(x[i])
        results = []
        outputs: Any = zip(self.fuse_layers, self.fuse_sums, self.fuse_acts, strict=True)
        for terms, sums, act in outputs:
            y = terms[0](x[0])
            for i, add in enumerate(sums, 1):
                y = add(y, terms[i](x[i]))
            results.append(act(y))
        return results


def open_sums(module: nn.Module) -> Callable[[], None] | None:
    """Let HRNet's module call its sums as modules, and say what takes that back; None for others, and where a user changed it."""
    if type(module) is not HighResolutionModule or module.num_branches == 1 or own_method(module) is not None:
        return None
    act: Any = module.fuse_act
    outputs: Any = module.fuse_layers
    if type(act) not in IDEMPOTENT or any(getattr(act, hooks) for hooks in (*PRE_HOOKS, *POST_HOOKS)):  # a copy does what it does
        return None
    sums = nn.ModuleList(nn.ModuleList(Add() for _ in terms[1:]) for terms in outputs).train(module.training)
    acts = nn.ModuleList(copy.deepcopy(act) for _ in outputs)
    acts.training = module.training
    module._modules.update(fuse_sums=sums, fuse_acts=acts)
    module.__class__ = HighResolutionModuleWithSums

    def close() -> None:
        module.__class__ = HighResolutionModule
        del module._modules["fuse_sums"], module._modules["fuse_acts"]

    return close


def example_inputs(model: nn.Module) -> torch.Tensor | None:
    """A batch of two of the size in the model's ``pretrained_cfg``, or that its patches are made for, with the channels its stem
    takes."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if cfg is not None and not isinstance(cfg, dict):
        cfg = vars(cfg)
    size = (cfg or {}).get("input_size")
    if not size:
        return None
    stem = dict(model.named_modules()).get(str(cfg.get("first_conv")))
    channels = getattr(stem, "in_channels", size[0])  # create_model(in_chans=...) changes the stem, not the cfg
    if channels in (4 * size[0], 16 * size[0]):  # a stem after space-to-depth
        channels = size[0]
    made_for = getattr(getattr(model, "patch_embed", None), "img_size", None)  # by create_model(img_size=...), not in the cfg
    if isinstance(made_for, tuple):
        size = (size[0], *made_for)
    parameter = next(model.parameters(), None)
    if parameter is None:
        return None
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    return torch.zeros(2, channels, *size[1:], dtype=dtype, device=parameter.device)
