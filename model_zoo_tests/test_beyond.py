"""torchvision and transformers: structure against the oracle for every row, the laws on real tensors for the small ones."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch
import torchvision
from torch import nn

import eagerq
from eagerq.errors import StateError
from eagerq.integrations import expand
from eagerq.integrations import transformers as adapter
from eagerq.nn import FrozenBatchNorm2d

from .beyond import BEYOND, TORCHVISION, Beyond
from .laws import broken_laws, randomised
from .oracle import true_chains
from .structure import looks_for

rows = pytest.mark.parametrize("row", BEYOND, ids=lambda row: row.name)
small = pytest.mark.parametrize("row", [row for row in BEYOND if row.inputs is not None], ids=lambda row: row.name)


def test_every_model_of_torchvision_has_a_row() -> None:
    assert sorted(TORCHVISION) == sorted(torchvision.models.list_models())


@rows
def test_the_plan_is_the_oracle_and_the_table(row: Beyond) -> None:
    model = row.build().train()
    inputs = None if row.guessed or row.inputs is None else row.inputs()
    plan = eagerq.plan_fusion(model, example_inputs=inputs)
    fused = Counter(match.fused.__name__ for match in plan.matches)
    assert ", ".join(f"{n} {name}" for name, n in sorted(fused.items())) == row.fused

    chains, refused = true_chains(model, looks_for(model, plan, inputs))
    assert {match.names for match in plan.matches} == chains
    named = [set(skip.names) for skip in plan.skips]
    assert [link for link in refused if not any(set(link) <= names for names in named)] == []

    if row.inputs is not None:
        return  # the laws convert it
    try:
        qat = eagerq.convert_qat(plan.apply(model), example_inputs=inputs, inplace=True)
    except StateError as error:
        if "found nothing to quantize" not in str(error):
            raise
    else:
        assert all(reason for _, reason in eagerq.report(qat).left_float)


@small
def test_nothing_computes_or_learns_otherwise(row: Beyond) -> None:
    assert row.inputs is not None
    problems, _ = broken_laws(randomised(row.build).train(), row.inputs(), qconfig=row.qconfig)
    assert problems == []


@pytest.mark.parametrize("name", sorted(adapter.FROZEN_NORMS | adapter.CONVS))
def test_what_the_adapter_takes_for_a_known_type_computes_the_same(name: str) -> None:
    path, _, cls = name.rpartition(".")
    kind = getattr(importlib.import_module(path), cls)
    x = torch.randn(2, 4, 5, 5)
    module: nn.Module = kind(4) if name in adapter.FROZEN_NORMS else kind(4, 1, 3)
    for i, tensor in enumerate(module.state_dict().values()):
        tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(i))
    (member,) = expand(module).members
    assert type(member) is (FrozenBatchNorm2d if name in adapter.FROZEN_NORMS else nn.Conv2d)
    assert torch.equal(member(x), module(x))
    assert member.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize("kind", adapter.ACTIVATIONS, ids=lambda kind: kind.__name__)
def test_every_activation_of_transformers_maps_each_element_by_itself(kind: type[nn.Module]) -> None:
    module = kind(-1.0, 1.0) if "Clipped" in kind.__name__ else kind()
    x = torch.linspace(-5, 5, 60)
    expected = torch.stack([module(value) for value in x])
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x.view(3, 4, 5)).flatten(), expected)
