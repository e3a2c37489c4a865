"""The README's first program runs as it stands, and its comments are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_first_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    first = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    exec(compile(first, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "31 of 31 operations are integer kernels" in printed
    assert re.search(r"^0 of [\d,]+ codes", printed, re.MULTILINE)
    assert (tmp_path / "model.onnx").stat().st_size > 10_000_000
