from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.jobs.entrypoint import CRASHED, INTERRUPTED, LONG_SECONDS, MOST_STARTS, STARTED, restarted
from tests.cluster import until

KILLED = -signal.SIGKILL


class Runs:
    """Drivers that end with the given codes, one after another."""

    def __init__(self, codes: Sequence[int | None], seconds: Sequence[float] = ()) -> None:
        self.codes = list(codes)
        self.seconds = list(seconds)
        self.pauses: list[float] = []
        self.said: list[str] = []
        self.now = 0.0

    def run(self) -> int | None:
        self.now += self.seconds.pop(0) if self.seconds else 1.0
        return self.codes.pop(0)

    def __call__(self) -> int:
        return restarted(self.run, sleep=self.pauses.append, clock=lambda: self.now, told=self.said.append)


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_driver_that_ends_by_itself_is_not_started_again(code: int) -> None:
    runs = Runs([code, 0])
    assert runs() == code
    assert runs.codes == [0] and not runs.said


def test_a_driver_that_dies_is_started_again_after_growing_pauses() -> None:
    runs = Runs([KILLED, CRASHED, KILLED, 0])
    assert runs() == 0
    assert runs.pauses == [2, 4, 8]
    assert runs.said[0] == f"the driver was killed by signal 9; start 2 of {MOST_STARTS} in 2 s"
    assert runs.said[1].startswith("the driver crashed")


def test_the_number_of_starts_is_bounded() -> None:
    runs = Runs([KILLED] * 100)
    assert runs() == 1
    assert len(runs.codes) == 100 - MOST_STARTS
    assert max(runs.pauses) == 120 and "giving up" in runs.said[-1]


def test_a_driver_that_had_lived_long_is_started_as_if_for_the_first_time() -> None:
    runs = Runs([KILLED] * 50 + [0], [1, 1, LONG_SECONDS, *[LONG_SECONDS] * 47])
    assert runs() == 0
    assert runs.pauses == [2, 4, *[2] * 48]
    assert runs.said[2] == f"the driver was killed by signal 9; start 2 of {MOST_STARTS} in 2 s"


def test_a_driver_that_was_asked_to_stop_stays_stopped() -> None:
    runs = Runs([None, 0])
    assert runs() == INTERRUPTED
    assert runs.codes == [0]


def launched(folder: Path, *arguments: str, plot: str) -> subprocess.Popen[str]:
    """The real entrypoint, with a command line whose `run` does what `plot` says."""
    (folder / "sitecustomize.py").write_text(
        "import sys, types\n"
        "import orchestrator\n"
        "fake = types.ModuleType('orchestrator.cli')\n"
        f"exec({plot!r}, fake.__dict__)\n"
        "sys.modules['orchestrator.cli'] = fake\n"
    )
    root = str(Path(__file__).resolve().parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), root])}
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.jobs.entrypoint", *arguments],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_killed_process_goes_on_in_a_new_one(tmp_path: Path) -> None:
    plot = (
        "import os, sys, pathlib\n"
        "def main():\n"
        "    print(sys.argv)\n"
        "    if not pathlib.Path('once').exists():\n"
        "        pathlib.Path('once').touch(); os.kill(os.getpid(), 9)\n"
        "    sys.exit(0)\n"
    )
    process = launched(tmp_path, "study.toml", "--store", str(tmp_path / "store"), plot=plot)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert set(out.splitlines()) == {str(["orchardist", "run", "study.toml", "--store", str(tmp_path / "store")])}
    assert STARTED in err and "was killed by signal 9" in err


def test_a_stop_reaches_a_driver_that_got_no_signal_of_its_own(tmp_path: Path) -> None:
    plot = "import time, pathlib\ndef main():\n    pathlib.Path('up').touch()\n    time.sleep(60)\n"
    process = launched(tmp_path, "study.toml", plot=plot)
    until((tmp_path / "up").exists, 60, "there is a driver")
    process.terminate()
    assert process.wait(timeout=60) == INTERRUPTED
    process.communicate()


def test_a_driver_ends_with_the_process_that_would_start_it_again(tmp_path: Path) -> None:
    plot = "import os, time, pathlib\ndef main():\n    pathlib.Path('up').write_text(f'{os.getpid()} ')\n    time.sleep(60)\n"
    process = launched(tmp_path, "study.toml", plot=plot)
    up = tmp_path / "up"
    until(lambda: up.exists() and up.read_text().endswith(" "), 60, "there is a driver")
    process.kill()
    process.wait()
    driver = Path("/proc") / up.read_text().strip()
    until(lambda: not driver.exists() or "(zombie)" in (driver / "status").read_text(), 20, "it is gone")
    process.communicate()


def test_a_store_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = launched(tmp_path, "study.toml", "--store", str(tmp_path / "file"), plot="main = None")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.strip().splitlines()) == 1 and "it is not a folder" in err
