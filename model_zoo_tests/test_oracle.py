"""The oracle itself, on nets whose links are plain to see: what it must find, and what it must refuse."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eagerq
from eagerq.nn import intrinsic as nni

from .oracle import fx_links, operator_links, true_chains
from .rules import claims, neighbours, siblings
from .structure import examine


class Net(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any], **more: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        for name, module in more.items():
            setattr(self, name, module)
        self.code = forward

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def _in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y += 1
    return m.act(m.bn(y))


def _kept(m: Any, x: Tensor) -> Tensor:
    m.seen = m.conv(x)
    return m.act(m.bn(m.seen))


def _in_a_deque(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return collections.deque([m.act(m.bn(y)), y])


def _late_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    view = y.flatten(1)
    return m.act(m.bn(y)) + view.view_as(y)


ALL = {("conv", "bn"), ("bn", "act")}
CASES: dict[str, tuple[Callable[[Any, Tensor], Any], set[tuple[str, str]]]] = {
    "straight": (lambda m, x: m.act(m.bn(m.conv(x))), ALL),
    "through an identity": (lambda m, x: m.act(m.nothing(m.bn(m.conv(x)))), ALL),
    "through dropout of nothing": (lambda m, x: m.act(F.dropout(m.bn(m.conv(x)), 0.5, False)), ALL),
    "residual": (lambda m, x: m.act(m.bn(m.conv(x)) + x), {("conv", "bn")}),
    "read twice": (lambda m, x: m.act(m.bn(y := m.conv(x))) + y, {("bn", "act")}),
    "output": (lambda m, x: (m.act(y := m.bn(m.conv(x))), y), {("conv", "bn")}),
    "output in a deque": (_in_a_deque, {("bn", "act")}),
    "changed in place": (_in_place, {("bn", "act")}),
    "kept on self": (_kept, {("bn", "act")}),
    "read through a view": (_late_view, {("bn", "act")}),
    "another order": (lambda m, x: m.conv(m.act(m.bn(x))), {("bn", "act"), ("act", "conv")}),
    "by a function": (lambda m, x: F.relu(F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var)), set()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_operators(case: str, device: str) -> None:
    forward, expected = CASES[case]
    model = Net(forward, nothing=nn.Identity()).to(device).eval()
    assert set(operator_links(model, (torch.empty(2, 3, 4, 4, device=device),)).links.items()) == expected


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"kept on self", "through dropout of nothing", "output in a deque"}))
def test_graphs(case: str) -> None:
    forward, expected = CASES[case]
    seen = fx_links(Net(forward, nothing=nn.Identity()).eval())
    assert seen is not None
    assert set(seen.links.items()) == expected


def test_wrong_fusions_are_seen() -> None:
    """What registration order proposes for resnet18 is refuted, though every pair of types fits."""
    model = timm.create_model("resnet18").eval()
    looks = [operator_links(model, (torch.zeros(2, 3, 64, 64),))]
    chains, _ = true_chains(model, looks)
    links = {(a, b) for chain in chains for a, b in itertools.pairwise(chain)}
    for rule in (neighbours, siblings):
        wrong = claims(model, rule(model), looks) - links
        assert ("layer1.0.bn2", "layer1.0.act2") in wrong
    assert {match.names for match in eagerq.plan_fusion(model).matches} == chains


# --- what no chain holds is accounted for


class Taken(nn.Module):
    """A norm and an activation between two convolutions; the first may be left out."""

    def __init__(self, act: nn.Module, first: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1) if first else nn.Identity()
        self.bn, self.act, self.last = nn.BatchNorm2d(3), act, nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.act(self.bn(self.first(x))))
        return out


def test_a_link_whose_types_begin_no_chain_is_said_to() -> None:
    silu = (nn.SiLU(), {}, ("bn -> act: BatchNorm2d + SiLU begins no chain",))
    for act, fused, chainless in (silu, (nn.ReLU(), {"BNReLU2d": 1}, ())):
        row, verdict = examine(Taken(act, first=False), "taken", torch.zeros(2, 3, 4, 4))
        assert (row.links, row.fused, verdict.unexplained, verdict.chainless) == (1, fused, (), chainless)
        assert verdict.is_right


def test_a_link_that_is_dropped_without_a_word_is_unexplained(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = eagerq.FusionPlan((eagerq.Match(("first", "bn"), nni.ConvBn2d),))
    monkeypatch.setattr(eagerq, "plan_fusion", lambda model, example_inputs=None: plan)
    _, verdict = examine(Taken(nn.SiLU(), first=True), "taken", torch.zeros(2, 3, 4, 4))
    assert verdict.unexplained == ("bn -> act: BatchNorm2d + SiLU is in no chain and named by no skip",)
    assert verdict.chainless == ()
    assert not verdict.is_right
