"""Laws over random small nets (``programs.py``)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eagerq
from eagerq import plan as plan_module
from eagerq.errors import StateError
from eagerq.nn.intrinsic import Fused
from eagerq.record import Record
from tests.nets import Step, call, cloned, differences, found, snapshot, step, tensors
from tests.program_truth import Truth
from tests.programs import SHAPE, Program, described, programs
from tests.stopping import lines_run

laws = settings(
    max_examples=max(40, settings().max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(dtype)


def tried(model: nn.Module, parameters: dict[str, nn.Parameter], inputs: Any, mode: bool) -> Step | None:
    """A step, or None if the net's in-place operations do not allow a gradient."""
    try:
        return step(model, parameters, inputs, mode)
    except RuntimeError as error:
        if "in-place" in str(error) or "inplace" in str(error):
            return None
        raise


def values(model: nn.Module, inputs: Any, mode: bool) -> list[Tensor]:
    """Outputs without gradient, in train or eval mode."""
    flags = [(m, m.training) for m in model.modules()]
    if mode != model.training:
        model.train(mode)
    with torch.no_grad():
        outputs = [t.clone() for t in tensors(call(model, copy.deepcopy(inputs)))]
    for module, training in flags:
        module.training = training
    return outputs


def show(program: Program) -> None:
    for line in described(program):
        note(line)


def ways(program: Program, dtype: torch.dtype = torch.float32) -> Iterator[tuple[bool, Any]]:
    """Modes and inputs for each way a program can go, more than once: a forward may leave something that the next shows."""
    for mode in (True, False, True):
        for inputs in program.runs(image(dtype)):
            yield mode, inputs


def same_function(program: Program, other: nn.Module, others: dict[str, nn.Parameter]) -> None:
    """The program's model and one it became compute the same, bit for bit: outputs, gradients and state.

    Args:
        others: the other's parameters by their names in the float model.
    """
    one = program.build()
    parameters = dict(one.named_parameters())
    for mode, inputs in ways(program):
        expected = tried(one, parameters, inputs, mode)
        if expected is None:  # its backward stopped somewhere on the way; without gradients another law compares
            return
        assert not differences(expected, step(other, others, inputs, mode))


def same_values(program: Program, one: nn.Module, other: nn.Module) -> None:
    """The two compute the same without gradients."""
    for mode, inputs in ways(program):
        for x, y in zip(values(one, inputs, mode), values(other, inputs, mode), strict=True):
            assert torch.equal(x, y)


@laws
@given(programs())
def test_the_plan_is_the_truth(program: Program) -> None:
    show(program)
    plan = eagerq.plan_fusion(program.build(), example_inputs=program.runs(image()))
    note(str(plan))
    assert found(plan) == Truth(program, program.flags).chains()


@laws
@given(programs(flagged=True))
def test_the_plan_is_the_truth_of_what_was_watched(program: Program) -> None:
    show(program)
    for flags in [(True,), (False,), (False, True)]:
        plan = eagerq.plan_fusion(program.build(), example_inputs=[program.given(image(), flag) for flag in flags])
        note(str(plan))
        assert found(plan) == Truth(program, flags).chains()


@laws
@given(programs(typed=True))
def test_fusing_keeps_the_function(program: Program) -> None:
    show(program)
    model = program.build()
    before, parameters = snapshot(model), dict(model.named_parameters())
    plan = eagerq.plan_fusion(model, example_inputs=program.runs(image()))
    assert snapshot(model) == before
    same_function(program, plan.apply(model), parameters)
    same_values(program, program.build(), eagerq.fuse_modules(program.build(), example_inputs=program.runs(image())))


@laws
@given(programs())
def test_fusing_twice_is_fusing_once(program: Program) -> None:
    show(program)
    fused = eagerq.fuse_modules(program.build(), example_inputs=program.runs(image()))
    before = snapshot(fused)
    plan = eagerq.plan_fusion(fused, example_inputs=program.runs(image()))
    note(str(plan))
    assert plan.matches == ()
    assert snapshot(eagerq.fuse_modules(fused, example_inputs=program.runs(image()), inplace=True)) == before


@laws
@given(programs())
def test_unfusing_gives_the_model_back(program: Program) -> None:
    show(program)
    model = program.build()
    before, keys = snapshot(model), [*model.state_dict()]
    fused = eagerq.fuse_modules(model, example_inputs=program.runs(image()), inplace=True)
    back = eagerq.unfuse_modules(fused)
    assert [*back.state_dict()] == keys
    assert [(n, type(m), m.training) for n, m in back.named_modules(remove_duplicate=False)] == [
        (n, kind, training) for n, _, kind, training in before["modules"]
    ]
    same_function(program, back, dict(back.named_parameters()))
    assert snapshot(eagerq.unfuse_modules(fused, inplace=True)) == before
    assert [*model.state_dict()] == keys
    plan = eagerq.plan_fusion(back, example_inputs=program.runs(image()))
    assert found(plan) == found(eagerq.plan_fusion(model, example_inputs=program.runs(image())))


@laws
@given(programs())
def test_fused_in_two_steps_comes_back_whole(program: Program) -> None:
    show(program)
    model = program.build()
    before = snapshot(model)
    plan = eagerq.plan_fusion(model, example_inputs=program.runs(image()))
    for matches in (plan.matches[1::2], plan.matches[::2]):
        eagerq.FusionPlan(matches).apply(model)
    same_values(program, program.build(), copy.deepcopy(model))
    assert snapshot(eagerq.unfuse_modules(model, inplace=True)) == before


#: What applying a plan is made of: where each is looked up, and under which name.
STEPS: tuple[tuple[Any, str], ...] = (
    (Fused, "__init__"),
    (plan_module, "replace_modules"),
    (plan_module, "share_hooks"),
    (plan_module, "renamed_keys"),
    (plan_module, "record_of"),
    (Record, "absorbing"),
    (Record, "after_fusion"),
    (Record, "attach"),
)


def applicable(program: Program) -> tuple[eagerq.FusionPlan, nn.Module]:
    """A plan for the first part of a model; the second is fused, and its record is taken over."""
    part, held = program.build(), eagerq.fuse_modules(program.build(), example_inputs=program.runs(image()))
    plan = eagerq.plan_fusion(part, example_inputs=program.runs(image()))
    return eagerq.FusionPlan(tuple(match.inside("0") for match in plan.matches)), nn.Sequential(part, held)


@laws
@given(programs(), st.sampled_from(STEPS), st.booleans(), st.booleans())
def test_applying_is_all_or_nothing(program: Program, failing: tuple[Any, str], at_the_end: bool, done: bool) -> None:
    """Whether the first or the last call of a step fails, before or after its effect."""
    show(program)
    plan, model = applicable(program)
    before = snapshot(model)
    original = getattr(*failing)
    calls: list[None] = []
    last = -1

    def step_of(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        fails = len(calls) == last
        if fails and not done:
            raise MemoryError("out of memory")
        result = original(*args, **kwargs)
        if fails:
            raise MemoryError("out of memory")
        return result

    with mock.patch.object(*failing, step_of):
        plan.apply(copy.deepcopy(model))
        if not calls:
            return
        last = len(calls) if at_the_end else 1
        calls.clear()
        with pytest.raises(MemoryError):
            plan.apply(model)
    assert snapshot(model) == before


@settings(laws, max_examples=40)
@given(programs(), st.lists(st.floats(0, 1), min_size=4, max_size=16))
def test_whatever_stops_half_way_leaves_the_model_as_it_was(program: Program, shares: list[float]) -> None:
    """Applying a plan and un-fusing in place, stopped at any line of what they change the model by."""
    show(program)
    plan, model = applicable(program)
    outside = ("apply", "unfuse_modules", "all_or_nothing")  # what is past these has come to its end, or puts things back
    for verb in (plan.apply, lambda m: eagerq.unfuse_modules(m, inplace=True)):
        before = snapshot(model)
        verb(copy.deepcopy(model))  # fills caches, so that each run has as many lines
        lines = lines_run(functools.partial(verb, copy.deepcopy(model)), outside)
        for share in shares:
            stop_at = 1 + int(share * (lines - 1))
            note(f"line {stop_at} of {lines}")
            with pytest.raises(MemoryError):
                lines_run(functools.partial(verb, model), outside, stop_at)
            assert snapshot(model) == before
        model = verb(model)


# --- guarding


@laws
@given(programs())
def test_a_guard_is_silent_on_what_was_watched(program: Program) -> None:
    show(program)
    one, other = (eagerq.fuse_modules(program.build(), example_inputs=program.runs(image())) for _ in range(2))
    parameters, others = dict(one.named_parameters()), dict(other.named_parameters())
    before = snapshot(other)["hooks"]
    for mode, inputs in ways(program):
        expected = tried(one, parameters, inputs, mode)
        with eagerq.guard(other):
            if expected is None:
                values(other, inputs, mode)
                break
            assert not differences(expected, step(other, others, inputs, mode))
    assert snapshot(other)["hooks"] == before


@laws
@given(programs(flagged=True))
def test_a_guard_refuses_ways_that_break_a_chain_and_no_others(program: Program) -> None:
    """Whatever the flag does: the fused model computes what the model did, or the guard says which chain is broken."""
    show(program)
    for watched in (True, False):
        fused = eagerq.fuse_modules(program.build(), example_inputs=[program.given(image(), watched)])
        there = Truth(program, (watched,)).chains()
        inputs = program.given(image(), not watched)
        for mode in (True, False):
            broken = [chain for chain in there if not Truth(program, (not watched,)).holds(chain, mode)]
            note(f"flag {not watched}, training {mode}: broken {broken}")
            if not broken:
                model = program.build()
                model.load_state_dict(eagerq.float_state_dict(fused))
                expected = values(model, inputs, mode)
                with eagerq.guard(fused):
                    assert all(torch.equal(x, y) for x, y in zip(expected, values(fused, inputs, mode), strict=True))
                continue
            with pytest.raises(eagerq.GuardError) as caught, eagerq.guard(fused):
                values(fused, inputs, mode)
            assert any(f"the chain {' + '.join(names)} is broken" in str(caught.value) for names, _, _ in broken)


# --- QAT and deployment


@laws
@given(programs())
def test_without_fake_quantization_qat_is_the_float_model(program: Program) -> None:
    show(program)
    model, other = program.build().double(), program.build().double()
    parameters, others = dict(model.named_parameters()), dict(other.named_parameters())
    x = image(torch.float64)
    fused = eagerq.fuse_modules(other, example_inputs=program.runs(x), inplace=True)
    try:
        qat = eagerq.convert_qat(fused, example_inputs=program.runs(x), inplace=True)
    except StateError as error:
        assert "found nothing to quantize" in str(error)
        return
    note(str(eagerq.report(qat)))
    qat.apply(eagerq.disable_fake_quant)
    for mode, inputs in ways(program, torch.float64):
        expected = tried(model, parameters, inputs, mode)
        if expected is None:
            return
        assert not differences(expected, step(qat, others, inputs, mode), 1e-10)


@laws
@given(programs())
def test_deployed_is_qat_in_eval(program: Program) -> None:
    show(program)
    fused = eagerq.fuse_modules(program.build(), example_inputs=program.runs(image()))
    try:
        qat = eagerq.convert_qat(fused)
    except StateError as error:
        assert "found nothing to quantize" in str(error)
        return
    note(str(eagerq.report(qat)))
    for _ in range(2):
        for inputs in program.runs(image()):
            values(qat, inputs, True)
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
    for inputs in program.runs(image()):
        expected = values(qat, inputs, False)
        assert all(torch.isfinite(t).all() for t in expected)
        assert all(torch.equal(x, y) for x, y in zip(expected, values(deployed, inputs, False), strict=True))


@laws
@given(programs())
def test_float_state_goes_in_and_comes_out(program: Program) -> None:
    show(program)
    state = program.build(seed=1).state_dict()
    fused = eagerq.fuse_modules(program.build(), example_inputs=program.runs(image()))
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
