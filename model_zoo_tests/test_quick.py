"""The part of the zoo that the normal tests run: each class of timm that holds a convolution, in some model.

``python -m model_zoo_tests accept`` writes ``table.csv`` and ``quick.txt``; ``tox -e zoo`` checks all models.
"""

from __future__ import annotations

import pytest

from .zoo import COLUMNS, QUICK, check_real, check_structure, read_table

TABLE = {row["model"]: row for row in read_table()}
every_model = pytest.mark.parametrize("name", QUICK.read_text().split())


@every_model
def test_the_plan_is_the_oracle_and_the_table(name: str) -> None:
    found = check_structure(name)
    assert found["right"], found["verdict"]
    assert found["row"] == {column: TABLE[name][column] for column in COLUMNS}


@every_model
def test_nothing_computes_or_learns_otherwise(name: str) -> None:
    assert check_real(name)["problems"] == []
