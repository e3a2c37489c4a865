"""Steps that a module remembers: each change that decides is seen, and what was remembered is what is asked anew."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eagerq
import eagerq.nn.intrinsic.qat as nniqat
from eagerq.nn.qat.base import QATBase
from eagerq.quant import FakeQuantize, QuantSpec, settled
from eagerq.quant.observer import Observer
from eagerq.quant.ranks import Ranks


class Kind(Tensor):
    """A user's own."""


ACTS: dict[str, Callable[[], list[nn.Module]]] = {
    "none": list,
    "ReLU": lambda: [nn.ReLU()],
    "Hardtanh": lambda: [nn.Hardtanh(-0.5, 0.75)],
    "GELU": lambda: [nn.GELU()],
    "SiLU": lambda: [nn.SiLU()],
    "Hardswish": lambda: [nn.Hardswish()],
    "Sigmoid": lambda: [nn.Sigmoid()],
    "Hardsigmoid": lambda: [nn.Hardsigmoid()],
}


def net(act: str, norm: bool = True) -> Any:
    """A chain that ends as asked, and a quantizer that stands alone at its input."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), *ACTS[act]()]
    model = nn.Sequential(*parts, nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 6, 6)
    return eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x), example_inputs=x).train()


def batch(seed: int, size: int = 6) -> Tensor:
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    return x.contiguous(memory_format=torch.channels_last)


def step(model: Any, seed: int, size: int = 6) -> dict[str, Tensor]:
    """Output, gradients and state."""
    model.zero_grad()
    x = batch(seed, size).requires_grad_()
    out = model(x)
    out.square().mean().backward()
    grads = {f"gradient of {n}": p.grad for n, p in (("input", x), *model.named_parameters()) if p.grad is not None}
    return {"output": out.detach(), **grads, **{k: v.clone() for k, v in model.state_dict().items()}}


def forget(model: nn.Module) -> nn.Module:
    for module in model.modules():
        vars(module).pop("_settled", None)
    return model


def remembered(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if vars(module).get("_settled") is not None]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0.0, atol=0.0, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}")


def norm_of(model: Any) -> Any:
    return model[0].bn


def exchanged(t: Tensor) -> Tensor:
    """The same values in memory that has gaps."""
    return torch.stack([t.detach(), t.detach() + 1], 1)[:, 0]


def repeated(t: Tensor) -> Tensor:
    """Its first value for each, in the same memory."""
    return t.detach()[:1].expand(t.shape)


def shorter(t: Tensor) -> Tensor:
    return t.detach()[:-1]


def folded(t: Tensor) -> Tensor:
    return t.detach().view(2, -1)


def _hook(of: nn.Module) -> None:
    of.register_forward_hook(lambda m, args, out: out * 0.5)


def _half(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * 0.5,)


def _half_gradient(_: nn.Module, grads: tuple[Tensor, ...], __: Any) -> tuple[Tensor, ...]:
    return (grads[0] * 0.5,)


def _other_hooks(of: nn.Module) -> None:
    """As who clears a module's hooks, and then adds one."""
    of._forward_hooks = OrderedDict()
    _hook(of)


def _other_state(of: nn.Module) -> None:
    """Of a pickle, in the module that is."""
    state = copy.deepcopy(of).__getstate__()
    with torch.no_grad():
        for t in (*state["_parameters"].values(), *(b for b in state["_buffers"].values() if b is not None and b.numel() < 60)):
            if t is not None and t.is_floating_point():
                t.mul_(2)
    of.__setstate__(state)


def _own_forward(of: Any) -> None:
    original = type(of).forward
    of.forward = lambda x: 3 * original(of, x)


class _Doubles(FakeQuantize):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _other_quantizer(model: Any) -> None:
    model[0].activation_post_process = _Doubles(QuantSpec())


def _other_class(model: Any) -> None:
    model[0].activation_post_process.__class__ = _Doubles


def _replaced_buffer(of: Any, name: str) -> None:
    setattr(of, name, getattr(of, name) * 2 + 1)


def _loaded(model: Any) -> None:
    model.load_state_dict(step(copy.deepcopy(model), 7), strict=False)


def _without_range(model: Any) -> None:
    """As a checkpoint of a fresh model says."""
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.observed = False
            for t in (*module.activation_post_process.buffers(),):
                t.zero_()


#: What may change in a model, of chains with a norm.
OF_NORMS: dict[str, Callable[[Any], Any]] = {
    "a hook on the norm": lambda m: _hook(norm_of(m)),
    "a norm's own forward": lambda m: _own_forward(norm_of(m)),
    "another momentum": lambda m: setattr(norm_of(m), "momentum", 0.5),
    "no momentum": lambda m: setattr(norm_of(m), "momentum", None),
    "another eps": lambda m: setattr(norm_of(m), "eps", 0.5),
    "frozen statistics": lambda m: m.apply(eagerq.freeze_bn_stats),
    "a norm in eval": lambda m: norm_of(m).eval(),
    "another norm": lambda m: setattr(m[0], "bn", nn.BatchNorm2d(4, eps=0.1)),
    "another gamma": lambda m: setattr(norm_of(m), "weight", nn.Parameter(torch.tensor([0.5, -2.0, 0.0, 3.0]))),
    "no gamma and beta": lambda m: (setattr(norm_of(m), "weight", None), setattr(norm_of(m), "bias", None)),
    "another running mean": lambda m: _replaced_buffer(norm_of(m), "running_mean"),
    "untracked statistics": lambda m: setattr(norm_of(m), "track_running_stats", False),
    "a hook before the norm": lambda m: norm_of(m).register_forward_pre_hook(_half),
    "a hook on the norm's gradient": lambda m: norm_of(m).register_full_backward_hook(_half_gradient),
    "hooks in another dict": lambda m: _other_hooks(norm_of(m)),
    "another state": lambda m: _other_state(norm_of(m)),
    "gamma with gaps in memory": lambda m: setattr(norm_of(m).weight, "data", exchanged(norm_of(m).weight)),
    "statistics with gaps in memory": lambda m: setattr(norm_of(m).running_var, "data", exchanged(norm_of(m).running_var)),
}
#: Of any.
OF_ALL: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,
    "observers off": lambda m: m.apply(eagerq.disable_observer),
    "fake quantization off": lambda m: m.apply(eagerq.disable_fake_quant),
    "the output's observer off": lambda m: eagerq.disable_observer(m[0].activation_post_process),
    "the output not quantized": lambda m: eagerq.disable_fake_quant(m[0].activation_post_process),
    "the output's quantizer in eval": lambda m: m[0].activation_post_process.eval(),
    "a hook on the output's quantizer": lambda m: _hook(m[0].activation_post_process),
    "a hook on the module": lambda m: _hook(m[0]),
    "a hook before the output's quantizer": lambda m: m[0].activation_post_process.register_forward_pre_hook(_half),
    "a hook on the quantizer's gradient": lambda m: m[0].activation_post_process.register_full_backward_hook(_half_gradient),
    "hooks on the quantizer in another dict": lambda m: _other_hooks(m[0].activation_post_process),
    "the quantizer's state": lambda m: _other_state(m[0].activation_post_process),
    "the state of the input's quantizer": lambda m: _other_state(m[0].input_fake_quant),
    "the module's state": lambda m: _other_state(m[0]),
    "another spec": lambda m: setattr(m[0].activation_post_process, "spec", QuantSpec(averaging_constant=0.5)),
    "another quantizer": _other_quantizer,
    "a quantizer of another class": _other_class,
    "another scale": lambda m: _replaced_buffer(m[0].activation_post_process, "scale"),
    "another range": lambda m: _replaced_buffer(m[0].activation_post_process.activation_post_process, "max_val"),
    "a weight that stays float": lambda m: setattr(m[0], "weight_fake_quant", None),
    "another weight": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach() * 2)),
    "a checkpoint": _loaded,
    "no range": _without_range,
    "float64": lambda m: m[0].activation_post_process.double(),
}
ON_CLASS: dict[str, tuple[str, Any]] = {
    "compute": ("compute", lambda self, x: 0 * self.op(x, self.weight, self.bias)),
    "train_compute": ("train_compute", lambda self, x: 0 * self.op(x, self.weight, self.bias)),
}


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("what", {**OF_NORMS, **OF_ALL})
def test_every_change_is_seen(what: str, act: str, norm: bool, plain_launches: None) -> None:
    """To the last bit what a model does that remembers nothing, in the step after the change and the next."""
    if what in OF_NORMS and not norm:
        return
    model, other = net(act, norm), net(act, norm)
    for seed in range(3):
        assert_same(step(model, seed), step(forget(other), seed))
    assert remembered(model)
    for each in (model, other):
        torch.manual_seed(1)
        {**OF_NORMS, **OF_ALL}[what](each)
    for seed in range(3, 6):
        assert_same(step(model, seed), step(forget(other), seed))
    observed = [[q.observed for q in each.modules() if isinstance(q, FakeQuantize)] for each in (model, other)]
    assert observed[0] == observed[1]


@pytest.mark.parametrize(
    ("act", "name", "value"),
    [
        ("Hardtanh", "min_val", 0.125), ("Hardtanh", "max_val", 0.125), ("GELU", "approximate", "tanh"),
        ("SiLU", "gate", F.hardsigmoid), ("Sigmoid", "squash", F.hardsigmoid),
    ],
)  # fmt: skip
def test_another_activation_is_seen(act: str, name: str, value: Any, plain_launches: None) -> None:
    for norm in (True, False):
        model, other = net(act, norm), net(act, norm)
        for seed in range(4):
            if seed == 2:
                for each in (model, other):
                    setattr(each[0].act, name, value)
            assert_same(step(model, seed), step(forget(other), seed))


@pytest.mark.parametrize("part", ["input_fake_quant", "gate_fake_quant"])
@pytest.mark.parametrize("change", [eagerq.disable_observer, eagerq.disable_fake_quant, _hook, nn.Module.eval])
def test_a_change_inside_a_gate_is_seen(part: str, change: Any, plain_launches: None) -> None:
    for norm in (True, False):
        model, other = net("SiLU", norm), net("SiLU", norm)
        for seed in range(4):
            if seed == 2:
                for each in (model, other):
                    change(getattr(each[0].act, part))
            assert_same(step(model, seed), step(forget(other), seed))


def _of_input(change: Any) -> Any:
    return lambda act: change(act.input_fake_quant)


@pytest.mark.parametrize("act", ["Sigmoid", "Hardsigmoid"])
@pytest.mark.parametrize(
    "change",
    [*map(_of_input, (eagerq.disable_observer, eagerq.disable_fake_quant, _hook, nn.Module.eval)), _hook,
     lambda act: _hook(act.act), lambda act: setattr(act, "act", nn.Tanh()), lambda act: setattr(act, "squash", None)],
)  # fmt: skip
def test_a_change_inside_a_sigmoid_is_seen(change: Any, act: str, plain_launches: None) -> None:
    for norm in (True, False):
        model, other = net(act, norm), net(act, norm)
        for seed in range(4):
            if seed == 2:
                assert model[0] in remembered(model) and model[0].settled() is not None
                for each in (model, other):
                    change(each[0].act)
                assert model[0].settled() is None
            assert_same(step(model, seed), step(forget(other), seed))


@pytest.mark.parametrize("method", ["compute", "train_compute"])
def test_a_method_put_on_the_class_is_seen(method: str, plain_launches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net("none")
    step(model, 0)
    assert model[0].settled() is not None
    assert model(batch(1)).any()
    monkeypatch.setattr(type(model[0]), method, lambda self, x: torch.zeros(3, 4, 4, 4))
    assert model[0].settled() is None
    assert not model[0](batch(1)).any()


def test_a_method_put_on_the_module_is_seen(plain_launches: None) -> None:
    model = net("ReLU")
    step(model, 0)
    model[0].preactivation = lambda x: torch.zeros(3, 4, 4, 4)
    assert not model[0](batch(1)).any()


HOOKS = ("forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_every_kind_are_seen(kind: str, plain_launches: None) -> None:
    model = net("SiLU")
    step(model, 0)
    parts = (norm_of(model), model[0].act, model[0].act.act, model[0].act.gate_fake_quant, model[0].activation_post_process)
    for part in parts:
        assert model[0].settled() is not None
        handle = getattr(part, f"register_{kind}")(lambda *_: None)
        assert model[0].settled() is None
        handle.remove()
        step(model, 1)
    with getattr(nn.modules.module, f"register_module_{kind}")(lambda *_: None):
        assert model[0].settled() is None


def test_hooks_on_all_modules_are_seen(plain_launches: None) -> None:
    model, seen = net("SiLU"), set()
    step(model, 0)
    with nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m)):
        step(model, 1)
    assert {norm_of(model), model[0].act, model[0].activation_post_process} <= seen


@pytest.mark.parametrize("what", ["scale", "zero_point", "activation_post_process.min_val"])
@pytest.mark.parametrize(
    "of", ["0.activation_post_process", "0.act.input_fake_quant", "0.act.gate_fake_quant", "0.input_fake_quant"]
)
def test_buffers_exchanged_past_a_module_are_seen(of: str, what: str, plain_launches: None) -> None:
    """As ``functional_call`` does, which no module is told of."""
    model, other = net("SiLU"), net("SiLU")
    for seed in range(2):
        step(model, seed)
        step(forget(other), seed)
    name = f"{of}.{what}"
    given = {name: dict(model.named_buffers())[name] + 2}
    mine, wanted = ({k: v.clone() for k, v in given.items()} for _ in range(2))
    found = torch.func.functional_call(model, mine, (batch(2),))
    assert_same({"output": found}, {"output": torch.func.functional_call(forget(other), wanted, (batch(2),))})
    assert_same(mine, wanted)
    assert_same(step(model, 3), step(forget(other), 3))


def test_a_switch_in_compiled_code_is_seen(plain_launches: None) -> None:
    """Compiled code sets attributes past a module's own ``__setattr__``."""
    model, other = net("SiLU"), net("SiLU")
    for each in (model, other):
        step(each, 0)

        @torch.compile(backend="eager")
        def freeze(x: Tensor, each: Any = each) -> Tensor:
            each.apply(eagerq.disable_observer)
            return x + 1

        freeze(torch.zeros(1))
        assert not model[0].activation_post_process.observer_enabled
    assert_same(step(model, 1), step(forget(other), 1))


class _Shifts(nniqat.ConvBnReLU2d):
    """A user's own, that says what its norm is given."""

    def before_norm(self, input: Tensor, *args: Any, **kwargs: Any) -> tuple[nn.Module, Tensor] | None:
        before = super().before_norm(input, *args, **kwargs)
        return before and (before[0], before[1] + 5)


def test_what_a_class_gives_its_norm_is_asked_in_each_batch(plain_launches: None) -> None:
    model, other = net("ReLU"), net("ReLU")
    for seed in range(4):
        if seed == 2:
            for each in (model, other):
                assert each is other or each[0].settled() is not None
                each[0].__class__ = _Shifts
            assert model[0].settled() is None
        assert_same(step(model, seed), step(forget(other), seed))


def test_what_further_arguments_lead_to_is_not_remembered(plain_launches: None) -> None:
    """It would not be used: steps are bound to the input alone."""
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
    x = batch(0)
    qat: Any = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x), example_inputs=x).train()
    shape = qat[0](x).shape
    assert qat[0].settled() is not None
    qat[0].unsettle()
    assert qat[0](x, [s + 1 for s in shape[2:]]).shape[2] == shape[2] + 1
    assert qat[0].settled() is None


def test_ranks_are_asked_in_each_batch(plain_launches: None) -> None:
    model = net("SiLU")
    step(model, 0)
    assert remembered(model)
    for module in model.modules():
        if isinstance(module, Observer):
            module.ranks = Ranks()
    assert not [m for m in remembered(model) if m.settled() is not None]
    step(model, 1)
    assert not remembered(model)


def test_other_sizes_are_served(plain_launches: None) -> None:
    model, other = net("SiLU"), net("SiLU")
    for seed, size in enumerate((6, 9, 6, 5, 3)):
        assert_same(step(model, seed, size), step(forget(other), seed, size))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="expected 4D input"):
        model(torch.randn(3, 6, 6))
    del norm_of(model)._parameters["bias"]
    with pytest.raises(AttributeError, match="bias"):
        model(batch(1))


def test_channels_that_lie_apart_take_the_way_of_modules(plain_launches: None) -> None:
    model, other = net("ReLU"), net("ReLU")
    for seed in range(3):
        step(model, seed)
        step(forget(other), seed)
    x = batch(4).contiguous()
    found = model[0].settled()
    assert found is not None and found.serves(model[0].op(batch(4), model[0].weight, None), True)
    assert not found.serves(model[0].op(x, model[0].weight, None), True)
    torch.testing.assert_close(model(x), forget(other)(x), rtol=0.0, atol=0.0)


def test_what_is_remembered_is_not_asked_again(plain_launches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net("SiLU")
    step(model, 0)
    asked: list[Any] = []
    monkeypatch.setattr(QATBase, "asks_kernels", lambda self, *_: asked.append(self))
    monkeypatch.setattr(FakeQuantize, "is_one_pass", lambda self, x: asked.append(self))
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize) and not m.memoryless]
    before = [q.activation_post_process.max_val.clone() for q in quantizers]
    step(model, 1)
    assert asked == [model[-1]]  # which has no norm and no gate
    assert all(q.activation_post_process.max_val != old for q, old in zip(quantizers, before, strict=True))


def _copied(model: Any) -> Any:
    return copy.deepcopy(model)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [_copied, _pickled, _saved])
def test_a_copy_remembers_nothing(copied: Callable[[Any], Any], plain_launches: None) -> None:
    model = net("SiLU")
    for seed in range(2):
        step(model, seed)
    other = copied(model)
    assert remembered(model) and not remembered(other)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = step(other, 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert_same(step(model, 2), found)


def test_a_shallow_copy_uses_nothing_of_its_original(plain_launches: None) -> None:
    """As the replicas of DataParallel, which share their original's attributes."""
    model = net("SiLU")
    step(model, 0)
    replica: Any = model[0]._replicate_for_data_parallel()
    bare: Any = type(model[0]).__new__(type(model[0]))
    vars(bare).update(vars(model[0]))
    for other in (replica, bare):
        assert vars(other)["_settled"] is vars(model[0])["_settled"]
        assert model[0].settled() is not None and other.settled() is None


def test_a_tensor_of_another_dtype_or_kind_is_not_served(plain_launches: None) -> None:
    model = net("ReLU", norm=False)
    quantizer = model[0].input_fake_quant
    assert isinstance(quantizer, FakeQuantize)
    step(model, 0)
    found = quantizer.settled()
    assert isinstance(found, settled.Settled)
    x = batch(1)
    assert found.serves(x) and not found.serves(x.bfloat16()) and not found.serves(x.as_subclass(Kind))
    assert not found.serves(x, with_norm=True)


@pytest.mark.parametrize("exchange", [exchanged, repeated, shorter, folded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_kernels_are_not_given_vectors_with_gaps(
    name: str, exchange: Callable[[Tensor], Tensor], plain_launches: None
) -> None:
    """Kernels read by address alone, and another view may begin at the one that is known."""
    model = net("ReLU")
    step(model, 0)
    found, x = model[0].settled(), model[0].op(batch(1), model[0].weight, None)
    assert found is not None and found.serves(x, with_norm=True)
    vector = getattr(norm_of(model), name)
    vector.data = exchange(vector)
    assert model[0].settled() is found and not found.serves(x, with_norm=True)


def _of_a_class(of: Any, name: str) -> None:
    getattr(of, name).__class__ = Kind


def _swapped(of: Any, name: str) -> None:
    old = getattr(of, name)
    torch.utils.swap_tensors(old, old.detach().as_subclass(Kind).requires_grad_(old.requires_grad))


@pytest.mark.parametrize("change", [_of_a_class, _swapped])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_kernels_are_not_given_vectors_of_other_classes(
    name: str, change: Callable[[Any, str], None], plain_launches: None
) -> None:
    """Which compute otherwise, and lie where plain ones did."""
    model = net("ReLU")
    step(model, 0)
    found, x = model[0].settled(), model[0].op(batch(1), model[0].weight, None).detach()
    assert found is not None and found.serves(x, with_norm=True)
    model.zero_grad()
    change(norm_of(model), name)
    assert model[0].settled() is found and not found.serves(x, with_norm=True)


def test_a_batch_of_nothing_settles_nothing(plain_launches: None) -> None:
    """Else the next would not be noted as observed."""
    quantizer = FakeQuantize(QuantSpec())
    quantizer(torch.empty(0, 3))
    assert quantizer.settled() is None and not quantizer.observed
    quantizer(torch.randn(2, 3))
    assert quantizer.observed and quantizer.settled() is not None


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_a_norms_vectors_are_looked_at_again(name: str, plain_launches: None) -> None:
    model = net("ReLU")
    step(model, 0)
    found, x = model[0].settled(), model[0].op(batch(1), model[0].weight, None)
    vector = getattr(norm_of(model), name)
    before = vector.data  # held, so that its memory is given to no other
    vector.data = torch.ones(5)
    assert not found.serves(x, with_norm=True)
    vector.data = torch.ones(4)
    assert not found.serves(x, with_norm=True)
    vector.data = before
    assert found.serves(x, with_norm=True)
    vector.data = torch.ones(4)
    step(model, 1)
    assert model[0].settled().serves(x, with_norm=True)


@pytest.mark.parametrize(
    ("act", "norm", "with_norm"),
    [("none", True, True), ("ReLU", True, True)]
    + [(act, norm, norm) for act in ("SiLU", "Hardswish") for norm in (True, False)]
    + [(act, norm, False) for act in ("GELU", "Sigmoid", "Hardsigmoid", "input") for norm in (True, False)],
)
def test_what_kernels_are_given_is_what_is_looked_at(act: str, norm: bool, with_norm: bool, launches: dict[str, int]) -> None:
    model = net("none" if act == "input" else act, norm)
    step(model, 0)
    module = model[0].input_fake_quant if act == "input" else model[0]
    found = module.settled()
    assert found.with_norm == with_norm
    others = () if act == "input" else (model[0].input_fake_quant, model[0].weight_fake_quant)
    quantizers = [m for m in module.modules() if isinstance(m, FakeQuantize) and m not in others]
    given = [t for q in quantizers for t in (*q.state, q.scratch)]
    if with_norm:
        given += [*norm_of(model).parameters(), *norm_of(model).buffers()]
    assert {*map(id, found._held)} == {*map(id, given)}


@pytest.mark.parametrize("at", range(4))
def test_kernels_are_not_given_states_of_other_dtypes(at: int, launches: dict[str, int]) -> None:
    """As ``load_state_dict`` brings with ``assign``."""
    module: Any = net("none", norm=False)[0]
    module.weight_fake_quant(module.weight)
    assert launches.pop("weight_forward") == 1
    for quantizer in (module.weight_fake_quant, module.activation_post_process):
        assert quantizer.has_kernels_state(batch(0))
        values = quantizer.state[at]
        values.data = values.data.to(torch.int64 if at == 1 else torch.float64)
        assert not quantizer.has_kernels_state(batch(0))
    assert module.weight_fake_quant(module.weight).isfinite().all()
    assert "weight_forward" not in launches


@pytest.mark.parametrize("exchange", [torch.bfloat16, torch.int32], ids=["elsewhere", "where it lies"])
@pytest.mark.parametrize("act", ["none", "SiLU", "Sigmoid"])
def test_a_scale_is_looked_at_again(act: str, exchange: torch.dtype, plain_launches: None) -> None:
    """Kernels read its bytes as float32."""
    model = net(act)
    step(model, 0)
    cases = (model[0], torch.ones(3, 4, 4, 4), act != "Sigmoid"), (model[0].input_fake_quant, batch(1), False)
    for module, x, with_norm in cases:
        found = module.settled()
        quantizer = module if isinstance(module, FakeQuantize) else module.activation_post_process
        x = x.contiguous(memory_format=torch.channels_last)
        assert found is not None and found.serves(x, with_norm)
        scale = quantizer.scale.data
        quantizer.scale.data = scale.view(exchange) if exchange.itemsize == scale.itemsize else scale.to(exchange)
        assert module.settled() is found and not found.serves(x, with_norm)


def test_a_model_is_freed_without_a_collector(plain_launches: None) -> None:
    model = net("SiLU")
    step(model, 0)
    assert remembered(model)
    gone = [weakref.ref(m) for m in model.modules()]
    gc.disable()
    try:
        del model
        assert not [ref for ref in gone if ref() is not None]
    finally:
        gc.enable()


def test_no_graph_is_kept_alive(plain_launches: None) -> None:
    """A functional call with parameters that were computed."""
    model = net("ReLU")
    step(model, 0)
    names = ("0.bn.weight", "0.bn.bias")
    made = {name: dict(model.named_parameters())[name] * 2 for name in names}
    gone = [weakref.ref(t) for t in made.values()]
    torch.func.functional_call(model, made, (batch(1),)).sum().backward()
    made.clear()
    assert not [ref for ref in gone if ref() is not None]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_that_runs_it_again_learns_and_forgets_nothing(reentrant: bool, plain_launches: None) -> None:
    model, other = net("SiLU"), net("SiLU")
    for each in (model, other):
        step(each, 0)
        each.apply(eagerq.freeze_bn_stats)  # PyTorch's own learn twice
        step(each, 1)
    before = [vars(m)["_settled"] for m in remembered(model)]
    checkpoint(model, batch(1).requires_grad_(), use_reentrant=reentrant).sum().backward()
    other(batch(1).requires_grad_()).sum().backward()
    assert before and [vars(m)["_settled"] for m in remembered(model)] == before
    assert_same(model.state_dict(), other.state_dict())
