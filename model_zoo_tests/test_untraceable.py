"""The laws over models that tracers cannot take, and what the tracers make of them."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn

import eagerq
from eagerq.errors import ModelError
from eagerq.inputs import Inputs, as_runs

from .laws import broken_laws, kept_buffers, randomised, run
from .oracle import tensors, true_chains
from .structure import looks_for
from .untraceable import UNTRACEABLE, Classifier, Says, Untraceable, image, stage

rows = pytest.mark.parametrize("row", UNTRACEABLE, ids=lambda row: row.name)


def model_of(row: Untraceable) -> nn.Module:
    """A fresh model in train mode, the same each time."""
    return randomised(row.build).train()


def runs_of(row: Untraceable) -> tuple[Inputs, ...]:
    return as_runs(row.inputs())


@functools.cache
def plan_of(name: str) -> eagerq.FusionPlan:
    """The plan of a row, made once."""
    row = next(row for row in UNTRACEABLE if row.name == name)
    return eagerq.plan_fusion(model_of(row), example_inputs=row.inputs())


# --- what eagerq finds


@rows
def test_the_plan_is_the_table(row: Untraceable) -> None:
    plan = plan_of(row.name)
    assert {(match.names, match.fused.__name__) for match in plan.matches} == row.truth
    reasons = {" ".join(skip.names): skip.reason for skip in plan.skips}
    assert reasons.keys() == row.skips.keys()
    for names, words in row.skips.items():
        assert words in reasons[names]
    assert plan.on_meta is row.on_meta


@rows
def test_the_plan_is_the_oracle(row: Untraceable) -> None:
    model = model_of(row)
    plan = plan_of(row.name)
    chains, refused = true_chains(model, looks_for(model, plan, row.inputs()))
    assert {match.names for match in plan.matches} == chains
    named = [set(skip.names) for skip in plan.skips]
    assert [link for link in refused if not any(set(link) <= names for names in named)] == []


# --- what the fused, QAT and deployed models compute


@rows
def test_no_law_is_broken(row: Untraceable) -> None:
    for given in runs_of(row):
        problems, _ = broken_laws(model_of(row), given)
        assert problems == []


@rows
def test_every_way_through_the_fused_model_gives_the_same(row: Untraceable) -> None:
    for mode in (True, False):
        model, fused = model_of(row).train(mode), plan_of(row.name).apply(model_of(row)).train(mode)
        for given in runs_of(row):
            with kept_buffers(model), kept_buffers(fused):
                expected, found = run(model, given), run(fused, given)
            assert len(expected) == len(found)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def trained(model: nn.Module, runs: tuple[Inputs, ...]) -> nn.Module:
    """The model after two steps on each run; every loss is finite, and something was learnt."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for seed, given in enumerate(runs * 2):
        optimizer.zero_grad()
        loss = sum(o.square().mean() for o in run(model, given, seed=seed) if o.requires_grad)
        assert isinstance(loss, Tensor)
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return model


@rows
def test_it_trains_and_the_deployed_model_is_the_qat_model(row: Untraceable) -> None:
    runs = runs_of(row)
    fused = trained(plan_of(row.name).apply(model_of(row)), runs)
    qat = trained(eagerq.convert_qat(fused, example_inputs=row.inputs()), runs).eval()
    deployed = eagerq.convert(qat)
    with torch.no_grad():
        for given in runs:
            with kept_buffers(qat), kept_buffers(deployed):
                expected, found = run(qat, given), run(deployed, given)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class Closure(Classifier):
    """Its table holds functions that hold the model itself, which no copy of it changes."""

    def __init__(self) -> None:
        super().__init__(block=stage())
        self.table = {"block": lambda x: self.block(x)}

    def body(self, x: Tensor) -> Tensor:
        return self.table["block"](x)


def test_a_closure_over_the_model_is_named_and_the_model_left_alone() -> None:
    model = Closure()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"reads 'block\.0\.weight' of the original: a lambda .* functools\.partial"):
        eagerq.fuse_modules(model, example_inputs=image())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- what the tools say


def symbolic_trace(model: nn.Module, given: Inputs) -> nn.Module:
    return torch.fx.symbolic_trace(model)


def export(model: nn.Module, given: Inputs, strict: bool) -> nn.Module:
    return torch.export.export(model, given.args, given.kwargs, strict=strict).module()


TOOLS: dict[str, Callable[[nn.Module, Inputs], nn.Module]] = {
    "fx": symbolic_trace,
    "export": functools.partial(export, strict=False),
    "strict": functools.partial(export, strict=True),
}


def said(tool: Callable[[nn.Module, Inputs], nn.Module], row: Untraceable) -> Says:
    """What a tool makes of the row's model in train mode, with the error's text or what is wrong."""
    model, runs = model_of(row), runs_of(row)
    torch.manual_seed(0)
    try:
        graph = tool(copy.deepcopy(model), runs[0].copied(None))
    except BaseException as error:  # PyTorch has as many ways to fail as there are models, SystemError among them
        if isinstance(error, KeyboardInterrupt):
            raise
        return Says("refuses", f"{type(error).__name__}: {error}")
    try:
        for given in runs:
            difference = _differs(stepped(model, given), stepped(graph, given))
            if difference:
                return Says("wrong", difference)
    except Exception as error:  # a graph that does not run on what the model runs on
        return Says("wrong", f"{type(error).__name__}: {error}")
    return Says("takes")


def stepped(model: nn.Module, given: Inputs) -> tuple[list[Tensor], dict[str, Tensor | None], dict[str, Tensor]]:
    """Outputs, gradients and buffers of a forward and backward."""
    for parameter in model.parameters():
        parameter.grad = None
    copied = given.copied(None)
    torch.manual_seed(2)
    outputs = [t for t in tensors(model(*copied.args, **copied.kwargs)) if t.is_floating_point()]
    torch.stack([o.square().mean() for o in outputs if o.requires_grad]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return outputs, gradients, {name: b.clone() for name, b in model.named_buffers()}


def _differs(a: Any, b: Any) -> str:
    if len(a[0]) != len(b[0]):
        return "number of outputs"
    if not all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a[0], b[0], strict=True)):
        return "outputs"
    for i, what in ((1, "gradient"), (2, "buffer")):
        for name, x in a[i].items():
            y = b[i].get(name)
            if (x is None) != (y is None):
                return f"{what} of {name}"
            if x is not None and not torch.allclose(x, y, rtol=1e-3, atol=1e-4 * max(1.0, float(x.abs().max()))):
                return f"{what} of {name}"
    return ""


@rows
@pytest.mark.parametrize("tool", TOOLS)
def test_what_the_tools_say(row: Untraceable, tool: str) -> None:
    stated: Says = getattr(row, tool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = said(TOOLS[tool], row)
    assert found.kind == stated.kind, found.words
    if stated.kind == "refuses":
        assert re.search(stated.words, found.words), found.words
