"""How a study stands, shown live on a terminal and as plain lines in a log. Everything goes to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from orchestrator.objectives import Objective

LINE_EVERY_SECONDS = 10.0


@dataclass(kw_only=True)
class Standing:
    """Counts of a study: what was asked for, what ended, and what sharing has saved."""

    asked: int
    done: int = 0
    failed: int = 0
    stopped: int = 0
    """Trials that others of their bracket were better than."""
    running: int = 0
    epochs_asked: float = 0.0
    epochs_run: float = 0.0
    stages_asked: int = 0
    stages_run: int = 0
    retries: int = 0
    """How often a stage was tried again: its worker died or was taken away, or its GPU's memory was too small."""
    best: dict[str, float] = field(default_factory=dict)
    last_failure: str = ""
    dense_failure: str = ""
    remark: str = ""
    """What else is to be said now, such as that a driver gives no sign of life."""

    def note(self, objectives: Sequence[Objective], values: Sequence[float]) -> None:
        """Keep the best value that any trial reached, for each objective; of a failed trial there are no values."""
        best_of = {"maximise": max, "minimise": min}
        for objective, value in zip(objectives, values, strict=bool(values)):
            old = self.best.get(objective.name, value)
            self.best[objective.name] = best_of[objective.direction](old, value)

    @property
    def ended(self) -> int:
        """Trials that need no more work."""
        return self.done + self.failed + self.stopped

    def says(self) -> str:
        """One line: trials, epochs run and saved, the best so far."""
        saved = f", {1 - self.epochs_run / self.epochs_asked:.0%} shared" if self.epochs_asked > self.epochs_run else ""
        epochs, stages = _of(self.epochs_run, self.epochs_asked), _of(self.stages_run, self.stages_asked)
        parts = [f"{self.ended}/{self.asked} trials", f"{epochs} epochs and {stages} stages run{saved}"]
        if self.failed:
            parts.insert(1, f"{self.failed} failed")
        if self.stopped:
            parts.insert(1, f"{self.stopped} stopped early")
        if self.retries:
            parts.append(f"{self.retries} tried again")
        if self.best:
            parts.append("best of each: " + ", ".join(f"{name} {value:.4g}" for name, value in self.best.items()))
        if self.remark:
            parts.append(self.remark)
        return " · ".join(parts)


def _of(run: float, asked: float) -> str:
    """What was asked for is known of the trials that are done: in the beginning that is less than was run."""
    return f"{run:.0f} of {asked:.0f}" if asked >= run else f"{run:.0f}"


class Progress(Protocol):
    """Shows a study's standing while it runs."""

    def show(self, standing: Standing) -> None:
        """Called often; decides by itself how often to draw."""
        ...

    def end(self, standing: Standing) -> None:
        """The study has ended or was interrupted."""
        ...


class Silent:
    """Shows nothing."""

    def show(self, standing: Standing) -> None:
        """Nothing."""

    def end(self, standing: Standing) -> None:
        """Nothing."""


class Lines:
    """A plain line every ten seconds, for logs; the first after as long, or `at_once`."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, *, at_once: bool = False
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._shown_at = clock() - (LINE_EVERY_SECONDS if at_once else 0)
        self._first: tuple[float, int] | None = None

    def show(self, standing: Standing) -> None:
        """Print a line when ten seconds have passed."""
        now = self._clock()
        if self._first is None:
            self._first = now, standing.ended
        if now - self._shown_at >= LINE_EVERY_SECONDS:
            self._shown_at = now
            print(standing.says() + self._left(now, standing), file=self._stream, flush=True)

    def _left(self, now: float, standing: Standing) -> str:
        """The time left, if trials go on ending as fast as they did in this run."""
        assert self._first is not None
        began, ended = self._first
        if standing.ended == ended:
            return ""
        seconds = (now - began) / (standing.ended - ended) * (standing.asked - standing.ended)
        return f" · about {seconds / 60:.0f} min left" if seconds >= 90 else f" · about {seconds:.0f} s left"

    def end(self, standing: Standing) -> None:
        """Print the last line."""
        print(standing.says(), file=self._stream, flush=True)


class Bar:
    """A live bar on a terminal, with the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bar = Progress(
            BarColumn(24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: Any = None

    def show(self, standing: Standing) -> None:
        """Redraw; rich limits how often."""
        if self._task is None:
            self._task = self._bar.add_task("", total=standing.asked, completed=standing.ended)
            self._bar.start()
        self._bar.update(self._task, description=standing.says(), total=standing.asked, completed=standing.ended)

    def end(self, standing: Standing) -> None:
        """Leave one plain line behind."""
        self._bar.stop()
        print(standing.says(), file=sys.stderr, flush=True)


def progress(*, at_once: bool = False) -> Progress:
    """The display that fits stderr: a live bar on a terminal, else lines."""
    return Bar() if sys.stderr.isatty() else Lines(at_once=at_once)


if TYPE_CHECKING:
    _silent: Progress = Silent()
    _lines: Progress = Lines()
    _bar: Progress = Bar()
