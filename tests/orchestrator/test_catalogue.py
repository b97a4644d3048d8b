"""What `orchardist list` prints."""

from __future__ import annotations

import pytest

from orchestrator.catalogue import KINDS, catalogue
from orchestrator.errors import UnknownName


@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_has_a_name_and_a_line_of_what_it_is(kind: str) -> None:
    rows = catalogue(kind)
    assert rows
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert row["what"] and "\n" not in row["what"]
        assert all(isinstance(value, str) for value in row.values())


def test_criteria_say_what_they_need_and_take() -> None:
    (taylor,) = (row for row in catalogue("criteria") if row["name"] == "taylor")
    assert taylor["needs"] == "gradient" and "examples = " in taylor["parameters"]


def test_an_unknown_kind() -> None:
    with pytest.raises(UnknownName, match="unknown kind of choice 'criterium'; did you mean 'criteria'"):
        catalogue("criterium")
