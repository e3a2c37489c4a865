"""Models that once deceived the watch: what they return, set, ask or cast where no operator shows it."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, weight_norm
from torch.overrides import TorchFunctionMode

import eagerq
from tests.nets import C, Made, Net, bn, conv, found, image, randomise


def net(run: Callable[..., Any], **more: Any) -> Callable[[], nn.Module]:
    """conv, norm and ReLU, run by a function."""
    return lambda: Made(run, **{"conv": conv(), "bn": bn(), "relu": nn.ReLU(), **more})


def straight(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x)))


# --- outputs in forms that no walk over lists and dicts finds


@dataclasses.dataclass(slots=True)
class Slots:
    last: Tensor
    tap: Tensor


def returns(form: Callable[[Tensor, Tensor], Any]) -> Callable[[], nn.Module]:
    """A net that returns its conv's output beside its last, in some form."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        return form(m.relu(m.bn(y)), y)

    return net(run)


def values(output: Any) -> Iterator[Tensor]:
    """The tensors in what ``returns`` gives."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Slots):
        yield from (output.last, output.tap)
    elif isinstance(output, Holder):
        yield output.tensor
    elif callable(output):
        yield from output()
    elif isinstance(output, dict):
        yield from output.values()
    else:
        for item in output:
            yield from values(item)


def yields(m: Any, x: Tensor) -> Iterator[Tensor]:
    y = m.bn(m.conv(x))
    yield y
    yield m.relu(y)


# --- modules asked for their type


class Taps(nn.Module):
    """Returns what its ReLUs give, which it knows by their type."""

    def __init__(self, give: Callable[[Tensor, dict[str, Tensor]], Any]) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(), nn.ReLU(), conv(), bn(), nn.ReLU())
        self.give = give

    def forward(self, x: Tensor) -> Any:
        taps = {}
        for name, layer in self.features.named_children():
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                taps[name] = x
        return self.give(x, taps)


# --- settings made by name


class KeepsEval(Made):
    """Holds its norm in eval mode, as detectors do."""

    def train(self, mode: bool = True) -> KeepsEval:
        super().train(mode)
        self.bn.eval()
        return self


class Freezes(Made):
    """Freezes its norm's parameters in each mode, as fine-tuning does."""

    def train(self, mode: bool = True) -> Freezes:
        super().train(mode)
        for parameter in self.bn.parameters():
            parameter.requires_grad_(False)
        return self


class Thaws(Made):
    """Trains its convolution's bias in eval mode only."""

    def train(self, mode: bool = True) -> Thaws:
        super().train(mode)
        self.conv.bias.requires_grad_(not mode)
        return self


class TrainsInEval(Made):
    """Lets its norm learn in eval mode, as test-time adaptation does."""

    def eval(self) -> TrainsInEval:
        super().eval()
        self.bn.train()
        return self


class AsksPartsByName(Made):
    """Reads a part of its norm whenever the mode is set."""

    def train(self, mode: bool = True) -> AsksPartsByName:
        super().train(mode)
        self.bn.weight.requires_grad_(True)
        return self


def sets(name: str, value: Any) -> Callable[[Any, Tensor], Tensor]:
    """A forward that sets an attribute of the norm between conv and norm."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        setattr(m.bn, name, value)
        return m.relu(m.bn(y))

    return run


def replaces_data(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.data = torch.full_like(x, 0.5)
    return m.relu(m.bn(y))


# --- casts, threads, hooks on gradients


def cast_between(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.relu(m.bn(m.conv(x).float()))


def cast_before(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.conv(x)
    return m.relu(y).float()


def guesses(m: Any, x: Tensor) -> Tensor:
    try:
        bright = bool(x.mean() > -9)
    except RuntimeError:  # where there are no values
        bright = False
    y = m.conv(x)
    return m.relu(m.bn(y)) + y if bright else m.relu(m.bn(y))


def in_a_thread(m: Any, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        y = pool.submit(m.conv, x).result()
        tap = pool.submit(lambda: y * 2).result()
    return m.relu(m.bn(y)) + tap


def weighed(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if grad is None else grad * grad_output[0].mean() for grad in grad_input)


def hooked() -> nn.Module:
    model = Made(lambda m, x: m.bn(m.block(m.conv(x))), conv=conv(), block=nn.Sequential(conv()), bn=bn())
    model.block.register_full_backward_hook(weighed)
    return model


# --- tensors chosen by what a module is, put into modules, read where nobody looks


def chosen_by_type(kind: type[nn.Module]) -> Callable[[Any, Tensor], Tensor]:
    """A forward over a Sequential that also returns what its last module of a type gave, as one tensor."""

    def run(m: Any, x: Tensor) -> Tensor:
        tap = x
        for layer in m.layers:
            x = layer(x)
            if isinstance(layer, kind):
                tap = x
        return x * tap

    return run


def layers(run: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Made(run, layers=nn.Sequential(conv(), bn(), nn.ReLU(), conv()))


def scaled_by_type(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x))) * np.float32(2 if hasattr(m.bn, "eps") else 1)


def parameter_by_type(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x))) * (m.one if hasattr(m.bn, "eps") else m.other)


def tensor_that_carries_one(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.scale = m.one
    z = m.bn(y)
    return m.relu(z * getattr(z, "scale", m.other))


def ones() -> dict[str, nn.Parameter]:
    return {"one": nn.Parameter(torch.ones(C, 1, 1)), "other": nn.Parameter(torch.full((C, 1, 1), 2.0))}


class Domains(Made):
    """Statistics of a domain, put into its one norm by the forward."""

    def __init__(self, run: Callable[..., Any], **children: Any) -> None:
        super().__init__(run, **children)
        self.register_buffer("mean", torch.full((C,), 0.5))


def of_a_domain(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    m.bn.running_mean = m.mean
    return m.relu(m.bn(y))


def with_another_weight(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(torch.func.functional_call(m.conv, {"weight": m.weight}, (x,))))


def read_by_a_hook(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    m.store.append(y)
    z = m.bn(y)
    del y
    return m.last(z)


def read_before() -> nn.Module:
    store: list[Tensor] = []
    model = Made(read_by_a_hook, conv=conv(), bn=bn(), last=conv(), store=store)
    model.last.register_forward_pre_hook(Adds(store))
    return model


@dataclasses.dataclass
class Adds:
    """A forward pre-hook that adds what was stored."""

    store: list[Tensor]

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] + self.store.pop(),)


def read_by_a_callback(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.relu(m.bn(y))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b + y).abs().mean((1, 2, 3))

    return z * nn.functional.triplet_margin_with_distance_loss(z, z * 2, z * 3, distance_function=distance)


def another_view_of_it(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    same = torch.Tensor._make_subclass(nn.Parameter, y)
    return m.relu(m.bn(y)) + same


def vectorised(m: Any, x: Tensor) -> Tensor:
    def both(one: Tensor) -> tuple[Tensor, Tensor]:
        y = m.conv(one)
        return m.relu(y), y

    a, b = torch.vmap(both)(x)
    return a - b


class Doubles(TorchFunctionMode):
    """Doubles what batch norms are given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.batch_norm:
            args = (args[0] * 2, *args[1:])
        return func(*args, **(kwargs or {}))


def in_a_mode(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    with Doubles():
        return m.relu(m.bn(y))


def clamps_anew(m: Any, x: Tensor) -> Tensor:
    m.clamp.max_val = 2.0
    y = m.clamp(m.conv(x))
    m.clamp.max_val = 0.1
    return y + m.clamp(m.last(x))


class Holder(nn.Module):
    """Holds a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


def asks(question: Callable[[Any, Tensor], bool]) -> Callable[[Any, Tensor], Tensor]:
    """A forward that reads the conv's output twice if the answer is yes."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        z = m.relu(m.bn(y))
        return z + y if question(m, x) else z

    return run


def without_gradients_in_eval(m: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(m.training):
        y = m.conv(x)
    return m.relu(m.bn(y))


def wants_targets(m: Any, x: Tensor) -> Tensor:
    """Runs in eval mode only, as detectors do that are given no targets."""
    if m.training:
        raise ValueError("targets are wanted")
    with torch.no_grad():
        y = m.conv(x)
    return m.relu(m.bn(y))


def decodes(m: Any, x: Tensor) -> list[Tensor]:
    """Cuts its result into slices in inference mode, where tensors count no versions."""
    y = m.relu(m.bn(m.conv(x)))
    with torch.inference_mode():
        boxes = y.clone()
        corners = [boxes[:, i] + boxes[:, i + 1] for i in range(C - 1)]
    return [y, *(corner.clone().requires_grad_() for corner in corners)]


OTHERS = "with other arguments"
ALL = ("conv bn relu -> ConvBnReLU2d",)
TAIL = ("bn relu -> BNReLU2d",)
STAGES = dict.fromkeys(("features.0 features.1", "features.2 features.3 features.4"), "returns other things than before")
TRAPS = (
    Net("slots", returns(Slots), TAIL, {"conv bn": "also an output of the model"}),
    Net("deque", returns(lambda x, y: collections.deque([x, y])), TAIL, {"conv bn": "also an output of the model"}),
    Net("iterator", returns(lambda x, y: iter([x, y])), TAIL, {"conv bn": "also an output of the model"}),
    Net("lazy", returns(lambda x, y: map(torch.neg, [x, y])), TAIL, {"conv bn": "also an output of the model"}),
    Net("closure", returns(lambda x, y: lambda: [x, y]), TAIL, {"conv bn": "also an output of the model"}),
    Net("chain", returns(lambda x, y: itertools.chain([x], {"tap": y}.values())), TAIL, {"conv bn": "also an output"}),
    Net("rewritten_once_given", net(yields, relu=nn.ReLU(inplace=True)), ("conv bn -> ConvBn2d",), {
        "conv bn relu": "the output of bn is also an output of the model"}),
    Net("taps_by_type", lambda: Taps(lambda x, taps: taps), (), STAGES),
    Net("last_by_type", lambda: Taps(lambda x, taps: list(taps.values())[-1:]), ("features.0 features.1 -> ConvReLU2d",), {
        "features.2 features.3 features.4": "returns other things than before"}),
    Net("weight_by_type", lambda: Taps(lambda x, taps: x * 0.5 ** len(taps)), (), dict.fromkeys(STAGES, "with other arguments")),
    Net("keeps_eval", lambda: KeepsEval(straight, conv=conv(), bn=bn(), relu=nn.ReLU()).eval(), (), {
        "conv bn relu": "train(True) leaves bn in eval mode"}),
    Net("keeps_eval_from_the_start", lambda: KeepsEval(straight, conv=conv(), bn=bn(), relu=nn.ReLU()).train(), ALL),
    Net("freezes", lambda: Freezes(straight, conv=conv(), bn=bn(), relu=nn.ReLU()), (), {
        "conv bn relu": "train(False) sets bn.weight.requires_grad to False, which it does not reach once fused"}),
    Net("freezes_from_the_start", lambda: Freezes(straight, conv=conv(), bn=bn(), relu=nn.ReLU()).train(), ALL),
    Net("thaws_what_the_fused_has_too", lambda: Thaws(straight, conv=conv(), bn=bn(), relu=nn.ReLU()), ALL),
    Net("sets_mode", net(sets("training", False)), (), {"conv bn relu": "bn.training is False when bn runs and True once fused"}),
    Net("sets_momentum", net(sets("momentum", 0.5)), (), {"conv bn relu": "bn.momentum is 0.5 when bn runs and 0.1 once"}),
    Net("sets_eps", net(sets("eps", 0.5)), (), {"conv bn relu": "bn.eps is 0.5 when bn runs and 1e-05 once"}),
    Net("sets_what_is_there", net(sets("momentum", 0.1)), ALL),
    Net("replaces_data", net(replaces_data), TAIL, {"conv bn": "function data"}),
    Net("cast_between", net(cast_between), TAIL, {"conv bn": "read by function float"}, on_meta=False),
    Net("cast_before", net(cast_before), (), {"conv relu": "or autocasts"}, on_meta=False),
    Net("guesses", net(guesses), TAIL, {"conv bn": "function add"}, on_meta=False),
    Net("in_a_thread", net(in_a_thread), (), dict.fromkeys(("conv bn", "bn relu"), "'conv' in a thread of its own")),
    Net("chosen_by_type", layers(chosen_by_type(nn.ReLU)), (), {"layers.0 layers.1 layers.2": OTHERS}),
    Net("norm_chosen_by_type", layers(chosen_by_type(nn.BatchNorm2d)), (), {
        "layers.0 layers.1": OTHERS, "layers.0 layers.1 layers.2": "has 2 readers"}),
    Net("number_by_type", net(scaled_by_type), (), {"conv bn relu": OTHERS}),
    Net("parameter_by_type", lambda: net(parameter_by_type, **ones())(), (), {"conv bn relu": OTHERS}),
    Net("carries_another", lambda: net(tensor_that_carries_one, **ones())(), (), {
        "conv bn": OTHERS, "conv bn relu": "function mul"}),
    Net("of_a_domain", lambda: Domains(of_a_domain, conv=conv(), bn=bn(), relu=nn.ReLU()), (), {
        "conv bn": "running_mean is another tensor when it runs", "bn relu": "running_mean is another"}),
    Net("another_weight", net(with_another_weight, weight=nn.Parameter(torch.ones(C, C, 3, 3))), TAIL, {
        "conv bn": "weight is another tensor when it runs"}),
    Net("read_by_a_hook", read_before, (), {"conv bn": "has 2 readers"}),
    Net("read_by_a_callback", net(read_by_a_callback), TAIL, {"conv bn": "has 2 readers"}),
    Net("another_view_of_it", net(another_view_of_it), TAIL, {"conv bn": "has 2 readers"}),
    Net("vectorised", lambda: Made(vectorised, conv=conv(), relu=nn.ReLU()), (), {"conv relu": "under torch.vmap"}),
    Net("in_a_mode", net(in_a_mode), TAIL, {"conv bn": "or function modes"}),
    Net("clamps_anew", lambda: Made(clamps_anew, conv=conv(), clamp=nn.Hardtanh(-0.2, 0.2), last=conv()), (), {
        "conv clamp": "changes its settings between", "last clamp": "changes its settings between"}),
    Net("module", returns(lambda x, y: [x, Holder(y)]), TAIL, {"conv bn": "also an output of the model"}),
    Net("asks_for_gradients", net(asks(lambda m, x: not torch.is_grad_enabled())), TAIL, {"conv bn": "has 2 readers"}),
    Net("asks_for_gradients_in_eval", net(asks(lambda m, x: torch.is_grad_enabled() and not m.training)), TAIL, {
        "conv bn": "has 2 readers"}),
    Net("without_gradients_in_eval", net(without_gradients_in_eval), TAIL, {"conv bn": "under other gradient modes"}),
    Net("decodes", net(decodes), ALL),
    Net("trains_in_eval", lambda: TrainsInEval(straight, conv=conv(), bn=bn(), relu=nn.ReLU()), (), {
        "conv bn relu": "train(False) leaves bn in train mode"}),
    Net("asks_parts_by_name", lambda: AsksPartsByName(straight, conv=conv(), bn=bn(), relu=nn.ReLU()), (), {
        "conv bn relu": "AttributeError: 'Identity' object has no attribute 'weight'"}),
    Net("asks_a_weight_in_eval", net(asks(lambda m, x: m.conv.weight.requires_grad and not m.training)), TAIL, {
        "conv bn": "has 2 readers"}),
    Net("asks_for_a_device", net(asks(lambda m, x: x.is_cpu)), TAIL, {"conv bn": "has 2 readers"}, on_meta=False),
    Net("hooks_around", hooked, (), {"block.0 bn": "block around one of them carries hooks on its gradients"}),
)  # fmt: skip

traps = pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)


@traps
def test_the_plan_is_the_truth(trap: Net) -> None:
    plan = eagerq.plan_fusion(randomise(trap.build()), example_inputs=image())
    assert found(plan) == trap.truth
    reasons = {" ".join(skip.names): skip.reason for skip in plan.skips if "did not run" not in skip.reason}
    assert reasons.keys() == trap.skips.keys()
    for names, words in trap.skips.items():
        assert words in reasons[names]
    assert plan.on_meta is trap.on_meta


@traps
def test_fused_computes_the_same(trap: Net) -> None:
    torch.manual_seed(0)
    model = randomise(trap.build())
    fused = eagerq.fuse_modules(model, example_inputs=image())
    for mode in (True, False):
        seen = []
        for m in (model, fused):
            m.train(mode).zero_grad()
            outputs = [*values(m(image()))]
            torch.stack([o.square().mean() for o in outputs]).sum().backward()
            gradients = [p.grad for p in m.parameters() if p.grad is not None]
            state = eagerq.float_state_dict(m)
            seen.append((outputs, gradients, [state[key] for key in sorted(state)]))
        for ours, theirs in zip(*seen, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_where_train_mode_does_not_run_eval_mode_shows_the_gradient_modes() -> None:
    model = net(wants_targets)().eval()
    plan = eagerq.plan_fusion(model, example_inputs=image())
    assert found(plan) == {(("bn", "relu"), "BNReLU2d", frozenset())}
    assert "under other gradient modes" in next(skip.reason for skip in plan.skips if skip.names == ("conv", "bn"))
    assert any("not watched in train mode, where the forward raises ValueError" in note for note in plan.notes)


# --- without inputs


def test_without_inputs_a_sequential_that_a_model_holds_is_not_fused() -> None:
    """Its parent may index into it."""
    model = Taps(lambda x, taps: taps)
    assert eagerq.plan_fusion(model).matches == ()
    assert {match.names for match in eagerq.plan_fusion(model.features).matches} == {("0", "1"), ("2", "3", "4")}
    assert eagerq.plan_fusion(nn.Sequential(model, nn.Sequential(conv(), bn()))).matches[0].names == ("1.0", "1.1")


# --- what QAT modules would lose


def doubled(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.conv2d(input, weight * 2, bias, padding=1)


def patch(model: Any) -> None:
    model.conv._conv_forward = doubled


LOSSES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "patched method": (patch, "a _conv_forward of its own"),
    "pruned bias": (lambda m: prune.random_unstructured(m.conv, "bias", 0.5), "bias is computed before each forward"),
    "bias of weight_norm": (lambda m: weight_norm(m.conv, "bias"), "bias is computed before each forward"),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_what_a_module_does_by_itself_is_not_lost(loss: str) -> None:
    change, words = LOSSES[loss]
    torch.manual_seed(0)
    model = Made(lambda m, x: m.last(straight(m, x)), conv=conv(), bn=bn(), relu=nn.ReLU(), last=conv())
    change(randomise(model))
    plan = eagerq.plan_fusion(model, example_inputs=image())
    assert words in next(skip.reason for skip in plan.skips if "conv" in skip.names)
    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=image())).apply(eagerq.disable_fake_quant)
    assert words in dict(eagerq.report(qat).left_float)["conv"]
    torch.testing.assert_close(qat(image()), model(image()))


def test_complex_parameters_stay_float() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.act(m.conv(x.to(torch.complex64))).abs())

    model = Made(run, conv=nn.Conv2d(C, C, 3, dtype=torch.complex64), act=nn.Tanh(), head=conv())
    fused = eagerq.fuse_modules(model, example_inputs=image())
    assert torch.equal(fused(image()), model(image()))
    qat = eagerq.convert_qat(fused)
    assert "complex" in dict(eagerq.report(qat).left_float)["conv"]
    assert torch.allclose(qat.apply(eagerq.disable_fake_quant)(image()), model(image()))


def test_a_report_does_not_depend_on_where_it_was_converted() -> None:
    model = Made(lambda m, x: m.last(m.norm(m.conv(x))), conv=conv(), norm=nn.GroupNorm(2, C), last=conv())
    reports = [eagerq.report(eagerq.convert_qat(model, example_inputs=image(), inplace=inplace)) for inplace in (False, True)]
    assert reports[0] == reports[1]


# --- a guard that the environment switched on


def test_a_switched_on_guard_raises_from_within_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(m: Any, x: Tensor, way: str) -> Tensor:
        y = m.conv(x)
        if way == "fails":
            raise ValueError("the model's own")
        return m.bn(y) + y if way == "bad" else m.bn(y)

    monkeypatch.setenv("EAGERQ_GUARD", "1")
    fused = eagerq.fuse_modules(Made(run, conv=conv(), bn=bn()), example_inputs=(image(), "good"))
    hooks = [len(m._forward_hooks) for m in fused.modules()]
    for _ in range(2):
        with pytest.raises(eagerq.GuardError, match="read by add"):
            fused(image(), "bad")
        with pytest.raises(ValueError, match="the model's own"):
            fused(image(), "fails")
        fused(image(), "good")
    assert [len(m._forward_hooks) for m in fused.modules()] == hooks
