"""load_checkpoint: every layout loads, nothing is half-loaded. compare_modules: what differs, where."""

from __future__ import annotations

import copy
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import eagerq
from eagerq.errors import CheckpointError, InputsError

DOCS = Path(__file__).parent.parent / "docs"


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2, 1))


def inputs() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("stage", ["float", "fused", "qat"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_float_checkpoint_loads_at_every_stage(tmp_path: Path, stage: str, wrapping: str) -> None:
    source = net()
    path = tmp_path / "float.pt"
    torch.save(WRAPPINGS[wrapping](source.state_dict()), path)
    model = net()
    if stage != "float":
        model = eagerq.fuse_modules(model, example_inputs=inputs())
    if stage == "qat":
        model = eagerq.convert_qat(model)
    assert eagerq.load_checkpoint(model, path) is model
    assert same(eagerq.float_state_dict(model), source.state_dict())


def test_a_qat_checkpoint_resumes(tmp_path: Path) -> None:
    x = inputs()
    qat = eagerq.convert_qat(eagerq.fuse_modules(net(), example_inputs=x))
    qat(x)
    torch.save(qat.state_dict(), tmp_path / "qat.pt")
    fresh = eagerq.load_checkpoint(eagerq.convert_qat(eagerq.fuse_modules(net(), example_inputs=x)), tmp_path / "qat.pt")
    assert torch.equal(fresh.eval()(x), qat.eval()(x))
    assert torch.equal(eagerq.convert(fresh)(x), qat(x))


BAD = {
    "no file": (lambda path: None, "found no file"),
    "damaged": (lambda path: path.write_bytes(b"PK\x03\x04 not a checkpoint"), "damaged"),
    "truncated": (lambda path: (torch.save(net().state_dict(), path), path.write_bytes(path.read_bytes()[:-200])), "damaged"),
    "code": (lambda path: torch.save(net(), path), "weights_only=True"),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "state_dict of tensors"),
    "another width": (lambda path: torch.save(net(5).state_dict(), path), "same architecture"),
    "another depth": (lambda path: torch.save(nn.Sequential(net(), nn.Linear(2, 2)).state_dict(), path), "same architecture"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_change_nothing(tmp_path: Path, case: str) -> None:
    write, words = BAD[case]
    path = tmp_path / "bad.pt"
    write(path)
    model = eagerq.fuse_modules(net(), example_inputs=inputs())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=words):
        eagerq.load_checkpoint(model, path)
    assert same(model.state_dict(), before)


def test_compare_modules_before_and_after_fusing() -> None:
    model, x = net().train(), inputs()
    fused = eagerq.fuse_modules(model, example_inputs=x)
    result = eagerq.compare_modules(model, fused, x)
    assert result.whole.equal
    assert result.whole.sqnr == math.inf
    assert [row.name for row in result.rows] == ["0", "1", "2", "3", ""]
    assert model.training
    assert fused.training


def test_compare_modules_finds_the_module_that_differs() -> None:
    x = inputs()
    fused = eagerq.fuse_modules(net().eval(), example_inputs=x)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        other[3].bias += 1.0
    rows = {row.name: row for row in eagerq.compare_modules(fused, other, x).rows}
    assert rows["0"].equal
    assert not rows["3"].equal
    assert rows["3"].max_abs == pytest.approx(1.0, abs=1e-5)
    signal = fused(x).double().square().sum().item()
    assert rows[""].sqnr == pytest.approx(10 * math.log10(signal / fused(x).numel()), abs=1e-3)
    assert "SQNR" in str(eagerq.compare_modules(fused, other, x))
    with pytest.raises(InputsError, match="one shape"):
        eagerq.compare_modules(fused, nn.Sequential(fused, nn.Flatten()), x)


def test_the_documented_user_pattern_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(DOCS / "user_pattern.py"))
    plan, qat, _ = example["main"]()
    assert [match.fused.__name__ for match in plan.matches] == ["WSConvBnReLU2d"]
    assert [type(module).__name__ for module in qat if type(module) is not nn.Identity] == ["QATWSConvBnReLU2d", "QATWSConv2d"]
    assert "deployed equals QAT in eval: True" in capsys.readouterr().out
