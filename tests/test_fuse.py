"""fuse_modules and plan_fusion: which chains are found, that nothing else changes, and what is refused, with the words."""

from __future__ import annotations

import collections
import copy
import functools
import importlib.util
import json
import pathlib
import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

import eagerq
from eagerq.errors import InputsError, PatternError, StateError
from eagerq.nn import intrinsic as nni
from eagerq.nn import qat as nnqat
from eagerq.nn.intrinsic import qat as nniqat
from tests.nets import (
    BY_NAME,
    NETS,
    Basic,
    C,
    ConvOfOwn,
    Made,
    Net,
    Plain,
    Visions,
    bn,
    call,
    cloned,
    conv,
    differences,
    found,
    image,
    randomise,
    same,
    snapshot,
    step,
    straight,
    tensors,
)

nets = pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
modes = pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])


# --- laws over all nets


@functools.cache
def plan_of(name: str) -> eagerq.FusionPlan:
    """The plan of a net of the table, made once; it is data and applies to any model of the same structure."""
    net = BY_NAME[name]
    return eagerq.plan_fusion(net.model(), example_inputs=net.inputs())


@nets
def test_plan_is_the_truth(net: Net) -> None:
    plan = plan_of(net.name)
    assert found(plan) == net.truth
    reasons = {" ".join(skip.names): skip.reason for skip in plan.skips}
    assert reasons.keys() == net.skips.keys()
    for names, words in net.skips.items():
        assert words in reasons[names]
        assert reasons[names] in str(plan)


@nets
@modes
def test_fused_computes_the_same(net: Net, mode: bool) -> None:
    model, fused = net.model(), net.model()
    parameters, others = dict(model.named_parameters()), dict(fused.named_parameters())
    before = {id(p): p.requires_grad for p in fused.parameters()}
    plan_of(net.name).apply(fused)
    assert {id(p): p.requires_grad for p in fused.parameters()} == before
    for training in (mode, True):  # a first step may leave something behind that the second shows
        expected = step(model, parameters, net.inputs(), training)
        assert not differences(expected, step(fused, others, net.inputs(), training))


@nets
def test_fused_in_eval_mode_computes_the_same(net: Net) -> None:
    model, fused = net.model().eval(), net.model().eval()
    plan_of(net.name).apply(fused)
    assert not any(m.training for m in fused.modules())
    with torch.no_grad():
        for mode in (False, True):
            model.train(mode)
            fused.train(mode)
            expected, given = (list(tensors(call(m, net.inputs()))) for m in (model, fused))
            assert len(expected) == len(given)
            assert all(torch.equal(x, y) for x, y in zip(expected, given, strict=True))


@nets
def test_planning_leaves_no_trace(net: Net) -> None:
    model, inputs = net.model(), net.inputs()
    inputs_before = [x.clone() for x in inputs]
    expected = plan_of(net.name)  # which seeds, where it is not known yet
    before = snapshot(model)
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    hooks = global_hooks()
    plan = eagerq.plan_fusion(model, example_inputs=inputs)
    assert plan == expected
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), states[2], strict=True))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.overrides._get_current_function_mode() is None
    assert global_hooks() == hooks
    assert snapshot(model) == before
    assert all(torch.equal(x, y) for x, y in zip(inputs, inputs_before, strict=True))


def global_hooks() -> dict[str, int]:
    """How many hooks hold for all modules."""
    return {k: len(v) for k, v in vars(module_hooks).items() if k.startswith("_global") and hasattr(v, "__len__")}


@nets
def test_fusing_twice_is_fusing_once(net: Net) -> None:
    fused = plan_of(net.name).apply(net.model())
    before = snapshot(fused)
    plan = eagerq.plan_fusion(fused, example_inputs=net.inputs())
    assert plan.matches == ()
    assert plan.apply(fused) is fused
    assert snapshot(fused) == before


@nets
def test_members_become_identities(net: Net) -> None:
    fused = plan_of(net.name).apply(net.model())
    for line in net.chains:
        left, kind = line.split(" -> ")
        first, *rest = left.split()
        assert type(fused.get_submodule(first)).__name__ == kind
        for name in rest:
            if name.endswith("*"):
                assert type(fused.get_submodule(name.rstrip("*"))) in (nn.ReLU, nn.ReLU6)
            elif "drop" not in net.name:  # there the drop and the activation stay in the norm's place
                assert type(fused.get_submodule(name)) is nn.Identity


@nets
def test_watched_on_meta_where_it_can_be(net: Net) -> None:
    assert plan_of(net.name).on_meta is net.on_meta


# --- what survives


def test_tied_parameters_stay_tied() -> None:
    fused = eagerq.fuse_modules(BY_NAME["tied"].model(), example_inputs=image())
    assert fused.conv.weight is fused.conv2.weight
    assert fused.conv[1].bias is fused.conv2[1].bias
    assert len(list(fused.parameters())) == len(list(BY_NAME["tied"].model().parameters()))


def test_members_can_be_read_from_outside() -> None:
    model = straight(conv=conv(groups=2, bias=False))
    fused = eagerq.fuse_modules(model, example_inputs=image(), inplace=True)
    assert fused.conv.weight.dtype == torch.float32
    assert (fused.conv.out_channels, fused.conv.groups, fused.conv.bias) == (C, 2, None)
    with pytest.raises(AttributeError, match="no_such_thing"):
        fused.conv.no_such_thing  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_mode_and_requires_grad_survive(dtype: torch.dtype) -> None:
    model = straight().to(dtype).eval()
    model.conv.weight.requires_grad_(False)
    fused = eagerq.fuse_modules(model, example_inputs=image().to(dtype))
    assert {t.dtype for t in fused.parameters()} == {dtype}
    assert not any(m.training for m in fused.modules())
    assert {name: p.requires_grad for name, p in fused.named_parameters()} == {
        "conv.0.weight": False,
        "conv.0.bias": True,
        "conv.1.weight": True,
        "conv.1.bias": True,
    }
    assert torch.equal(fused(image().to(dtype)), model(image().to(dtype)))


def test_a_model_on_meta_can_be_fused() -> None:
    with torch.device("meta"):
        model = straight()
    fused = eagerq.fuse_modules(model, example_inputs=torch.zeros(2, C, 6, 6, device="meta"))
    assert {p.device.type for p in fused.parameters()} == {"meta"}
    assert type(fused.conv) is nni.ConvBnReLU2d


def test_channels_last_survives() -> None:
    model = straight().to(memory_format=torch.channels_last)
    fused = eagerq.fuse_modules(model, example_inputs=image())
    assert fused.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["frozen_norm", "frozen_first"])
def test_a_frozen_norm_stays_frozen(name: str) -> None:
    net = BY_NAME[name]
    fused = eagerq.fuse_modules(net.model(), example_inputs=net.inputs())
    holder = next(m for m in fused.modules() if isinstance(m, nni.FusedNorm))
    before = {key: value.clone() for key, value in fused.state_dict().items()}
    for model in (fused, copy.deepcopy(fused).eval().train()):
        model.train()
        call(model, net.inputs())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert holder.training
    assert not holder.norm().training
    fused.apply(eagerq.update_bn_stats)
    call(fused, net.inputs())
    assert not torch.equal(
        holder.norm().running_mean, before["bn.0.running_mean" if name == "frozen_first" else "conv.1.running_mean"]
    )


def test_a_norm_in_an_eval_model_is_not_frozen() -> None:
    fused = eagerq.fuse_modules(straight().eval(), example_inputs=image())
    fused.train()
    assert fused.conv.norm().training


def _count(counts: collections.Counter[str], what: str) -> Callable[..., None]:
    def hook(*args: Any) -> None:
        counts[what] += 1

    return hook


def test_hooks_of_the_ends_keep_firing_and_can_be_removed() -> None:
    model = straight()
    counts: collections.Counter[str] = collections.Counter()
    handles = [
        model.conv.register_forward_pre_hook(_count(counts, "pre")),
        model.relu.register_forward_hook(_count(counts, "post")),
        model.relu.register_full_backward_pre_hook(_count(counts, "backward pre")),
        model.register_forward_hook(_count(counts, "model")),
    ]
    fused = eagerq.fuse_modules(model, example_inputs=image(), inplace=True)
    assert type(fused.conv) is nni.ConvBnReLU2d
    counts.clear()
    fused(image()).sum().backward()
    assert counts == {"pre": 1, "post": 1, "backward pre": 1, "model": 1}
    for handle in handles:
        handle.remove()
    fused(image()).sum().backward()
    assert sum(counts.values()) == 4


def test_hooks_of_a_norm_with_activation_keep_firing() -> None:
    counts: collections.Counter[str] = collections.Counter()
    model = BY_NAME["timm_norm_silu"].model()
    handle = model.bn.register_forward_hook(_count(counts, "post"))
    before = snapshot(model)
    fused = eagerq.fuse_modules(model, example_inputs=image())
    assert snapshot(model) == before
    assert type(fused.conv) is nni.ConvBnAct2d
    counts.clear()
    fused(image())
    assert counts == {"post": 1}
    fused = eagerq.fuse_modules(model, example_inputs=image(), inplace=True)
    counts.clear()
    fused(image())
    assert counts == {"post": 1}
    handle.remove()
    fused(image())
    assert counts == {"post": 1}


def test_a_hook_that_changes_the_result_is_heeded() -> None:
    model = straight()
    model.relu.register_forward_hook(lambda module, args, output: output * 3)
    model.conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    fused = eagerq.fuse_modules(model, example_inputs=image())
    assert type(fused.conv) is nni.ConvBnReLU2d
    assert torch.equal(fused(image()), model(image()))


def test_a_hook_on_a_container_between_is_a_reader() -> None:
    model = nn.Sequential(nn.Sequential(conv(), bn()), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    plan = eagerq.plan_fusion(model, example_inputs=image())
    assert found(plan) == {(("0.0", "0.1"), "ConvBn2d", frozenset())}
    fused = plan.apply(copy.deepcopy(model))
    assert torch.equal(fused(image()), model(image()))


def test_a_hook_that_keeps_an_output_is_a_reader() -> None:
    kept: list[Tensor] = []
    model = nn.Sequential(nn.Sequential(conv()), bn(), nn.ReLU())
    handle = model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    assert found(eagerq.plan_fusion(model, example_inputs=image())) == {(("1", "2"), "BNReLU2d", frozenset())}
    handle.remove()
    assert found(eagerq.plan_fusion(model, example_inputs=image())) == {(("0.0", "1", "2"), "ConvBnReLU2d", frozenset())}


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()], ids=repr)
def test_a_shared_idempotent_activation_is_copied_and_stays(act: nn.Module) -> None:
    model = nn.Sequential(Visions(act), Visions(act))
    fused = eagerq.fuse_modules(model, example_inputs=image(), inplace=True)
    for block in fused:
        assert block.relu is act
        assert type(block.conv1[2]) is type(act)
        assert block.conv1[2] is not act
    calls = collections.Counter[str]()
    act.register_forward_hook(_count(calls, "act"))
    fused(image())
    assert calls["act"] == 4


def test_an_optimizer_stays_valid_in_place() -> None:
    model = nn.Sequential(Basic(), Basic(down=True))
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, other)]
    for _ in range(2):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            m(image()).square().mean().backward()
            optimizer.step()
        if not isinstance(other[0].conv1, nni.Fused):
            eagerq.fuse_modules(other, example_inputs=image(), inplace=True)
    state = eagerq.float_state_dict(other)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_inplace_or_not() -> None:
    model = straight()
    before = snapshot(model)
    fused = eagerq.fuse_modules(model, example_inputs=image())
    assert fused is not model
    assert snapshot(model) == before
    assert not {id(p) for p in fused.parameters()} & {id(p) for p in model.parameters()}
    assert eagerq.fuse_modules(model, example_inputs=image(), inplace=True) is model
    assert type(model.conv) is nni.ConvBnReLU2d


def test_the_whole_model_may_be_a_leaf() -> None:
    model = conv()
    plan = eagerq.plan_fusion(model, example_inputs=image())
    assert plan.matches == ()
    assert torch.equal(plan.apply(copy.deepcopy(model))(image()), model(image()))


# --- failure


def test_a_fused_class_that_fails_becomes_a_skip() -> None:
    class Failing(nni.FusedNorm, chain=(nn.Conv2d, nn.BatchNorm2d, nn.ReLU)):
        def __init__(self, *members: nn.Module) -> None:
            raise RuntimeError("no luck")

    model = nn.Sequential(conv(), bn(), nn.ReLU(), conv(), bn())
    before = snapshot(model)
    patterns = eagerq.Patterns((Failing, nni.ConvBn2d))
    plan = eagerq.plan_fusion(model, patterns, image())
    assert found(plan) == {(("3", "4"), "ConvBn2d", frozenset())}
    assert [skip.names for skip in plan.skips] == [("0", "1", "2")]
    assert "RuntimeError: no luck" in plan.skips[0].reason
    assert snapshot(model) == before


@pytest.mark.parametrize("nth", range(5))
def test_apply_is_all_or_nothing(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Basic(), Basic(down=True), BY_NAME["timm_norm_silu"].model())
    model[2].bn.register_forward_hook(lambda *args: None)
    plan = eagerq.plan_fusion(model, example_inputs=image())
    assert len(plan.matches) == 6
    built = []
    original = nni.Fused.__init__

    def fails(self: nni.Fused, *members: nn.Module) -> None:
        if len(built) == nth + 1:
            raise MemoryError("out of memory")
        built.append(self)
        original(self, *members)

    before = snapshot(model)
    monkeypatch.setattr(nni.Fused, "__init__", fails)
    with pytest.raises(MemoryError, match="out of memory"):
        plan.apply(model)
    assert snapshot(model) == before
    monkeypatch.undo()
    fused = plan.apply(model)
    assert len([m for m in fused.modules() if isinstance(m, nni.Fused)]) == 6


def test_a_plan_for_another_model_is_refused() -> None:
    plan = eagerq.plan_fusion(nn.Sequential(conv(), bn()), example_inputs=image())
    model = straight()
    before = snapshot(model)
    with pytest.raises(PatternError, match=r"'0'.*plan again"):
        plan.apply(model)
    assert snapshot(model) == before


def test_a_plan_is_applied_once() -> None:
    for model in (straight(), BY_NAME["timm_norm_silu"].model(), nn.Sequential(Basic())):
        plan = eagerq.plan_fusion(model, example_inputs=image())
        fused = plan.apply(model)
        before = snapshot(fused)
        with pytest.raises(StateError, match=r"already: the plan was applied to this model.*plan again for what is left"):
            plan.apply(fused)
        assert snapshot(fused) == before
        assert plan.apply(eagerq.unfuse_modules(fused)) is not fused


class WiredOtherwise(Basic):
    """Of the same modules under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        out: Tensor = self.act1(self.bn1(y) + y)
        return out


def test_a_plan_for_another_wiring_is_refused() -> None:
    plan = eagerq.plan_fusion(nn.Sequential(Basic()), example_inputs=image())
    for model, words in (
        (nn.Sequential(WiredOtherwise()), r"Basic at '0', found a .*WiredOtherwise.*plan again"),
        (type("Other", (nn.Sequential,), {})(Basic()), r"Sequential as the model, found a .*Other"),
    ):
        before = snapshot(model)
        for one in (plan, plan.without("0.conv2")):
            with pytest.raises(PatternError, match=words):
                one.apply(model)
        assert snapshot(model) == before


def test_a_plan_applies_to_a_copy_of_its_model() -> None:
    model = randomise(nn.Sequential(Basic(), Basic(down=True)))
    plan = eagerq.plan_fusion(model, example_inputs=image())
    fused = plan.apply(copy.deepcopy(model))
    assert torch.equal(fused(image()), model(image()))


def test_what_a_forward_left_behind_does_no_harm() -> None:
    model = BY_NAME["kept_on_self"].model()
    model(image())
    assert model.seen.grad_fn is not None
    fused = eagerq.fuse_modules(model, example_inputs=image())
    assert torch.equal(fused(image()), model(image()))


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = straight()
    model.lock = threading.Lock()
    with pytest.raises(eagerq.errors.ModelError, match="deepcopy of Made failed"):
        eagerq.fuse_modules(model, example_inputs=image())


class Itself(nn.Module):
    """A part that models share: a copy of one holds the very same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def __deepcopy__(self, memo: Any) -> Itself:
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


class Student(nn.Module):
    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.teacher = conv(), bn(), teacher

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x)) + self.teacher(x)
        return out


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda m, inplace: eagerq.plan_fusion(m, example_inputs=image()),
        lambda m, inplace: eagerq.fuse_modules(m, example_inputs=image(), inplace=inplace),
        lambda m, inplace: eagerq.convert_qat(m, example_inputs=image(), inplace=inplace),
        lambda m, inplace: eagerq.convert_qat(m, inplace=inplace),
    ],
    ids=["plan", "fuse", "convert", "convert without inputs"],
)
def test_a_part_that_is_not_copied_is_not_touched(call: Callable[[nn.Module, bool], Any], inplace: bool) -> None:
    for model, words in (
        (nn.Sequential(Student(Itself()), conv()), r"its '0\.teacher' \(a Itself\) itself, not a copy.*Let Itself\.__deepcopy__"),
        (Itself(), "gives the model itself, not a copy"),
    ):
        next(part for part in model.modules() if isinstance(part, Itself)).register_full_backward_hook(lambda *args: None)
        before = snapshot(model)
        with pytest.raises(eagerq.errors.ModelError, match=words):
            call(model, inplace)
        assert snapshot(model) == before


def test_a_fused_part_that_is_not_copied_is_not_touched() -> None:
    fused = eagerq.fuse_modules(Student(straight()), example_inputs=image())
    fused.teacher.__class__ = type("Shared", (type(fused.teacher),), {"__deepcopy__": Itself.__deepcopy__})
    before = snapshot(fused)
    for verb in (eagerq.unfuse_modules, eagerq.convert_qat):
        with pytest.raises(eagerq.errors.ModelError, match="'teacher'"):
            verb(fused)
        assert snapshot(fused) == before


# --- patterns


def test_patterns_as_types() -> None:
    model = nn.Sequential(Basic(), Basic(down=True))
    plan = eagerq.plan_fusion(model, [(nn.Conv2d, nn.BatchNorm2d)], image())
    assert {m.names for m in plan.matches} == {
        ("0.conv1", "0.bn1"),
        ("0.conv2", "0.bn2"),
        ("1.conv1", "1.bn1"),
        ("1.conv2", "1.bn2"),
        ("1.downsample.0", "1.downsample.1"),
    }
    assert {m.fused for m in plan.matches} == {nni.ConvBn2d}
    bare = eagerq.plan_fusion(model, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU), image())
    assert {m.names for m in bare.matches} == {("0.conv1", "0.bn1", "0.act1"), ("1.conv1", "1.bn1", "1.act1")}


def test_patterns_as_an_object() -> None:
    plan = eagerq.plan_fusion(BY_NAME["preactivation"].model(), eagerq.Patterns((nni.ConvBnReLU2d,)), image())
    assert plan.matches == ()
    plan = eagerq.plan_fusion(straight(), eagerq.Patterns((nni.ConvBnReLU2d,)), image())
    assert [m.fused for m in plan.matches] == [nni.ConvBnReLU2d]


def test_names_as_torch_ao_takes_them() -> None:
    model = randomise(nn.Sequential(Basic(), Basic(down=True)))
    names = [["0.conv1", "0.bn1", "0.act1"], ["0.conv2", "0.bn2"], ["1.downsample.0", "1.downsample.1"]]
    reference = torch.ao.quantization.fuse_modules_qat(copy.deepcopy(model), names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = eagerq.fuse_modules(model, names, image())
    for one, *_ in names:
        assert type(ours.get_submodule(one)).__name__ == type(reference.get_submodule(one)).__name__
    assert type(ours[1].conv1) is nn.Conv2d
    assert same(ours(image()), reference(image()), 1e-6)
    one = eagerq.fuse_modules(model, ["0.conv1", "0.bn1"], image())
    assert type(one[0].conv1) is nni.ConvBn2d
    assert type(one[0].act1) is nn.ReLU


def test_refuted_names_warn_and_are_left_alone() -> None:
    model = randomise(Basic())
    with pytest.warns(UserWarning, match=r"conv2 \+ bn2 \+ act2 is not fused: .*add"):
        fused = eagerq.fuse_modules(model, [["conv1", "bn1", "act1"], ["conv2", "bn2", "act2"]], image())
    assert type(fused.conv1) is nni.ConvBnReLU2d
    assert type(fused.conv2) is nn.Conv2d
    assert torch.equal(fused(image()), model(image()))


def test_names_without_inputs_are_believed_and_noted() -> None:
    plan = eagerq.plan_fusion(straight(), [["conv", "bn", "relu"]])
    assert found(plan) == BY_NAME["straight"].truth
    assert any("caller's word" in note for note in plan.notes)


# --- example inputs


def test_forms_of_example_inputs() -> None:
    model = Made(lambda m, x, shift=0: m.relu(m.bn(m.conv(x + shift))), conv=conv(), bn=bn(), relu=nn.ReLU())
    for inputs in (image(), (image(),), (image(), 1.0), {"x": image(), "shift": 2}, [image()], [(image(), 1), {"x": image()}]):
        assert found(eagerq.plan_fusion(model, example_inputs=inputs)) == BY_NAME["straight"].truth


def test_each_of_several_runs_must_confirm() -> None:
    def run(m: Any, x: Tensor, way: int) -> Tensor:
        y = m.conv(x)
        return m.bn(y) if way == 0 else m.bn(y) + y if way == 1 else m.bn(m.relu(y))

    model = Made(run, conv=conv(), bn=bn(), relu=nn.ReLU())
    assert found(eagerq.plan_fusion(model, example_inputs=(image(), 0))) == {(("conv", "bn"), "ConvBn2d", frozenset())}
    plan = eagerq.plan_fusion(model, example_inputs=[(image(), 0), (image(), 1)])
    assert plan.matches == ()
    assert "add" in plan.skips[0].reason
    plan = eagerq.plan_fusion(model, example_inputs=[(image(), 0), (image(), 2)])
    assert plan.matches == ()
    assert "in one run and to" in plan.skips[0].reason


def test_without_inputs_only_exact_sequentials() -> None:
    model = nn.Sequential(
        nn.Sequential(conv(), bn(), nn.ReLU()), Basic(), Plain(conv(), bn()), nn.Sequential(conv(), nn.Identity(), nn.ReLU())
    )
    plan = eagerq.plan_fusion(model)
    assert found(plan) == {(("0.0", "0.1", "0.2"), "ConvBnReLU2d", frozenset()), (("3.0", "3.2"), "ConvReLU2d", frozenset())}
    assert {skip.names for skip in plan.skips} == {
        ("1.conv1", "1.bn1"),
        ("1.bn1", "1.act1"),
        ("1.conv2", "1.bn2"),
        ("1.bn2", "1.act2"),
        ("2.0", "2.1"),
    }
    assert all("pass example_inputs" in skip.reason for skip in plan.skips)
    assert any("pass example_inputs" in note for note in plan.notes)
    fused = plan.apply(copy.deepcopy(model))
    assert torch.equal(fused(image()), model(image()))


def test_without_inputs_channels_must_agree() -> None:
    plan = eagerq.plan_fusion(nn.Sequential(conv(), nn.BatchNorm2d(C + 1), nn.ReLU()))
    assert found(plan) == {(("1", "2"), "BNReLU2d", frozenset())}
    assert [skip.reason for skip in plan.skips] == [f"0 gives {C} channels and 1 normalises {C + 1}"]


def test_without_inputs_a_module_used_twice_is_refused() -> None:
    shared = conv()
    plan = eagerq.plan_fusion(nn.Sequential(shared, bn(), shared, bn(), nn.ReLU()))
    assert found(plan) == {(("3", "4"), "BNReLU2d", frozenset())}
    assert "shared under several names: 0, 2" in plan.skips[0].reason


@pytest.mark.parametrize("inputs", ["x", 3, [], None])
def test_other_example_inputs_are_refused(inputs: Any) -> None:
    if inputs is None:
        assert eagerq.plan_fusion(straight()).matches == ()
    else:
        with pytest.raises(InputsError, match="example_inputs must be a tensor"):
            eagerq.plan_fusion(straight(), example_inputs=inputs)


def test_watching_only_the_mode_that_runs_is_noted() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        if not m.training:
            raise ValueError("only in training")
        return m.bn(m.conv(x))

    model = Made(run, conv=conv(), bn=bn())
    plan = eagerq.plan_fusion(model, example_inputs=image())
    assert found(plan) == {(("conv", "bn"), "ConvBn2d", frozenset())}
    assert plan.notes == ("not watched in eval mode, where the forward raises ValueError: only in training",)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_resnet18_by_itself(library: str) -> None:
    model = timm.create_model("resnet18") if library == "timm" else torchvision.models.resnet18()
    randomise(model)
    plan = eagerq.plan_fusion(model)
    kinds = collections.Counter(match.fused for match in plan.matches)
    assert kinds == {nni.ConvBnReLU2d: 9, nni.ConvBn2d: 11}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plan.apply(copy.deepcopy(model))(x), model(x))
    assert "20 chains to fuse, 11 ConvBn2d, 9 ConvBnReLU2d" in str(plan)


def test_a_transformers_model_by_itself() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    model = randomise(transformers.ResNetForImageClassification(config)).eval()
    plan = eagerq.plan_fusion(model)
    assert collections.Counter(match.fused.__name__ for match in plan.matches) == {"ConvBnReLU2d": 3, "ConvBn2d": 4}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plan.apply(copy.deepcopy(model))(x).logits, model(x).logits)


# --- the plan as data


def test_a_plan_prints_and_serialises() -> None:
    model = nn.Sequential(Visions(nn.ReLU()), Basic())
    plan = eagerq.plan_fusion(model, example_inputs=image())
    data = json.loads(json.dumps(plan.as_dict()))
    assert {"names": ["0.conv1", "0.bn1", "0.relu"], "fused": "ConvBnReLU2d", "copied": ["0.relu"]} in data["matches"]
    assert [skip["names"] for skip in data["skips"]] == [["0.conv2", "0.bn2", "0.relu"], ["1.conv2", "1.bn2", "1.act2"]][
        -len(data["skips"]) :
    ]
    text = str(plan)
    assert "4 chains to fuse, 2 ConvBn2d, 2 ConvBnReLU2d" in text
    assert "0.conv1 + 0.bn1 + 0.relu (copy)" in text
    assert plan == eagerq.plan_fusion(copy.deepcopy(model), example_inputs=image())


# --- a user's own pattern


def test_the_documented_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    path = pathlib.Path(__file__).parent.parent / "docs" / "user_pattern.py"
    spec = importlib.util.spec_from_file_location("user_pattern", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    plan, qat, deployed = example.main()
    assert [match.fused for match in plan.matches] == [example.WSConvBnReLU2d]
    assert type(qat[0]) is example.QATWSConvBnReLU2d
    assert "deployed equals QAT in eval: True" in capsys.readouterr().out
    assert torch.equal(deployed(torch.ones(1, 3, 9, 9)), qat.eval()(torch.ones(1, 3, 9, 9)))


class OwnConvQAT(nnqat.Conv2d, converts=ConvOfOwn):
    """QAT form of ConvOfOwn, whose code doubles the input."""

    def effective_weight(self) -> Tensor:
        return self.weight * 2


class OwnConvBnReLU2d(nni.FusedNorm, chain=(ConvOfOwn, nn.BatchNorm2d, nn.ReLU)):
    """ConvOfOwn, batch norm, ReLU."""


class OwnConvBnReLU2dQAT(nniqat.WithAct, nniqat.WithBn, OwnConvQAT, converts=OwnConvBnReLU2d):
    """QAT form of OwnConvBnReLU2d; from_float is inherited."""


def test_a_pattern_of_ones_own() -> None:
    patterns = eagerq.DEFAULT_PATTERNS.extended(OwnConvBnReLU2dQAT, OwnConvBnReLU2d, OwnConvQAT)
    assert (ConvOfOwn, nn.BatchNorm2d, nn.ReLU) not in eagerq.DEFAULT_PATTERNS.chains
    model = randomise(nn.Sequential(ConvOfOwn(C, C, 3), bn(), nn.ReLU(), ConvOfOwn(C, C, 1), conv(), bn()))
    fused = eagerq.fuse_modules(model, patterns, image())
    assert [type(m) for m in fused] == [OwnConvBnReLU2d, nn.Identity, nn.Identity, ConvOfOwn, nni.ConvBn2d, nn.Identity]
    assert torch.equal(fused(image()), model(image()))
    qat = eagerq.convert_qat(fused)  # remembers the patterns
    assert [type(m) for m in qat] == [OwnConvBnReLU2dQAT, nn.Identity, nn.Identity, OwnConvQAT, nniqat.ConvBn2d, nn.Identity]
    qat.apply(eagerq.disable_fake_quant)
    assert same(qat(image()), fused(image()), 1e-6)
    qat.apply(eagerq.enable_fake_quant)
    qat(image()).sum().backward()
    deployed = eagerq.convert(qat)
    assert torch.equal(deployed(image()), qat.eval()(image()))


def test_a_user_activation_joins_every_chain() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    model = straight(relu=Square())
    assert found(eagerq.plan_fusion(model, example_inputs=image())) == {(("conv", "bn"), "ConvBn2d", frozenset())}
    patterns = eagerq.DEFAULT_PATTERNS.extended(activations=[Square])
    fused = eagerq.fuse_modules(model, patterns, image())
    assert type(fused.conv) is nni.ConvBnAct2d
    assert torch.equal(fused(image()), model(image()))


def test_replacing_takes_the_place_of_a_built_in() -> None:
    class Mine(nni.FusedNorm, chain=(nn.Conv2d, nn.BatchNorm2d, nn.ReLU)):
        pass

    with pytest.raises(PatternError, match=r"claimed by both .*ConvBnReLU2d.* and .*Mine.*replacing"):
        eagerq.DEFAULT_PATTERNS.extended(Mine)
    fused = eagerq.fuse_modules(straight(), eagerq.DEFAULT_PATTERNS.replacing(Mine), image())
    assert type(fused.conv) is Mine


def test_gradients_reach_the_input_through_a_fused_model() -> None:
    net = BY_NAME["residual"]
    (x,) = cloned(net.inputs())
    eagerq.fuse_modules(net.model(), example_inputs=net.inputs())(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_behind_a_recurrent_module(bidirectional: bool, batch_first: bool) -> None:
    """On the meta device an LSTM is not run step by step; its shapes, and the chain behind it, are those of a run on data."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, 2, bidirectional=bidirectional, batch_first=batch_first, proj_size=3)
            self.fc, self.relu = nn.Linear(6 if bidirectional else 3, 2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y, (h, c) = self.lstm(x)
            return self.relu(self.fc(y)) + h.mean() + c.mean() if h.requires_grad or not self.training else y[:, :, :2]

    plan = eagerq.plan_fusion(Recurrent().train(), example_inputs=torch.zeros(2, 7, 4))
    assert plan.on_meta
    assert [match.names for match in plan.matches] == [("fc", "relu")]
