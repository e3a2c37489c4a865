"""torchvision: frozen batch norm, plain convolutions under other names, input sizes of its own models."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple
from torchvision.ops.misc import FrozenBatchNorm2d as _FrozenBatchNorm2d

from eagerq.integrations import Expansion, retyped
from eagerq.nn.modules.batchnorm import FrozenBatchNorm2d


def expand(module: nn.Module) -> Expansion | None:
    """Take torchvision's own types apart; None for any other."""
    if type(module) is _FrozenBatchNorm2d:
        norm = retyped(module, FrozenBatchNorm2d)
        norm.num_features = norm.weight.shape[0]
        return Expansion((norm,))
    if type(module) in (Conv3DSimple, Conv3DNoTemporal):  # they differ from PyTorch's in their constructor only
        return Expansion((retyped(module, nn.Conv3d),))
    return None


def _target(model: nn.Module, device: torch.device | None) -> dict[str, torch.Tensor]:
    """One object, with what the model's heads learn from; without targets a detector does not run in train mode."""
    target = {
        "boxes": torch.tensor([[40.0, 40.0, 280.0, 280.0]], device=device),
        "labels": torch.ones(1, dtype=torch.int64, device=device),
    }
    heads = getattr(model, "roi_heads", None)
    if getattr(heads, "mask_predictor", None) is not None:
        target["masks"] = torch.ones(1, 320, 320, dtype=torch.uint8, device=device)
    keypoints = getattr(getattr(heads, "keypoint_predictor", None), "kps_score_lowres", None)
    if keypoints is not None:
        target["keypoints"] = torch.full((1, keypoints.out_channels, 3), 160.0, device=device)
    return target


def example_inputs(model: nn.Module) -> object | None:
    """Inputs of the size torchvision documents for the family the model belongs to."""
    family = type(model).__module__.split(".")
    if family[:2] != ["torchvision", "models"]:
        return None
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    if "detection" in family:
        return ([torch.zeros(3, 320, 320, device=device)], [_target(model, device)])
    if "video" in family:
        size = 112 if family[-1] == "resnet" else 224
        return torch.zeros(2, 3, 16, size, size, device=device)
    if "optical_flow" in family:
        return (torch.zeros(2, 3, 128, 128, device=device), torch.zeros(2, 3, 128, 128, device=device))
    size = 299 if family[-1] == "inception" else 224
    return torch.zeros(2, 3, size, size, device=device)
