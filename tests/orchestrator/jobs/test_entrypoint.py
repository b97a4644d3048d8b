from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.errors import StoreError
from orchestrator.jobs.entrypoint import (
    AWAY_SECONDS,
    BEGUN,
    CRASHED,
    INTERRUPTED,
    LONG_SECONDS,
    MOST_STARTS,
    STARTED,
    STORE_FAILED,
    reach,
    restarted,
)
from tests.cluster import ROOT, until
from tests.orchestrator.pools import small
from tests.orchestrator.test_cli import STUDY

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
    runs = Runs([KILLED, CRASHED, STORE_FAILED, 0])
    assert runs() == 0
    assert runs.pauses == [2, 4, 8]
    assert runs.said[2].startswith("the driver lost its store; start 4")
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


def reached(*messages: str) -> tuple[float, list[str]]:
    """After how long a store is reached that says these things, one after another, before it answers."""
    now, said, left = [0.0], list[str](), list(messages)

    def probe() -> None:
        if left:
            raise StoreError(left.pop(0))

    reach(probe, sleep=lambda s: now.__setitem__(0, now[0] + s), clock=lambda: now[0], told=said.append)
    return now[0], said


def test_a_job_that_begins_while_its_store_is_away_waits_for_it() -> None:
    seconds, said = reached("no answer (waited 5 s)", "no answer (waited 5 s)")
    assert seconds == 6 and said[0] == "no answer (waited 5 s); tried again in 2 s"
    with pytest.raises(StoreError, match="no answer"):
        reached(*["no answer (waited 5 s)"] * 100)
    assert AWAY_SECONDS > 60


def test_a_store_that_waiting_does_not_mend_is_told_at_once() -> None:
    with pytest.raises(StoreError, match="no such bucket"):
        reached("no such bucket")


def launched(folder: Path, *arguments: str, plot: str, **variables: str) -> subprocess.Popen[str]:
    """The real entrypoint, with a command line whose `run` does what `plot` says."""
    (folder / "sitecustomize.py").write_text(
        "import sys, types\n"
        "import orchestrator\n"
        "fake = types.ModuleType('orchestrator.cli')\n"
        f"exec({plot!r}, fake.__dict__)\n"
        "sys.modules['orchestrator.cli'] = fake\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), ROOT]), **variables}
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


def test_a_driver_whose_store_failed_midway_is_started_again(tmp_path: Path) -> None:
    plot = (
        "import sys, pathlib\n"
        "from orchestrator.errors import StoreFailed\n"
        "def main():\n"
        "    try:\n"
        "        if not pathlib.Path('once').exists():\n"
        "            pathlib.Path('once').touch(); raise StoreFailed('the disk is full')\n"
        "    except StoreFailed:\n"
        "        sys.exit(1)\n"
        "    sys.exit(0)\n"
    )
    process = launched(tmp_path, "study.toml", "--store", str(tmp_path / "store"), plot=plot)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "the driver lost its store; start 2" in err, err


BREAKS = """
import errno, pathlib, sys
from orchestrator.store.folder import Folder
write, here = Folder.write, pathlib.Path('store')
def fails(folder, path, data):
    if len(list(here.glob('states/*/*'))) > 2:
        pathlib.Path('once').touch()
        raise OSError(errno.EIO, 'the disk is away')
    return write(folder, path, data)
if '-c' in sys.orig_argv and not pathlib.Path('once').exists():
    Folder.write = fails
"""


@pytest.mark.slow
def test_a_study_whose_disk_was_away_for_a_while_is_brought_to_its_end(tmp_path: Path) -> None:
    small.write_task(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "sitecustomize.py").write_text(BREAKS)
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.jobs.entrypoint", "study.toml", "--store", "store", "--local"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), ROOT]), "ORCHARDIST_PATIENCE_SECONDS": "0.2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "the driver lost its store; start 2" in done.stderr and "the disk is away" not in done.stdout
    assert done.stderr.count(BEGUN) == 2 and "4/4 trials" in done.stderr


def test_a_driver_says_once_that_the_study_has_begun(tmp_path: Path) -> None:
    plot = "def main():\n    from orchestrator.joblog import doing\n    [doing('s', what, {}) for what in ('a', 'started', 'started')]\n"
    process = launched(tmp_path, "study.toml", plot=plot)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err.count(BEGUN) == 1, err


def test_a_job_goes_on_with_the_shipped_code_when_its_folder_is_taken_away(tmp_path: Path) -> None:
    """As a second raylet of the machine does: the files come back, but the folder that was the job's own does not."""
    there, kept = tmp_path / "there", tmp_path / "kept"
    there.mkdir()
    plot = (
        "import os, pathlib, shutil, sys\n"
        "def main():\n"
        "    import shipped\n"
        "    kept = pathlib.Path(sys.argv[2])\n"
        "    with kept.open('a') as file:\n"
        "        print(os.getcwd(), shipped.__file__, os.path.exists('study.toml'), os.environ['ORCHARDIST_AGAIN'], file=file)\n"
        "    if len(kept.read_text().splitlines()) == 1:\n"
        "        shutil.rmtree(sys.argv[3]); os.kill(os.getpid(), 9)\n"
        "    sys.exit(0)\n"
    )
    for name in ("study.toml", "shipped.py"):
        (there / name).write_text("")
    (tmp_path / "tmp").mkdir()
    job = {"runtime_env": {"working_dir": "gcs://package.zip"}, "metadata": {"orchardist-again": "mine"}}
    process = launched(
        *(there, str(kept), str(there)),
        plot=plot,
        RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps(job),
        TMPDIR=str(tmp_path / "tmp"),
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    first, second = kept.read_text().splitlines()
    folder, module, study, again = first.split()
    assert first == second and Path(folder).parent == tmp_path / "tmp"
    assert (module, study, again) == (f"{folder}/shipped.py", "True", "mine")
    assert not list((tmp_path / "tmp").iterdir())


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
