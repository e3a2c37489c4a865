"""Steps that a module remembers, where what changes them comes by ways of its own: within a forward, past PyTorch's functions,
in place, or with a class of the user's."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import eagerq
import eagerq.nn.intrinsic.qat as nniqat
from tests.test_settled import ACTS, assert_same, batch, forget, net, norm_of, remembered, step


def assert_seen(train: Callable[[Callable[[Any], Any]], dict[str, Tensor]]) -> None:
    """Whether what a model remembers changes nothing in training that calls the given function before each step."""
    assert_same(train(lambda model: model), train(forget))


def _more(_: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 0.5


#: What a hook or a parametrization of the user's may do to the model in which it runs.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "observers off": lambda model: model.apply(eagerq.disable_observer),
    "fake quantization off": lambda model: model.apply(eagerq.disable_fake_quant),
    "norm in eval": lambda model: norm_of(model).eval(),
    "another momentum": lambda model: setattr(norm_of(model), "momentum", 0.9),
    "a hook": lambda model: model[0].activation_post_process.register_forward_hook(_more),
}


class Passing(nn.Module):
    """A parametrization that does something beside."""

    def __init__(self, beside: Callable[[], None]) -> None:
        super().__init__()
        self.beside = [beside]

    def forward(self, weight: Tensor) -> Tensor:
        self.beside[0]()
        return weight * 1.0


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("act", ["none", "ReLU", "GELU", "SiLU", "Sigmoid"])
@pytest.mark.parametrize("where", ["input_fake_quant", "weight_fake_quant", "bn", "weight", "bias"])
def test_a_change_within_a_forward_is_seen(where: str, act: str, change: str, plain_launches: None) -> None:
    """On the way to the steps that were remembered."""

    def train(before: Callable[[Any], Any]) -> dict[str, Tensor]:
        model = net(act)
        steps = 0

        def beside() -> None:
            if steps == 3:
                CHANGES[change](model)

        if where in ("weight", "bias"):
            if where == "bias":
                model[0].bias = nn.Parameter(torch.ones(4))
            parametrize.register_parametrization(model[0], where, Passing(beside), unsafe=True)
        else:
            getattr(model[0], where).register_forward_hook(lambda *_: beside())
        for steps in range(4):
            step(before(model), steps)
        return step(before(model), 4)

    assert_seen(train)


PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "norm": norm_of,
    "activation": lambda model: model[0].act,
    "quantizer": lambda model: model[0].activation_post_process,
}


@pytest.mark.parametrize("part", PARTS)
def test_hooks_that_are_put_aside_and_back_are_seen(part: str, plain_launches: None) -> None:
    def train(before: Callable[[Any], Any]) -> dict[str, Tensor]:
        model = net("ReLU")
        of = PARTS[part](model)
        of.register_forward_hook(_more)
        step(model, 0)
        saved = of._forward_hooks
        of._forward_hooks = type(saved)()
        for i in (1, 2):
            step(before(model), i)
        of._forward_hooks = saved
        return step(before(model), 3)

    assert_seen(train)


@pytest.mark.parametrize("part", PARTS)
def test_hooks_that_come_with_a_state_are_seen(part: str, plain_launches: None) -> None:
    def train(before: Callable[[Any], Any]) -> dict[str, Tensor]:
        model = net("ReLU")
        other = copy.deepcopy(model)
        PARTS[part](other).register_forward_hook(_more)
        for i in (0, 1):
            step(before(model), i)
        PARTS[part](model).__setstate__(copy.deepcopy(vars(PARTS[part](other))))
        return step(before(model), 2)

    assert_seen(train)


def test_a_hook_that_takes_itself_off_for_a_call_runs_again(plain_launches: None) -> None:
    model, calls = net("GELU", norm=False), 0
    quantizer = model[0].activation_post_process

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        me = quantizer._forward_hooks.pop(handle.id)
        model(batch(9))
        quantizer._forward_hooks[handle.id] = me

    handle = quantizer.register_forward_hook(hook)
    for i in range(4):
        step(model, i)
        assert calls == i + 1


@pytest.mark.parametrize(
    ("name", "old", "new"), [("momentum", 0.1, 0.9), ("eps", 1e-5, 0.5), ("min_val", -0.5, -0.1), ("max_val", 0.75, 0.25)]
)
def test_a_number_that_is_written_in_place_is_seen(name: str, old: float, new: float, plain_launches: None) -> None:
    def train(before: Callable[[Any], Any]) -> dict[str, Tensor]:
        model = net("Hardtanh")
        of = model[0].act if name.endswith("val") else norm_of(model)
        setattr(of, name, torch.tensor(old))
        for i in (1, 2):
            step(before(model), i)
        getattr(of, name).fill_(new)
        return step(before(model), 3)

    assert_seen(train)


def test_a_buffer_for_a_number_is_seen(plain_launches: None) -> None:
    def train(before: Callable[[Any], Any]) -> dict[str, Tensor]:
        model = net("ReLU")
        norm = norm_of(model)
        del norm.momentum
        norm.register_buffer("momentum", torch.tensor(0.1))
        for i in (1, 2):
            step(before(model), i)
        norm.momentum.fill_(0.9)
        return step(before(model), 3)

    assert_seen(train)


class ByAsking(nniqat.ConvBnReLU2d):
    """A user's own, that says in each batch what is quantized."""

    def quantizes_weight_itself(self) -> bool:
        return not self.folds[0]


def test_a_class_that_says_what_is_quantized_is_asked(plain_launches: None) -> None:
    def train(before: Callable[[Any], Any]) -> dict[str, Tensor]:
        model = net("ReLU")
        model[0].__class__ = ByAsking
        model[0].folds = [False]
        for i in (1, 2):
            step(before(model), i)
        model[0].folds[0] = True
        return step(before(model), 3)

    assert_seen(train)


class OnTheWay(nniqat.ConvBnReLU2d):
    """A user's own, whose methods do something beside."""

    def effective_weight(self) -> Tensor:
        self.beside[0]("effective_weight")
        return super().effective_weight()

    def op(self, input: Tensor, weight: Tensor, bias: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.beside[0]("op")
        return super().op(input, weight, bias, *args, **kwargs)

    def check_norm_input(self, x: Tensor) -> None:
        self.beside[0]("check_norm_input")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["effective_weight", "op", "check_norm_input"])
def test_a_change_by_a_method_of_the_users_is_seen(method: str, change: str, plain_launches: None) -> None:
    def train(before: Callable[[Any], Any]) -> dict[str, Tensor]:
        model, steps = net("ReLU"), 0

        def beside(name: str) -> None:
            if name == method and steps == 3:
                CHANGES[change](model)

        model[0].__class__, model[0].beside = OnTheWay, [beside]
        for steps in range(4):
            step(before(model), steps)
        return step(before(model), 4)

    assert_seen(train)


class OwnState(nniqat.ConvBnReLU2d):
    """Pickled with all that it holds."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))


class OwnCopy(nniqat.ConvBnReLU2d):
    """Copied with all that it holds."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        vars(new).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return new


@pytest.mark.parametrize("kind", [OwnState, OwnCopy])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_who_copies_by_himself_copies_what_is_remembered_too(kind: Any, copied: Any, plain_launches: None) -> None:
    model = net("ReLU")
    model[0].__class__ = kind
    for i in (0, 1):
        step(model, i)
    assert model[0] in remembered(model)
    other = copied(model)
    assert model[0] in remembered(model) and other[0] not in remembered(other)
    assert_same(step(other, 2), step(model, 2))


@pytest.mark.parametrize("act", ["none", "ReLU", "SiLU"])
def test_nothing_of_one_call_is_kept(act: str, plain_launches: None) -> None:
    """Parameters of a functional call: views of a vector, which would be kept whole."""
    model = net(act)
    step(model, 0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    flat = nn.utils.parameters_to_vector(parameters).detach() * 1.5
    places = flat.split([p.numel() for p in parameters])
    made = {name: place.view_as(p) for name, place, p in zip(names, places, parameters, strict=True)}
    gone = [weakref.ref(t) for t in made.values()]
    with torch.no_grad():
        torch.func.functional_call(model, made, (batch(1),))
    made.clear()
    del flat, places
    assert not [ref for ref in gone if ref() is not None]


@pytest.mark.filterwarnings("ignore:.*TracerWarning|Converting a tensor")
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_what_torch_jit_traces_is_seen(act: str, trains: bool, plain_launches: None) -> None:
    """TensorBoard's ``add_graph`` does."""
    model = net(act)
    for i in (0, 1):
        step(model, i)
    model.train(trains)
    wanted = copy.deepcopy(model)(batch(2))
    traced = torch.jit.trace(model, (batch(3),), check_trace=False)
    if not trains:
        torch.testing.assert_close(traced(batch(2)), wanted, rtol=1e-5, atol=1e-5)
    assert "eagerq::" in str(traced.inlined_graph)


class Norm(nn.BatchNorm2d):
    """A user's own, which no kernel serves."""


def test_what_was_replaced_is_not_kept(plain_launches: None) -> None:
    model = net("ReLU")
    step(model, 0)
    assert model[0] in remembered(model)
    gone = weakref.ref(norm_of(model))
    model[0].bn = Norm(4)
    step(model, 1)
    assert gone() is None


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("act", ACTS)
def test_gradients_are_the_same_when_saved_tensors_lie_otherwise(act: str, norm: bool, plain_launches: None) -> None:
    """As they come back from pinned memory."""

    def laid_out_anew(t: Tensor) -> Tensor:
        return t.detach().clone(memory_format=torch.contiguous_format)

    model, other = net(act, norm), net(act, norm)
    for i in (0, 1, 2):
        wanted = step(model, i)
        with torch.autograd.graph.saved_tensors_hooks(laid_out_anew, lambda t: t):
            found = step(other, i)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert F.cosine_similarity(found["gradient of input"].flatten(), wanted["gradient of input"].flatten(), 0) > 0.999
