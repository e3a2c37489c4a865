"""unfuse_modules gives the float model back: tree, keys, tensors, hooks, modes, outputs, and what was done since."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import timm.layers
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import eagerq
from eagerq import unfusing
from eagerq.errors import ModelError, StateError
from eagerq.nn import intrinsic as nni
from eagerq.nn.modules.hooks import POST_HOOKS, PRE_HOOKS
from tests.nets import BY_NAME, NETS, Basic, C, Net, Visions, conv, differences, image, randomise, snapshot, step, straight

nets = pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
HOOKS = (*PRE_HOOKS, *POST_HOOKS, "_state_dict_hooks", "_load_state_dict_pre_hooks")


def tree(model: nn.Module) -> dict[str, Any]:
    """All of a model but the identity of its modules and how often its tensors were written."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {
        "modules": [(name, type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)],
        "attributes": [(name, sorted(map(str, vars(m)))) for name, m in model.named_modules()],
        "hooks": [(name, h, len(getattr(m, h))) for name, m in model.named_modules() for h in HOOKS],
        "tensors": [(n, t.requires_grad, t.dtype, str(t.device), t.stride(), t.detach().double().tolist()) for n, t in tensors],
        "keys": [*model.state_dict()],
    }


@nets
def test_the_float_model_comes_back(net: Net) -> None:
    model = net.model()
    before = tree(model)
    modules, parameters = dict(model.named_modules(remove_duplicate=False)), dict(model.named_parameters())
    fused = eagerq.fuse_modules(model, example_inputs=net.inputs(), inplace=True)
    back = eagerq.unfuse_modules(fused)
    assert tree(back) == before
    assert not {id(p) for p in back.parameters()} & {id(p) for p in parameters.values()}
    assert eagerq.unfuse_modules(fused, inplace=True) is model
    assert tree(model) == before
    assert all(m is modules[name] for name, m in model.named_modules(remove_duplicate=False))
    assert all(p is parameters[name] for name, p in model.named_parameters())


@nets
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_it_computes_the_same(net: Net, mode: bool) -> None:
    model, other = net.model(), net.model()
    back = eagerq.unfuse_modules(eagerq.fuse_modules(other, example_inputs=net.inputs(), inplace=True), inplace=True)
    parameters, others = dict(model.named_parameters()), dict(back.named_parameters())
    for training in (mode, True):
        expected = step(model, parameters, net.inputs(), training)
        assert not differences(expected, step(back, others, net.inputs(), training))


# --- other libraries' models


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "tf_mobilenetv3_small_minimal_100"])
def test_timm_models(name: str) -> None:
    model = randomise(timm.create_model(name))
    expected = copy.deepcopy(model)
    x = torch.randn(2, 3, 64, 64)
    fused = eagerq.fuse_modules(model, example_inputs=x)
    assert any(isinstance(m, nni.Fused) for m in fused.modules())
    keys = [*fused.state_dict()]
    back = eagerq.unfuse_modules(fused, inplace=True)
    assert tree(back) == tree(expected)
    with torch.no_grad():
        assert torch.equal(back.eval()(x), expected.eval()(x))
    again = eagerq.fuse_modules(back, example_inputs=x)
    assert eagerq.plan_fusion(expected, example_inputs=x).as_dict() == eagerq.plan_fusion(back, example_inputs=x).as_dict()
    assert [*again.state_dict()] == keys


def test_torchvision_frozen_norms() -> None:
    model = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    before = tree(model)
    fused = eagerq.fuse_modules(model, inplace=True)
    assert sum(isinstance(m, nni.Fused) for m in fused.modules()) == 20
    assert tree(eagerq.unfuse_modules(fused, inplace=True)) == before


# --- what was done since


def trained(model: nn.Module, inputs: Any = None) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(image()).square().mean().backward()
    optimizer.step()
    model.zero_grad()
    return model


def frozen(model: nn.Module) -> nn.Module:
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return model


def loaded(model: nn.Module) -> nn.Module:
    state = {key: value + 1 for key, value in source().state_dict().items()}
    model.load_state_dict(state)
    return model


def assigned(model: nn.Module) -> nn.Module:
    state = {key: value + 1 for key, value in source().state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def pickled(model: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(model))
    return found


def source() -> nn.Module:
    """All kinds of modules that an adapter takes apart."""
    torch.manual_seed(0)
    layers = timm.layers
    return randomise(
        nn.Sequential(
            layers.Conv2dSame(C, C, 3),
            layers.BatchNormAct2d(C, act_layer="silu"),
            conv(),
            layers.BatchNormAct2d(C, drop_layer=nn.Dropout),
            conv(),
            torchvision.ops.FrozenBatchNorm2d(C),
            nn.ReLU(),
            Basic(),
            layers.Linear(6, 6),
            nn.ReLU(),
            layers.BatchNormAct2d(C),
        )
    )


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "trained": trained,
    "frozen": frozen,
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "eval": lambda m: m.eval(),
    "eval and train": lambda m: m.eval().train(),
    "loaded": loaded,
    "assigned": assigned,
    "copied": copy.deepcopy,
    "pickled": pickled,
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_done_since_comes_back(name: str) -> None:
    change = CHANGES[name]
    expected, model = change(source()), source()
    fused = change(eagerq.fuse_modules(model, example_inputs=image(), inplace=True))
    assert sum(isinstance(m, nni.Fused) for m in fused.modules()) == 7
    back = eagerq.unfuse_modules(fused, inplace=True)
    assert tree(back) == tree(expected)


def test_modes_of_single_modules_come_back() -> None:
    model = source()
    fused = eagerq.fuse_modules(model, example_inputs=image(), inplace=True)
    fused.apply(eagerq.freeze_bn_stats)
    back = eagerq.unfuse_modules(fused)
    norms = {timm.layers.BatchNormAct2d, nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d}
    assert all(m.training is (type(m) not in norms) for m in back.modules() if type(m) is not nn.Identity)
    assert not back[1].training
    assert not back[7].bn1.training
    assert back[1].act.training


def test_attributes_come_back() -> None:
    fused = eagerq.fuse_modules(source(), example_inputs=image())
    fused[0].norm().momentum = 0.25
    fused[0].norm().eps = 0.5
    back = eagerq.unfuse_modules(fused)
    assert (type(back[1]), back[1].momentum, back[1].eps) == (timm.layers.BatchNormAct2d, 0.25, 0.5)


@pytest.mark.parametrize("second", ["types", "whole"])
def test_fused_in_two_steps(second: str) -> None:
    model = nn.Sequential(Basic(), Visions(nn.ReLU()), source())
    before = tree(model)
    fused = eagerq.fuse_modules(model, [(nn.Conv2d, nn.BatchNorm2d)], image())
    fused = eagerq.fuse_modules(fused, None if second == "whole" else [(nn.Conv2d, nn.BatchNorm2d, nn.ReLU)], image())
    assert tree(eagerq.unfuse_modules(fused)) == before


class Outer(nni.Fused, chain=(nni.ConvBn2d, nn.ReLU)):
    """A fused module fused once more."""


def test_a_fused_module_within_a_fused_one() -> None:
    model = straight()
    before = tree(model)
    once = eagerq.fuse_modules(model, [["conv", "bn"]], image())
    plan = eagerq.FusionPlan((eagerq.Match(("conv", "relu"), Outer),), patterns=eagerq.Patterns((Outer,)))
    twice = plan.apply(once)
    assert type(twice.conv[0]) is nni.ConvBn2d
    assert tree(eagerq.unfuse_modules(twice)) == before


def test_within_a_larger_model() -> None:
    inner, other, last = source(), straight(), conv()
    before = tree(nn.Sequential(inner, other, last))
    inner, other = (eagerq.fuse_modules(m, example_inputs=image()) for m in (inner, other))
    larger = nn.Sequential(inner, other, last)
    for model in (larger, eagerq.fuse_modules(larger, example_inputs=image())):
        assert tree(eagerq.unfuse_modules(model)) == before


def test_a_model_that_is_one_module() -> None:
    model = randomise(timm.layers.BatchNormAct2d(C))
    before = tree(model)
    fused = eagerq.fuse_modules(model, example_inputs=image(), inplace=True)
    assert type(fused) is nni.BNReLU2d
    assert eagerq.unfuse_modules(fused, inplace=True) is model
    assert tree(model) == before


def test_a_part_that_is_gone_is_no_matter() -> None:
    model = nn.Sequential(Basic(), source())
    fused = eagerq.fuse_modules(model, example_inputs=image())
    fused[1] = nn.Identity()
    assert tree(eagerq.unfuse_modules(fused)) == tree(nn.Sequential(model[0], nn.Identity()))


# --- hooks


def counting(counts: Counter[str], what: str) -> Callable[..., None]:
    def hook(*args: Any) -> None:
        counts[what] += 1

    return hook


def test_hooks_of_before_and_since_come_back() -> None:
    counts: Counter[str] = Counter()
    order: list[str] = []
    model = nn.Sequential(conv(), timm.layers.BatchNormAct2d(C), conv())
    handles = [
        model[0].register_forward_pre_hook(lambda m, a: order.append("own pre")),
        model[1].register_forward_hook(counting(counts, "norm")),
        model[1].act.register_forward_hook(counting(counts, "act")),
    ]
    before = tree(model)
    fused = eagerq.fuse_modules(model, example_inputs=image(), inplace=True)
    assert type(fused[0]) is nni.ConvBnReLU2d
    assert tree(eagerq.unfuse_modules(fused)) == before
    handles += [
        fused[0].register_forward_pre_hook(lambda m, a: order.append("later pre")),
        fused[0].register_forward_hook(counting(counts, "later")),
        fused[1].register_forward_hook(lambda m, a, y: y * 2),
        fused[0].register_full_backward_hook(counting(counts, "backward")),
    ]
    counts.clear()
    order.clear()
    expected = fused(image())
    expected.sum().backward()
    seen, seen_order = counts.copy(), order.copy()
    assert seen == {"norm": 1, "act": 1, "later": 1, "backward": 1}
    for back in (eagerq.unfuse_modules(fused), eagerq.unfuse_modules(fused, inplace=True)):
        order.clear()
        counts.clear()
        given = back(image())
        given.sum().backward()
        assert torch.equal(given, expected)
        if back is model:  # a copy's hooks count for themselves
            assert counts == seen
        assert order == seen_order
    for handle in handles[1:3]:
        handle.remove()
    counts.clear()
    model(image())
    assert counts["norm"] == counts["act"] == 0


def test_a_hook_behind_a_drop_sees_what_it_saw() -> None:
    """A hook of a norm with drop and activation sees the activation's result, once fused as well."""
    model = BY_NAME["timm_norm_drop"].model().eval()
    model.bn.register_forward_hook(lambda module, args, output: output * 3 + 1)
    fused = eagerq.fuse_modules(model, example_inputs=image())
    assert type(fused.conv) is nni.ConvBn2d
    assert torch.equal(fused(image()), model(image()))
    back = eagerq.unfuse_modules(fused)
    assert type(back.bn) is timm.layers.BatchNormAct2d
    assert torch.equal(back(image()), model(image()))


@pytest.mark.parametrize(
    ("where", "register"),
    [("bn", "register_forward_hook"), ("bn", "register_forward_pre_hook"), ("relu", "register_forward_pre_hook")],
)
def test_a_hook_that_would_see_other_tensors_is_refused(where: str, register: str) -> None:
    fused = eagerq.fuse_modules(straight(), example_inputs=image())
    getattr(fused.get_submodule(where), register)(lambda *args: None)
    before = snapshot(fused)
    with pytest.raises(StateError, match=f"placeholder {where} of conv"):
        eagerq.unfuse_modules(fused, inplace=True)
    assert snapshot(fused) == before


def test_a_hook_before_a_shared_activation_is_refused() -> None:
    fused = eagerq.fuse_modules(Visions(nn.ReLU()), example_inputs=image())
    fused.conv1.register_forward_hook(lambda *args: None)
    before = snapshot(fused)
    with pytest.raises(StateError, match="would go to relu, which the model uses elsewhere"):
        eagerq.unfuse_modules(fused, inplace=True)
    assert snapshot(fused) == before


# --- refusals


def test_what_cannot_be_unfused() -> None:
    qat = eagerq.convert_qat(eagerq.fuse_modules(straight(), example_inputs=image()))
    with pytest.raises(StateError, match=r"found a QAT one.*eagerq\.float_state_dict"):
        eagerq.unfuse_modules(qat)
    qat(image())
    with pytest.raises(StateError, match=r"found a deployed one.*keep the fused"):
        eagerq.unfuse_modules(eagerq.convert(qat))
    with pytest.raises(StateError, match="without a record of fuse_modules"):
        eagerq.unfuse_modules(straight())
    with pytest.raises(ModelError):
        eagerq.unfuse_modules(None)  # type: ignore[arg-type]


def test_a_chain_that_was_changed_is_named() -> None:
    def replaced(m: Any) -> None:
        m[0] = conv()

    def parametrized(m: Any) -> None:
        parametrizations.spectral_norm(m[0][0])

    for change, words in ((replaced, "found a Conv2d there"), (parametrized, "parametrized since")):
        fused = eagerq.fuse_modules(source(), example_inputs=image())
        change(fused)
        before = snapshot(fused)
        with pytest.raises(StateError, match=words):
            eagerq.unfuse_modules(fused, inplace=True)
        assert snapshot(fused) == before
    fused = eagerq.fuse_modules(straight(), example_inputs=image())
    fused.relu = conv()
    with pytest.raises(StateError, match="at 'relu', found a Conv2d, which would be lost"):
        eagerq.unfuse_modules(fused)
    fused = eagerq.fuse_modules(straight(), example_inputs=image())
    del fused.bn
    with pytest.raises(StateError, match="a module at each other name"):
        eagerq.unfuse_modules(fused)


def appended(m: Any) -> None:
    m.conv.append(nn.Sigmoid())


def inserted(m: Any) -> None:
    m.conv.insert(1, nn.Dropout())


def removed(m: Any) -> None:
    del m.conv[2]


def of_another_type(m: Any) -> None:
    m.conv[2] = nn.Sigmoid()


def with_state_hook(m: Any) -> None:
    m.conv.register_state_dict_post_hook(lambda *args: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (appended, "ConvBnReLU2d wants 3 modules, found 4; they were changed since"),
        (inserted, "wants 3 modules, found 4"),
        (removed, "wants 3 modules, found 2"),
        (of_another_type, r"wants ReLU as member 2, found torch\.nn\.modules\.activation\.Sigmoid"),
        (
            lambda m: setattr(m.conv, "gain", 3),
            "ConvBnReLU2d at 'conv' beside what fusing put there, found gain, which would be lost",
        ),
        (lambda m: m.conv.register_parameter("scale", nn.Parameter(torch.ones(1))), "found scale, which"),
        (lambda m: m.conv.register_buffer("table", torch.ones(1), persistent=False), "found table, which"),
        (with_state_hook, "found _state_dict_hooks, which"),
        (lambda m: setattr(m.bn, "momentum", 0.5), "the Identity at 'bn' beside what fusing put there, found momentum"),
    ],
)
def test_what_would_be_lost_is_refused(change: Callable[[Any], None], words: str) -> None:
    fused = eagerq.fuse_modules(straight(), example_inputs=image())
    change(fused)
    before = snapshot(fused)
    for inplace in (False, True):
        with pytest.raises(StateError, match=words):
            eagerq.unfuse_modules(fused, inplace=inplace)
        assert snapshot(fused) == before


def test_a_member_of_its_type_put_in_since_comes_back() -> None:
    fused = eagerq.fuse_modules(straight(), example_inputs=image())
    fused.conv[1] = randomise(nn.BatchNorm2d(C, momentum=0.5))
    assert eagerq.unfuse_modules(fused, inplace=True).bn.momentum == 0.5


class Learned(nni.Fused, chain=(nn.Conv2d, nn.BatchNorm2d, nn.ReLU)):
    """A fused class with attributes and state of its own, which fusing brings and un-fusing takes away."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__(*members)
        self.gain = 1.0
        self.scale = nn.Parameter(torch.ones(1))


def test_what_a_fused_class_has_by_itself_is_no_matter() -> None:
    model = straight()
    before = tree(model)
    fused = eagerq.fuse_modules(model, eagerq.DEFAULT_PATTERNS.replacing(Learned), image())
    assert type(fused.conv) is Learned
    assert tree(eagerq.unfuse_modules(fused)) == before


@pytest.mark.parametrize("nth", [0, 1])
@pytest.mark.parametrize("name", ["replace_modules", "_carry_over", "share_hooks", "detach", "_apart", "stop_guarding"])
def test_all_or_nothing(name: str, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = nn.Sequential(*(eagerq.fuse_modules(source(), example_inputs=image()) for _ in range(2)))
    fused[0][0].register_forward_hook(lambda *args: None)
    fused[1][10].register_forward_pre_hook(lambda *args: None)
    before = snapshot(fused)
    original = getattr(unfusing, name)
    calls: list[int] = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == nth + 1:
            raise MemoryError("out of memory")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(unfusing, name, fails)
        with pytest.raises(MemoryError):
            eagerq.unfuse_modules(fused, inplace=True)
    assert snapshot(fused) == before
    assert [type(m) for m in eagerq.unfuse_modules(fused[0])] == [type(m) for m in source()]


def test_a_record_on_a_part_alone() -> None:
    class Holder(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = self.alias = part

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.part(x))

    part = straight()
    expected = tree(Holder(part))
    assert tree(eagerq.unfuse_modules(Holder(eagerq.fuse_modules(part, example_inputs=image())))) == expected
    norm = randomise(timm.layers.BatchNormAct2d(C))
    expected = tree(Holder(norm))
    fused = Holder(eagerq.fuse_modules(norm, example_inputs=image()))
    back = eagerq.unfuse_modules(fused)
    assert tree(back) == expected
    assert back.part is back.alias
