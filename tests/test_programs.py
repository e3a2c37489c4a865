"""Laws over random small nets (``programs.py``)."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from torch import Tensor, nn

import eagerq
from eagerq.errors import StateError
from eagerq.nn.intrinsic import Fused
from tests.nets import Step, call, cloned, differences, found, same, snapshot, step, tensors
from tests.programs import SHAPE, Program, described, programs

EXAMPLES = 40
laws = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(dtype)


def tried(model: nn.Module, parameters: dict[str, nn.Parameter], x: Tensor, mode: bool) -> Step | None:
    """A step, or None if the net's in-place operations do not allow a gradient."""
    try:
        return step(model, parameters, (x,), mode)
    except RuntimeError as error:
        if "in-place" in str(error) or "inplace" in str(error):
            return None
        raise


def values(model: nn.Module, x: Tensor, mode: bool) -> list[Tensor]:
    """Outputs without gradient, in train or eval mode."""
    flags = [(m, m.training) for m in model.modules()]
    if mode != model.training:
        model.train(mode)
    with torch.no_grad():
        outputs = [t.clone() for t in tensors(call(model, (x.clone(),)))]
    for module, training in flags:
        module.training = training
    return outputs


def show(program: Program) -> None:
    for line in described(program):
        note(line)


@laws
@given(programs())
def test_the_plan_is_the_truth(program: Program) -> None:
    show(program)
    plan = eagerq.plan_fusion(program.build(), example_inputs=image())
    note(str(plan))
    assert found(plan) == program.chains()


@laws
@given(programs())
def test_fusing_keeps_the_function(program: Program) -> None:
    show(program)
    model, other = program.build(), program.build()
    parameters, others = dict(model.named_parameters()), dict(other.named_parameters())
    before = snapshot(model)
    fused = eagerq.fuse_modules(other, example_inputs=image(), inplace=True)
    eagerq.plan_fusion(model, example_inputs=image())
    assert snapshot(model) == before
    for mode in (True, False, True):
        expected = tried(model, parameters, image(), mode)
        if expected is None:
            assert tried(fused, others, image(), mode) is None
            assert all(torch.equal(x, y) for x, y in zip(values(model, image(), mode), values(fused, image(), mode), strict=True))
        else:
            assert not differences(expected, step(fused, others, (image(),), mode))


@laws
@given(programs())
def test_fusing_twice_is_fusing_once(program: Program) -> None:
    show(program)
    fused = eagerq.fuse_modules(program.build(), example_inputs=image())
    before = snapshot(fused)
    plan = eagerq.plan_fusion(fused, example_inputs=image())
    note(str(plan))
    assert plan.matches == ()
    assert snapshot(eagerq.fuse_modules(fused, example_inputs=image(), inplace=True)) == before


@laws
@given(programs())
def test_applying_is_all_or_nothing(program: Program) -> None:
    show(program)
    model = program.build()
    plan = eagerq.plan_fusion(model, example_inputs=image())
    before = snapshot(model)
    original = Fused.__init__
    for nth in range(len(plan.matches)):
        built: list[Fused] = []

        def fails(self: Fused, *members: nn.Module, nth: int = nth, built: list[Fused] = built) -> None:
            if len(built) == nth:
                raise MemoryError("out of memory")
            built.append(self)
            original(self, *members)

        with mock.patch.object(Fused, "__init__", fails), pytest.raises(MemoryError):
            plan.apply(model)
        assert snapshot(model) == before


@laws
@given(programs())
def test_without_fake_quantization_qat_is_the_float_model(program: Program) -> None:
    show(program)
    model, other = program.build().double(), program.build().double()
    parameters, others = dict(model.named_parameters()), dict(other.named_parameters())
    x = image(torch.float64)
    fused = eagerq.fuse_modules(other, example_inputs=x, inplace=True)
    try:
        qat = eagerq.convert_qat(fused, example_inputs=x, inplace=True)
    except StateError as error:
        assert "found nothing to quantize" in str(error)
        return
    note(str(eagerq.report(qat)))
    qat.apply(eagerq.disable_fake_quant)
    for mode in (True, False, True):
        expected = tried(model, parameters, x, mode)
        if expected is None:
            tried(qat, others, x, mode)  # for what a forward leaves behind
            for one, given_ in zip(values(model, x, mode), values(qat, x, mode), strict=True):
                assert same(one, given_, 1e-10)
        else:
            assert not differences(expected, step(qat, others, (x,), mode), 1e-10)


@laws
@given(programs())
def test_deployed_is_qat_in_eval(program: Program) -> None:
    show(program)
    fused = eagerq.fuse_modules(program.build(), example_inputs=image())
    try:
        qat = eagerq.convert_qat(fused)
    except StateError as error:
        assert "found nothing to quantize" in str(error)
        return
    note(str(eagerq.report(qat)))
    for _ in range(2):
        values(qat, image(), True)
    if not any(row[2] == "QAT" for row in eagerq.report(qat).rows):
        return  # all that could be quantized runs in training only
    before = snapshot(qat)
    try:
        deployed = eagerq.convert(qat)
    except StateError as error:
        assert "saw nothing" in str(error) or "saw only zeros" in str(error)
        assert snapshot(qat) == before
        return
    assert snapshot(qat) == before
    expected = values(qat, image(), False)
    assert all(torch.isfinite(t).all() for t in expected)
    assert all(torch.equal(x, y) for x, y in zip(expected, values(deployed, image(), False), strict=True))


@laws
@given(programs())
def test_float_state_goes_in_and_comes_out(program: Program) -> None:
    show(program)
    state = program.build(seed=1).state_dict()
    fused = eagerq.fuse_modules(program.build(), example_inputs=image())
    models = [fused]
    try:
        models.append(eagerq.convert_qat(fused))
    except StateError as error:
        assert "found nothing to quantize" in str(error)
    for model in models:
        model.load_state_dict(state, strict=True)
        out = eagerq.float_state_dict(model)
        assert out.keys() == state.keys()
        assert all(torch.equal(value, out[key]) for key, value in state.items())
        model.load_state_dict(eagerq.float_state_dict(model), strict=True)


def test_the_input_is_not_changed_by_the_test_itself() -> None:
    assert torch.equal(*(next(tensors(cloned((image(),)))).detach() for _ in range(2)))
