"""What QAT trained is what the engine computes, bit for bit, on small nets of timm; ``tox -e deploy`` runs all, at 224 px."""

from __future__ import annotations

from pathlib import Path

import pytest

from .engine import NETS, verified

#: A residual net, two with depthwise convolutions, squeeze and excitation, parallel branches.
SMALL = ("resnet18", "mobilenetv2_100", "mobilenetv3_large_100", "regnety_004", "repvgg_a0")


@pytest.mark.parametrize("name", SMALL)
def test_no_code_and_no_logit_differs(name: str, tmp_path: Path) -> None:
    assert name in NETS
    found = verified(name, 64, tmp_path, batches=1)
    assert found.verification.differing == 0, str(found.verification)
    assert found.verification.output_difference == 0.0
    assert found.verification.compared > 500_000
    assert found.size_ratio < 0.3
    assert {kernel.op for kernel in found.export.kernels if kernel.integer} >= {"QLinearConv", "QGemm"}
