from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import pytest

import orchestrator.store.lease as leases
from orchestrator import Study
from orchestrator.errors import StoreError
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Event, Reported
from orchestrator.store import paths
from orchestrator.store.files import Files
from orchestrator.store.lease import Lease
from tests.orchestrator.pools import small

ROOT = Path(__file__).resolve().parents[2]


def test_the_lease_beats_while_the_driver_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_BEAT_CHECK_SECONDS", 0.001)
    beats: list[None] = []

    class Troubled(Lease):
        """Counts, and cannot write the first time."""

        def beat(self) -> None:
            beats.append(None)
            if len(beats) == 1:
                raise StoreError("the disk is full for a moment")

    lease = Troubled(Files(f"memory://{uuid4().hex}"), "s", 1)
    with leases.beating(lease):
        patience = time.monotonic() + 10
        while len(beats) < 3 and time.monotonic() < patience:
            time.sleep(0.001)
    count = len(beats)
    assert count >= 3
    time.sleep(0.02)
    assert len(beats) == count, "it beats on after the end"


class TakenOver(LocalPool):
    """After three reports another driver holds the study, and this one's beat has seen it."""

    def __init__(self, files: Files) -> None:
        super().__init__()
        self.reported: list[Reported] = []
        self._files = files

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        events = super().completed(timeout_seconds)
        self.reported += [event for event in events if isinstance(event, Reported)]
        if len(self.reported) >= 3 and self._files.create(
            paths.lease_file("small", 2, "json"), b'{"host": "elsewhere", "pid": 4242, "boot_id": "b"}'
        ):
            patience = time.monotonic() + 10
            while any(thread.name == "lease" for thread in threading.enumerate()) and time.monotonic() < patience:
                time.sleep(0.001)
        return events


def test_a_driver_that_was_taken_over_from_stops_and_keeps_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(leases, "_BEAT_CHECK_SECONDS", 0.001)
    study = Study(small.spec(), f"memory://{uuid4().hex}", root=small.write_task(tmp_path))
    pool = TakenOver(study.store.files)
    with pytest.raises(StoreError, match=r"^study small was taken over by process 4242 on elsewhere .* it stops here$"):
        study.run(pool)
    measured = {report.key for report in pool.reported if report.measures is not None}
    assert len(pool.reported) < 6, "it went on"
    assert measured <= set(study.table()["key"].to_pylist())
    assert "ended" not in study.store.table("small", "events")["event"].to_pylist()
    study.store.files.create(paths.lease_file("small", 2, "released"), b"")
    assert study.run(LocalPool()).done == 6


RACER = """
import sys
from orchestrator import Study
from orchestrator.errors import StoreError
from orchestrator.pools.local import LocalPool
from tests.orchestrator.pools import small


class Holding(LocalPool):
    def prepare(self, job):
        print("runs", flush=True)
        sys.stdin.readline()
        return super().prepare(job)


store, root, turns = sys.argv[1:]
print("ready", flush=True)
for turn in range(int(turns)):
    sys.stdin.readline()
    try:
        standing = Study(small.spec(name=f"s{turn}", trials=1), store, root=root).run(Holding())
        print("ended", standing.done, standing.failed, flush=True)
    except StoreError as error:
        print(error, flush=True)
"""


def test_of_two_drivers_at_once_one_runs_and_the_other_is_told_who(tmp_path: Path) -> None:
    turns = 4
    root = small.write_task(tmp_path / "root")
    command = [sys.executable, "-c", RACER, str(tmp_path / "store"), str(root), str(turns)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )

    with start() as one, start() as other:
        both = one, other
        assert [_line(process) for process in both] == ["ready", "ready"]
        for turn in range(turns):
            for process in both:
                _go(process)
            answers = [_line(process) for process in both]
            assert sorted(answers, key=len)[0] == "runs" and answers.count("runs") == 1, answers
            runs = both[answers.index("runs")]
            refused = answers[1 - answers.index("runs")]
            assert refused.startswith(f"study s{turn} is being run by process {runs.pid} on "), refused
            _go(runs)
            assert _line(runs) == "ended 1 0"
            study = Study.open(tmp_path / "store", f"s{turn}")
            assert study.store.table(f"s{turn}", "events")["event"].to_pylist().count("started") == 1


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_what_is_published_last_is_how_it_ended(tmp_path: Path) -> None:
    class Watched(LocalPool):
        def publish(self, study: str, counts: Mapping[str, float]) -> None:
            published.append(counts)

    published: list[Mapping[str, float]] = []
    root = small.write_task(tmp_path)
    standing = Study(small.spec(trials=3), f"memory://{uuid4().hex}", root=root).run(Watched())
    assert published[-1]["trials_done"] == standing.done == 3
    assert published[-1]["trials_running"] == published[-1]["queue_length"] == 0
