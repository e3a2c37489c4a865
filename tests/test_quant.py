"""Specs, configs, codes and the fake-quantization operator, against exact arithmetic."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import eagerq
from eagerq.errors import EagerqError, SpecError, StateError
from eagerq.quant import (
    PRESETS,
    FakeQuantize,
    QConfig,
    QConfigMapping,
    QuantSpec,
    dequantize,
    fake_quantize,
    get_qconfig,
    quantization_params,
    quantize,
)
from eagerq.quant.functional import straight_through
from eagerq.quant.spec import OBSERVERS, as_mapping, selects

SHIFTED = QuantSpec(signed=True, symmetric=True, power_of_two=True)


# --- specs


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_combination_is_a_grid_or_an_error(bits: int, flags: tuple[bool, ...]) -> None:
    signed, symmetric, per_channel, narrow = flags
    valid = ((signed and symmetric) or not narrow) and (symmetric or not per_channel)
    if not valid:
        with pytest.raises(SpecError, match=r"pass .*=(True|False)"):
            QuantSpec(bits, signed, symmetric, per_channel, narrow)
        return
    spec = QuantSpec(bits, signed, symmetric, per_channel, narrow)
    assert (spec.quant_min, spec.quant_max) == oracles.integer_range(spec)
    assert spec.quant_max - spec.quant_min + 1 == 2**bits - narrow
    assert spec.quant_min <= spec.fixed_zero_point <= spec.quant_max
    assert str(spec) == (
        f"{'s' if signed else 'u'}{bits} {'symmetric' if symmetric else 'affine'}{' per channel' if per_channel else ''}"
        f" [{spec.quant_min}, {spec.quant_max}] by moving_average"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 0},
        {"bits": -8},
        {"bits": 8.0},
        {"bits": "8"},
        {"bits": True},
        {"bits": None},
        {"observer": "histogram"},
        {"observer": None},
        {"averaging_constant": 0.0},
        {"averaging_constant": 1.5},
        {"averaging_constant": math.nan},
        {"averaging_constant": "0.1"},
        {"averaging_constant": None},
        {"percentile": 50.0},
        {"percentile": 100.1},
        {"percentile": math.nan},
        {"percentile": "99"},
        {"percentile": None},
    ],
    ids=str,
)
def test_senseless_specs_name_the_field_and_what_was_found(wrong: dict[str, Any]) -> None:
    ((field, value),) = wrong.items()
    with pytest.raises(SpecError) as caught:
        QuantSpec(**wrong)
    assert field in str(caught.value)
    assert repr(value) in str(caught.value)
    assert isinstance(caught.value, (ValueError, EagerqError))


def test_specs_and_configs_are_frozen_values() -> None:
    spec, config = QuantSpec(), PRESETS["onnxruntime"]
    for value, field in ((spec, "bits"), (config, "weight"), (QConfigMapping(config), "default")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)
        assert pickle.loads(pickle.dumps(value)) == value
        assert copy.deepcopy(value) == value
        assert len({value, copy.deepcopy(value)}) == 1
    assert QuantSpec(bits=7) != spec


def test_presets_are_those_of_the_engines() -> None:
    u8, s8 = "u8 affine [0, 255] by moving_average", "s8 affine [-128, 127] by moving_average"
    per_channel = "s8 symmetric per channel [-127, 127] by min_max"
    shifted = "s8 symmetric power-of-two [-128, 127] by"
    assert {name: str(config) for name, config in PRESETS.items()} == {
        "onnxruntime": f"activation {u8}; weight {per_channel}; at outputs; split activations",
        "onnxruntime-arm": f"activation {s8}; weight {per_channel}; at outputs; split activations",
        "openvino": f"activation {u8}; weight {per_channel}; at outputs",
        "tensorrt": "activation s8 symmetric [-128, 127] by moving_average;"
        f" weight {per_channel}; bias float; at inputs",
        "qnn": f"activation {u8}; weight u8 affine [0, 255] by min_max; at outputs; split activations (gates: sigmoid);"
        " last outputs quantized",
        "vitis": f"activation {shifted} moving_average; weight {shifted} min_max; bias {shifted} min_max; at outputs;"
        " split activations (gates: sigmoid); last outputs quantized",
        "per_tensor": f"activation {u8}; weight s8 affine [-128, 127] by min_max; at outputs; split activations",
    }
    assert len(set(PRESETS.values())) == len(PRESETS)
    for name, config in PRESETS.items():
        assert get_qconfig(name) is config
        assert get_qconfig(config) is config


@pytest.mark.parametrize(
    "make",
    [
        lambda: QConfig(activation="u8", weight=None),  # type: ignore[arg-type]
        lambda: QConfig(activation=None, weight=8),  # type: ignore[arg-type]
        lambda: QConfig(activation=QuantSpec(symmetric=True, per_channel=True), weight=None),
        lambda: QConfig(activation=None, weight=None, placement="everywhere"),  # type: ignore[arg-type]
        lambda: QConfig(activation=None, weight=None, gates=("tanh",)),
        lambda: QConfig(activation=None, weight=None, gates="sigmoid"),  # type: ignore[arg-type]
        lambda: QConfig(QuantSpec(), QuantSpec(), bias="int16"),  # type: ignore[arg-type]
        lambda: QConfig(QuantSpec(), SHIFTED, bias=SHIFTED),
        lambda: QConfig(SHIFTED, None, bias=SHIFTED),
        lambda: QConfig(SHIFTED, SHIFTED, bias=QuantSpec(signed=True, symmetric=True)),
        lambda: QConfig(SHIFTED, SHIFTED, bias=dataclasses.replace(SHIFTED, signed=False)),
        lambda: QConfig(SHIFTED, SHIFTED, bias=dataclasses.replace(SHIFTED, per_channel=True)),
        lambda: get_qconfig("qnnpack"),
        lambda: get_qconfig(None),  # type: ignore[arg-type]
        lambda: as_mapping(3),  # type: ignore[arg-type]
        lambda: as_mapping({"layer1.*": "qnnpack"}),
        lambda: PRESETS["onnxruntime"].override("", None),
        lambda: PRESETS["onnxruntime"].override(3, None),  # type: ignore[arg-type]
        lambda: PRESETS["onnxruntime"].override(int, None),  # type: ignore[arg-type]
        lambda: PRESETS["onnxruntime"].override("a", "nothing"),
    ],
)
def test_senseless_configs_are_errors(make: Any) -> None:
    with pytest.raises(SpecError):
        make()


def test_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(SpecError, match=f"unknown preset 'qnnpack'; the presets are {', '.join(PRESETS)}"):
        get_qconfig("qnnpack")


def test_the_last_rule_that_selects_a_module_wins() -> None:
    base, other = PRESETS["onnxruntime"], PRESETS["per_tensor"]
    mapping = base.override("layer1.*", None).override("layer1.0.*", other).override(nn.Linear, None)
    assert mapping.lookup("layer2.0.conv", (nn.Conv2d,)) == base
    assert mapping.lookup("layer1.1.conv", (nn.Conv2d,)) is None
    assert mapping.lookup("layer1.0.conv", (nn.Conv2d,)) == other
    assert mapping.lookup("layer1.0.fc", (nn.Linear,)) is None
    assert mapping.override("layer1.0.fc", "per_tensor").lookup("layer1.0.fc", (nn.Linear,)) == other
    assert base.override("x", None).default == base  # and the config itself is as it was
    assert str(mapping).splitlines() == [f"default: {base}", "layer1.*: float", f"layer1.0.*: {other}", "Linear: float"]


def test_types_are_matched_exactly_and_names_wholly() -> None:
    class MyLinear(nn.Linear):
        pass

    assert selects(nn.Linear, "fc", (nn.Linear,))
    assert not selects(nn.Linear, "fc", (MyLinear,))
    assert selects("layer?.fc", "layer1.fc", ())
    assert not selects("layer?", "layer1.fc", ())
    assert not selects("FC", "fc", ())


def test_a_mapping_says_its_default_under_the_empty_name() -> None:
    per_tensor = PRESETS["per_tensor"]
    assert as_mapping(None).default == as_mapping({}).default == PRESETS["onnxruntime"]
    assert as_mapping({"": per_tensor, "fc": None}) == QConfigMapping(per_tensor, (("fc", None),))
    assert as_mapping({"": None, nn.Linear: "per_tensor"}) == QConfigMapping(None, ((nn.Linear, per_tensor),))
    assert as_mapping("per_tensor") == as_mapping(per_tensor) == QConfigMapping(per_tensor)
    assert as_mapping(QConfigMapping(per_tensor)) == QConfigMapping(per_tensor)


# --- scale and zero point

reals = st.floats(-(2.0**100), 2.0**100, width=32)


@given(spec=strategies.specs(), ends=st.lists(st.tuples(reals, reals).map(sorted), min_size=1, max_size=4))
def test_params_are_the_oracles_and_the_grid_covers_the_range(spec: QuantSpec, ends: list[list[float]]) -> None:
    low, high = (torch.tensor([e[i] for e in ends], dtype=torch.float64) for i in (0, 1))
    scale, zero = quantization_params(spec, low, high)
    assert zero.dtype == torch.int32
    assert scale.shape == zero.shape == low.shape
    for s, z, (a, b) in zip(scale.tolist(), zero.tolist(), ends, strict=True):
        assert (s, z) == oracles.grid(spec, a, b)
        first, last = oracles.integer_range(spec)
        assert first <= z <= last
        assert s >= oracles.LEAST_SCALE
        bottom, top = (first - z) * s, (last - z) * s
        assert bottom <= 0 <= top
        if not spec.symmetric or spec.signed:  # u-symmetric leaves its lowest code free
            assert bottom <= a + s * 0.5000001
            assert top >= b - s * 0.5000001
    assert torch.equal(dequantize(zero, scale, zero), torch.zeros_like(scale))  # zero is exact


# --- codes

_NUMPY: dict[torch.dtype, Any] = {torch.float64: np.float64}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def scalars(x: Tensor) -> list[Any]:
    """Elements in the dtype that the arithmetic runs in."""
    kind = _NUMPY.get(x.dtype, np.float32)
    return [kind(v) for v in x.double().flatten().tolist()]


def draw_tensor(values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


anything = st.one_of(
    st.floats(width=32), st.integers(-300, 300).map(lambda i: i / 2), st.sampled_from([math.inf, -math.inf, math.nan])
)
scales = st.one_of(st.sampled_from([1.0, 0.5, 0.0123, 2.0**-40]), st.floats(2.0**-40, 1e4, width=32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(spec=strategies.specs(), values=st.lists(anything, min_size=1, max_size=12), scale=scales, data=st.data())
def test_codes_and_gradient_mask_are_the_oracles(
    dtype: torch.dtype, spec: QuantSpec, values: list[float], scale: float, data: st.DataObject
) -> None:
    first, last = oracles.integer_range(spec)
    zero = spec.fixed_zero_point if spec.symmetric else data.draw(st.integers(first, last))
    x = draw_tensor(values, dtype)
    s, z = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    kind = _NUMPY.get(dtype, np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        wanted = [oracles.code(v, kind(np.float32(scale)), zero, first, last) for v in scalars(x)]
        passes = [oracles.inside(v, kind(np.float32(scale)), zero, first, last) for v in scalars(x)]
    for shape in ((), (1,)):
        codes = quantize(x, s.reshape(shape), z.reshape(shape), first, last)
        np.testing.assert_array_equal(codes.double().numpy(), wanted)
    leaf = x.clone().requires_grad_()
    out = fake_quantize(leaf, s, z, first, last)
    real = [(kind(w) - kind(zero)) * kind(np.float32(scale)) for w in wanted]
    assert out.dtype == dtype
    assert out.shape == x.shape
    np.testing.assert_array_equal(out.detach().double().numpy(), draw_tensor([float(r) for r in real], dtype).double().numpy())
    out.backward(torch.full_like(out, 3.0))
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [3.0 * p for p in passes]
    for v, w in zip(scalars(x), wanted, strict=True):
        if math.isfinite(v):
            slack = Fraction(1, 2**22)
            assert oracles.is_nearest_code(w, float(v), float(np.float32(scale)), zero, first, last, slack)


def test_ties_go_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    assert quantize(x, one, zero, -128, 127).tolist() == [-2, -2, 0, 0, 2, 2, 4]
    assert fake_quantize(x * 0.25, one * 0.25, zero + 3, 0, 5).tolist() == [-0.5, -0.5, 0, 0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last", "expanded"])
def test_any_memory_layout(layout: str) -> None:
    x = torch.randn(4, 6, 3, 5)
    x = {
        "transposed": x.transpose(0, 3),
        "strided": x[::2, 1::2],
        "channels_last": x.to(memory_format=torch.channels_last),
        "expanded": x[:1].expand(4, 6, 3, 5),
    }[layout]
    scale, zero = torch.rand(x.shape[1]) + 0.01, torch.full((x.shape[1],), 3, dtype=torch.int32)
    shape = (1, -1, 1, 1)
    a = fake_quantize(x, scale.reshape(shape), zero.reshape(shape), 0, 255)
    b = fake_quantize(x.contiguous(), scale.reshape(shape), zero.reshape(shape), 0, 255)
    assert torch.equal(a, b)
    if layout == "channels_last":
        assert a.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2)])
def test_empty_tensors_pass_through(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    out = fake_quantize(x, torch.tensor(0.1), torch.tensor(3), 0, 255)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_fake_quantize_leaves_its_arguments_alone() -> None:
    x, scale, zero = torch.randn(5), torch.tensor([0.1]), torch.tensor([4], dtype=torch.int32)
    kept = x.clone(), scale.clone(), zero.clone()
    fake_quantize(x, scale, zero, 0, 15)
    quantize(x, scale, zero, 0, 15)
    for now, before in zip((x, scale, zero), kept, strict=True):
        assert torch.equal(now, before)


def test_straight_through_has_one_tensors_value_and_the_others_gradient() -> None:
    real, quantized = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    out = straight_through(real, quantized)
    assert torch.equal(out, quantized)
    (out * torch.arange(4.0)).sum().backward()
    assert real.grad is not None
    assert real.grad.tolist() == [0, 1, 2, 3]
    assert quantized.grad is None


# --- the module


def by_oracle(module: FakeQuantize, x: Tensor) -> Tensor:
    """The real values of ``x``'s codes by the module's scales and zero points."""
    first, last = oracles.integer_range(module.spec)
    out = torch.empty_like(x)
    parts = oracles.channels(x, module.axis if module.channels else None)
    for part, s, z in zip(parts, module.scale.tolist(), module.zero_point.tolist(), strict=True):
        real = [(oracles.code(v, s, z, first, last) - z) * s for v in x[part].flatten().tolist()]
        out[part] = torch.tensor(real, dtype=x.dtype).reshape(x[part].shape)
    return out


@given(spec=strategies.specs(), seed=st.integers(0, 99))
def test_module_quantizes_on_the_grid_of_what_it_observed(spec: QuantSpec, seed: int) -> None:
    """In training of the batches before, in eval of all."""
    generator = torch.Generator().manual_seed(seed)
    batches = [size * torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) for size in (1, 3, 0.5)]
    module = FakeQuantize(spec, 5 if spec.per_channel else None, axis=1).double()
    observer = module.activation_post_process
    for i, x in enumerate(batches):
        wanted = by_oracle(module, x) if i else x
        y = module(x)
        assert torch.equal(y, wanted)
        lows, highs = (t.reshape(-1).tolist() for t in (observer.min_val, observer.max_val))
        assert list(zip(module.scale.tolist(), module.zero_point.tolist(), strict=True)) == [
            oracles.grid(spec, a, b) for a, b in zip(lows, highs, strict=True)
        ]
        if i:
            assert len(y.unique()) <= (2**spec.bits) * (5 if spec.per_channel else 1)
    for x in batches:
        assert torch.equal(module.eval()(x), by_oracle(module, x))


def flags(module: FakeQuantize) -> tuple[bool, bool]:
    return module.fake_quant_enabled, module.observer_enabled


def test_flags_are_plain_bools_that_apply_toggles() -> None:
    model = nn.Sequential(FakeQuantize(QuantSpec()), nn.Sequential(FakeQuantize(QuantSpec()), nn.ReLU()))
    for verb, wanted in (
        (eagerq.disable_observer, (True, False)),
        (eagerq.disable_fake_quant, (False, False)),
        (eagerq.enable_observer, (False, True)),
        (eagerq.enable_fake_quant, (True, True)),
    ):
        assert model.apply(verb) is model
        for module in (model[0], model[1][0]):  # type: ignore[index]
            assert flags(module) == wanted
            assert all(type(f) is bool for f in flags(module))
    assert "observer_enabled=False" in repr(FakeQuantize(QuantSpec()).apply(eagerq.disable_observer))


def test_nothing_observed_passes_through() -> None:
    x = torch.randn(9)
    fresh = FakeQuantize(QuantSpec()).eval()
    assert torch.equal(fresh(x), x)
    blind = FakeQuantize(QuantSpec()).apply(eagerq.disable_observer)
    assert torch.equal(blind(x), x)
    assert not blind.observed


def test_disabled_fake_quant_still_observes() -> None:
    module = FakeQuantize(QuantSpec(observer="min_max")).apply(eagerq.disable_fake_quant)
    x = torch.tensor([-1.0, 3.0])
    assert torch.equal(module(x), x)
    assert module.activation_post_process.min_val == -1
    assert module.activation_post_process.max_val == 3


def test_learning_happens_in_training_only() -> None:
    module = FakeQuantize(QuantSpec(observer="min_max"))
    module(torch.tensor([-1.0, 3.0]))
    before = copy.deepcopy(module.state_dict())
    module.eval()(torch.tensor([-100.0, 300.0]))
    module.train().apply(eagerq.disable_observer)(torch.tensor([-100.0, 300.0]))
    module.apply(eagerq.enable_observer)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    module(torch.tensor([-100.0, 300.0]))
    assert module.activation_post_process.max_val == 300


@given(spec=strategies.specs())
def test_a_weights_scale_is_that_of_the_weight_given(spec: QuantSpec) -> None:
    module = FakeQuantize(spec, 3 if spec.per_channel else None, 0, memoryless=True)
    fresh = copy.deepcopy(module)
    weight = torch.randn(3, 8)
    y = module(weight)
    if spec.observer == "moving_average":
        return
    assert torch.equal(fresh.eval()(weight), y)  # in eval too, and nothing is stored
    assert not fresh.observed
    assert torch.equal(fresh.scale, torch.ones_like(fresh.scale))
    stored = module.scale.clone()
    torch.testing.assert_close(module.eval()(weight * 2), y * 2)
    assert torch.equal(module.scale, stored)
    module.apply(eagerq.disable_observer)
    scale = module.params_for(weight * 2)[0]
    assert torch.equal(scale, stored)


@given(spec=strategies.specs())
def test_buffers_have_their_final_shape(spec: QuantSpec) -> None:
    for memoryless in (False, True):
        module = FakeQuantize(spec, 3 if spec.per_channel else None, 0, memoryless=memoryless)
        before = {k: (v.shape, v.dtype) for k, v in module.state_dict().items()}
        module(torch.randn(3, 8))
        assert {k: (v.shape, v.dtype) for k, v in module.state_dict().items()} == before
    assert before["scale"] == ((3,) if spec.per_channel else (1,), torch.float32)
    assert before["activation_post_process.min_val"][0] == ((3,) if spec.per_channel else ())
    assert set(before) == {
        "scale",
        "zero_point",
        "fake_quant_enabled",
        "observer_enabled",
        "activation_post_process.min_val",
        "activation_post_process.max_val",
    }


@given(spec=strategies.specs())
def test_state_survives_save_load_copy_and_pickle(spec: QuantSpec) -> None:
    channels = 3 if spec.per_channel else None
    module = FakeQuantize(spec, channels)
    x = torch.randn(3, 8)
    module(x)
    module.apply(eagerq.disable_observer).eval()
    loaded = FakeQuantize(spec, channels).eval()
    loaded.load_state_dict(module.state_dict(), strict=True)
    for other in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.observed
        assert flags(other) == (True, False)
        assert torch.equal(other(x), module(x))
        for key, value in module.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)
    unseen = FakeQuantize(spec, channels)
    loaded.load_state_dict(unseen.state_dict(), strict=True)
    assert not loaded.observed
    assert torch.equal(loaded(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_casts_leave_scales_as_they_are(dtype: torch.dtype) -> None:
    module = FakeQuantize(QuantSpec())
    x = torch.randn(50)
    module(x)
    before = copy.deepcopy(module.state_dict())
    for cast in (module.to(dtype), module.half(), module.bfloat16()):
        for key, value in cast.state_dict().items():
            assert value.dtype == before[key].dtype, key
            assert torch.equal(value, before[key]), key
    assert module(x.to(dtype)).dtype == dtype
    assert module.double().scale.dtype == torch.float64
    assert module.bfloat16().scale.dtype == torch.float32


# --- deployment of a range


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([], "its observer saw nothing"),
        ([torch.empty(0, 4)], "its observer saw nothing"),
        ([torch.zeros(4)], "its observer saw only zeros, NaN or infinity"),
        ([torch.full((4,), math.nan)], "its observer saw only zeros, NaN or infinity"),
        ([torch.full((4,), math.inf), torch.full((4,), -math.inf)], "its observer saw only zeros, NaN or infinity"),
    ],
    ids=["nothing", "empty", "zeros", "nan", "inf"],
)
def test_useless_ranges_are_refused_by_name(observer: Any, batches: list[Tensor], reason: str) -> None:
    module = FakeQuantize(QuantSpec(observer=observer))
    for batch in batches:
        module(batch)
    with pytest.raises(StateError, match=rf"layer1\.conv1 was to hold an observed range, but {reason}; run training steps"):
        module.fixed_params("layer1.conv1")
    module(torch.tensor([math.nan, 1.0]))
    module(torch.tensor([-1.0, 1.0]))
    scale, zero = module.fixed_params("layer1.conv1")
    assert torch.equal(scale, module.scale)
    assert torch.equal(zero, module.zero_point)
