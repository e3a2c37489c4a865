"""One Hypothesis profile, one thread, one seed: a run here is the run of the continuous integration."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

_SLOW_IS_FINE = [HealthCheck.too_slow]
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, suppress_health_check=_SLOW_IS_FINE)
settings.register_profile("thorough", deadline=None, max_examples=500, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)  # the tensors here are tiny


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)
