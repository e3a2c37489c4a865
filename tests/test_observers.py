"""Observers against sorted lists and plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eagerq.quant import Observer, QuantSpec
from eagerq.quant.layout import FEWEST_IN_ROW, rows_of
from eagerq.quant.spec import OBSERVERS

values = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40)
batches = st.lists(values, min_size=1, max_size=4)


def observe(spec: QuantSpec, data: list[list[float]]) -> Observer:
    observer = Observer(spec).double()
    for batch in data:
        x = torch.tensor(batch, dtype=torch.float64)
        assert observer(x) is x
    return observer


def average(ranges: list[tuple[float, float]], constant: float) -> tuple[float, float]:
    """Of the ranges that hold more than zero; one of zeros alone teaches nothing before the first such."""
    while len(ranges) > 1 and ranges[0] == (0, 0):
        ranges = ranges[1:]
    low, high = ranges[0]
    for a, b in ranges[1:]:
        low, high = low + constant * (a - low), high + constant * (b - high)
    return low, high


def assert_range(observer: Observer, low: float, high: float) -> None:
    np.testing.assert_allclose([float(observer.min_val), float(observer.max_val)], [low, high], rtol=1e-12)


@given(data=batches)
def test_min_max_is_that_of_everything_seen(data: list[list[float]]) -> None:
    seen = list(itertools.dropwhile(lambda batch: not any(batch), data))  # zeros at the start are nothing seen
    everything = [v for batch in seen for v in batch] or [0.0]
    assert_range(observe(QuantSpec(observer="min_max"), data), min(everything), max(everything))


@given(data=batches, constant=st.floats(0.01, 1.0))
def test_moving_average_of_minima_and_maxima(data: list[list[float]], constant: float) -> None:
    observer = observe(QuantSpec(observer="moving_average", averaging_constant=constant), data)
    assert_range(observer, *average([(min(b), max(b)) for b in data], constant))


@given(
    data=batches, percentile=st.sampled_from([50.1, 75.0, 90.0, 90.1, 99.0, 99.99, 100.0]), constant=st.sampled_from([0.1, 1.0])
)
def test_moving_average_of_percentiles(data: list[list[float]], percentile: float, constant: float) -> None:
    observer = observe(QuantSpec(observer="percentile", percentile=percentile, averaging_constant=constant), data)
    assert_range(observer, *average([oracles.percentile_range(b, percentile) for b in data], constant))


@pytest.mark.parametrize("n", [1, 10, 100, 999, 1000, 10_000])
@pytest.mark.parametrize("percentile", [75.0, 90.0, 90.1, 99.0, 99.9, 99.99, 100.0])
def test_percentiles_of_many_values(n: int, percentile: float) -> None:
    batch = torch.randperm(n).tolist()
    assert_range(
        observe(QuantSpec(observer="percentile", percentile=percentile), [batch]), *oracles.percentile_range(batch, percentile)
    )


@given(spec=strategies.specs(per_channel=False), batch=values)
def test_mse_picks_the_shrunken_range_of_least_error(spec: QuantSpec, batch: list[float]) -> None:
    spec = QuantSpec(spec.bits, spec.signed, spec.symmetric, False, spec.narrow_range, "mse")
    observer = observe(spec, [batch])
    low, high = float(observer.min_val), float(observer.max_val)
    candidates = [(min(batch) * (1 - 0.02 * i), max(batch) * (1 - 0.02 * i)) for i in range(40)]
    errors = [oracles.squared_error(batch, spec, a, b) for a, b in candidates]
    chosen = oracles.squared_error(batch, spec, low, high)
    assert chosen <= min(errors) * (1 + 1e-9) + 1e-12 * sum(v * v for v in batch)
    assert any(np.allclose([low, high], c, rtol=1e-9) for c in candidates)


def test_mse_cuts_an_outlier_and_min_max_does_not() -> None:
    x = torch.cat([torch.randn(10_000), torch.tensor([40.0])])
    spec = QuantSpec(bits=4, observer="mse")
    observer = Observer(spec)
    observer(x)
    assert float(observer.max_val) < 20
    full = Observer(QuantSpec(bits=4, observer="min_max"))
    full(x)
    assert float(full.max_val) == 40


@given(spec=strategies.specs(per_channel=True), axis=st.integers(0, 2))
def test_a_channels_range_is_that_of_its_slice(spec: QuantSpec, axis: int) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    observer = Observer(spec, x.shape[axis], axis).double()
    observer(x)
    for c, part in enumerate(oracles.channels(x, axis)):
        alone = Observer(spec).double()
        alone(x[part])
        assert observer.min_val[c] == alone.min_val
        assert observer.max_val[c] == alone.max_val


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_batches_without_a_finite_range_are_left_out(name: Any, bad: float) -> None:
    good, other = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([-3.0, 0.0, 1.0])
    poisoned = torch.tensor([bad, 1.0, 100.0])
    spec = QuantSpec(observer=name, averaging_constant=0.5)
    seen, clean = Observer(spec), Observer(spec)
    for batch in (poisoned, good, poisoned, other, poisoned):
        seen(batch)
    for batch in (good, other):
        clean(batch)
    assert torch.equal(seen.min_val, clean.min_val)
    assert torch.equal(seen.max_val, clean.max_val)


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_poisoned_channel_leaves_the_others_learning(name: Any) -> None:
    observer = Observer(QuantSpec(symmetric=True, per_channel=True, observer=name), 2)
    observer(torch.tensor([[math.nan, 1.0], [-1.0, 1.0]]))
    assert observer.min_val[0] == 0
    assert observer.max_val[0] == 0
    assert math.isfinite(observer.min_val[1])
    assert observer.max_val[1] > 0


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("memoryless", [False, True])
def test_empty_and_zero_tensors(name: Any, memoryless: bool) -> None:
    observer = Observer(QuantSpec(observer=name), memoryless=memoryless)
    observer(torch.empty(0, 3))
    assert observer.min_val == 0
    assert observer.max_val == 0
    observer(torch.zeros(4))
    assert observer.min_val == 0
    assert observer.max_val == 0
    observer(torch.empty(3, 0))
    assert observer.min_val == 0
    assert observer.max_val == 0


@pytest.mark.parametrize("name", OBSERVERS)
def test_memoryless_keeps_the_newest_range_but_for_the_moving_average(name: Any) -> None:
    spec = QuantSpec(observer=name, averaging_constant=0.25)
    observer = Observer(spec, memoryless=True)
    first, second = torch.tensor([-4.0, 4.0]), torch.tensor([-1.0, 2.0])
    observer(first)
    observer(second)
    if name == "moving_average":
        assert (float(observer.min_val), float(observer.max_val)) == (-4 + 0.25 * 3, 4 - 0.25 * 2)
    else:
        alone = Observer(spec)
        alone(second)
        assert torch.equal(observer.min_val, alone.min_val)
        assert torch.equal(observer.max_val, alone.max_val)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts_are_observed_as_they_are(name: Any, dtype: torch.dtype) -> None:
    def ranged(x: Tensor) -> tuple[float, float]:
        observer = Observer(QuantSpec(observer=name))
        observer(x)
        assert observer.min_val.dtype == torch.float32
        return float(observer.min_val), float(observer.max_val)

    x = torch.randn(4, 3, 6, 6).to(dtype)
    wanted = ranged(x.float())
    assert ranged(x) == ranged(x.to(memory_format=torch.channels_last)) == ranged(x.transpose(0, 2)) == wanted


@pytest.mark.parametrize("name", OBSERVERS)
def test_observing_records_no_gradient(name: Any) -> None:
    x = torch.randn(8, requires_grad=True)
    observer = Observer(QuantSpec(observer=name))
    out = observer(x)
    assert out is x
    assert not observer.min_val.requires_grad
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0] * 8


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@st.composite
def laid_out(draw: st.DrawFn) -> Tensor:
    """Distinct values, in any layout."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 31, 32, 40]), max_size=5))
    while math.prod(shape) > 2**14:
        shape[shape.index(max(shape))] = 2
    x = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) - 9
    if len(shape) in FORMATS and draw(st.booleans()):
        return x.contiguous(memory_format=FORMATS[len(shape)])
    axes = draw(st.permutations(range(len(shape))))
    return x.permute(axes)[..., :: draw(st.sampled_from([1, 2]))] if axes else x


@given(x=laid_out())
def test_rows_lie_side_by_side_and_are_the_shortest(x: Tensor) -> None:
    rows = rows_of(x)
    if not x.numel():
        return  # nothing lies anywhere, and strides mean nothing
    inner = sorted((axis for axis in rows if x.shape[axis] > 1), key=x.stride)
    size = 1
    for axis in inner:
        assert x.stride(axis) == size
        assert size < FEWEST_IN_ROW
        size *= x.shape[axis]
    assert not rows or size >= FEWEST_IN_ROW
    if not rows and x.is_contiguous():
        assert math.prod(x.shape[1:]) < FEWEST_IN_ROW


@given(x=laid_out(), method=st.sampled_from(["min_max", "moving_average"]), odd=st.sampled_from([0.0, math.inf, math.nan]))
def test_ends_found_row_by_row_are_those_of_all(x: Tensor, method: Any, odd: float) -> None:
    if x.numel():
        x[(0,) * x.dim()] = odd
    whole, by_rows = Observer(QuantSpec(observer=method)), Observer(QuantSpec(observer=method))
    whole(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eagerq.quant.observer._row_of", rows_of)
        by_rows(x)
    for name in ("min_val", "max_val"):
        assert torch.equal(getattr(whole, name), getattr(by_rows, name))
