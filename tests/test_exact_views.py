"""The exact mode where tensors share memory and are written in place, and where it is entered twice, copied or compiled."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eagerq
from eagerq.quant.code_values import Coded, Pending, Real
from eagerq.quant.codes import CodeTensor, decode, encode
from eagerq.quant.engine import PROFILES, EngineProfile
from tests.nets import Made, conv, image
from tests.test_exact import Added, qat_of

PROFILE = PROFILES["onnxruntime-x64"]
BYTES = EngineProfile("onnxruntime-x64", 1, "int8")
SCALE, ZERO = 0.25, 100  # codes of what is drawn below are exact, so that float32 sums of them are


def coded(x: Tensor, profile: EngineProfile = PROFILE) -> CodeTensor:
    made = encode(x, eagerq.QuantSpec(), torch.tensor(SCALE), torch.tensor(ZERO), profile)
    assert isinstance(made, CodeTensor)
    return made


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randint(-90, 140, shape, generator=torch.Generator().manual_seed(seed)) * SCALE


# --- a program of views and writes, on plain tensors and on code tensors -------------------------------------

Step = Callable[[Tensor, Tensor], Any]

#: Of a tensor with four axes; each gives one such tensor, or several.
VIEWS: dict[str, Step] = {
    "itself": lambda x, _: x,
    "turned": lambda x, _: x.transpose(2, 3),
    "there and back": lambda x, _: x.view(len(x), -1).reshape(x.shape) if x.is_contiguous() else x.flatten(1).view(x.shape),
    "rows": lambda x, _: x[:, :, -2:],
    "chunks": lambda x, _: x.chunk(2, 1),
    "unbound": lambda x, _: [part.unsqueeze(1) for part in x.unbind(1)],
    "narrowed": lambda x, _: torch.narrow(input=x, dim=1, start=0, length=1),
    "picked": lambda x, _: x[:, [0]],  # a copy
    "cloned": lambda x, _: x.clone(),
    "contiguous": lambda x, _: x.contiguous(),
    "expanded": lambda x, _: x[:, :1].expand(-1, 2, -1, -1),
    "iterated": lambda x, _: [row.unsqueeze(0) for row in x],
    "dropped out": lambda x, _: F.dropout(x, 0.5, False),
    "detached": lambda x, _: x.detach(),
    "data": lambda x, _: x.data,
    # views that are no functions of codes
    "unfolded": lambda x, _: x.unfold(2, 1, 1)[..., 0],
    "diagonal": lambda x, _: x.diagonal(0, 2, 3).unsqueeze(3),
    "float": lambda x, _: x.float(),
    "ravelled": lambda x, _: torch.ravel(x).view(x.shape),
}
WRITES: dict[str, Step] = {
    "+=": lambda x, y: x.__iadd__(y),
    "+= code": lambda x, y: x.__iadd__(x),
    "*=": lambda x, y: x.__imul__(2.0),
    "relu_": lambda x, y: F.relu(x, inplace=True),
    "clamp_": lambda x, y: x.clamp_(-SCALE, SCALE),
    "neg_": lambda x, y: x.neg_(),
    "[...] =": lambda x, y: x.__setitem__((slice(None), slice(None), 0), 3.0),
    "copy_": lambda x, y: x.copy_(y),
    "zero_": lambda x, y: torch.zero_(x),
    "out=": lambda x, y: torch.add(y, y, out=x),
    "masked": lambda x, y: x.masked_fill_(y > 0, 1.0),
    "data =": lambda x, y: setattr(x, "data", y.clone()),
    "data = code": lambda x, y: setattr(x, "data", x.clone()),
    "packet": lambda x, y: torch.ops.aten.add_(x, y),
}


def run(program: list[tuple[str, int, str, int]], x: Tensor, *, dies: bool) -> list[Tensor]:
    """The tensors that a program makes of ``x``: of which one, what view, what is written to which."""
    made, expanded = [x], [False]
    for view, of, write, to in program:
        parts = VIEWS[view](made[of % len(made)], x)
        parts = parts if isinstance(parts, (tuple, list)) else [parts]
        expanded += [view == "expanded" or expanded[of % len(made)]] * len(parts)
        made += parts
        if dies and len(made) > 2:
            del made[0], expanded[0]
        if write and not expanded[to % len(made)]:  # PyTorch writes to no tensor that overlaps itself
            target = made[to % len(made)]
            WRITES[write](target, drawn(to, *target.shape))
    return made


programs = st.lists(
    st.tuples(st.sampled_from(sorted(VIEWS)), st.integers(0, 9), st.sampled_from(["", *sorted(WRITES)]), st.integers(0, 9)),
    min_size=1,
    max_size=5,
)
profiles = st.sampled_from([PROFILE, BYTES])


@settings(max_examples=200)
@given(program=programs, seed=st.integers(0, 99), dies=st.booleans(), profile=profiles, frozen=st.booleans())
def test_a_program_of_views_and_writes_has_the_values_of_plain_tensors(
    program: list[tuple[str, int, str, int]], seed: int, dies: bool, profile: EngineProfile, frozen: bool
) -> None:
    x = drawn(seed, 2, 2, 3, 3)
    with torch.inference_mode(frozen), torch.no_grad():
        wanted = run(program, x.clone(), dies=dies)
        found = run(program, coded(x, profile), dies=dies)
        for ours, plain in zip(found, wanted, strict=True):
            assert ours.shape == plain.shape
            assert len(ours) == len(plain)
            assert ours.numel() == plain.numel()
            assert torch.equal(decode(ours), plain)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("of_view", [False, True])
def test_what_is_written_to_one_is_seen_in_the_other(view: str, write: str, of_view: bool) -> None:
    for profile in (PROFILE, BYTES):
        results = []
        for x in (drawn(0, 2, 2, 3, 3), coded(drawn(0, 2, 2, 3, 3), profile)):
            made = VIEWS[view](x, x)
            y = made if isinstance(made, Tensor) else made[0]
            target = y if of_view else x
            if view != "expanded" or not of_view:
                WRITES[write](target, drawn(1, *target.shape))
            results.append((decode(x), decode(y)))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("write", WRITES)
def test_data_that_another_gave_is_shared_with_it(write: str) -> None:
    results = []
    for x in (drawn(0, 2, 2, 3, 3), coded(drawn(0, 2, 2, 3, 3))):
        y = x.clone()
        y.data = x
        WRITES[write](y, drawn(1, *y.shape))
        results.append((decode(x), decode(y)))
    assert all(map(torch.equal, *results))


@given(write=st.sampled_from(["relu_", "clamp_", "+= code"]), view=st.sampled_from(["there and back", "turned", "rows", "data"]))
def test_codes_stay_codes_where_no_other_tensor_sees_the_write(write: str, view: str) -> None:
    """The source is gone; or the other part of it; or a copy."""
    x: Any = VIEWS[view](coded(drawn(0, 2, 2, 4, 3)), torch.empty(0))
    WRITES[write](x, x)
    assert isinstance(x.value, (Coded, Pending))
    left, right = coded(drawn(0, 2, 2, 4, 3)).chunk(2, 1)
    WRITES[write](left, left)
    assert isinstance(left.value, (Coded, Pending)) and isinstance(right.value, Coded)  # type: ignore[attr-defined]
    source = coded(drawn(0, 2, 2, 4, 3))
    copied, picked = source.clone(), source[:, [1]]
    WRITES[write](source, source)
    assert isinstance(source.value, (Coded, Pending))
    assert isinstance(copied.value, Coded) and isinstance(picked.value, Coded)  # type: ignore[attr-defined]


def test_a_part_that_was_written_alone_is_left_alone() -> None:
    """It has memory of its own from then on: what its old neighbours do together is nothing to it."""
    left, right = coded(drawn(0, 2, 2, 3, 3)).chunk(2, 1)
    F.relu(left, inplace=True)
    held = left.value  # type: ignore[attr-defined]
    also = right[:]
    also += 1.0
    assert left.value is held  # type: ignore[attr-defined]
    assert torch.equal(decode(right), drawn(0, 2, 2, 3, 3)[:, 1:] + 1)
    assert isinstance(right.value, Real)  # type: ignore[attr-defined]


def test_shape_and_strides_are_those_of_the_values() -> None:
    for plain in (drawn(0, 2, 4, 3, 5), drawn(0, 2, 4, 3, 5).to(memory_format=torch.channels_last)):
        for view in VIEWS.values():
            made = view(plain, plain), view(coded(plain), plain)
            wanted, found = (out if isinstance(out, Tensor) else out[0] for out in made)
            assert found.shape == wanted.shape
            assert found.stride() == wanted.stride()
            assert found.is_contiguous() == wanted.is_contiguous()
    x = coded(drawn(0, 2, 4, 3, 5))
    same = x[:]
    x.unsqueeze_(0)
    assert x.shape == (1, *same.shape) == (1, 2, 4, 3, 5)
    x.data = coded(drawn(0, 7)) + coded(drawn(1, 7))
    assert (x.shape, x.dim(), len(x)) == ((7,), 1, 7)


# --- forms of functions that were misread ----------------------------------------------------------------


def of_both(x: Tensor, y: Tensor) -> Tensor:
    """Writes both of its arguments, as a function that can be overridden."""
    given = (x, y)
    if torch.overrides.has_torch_function(given):
        return torch.overrides.handle_torch_function(of_both, given, *given)  # type: ignore[no-any-return]
    return x.add_(y.neg_())


FORMS: dict[str, Step] = {
    "both written": lambda x, y: [of_both(x, y), x, y],
    "keyword": lambda x, y: torch.relu(input=x),
    "bounds of codes": lambda x, y: torch.clamp(x, min=y),
    "torch.batch_norm": lambda x, y: torch.batch_norm(
        x, torch.ones(2) * 3, torch.ones(2) * 5, torch.ones(2) * 7, torch.ones(2) * 9, False, 0.1, 1e-5, False
    ),
    "hardswish": lambda x, y: [F.hardswish(x, inplace=True), x],
    "hardsigmoid": lambda x, y: [F.hardsigmoid(x, inplace=True), x],
    "leaky_relu": lambda x, y: [F.leaky_relu(x, 0.5, inplace=True), x],
    "silu": lambda x, y: [F.silu(x, inplace=True), x],
    "out": lambda x, y: [torch.mul(x, y, out=x), x],
    "clamp out": lambda x, y: [torch.clamp(x, -1.0, 1.0, out=y), y],
    "two out": lambda x, y: [*torch.max(y, 1, keepdim=True, out=(x[:, :1], torch.empty(0, dtype=torch.long))), x],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_functions(form: str) -> None:
    x, y = drawn(0, 2, 2, 3, 3), drawn(1, 2, 2, 3, 3)
    found, wanted = (FORMS[form](a, b) for a, b in ((coded(x), coded(y)), (x.clone(), y.clone())))
    found, wanted = ([decode(out)] if isinstance(out, Tensor) else decode(out) for out in (found, wanted))
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain)


# --- models -----------------------------------------------------------------------------------------


def seen_twice(net: Any, x: Tensor) -> Tensor:
    """The view is written, and the tensor read."""
    x = net.one(x)
    flat = x.view(len(x), -1)
    flat += 1.0
    return net.head(net.two(x).flatten(1))


def decoded_boxes(net: Any, x: Tensor) -> Tensor:
    """As heads of detectors do."""
    x = net.two(net.one(x))
    x[:, :2] = x[:, :2] * 2 - 0.5
    x[..., 0] = x[..., 0].exp()
    return x


def written_out(net: Any, x: Tensor) -> Tensor:
    x = net.one(x)
    torch.tanh(x, out=x)
    return net.two(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "view": lambda: Made(seen_twice, one=conv(), two=conv(), head=nn.Linear(4 * 36, 3)),
    "boxes": lambda: Made(decoded_boxes, one=conv(), two=conv()),
    "out": lambda: Made(written_out, one=conv(), two=conv()),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_write_in_place_are_near_their_float_forward(name: str) -> None:
    qat = qat_of(MODELS[name](), image())
    for model in (qat, eagerq.convert(qat)):
        with torch.no_grad():
            wanted = model(image())
            for kernels in ("float", "int8"):
                with eagerq.exact_mode(model, kernels=kernels) as run:
                    found = model(image())
                assert type(found) is Tensor
                assert run.floats["__setitem__", ""] == (name == "boxes")  # the second time it is given no codes
                assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def crossed(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The last modules take their inputs from one quantizer or from another, a hundred times as coarse."""
    fine, coarse = net.one(x), net.two(x * 100)
    return (net.last(coarse), net.other(fine)) if net.crosses else (net.last(fine), net.other(coarse))


@pytest.mark.parametrize("preset", ["onnxruntime", "vitis"])  # int32, and eight bits on a grid of their own
def test_a_bias_on_the_grid_of_another_input_is_not_taken_for_one_on_this(preset: str) -> None:
    model: Any = Made(crossed, one=conv(), two=conv(), last=conv(), other=conv())
    model.crosses = False
    qat: Any = eagerq.convert_qat(model, preset, example_inputs=image())
    with torch.no_grad():
        qat.last.bias += 2.0
        qat(image())
        qat.eval()
        for net in (qat, eagerq.convert(qat)):
            for net.crosses in (False, True):
                wanted = net(image())
                for kernels in ("float", "int8"):
                    with eagerq.exact_mode(net, kernels=kernels) as run:
                        found = net(image())
                    for ours, fake in zip(found, wanted, strict=True):
                        assert (ours - fake).abs().max() < 0.05 * fake.abs().max()
                    assert (("conv2d", "last") in run.floats) == (net.crosses and preset == "onnxruntime")


# --- entered twice, copied, of other dtypes, under autocast, compiled --------------------------------------


def small() -> tuple[nn.Module, Tensor]:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return eagerq.convert(qat_of(Added(), x)), x


def exactly(model: nn.Module, x: Tensor, **given: Any) -> Tensor:
    with torch.no_grad(), eagerq.exact_mode(model, **given):
        out: Tensor = model(x)
    return out


def test_modes_nest() -> None:
    model, x = small()
    wanted = exactly(model, x)
    with torch.no_grad(), eagerq.exact_mode(model) as outer:
        assert torch.equal(exactly(model, x, kernels="int8"), wanted)
        assert torch.equal(model(x), wanted)
        assert all(m.profile is outer.profile for m in model.modules() if hasattr(m, "profile"))
    assert not any("profile" in vars(m) for m in model.modules())


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_made_inside_is_a_model_as_any_other(copied: Callable[[nn.Module], nn.Module]) -> None:
    deployed, x = small()
    for model in (deployed, qat_of(Added(), x)):
        with torch.no_grad():
            wanted = model(x)
            with eagerq.exact_mode(model):
                other = copied(model)
            assert not any("profile" in vars(m) for m in other.modules())
            assert torch.equal(other(x), wanted)
            assert torch.equal(exactly(other, x), exactly(model, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    deployed, x = small()
    words = rf"float32 model.*{dtype}.*\.float\(\)"
    for model in (deployed, qat_of(Added(), x)):
        with pytest.raises(eagerq.errors.StateError, match=words), eagerq.exact_mode(model.to(dtype)):
            pass
        assert not any("profile" in vars(m) for m in model.modules())


@pytest.mark.parametrize("kernels", ["float", "int8"])
def test_autocast_changes_no_code(kernels: str) -> None:
    deployed, x = small()
    for model in (deployed, qat_of(Added(), x)):
        wanted = exactly(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(exactly(model, x, kernels=kernels), wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_compiled_model_runs_eagerly_inside() -> None:
    model, x = small()
    wanted = exactly(model, x)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        before = compiled(x)
        assert torch.equal(exactly(compiled, x), wanted)  # type: ignore[arg-type]
        with eagerq.exact_mode(model):
            assert torch.equal(decode(compiled(x)), wanted)
        torch.testing.assert_close(compiled(x), before)
    torch._dynamo.reset()
