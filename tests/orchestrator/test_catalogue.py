"""What `orchardist list` prints."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest

from orchestrator.catalogue import KINDS, catalogue
from orchestrator.errors import UnknownName
from orchestrator.pruning import allocation
from orchestrator.registry import Registry


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


def test_what_a_study_may_name_is_listed_as_it_is_read() -> None:
    from orchestrator import settings

    assert {row["name"] for row in catalogue("optimizers")} == set(get_args(settings.Optimizer))
    assert {row["name"] for row in catalogue("lr-schedules")} == set(get_args(settings.LrSchedule))
    assert {row["direction"] for row in catalogue("metrics")} == {"maximise", "minimise"}
    assert "l2" in {row["name"] for row in catalogue("norms")}


def test_papers_stand_in_a_column_of_their_own_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Any] = Registry("fruit")

    @registry.register("apple")
    def apple() -> None:
        """Keeps long."""

    monkeypatch.setattr(allocation, "SCOPES", registry)
    assert catalogue("scopes") == [{"name": "apple", "what": "Keeps long."}]
    registry.register("pear", paper="Conference et al., 1811")(apple)
    assert catalogue("scopes") == [
        {"name": "apple", "paper": "-", "what": "Keeps long."},
        {"name": "pear", "paper": "Conference et al., 1811", "what": "Keeps long."},
    ]
    assert [list(row) for row in catalogue("scopes")] == [["name", "paper", "what"]] * 2


def test_kinds_that_need_no_torch_import_none() -> None:
    code = (
        "import sys\n"
        "from orchestrator.catalogue import catalogue\n"
        "for kind in ('criteria', 'scopes', 'schedules', 'samplers', 'objectives', 'tasks', 'lr-schedules'):\n"
        "    assert catalogue(kind)\n"
        "assert 'torch' not in sys.modules\n"
        "catalogue('norms')\n"
        "assert 'torch' in sys.modules, 'the check sees nothing'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_kind() -> None:
    with pytest.raises(UnknownName, match="unknown kind of choice 'criterium'; did you mean 'criteria'"):
        catalogue("criterium")
