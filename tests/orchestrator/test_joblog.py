"""JSON lines of what a study does: all of it, with names and times, and never a credential."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Study, StudySpec
from orchestrator.errors import InputError
from orchestrator.joblog import doing, lines_to
from orchestrator.pools.local import LocalPool


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_doing_is_one_line_without_what_does_not_apply(tmp_path: Path) -> None:
    with lines_to(str(tmp_path / "log")):
        doing("s", "work", {"trial": 0, "key": "ab", "worker": "", "seed": None, "seconds": float("nan")})
    doing("s", "work", {"trial": 1})
    (line,) = read(tmp_path / "log")
    assert line.pop("at") > 1e9
    assert line == {"level": "info", "study": "s", "event": "work", "trial": 0, "key": "ab", "seconds": None}


def test_warnings_are_lines_too_and_credentials_are_none_of_them(tmp_path: Path) -> None:
    with lines_to(str(tmp_path / "log")):
        logging.getLogger("orchardist.store").warning("s3://user:secret@bucket does not answer\n?token=hidden&x=1")
        doing("s", "failed", {"reason": "cannot read https://me:secret@host/x"})
    text = (tmp_path / "log").read_text()
    assert "secret" not in text and "hidden" not in text
    warning, failed = read(tmp_path / "log")
    assert warning["event"] == "message" and warning["level"] == "warning" and "does not answer" in warning["message"]
    assert failed["event"] == "failed"


def test_what_hides_credentials_stops_at_the_end_of_a_text(tmp_path: Path) -> None:
    said = {"reason": "no answer from https://host?token=hidden", "params": {"a": ["s3://u:secret@bucket"]}, "trial": 1}
    with lines_to(str(tmp_path / "log")):
        doing("s", "failed", said | {"worker": "me@host"})
    (line,) = read(tmp_path / "log")
    assert line["reason"] == "no answer from https://host?token=***"
    assert (line["params"], line["trial"], line["worker"]) == ({"a": ["s3://bucket"]}, 1, "me@host")


def test_a_log_goes_on_where_it_was(tmp_path: Path) -> None:
    for event in ("one", "two"):
        with lines_to(str(tmp_path / "log")):
            doing("s", event, {})
    assert [line["event"] for line in read(tmp_path / "log")] == ["one", "two"]


def test_afterwards_logging_is_as_before(tmp_path: Path) -> None:
    root = logging.getLogger("orchardist")
    before = root.level, root.propagate, list(root.handlers)
    with pytest.raises(RuntimeError), lines_to("-"):
        raise RuntimeError
    assert (root.level, root.propagate, list(root.handlers)) == before


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--log .* cannot be written: Is a directory"), lines_to(str(tmp_path)):
        pass


def test_a_whole_study_is_told(tmp_path: Path) -> None:
    spec = StudySpec(
        name="told",
        task="digits",
        trials=2,
        task_params={"hidden": 8},
        train={"epochs": 1, "retrain_epochs": 0.5},
        space={"criterion": "magnitude", "rate": [0.3, 0.5], "rounds": 2, "retrain": "finetune"},
        sampler="grid",
    )
    with lines_to(str(tmp_path / "log")):
        Study(spec, tmp_path / "store").run(LocalPool())
    lines = read(tmp_path / "log")
    events = [line["event"] for line in lines]
    assert events[0] == "started" and events[-1] == "ended"
    assert events.count("proposed") == events.count("done") == 2
    assert {line["study"] for line in lines} == {"told"}
    work = [line for line in lines if line["event"] == "work" and "round" in line]
    assert {(line["trial"], line["round"]) for line in work} == {(-1, 0), (0, 1), (0, 2), (1, 1), (1, 2)}
    for line in work:
        assert len(line["key"]) == 64 and line["seconds"] > 0 and line["worker"].count(":") == 1 and line["seed"] == 0
