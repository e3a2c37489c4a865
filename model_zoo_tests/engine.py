"""What QAT trained beside what ONNX Runtime computes, on nets of timm with random weights and statistics."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import eagerq

from .laws import randomise

#: The nets whose every code must be the engine's.
NETS = (
    "resnet18",
    "resnet50",
    "mobilenetv2_100",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "regnety_004",
    "densenet121",
    "repvgg_a0",
    "hrnet_w18_small",
    "vgg11_bn",
)


def qat_of(name: str, size: int, num_classes: int = 100, batch: int = 4) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """The float model, its QAT model in eval mode, and the batches it has observed."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes).train()
    randomise(model)
    batches = [torch.randn(batch, 3, size, size) for _ in range(2)]
    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=batches[0]), example_inputs=batches[0])
    with torch.no_grad():
        for x in batches:
            qat(x)
    return model.eval(), qat.eval(), batches


@dataclasses.dataclass(frozen=True)
class Deployed:
    """One net, deployed.

    Attributes:
        export: the file's kernels.
        verification: every code of it, in the engine and in the exact mode.
        size_ratio: bytes of the file over those of the float parameters and buffers.
    """

    export: eagerq.Export
    verification: eagerq.Verification
    size_ratio: float


def verified(name: str, size: int, folder: Path, batches: int, batch: int = 2) -> Deployed:
    """Deploy a net and compare it on random batches."""
    model, qat, seen = qat_of(name, size)
    of_float = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    deployed = eagerq.convert(qat, inplace=True)
    export = eagerq.export_onnx(deployed, folder / f"{name}.onnx", seen[0])
    found = eagerq.verify_deployment(deployed, export, [torch.randn(batch, 3, size, size) for _ in range(batches)])
    return Deployed(export, found, export.path.stat().st_size / of_float)
