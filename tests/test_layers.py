"""Laws over every row of the table: fusing keeps the function, QAT keeps the training, deployment keeps the bits."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rows import (
    FOLDING_ROWS,
    FUSED_ROWS,
    GEOMETRIES,
    GROUPED,
    HOST_ROWS,
    LONE_ROWS,
    NORM_ROWS,
    OP_ROWS,
    PARTS,
    PLAIN,
    ROWS,
    Geometry,
    NormState,
    Row,
    attach_quantizers,
    bn_state,
    plain,
)
from torch import Tensor, nn

import eagerq
from eagerq.errors import ModelError, PatternError
from eagerq.nn import intrinsic as nni
from eagerq.nn import qat as nnqat
from eagerq.nn.intrinsic import qat as nniqat
from eagerq.nn.quantized import QuantizedModule, fixed_quantizer
from eagerq.quant import PRESETS, FakeQuantize, QConfig, QuantSpec, get_qconfig

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
every_fused = pytest.mark.parametrize("row", FUSED_ROWS, ids=str)
every_op = pytest.mark.parametrize("row", OP_ROWS, ids=str)
every_host = pytest.mark.parametrize("row", HOST_ROWS, ids=str)
every_lone = pytest.mark.parametrize("row", LONE_ROWS, ids=str)
every_norm = pytest.mark.parametrize("row", NORM_ROWS, ids=str)
every_fused_norm = pytest.mark.parametrize("row", [row for row in NORM_ROWS if row.fused is not None], ids=str)
every_folding = pytest.mark.parametrize("row", FOLDING_ROWS, ids=str)
every_preset = pytest.mark.parametrize("preset", sorted(PRESETS))


def gradients(module: nn.Module, parameters: list[nn.Parameter], x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Output, and the gradients of input and parameters under a fixed random direction."""
    leaf = x.detach().clone().requires_grad_(x.is_floating_point())
    for p in parameters:
        p.grad = None
    out = module(leaf)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    (out * direction).sum().backward()
    return out.detach(), [leaf.grad, *(p.grad for p in parameters)]


def assert_same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def numpy(t: Tensor | None) -> Any:
    return None if t is None else t.detach().numpy()


# --- the table


@pytest.mark.parametrize("package", [nni, nniqat, nnqat], ids=lambda p: p.__name__)
def test_every_public_class_has_a_row(package: Any) -> None:
    known = {row.fused if package is nni else row.qat for row in ROWS}
    missing = [n for n in package.__all__ if n not in PARTS and getattr(package, n) not in known]
    assert missing == []
    public = {n for n, v in vars(package).items() if isinstance(v, type) and issubclass(v, nn.Module) and not n.startswith("_")}
    assert public == set(package.__all__)


def test_no_row_stands_twice() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


# --- nni: float fused modules


@every_fused
@strategies.per_row
@given(data=st.data())
def test_fused_computes_the_chain(row: Row, data: st.DataObject) -> None:
    g, n = data.draw(strategies.geometries(row)), data.draw(strategies.norm_states)
    chain = row.chain(g, n, data.draw(strategies.acts(row)))
    wanted, fused = plain(chain), row.float_module(chain)
    x = row.input(g)
    for train in (True, True, False):
        if not train:
            wanted.eval()
            fused.eval()
        a = gradients(wanted, list(wanted.parameters()), x)
        b = gradients(fused, list(fused.parameters()), x)
        assert torch.equal(a[0], b[0])
        for found, grad in zip(b[1], a[1], strict=True):
            assert torch.equal(found, grad)  # type: ignore[arg-type]
    for key, value in wanted.state_dict().items():
        assert torch.equal(fused.state_dict()[key], value), key


@every_fused
def test_fused_refuses_other_members(row: Row) -> None:
    chain = row.chain()
    for i in range(len(chain)):
        # a place open to any activation takes every module, but nothing else
        wrong: Any = torch.zeros(1) if i > 0 and row.takes_any_act and i == len(chain) - 1 else nn.Dropout()
        with pytest.raises(PatternError, match=f"{row.name} wants .* as member {i}"):
            row.fused(*chain[:i], wrong, *chain[i + 1 :])  # type: ignore[misc]
    for members in (chain[:-1], [*chain, nn.ReLU()], []):
        with pytest.raises(PatternError, match=f"wants {len(chain)} modules, found {len(members)}"):
            row.fused(*members)  # type: ignore[misc]


@every_fused
def test_fused_shows_its_first_members_attributes(row: Row) -> None:
    chain = row.chain()
    fused: Any = row.float_module(chain)
    first: Any = chain[0]
    assert fused.weight is first.weight
    names = {nn.Linear: ("in_features", "out_features"), None: ("num_features", "eps")}
    for name in names.get(row.op, ("out_channels", "kernel_size", "stride", "groups")):  # type: ignore[call-overload]
        assert getattr(fused, name) == getattr(first, name)
    assert not hasattr(fused, "no_such_attribute")
    assert list(fused) == chain


@every_fused
def test_fused_mode_follows_train_and_eval(row: Row) -> None:
    fused = row.float_module([m.eval() for m in row.chain()])
    assert not fused.training
    assert all(m.training for m in fused.train().modules())
    assert not any(m.training for m in fused.eval().modules())
    assert row.float_module(row.chain()).training


@every_fused_norm
def test_fused_keeps_a_frozen_norm_frozen(row: Row) -> None:
    fused: Any = row.float_module(row.chain(n=NormState(frozen=True)))
    before = bn_state(fused.norm())
    fused.eval().train()(row.input())
    assert fused.training
    assert not fused.norm().training
    for key, value in bn_state(fused.norm()).items():
        assert torch.equal(value, before[key])


# --- from_float


@every_row
@every_preset
def test_from_float_adopts_the_members(row: Row, preset: str) -> None:
    chain = row.chain()
    parameters = [p for m in chain for p in m.parameters()]
    q = row.to_qat(chain, preset)
    assert type(q) is row.qat
    assert {id(p) for p in q.parameters()} == {id(p) for p in parameters}
    assert q.qconfig == PRESETS[preset]
    if row.op is not None:
        assert q.weight is chain[0].weight
    if row in HOST_ROWS:
        assert q.weight_fake_quant.spec == PRESETS[preset].weight
    if row.norm is not None:
        assert q.bn is chain[1 if row.op else 0]
    if row.act is not None:
        assert q.act is chain[-1]
    assert q.training
    assert not row.to_qat([m.eval() for m in row.chain()], preset).training


@every_row
def test_from_float_takes_exactly_its_class(row: Row) -> None:
    class Derived(type(row.float_module(row.chain()))):  # type: ignore[misc]
        pass

    module: Any = row.float_module(row.chain())
    module.__class__ = Derived
    for wrong in (module, nn.Bilinear(2, 2, 2), nn.Identity()):
        with pytest.raises(ModelError, match=rf"{row.name}\.from_float wants a .*, found .*{type(wrong).__name__}"):
            row.qat.from_float(wrong, "onnxruntime")


@every_row
def test_from_float_reads_the_qconfig_attribute(row: Row) -> None:
    module: Any = row.float_module(row.chain())
    assert row.qat.from_float(module).qconfig == PRESETS["onnxruntime"]
    module.qconfig = PRESETS["per_tensor"]
    assert row.qat.from_float(module).qconfig == PRESETS["per_tensor"]
    assert row.qat.from_float(module, "tensorrt").qconfig == PRESETS["tensorrt"]


@every_host
def test_weight_only_and_activation_only_configs(row: Row) -> None:
    x = row.input()
    chain = row.chain()
    q = row.to_qat(copy.deepcopy(chain), QConfig(activation=None, weight=None))
    assert q.weight_fake_quant is None
    wanted = plain(chain)
    torch.testing.assert_close(q(x), wanted(x))
    torch.testing.assert_close(q.eval()(x), wanted.eval()(x), rtol=1e-5, atol=1e-6)
    deployed = QuantizedModule.from_qat(q)
    assert deployed.weight.is_floating_point()
    assert torch.equal(deployed(x), q(x))


@pytest.mark.parametrize("row", [r for r in OP_ROWS if r.op not in (nn.Embedding,)], ids=str)
def test_constructor_takes_the_float_classs_arguments(row: Row) -> None:
    made = row.qat(4, 6) if row.dims == 0 else row.qat(4, 6, 3, stride=2, padding=0, bias=True)
    like = row.float_module(
        row.chain(Geometry(in_per_group=4, out_per_group=6, padding=(0, 0, 0), stride=(2, 2, 2), kernel=(3, 3, 3)))
    )
    if row.takes_any_act:
        made = row.qat(4, 6, **({} if row.dims == 0 else {"kernel_size": 3, "stride": 2}), act=nn.PReLU())
    elsewhere = row.qat.from_float(like, "onnxruntime")
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in elsewhere.state_dict().items()}
    made.load_state_dict(elsewhere.state_dict(), strict=True)
    x = row.input(Geometry(in_per_group=4))
    assert torch.equal(made(x), elsewhere(x))


# --- fake quantization off: the float chain, to the last digits


@every_row
@strategies.per_row
@given(data=st.data())
def test_without_fake_quant_training_is_the_float_chains(row: Row, data: st.DataObject) -> None:
    g, n = data.draw(strategies.geometries(row)), data.draw(strategies.norm_states)
    preset = data.draw(strategies.presets)
    chain = row.chain(g, n, data.draw(strategies.acts(row)), dtype=torch.float64)
    wanted = plain(chain)
    parameters = [p for m in chain for p in m.parameters()]
    q = row.to_qat(chain, preset)
    q.apply(eagerq.disable_fake_quant)
    for seed in (1, 2):
        x = row.input(g, dtype=torch.float64, seed=seed)
        assert_same(gradients(q, parameters, x), gradients(wanted, list(wanted.parameters()), x))
    if row.norm is not None:
        assert_same(q.bn.state_dict(), next(m for m in wanted if hasattr(m, "num_features")).state_dict())
    assert_same(q.eval()(x), wanted.eval()(x))


# --- fake quantization on, against the oracle


def spec_of(preset: str) -> QuantSpec:
    spec = PRESETS[preset].weight
    assert spec is not None
    return spec


def eval_oracle(row: Row, g: Geometry, chain: list[nn.Module], preset: str, x: Any, input_scale: float | None) -> Tensor:
    op: Any = chain[0]
    norm = chain[1] if row.norm is not None else None
    bias = numpy(getattr(op, "bias", None))
    weight, bias = oracles.deployed_weights(row, g, PRESETS[preset], numpy(op.weight), bias, norm, input_scale)
    out = torch.from_numpy(oracles.linear_map(row, g, x, weight, bias))
    return chain[-1](out) if row.act is not None else out


@every_op
@strategies.per_row
@given(data=st.data())
def test_oracles_linear_map_is_torchs(row: Row, data: st.DataObject) -> None:
    g = data.draw(strategies.geometries(row))
    op: Any = row.chain(g, dtype=torch.float64)[0]
    x = row.input(g, dtype=torch.float64)
    found = oracles.linear_map(row, g, x.numpy(), numpy(op.weight), numpy(getattr(op, "bias", None)))
    assert_same(torch.from_numpy(found), op(x).detach())


@every_op
@strategies.per_row
@given(data=st.data())
def test_eval_is_the_folded_oracle(row: Row, data: st.DataObject) -> None:
    g, n = data.draw(strategies.geometries(row)), data.draw(strategies.foldable_norm_states)
    preset = data.draw(strategies.presets)
    chain = row.chain(g, n, data.draw(strategies.acts(row)), dtype=torch.float64)
    q = row.to_qat(chain, preset).eval()
    x = row.input(g, dtype=torch.float64)
    assert_same(q(x), eval_oracle(row, g, chain, preset, x.numpy(), None))
    if row.op is nn.Embedding:
        return
    q.input_fake_quant = quantizer = FakeQuantize(get_qconfig(preset).activation).double()  # type: ignore[arg-type]
    assert torch.equal(quantizer.train()(x), x)  # no range is known before the first batch
    codes = quantizer.eval()(x)
    wanted = eval_oracle(row, g, chain, preset, codes.numpy(), float(quantizer.scale))
    assert_same(q(x), wanted)


@pytest.mark.parametrize("row", [r for r in OP_ROWS if not (r.transposed and r.norm)], ids=str)
@strategies.per_row
@given(data=st.data())
def test_direct_training_form_is_the_norm_of_the_quantized_weight(row: Row, data: st.DataObject) -> None:
    g, n = data.draw(strategies.geometries(row)), data.draw(strategies.norm_states)
    check_direct(row, g, n, data)


@pytest.mark.parametrize("row", [r for r in FOLDING_ROWS if r.transposed], ids=str)
@strategies.per_row
@given(data=st.data())
def test_direct_training_form_of_ungrouped_transposes(row: Row, data: st.DataObject) -> None:
    g = data.draw(strategies.geometries(row))
    check_direct(row, Geometry(**{**vars(g), "groups": 1}), data.draw(strategies.norm_states), data)


def check_direct(row: Row, g: Geometry, n: NormState, data: st.DataObject) -> None:
    chain = row.chain(g, n, data.draw(strategies.acts(row)), dtype=torch.float64)
    wanted = plain(chain)
    spec = spec_of("onnxruntime")
    with torch.no_grad():
        weight: Any = wanted[0].weight
        weight.copy_(torch.from_numpy(oracles.fake_quantize_weight(numpy(weight), spec, oracles.weight_axis(row, spec))))
    parameters = [p for m in chain for p in m.parameters()]
    q = row.to_qat(chain, "onnxruntime")
    x = row.input(g, dtype=torch.float64)
    # narrow codes by the maximum clip nothing: the straight-through gradient is that of the quantized weight
    assert_same(gradients(q, parameters, x), gradients(wanted, list(wanted.parameters()), x))
    if row.norm is not None:
        assert_same(q.bn.state_dict(), wanted[1].state_dict())


@every_folding
@strategies.per_row
@given(data=st.data())
def test_textbook_training_form(row: Row, data: st.DataObject) -> None:
    """One scale a tensor, and grouped transposes: BN(op(x, fq(aW)/a)) where the codes carry the weight."""
    preset = data.draw(st.sampled_from(["per_tensor", "qnn", "vitis", *(["onnxruntime"] if row.transposed else [])]))
    g, n = data.draw(strategies.geometries(row)), data.draw(strategies.foldable_norm_states)
    if preset == "onnxruntime":
        assume(g.groups > 1)
    chain = row.chain(g, n, data.draw(strategies.acts(row)), dtype=torch.float64)
    op: Any = chain[0]
    norm = copy.deepcopy(chain[1])
    before, after, _ = oracles.textbook_weights(row, g, spec_of(preset), numpy(op.weight), norm)
    x = row.input(g, dtype=torch.float64)
    wanted = norm(torch.from_numpy(oracles.linear_map(row, g, x.numpy(), before, numpy(op.bias))))
    wanted = wanted + torch.from_numpy(oracles.linear_map(row, g, x.numpy(), after, None))
    q = row.to_qat(chain, preset)
    found = q(x)
    assert_same(found, chain[-1](wanted) if row.act is not None else wanted)
    assert_same(q.bn.state_dict(), norm.state_dict())


@every_folding
@pytest.mark.parametrize("observing", [True, False], ids=["observing", "never-observed"])
def test_textbook_form_is_plain_where_every_channel_is_healthy(row: Row, observing: bool) -> None:
    g = Geometry(in_per_group=4, groups=2)
    chain = row.chain(g, NormState(gammas=(1.0, -0.7, 1.3)), dtype=torch.float64)
    op: Any = chain[0]
    before, after, healthy = oracles.textbook_weights(row, g, spec_of("per_tensor"), numpy(op.weight), chain[1])
    assert all(healthy)
    assert not after.any()
    wanted = plain(chain)
    with torch.no_grad():
        wanted[0].weight.copy_(torch.from_numpy(before))  # type: ignore[operator,union-attr]
    q = row.to_qat(chain, "per_tensor")
    if not observing:
        q.apply(eagerq.disable_observer)
    x = row.input(g, dtype=torch.float64)
    assert_same(q(x), wanted(x))


@pytest.mark.parametrize("row", [*FOLDING_ROWS, *LONE_ROWS], ids=str)
@every_preset
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_hazardous_gammas_stay_finite(row: Row, preset: str, geometry: str) -> None:
    g = GEOMETRIES[geometry]
    chain = row.chain(g, NormState(gammas=(0.0, 1e-30, -1e-12, 1e-6, -1.0)))
    parameters = [p for m in chain for p in m.parameters()]
    float_chain = plain(chain)
    float_norm: Any = float_chain[1 if row.op else 0]
    q = row.to_qat(chain, preset)
    for state in (None, 0.0):  # then with all gammas zero
        if state is not None:
            nn.init.zeros_(q.bn.weight)
            nn.init.zeros_(float_norm.weight)
        x = row.input(g)
        out, grads = gradients(q, parameters, x)
        float_chain(x)
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(t).all() for t in grads if t is not None)
        torch.testing.assert_close(q.bn.running_var, float_norm.running_var, rtol=0.02, atol=0.0)
        assert torch.isfinite(q.eval()(x)).all()
        q.train()


@every_folding
@strategies.per_row
@given(data=st.data())
def test_quantizing_w_is_quantizing_the_fused_weight(row: Row, data: st.DataObject) -> None:
    """fq(sW)/s == fq(W) for narrow symmetric codes with a scale an output channel, in the oracle itself."""
    g = data.draw(strategies.geometries(row))
    g = Geometry(**{**vars(g), "groups": 1}) if row.transposed else g
    factors = st.floats(1e-6, 1e3).flatmap(lambda f: st.sampled_from([f, -f]))
    s = np.array(data.draw(st.lists(factors, min_size=g.out_channels, max_size=g.out_channels)))
    weight = numpy(row.chain(g, dtype=torch.float64)[0].weight)  # type: ignore[arg-type]
    spec = QuantSpec(bits=data.draw(st.integers(2, 8)), signed=True, symmetric=True, per_channel=True, narrow_range=True)
    axis = oracles.weight_axis(row, spec)
    fused = oracles.fake_quantize_weight(oracles.times_channel(row, g, weight, s), spec, axis, 0.0)
    own = oracles.fake_quantize_weight(weight, spec, axis, 0.0)
    np.testing.assert_allclose(oracles.times_channel(row, g, fused, 1 / s), own, rtol=1e-12)


# --- norms that fold into nothing

#: Presets whose scales are one a channel, symmetric and narrow.
DIRECT = [name for name, config in PRESETS.items() if (w := config.weight) and w.per_channel and w.narrow_range and w.symmetric]


@every_lone
@pytest.mark.parametrize(("preset", "fake_quant"), [*((p, False) for p in sorted(PRESETS)), *((p, True) for p in DIRECT)])
def test_a_lone_norm_trains_as_the_float_norm_bit_for_bit(row: Row, preset: str, fake_quant: bool) -> None:
    """With fake quantization too where each channel has its scale: +-127 of them are the weight itself."""
    chain = row.chain()
    wanted = copy.deepcopy(chain[0])
    parameters = list(chain[0].parameters())
    q = row.to_qat(chain, preset)
    if not fake_quant:
        q.apply(eagerq.disable_fake_quant)
    for seed in (1, 2):
        (out, grads), (expected, wanted_grads) = (
            gradients(m, p, row.input(seed=seed)) for m, p in ((q, parameters), (wanted, list(wanted.parameters())))
        )
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted_grads, strict=True))  # type: ignore[arg-type]
    for key, value in bn_state(wanted).items():
        assert torch.equal(bn_state(q.bn)[key], value), key


@every_lone
@pytest.mark.parametrize("preset", DIRECT)
@pytest.mark.parametrize("quantized_io", [True, False], ids=["quantized-io", "float-io"])
def test_a_lone_norms_codes_are_its_signs(row: Row, preset: str, quantized_io: bool) -> None:
    """``a`` is 127 codes of ``|a| / 127``, so that in eval nothing but the bias and its ends are rounded."""
    q = row.trained(GROUPED, preset, quantized_io=quantized_io).eval()
    a, b = q.folded()
    stored = deploy(q)
    assert torch.equal(stored.weight_codes, (127 * torch.sign(a)).to(torch.int8))
    torch.testing.assert_close(stored.weight_scale, a.abs().reshape(-1) / 127, rtol=2**-22, atol=0.0)
    torch.testing.assert_close(stored.weight, a, rtol=2**-22, atol=0.0)
    if quantized_io:
        return
    x = row.input(GROUPED, seed=5)
    torch.testing.assert_close(q(x), q.bn(x), rtol=1e-5, atol=1e-6)


@every_lone
@every_preset
@pytest.mark.parametrize("gammas", [(0.0,), (1e-30, -1.0), (1.0, 1e3)], ids=str)
def test_a_lone_norm_evaluates_its_quantized_map(row: Row, preset: str, gammas: tuple[float, ...]) -> None:
    """Against float64: the folded scale by a code's half, the bias as it is; and one of zero leaves the bias alone."""
    q = row.to_qat(row.chain(n=NormState(gammas=gammas), dtype=torch.float64), preset)
    q(row.input(dtype=torch.float64))
    q.eval()
    x = row.input(dtype=torch.float64)
    a, b = (t.reshape(1, -1, *(1,) * row.dims) for t in q.folded())
    scale = q.quantized_weight().scale.reshape(1, -1, *(1,) * row.dims)
    error = (q(x) - (a * x + b)).abs()
    assert bool((error <= x.abs() * scale * 0.500001 + 1e-9).all())
    assert torch.equal(deploy(q)(x), q(x))


@every_lone
@pytest.mark.parametrize("preset", ["onnxruntime", "per_tensor"])
def test_a_lone_norm_takes_what_the_float_norm_takes(row: Row, preset: str) -> None:
    for quantized_io in (True, False):
        q = row.trained(PLAIN, preset, quantized_io=quantized_io)
        wanted = copy.deepcopy(q.bn)
        deployed = deploy(copy.deepcopy(q).eval())
        x = row.input()
        narrow, wide = torch.cat([x, x], 1), x[:, :1]
        for training in (True, False):
            modules = [wanted.train(training), q.train(training), *([] if training else [deployed])]
            for module in modules:
                for wrong in (x[0], x[..., 0], x[None]):
                    with pytest.raises(ValueError, match=rf"expected {row.dims + 2}D input \(got {wrong.dim()}D input\)"):
                        module(wrong)
                for wrong in (narrow, wide):
                    with pytest.raises(RuntimeError):
                        module(wrong)
                assert module(x[:0]).shape == x[:0].shape
                with pytest.raises(TypeError):
                    module()


@every_lone
def test_a_lone_norms_constructor_takes_the_float_norms_arguments(row: Row) -> None:
    made = row.qat(6, eps=1e-3, momentum=0.2, dtype=torch.float64, qconfig="per_tensor")
    assert (made.bn.eps, made.bn.momentum, made.num_features, made.qconfig) == (1e-3, 0.2, 6, PRESETS["per_tensor"])
    assert made.weight.dtype == torch.float64
    assert made.training
    assert made(torch.randn(2, 6, *(3,) * row.dims, dtype=torch.float64)).dtype == torch.float64


# --- a hundred steps


HUNDRED_STEPS = [(row, preset, 1) for row in NORM_ROWS for preset in ("onnxruntime", "per_tensor")]
HUNDRED_STEPS += [(row, "onnxruntime", 2) for row in FOLDING_ROWS if row.transposed]  # no scale an output channel there


@pytest.mark.parametrize(("row", "preset", "groups"), HUNDRED_STEPS, ids=str)
def test_statistics_follow_the_float_model(row: Row, preset: str, groups: int) -> None:
    """The weights differ by 8-bit rounding, at most 1/254 of the largest: statistics agree within 2 %."""
    g = Geometry(groups=groups, in_per_group=4, out_per_group=6 // groups, kernel=(3, 3, 2), batch=4, size=(5, 4, 4))
    chain = row.chain(g, NormState(gammas=(1.0, 1e-3, 1e-5, 1e-7, 0.0, -0.5)))
    float_chain = plain(chain)
    float_norm: Any = next(m for m in float_chain if hasattr(m, "num_features"))
    q = row.to_qat(chain, preset)
    target = torch.randn(plain(chain)(row.input(g)).shape, generator=torch.Generator().manual_seed(3))
    for step in range(100):
        x = row.input(g, seed=step % 10)
        for module in (float_chain, q):
            parameters = list(module.parameters())
            loss = (module(x) - target).square().mean()
            for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.data.sub_(grad, alpha=1e-3)
    assert all(torch.isfinite(p).all() for p in q.parameters())  # and so was every gradient
    mean, var = float_norm.running_mean, float_norm.running_var
    assert not torch.allclose(var, row.chain(g)[1 if row.op else 0].running_var, rtol=0.1)  # they did move
    torch.testing.assert_close(q.bn.running_var, var, rtol=0.02, atol=0.0)
    assert ((q.bn.running_mean - mean).abs() / var.sqrt()).max() < 0.02
    assert torch.equal(q.bn.num_batches_tracked, float_norm.num_batches_tracked)
    assert torch.isfinite(q.eval()(x)).all()


# --- deployment


def deploy(q: Any) -> Any:
    """Integers, with fixed quantizers in place of the fake ones, over a copy of the module."""
    deployed: Any = QuantizedModule.from_qat(copy.deepcopy(q))
    for slot in ("input_fake_quant", "activation_post_process"):
        if getattr(deployed, slot) is not None:
            setattr(deployed, slot, fixed_quantizer(getattr(deployed, slot), slot))
    return deployed


@every_host
@every_preset
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("quantized_io", [True, False], ids=["quantized-io", "float-io"])
def test_deployed_equals_eval_bit_for_bit(row: Row, preset: str, geometry: str, quantized_io: bool) -> None:
    g = GEOMETRIES[geometry]
    for dtype in (torch.float64, torch.bfloat16, torch.float32) if quantized_io and geometry == "plain" else (torch.float32,):
        q = row.trained(g, preset, dtype=dtype, quantized_io=quantized_io).eval()
        deployed = deploy(q)
        x = row.input(g, dtype=dtype, seed=9)
        assert torch.equal(deployed(x), q(x))
        with torch.no_grad():
            assert torch.equal(deployed(x), q(x))
    spec = spec_of(preset)
    assert deployed.weight_codes.dtype == (torch.int8 if spec.signed else torch.uint8)
    assert deployed.weight_codes.shape == q.weight.shape
    low, high = oracles.integer_range(spec)
    assert low <= int(deployed.weight_codes.min())
    assert int(deployed.weight_codes.max()) <= high
    reached = int(deployed.weight_codes.int().abs().max())
    assert reached >= (high / 2 if spec.power_of_two else high)  # the grid is used to its end
    has_bias = row.norm is not None or q.bias is not None
    kind = PRESETS[preset].bias
    if quantized_io and has_bias and kind is not None:
        assert deployed.bias_codes.dtype == (torch.int32 if kind == "int32" else torch.int8)
        assert deployed.bias_codes.shape == (g.out_channels,)
    elif has_bias:
        assert deployed.bias_codes.is_floating_point()
        assert deployed.bias_scale is None
    else:
        assert deployed.bias_codes is None
    if quantized_io:
        signed = get_qconfig(preset).activation.signed  # type: ignore[union-attr]
        assert deployed.activation_post_process.zero_point.dtype == (torch.int8 if signed else torch.uint8)


@every_host
@strategies.per_row
@given(data=st.data())
def test_deployed_equals_eval_for_any_spec(row: Row, data: st.DataObject) -> None:
    g, n = data.draw(strategies.geometries(row)), data.draw(strategies.foldable_norm_states)
    config = data.draw(strategies.qconfigs())
    q = row.to_qat(row.chain(g, n, data.draw(strategies.acts(row))), config)
    attach_quantizers(row, q, config)
    if data.draw(st.booleans()):
        q.input_fake_quant, producer = None, q.input_fake_quant
        q.set_producer_quantizer(producer)
        if producer is not None:
            producer(row.input(g))
    q(row.input(g))
    q.eval()
    x = row.input(g, seed=5)
    assume(q.activation_post_process.has_range())  # a ReLU that let nothing through has no range
    deployed = deploy(q)
    assert torch.equal(deployed(x), q(x))
    low, high = oracles.integer_range(config.weight)
    assert deployed.weight_codes.dtype == (torch.int8 if config.weight.signed else torch.uint8)
    assert low <= int(deployed.weight_codes.min())
    assert int(deployed.weight_codes.max()) <= high
    if deployed.bias_codes is not None:
        kind = config.bias if q.input_quantizer is not None else None
        assert deployed.bias_codes.dtype == {None: torch.float32, "int32": torch.int32}.get(kind, torch.int8)


@pytest.mark.parametrize("row", [r for r in OP_ROWS if r.op is not nn.Embedding], ids=str)
@pytest.mark.parametrize("observing", [True, False])
def test_a_filter_of_zeros_keeps_its_bias(row: Row, observing: bool) -> None:
    chain = row.chain()
    with torch.no_grad():
        for part in oracles.output_parts(row, PLAIN, chain[0].weight)[:2]:  # type: ignore[arg-type]
            chain[0].weight[part] = 0  # type: ignore[index]
    q = row.to_qat(chain)
    attach_quantizers(row, q, "onnxruntime")
    q(row.input())
    if not observing:
        q.apply(eagerq.disable_observer)
    q.eval()
    bias = q.folded()[1][:2]
    assert bias.abs().min() > 0
    torch.testing.assert_close(deploy(q).bias[:2], bias, rtol=1e-6, atol=0.0)


@every_op
def test_a_huge_bias_beside_tiny_weights_stays_in_int32(row: Row) -> None:
    if row.norm is None and row.op is nn.Embedding:
        return
    for g in (PLAIN, GROUPED):
        g = Geometry(**{**vars(g), "bias": True})
        q = row.trained(g)
        with torch.no_grad():
            q.weight.mul_(1e-12)
            (q.bn.bias if row.norm is not None else q.bias).fill_(1e6)
        q.eval()
        deployed = deploy(q)
        assert int(deployed.bias_codes.abs().max()) <= 2**30 * (1 + 2**-20)  # rounding of float32 scales
        x = row.input(g)
        assert torch.equal(deployed(x), q(x))
        torch.testing.assert_close(deployed.bias, torch.full((g.out_channels,), 1e6))


# --- arguments of the float forward


@pytest.mark.parametrize("row", [r for r in OP_ROWS if r.transposed], ids=str)
def test_transposes_take_an_output_size(row: Row) -> None:
    g = Geometry(stride=(2, 2, 2), padding=(1, 1, 1))
    chain = row.chain(g, dtype=torch.float64)
    x = row.input(g, dtype=torch.float64)
    size = [n + 1 for n in row.float_module(copy.deepcopy(chain))(x).shape[2:]]
    float_module = copy.deepcopy(row.float_module(copy.deepcopy(chain)))
    for preset in ("onnxruntime", "per_tensor"):
        q = row.to_qat(copy.deepcopy(chain), preset)
        q.apply(eagerq.disable_fake_quant)
        wanted = copy.deepcopy(float_module)(x, output_size=size)
        assert list(wanted.shape[2:]) == size
        assert_same(q(x, output_size=size), wanted)
        assert_same(
            copy.deepcopy(q)(x, size), copy.deepcopy(float_module)(copy.deepcopy(x), output_size=size)
        ) if row.norm is None else None
        q.apply(eagerq.enable_fake_quant)
        q.eval()
        assert torch.equal(deploy(q)(x, output_size=size), q(x, output_size=size))


@pytest.mark.parametrize("row", [r for r in FOLDING_ROWS if r.op is nn.Linear], ids=str)
def test_linear_with_norm_refuses_sequences(row: Row) -> None:
    q = row.to_qat(row.chain())
    for module in (q, q.eval()):
        with pytest.raises(ValueError, match=r"folds for inputs of shape \(N, C\), found \(2, 3, 3\)"):
            module(torch.randn(2, 3, 3))


@pytest.mark.parametrize("name", ["Linear", "LinearReLU", "LinearAct"])
def test_linear_without_norm_takes_sequences(name: str) -> None:
    row = next(r for r in ROWS if r.name == name)
    q = row.trained()
    x = torch.randn(2, 5, 3)
    assert q(x).shape == (2, 5, 4)
    assert torch.equal(deploy(q.eval())(x), q(x))


def test_sparse_embedding_gradients_stay_sparse() -> None:
    q = nnqat.Embedding.from_float(nn.Embedding(9, 4, sparse=True))
    q(torch.tensor([1, 3, 3])).sum().backward()
    assert q.weight.grad is not None
    assert q.weight.grad.is_sparse
    assert q.weight.grad.to_dense().sum(1).tolist() == [0, 4, 0, 8, 0, 0, 0, 0, 0]


def test_padding_row_of_an_embedding_learns_nothing() -> None:
    q = nnqat.Embedding.from_float(nn.Embedding(9, 4, padding_idx=3))
    q(torch.tensor([1, 3, 3])).sum().backward()
    assert q.weight.grad is not None
    assert q.weight.grad.sum(1).tolist() == [0, 4, 0, 0, 0, 0, 0, 0, 0]
