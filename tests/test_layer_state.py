"""Laws over every row about state: freezing, copying, saving, casting, layouts, hooks, torch.ao's checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rows import (
    FOLDING_ROWS,
    GEOMETRIES,
    GROUPED,
    HOST_ROWS,
    LONE_ROWS,
    NORM_ROWS,
    OP_ROWS,
    PLAIN,
    ROWS,
    NormState,
    Row,
    attach_quantizers,
    plain,
)
from torch import Tensor, nn

import eagerq
import eagerq.nn
from eagerq.errors import ModelError
from eagerq.nn import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from eagerq.quant import PRESETS, QConfig, QuantSpec

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
every_op = pytest.mark.parametrize("row", OP_ROWS, ids=str)
every_host = pytest.mark.parametrize("row", HOST_ROWS, ids=str)
every_lone = pytest.mark.parametrize("row", LONE_ROWS, ids=str)
every_norm = pytest.mark.parametrize("row", NORM_ROWS, ids=str)
every_fused_norm = pytest.mark.parametrize("row", [row for row in NORM_ROWS if row.fused is not None], ids=str)
every_preset = pytest.mark.parametrize("preset", sorted(PRESETS))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def assert_equal_states(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def train_steps(module: nn.Module, row: Row, seeds: range = range(10, 12), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs of some SGD steps."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    outputs = []
    for seed in seeds:
        optimizer.zero_grad()
        out = module(row.input(seed=seed, dtype=dtype))
        out.square().mean().backward()
        optimizer.step()
        outputs.append(out.detach())
    return outputs


# --- frozen statistics


def statistics(norm: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in norm.named_buffers()}


def builds(row: Row) -> Iterator[tuple[str, Any]]:
    if row.fused is not None:
        yield "float", row.float_module(row.chain())
    for preset in ("onnxruntime", "per_tensor"):
        yield preset, row.trained(qconfig=preset)


@every_norm
def test_frozen_statistics_stay_bit_equal(row: Row) -> None:
    for _, module in builds(row):
        module(row.input(seed=3))
        module.apply(eagerq.freeze_bn_stats)
        wanted = statistics(module.norm())
        saved = copy.deepcopy(module.state_dict())

        def assert_frozen(other: Any, wanted: dict[str, Tensor] = wanted) -> None:
            for mode in (False, True):
                other.train(mode)
                assert other.training == mode
                assert not other.norm().training
                other(row.input(seed=4))
            before_steps = other.norm().weight.detach().clone()
            train_steps(other, row)
            assert not torch.equal(other.norm().weight, before_steps)  # gamma goes on learning
            assert_equal_states(statistics(other.norm()), wanted)

        assert_frozen(copy.deepcopy(module))
        assert_frozen(pickle.loads(pickle.dumps(module)))
        reloaded = copy.deepcopy(module)
        reloaded.load_state_dict(saved, strict=True)
        assert_frozen(reloaded)
        other_weights = copy.deepcopy(module)
        for tensor in other_weights.norm().buffers():
            tensor.add_(1)
        other_weights.load_state_dict(saved, strict=True)
        assert_frozen(other_weights)
        assert_frozen(module)
        module.apply(eagerq.update_bn_stats)
        assert module.norm().training
        module(row.input(seed=5))
        assert all(not torch.equal(v, wanted[k]) for k, v in statistics(module.norm()).items())
        module.eval().apply(eagerq.update_bn_stats)
        assert not module.norm().training


@every_fused_norm
@pytest.mark.parametrize("when", ["train", "eval", "frozen-norm"])
def test_a_frozen_fused_module_becomes_a_frozen_qat_module(row: Row, when: str) -> None:
    fused: Any = row.float_module(row.chain(n=NormState(frozen=when == "frozen-norm")))
    if when != "frozen-norm":
        fused.apply(eagerq.freeze_bn_stats).train(when == "train")
    wanted = statistics(fused.norm())
    q = row.qat.from_float(fused, "onnxruntime")
    assert q.training == (when != "eval")
    train_steps(q.train(), row)
    assert not q.bn.training
    assert_equal_states(statistics(q.bn), wanted)
    q.apply(eagerq.update_bn_stats)
    train_steps(q, row)
    assert not torch.equal(q.bn.running_mean, wanted["running_mean"])


@every_fused_norm
def test_a_frozen_norm_module_is_adopted(row: Row) -> None:
    frozen = {1: FrozenBatchNorm1d, 2: FrozenBatchNorm2d, 3: FrozenBatchNorm3d}[row.dims or 1]
    chain = row.chain()
    at = 0 if row.op is None else 1
    chain[at] = frozen.from_float(chain[at])
    reference = row.chain()
    reference[at].eval()
    for preset in ("onnxruntime", "per_tensor"):
        q = row.to_qat(copy.deepcopy(chain), preset)
        wanted = statistics(q.bn)
        like = row.to_qat(copy.deepcopy(reference), preset)
        x = row.input()
        torch.testing.assert_close(q(x), like(x))
        torch.testing.assert_close(q.eval()(x), like.eval()(x))
        q.train().apply(eagerq.update_bn_stats)(row.input(seed=8)).sum()
        assert_equal_states(statistics(q.bn), wanted)


# --- FrozenBatchNorm


FROZEN: list[tuple[Any, Any, tuple[int, ...]]] = [
    (FrozenBatchNorm1d, nn.BatchNorm1d, (3, 5)),
    (FrozenBatchNorm1d, nn.BatchNorm1d, (3, 5, 4)),
    (FrozenBatchNorm2d, nn.BatchNorm2d, (3, 5, 4, 2)),
    (FrozenBatchNorm3d, nn.BatchNorm3d, (3, 5, 4, 2, 2)),
]


@pytest.mark.parametrize(("frozen", "norm", "shape"), FROZEN)
@pytest.mark.parametrize("affine", [True, False])
def test_frozen_batch_norm_is_the_norm_in_eval(frozen: Any, norm: Any, shape: tuple[int, ...], affine: bool) -> None:
    source = norm(5, eps=1e-3, affine=affine, dtype=torch.float64)
    for _ in range(3):
        source(torch.randn(shape, dtype=torch.float64) * 2 + 1)
    if affine:
        nn.init.normal_(source.weight)
        nn.init.normal_(source.bias)
    made = frozen.from_float(source)
    assert not list(made.parameters())
    assert made.training
    assert made.eps == 1e-3
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(made(x), source.eval()(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(made.train()(x), made.eval()(x))
    loaded = frozen(5, eps=1e-3, dtype=torch.float64)
    if affine:
        loaded.load_state_dict(source.state_dict(), strict=True)  # num_batches_tracked is of no use here
        assert torch.equal(loaded(x), made(x))
    with pytest.raises(ValueError, match=rf"{frozen.__name__} wants an input of .* axes, found 6"):
        made(torch.randn(1, 5, 1, 1, 1, 1))
    with pytest.raises(ModelError, match=r"wants a norm with running statistics, found .* without"):
        frozen.from_float(norm(5, track_running_stats=False))


# --- observers and buffers


@every_row
@every_preset
def test_eval_changes_nothing(row: Row, preset: str) -> None:
    q = row.trained(qconfig=preset).eval()
    before = snapshot(q)
    first = q(row.input(seed=20) * (1 if row.op is nn.Embedding else 100))
    q(row.input(seed=21))
    assert_equal_states(snapshot(q), before)
    assert torch.equal(q(row.input(seed=20) * (1 if row.op is nn.Embedding else 100)), first)


@every_row
def test_observers_learn_only_while_enabled(row: Row) -> None:
    q = row.trained()
    before = snapshot(q)
    q.apply(eagerq.disable_observer).apply(eagerq.freeze_bn_stats)
    q(row.input(seed=20))
    for key, value in snapshot(q).items():
        assert torch.equal(value, before[key]) or key.endswith("observer_enabled"), key
    q.apply(eagerq.enable_observer)
    with torch.no_grad():
        (q.bn.weight if row.norm is not None else q.weight).mul_(1.5)
    q(row.input(seed=20))
    assert not torch.equal(snapshot(q)["activation_post_process.scale"], before["activation_post_process.scale"])


SPECS = [
    QuantSpec(bits=8, signed=True, symmetric=True, per_channel=True, narrow_range=True, observer="min_max"),
    QuantSpec(bits=4, signed=False, symmetric=True, per_channel=True, observer="mse"),
    QuantSpec(bits=6, signed=True, symmetric=True, per_channel=True, observer="moving_average"),
    QuantSpec(bits=8, signed=False, observer="percentile"),
    QuantSpec(bits=2, signed=True, symmetric=True, observer="min_max"),
]


@every_host
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_buffers_have_their_final_shape_at_construction(row: Row, spec: QuantSpec) -> None:
    for g in (PLAIN, GROUPED):
        q = row.to_qat(row.chain(g), QConfig(QuantSpec(), spec))
        attach_quantizers(row, q, "onnxruntime")
        before = {k: (v.shape, v.dtype) for k, v in q.state_dict().items()}
        q(row.input(g))
        q.eval()(row.input(g))
        assert {k: (v.shape, v.dtype) for k, v in q.state_dict().items()} == before
        channels = q.weight.shape[1 if row.transposed else 0]
        assert before["weight_fake_quant.scale"][0] == ((channels,) if spec.per_channel else (1,))


def quantizer_keys(name: str) -> list[str]:
    own = ["fake_quant_enabled", "observer_enabled", "scale", "zero_point"]
    return [f"{name}.{k}" for k in (*own, "activation_post_process.min_val", "activation_post_process.max_val")]


@every_row
def test_state_dict_keys_are_those_of_torch_ao(row: Row) -> None:
    q = row.trained()
    keys: list[str] = quantizer_keys("activation_post_process")
    if row.op is not None:
        keys += ["weight"] if row.op is nn.Embedding else ["weight", "bias"]
    if row in HOST_ROWS:
        keys += quantizer_keys("weight_fake_quant")
        if row.op is not nn.Embedding:
            keys += quantizer_keys("input_fake_quant")
    if row.norm is not None:
        keys += [f"bn.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    if row.takes_any_act:
        keys += ["act.weight"]
    assert sorted(q.state_dict()) == sorted(keys)


# --- copies


def by_deepcopy(q: Any, row: Row) -> Any:
    return copy.deepcopy(q)


def by_pickle(q: Any, row: Row) -> Any:
    return pickle.loads(pickle.dumps(q))


def by_torch_save(q: Any, row: Row) -> Any:
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_state_dict(q: Any, row: Row) -> Any:
    buffer = io.BytesIO()
    torch.save(q.state_dict(), buffer)
    buffer.seek(0)
    preset = next(name for name, config in PRESETS.items() if config == q.qconfig)
    fresh = row.to_qat(row.chain(seed=77), preset)
    attach_quantizers(row, fresh, preset)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    return fresh


@every_row
@pytest.mark.parametrize("how", [by_deepcopy, by_pickle, by_torch_save, by_state_dict], ids=lambda f: f.__name__)
def test_a_copy_evaluates_and_trains_alike(row: Row, how: Callable[[Any, Row], Any]) -> None:
    for preset in ("onnxruntime", "per_tensor") if row.norm is not None else ("onnxruntime",):
        q = row.trained(qconfig=preset)
        other = how(q, row)
        assert type(other) is type(q)
        assert other.qconfig == q.qconfig
        assert other.training
        assert not {id(t) for t in other.state_dict(keep_vars=True).values()} & {id(t) for t in q.parameters()}
        assert_equal_states(snapshot(other), snapshot(q))
        x = row.input(seed=30)
        assert torch.equal(other.eval()(x), q.eval()(x))
        other.train()
        q.train()
        for found, wanted in zip(train_steps(other, row), train_steps(q, row), strict=True):
            assert torch.equal(found, wanted)
        assert_equal_states(snapshot(other), snapshot(q))


@every_row
def test_flags_are_saved_too(row: Row) -> None:
    q = row.trained().apply(eagerq.disable_observer).apply(eagerq.disable_fake_quant)
    fresh = by_state_dict(q, row)
    quantizers = [m for m in fresh.modules() if isinstance(m, eagerq.FakeQuantize)]
    assert quantizers
    assert not any(m.observer_enabled or m.fake_quant_enabled for m in quantizers)
    x = row.input(seed=31)
    assert torch.equal(fresh.eval()(x), q.eval()(x))


@every_lone
def test_a_float_norms_state_loads_into_a_lone_norm(row: Row) -> None:
    state = row.chain(seed=7)[0].state_dict()
    kept = copy.deepcopy(state)
    q = row.trained()
    found = q.load_state_dict(state, strict=False)
    assert found.unexpected_keys == []
    assert all("quant" in key or "post_process" in key for key in found.missing_keys)
    assert_equal_states(q.bn.state_dict(), kept)
    assert_equal_states(state, kept)


@every_norm
def test_sync_batch_norms_take_the_place_of_norms_inside(row: Row) -> None:
    for preset in ("onnxruntime", "per_tensor"):
        q = row.trained(qconfig=preset).eval()
        x = row.input(seed=40)
        wanted = q(x)
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(q))
        assert type(synchronised) is type(q)
        assert type(synchronised.norm()) is nn.SyncBatchNorm
        assert torch.equal(synchronised(x), wanted)


# --- precision


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(row: Row, dtype: torch.dtype) -> None:
    for preset in ("onnxruntime", "per_tensor"):
        chain = row.chain()
        wanted = plain(chain)
        q = row.to_qat(chain, preset)
        attach_quantizers(row, q, preset)
        dtypes = {k: v.dtype for k, v in q.state_dict().items()}
        x = row.input()
        with torch.autocast("cpu", dtype=dtype):
            expected = wanted(x)
            off = copy.deepcopy(q).apply(eagerq.disable_fake_quant)
            assert torch.equal(off(x), expected)
            for _ in range(2):  # before and after a range is known
                out = q(x)
                assert out.dtype == expected.dtype
                assert torch.isfinite(out).all()
            out.float().square().mean().backward()
        for name, p in q.named_parameters():
            assert p.grad is not None, name
            assert p.grad.dtype == p.dtype, name
            assert torch.isfinite(p.grad).all(), name
        assert {k: v.dtype for k, v in q.state_dict().items()} == dtypes
        with torch.autocast("cpu", dtype=dtype):
            evaluated = q.eval()(x)
        # half precision rounds, and a rounding may move a value by one code
        slack = 0.06 * float(expected.detach().float().abs().max()) + 2 * float(q.activation_post_process.scale)
        assert float((evaluated.float() - q(x)).detach().abs().max()) <= slack


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cast_to_low_precision_keeps_the_scales(row: Row, dtype: torch.dtype) -> None:
    for preset in ("onnxruntime", "per_tensor"):
        q = row.trained(qconfig=preset)
        before = snapshot(q)
        q.to(dtype)
        for key, value in q.state_dict().items():
            quantizer = "fake_quant" in key or "activation_post_process" in key
            if quantizer or not before[key].is_floating_point():
                assert value.dtype == before[key].dtype, key
                assert torch.equal(value, before[key]), key
            else:
                assert value.dtype == dtype, key
        x = row.input(dtype=dtype)
        for mode in (True, False):
            q.train(mode)
            out = q(x)
            assert out.dtype == dtype
            assert torch.isfinite(out).all()
        assert all(v.dtype in (torch.float32, torch.int32, torch.uint8) for k, v in q.state_dict().items() if "quant" in k)
        assert all(torch.isfinite(t).all() for t in train_steps(q.train(), row, dtype=dtype))


@every_row
def test_double_computes_in_double(row: Row) -> None:
    for preset in ("onnxruntime", "per_tensor"):
        q = row.trained(qconfig=preset).double()
        assert all(v.dtype == torch.float64 for k, v in q.state_dict().items() if k.endswith(("scale", "min_val", "weight")))
        assert q(row.input(dtype=torch.float64)).dtype == torch.float64
        fresh = row.to_qat(row.chain(dtype=torch.float64), preset)
        if row in HOST_ROWS:
            assert fresh.weight_fake_quant.scale.dtype == torch.float64
        # not one value went through float32: moving the weights by less than its spacing moves the output
        fresh.apply(eagerq.disable_fake_quant).eval()
        x = row.input(dtype=torch.float64)
        a = fresh(x)
        with torch.no_grad():
            (fresh.weight if row.op is not None else fresh.bn.weight).mul_(1 + 2.0**-40)
        assert 0 < float((fresh(x) - a).detach().abs().max()) < 1e-9


@every_row
def test_meta_modules_stay_on_meta(row: Row) -> None:
    for preset in ("onnxruntime", "per_tensor"):
        q = row.to_qat([m.to("meta") for m in row.chain()], preset)
        assert {t.device.type for t in q.state_dict().values() if t.dim() and t.dtype != torch.uint8} == {"meta"}
        shape = row.trained(qconfig=preset)(row.input()).shape
        for mode in (True, False):
            assert q.train(mode)(row.input().to("meta")).shape == shape


# --- memory layout


@pytest.mark.parametrize("row", [r for r in ROWS if r.dims in (2, 3)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_channels_last_stays_channels_last(row: Row, geometry: str) -> None:
    g = GEOMETRIES[geometry]
    layout: Any = torch.channels_last if row.dims == 2 else torch.channels_last_3d
    for preset in ("onnxruntime", "per_tensor"):
        chain = row.chain(g)
        like = row.trained(g, preset)
        wanted = plain(chain).to(memory_format=layout)
        q = row.to_qat(chain, preset)
        attach_quantizers(row, q, preset)
        q.to(memory_format=layout)
        for seed in (1, 2):
            x = row.input(g, seed=seed)
            out = q(x.to(memory_format=layout))
            expected = wanted(x.to(memory_format=layout))
            assert out.stride() == expected.stride()
        assert out.is_contiguous(memory_format=layout)
        q.eval()
        with torch.no_grad():
            evaluated = q(x.to(memory_format=layout))
            assert evaluated.stride() == wanted.eval()(x.to(memory_format=layout)).stride()
            expected = like.eval()(x)
        step = float(q.activation_post_process.scale)
        assert float((evaluated - expected).abs().max()) <= 1.001 * step + 1e-5  # a sum in another order, at most one code


# --- hooks


@every_row
def test_hooks_move_along_and_their_handles_still_work(row: Row) -> None:
    chain = row.chain()
    calls: list[str] = []
    handles = {
        "pre": chain[0].register_forward_pre_hook(lambda m, a: calls.append("pre")),
        "pre kwargs": chain[0].register_forward_pre_hook(lambda m, a, k: calls.append("pre kwargs"), with_kwargs=True),
        "post": chain[-1].register_forward_hook(lambda m, a, o: calls.append("post")),
        "post kwargs": chain[-1].register_forward_hook(lambda m, a, k, o: calls.append("post kwargs"), with_kwargs=True),
        "always": chain[-1].register_forward_hook(lambda m, a, o: calls.append("always"), always_call=True),
    }
    if row.op is not nn.Embedding:  # integers have no gradient
        handles["backward"] = chain[-1].register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    q = row.to_qat(chain)
    x = row.input()

    def run() -> list[str]:
        calls.clear()
        out = q(x.clone().requires_grad_(x.is_floating_point()))
        out.sum().backward()
        return sorted(calls)

    left = sorted(handles)
    assert run() == left
    for name, handle in handles.items():
        handle.remove()
        left.remove(name)
        assert run() == left


@every_row
def test_hooks_change_what_they_changed(row: Row) -> None:
    chain = row.chain(dtype=torch.float64)
    chain[0].register_forward_pre_hook(lambda m, a: (a[0] // 2,))
    chain[-1].register_forward_hook(lambda m, a, o: o + 5)
    wanted = plain(chain)
    q = row.to_qat(chain).apply(eagerq.disable_fake_quant)
    x = row.input(dtype=torch.float64)
    torch.testing.assert_close(q(x), wanted(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("row", [r for r in ROWS if r.fused], ids=str)
def test_hooks_of_the_fused_module_and_of_its_members_both_fire(row: Row) -> None:
    chain = row.chain()
    fused = row.float_module(chain)
    calls: list[str] = []
    chain[0].register_forward_pre_hook(lambda m, a: calls.append("first"))
    fused.register_forward_pre_hook(lambda m, a: calls.append("fused pre"))
    chain[-1].register_forward_hook(lambda m, a, o: calls.append("last"))
    fused.register_forward_hook(lambda m, a, o: calls.append("fused post"))
    fused(row.input())
    wanted = list(calls)
    calls.clear()
    row.qat.from_float(fused)(row.input())
    assert calls == wanted == ["fused pre", "first", "last", "fused post"]


# --- torch.ao's QAT checkpoints


def ao_module(row: Row, backend: str, version: int) -> Any:
    """torch.ao's QAT module of the same name, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.ao.nn.intrinsic.qat as ao_nniqat
        import torch.ao.nn.qat as ao_nnqat
        from torch.ao.quantization import default_embedding_qat_qconfig, get_default_qat_qconfig

        ao_class = getattr(ao_nniqat, row.name, None) or getattr(ao_nnqat, row.name, None)
        if ao_class is None:
            return None
        g = PLAIN
        if row.op is nn.Embedding:
            return ao_class(7, g.out_channels, qconfig=default_embedding_qat_qconfig)
        qconfig = get_default_qat_qconfig(backend, version=version)
        ins = g.groups * g.in_per_group
        if row.op is nn.Linear:
            return ao_class(ins, g.out_channels, bias=True, qconfig=qconfig)
        cut = slice(0, row.dims)
        geometry = {"padding": g.padding[cut], "stride": g.stride[cut], "dilation": g.dilation[cut], "bias": True}
        return ao_class(ins, g.out_channels, g.kernel[cut], **geometry, qconfig=qconfig)


AO_NAMES = """ConvBn1d ConvBn2d ConvBn3d ConvBnReLU1d ConvBnReLU2d ConvBnReLU3d ConvReLU1d ConvReLU2d ConvReLU3d
    LinearReLU LinearBn1d Conv1d Conv2d Conv3d Linear Embedding""".split()


def ao_rows() -> list[Any]:
    return [pytest.param(row, id=row.name) for row in ROWS if row.name in AO_NAMES]


def ao_state(row: Row, backend: str, version: int, observed: bool) -> tuple[Any, dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = ao_module(row, backend, version)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias)  # torch.ao's LinearBn1d leaves it uninitialised, at times NaN
        if observed:
            for seed in (1, 2):
                module(row.input(seed=seed))
        return module, copy.deepcopy(module.state_dict())


@pytest.mark.parametrize("row", ao_rows())
@pytest.mark.parametrize("version", [0, 1], ids=["plain", "fused"])
@pytest.mark.parametrize("observed", [False, True], ids=["fresh", "observed"])
@pytest.mark.parametrize(("backend", "preset"), [("fbgemm", "onnxruntime"), ("qnnpack", "per_tensor")])
def test_torch_ao_checkpoints_load(row: Row, version: int, observed: bool, backend: str, preset: str) -> None:
    ao, state = ao_state(row, backend, version, observed)
    kept = copy.deepcopy(state)
    q = row.to_qat(row.chain(seed=55), "onnxruntime" if row.op is nn.Embedding else preset)
    q.load_state_dict(state, strict=True)
    assert_equal_states(state, kept)
    shapes = {k: v.shape for k, v in row.to_qat(row.chain(), q.qconfig).state_dict().items()}
    assert {k: v.shape for k, v in q.state_dict().items()} == shapes
    own = q.state_dict()
    for key, value in kept.items():
        if key.startswith(("weight", "bias", "bn.")) and "fake_quant" not in key:
            assert torch.equal(own[key], value), key
    quantizer, ao_quantizer = q.weight_fake_quant, ao.weight_fake_quant
    assert quantizer.observed == observed
    assert quantizer.fake_quant_enabled
    assert quantizer.observer_enabled
    torch.testing.assert_close(quantizer.scale, ao_quantizer.scale.expand(quantizer.scale.shape), rtol=0, atol=0)
    if observed:
        observer, ao_observer = quantizer.activation_post_process, ao_quantizer.activation_post_process
        for name in ("min_val", "max_val"):
            found, wanted = getattr(observer, name), getattr(ao_observer, name)
            assert torch.equal(found, wanted.reshape(found.shape))
    else:
        assert not quantizer.activation_post_process.min_val.any()  # finite, as torch.ao's are not
    assert all(torch.isfinite(t).all() for t in train_steps(q, row))


def test_the_table_covers_torch_aos_classes() -> None:
    assert sorted(r.name for r in ROWS if ao_module(r, "fbgemm", 1) is not None) == sorted(AO_NAMES)


@pytest.mark.parametrize("row", [r for r in FOLDING_ROWS if r.name in AO_NAMES], ids=str)
@pytest.mark.parametrize("tracked", [True, False], ids=["counted", "uncounted"])
def test_the_oldest_layout_loads(row: Row, tracked: bool) -> None:
    """Version 1 of torch.ao's ConvBn kept gamma, beta and the statistics in the module itself."""
    _, state = ao_state(row, "fbgemm", 0, True)
    old = {"bn.weight": "gamma", "bn.bias": "beta"}
    oldest = {old.get(k, k.removeprefix("bn.")): v for k, v in state.items() if tracked or k != "bn.num_batches_tracked"}
    assert "gamma" in oldest
    assert "running_mean" in oldest
    assert not any(k.startswith("bn.") for k in oldest)
    q = row.to_qat(row.chain(seed=55))
    q.load_state_dict(oldest, strict=True)
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(q.bn.state_dict()[key], state[f"bn.{key}"])
    assert torch.equal(q.weight, state["weight"])
    if tracked:
        assert int(q.bn.num_batches_tracked) == 2
    nested = nn.Sequential(row.to_qat(row.chain(seed=56)))
    nested.load_state_dict({f"0.{k}": v for k, v in oldest.items()}, strict=True)
    assert torch.equal(nested[0].bn.weight, state["bn.weight"])


@every_op
def test_another_architectures_checkpoint_is_refused(row: Row) -> None:
    q = row.trained()
    wider = row.trained(GEOMETRIES["grouped"])
    before = snapshot(q)
    for state in (
        wider.state_dict(),
        {k: v for k, v in q.state_dict().items() if k != "weight"},
        {**q.state_dict(), "more": torch.ones(1)},
    ):
        with pytest.raises(RuntimeError, match=r"size mismatch|Missing key|Unexpected key"):
            copy.deepcopy(q).load_state_dict(state, strict=True)
    assert_equal_states(snapshot(q), before)
