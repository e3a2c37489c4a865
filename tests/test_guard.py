"""eagerq.guard: silent where the watch saw everything, loud on ways that break a chain, and gone afterwards."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eagerq
from eagerq.errors import ModelError, PatternError, StateError
from eagerq.guarding import _HERE
from eagerq.nn import intrinsic as nni
from tests.nets import (
    NETS,
    Basic,
    C,
    Made,
    Net,
    bn,
    call,
    conv,
    differences,
    hidden_mean,
    image,
    randomise,
    snapshot,
    step,
    straight,
    tensors,
)

nets = pytest.mark.parametrize("net", [n for n in NETS if n.chains], ids=lambda net: net.name)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert torch.overrides._get_current_function_mode() is None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert _HERE.open == [] and not _HERE.guarded


def forms(model: nn.Module, inputs: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The fused model, the QAT model, and the deployed one."""
    fused = eagerq.fuse_modules(model, example_inputs=inputs)
    qat = eagerq.convert_qat(fused)
    with torch.no_grad():
        call(qat, inputs if isinstance(inputs, tuple) else (inputs,))
    return fused, qat, eagerq.convert(qat)


# --- silence


@nets
def test_silent_and_the_same_on_what_was_watched(net: Net) -> None:
    models = [eagerq.fuse_modules(net.model(), example_inputs=net.inputs(), inplace=True) for _ in range(2)]
    named = [dict(m.named_parameters()) for m in models]
    for mode in (True, False, True):
        expected = step(models[0], named[0], net.inputs(), mode)
        with eagerq.guard(models[1]):
            given = step(models[1], named[1], net.inputs(), mode)
        assert not differences(expected, given)


@nets
def test_silent_on_qat_and_deployed_models(net: Net) -> None:
    fused = eagerq.fuse_modules(net.model(), example_inputs=net.inputs())
    qat = eagerq.convert_qat(fused)
    with eagerq.guard(qat):
        call(qat, net.inputs())
        qat.eval()
        call(qat, net.inputs())
    try:
        deployed = eagerq.convert(qat)
    except StateError:  # a net with nothing to observe
        return
    with eagerq.guard(deployed), torch.no_grad():
        call(deployed, net.inputs())


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_silent_under_modes_of_the_callers(where: Callable[[], Any]) -> None:
    for model in forms(nn.Sequential(Basic(), Basic(down=True)), image()):
        with where():
            expected = model.eval()(image())
            with eagerq.guard(model):
                given = model(image())
        assert torch.equal(expected, given)


def test_a_recomputation_in_the_backward_is_not_asked() -> None:
    model = Made(
        lambda m, x: m.conv2(m.relu(checkpoint(lambda y: m.bn(m.conv(y)), x, use_reentrant=False))),
        conv=conv(),
        bn=bn(),
        relu=nn.ReLU(),
        conv2=conv(),
    )
    fused = eagerq.fuse_modules(model, example_inputs=image())
    assert type(fused.conv) is nni.ConvBnReLU2d
    with eagerq.guard(fused):
        fused(image().requires_grad_()).sum().backward()
    assert fused.conv[0].weight.grad is not None


def test_hooks_may_keep_what_a_fused_module_gave() -> None:
    kept: list[Tensor] = []
    model = straight(relu=nn.ReLU())
    model.relu.register_forward_hook(lambda module, args, output: kept.append(output))
    fused = eagerq.fuse_modules(model, example_inputs=image())
    fused.conv.register_forward_hook(lambda module, args, output: output * 2)
    fused.register_forward_hook(lambda module, args, output: output + kept[-1])
    with eagerq.guard(fused):
        given = fused(image())
    assert torch.equal(given, fused(image()))


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(inplace=True)], ids=repr)
def test_what_worked_in_place_may_be_read_by_its_old_name(act: nn.Module) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        m.relu(y)
        return y

    for model in forms(Made(run, conv=conv(), bn=bn(), relu=act), image()):
        with eagerq.guard(model):
            model(image())


def test_timm_and_torchvision_style_nets() -> None:
    model = timm.create_model("resnet18")
    fused = eagerq.fuse_modules(randomise(model), example_inputs=torch.zeros(2, 3, 32, 32), inplace=True)
    with eagerq.guard(fused):
        fused(torch.randn(2, 3, 32, 32)).sum().backward()


# --- ways that break a chain: what runs, whether a flag is given, and words of the message


def _other(m: Any, x: Tensor, flag: bool) -> Tensor:
    return m.bn(m.conv(x)) if not flag else m.conv(x)


def _early(m: Any, x: Tensor, flag: bool) -> Any:
    y = m.conv(x)
    if flag:
        return {"early": [y]}
    return m.bn(y)


def _skips_act(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.bn(m.conv(x))
    return (y if flag else m.relu(y)) * 2


def _drops(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.conv(x)
    return x if flag else m.bn(y)


def _tap_after(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.conv(x)
    z = m.bn(y)
    return z + y if flag else z


def _tap_before(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.conv(x)
    scale = y.mean() if flag else 1.0
    return m.bn(y) * scale


def _tap_between(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.bn(m.conv(x))
    z = m.relu(y)
    return z + y if flag else z


def _tap_by_script(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.conv(x)
    return m.bn(y) + (hidden_mean(y) if flag else 0)


def _tap_by_view(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.conv(x)
    part = y[:, :1] if flag else 0
    return m.bn(y) + part


def _changed(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.conv(x)
    if flag:
        y.add_(1)
    return m.bn(y)


def _between(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.conv(x)
    return m.bn(F.relu(y) if flag else y)


def _norm_alone(m: Any, x: Tensor, flag: bool) -> Tensor:
    return m.bn(x if flag else m.conv(x))


def _norm_keyword(m: Any, x: Tensor, flag: bool) -> Tensor:
    return m.bn(input=x.clone() if flag else m.conv(x))


def _twice(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.conv(x)
    return m.bn(y) + (m.bn(y) if flag else 0)


def _act_on_conv(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.conv(x)
    z = m.bn(y)
    return m.relu(y if flag else z)


def _data(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.conv(x * (0 if flag else 1) + 1)
    return m.bn(y) if bool(x.max() > 0) and not flag else F.relu(y)


def _shared(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.bn(m.conv(x))
    if not flag:
        y = m.relu(y)
    return m.relu(m.other(y))


def _loop(m: Any, x: Tensor, flag: bool) -> Tensor:
    for i, layer in enumerate([m.conv, m.bn, m.relu]):
        if not (flag and i == 1):
            x = layer(x)
    return x


@pytest.mark.parametrize("form", [0, 1, 2], ids=["fused", "qat", "deployed"])
@pytest.mark.parametrize(
    ("run", "words"),
    [
        (_other, "the model returns the output of conv, which only bn was to read"),
        (_early, "the model returns the output of conv, which only bn was to read"),
        (_skips_act, "the output of bn, which only relu was to read, is read by mul"),
        (_drops, "conv ran, and the forward ended without its output having reached bn"),
        (_tap_after, "the output of conv, which only bn was to read, is read by add"),
        (_tap_before, "is read by mean"),
        (_tap_between, "the output of bn, which only relu was to read, is read by add"),
        (_tap_by_script, "is read by aten"),
        (_tap_by_view, "is read by getitem"),
        (_changed, "is read by add"),
        (_between, "is read by relu"),
        (_norm_alone, "bn was given another tensor than the one conv gives"),
        (_norm_keyword, "bn was given another tensor than the one conv gives"),
        (_twice, "bn was given the same output of conv twice"),
        (_act_on_conv, "relu was given the output of conv, which only bn was to read"),
        (_data, "is read by relu"),
        (_shared, "the output of bn, which only relu was to read, is read by"),
        (_loop, "relu was given the output of conv, which only bn was to read"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_ways_that_were_not_watched(run: Callable[..., Any], words: str, form: int) -> None:
    uses_act = run in (_skips_act, _tap_between, _act_on_conv, _shared, _loop)
    children = {"conv": conv(), "bn": bn(), **({"relu": nn.ReLU()} if uses_act else {}), "other": conv()}
    model = Made(run, **children)
    fused = forms(model, (image(), False))[form]
    before = snapshot(fused)["hooks"]
    with eagerq.guard(fused):
        fused(image(), False)
        with pytest.raises(eagerq.GuardError) as caught:
            fused(image(), True)
        fused(image(), False)
    assert words in str(caught.value)
    assert "pass inputs that do among them" in str(caught.value)
    assert "without('conv')" in str(caught.value)
    with pytest.raises(eagerq.GuardError), eagerq.guard(fused):
        fused(image(), True)
    assert snapshot(fused)["hooks"] == before
    fused(image(), True)  # off, nothing is asked
    # both remedies in the message
    both = eagerq.fuse_modules(model, example_inputs=[(image(), False), (image(), True)])
    left_out = eagerq.plan_fusion(model, example_inputs=(image(), False)).without("conv").apply(copy.deepcopy(model))
    for repaired in (both, left_out):
        with eagerq.guard(repaired):
            for flag in (True, False):
                expected = copy.deepcopy(model).eval()(image(), flag)
                given = repaired.eval()(image(), flag)
                assert all(torch.equal(a, b) for a, b in zip(tensors(expected), tensors(given), strict=True))


def test_a_part_run_by_itself_is_asked_when_the_block_ends() -> None:
    model = Made(_drops, conv=conv(), bn=bn())
    fused = eagerq.fuse_modules(model, example_inputs=(image(), False))
    with pytest.raises(eagerq.GuardError, match=r"conv ran, and the block ended"), eagerq.guard(fused):
        fused.conv(image())
    with eagerq.guard(fused):
        fused.bn(fused.conv(image()))


def test_an_exception_of_the_models_own_passes() -> None:
    def run(m: Any, x: Tensor, flag: bool) -> Tensor:
        y = m.conv(x)
        if flag:
            raise ZeroDivisionError
        return m.bn(y)

    fused = eagerq.fuse_modules(Made(run, conv=conv(), bn=bn()), example_inputs=(image(), False))
    before = snapshot(fused)["hooks"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with eagerq.guard(fused):
            with pytest.raises(ZeroDivisionError):
                fused(image(), True)
            fused(image(), False)
        with pytest.raises(ZeroDivisionError), eagerq.guard(fused):
            fused(image(), True)
    assert snapshot(fused)["hooks"] == before


# --- where the record is


def bad() -> nn.Module:
    return eagerq.fuse_modules(Made(_other, conv=conv(), bn=bn()), example_inputs=(image(), False))


class Larger(nn.Module):
    """Holds another model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(), bn())
        self.inner = inner

    def forward(self, x: Tensor, flag: bool) -> Tensor:
        return self.inner(self.stem(x), flag)


class Flagged(nn.Module):
    """conv and norm, or conv alone; importable, so that it can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        return _other(self, x, flag)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (copy.deepcopy, "conv"),
        (lambda m: pickle.loads(pickle.dumps(m)), "conv"),
        (Larger, "inner.conv"),
        (lambda m: eagerq.fuse_modules(Larger(m), example_inputs=(image(), False)), "inner.conv"),
        (lambda m: eagerq.convert_qat(Larger(m), example_inputs=(image(), False)), "inner.conv"),
        (lambda m: nn.ModuleDict({"a": m})["a"], "conv"),
        (lambda m: m.to(torch.float64).float(), "conv"),
    ],
    ids=["deepcopy", "pickle", "held", "fused again", "converted", "in a dict", "moved"],
)
def test_the_chains_survive(change: Callable[[nn.Module], nn.Module], name: str) -> None:
    model = change(eagerq.fuse_modules(Flagged(), example_inputs=(image(), False)))
    with eagerq.guard(model):
        model(image(), False)
        with pytest.raises(eagerq.GuardError, match=f"without\\('{name}'\\)"):
            model(image(), True)


class Outer(nni.Fused, chain=(nni.ConvBn2d, nn.ReLU)):
    """A fused module fused once more."""


class Inner(nni.Fused, chain=(nn.Conv2d, nni.BNReLU2d)):
    """A conv before one."""


@pytest.mark.parametrize(("first", "cls"), [(["conv", "bn"], Outer), (["bn", "relu"], Inner)])
def test_a_chain_fused_twice_is_one(first: list[str], cls: type[nni.Fused]) -> None:
    def run(m: Any, x: Tensor, flag: bool = False) -> Tensor:
        y = m.bn(m.conv(x))
        return y * 2 if flag else m.relu(y)

    model = Made(run, conv=conv(), bn=bn(), relu=nn.ReLU())
    once = eagerq.plan_fusion(model, [first], image()).apply(model)
    names = [["conv", "relu"]] if cls is Outer else [["conv", "bn"]]
    patterns = eagerq.Patterns((cls,))
    plan = eagerq.FusionPlan((eagerq.Match(tuple(names[0]), cls),), patterns=patterns)
    twice = plan.apply(once)
    with eagerq.guard(twice):
        twice(image())
        with pytest.raises(eagerq.GuardError, match=r"conv \+ bn \+ relu is broken"):
            twice(image(), True)


def test_what_was_replaced_since_is_not_asked() -> None:
    model = bad()
    model.conv = conv()
    with eagerq.guard(model):
        model(image(), True)


def test_a_copy_made_within_is_clean() -> None:
    fused = eagerq.fuse_modules(Flagged(), example_inputs=(image(), False))
    with eagerq.guard(fused):
        qat = eagerq.convert_qat(fused, example_inputs=(image(), False))
        copies = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), qat]
        fused(image())
    for copied in copies:
        copied(image())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in copied.modules())


def test_another_thread_is_not_asked() -> None:
    fused = bad()
    with eagerq.guard(fused):
        thread = threading.Thread(target=fused, args=(image(), True))
        thread.start()
        thread.join()
        fused(image(), False)


def test_guards_may_be_nested() -> None:
    fused = bad()
    with eagerq.guard(fused), eagerq.guard(fused):
        fused(image(), False)
        with pytest.raises(eagerq.GuardError):
            fused(image(), True)
        fused(image(), False)


@pytest.mark.parametrize("switched_on", [False, True])
def test_a_model_that_returns_nothing_is_asked_too(switched_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(m: Any, x: Tensor, way: str) -> None:
        y = m.conv(x)
        if way == "fails":
            raise ZeroDivisionError
        if way == "good":
            m.bn(y).sum()

    if switched_on:
        monkeypatch.setenv("EAGERQ_GUARD", "1")
    fused = eagerq.fuse_modules(Made(run, conv=conv(), bn=bn()), example_inputs=(image(), "good"))
    assert type(fused.conv) is nni.ConvBn2d
    with contextlib.nullcontext() if switched_on else eagerq.guard(fused):
        for _ in range(2):
            fused(image(), "good")
            with pytest.raises(ZeroDivisionError):
                fused(image(), "fails")
            with pytest.raises(eagerq.GuardError, match="conv ran, and the forward ended without its output having reached bn"):
                fused(image(), "bad")
            try:
                raise KeyError  # a forward that runs while an exception is handled, as in a retry
            except KeyError:
                fused(image(), "good")
                with pytest.raises(eagerq.GuardError, match="the forward ended without"):
                    fused(image(), "bad")


# --- refusals


def test_what_cannot_be_guarded() -> None:
    with pytest.raises(StateError, match="without a record of fuse_modules"), eagerq.guard(straight()):
        pass
    with pytest.raises(ModelError, match=r"wanted an nn\.Module"), eagerq.guard(3):  # type: ignore[arg-type]
        pass


def test_nothing_checked_is_said() -> None:
    fused = bad()
    with pytest.warns(UserWarning, match="checked nothing"), eagerq.guard(fused):
        copy.deepcopy(fused)(image(), True)


def test_without() -> None:
    plan = eagerq.plan_fusion(nn.Sequential(Basic(), Basic()), example_inputs=image())
    less = plan.without("0.bn1", "1.conv2")
    assert {m.names[0] for m in plan.matches} - {m.names[0] for m in less.matches} == {"0.conv1", "1.conv2"}
    assert {s.names for s in less.skips if s.reason == "left out by the caller"} == {
        ("0.conv1", "0.bn1", "0.act1"),
        ("1.conv2", "1.bn2"),
    }
    assert plan.without() == plan
    with pytest.raises(PatternError, match=r"'0.act2'.*none of its 4 chains"):
        plan.without("0.act2")


# --- switched on by the environment


def test_the_environment_switches_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Flagged()
    monkeypatch.setenv("EAGERQ_GUARD", "0")
    assert not eagerq.fuse_modules(model, example_inputs=image())._forward_hooks
    monkeypatch.setenv("EAGERQ_GUARD", "1")
    fused = eagerq.fuse_modules(model, example_inputs=image())
    monkeypatch.delenv("EAGERQ_GUARD")
    expected = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=image()))
    qat = eagerq.convert_qat(fused)
    assert eagerq.report(qat).quantizers == eagerq.report(expected).quantizers
    for guarded in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), qat, Larger(fused)):
        guarded(image(), False).sum().backward()
        with pytest.raises(eagerq.GuardError, match=r"conv \+ .*bn is broken"):
            guarded(image(), True)
        guarded(image(), False)
        assert not any(type(h).__name__ == "_Hook" for m in guarded.modules() for h in m._forward_hooks.values())
    larger = eagerq.fuse_modules(Larger(fused), example_inputs=(image(), False))
    assert not larger.inner._forward_hooks
    larger(image(), True)
    other = copy.deepcopy(qat)  # each forward learns, which the next is quantized by
    for _ in range(2):
        assert torch.equal(torch.compile(qat, backend="aot_eager", fullgraph=True)(image()), other(image()))


def test_an_interrupt_leaves_a_switched_on_guard_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(m: Any, x: Tensor, how: str) -> Tensor:
        y = m.conv(x)
        if how == "interrupt":
            raise KeyboardInterrupt
        return m.bn(y) if how == "good" else y

    monkeypatch.setenv("EAGERQ_GUARD", "1")
    fused = eagerq.fuse_modules(Made(run, conv=conv(), bn=bn()), example_inputs=(image(), "good"))
    with pytest.raises(KeyboardInterrupt):
        fused(image(), "interrupt")
    fused(image(), "good")
    with pytest.raises(eagerq.GuardError):
        fused(image(), "bad")


def test_off_it_compiles_without_a_break() -> None:
    fused = eagerq.fuse_modules(nn.Sequential(Basic(), Basic()), example_inputs=image())
    with eagerq.guard(fused):
        expected = fused(image())
    del expected
    eager, compiled = copy.deepcopy(fused), torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(image()), eager(image()))
    assert image().shape[1] == C
