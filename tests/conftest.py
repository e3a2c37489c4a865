"""One Hypothesis profile, one thread, one seed: a run here is the run of the continuous integration."""

from __future__ import annotations

import os
from typing import Any

import interpreted
import pytest
import torch
from hypothesis import HealthCheck, settings

from eagerq.quant import fast_kernels

_SLOW_IS_FINE = [HealthCheck.too_slow]
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, suppress_health_check=_SLOW_IS_FINE)
settings.register_profile("thorough", deadline=None, max_examples=500, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)  # the tensors here are tiny


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)


@pytest.fixture
def plain_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the ways of CUDA tensors, as on a machine without Triton."""
    monkeypatch.setattr(fast_kernels, "_triton", lambda name: None)
    monkeypatch.setattr(fast_kernels, "are_fast", lambda x: x.dtype in fast_kernels.DTYPES)
    monkeypatch.setattr(fast_kernels, "is_plain", lambda x: fast_kernels.is_tensor(x) and not fast_kernels.is_watched())


@pytest.fixture
def launches(plain_launches: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """CPU tensors take the ways of CUDA tensors, to interpreted kernels; how often each was launched."""
    counts: dict[str, int] = {}
    modules = {name: interpreted.kernels(name) for name in interpreted.NEEDS}  # all, before any of them is changed

    def count(module: Any, name: str, as_name: str) -> None:
        launch = getattr(module, name)

        def counting(*args: Any, **options: Any) -> Any:
            counts[as_name] = counts.get(as_name, 0) + 1
            return launch(*args, **options)

        monkeypatch.setattr(module, name, counting)

    for name in ("masked_gradient", "gelu_gradient", "weight_forward"):
        count(modules["kernels"], name, name)
    count(modules["kernels"].Activation, "__call__", "activation_forward")
    count(modules["gates"].Gated, "__call__", "gated_forward")
    count(modules["sigmoids"].Sigmoid, "__call__", "sigmoid_forward")
    count(modules["norms"].Norm, "statistics", "norm_forward")
    count(modules["gated_norms"].GatedNorm, "__call__", "norm_gated_forward")
    for name, of in (("gates", "gated"), ("sigmoids", "sigmoid"), ("norms", "norm")):
        count(modules[name], "backward", f"{of}_backward")
    monkeypatch.setattr(fast_kernels, "_triton", interpreted.kernels)
    return counts
