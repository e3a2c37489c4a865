"""transformers: activations, frozen batch norms, inputs from a model's config or its ``dummy_inputs``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import activations as acts

from eagerq.integrations import Expansion, retyped
from eagerq.nn.modules.batchnorm import FrozenBatchNorm2d

#: Elementwise and of one argument; which of them there are depends on the version.
ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    dict.fromkeys(
        getattr(acts, name)
        for name in (
            "GELUActivation",
            "GELUTanh",
            "PytorchGELUTanh",
            "NewGELUActivation",
            "FastGELUActivation",
            "QuickGELUActivation",
            "ClippedGELUActivation",
            "AccurateGELUActivation",
            "SiLUActivation",
            "MishActivation",
            "ReLUSquaredActivation",
            "SqrtSoftplusActivation",
        )
        if hasattr(acts, name)
    )
)


_MODELS = "transformers.models"
#: Frozen batch norms, all copies of DETR's.
FROZEN_NORMS = frozenset(
    f"{_MODELS}.{folder}.modeling_{folder}.{prefix}FrozenBatchNorm2d"
    for folder, prefix in (
        ("conditional_detr", "ConditionalDetr"),
        ("d_fine", "DFine"),
        ("dab_detr", "DabDetr"),
        ("deformable_detr", "DeformableDetr"),
        ("deimv2", "Deimv2"),
        ("detr", "Detr"),
        ("grounding_dino", "GroundingDino"),
        ("mm_grounding_dino", "MMGroundingDino"),
        ("pp_doclayout_v2", "PPDocLayoutV2"),
        ("pp_doclayout_v3", "PPDocLayoutV3"),
        ("pp_doclayout_v4", "PPDocLayoutV4"),
        ("rt_detr", "RTDetr"),
        ("rt_detr_v2", "RTDetrV2"),
        ("table_transformer", "TableTransformer"),
    )
)
#: Convolutions that differ from PyTorch's in their constructor only.
CONVS = frozenset(
    {
        f"{_MODELS}.align.modeling_align.AlignVisionDepthwiseConv2d",
        f"{_MODELS}.efficientnet.modeling_efficientnet.EfficientNetDepthwiseConv2d",
    }
)


def expand(module: nn.Module) -> Expansion | None:
    """Take transformers' own types for what they are; None for any other."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind in FROZEN_NORMS:
        norm = retyped(module, FrozenBatchNorm2d)
        norm.num_features, norm.eps = norm.weight.shape[0], 1e-5
        return Expansion((norm,))
    if kind in CONVS:
        return Expansion((retyped(module, nn.Conv2d),))
    return None


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Pixel values of the configured size for a vision model, else the model's ``dummy_inputs`` where they are its own."""
    if not isinstance(model, PreTrainedModel):
        return None
    if model.main_input_name == "pixel_values":
        size = _configured(model.config, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        channels = _configured(model.config, "num_channels", 3)
        return {"pixel_values": torch.zeros(2, channels, height, width, dtype=model.dtype, device=model.device)}
    return dict(model.dummy_inputs) if model.main_input_name in model.dummy_inputs else None


def _configured(config: Any, name: str, default: Any) -> Any:
    """A setting of the model, or of the backbone it is built on."""
    found = getattr(getattr(config, "backbone_config", None), name, None)
    own = getattr(config, name, None)
    return own if own is not None else found if found is not None else default
