"""Two ranks train as one process on the union of their batches; the laws are in ``laws_of_shared_*.py``."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import laws_of_shared_observers as of_observers
import laws_of_shared_training as of_training
import pytest
import torch
import torch.multiprocessing
import two_ranks
from torch import nn

import eagerq
from eagerq.quant import FakeQuantize, Observer, QuantSpec
from eagerq.quant.ranks import Ranks
from eagerq.quant.spec import OBSERVERS

BACKENDS = ("gloo", "nccl") if torch.cuda.device_count() >= two_ranks.WORLD else ("gloo",)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_are_one_process_on_the_union(tmp_path: Path, backend: str) -> None:
    torch.multiprocessing.spawn(two_ranks.run, (str(tmp_path), backend, (*of_observers.LAWS, *of_training.LAWS)), two_ranks.WORLD)


def test_torchrun_runs_the_example(tmp_path: Path) -> None:
    words = (
        f"-m torch.distributed.run --standalone --nproc-per-node 2 {of_training.EXAMPLE} --images 150 --epochs 1 --qat-epochs 1"
    )
    on_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # there may be one GPU, and it takes one for each process
    done = subprocess.run([sys.executable, *words.split(), "--out", str(tmp_path)], capture_output=True, text=True, env=on_cpu)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["float 1/1", "qat 1/1", "deployed"]
    assert {path.name for path in tmp_path.iterdir()} == {"float.pt", "qat.pt", "deployed.pt"}


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_single_process_computes_what_it_did(name: str) -> None:
    asked, plain = (FakeQuantize(QuantSpec(observer=name)) for _ in range(2))  # type: ignore[arg-type]
    asked.apply(eagerq.enable_observer_sync)
    for x in (torch.randn(40), torch.empty(0), torch.randn(40)):
        assert torch.equal(asked(x), plain(x))
        eagerq.sync_observers(asked)
        assert all(torch.equal(a, b) for a, b in zip(asked.buffers(), plain.buffers(), strict=True))
    assert asked.state_dict().keys() == plain.state_dict().keys()


def test_the_switches_reach_activations_only() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    x = torch.randn(2, 1, 6, 6)
    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x))
    observers = [m for m in qat.modules() if isinstance(m, Observer)]
    assert {o.memoryless for o in observers} == {True, False}
    qat.apply(eagerq.enable_observer_sync)
    assert all((o.ranks == Ranks()) != o.memoryless for o in observers)
    assert all(o.ranks is not None or o.memoryless for o in copy.deepcopy(qat).modules() if isinstance(o, Observer))
    qat.apply(eagerq.disable_observer_sync)
    assert all(o.ranks is None for o in observers)
