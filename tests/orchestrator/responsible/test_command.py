"""`orchardist responsible`: a table for people, one document for programs, and plain refusals."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import pytest

from tests.orchestrator.responsible import grouped
from tests.orchestrator.test_cli import Shell


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("grouped")
    grouped.finished(folder)
    return os.fspath(folder / "store")


def test_a_table_for_people(store: str, shell: Shell) -> None:
    done = shell("responsible", "grouped", "--store", store)
    assert done.code == 0
    assert "running model 1 of 4 on the test split" in done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("At ") and "sparse the mean accuracy" in lines[0]
    (header,) = [line for line in lines if line.startswith("group ")]
    assert " ".join(header.split()) == "group support dense % pruned % change 95 % interval verdict over seeds"
    assert any(line.startswith("side=left") for line in lines)
    assert "What the change of a class goes with:" in lines
    assert lines[-1].startswith("Note: ")


def test_one_document_and_rows_for_programs(store: str, shell: Shell) -> None:
    found = shell.json("responsible", "grouped", "--store", store)
    assert (found["study"], found["split"]) == ("grouped", "test") and found["model"]["terms"]
    done = shell("responsible", "grouped", "--store", store, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert len(rows) == len(found["rows"]) == 4 * 5
    assert [row["verdict"] for row in rows] == [row["verdict"] for row in found["rows"]]
    key = found["rows"][-1]["key"]
    assert shell.json("responsible", "grouped", key[:10], "--store", store)["chosen"]["key"] == key
    least = shell.json("responsible", "grouped", "--store", store, "--where", "sparsity >= 0.6", "--minimise", "params")
    assert least["chosen"]["sparsity"] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["grouped", "abcdefabcdef"], "no pruned state 'abcdefabcdef' in the study 'grouped'; `front` shows keys"),
        (["grouped", "abcdef", "--where", "accuracy >= 0"], "a KEY names one model: legal without --where"),
        (["grouped", "--where", "accuracy >= 2"], "no point keeps accuracy >= 2.0; the nearest"),
        (["grouped", "--where", "test_accuracy >= 0"], "the test split is only ever reported; legal: 'accuracy'"),
        (["grouped", "--learnt-above", "2"], "learnt_above = 2.0 must be a share from 0 to below 1"),
        (["grouqed"], "unknown study 'grouqed'; did you mean 'grouped'?"),
    ],
)
def test_refused_in_a_line(store: str, shell: Shell, arguments: list[str], said: str) -> None:
    done = shell("responsible", *arguments, "--store", store)
    assert done.code == 2 and done.out == ""
    assert said in done.err and len(done.err.splitlines()) <= 2
