"""How a study goes on, followed from anywhere that sees its store: live on a terminal, in plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.progress import Progress, Standing, progress

EVERY_SECONDS = 2.0
PATIENCE_SECONDS = 60.0
"""A study that nobody runs is watched for so long: its driver may be on its way back."""


def watch(
    status: Callable[[], Mapping[str, Any]],
    shown: Progress | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Show a study's standing until it is done, or until nobody has run it for a minute.

    Args:
        status: gives what `Study.status` does, read anew.
        shown: where to; by default what fits stderr.
        clock: in seconds.
        sleep: waits.

    Returns:
        The state in which it was left: "done" or "stopped".
    """
    shown = shown or progress(at_once=True)
    left_since: float | None = None
    while True:
        found = status()
        standing = standing_of(found)
        running = found["state"] == "running"
        left_since = None if running else clock() if left_since is None else left_since
        try:
            if found["state"] == "done" or (left_since is not None and clock() - left_since >= PATIENCE_SECONDS):
                shown.end(standing)
                return str(found["state"])
            shown.show(standing)
            sleep(EVERY_SECONDS)
        except KeyboardInterrupt:
            shown.end(standing)
            raise


def standing_of(status: Mapping[str, Any]) -> Standing:
    """The standing that a status describes."""
    trials, epochs, stages = (status[name] for name in ("trials", "epochs", "stages"))
    return Standing(
        asked=trials["asked"],
        done=trials["done"],
        failed=trials["failed"],
        running=trials["running"],
        epochs_asked=epochs["asked"],
        epochs_run=epochs["run"],
        stages_asked=stages["asked"],
        stages_run=stages["run"],
        retries=sum(status["retries"].values()),
        best=dict(status["best"]),
    )
