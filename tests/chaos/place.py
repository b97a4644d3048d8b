"""Where one disturbed run takes place, with its dice."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.chaos.drive import Drive
from tests.chaos.judge import Reference, Verdict, Witness, judge
from tests.chaos.study import LONGEST_STRETCH_EPOCHS, PACE, STEPS, STEPS_PER_EPOCH, steps

ROOT = Path(__file__).resolve().parents[2]

PATIENCE_SECONDS = 120.0
"""No study here takes nearly so long: what does, hangs."""

_COMMAND = "from orchestrator.cli import main; main()"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A fresh folder, the task, and what is to come out."""

    folder: Path
    root: Path
    reference: Reference
    draw: random.Random
    number: int = 0
    of: int = 1
    """This is run `number`, from 0, of so many."""

    @property
    def url(self) -> str:
        """A folder of its own for the store."""
        return str(self.folder / "store")

    @property
    def steps(self) -> Path:
        return self.folder / "steps"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def notes(self) -> Path:
        return self.folder / "notes"

    def drive(self, **fields: Any) -> Drive:
        """A driver of the study here; `fields` go over it."""
        told: dict[str, Any] = {"url": self.url, "root": self.root, "steps": self.steps, "log": self.log}
        return Drive(**(told | {"notes": self.notes} | fields))

    def command(self, *more: str, pace: float) -> subprocess.Popen[bytes]:
        """`orchardist run` as a user calls it, in a process group of its own."""
        words = ["run", str(self.root / "study.toml"), "--store", self.url, *more]
        environment = os.environ | {"PYTHONPATH": str(ROOT), STEPS: str(self.steps), PACE: str(pace)}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *words],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    def await_steps(
        self, process: subprocess.Popen[bytes] | ForkServerProcess, more: int, seconds: float = PATIENCE_SECONDS
    ) -> None:
        """Returns once so many more training steps were taken, the driver has ended, or after so many seconds."""
        wanted = steps(self.steps) + more

        def ended() -> bool:
            return (process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) is not None

        wait_for(lambda: steps(self.steps) >= wanted or ended(), seconds)

    def must(self, ended: int | None, wanted: int = 0) -> tuple[str, ...]:
        """What is to be said of a driver's exit code: nothing when it is the one that was wanted."""
        if ended == wanted:
            return ()
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return (f"a driver ended with {ended}, not {wanted}: {lines[-1] if lines else 'it said nothing'}",)

    def judge(
        self,
        witness: Witness,
        *,
        faults: int,
        url: str = "",
        name: str = "small",
        most_again: float | None = None,
        spoilt: frozenset[str] = frozenset(),
        ended_again: bool = False,
        says: tuple[str, ...] = (),
    ) -> Verdict:
        """The verdict on the study here. Each fault may cost the training since the last stored state, no more."""
        if most_again is None:
            most_again = faults * LONGEST_STRETCH_EPOCHS * STEPS_PER_EPOCH
        return judge(
            url or self.url,
            self.reference,
            witness,
            faults=faults,
            steps=steps(self.steps),
            most_again=most_again,
            name=name,
            spoilt=spoilt,
            ended_again=ended_again,
            says=says,
        )


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Returns once the condition holds, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
