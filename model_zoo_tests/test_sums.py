"""HRNet's exchange between branches, whose sums ``convert_qat`` gives names: it computes and learns what timm's does."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.hrnet import BasicBlock, HighResolutionModule
from torch import Tensor, nn

import eagerq
from eagerq import conversion, integrations
from eagerq.errors import SpecError
from eagerq.integrations.timm import HighResolutionModuleWithSums
from eagerq.nn import Add
from eagerq.quant import FakeQuantize

from .laws import broken_laws, randomise, randomised

WIDTHS = (4, 8, 12, 16)


def exchange(branches: int, multi_scale: bool = True) -> HighResolutionModule:
    widths = WIDTHS[:branches]
    module = HighResolutionModule(branches, BasicBlock, (1,) * branches, list(widths), widths, "SUM", multi_scale)
    randomise(module.train())
    return module


def opened(model: nn.Module) -> int:
    with integrations.sums_as_modules(model, keeps=True) as found:
        return found


def branches_of(n: int, seed: int) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(2, WIDTHS[i], 16 >> i, 16 >> i, generator=made, requires_grad=True) for i in range(n)]


class Net(nn.Module):
    """Branches at several sizes, what exchanges between them, and a head that reads them all."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(3, width, 3, 2**i, 1) for i, width in enumerate(WIDTHS[:branches]))
        self.exchange = exchange(branches)
        self.heads = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in WIDTHS[:branches])

    def forward(self, x: Tensor) -> Tensor:
        found = self.exchange([stem(x) for stem in self.stems])
        return torch.cat([head(y).mean((2, 3)) for head, y in zip(self.heads, found, strict=True)], 1)


cases = pytest.mark.parametrize(("branches", "multi_scale"), [(2, True), (2, False), (3, True), (4, True), (4, False)])


@cases
@pytest.mark.parametrize("training", [True, False])
def test_with_sums_is_the_same_function(branches: int, multi_scale: bool, training: bool) -> None:
    module, other = (exchange(branches, multi_scale).train(training) for _ in range(2))
    other.load_state_dict(module.state_dict(), strict=True)
    assert opened(other) == 1
    assert isinstance(other, HighResolutionModuleWithSums)
    assert all(part.training == training for part in other.modules())
    assert list(other.state_dict()) == list(module.state_dict())
    given, same = branches_of(branches, 1), branches_of(branches, 1)
    wanted, found = module(list(given)), other(list(same))
    assert [torch.equal(a, b) for a, b in zip(wanted, found, strict=True)] == [True] * len(module.fuse_layers)
    for result in (wanted, found):
        sum(y.square().sum() for y in result).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(given, same, strict=True))
    for (name, a), (_, b) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), other.buffers(), strict=True))


def test_it_changes_the_list_it_is_given_as_timms_does() -> None:
    module, other = (exchange(3).eval() for _ in range(2))
    other.load_state_dict(module.state_dict())
    assert opened(other) == 1
    given, same = branches_of(3, 2), branches_of(3, 2)
    module(given)
    other(same)
    assert all(torch.equal(a, b) for a, b in zip(given, same, strict=True))


def _hooked(module: HighResolutionModule) -> None:
    module.fuse_act.register_forward_hook(lambda *_: None)


def _patched(module: HighResolutionModule) -> None:
    module.forward = lambda x: x


def _otherwise_active(module: HighResolutionModule) -> None:
    module.fuse_act = nn.GELU()


@pytest.mark.parametrize("change", [_hooked, _patched, _otherwise_active])
def test_what_a_user_has_changed_stays(change: Callable[[HighResolutionModule], None]) -> None:
    module = exchange(2)
    change(module)
    assert opened(module) == 0


def test_others_stay() -> None:
    class Own(HighResolutionModule):
        pass

    assert opened(exchange(1)) == opened(nn.ReLU()) == opened(Own(2, BasicBlock, (1, 1), [4, 8], (4, 8), "SUM")) == 0


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("raises", [True, False])
def test_it_is_taken_back_unless_kept(keeps: bool, raises: bool) -> None:
    model = nn.Sequential(exchange(2), exchange(3))
    before = [(name, id(module), type(module)) for name, module in model.named_modules()]
    with contextlib.suppress(KeyError), integrations.sums_as_modules(model, keeps=keeps) as found:
        assert found == 2
        assert {type(module) for module in model} == {HighResolutionModuleWithSums}
        if raises:
            raise KeyError
    after = [(name, id(module), type(module)) for name, module in model.named_modules()]
    assert (after == before) == (raises or not keeps)


@pytest.mark.parametrize("branches", [2, 3, 4])
def test_laws_hold_and_every_sum_is_quantized(branches: int) -> None:
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    problems, _ = broken_laws(randomised(lambda: Net(branches)).train(), x)
    assert problems == []
    model = randomised(lambda: Net(branches)).train()
    before = list(model.state_dict())
    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x))
    assert type(model.exchange) is HighResolutionModule
    assert list(model.state_dict()) == before
    assert set(eagerq.float_state_dict(qat)) == set(before)
    held = {name for kind, name in eagerq.report(qat).quantizers if kind == "exit" and ".fuse_" in name}
    between = {f"exchange.fuse_sums.{i}.{j}" for i in range(branches) for j in range(branches - 2)}
    assert held == between | {f"exchange.fuse_acts.{i}" for i in range(branches)}
    assert sum(type(module) is Add for module in qat.modules()) == branches * (branches - 1)


def _rule_of_nothing(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    return {"": "onnxruntime", "nothing.like.it": None}


def _in_the_last_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Of the trial on a copy the swap goes well, of the model itself it does not."""
    swaps, replace = [], conversion.replace_modules

    def fails(*args: Any) -> nn.Module:
        swaps.append(args)
        if len(swaps) == 2:
            raise KeyError("the last step")
        return replace(*args)

    monkeypatch.setattr(conversion, "replace_modules", fails)
    return {"": "onnxruntime"}


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(("how", "error"), [(_rule_of_nothing, SpecError), (_in_the_last_step, KeyError)])
def test_a_call_that_fails_leaves_the_model(
    how: Callable[[pytest.MonkeyPatch], dict[str, str | None]],
    error: type[Exception],
    inplace: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = eagerq.fuse_modules(Net(2).train(), example_inputs=x)
    before = [(name, id(module), type(module)) for name, module in model.named_modules()]
    with pytest.raises(error):
        eagerq.convert_qat(model, how(monkeypatch), inplace=inplace)
    assert [(name, id(module), type(module)) for name, module in model.named_modules()] == before


def _whole(qat: nn.Module) -> nn.Module:
    return qat


def _pickled(qat: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(qat, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("form", [_whole, copy.deepcopy, _pickled])
@pytest.mark.parametrize("root", [True, False])
def test_a_converted_exchange_keeps_hooks_copies_and_loads(form: Callable[[nn.Module], nn.Module], root: bool) -> None:
    """The converted module is the object that hooks were put on, at the root of a model too."""
    given: tuple[object, ...] = (branches_of(2, 3),) if root else (torch.randn(2, 3, 32, 32),)
    model = (exchange(2) if root else Net(2)).train()
    inner = model if root else model.exchange
    inner.register_load_state_dict_pre_hook(_sees)
    inner.register_forward_hook(_counts)
    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=given, inplace=True), inplace=True)
    assert qat is model
    assert "sum" in str(eagerq.report(qat).notes)
    qat = form(qat)
    inner = qat if root else qat.exchange
    assert type(inner) is HighResolutionModuleWithSums
    CALLS.clear()
    with torch.no_grad():
        for _ in range(2):
            qat(*copy.deepcopy(given))
    assert CALLS == ["forward"] * 2
    qat.load_state_dict(qat.state_dict())
    assert CALLS == ["forward"] * 2 + ["load"]
    assert all(type(m) is not FakeQuantize or m.observed for m in inner.fuse_sums.modules())


CALLS: list[str] = []


def _sees(*_: object) -> None:
    CALLS.append("load")


def _counts(*_: object) -> None:
    CALLS.append("forward")


def test_a_converted_net_is_one_graph() -> None:
    x = torch.randn(2, 3, 32, 32)
    qat = eagerq.convert_qat(eagerq.fuse_modules(randomised(lambda: Net(3)).train(), example_inputs=x))
    qat(x)
    other = copy.deepcopy(qat)
    wanted = qat(x)
    torch.testing.assert_close(torch.compile(other, fullgraph=True, backend="aot_eager")(x), wanted)


def test_every_sum_runs_in_integers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    qat = eagerq.convert_qat(eagerq.fuse_modules(randomised(lambda: Net(3)).train(), example_inputs=x))
    with torch.no_grad():
        qat(x)
    deployed = eagerq.convert(qat, inplace=True)
    export = eagerq.export_onnx(deployed, tmp_path / "net.onnx", x)
    kinds = [kernel.op for kernel in export.kernels]
    assert "Add" not in kinds
    assert kinds.count("QLinearAdd") == 3 + 3 * 2  # of the blocks, and between the branches
    assert eagerq.verify_deployment(deployed, export, [x]).differing == 0
