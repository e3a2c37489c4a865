"""Example inputs: every form a user has them in, several runs, and what the plan makes of chains that ran in some."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import eagerq
from eagerq.errors import InputsError
from eagerq.inputs import LIMIT, Inputs, as_runs
from eagerq.record import record_of
from tests.nets import BY_NAME, C, Made, bn, conv, found, image, snapshot, straight

STRAIGHT = BY_NAME["straight"].truth


def images(n: int = 6) -> Tensor:
    return torch.randn(n, C, 6, 6)


def labelled(n: int = 6) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images(n), torch.arange(n)), batch_size=2)


class Endless(IterableDataset[Tensor]):
    """Gives images for ever, and counts them."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.given += 1
            yield image()[0]


class Named(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Gives dicts, with and without labels."""

    def __init__(self, **more: Tensor) -> None:
        self.more = more

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": image()[0], **self.more}


class Net(nn.Module):
    """conv, norm and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv(), bn(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


def net(forward: Callable[..., Any] | None = None) -> nn.Module:
    """conv, norm and ReLU; with a forward of its own if given."""
    model = Net()
    if forward is not None:
        model.__class__ = type("Net", (Net,), {"forward": forward})
    return model


# --- forms


@pytest.mark.parametrize(
    ("inputs", "runs"),
    [
        (lambda: image(), 1),
        (lambda: (image(),), 1),
        (lambda: {"x": image()}, 1),
        (lambda: [image(), image()], 2),
        (lambda: [(image(),), {"x": image()}, image(), [image()]], 4),
        (lambda: [image()] * 20, 20),
        (lambda: (image() for _ in range(3)), 3),
        (lambda: (x for x, _ in labelled()), 3),
        (lambda: (batch[:1] for batch in labelled()), 3),
        (lambda: DataLoader(TensorDataset(images()), batch_size=2), 3),
        (lambda: DataLoader(images(), batch_size=4), 2),
        (lambda: DataLoader(Named(), batch_size=2), 2),
        (lambda: {0: image(), 1: image()}.values(), 2),
        (lambda: itertools.repeat(image()), LIMIT),
        (lambda: DataLoader(Endless(), batch_size=2), LIMIT),
        (lambda: iter([image()] * 100), LIMIT),
    ],
)
def test_forms(inputs: Callable[[], Any], runs: int) -> None:
    taken = as_runs(inputs())
    assert len(taken) == runs
    assert all(len(run.args) + len(run.kwargs) == 1 for run in taken)
    plan = eagerq.plan_fusion(net(), example_inputs=inputs())
    assert found(plan) == STRAIGHT
    noted = runs == LIMIT and not isinstance(inputs(), list)
    assert any("the first 8 items are watched; pass a list to have all" in note for note in plan.notes) is noted
    fused = eagerq.fuse_modules(net(), example_inputs=inputs())
    assert len(eagerq.report(eagerq.convert_qat(fused, example_inputs=inputs())).notes) == noted
    assert eagerq.compare_modules(fused, fused, inputs()).whole.equal


def test_a_list_of_two_tensors_is_two_runs_and_a_batch_two_arguments() -> None:
    x, y = image(), image()
    assert as_runs([x, y]) == (Inputs((x,), {}), Inputs((y,), {}))
    assert as_runs([[x, y]]) == (Inputs((x, y), {}),)
    assert as_runs(iter([[x, y]])) == (Inputs((x, y), {}),)


def test_exactly_as_many_as_are_taken_needs_no_note_where_the_length_is_known() -> None:
    loader = DataLoader(images(LIMIT), batch_size=1)
    assert eagerq.plan_fusion(net(), example_inputs=loader).notes == ()
    assert eagerq.plan_fusion(net(), example_inputs=DataLoader(images(LIMIT + 1), batch_size=1)).notes


def test_no_more_is_taken_than_is_watched() -> None:
    data = Endless()
    eagerq.plan_fusion(net(), example_inputs=DataLoader(data, batch_size=2))
    assert data.given == 2 * LIMIT
    data = Endless()
    fused = eagerq.fuse_modules(net(), example_inputs=image())
    eagerq.compare_modules(fused, fused, DataLoader(data, batch_size=2))
    assert data.given == 2


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("text", "found str"),
        (3, "found int"),
        ([], r"found list \(empty\)"),
        ((x for x in ()), r"found generator \(empty\)"),
        ([image(), 3], "found int as item 1 of a list"),
        (iter(["text"]), "found str as item 0"),
        (TensorDataset(images()), "found TensorDataset"),
        (image().numpy(), r"found ndarray; of an array make a tensor, torch\.from_numpy\(array\)"),
        ([image().numpy()], r"found ndarray as item 0 of a list; of an array make a tensor"),
    ],
)
def test_other_forms_are_refused(inputs: Any, words: str) -> None:
    with pytest.raises(InputsError, match=rf"example_inputs must be a tensor.*{words}"):
        eagerq.plan_fusion(net(), example_inputs=inputs)


# --- labels


def _two(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return self.relu(self.bn(self.conv(x))) * (1 if mask is None else mask)


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (net, labelled, r"2 positional arguments, and Net.forward takes 1 \(x\).*\(x for x, _ in loader\)"),
        (net, lambda: [(image(), 1, 2)], r"3 positional arguments.*\(batch\[:1\] for batch in loader\)"),
        (
            lambda: net(_two),
            lambda: [(image(), 1, 2)],
            r"takes 2 \(x, mask\).*\(batch\[:2\] for batch in loader\)",
        ),
        (
            net,
            lambda: DataLoader(Named(labels=torch.tensor(1)), batch_size=2),
            r"Net.forward takes no argument named 'labels', but x.*for key in \['x'\]",
        ),
        (
            lambda: net(_two),
            lambda: DataLoader(TensorDataset(images(), torch.arange(6)), batch_size=3),
            r"RuntimeError.*If the last of these 2 positional arguments is a label, leave it out, as in \(x for x, _ in loader\)",
        ),
    ],
    ids=["two", "three", "takes two", "named", "taken for a mask"],
)
def test_labels_are_named(model: Callable[[], nn.Module], inputs: Callable[[], Any], words: str) -> None:
    one = model()
    before = snapshot(one)
    with pytest.raises(InputsError, match=words):
        eagerq.plan_fusion(one, example_inputs=inputs())
    assert snapshot(one) == before


@pytest.mark.parametrize("inputs", [lambda: [image(), image()], image, lambda: {"x": image()}], ids=["list", "tensor", "dict"])
def test_an_argument_that_is_missing_is_named(inputs: Callable[[], Any]) -> None:
    def add(self: Any, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.relu(self.bn(self.conv(x + y))) * scale

    with pytest.raises(
        InputsError, match=r"Net.forward also wants y: .* a tuple, \(x, y, scale\).*a list is a forward of its own"
    ):
        eagerq.plan_fusion(net(add), example_inputs=inputs())
    assert found(eagerq.plan_fusion(net(add), example_inputs=(image(), image()))) == STRAIGHT


def test_what_a_hook_makes_fit_is_not_refused() -> None:
    model = net()
    model.register_forward_pre_hook(lambda module, args: args[:1])
    assert found(eagerq.plan_fusion(model, example_inputs=labelled())) == STRAIGHT


# --- several runs


def test_runs_of_equal_shapes_are_watched_once() -> None:
    calls: list[torch.Size] = []

    def run(m: Any, x: Tensor, k: int = 1) -> Tensor:
        calls.append(x.shape)
        return m.relu(m.bn(m.conv(x)))

    model = Made(run, conv=conv(), bn=bn(), relu=nn.ReLU())
    eagerq.plan_fusion(model, example_inputs=image())
    once = len(calls)
    eagerq.plan_fusion(model, example_inputs=[image()] * 6)
    assert len(calls) == 2 * once
    calls.clear()
    fused = eagerq.fuse_modules(model, example_inputs=[(image(), 1), (image(), 2), (image(), 1), (images(3), 1), (images(3), 2)])
    assert len(calls) == 4 * once
    record = record_of(fused)
    assert record is not None
    assert [run.args[0].shape[0] for run in record.runs or ()] == [2, 2, 3, 3]


@pytest.mark.parametrize("on_meta", [True, False])
def test_watching_several_runs_is_linear(on_meta: bool) -> None:
    calls: list[int] = []

    def run(m: Any, x: Tensor, k: int) -> Tensor:
        calls.append(k)
        if not on_meta and not bool(x.isfinite().all()):
            raise ValueError
        return m.relu(m.bn(m.conv(x)))

    model = Made(run, conv=conv(), bn=bn(), relu=nn.ReLU())
    counts = []
    for n in (2, 4, 8):
        calls.clear()
        assert found(eagerq.plan_fusion(model, example_inputs=[(image(), k) for k in range(n)])) == STRAIGHT
        counts.append(len(calls))
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


def _ways(m: Any, x: Tensor, way: str) -> Any:
    match way:
        case "chain":
            return m.relu(m.bn(m.conv(x)))
        case "none":
            return x * 2
        case "other":
            return m.conv2(x)
        case "conv only":
            return m.conv(x)
        case "norm only":
            return m.relu(m.bn(x))
        case "read":
            y = m.conv(x)
            return m.relu(m.bn(y)) + y.mean()
        case "no act":
            return m.bn(m.conv(x)) * 2
        case "twice":
            return m.relu(m.bn(m.conv(m.relu(m.bn(m.conv(x))))))
        case "act twice":
            return m.relu(m.relu(m.bn(m.conv(x))) - 1)


WHOLE = "conv bn relu -> ConvBnReLU2d"
SHORT = "conv bn -> ConvBn2d"


@pytest.mark.parametrize(
    ("ways", "chain", "words"),
    [
        (["chain", "none"], WHOLE, None),
        (["none", "other", "chain"], WHOLE, None),
        (["none", "other"], None, "conv did not run in any of the 2 watched runs"),
        (["other"], None, "conv did not run in the watched forward"),
        (["chain", "conv only"], None, "output of the model"),
        (["chain", "norm only"], None, "on input 1 conv runs 0 times and bn 1 times"),
        (["other", "chain", "chain", "norm only"], None, "on input 3 conv runs 0 times and bn 1 times"),
        (["chain", "read"], None, "mean"),
        (["chain", "no act"], SHORT, "the output of bn is read by function mul"),
        (["chain", "twice"], None, "conv runs 2 times"),
        (["chain", "act twice"], "conv bn relu* -> ConvBnReLU2d", None),
        (["no act", "none"], SHORT, None),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, list) else "",
)
def test_a_chain_must_hold_wherever_it_runs(ways: list[str], chain: str | None, words: str | None) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return Made(_ways, conv=conv(), bn=bn(), relu=nn.ReLU(), conv2=conv())

    inputs = [(image(), way) for way in ways]
    plan = eagerq.plan_fusion(model(), example_inputs=inputs)
    names = {" ".join(n + "*" * (n in m.copied) for n in m.names) + f" -> {m.fused.__name__}" for m in plan.matches}
    assert {n for n in names if n.startswith("conv ")} == ({chain} if chain else set())
    if words is not None:
        assert any(words in skip.reason for skip in plan.skips), plan
    fused, expected = plan.apply(model()), model()
    for way in ways:
        with eagerq.guard(fused):
            assert torch.equal(fused(image(), way), expected(image(), way))


def test_an_input_that_fails_where_others_run_is_named() -> None:
    with pytest.raises(InputsError, match=r"on input 2 of 3, counted from 0"):
        eagerq.plan_fusion(net(), example_inputs=[image(), images(3), torch.zeros(2, C + 1, 6, 6)])

    def run(m: Any, x: Tensor) -> Tensor:
        if m.training and len(x) == 1:
            raise ValueError("one alone")
        return m.bn(m.conv(x))

    model = Made(run, conv=conv(), bn=bn())
    with pytest.raises(InputsError, match=r"ValueError: one alone \(on input 1 of 2"):
        eagerq.plan_fusion(model, example_inputs=[image(), images(1)])
    assert "not watched in train mode" in eagerq.plan_fusion(model, example_inputs=images(1)).notes[0]


def test_the_model_is_not_touched_by_an_iterable_that_fails() -> None:
    def broken() -> Iterator[Tensor]:
        yield image()
        raise OSError("disk")

    model = straight()
    before = snapshot(model)
    with pytest.raises(OSError, match="disk"):
        eagerq.fuse_modules(model, example_inputs=broken(), inplace=True)
    assert snapshot(model) == before
