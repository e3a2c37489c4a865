"""Laws of training on two ranks: DistributedDataParallel, fully_shard and the example; ``two_ranks.py`` runs them."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from two_ranks import WORLD, Law, close, equal, part, same_everywhere

import eagerq
from eagerq.nn.qat.base import QATBase
from eagerq.quant import QConfig, QuantSpec

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_ddp.py"
STEPS = 3
QCONFIGS: dict[str, Any] = {
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
    "per_tensor": "per_tensor",
    "mse": QConfig(QuantSpec(observer="mse"), QuantSpec(signed=True, symmetric=True, per_channel=True, narrow_range=True)),
}


class Net(nn.Module):
    """A stem, a residual block with a depthwise convolution and a gated activation, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm, self.relu = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.deep, self.deep_norm, self.act = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.Hardswish()
        self.wide, self.wide_norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.hidden, self.gelu, self.head = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_norm(self.stem(x)))
        x = x + self.wide_norm(self.wide(self.act(self.deep_norm(self.deep(x)))))
        return self.head(self.gelu(self.hidden(x.mean((2, 3)))))


def _data() -> tuple[Tensor, Tensor]:
    """Images and labels of the union for each step."""
    generator = torch.Generator("cpu").manual_seed(5)
    images = torch.randn(STEPS + 1, 8, 2, 6, 6, generator=generator, dtype=torch.float64, device="cpu")
    labels = torch.randint(0, 3, (STEPS + 1, 8), generator=generator, device="cpu")
    device = torch.get_default_device()
    return images.to(device), labels.to(device)


def _built(qconfig: str, sync: str) -> nn.Module:
    """The QAT model; ``sync`` says when its norms become SyncBatchNorm: ``"before"`` fusing, ``"after"`` converting, or never."""
    torch.manual_seed(3)
    model: nn.Module = Net().double()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(-1.5, 1.5)
                norm.bias.uniform_(-1.0, 1.0)
    if sync == "before":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=torch.zeros(2, 2, 6, 6).double()), QCONFIGS[qconfig])
    if sync == "after":
        qat = nn.SyncBatchNorm.convert_sync_batchnorm(qat)
    kinds = {type(m) for m in qat.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.BatchNorm2d if sync == "never" else nn.SyncBatchNorm}
    assert sum(isinstance(m, QATBase) for m in qat.modules()) == 5
    return qat if sync == "never" else qat.apply(eagerq.enable_observer_sync)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def _parallel(qconfig: str, sync: str) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    model = DistributedDataParallel(_built(qconfig, sync), find_unused_parameters=False)
    return model, _optimizer(model)


def data_parallel_is_one_process_on_the_union(rank: int, folder: Path) -> None:
    """State, gradients, averaged copies and what is deployed; every parameter has a gradient, no buffer changes its shape."""
    images, labels = _data()
    cases = "onnxruntime before, onnxruntime after, tensorrt after, per_tensor before, mse after"
    for qconfig, sync in map(str.split, cases.split(", ")):
        single = _built(qconfig, "never")
        single_optimizer = _optimizer(single)
        model, optimizer = _parallel(qconfig, sync)
        shapes = {key: value.shape for key, value in model.module.state_dict().items()}
        pair = (model.module, single)
        averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True) for m in pair]
        for i in range(STEPS):
            _step(single, single_optimizer, images[i], labels[i])
            _step(model, optimizer, part(rank, images[i]), part(rank, labels[i]))
            for average, m in zip(averages, pair, strict=True):
                average.update_parameters(m)
            assert all(p.grad is not None for p in model.parameters())
            close({k: p.grad for k, p in model.module.named_parameters()}, {k: p.grad for k, p in single.named_parameters()})
            close(dict(model.module.state_dict()), dict(single.state_dict()))
            same_everywhere(model.module.state_dict())
        assert {key: value.shape for key, value in model.module.state_dict().items()} == shapes
        x = images[-1]
        for mine, other in (pair, (averages[0].module, averages[1].module)):
            close(mine.eval()(x), other.eval()(x))
            deployed = eagerq.convert(mine)
            close(deployed(x), mine(x))


def one_reduction_a_step_keeps_ranks_equal(rank: int, folder: Path) -> None:
    """Between forward and backward, as the documentation has it; without it the ranks' ranges differ.

    The batch is quantized by the ranges before it, which are those of the union: so is the step.
    """
    images, labels = _data()
    for qconfig, model in (
        ("per_tensor", DistributedDataParallel(_built("per_tensor", "after"))),
        ("onnxruntime", _sharded("onnxruntime", False)),
    ):
        model.apply(eagerq.disable_observer_sync)
        single = _built(qconfig, "never")
        optimizer, single_optimizer = _optimizer(model), _optimizer(single)
        for i in range(STEPS):
            _step(single, single_optimizer, images[i], labels[i])
            loss = F.cross_entropy(model(part(rank, images[i])), part(rank, labels[i]))
            ranges = [buffer for name, buffer in model.named_buffers() if name.endswith("max_val") and "weight_" not in name]
            theirs = torch.stack(ranges)
            dist.broadcast(theirs, 0)
            assert rank == 0 or not torch.equal(theirs, torch.stack(ranges))
            eagerq.sync_observers(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            same_everywhere(_full(model))
            close({key.removeprefix("module."): value for key, value in _full(model).items()}, dict(single.state_dict()))


def data_parallel_resumes(rank: int, folder: Path) -> None:
    images, labels = _data()
    model, optimizer = _parallel("onnxruntime", "after")
    for i in range(STEPS):
        if i == STEPS - 1:
            if rank == 0:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "ddp.pt")
            dist.barrier()
        _step(model, optimizer, part(rank, images[i]), part(rank, labels[i]))
    saved = torch.load(folder / "ddp.pt", map_location=images.device, weights_only=True)
    fresh, fresh_optimizer = _parallel("onnxruntime", "after")
    eagerq.load_checkpoint(fresh.module, saved)
    fresh_optimizer.load_state_dict(saved["optimizer"])
    _step(fresh, fresh_optimizer, part(rank, images[STEPS - 1]), part(rank, labels[STEPS - 1]))
    equal(fresh.state_dict(), model.state_dict())


def _sharded(qconfig: str, whole: bool, sync: str = "after", **options: Any) -> nn.Module:
    """Each QAT module sharded, and the model around them; or the model alone."""
    model = _built(qconfig, sync)
    mesh = init_device_mesh(torch.get_default_device().type, (WORLD,))
    for module in [] if whole else [m for m in model.modules() if isinstance(m, QATBase)]:
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _full(model: nn.Module) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def fully_sharded_is_one_process_on_the_union(rank: int, folder: Path) -> None:
    images, labels = _data()
    for qconfig, whole in (("onnxruntime", False), ("per_tensor", True), ("tensorrt", False)):
        single, model = _built(qconfig, "never"), _sharded(qconfig, whole)
        optimizers = _optimizer(single), _optimizer(model)
        for i in range(STEPS):
            _step(single, optimizers[0], images[i], labels[i])
            _step(model, optimizers[1], part(rank, images[i]), part(rank, labels[i]))
            assert all(isinstance(p, dist.tensor.DTensor) and p.grad is not None for p in model.parameters())
            grads = {k: p.grad.full_tensor() for k, p in model.named_parameters()}
            close(grads, {k: p.grad for k, p in single.named_parameters()})
            full = _full(model)
            close(full, dict(single.state_dict()))
            same_everywhere(full)
        x = images[-1]
        out = model.eval()(x)
        close(out, single.eval()(x))
        plain = _built(qconfig, "never")
        plain.load_state_dict(full)
        close(eagerq.convert(plain)(x), out)
        for verb in (eagerq.convert, eagerq.fuse_modules):
            try:
                verb(model)
                raise AssertionError("a sharded model was taken")
            except eagerq.errors.ModelError as error:
                assert "full state_dict" in str(error)


def fully_sharded_resumes(rank: int, folder: Path) -> None:
    """From a sharded checkpoint, and from a full one that rank 0 alone holds."""
    images, labels = _data()
    model = _sharded("onnxruntime", False)
    optimizer = _optimizer(model)
    for i in range(STEPS):
        if i == STEPS - 1:
            state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
            dcp.save(state, checkpoint_id=folder / "fsdp")
            full = copy.deepcopy(_full(model))
        _step(model, optimizer, part(rank, images[i]), part(rank, labels[i]))
    fresh = _sharded("onnxruntime", False)
    fresh_optimizer = _optimizer(fresh)
    state = {"model": get_model_state_dict(fresh), "optimizer": get_optimizer_state_dict(fresh, fresh_optimizer)}
    dcp.load(state, checkpoint_id=folder / "fsdp")
    set_model_state_dict(fresh, state["model"])
    set_optimizer_state_dict(fresh, fresh_optimizer, state["optimizer"])
    equal(_full(fresh), full)
    _step(fresh, fresh_optimizer, part(rank, images[STEPS - 1]), part(rank, labels[STEPS - 1]))
    equal(_full(fresh), _full(model))
    other = _sharded("onnxruntime", True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, dict(full) if rank == 0 else {}, options=options)  # it writes into what it is given
    equal(_full(other), full)


def what_is_sharded_before_it_has_memory_takes_a_full_state(rank: int, folder: Path) -> None:
    """Built on the meta device; until a checkpoint comes its quantizers know no range, whatever lies in that memory."""
    images, labels = _data()
    whole = _built("onnxruntime", "after")
    _step(whole, _optimizer(whole), images[0], labels[0])
    device = torch.get_default_device()
    mesh = init_device_mesh(device.type, (WORLD,))
    with torch.device("meta"):
        model = _built("onnxruntime", "after")
    for module in [m for m in model.modules() if isinstance(m, QATBase)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh).to_empty(device=device)
    assert not any(m.has_range() for m in model.modules() if isinstance(m, eagerq.FakeQuantize))
    set_model_state_dict(model, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
    equal(_full(model), whole.state_dict())
    close(model.eval()(images[1]), whole.eval()(images[1]))


def half_precision_leaves_quantizers_alone(rank: int, folder: Path) -> None:
    images, labels = _data()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    model = _sharded("onnxruntime", False, mp_policy=policy)
    model.float()
    optimizer = _optimizer(model)
    for i in range(STEPS):
        _step(model, optimizer, part(rank, images[i].float()), part(rank, labels[i]))
    state = _full(model)
    assert {value.dtype for key, value in state.items() if key.endswith(("scale", "min_val", "weight"))} == {torch.float32}
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    same_everywhere(state)
    plain = _built("onnxruntime", "never").float()
    plain.load_state_dict(state)
    eagerq.convert(plain)


def the_example_goes_on_where_it_stopped(rank: int, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("train_ddp", EXAMPLE)
    example: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(example)  # type: ignore[union-attr]

    def job(name: str) -> dict[str, Tensor]:
        words = f"--out {folder / name} --images 150 --epochs 1 --qat-epochs 2"
        with torch.device("cpu"):  # it chooses its device itself
            example.job(example.parsed(words.split()))
        dist.barrier()
        return torch.load(folder / name / "deployed.pt", weights_only=True)

    whole = job("whole")
    stop = mock.Mock(side_effect=InterruptedError)
    shares = mock.Mock(side_effect=lambda *args: (stop if shares.call_count == 3 else share)(*args))
    share = example.share
    with mock.patch.object(example, "share", shares), contextlib.suppress(InterruptedError):
        job("stopped")
    assert stop.called
    equal(job("stopped"), whole)


LAWS: tuple[Law, ...] = (
    data_parallel_is_one_process_on_the_union,
    one_reduction_a_step_keeps_ranks_equal,
    data_parallel_resumes,
    fully_sharded_is_one_process_on_the_union,
    fully_sharded_resumes,
    what_is_sharded_before_it_has_memory_takes_a_full_state,
    half_precision_leaves_quantizers_alone,
    the_example_goes_on_where_it_stopped,
)
