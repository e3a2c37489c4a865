"""The laws themselves: each reports the fault it is there for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import eagerq
from eagerq.nn.quantized import QuantizedModule

from .laws import broken_laws, randomised

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def build() -> nn.Module:
    convs = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(128, 5))


def _nothing(model: nn.Module) -> None:
    pass


def _another_eps(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eps = 2e-5


def _another_momentum(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).momentum = 0.11


def _other_codes(model: nn.Module) -> None:
    codes = next(m for m in model.modules() if isinstance(m, QuantizedModule)).weight_codes
    codes[5:].neg_()  # the first channels have a gamma of zero, or next to it


@pytest.mark.parametrize(
    ("verb", "fault", "words"),
    [
        ("convert_qat", _nothing, ""),
        ("fuse_modules", _another_eps, "fused: "),
        ("fuse_modules", _another_momentum, "fused: statistics differ"),
        ("convert_qat", _another_eps, "QAT without fake quantization"),
        ("convert_qat", _another_momentum, "QAT without fake quantization"),
        ("convert", _other_codes, "deployed: output differs"),
    ],
)
def test_a_fault_is_reported(
    verb: str, fault: Callable[[nn.Module], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(eagerq, verb)

    def faulty(*args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = original(*args, **kwargs)
        fault(model)
        return model

    monkeypatch.setattr(eagerq, verb, faulty)
    problems, facts = broken_laws(randomised(build).train(), X)
    assert facts["quantized"] == 3
    assert bool(problems) == bool(words)
    assert not words or any(problem.startswith(words) for problem in problems)
