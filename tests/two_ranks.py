"""Two processes of ``torch.distributed``, and what laws between them need.

A law is a function of the rank and of a folder that both share. Its reference is one process on the union of the ranks'
batches, which every rank computes beside its own part.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WORLD = 2
Law = Callable[[int, Path], None]


def run(rank: int, folder: str, backend: str, laws: Sequence[Law]) -> None:
    """What each rank's process runs: all laws in turn; the first that fails ends both processes."""
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=90)
    )
    with contextlib.ExitStack() as changes:
        if backend == "nccl":
            changes.enter_context(device)
        else:
            changes.enter_context(mock.patch.object(nn.SyncBatchNorm, "forward", _norm_on_cpu))
            changes.enter_context(mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"))  # its refusal
        for law in laws:
            torch.manual_seed(0)
            law(rank, Path(folder))
            dist.barrier()
    dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """Of all ranks' tensors; each rank's gradient is the sum of what every rank's result is worth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


def _summed(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


def _norm_on_cpu(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """What SyncBatchNorm computes, which PyTorch refuses to do on a CPU; the run on GPUs takes PyTorch's own."""
    if not self.training:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
    given, x = x.dtype, x.to(self.running_mean.dtype)
    axes, shape = [0, *range(2, x.dim())], (1, -1) + (1,) * (x.dim() - 2)
    count = _Sum.apply(torch.tensor(x.numel() / x.shape[1], dtype=x.dtype))
    center = _Sum.apply(x.sum(axes)) / count
    var = _Sum.apply((x - center.reshape(shape)).square().sum(axes)) / count
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(center, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)
    normal = (x - center.reshape(shape)) * (var + self.eps).rsqrt().reshape(shape)
    return (normal * self.weight.reshape(shape) + self.bias.reshape(shape)).to(given)


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(found), dict(wanted), rtol=0.0, atol=0.0)


def same_everywhere(state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        theirs = [torch.empty_like(value) for _ in range(WORLD)]
        dist.all_gather(theirs, value.contiguous())
        assert torch.equal(*theirs), key


def part(rank: int, x: Tensor) -> Tensor:
    return x.chunk(WORLD)[rank]
