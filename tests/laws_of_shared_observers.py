"""Laws of observers on two ranks; ``two_ranks.py`` runs them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_ranks import WORLD, Law, close, equal, same_everywhere

import eagerq
from eagerq.quant import Observer, QuantSpec


def _batch(generator: torch.Generator, usual: bool) -> Tensor:
    """A few values of any sign; unless ``usual``, perhaps none, zeros only, or some that are not finite."""
    n = int(torch.randint(2, 60, (), generator=generator, device="cpu"))
    x = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu") * 3
    kind = int(torch.randint(0, 8, (), generator=generator, device="cpu"))
    if usual or kind < 3:
        return x
    if kind < 6:
        return (x[:0], x * 0, x.abs())[kind - 3]
    x[0] = (torch.nan, torch.inf)[kind - 6]
    return x


def _observe_union(union: Observer, batches: list[Tensor]) -> None:
    """One process, given all ranks' batches; for percentiles, by the stated rule."""
    if union.spec.observer != "percentile":
        union(torch.cat(batches))
        return
    held = [(len(batch), union.batch_range(batch)) for batch in batches if len(batch)]
    if held:
        count = sum(n for n, _ in held)
        low, high = (sum(n * ends[i].double() for n, ends in held) / count for i in (0, 1))
        union.min_val, union.max_val = union.merged(low.to(union.min_val), high.to(union.max_val))


def observers_are_those_of_the_union(rank: int, folder: Path) -> None:
    for seed in range(80):
        generator = torch.Generator("cpu").manual_seed(seed)
        name: Any = ("min_max", "moving_average", "mse", "percentile")[seed % 4]
        spec = QuantSpec(bits=4 + seed % 5, observer=name, averaging_constant=(0.3, 1.0)[seed % 3 == 0], percentile=90.0)
        mine, union = Observer(spec).apply(eagerq.enable_observer_sync), Observer(spec)
        rounding = 1e-6
        if seed % 8 < 4:
            mine.double(), union.double()
            rounding = 1e-13
        for _ in range(5):
            batches = [_batch(generator, usual=False).to(mine.min_val) for _ in range(WORLD)]
            mine(batches[rank])
            _observe_union(union, batches)
            tolerance = 0.0 if name in ("min_max", "moving_average") else rounding
            torch.testing.assert_close(mine.state_dict(), union.state_dict(), rtol=tolerance, atol=0.0)


def percentiles_lie_between_the_ranks(rank: int, folder: Path) -> None:
    """So does the union's percentile, whose place they take; of equal batches they are the union's."""
    generator = torch.Generator("cpu").manual_seed(1)
    spec = QuantSpec(observer="percentile", percentile=80.0)
    for _ in range(20):
        batches = [_batch(generator, usual=True).to(torch.get_default_device()) for _ in range(WORLD)]
        mine, union = Observer(spec).double(), Observer(spec).double()
        mine.apply(eagerq.enable_observer_sync)
        mine(batches[rank])
        union(torch.cat(batches))
        parts = [Observer(spec).double().batch_range(batch) for batch in batches]
        for i, found in enumerate((mine.min_val, mine.max_val)):
            ends = torch.stack([part[i] for part in parts])
            assert ends.min() - 1e-12 <= found <= ends.max() + 1e-12
            assert ends.min() <= (union.min_val, union.max_val)[i] <= ends.max()
        equal, alone = Observer(spec).double(), Observer(spec).double()
        equal.apply(eagerq.enable_observer_sync)
        equal(batches[0])
        alone(torch.cat([batches[0], batches[0]]))
        torch.testing.assert_close((equal.min_val, equal.max_val), (alone.min_val, alone.max_val), rtol=1e-14, atol=0.0)


def observers_agree_only_when_asked(rank: int, folder: Path) -> None:
    x = torch.tensor([-1.0 - rank, 2.0 + rank])
    own, other = (-1.0 - rank, 2.0 + rank), (-2.0, 3.0)
    lone = dist.new_group([0])  # rank 1 is not in it, rank 0 is in it alone
    everyone = dist.new_group([0, 1])

    def seen(verb: Callable[[nn.Module], None] | None, **options: Any) -> tuple[float, float]:
        observer = Observer(QuantSpec(observer="min_max"), **options)
        if verb is not None:
            observer.apply(verb)
        observer = copy.deepcopy(observer)
        observer(x)
        return float(observer.min_val), float(observer.max_val)

    assert seen(None) == own
    assert seen(eagerq.enable_observer_sync) == other
    assert seen(functools.partial(eagerq.enable_observer_sync, process_group=everyone)) == other
    assert seen(functools.partial(eagerq.enable_observer_sync, process_group=lone)) == own
    assert seen(eagerq.enable_observer_sync, memoryless=True) == own  # weights
    assert seen(lambda m: (eagerq.enable_observer_sync(m), eagerq.disable_observer_sync(m))[0]) == own
    quantizer = eagerq.FakeQuantize(QuantSpec()).apply(eagerq.enable_observer_sync)
    quantizer(x[: 2 * rank])  # rank 0 has no values of its own
    wanted = eagerq.FakeQuantize(QuantSpec())
    wanted(torch.tensor(other))
    equal(quantizer.state_dict(), wanted.state_dict())
    if rank == 0:  # no collective in eval: a rank may evaluate by itself
        assert torch.equal(quantizer.eval()(x), wanted.eval()(x))


def one_reduction_gives_the_state_after_the_union(rank: int, folder: Path) -> None:
    for seed in range(12):
        generator = torch.Generator("cpu").manual_seed(seed)
        specs = [QuantSpec(observer=name, averaging_constant=0.3) for name in ("min_max", "moving_average", "mse", "percentile")]
        mine, union = (nn.ModuleList(eagerq.FakeQuantize(spec) for spec in specs) for _ in range(2))
        parts = [nn.ModuleList(eagerq.FakeQuantize(spec) for spec in specs[2:]) for _ in range(WORLD)]
        if seed % 2:
            mine.double(), union.double(), [part.double() for part in parts]
        weight = eagerq.FakeQuantize(specs[0], memoryless=True)
        weight(torch.tensor([-1.0 - rank]))
        whole = nn.ModuleDict({"mine": mine, "weight": weight})
        for _ in range(4):
            batches = [_batch(generator, usual=True).to(mine[0].scale) for _ in range(WORLD)]
            for m, u in zip(mine, union, strict=True):
                m(batches[rank]), u(torch.cat(batches))
            eagerq.sync_observers(whole)
            for part, batch in zip(parts, batches, strict=True):
                for p in part:
                    p(batch)
            for i in (0, 1):
                equal(mine[i].state_dict(), union[i].state_dict())
            for i in (0, 1):  # a mean of moving averages is the moving average of the means
                for name in ("min_val", "max_val"):
                    wanted = torch.stack([part[i].activation_post_process.get_buffer(name) for part in parts]).mean(0)
                    torch.testing.assert_close(mine[2 + i].activation_post_process.get_buffer(name), wanted, rtol=2e-6, atol=0.0)
        assert float(weight.activation_post_process.min_val) == -1.0 - rank
    once, union_once = eagerq.FakeQuantize(specs[0]), eagerq.FakeQuantize(specs[0])
    unseen, late = eagerq.FakeQuantize(specs[2]), eagerq.FakeQuantize(specs[3])
    alone = eagerq.FakeQuantize(specs[3])
    alone(torch.tensor([-1.0, 2.0]))
    late(torch.tensor([-1.0, 2.0])[: 2 * rank])  # rank 0 has seen nothing
    for i in range(3):
        once(torch.tensor([float(i * (-1) ** rank)]))
        union_once(torch.tensor([float(i), float(-i)]))
    eagerq.sync_observers(nn.ModuleList([once, unseen, late]))
    equal(once.state_dict(), union_once.state_dict())
    assert not unseen.has_range()
    assert float(unseen.scale) == 1.0
    equal(late.state_dict(), alone.state_dict())


def compiled_ranks_agree(rank: int, folder: Path) -> None:
    for name, backend in (("moving_average", "aot_eager"), ("percentile", "eager")):
        eager = eagerq.FakeQuantize(QuantSpec(observer=name)).double()
        eager.apply(eagerq.enable_observer_sync)
        compiled = copy.deepcopy(eager)
        run = torch.compile(compiled, fullgraph=True, backend=backend)
        for i in range(2):
            x = torch.randn(20, generator=torch.Generator("cpu").manual_seed(2 * i + rank), device="cpu").to(eager.scale)
            close(run(x), eager(x))
            close(dict(compiled.state_dict()), dict(eager.state_dict()))
            same_everywhere(compiled.state_dict())
    torch._dynamo.reset()


LAWS: tuple[Law, ...] = (
    observers_are_those_of_the_union,
    percentiles_lie_between_the_ranks,
    observers_agree_only_when_asked,
    one_reduction_gives_the_state_after_the_union,
    compiled_ranks_agree,
)
