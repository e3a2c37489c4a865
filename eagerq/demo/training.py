"""One training loop for the float network and for the QAT one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq.demo.data import Digits, shaken

BATCH = 64
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Mean training loss of one epoch, and the accuracy on the test images after it."""

    stage: str
    loss: float
    accuracy: float


def network() -> nn.Module:
    """timm's resnet18 for grey images, one block a stage and 48 to 384 channels, with random weights."""
    model: nn.Module = timm.create_model("resnet18", in_chans=1, num_classes=10, layers=(1, 1, 1, 1), channels=(48, 96, 192, 384))
    return model


def steps_per_epoch(digits: Digits) -> int:
    """Batches in one pass; the images that do not fill one are left out."""
    return max(1, len(digits.train_labels) // BATCH)


def fit(
    model: nn.Module,
    digits: Digits,
    *,
    stage: str,
    epochs: int,
    rate: float,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
    before_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train with SGD, the rate rising to ``rate`` and falling to nothing."""
    generator = torch.Generator().manual_seed(seed)
    steps = steps_per_epoch(digits)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.2)
    history = []
    for epoch in range(epochs):
        model.train()
        before_epoch(epoch)
        total = 0.0
        for batch in _batches(len(digits.train_labels), steps, generator):
            output = model(shaken(digits.train_images[batch], generator))
            loss = F.cross_entropy(output, digits.train_labels[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item()
            on_step()
        history.append(Epoch(stage, total / steps, accuracy(outputs(model, digits.test_images), digits.test_labels)))
    return history


def _batches(n: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(n, generator=generator)
    return (order[i * BATCH : (i + 1) * BATCH] for i in range(steps))


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs in eval mode, ``(N, 10)``."""
    model.eval()
    return torch.cat([model(part) for part in chunks(images)])


def chunks(images: Tensor) -> tuple[Tensor, ...]:
    """The images in batches that are evaluated at once."""
    return torch.split(images, _CHUNK)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of images whose highest score is at the label."""
    return float((scores.argmax(1) == labels).double().mean())
