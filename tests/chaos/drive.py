"""A driver in a process of its own, forked from one that has imported everything, so that it is there at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import orchestrator.driver
import orchestrator.front
import orchestrator.pools.worker  # what the fork server has imported, no driver need import
import orchestrator.study
from orchestrator import Study
from orchestrator.errors import OrchardistError
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Event, Reported
from orchestrator.store import lease
from tests.chaos.study import PACE, STEPS, spec

DONE, REFUSED = 0, 2


@dataclass(frozen=True, kw_only=True)
class Drive:
    """What a driver is told."""

    url: str
    root: Path
    notes: Path
    """Gets a line of JSON for each report of a stage."""
    steps: Path
    log: Path
    name: str = "small"
    pace: float = 0.0
    host: str = ""
    """The name of a machine that this process claims to be on; empty: it is where it is."""
    hours_off: float = 0.0
    """How far its clock is from that of others."""
    checkpoint_seconds: float = 0.0
    """How often a training is made durable in the middle; 0: never."""
    not_before: float = 0.0
    """By the monotonic clock."""
    environment: Mapping[str, str] = field(default_factory=dict)


HASTY = {"BEAT_SECONDS": 0.2, "DEAD_SECONDS": 1.5, "_POLL_SECONDS": 0.1, "_BEAT_CHECK_SECONDS": 0.05}
"""The lease's times for drivers on pretended machines: a takeover takes a tenth of the time."""


def start(drive: Drive) -> ForkServerProcess:
    """The driver's process; its exit code is 0 when the study has ended, 2 when the run ended with one clear line."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos.drive"])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), before]))
    forkserver.ensure_running()  # which imports nothing, and says nothing of it, where the path does not lead here
    os.environ["PYTHONPATH"] = before
    process = context.Process(target=_run, args=[drive], daemon=True)
    process.start()
    return process


class Noting(LocalPool):
    """A local pool that writes down what it reports before anybody else hears of it."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self._notes = notes

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        events = super().completed(timeout_seconds)
        with self._notes.open("a") as file:
            for event in events:
                if isinstance(event, Reported):
                    made = not event.found and not event.adopted
                    file.write(json.dumps({"key": event.key, "made": made, "adopted": event.adopted}) + "\n")
        return events


def noted(file: Path) -> list[dict[str, Any]]:
    """What drivers wrote down."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _run(drive: Drive) -> None:
    os.dup2(os.open(drive.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 2)
    os.environ.update({STEPS: str(drive.steps), PACE: str(drive.pace), **drive.environment})
    if drive.host:
        _be_elsewhere(drive.host)
    if drive.hours_off:
        _be_off(3600 * drive.hours_off)
    every = drive.checkpoint_seconds / 60
    study = Study(spec(drive.name, checkpoint_minutes=every), drive.url, root=drive.root)
    time.sleep(max(0.0, drive.not_before - time.monotonic()))
    try:
        standing = study.run(Noting(drive.notes))
    except OrchardistError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    sys.exit(DONE if (standing.done, standing.failed) == (study.spec.trials, 0) else 1)


def _be_elsewhere(host: str) -> None:
    """As on another machine, where nobody can look at this one's processes."""
    here = {"host": host, "pid": os.getpid(), "boot": f"a boot of {host}"}
    setattr(orchestrator.study, "this_process", lambda: here)  # noqa: B010 no module says that it may be replaced
    for name, value in HASTY.items():
        assert hasattr(lease, name), name
        setattr(lease, name, value)


def _be_off(seconds: float) -> None:
    """The wall clock goes ahead or behind; the monotonic one is every machine's own anyway."""
    right = time.time

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Wrong:
            found = datetime.now(tz) + timedelta(seconds=seconds)
            return cls.fromtimestamp(found.timestamp(), tz or UTC)

    time.time = lambda: right() + seconds
    setattr(lease, "datetime", Wrong)  # noqa: B010
