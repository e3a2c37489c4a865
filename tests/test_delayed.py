"""In training a quantizer takes the scale it knew before the batch; a forward computed again neither differs nor learns."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import eagerq
from eagerq.quant import FakeQuantize, Observer, QConfig, QuantSpec, quantization_params
from eagerq.quant.functional import float32, scalar_params
from eagerq.quant.observer import merged_range, merged_scalars
from eagerq.quant.spec import OBSERVERS

WEIGHT = QuantSpec(signed=True, symmetric=True, per_channel=True, narrow_range=True, observer="min_max")


def passed(module: nn.Module, x: Tensor) -> tuple[list[float], list[float]]:
    """Output and gradient of its sum, flat."""
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    out.sum().backward()
    assert leaf.grad is not None
    return out.flatten().tolist(), leaf.grad.flatten().tolist()


def oracle(spec: QuantSpec, low: float, high: float, x: Tensor) -> tuple[list[float], list[float]]:
    """The same, of the grid that a range gives; of no range, of the identity."""
    values = x.flatten().tolist()
    if low == high == 0:
        return values, [1.0] * len(values)
    (scale, zero), ends = oracles.grid(spec, low, high), oracles.integer_range(spec)
    reals = [(oracles.code(v, scale, zero, *ends) - zero) * scale for v in values]
    return reals, [float(oracles.inside(v, scale, zero, *ends)) for v in values]


# --- the order: quantize, then learn


@given(
    spec=strategies.specs(per_channel=False),
    sizes=st.lists(st.sampled_from([0.0, 0.1, 1.0, 10.0]), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_a_batch_is_quantized_by_the_range_before_it(spec: QuantSpec, sizes: list[float], seed: int) -> None:
    """Zeros alone are no range; the first batch with one passes, and so does its gradient. Eval takes all batches' range."""
    generator = torch.Generator().manual_seed(seed)
    module, observer = FakeQuantize(spec).double(), Observer(spec).double()
    for size in sizes:
        x = size * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        assert passed(module, x) == oracle(spec, float(observer.min_val), float(observer.max_val), x)
        observer(x)
        assert float(module.activation_post_process.min_val) == float(observer.min_val)
        assert float(module.activation_post_process.max_val) == float(observer.max_val)
    module.eval()
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    assert passed(module, x) == oracle(spec, float(observer.min_val), float(observer.max_val), x)


@given(spec=strategies.specs(), seed=st.integers(0, 99))
def test_a_weight_is_quantized_by_its_own_range(spec: QuantSpec, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    channels = 3 if spec.per_channel else None
    module, observer = (kind(spec, channels, memoryless=True).double() for kind in (FakeQuantize, Observer))
    for size in (1.0, 3.0, 0.5):
        weight = size * torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
        observer(weight)
        out, grad = (torch.tensor(values).reshape(weight.shape) for values in passed(module, weight))
        lows, highs = (ends.reshape(-1).tolist() for ends in (observer.min_val, observer.max_val))
        for part, low, high in zip(oracles.channels(weight, 0 if channels else None), lows, highs, strict=True):
            reals, inside = oracle(spec, low, high, weight[part])
            np.testing.assert_array_equal(out[part].flatten().numpy(), np.float32(reals))
            whole = spec.observer == "min_max"  # nothing lies outside, so its gradient passes
            assert grad[part].flatten().tolist() == ([1.0] * len(inside) if whole else inside)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("nothing", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_batches_without_a_range_make_up_no_scale(name: Any, nothing: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = ((0.01 * torch.randn(40, generator=generator)).to(dtype) for _ in range(2))
    module, fresh = (FakeQuantize(QuantSpec(observer=name)) for _ in range(2))
    for _ in range(3):
        x = torch.full((5,), nothing, dtype=dtype)
        torch.testing.assert_close(module(x), x, rtol=0.0, atol=0.0, equal_nan=True)
        assert torch.equal(copy.deepcopy(module).eval()(first), first)
    for x in (torch.full((5,), nothing, dtype=dtype), first):  # scale 1 would make zeros of it, with or without its gradient
        out, grad = passed(module, x)
        np.testing.assert_array_equal(out, x.tolist())
        assert grad == [1.0] * len(grad)
    fresh(first)
    assert torch.equal(module(second), fresh(second))
    assert len(module(second).unique()) > 10


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_range_loaded_or_averaged_quantizes_the_first_batch(name: Any) -> None:
    taught, loaded, written = (FakeQuantize(QuantSpec(observer=name)) for _ in range(3))
    x, y = torch.randn(40), torch.randn(40)
    for other in (loaded, written):
        assert torch.equal(other(x * 0), x * 0)
    taught(x)
    loaded.load_state_dict(taught.state_dict())
    for mine, theirs in zip(written.buffers(), taught.buffers(), strict=True):
        mine.copy_(theirs)
    wanted = taught(y)
    assert not torch.equal(wanted, y)
    assert torch.equal(loaded(y), wanted)
    assert torch.equal(written(y), wanted)
    loaded.load_state_dict(FakeQuantize(QuantSpec(observer=name)).state_dict())
    assert torch.equal(loaded(y), y)


def test_a_channel_without_a_range_passes() -> None:
    module = FakeQuantize(QuantSpec(signed=True, symmetric=True, per_channel=True, observer="min_max"), 2, 1)
    module(torch.tensor([[0.0, 0.3], [0.0, -0.2]]))
    x = torch.tensor([[0.3, 0.3], [-0.2, -0.2]])
    assert torch.equal(module(x)[:, 0], x[:, 0])


def test_a_range_that_is_zero_again_is_treated_alike_in_compiled_code() -> None:
    eager = FakeQuantize(QuantSpec(averaging_constant=1.0))
    compiled = torch.compile(copy.deepcopy(eager), backend="eager")
    x = torch.randn(6)
    for batch in (x, x * 0, 5 * x):
        assert torch.equal(compiled(batch), eager(batch))
    torch._dynamo.reset()


def test_training_runs_on_tensors_without_data() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = FakeQuantize(QuantSpec())
        for _ in range(2):
            assert module(torch.randn(4)).shape == (4,)


# --- a forward that is computed again


class Block(nn.Module):
    """A convolution, a gated activation and a residual with its ReLU; then a head. The residual may be checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        self.one, self.gated = nn.Conv2d(4, 4, 3, padding=1), nn.Hardswish()
        self.two, self.clamp = nn.Conv2d(4, 4, 1), nn.ReLU6()
        self.three, self.last = nn.Conv2d(4, 4, 1), nn.ReLU()
        self.head = nn.Conv2d(4, 3, 1)
        self.reentrant: bool | None = None
        self.times = 1

    def inner(self, x: Tensor) -> Tensor:
        return self.last(self.three(self.clamp(self.two(self.gated(self.one(x))))) + x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        for _ in range(self.times):
            x = self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.head(x)


def block(qconfig: Any, times: int = 1) -> Block:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 2, 6, 6)
    qat: Any = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x), qconfig, example_inputs=x)
    qat.times = times
    return qat  # type: ignore[no-any-return]


def batch(step: int) -> Tensor:
    return (1 + step) * torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(step))


def trained(model: nn.Module, steps: int = 3) -> list[dict[str, Tensor]]:
    """Output, gradients and state of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        x = batch(step).requires_grad_()
        out = model(x)
        out.square().mean().backward()
        optimizer.step()
        grads = {f"gradient of {name}": p.grad for name, p in (("input", x), *model.named_parameters()) if p.grad is not None}
        seen.append({"output": out.detach(), **grads, **{k: v.clone() for k, v in model.state_dict().items()}})
    return seen


def assert_same(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    for step, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert mine.keys() == theirs.keys()
        different = [key for key, value in theirs.items() if not torch.equal(mine[key], value)]
        assert not different, f"step {step}: {different}"


QCONFIGS: dict[str, Any] = {
    **{name: name for name in eagerq.PRESETS},
    **{name: QConfig(QuantSpec(observer=name), WEIGHT) for name in ("min_max", "mse", "percentile")},  # type: ignore[arg-type]
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_a_checkpointed_module_trains_as_without(qconfig: str, reentrant: bool) -> None:
    wanted = trained(plain := block(QCONFIGS[qconfig]))
    assert not torch.equal(wanted[0]["output"], wanted[1]["output"])
    model = block(QCONFIGS[qconfig])
    model.reentrant = reentrant
    assert_same(trained(model), wanted)
    x = batch(9)
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_module_takes_every_switch(reentrant: bool) -> None:
    """Quantizing without learning, learning without quantizing, a part in eval."""
    pair = [block("onnxruntime"), block("onnxruntime")]
    pair[1].reentrant = reentrant
    for switch in (eagerq.disable_fake_quant, eagerq.enable_fake_quant, eagerq.disable_observer, eagerq.enable_observer):
        wanted, found = (trained(model.apply(switch), 1) for model in pair)
        assert_same(found, wanted)
    for model in pair:
        model.two.eval()
    wanted, found = (trained(model) for model in pair)
    assert_same(found, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_weights_moving_average_learns_once(reentrant: bool) -> None:
    config = QConfig(QuantSpec(), QuantSpec(signed=True, symmetric=True, observer="moving_average", averaging_constant=0.3))
    wanted, model = trained(block(config)), block(config)
    model.reentrant = reentrant
    assert_same(trained(model), wanted)


# --- least and greatest values


@st.composite
def laid_out(draw: st.DrawFn) -> Tensor:
    """A tensor of any layout: permuted, with gaps, expanded, channels last."""
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn([2 * n for n in shape], generator=generator)
    x = x.permute(draw(st.permutations(range(x.dim()))))
    if draw(st.booleans()):
        x = x[tuple(slice(draw(st.integers(0, 1)), None, draw(st.integers(1, 2))) for _ in range(x.dim()))]
    if draw(st.booleans()) and x.dim():
        x = x[:1].expand(3, *x.shape[1:])
    if x.dim() == 4 and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    return x


@given(x=laid_out(), data=st.data(), kind=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_a_range_is_numpys_in_any_layout(x: Tensor, data: st.DataObject, kind: torch.dtype) -> None:
    x = x.to(kind)
    values = x.double().numpy()
    whole = Observer(QuantSpec(observer="min_max")).double()
    whole(x)
    assert (float(whole.min_val), float(whole.max_val)) == (values.min(), values.max())
    if x.dim():
        axis = data.draw(st.integers(-x.dim(), x.dim() - 1))
        rest = tuple(d for d in range(x.dim()) if d != axis % x.dim())
        spec = QuantSpec(symmetric=True, per_channel=True, observer="min_max")
        parts = Observer(spec, x.shape[axis], axis).double()
        parts(x)
        np.testing.assert_array_equal(parts.min_val.numpy(), values.min(rest))
        np.testing.assert_array_equal(parts.max_val.numpy(), values.max(rest))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_clears_what_kernels_share(assign: bool) -> None:
    """Its words are zero between launches; a model that was built without memory holds anything there."""
    source = FakeQuantize(QuantSpec())
    source(torch.randn(8))
    module = FakeQuantize(QuantSpec(), device="meta")
    if not assign:
        module = module.to_empty(device="cpu")
        module.scratch.fill_(7)
    module.load_state_dict(source.state_dict(), assign=assign)
    assert module.scratch.device == module.scale.device
    assert not module.scratch.any()


@given(
    spec=strategies.specs(),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    constant=st.sampled_from([None, 0.01, 0.3, 1.0]),
)
def test_pythons_numbers_learn_what_tensors_learn(
    spec: QuantSpec, data: st.DataObject, dtype: torch.dtype, constant: float | None
) -> None:
    width = 32 if dtype == torch.float32 else 64
    nearest = float32 if width == 32 else float
    finite = st.floats(-(2.0**60), 2.0**60, width=width) | st.sampled_from([0.0, 1.0, -0.5])
    anything = finite | st.sampled_from([math.inf, -math.inf, math.nan])
    old = sorted(data.draw(st.tuples(finite, finite)))
    batch = data.draw(st.tuples(anything, anything))
    batch = (math.nan, math.nan) if any(map(math.isnan, batch)) else sorted(batch)  # as amin and amax give it
    tensors = [torch.tensor(value, dtype=dtype) for value in (*old, *batch)]
    learned = merged_range(*tensors, constant)  # type: ignore[misc]
    found = merged_scalars(*map(float, tensors), constant, nearest)  # type: ignore[misc]
    assert found == tuple(map(float, learned))
    scale, zero_point = quantization_params(spec, *learned)
    assert scalar_params(spec.grid, *found, nearest) == (float(scale), int(zero_point))
