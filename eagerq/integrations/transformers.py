"""transformers: inputs from a model's config or its ``dummy_inputs``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Pixel values of the configured size for a vision model, else the model's ``dummy_inputs``."""
    if not isinstance(model, PreTrainedModel):
        return None
    if model.main_input_name == "pixel_values":
        config = model.config
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.zeros(2, channels, height, width, dtype=model.dtype, device=model.device)}
    return dict(model.dummy_inputs)
