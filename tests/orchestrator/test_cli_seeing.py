"""Commands that show a study from outside: `status --watch`, `run --log`, and the exports for other tools."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.orchestrator.pools import small
from tests.orchestrator.test_cli import STUDY, Shell

CODE = "import sys; from orchestrator.cli import main; sys.argv[0] = 'orchardist'; main()"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a study, which is the current one."""
    small.write_task(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_study_is_logged_watched_and_handed_on(place: Path, shell: Shell) -> None:
    done = shell("run", "study.toml", "--local", "--log", "log.jsonl")
    assert done.code == 0 and "4/4 trials" in done.err
    lines = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "started" and lines[-1]["event"] == "ended" and {e["study"] for e in lines} == {"small"}

    watched = shell("status", "small", "--watch")
    assert watched.code == 0 and "done" in watched.out
    assert watched.err.startswith("4/4 trials") and watched.err.endswith("the study is done\n")
    assert shell.json("status", "small")["best"].keys() == {"accuracy", "sparsity"}
    assert shell("status", "small", "--watch", "--format", "json").code == 2

    assert shell("export-optuna", "small", "--to", "sqlite:///study.db").out == "4 trials written\n"
    wrong = shell("export-optuna", "small", "--to", "study.db")
    assert (
        wrong.code == 2 and wrong.err == "--to 'study.db' is no database URL; legal: one such as sqlite:///study.db\n"
    )
    assert shell("export-optuna", "nothing", "--to", "sqlite:///study.db").code == 2


def test_on_stderr_a_log_is_nothing_but_json(place: Path, shell: Shell) -> None:
    done = shell("run", "study.toml", "--local", "--log", "-")
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert [line["event"] for line in lines].count("done") == 4


def test_on_a_terminal_it_is_shown_live_and_ctrl_c_ends_the_look(place: Path, shell: Shell) -> None:
    assert shell("run", "study.toml", "--local").code == 0
    for part in (place / "orchard" / "studies" / "small" / "ledger").glob("*events*"):
        part.unlink()  # as if the driver had died before it wrote how anything ended
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", CODE, "status", "small", "--watch"]
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end) as process:
        os.close(end)
        seen = b""
        deadline = time.monotonic() + 60
        while b"trials" not in seen and time.monotonic() < deadline:
            seen += os.read(terminal, 4096)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # what a terminal says when nobody holds its other end any more
            while chunk := os.read(terminal, 4096):
                seen += chunk
    os.close(terminal)
    assert b"\x1b[" in seen and "━".encode() in seen, "a bar that is drawn anew"
    assert process.returncode == 130
    assert b"Traceback" not in seen and b"To go on" not in seen
