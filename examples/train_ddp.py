"""The demo's training on several ranks: DistributedDataParallel, ranges that agree, checkpoint and resume.

    torchrun --nproc-per-node 2 examples/train_ddp.py --out train-ddp

Each batch of 64 is shared out among the ranks, so any number of them trains as one does. Started again with the same
``--out``, it goes on after the last epoch that was finished. Needs ``pip install 'eagerq[demo]'``.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import eagerq
from eagerq.demo.data import Digits, load, shaken
from eagerq.demo.training import BATCH, accuracy, network, outputs, steps_per_epoch


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank, as torchrun starts it."""
    options = parsed(arguments)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        job(options)
    finally:
        dist.destroy_process_group()


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the deployed model's state")
    parser.add_argument("--epochs", type=int, default=8, help="of float training")
    parser.add_argument("--qat-epochs", type=int, default=4, help="of fine-tuning")
    parser.add_argument("--images", type=int, default=None, help="use only so many of the 1,797 images")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def job(options: argparse.Namespace) -> None:
    """Train in float, fuse, fine-tune with QAT, deploy; in a process group that exists."""
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    digits = load(options.seed, options.images)
    torch.manual_seed(options.seed)
    model = network().to(device)
    train(model, "float", options.epochs, 0.05, digits, options)

    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=digits.test_images[:2].to(device)))
    if device.type == "cuda":  # PyTorch's SyncBatchNorm computes on GPUs only
        qat = nn.SyncBatchNorm.convert_sync_batchnorm(qat)
    qat.apply(eagerq.enable_observer_sync)
    train(qat, "qat", options.qat_epochs, 0.005, digits, options)

    if dist.get_rank() == 0:
        deployed = eagerq.convert(qat)
        torch.save(deployed.state_dict(), options.out / "deployed.pt")
        print(f"deployed: {tested(deployed, digits):.2%} of the test images", flush=True)


def train(model: nn.Module, stage: str, epochs: int, rate: float, digits: Digits, options: argparse.Namespace) -> None:
    """SGD with a rate that falls to nothing; from the epoch after this stage's checkpoint, if there is one."""
    device = next(model.parameters()).device
    parallel = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    path = options.out / f"{stage}.pt"
    first = 0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        eagerq.load_checkpoint(model, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epochs"]
    dist.barrier()  # every rank has looked before rank 0 writes again
    for epoch in range(first, epochs):
        parallel.train()
        hold = 0 < epoch == epochs - 1  # in the last epoch statistics and ranges stay as they are
        model.apply(eagerq.freeze_bn_stats if hold else eagerq.update_bn_stats)
        model.apply(eagerq.disable_observer if hold else eagerq.enable_observer)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        loss = torch.zeros((), device=device)
        for images, labels in share(digits, epoch, options.seed):
            step_loss = F.cross_entropy(parallel(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            step_loss.backward()
            optimizer.step()
            loss += step_loss.detach()
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            mean = float(loss) / dist.get_world_size() / steps_per_epoch(digits)
            print(f"{stage} {epoch + 1}/{epochs}: loss {mean:.4f}, {tested(model, digits):.2%} of the test images", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        dist.barrier()


def share(digits: Digits, epoch: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of each of the epoch's batches; ranks draw the same numbers, so nothing is left out or seen twice."""
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    order = torch.randperm(len(digits.train_labels), generator=generator)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batches = order.split(BATCH)[: steps_per_epoch(digits)]
    return [(shaken(digits.train_images[b], generator)[rank::ranks], digits.train_labels[b][rank::ranks]) for b in batches]


def tested(model: nn.Module, digits: Digits) -> float:
    """Accuracy on the test images; in eval mode a rank computes by itself."""
    buffer = next(model.buffers())
    return accuracy(outputs(model, digits.test_images.to(buffer.device)).cpu(), digits.test_labels)


if __name__ == "__main__":
    main()
