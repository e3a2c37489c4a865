"""The digits: 1,797 handwritten ones of 8x8 pixels, which scikit-learn ships."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SIZE = 32
_TEST_SHARE = 0.3
_LEVELS = 16.0


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images ``(N, 1, 32, 32)`` in [0, 1] and labels ``(N,)``, split."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(seed: int, images: int | None = None) -> Digits:
    """A stratified split fixed by ``seed``; of the first ``images`` only, if given."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels[:images], labels[:images]
    parts = train_test_split(pixels, labels, test_size=_TEST_SHARE, stratify=labels, random_state=seed)
    train, test, train_labels, test_labels = parts
    return Digits(_upscaled(train), torch.as_tensor(train_labels), _upscaled(test), torch.as_tensor(test_labels))


def _upscaled(pixels: object) -> Tensor:
    small = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / _LEVELS
    return F.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def shaken(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images, each turned by up to 11 degrees and moved by up to 6 % of its size."""
    n = images.shape[0]
    angle, dx, dy = (torch.rand(3, n, generator=generator) * 2 - 1) * torch.tensor([[0.2], [0.125], [0.125]])
    rows = torch.stack([angle.cos(), -angle.sin(), dx, angle.sin(), angle.cos(), dy], dim=1)
    grid = F.affine_grid(rows.reshape(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
