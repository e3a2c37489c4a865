"""torchvision: frozen batch norm, input sizes of its own models."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d as _FrozenBatchNorm2d

from eagerq.integrations import Expansion, retyped
from eagerq.nn.modules.batchnorm import FrozenBatchNorm2d


def expand(module: nn.Module) -> Expansion | None:
    """Take torchvision's own types apart; None for any other."""
    if type(module) is _FrozenBatchNorm2d:
        norm = retyped(module, FrozenBatchNorm2d)
        norm.num_features = norm.weight.shape[0]
        return Expansion((norm,))
    return None


def example_inputs(model: nn.Module) -> object | None:
    """Inputs of the size torchvision documents for the family the model belongs to."""
    family = type(model).__module__.split(".")
    if family[:2] != ["torchvision", "models"]:
        return None
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    if "detection" in family:
        return ([torch.zeros(3, 320, 320, device=device)],)
    if "video" in family:
        return torch.zeros(2, 3, 16, 112, 112, device=device)
    if "optical_flow" in family:
        return (torch.zeros(2, 3, 128, 128, device=device), torch.zeros(2, 3, 128, 128, device=device))
    size = 299 if family[-1] == "inception" else 224
    return torch.zeros(2, 3, size, size, device=device)
