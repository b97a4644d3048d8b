"""How a study goes on, followed from anywhere that sees its store: live on a terminal, in plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from orchestrator.errors import StoreError
from orchestrator.progress import Progress, Standing, progress

EVERY_SECONDS = 2.0
PATIENCE_SECONDS = 60.0
"""A study that nobody runs is watched for so long: its driver may be on its way back."""
STORE_PATIENCE_SECONDS = 300.0
"""A store that has answered before is asked again for so long."""
SILENCE_SECONDS = 10.0
"""A driver that beats every 5 s is worth no word before."""


def watch(
    status: Callable[[], Mapping[str, Any]],
    shown: Progress | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Show a study's standing until it is done, or until nobody has run it for a minute.

    A driver elsewhere is taken to run the study until its counter has stood still for 15 s between looks; how long it
    has been silent is said before that, and the minute begins then. A store that does not answer any more is said, too.

    Args:
        status: gives what `Study.status` does, read anew, and the driver's silence from one look to the next.
        shown: where to; by default what fits stderr.
        clock: in seconds.
        sleep: waits.

    Returns:
        The state in which it was left: "done" or "stopped".

    Raises:
        StoreError: the store does not answer at the first look, or has not for five minutes.
    """
    shown = shown or progress(at_once=True)
    left_since: float | None = None
    standing: Standing | None = None
    answered_at = clock()
    while True:
        try:
            try:
                found = status()
            except StoreError:
                if standing is None or clock() - answered_at >= STORE_PATIENCE_SECONDS:
                    raise
                shown.show(replace(standing, remark=f"no answer of the store for {clock() - answered_at:.0f} s"))
                sleep(EVERY_SECONDS)
                continue
            standing, answered_at = standing_of(found), clock()
            running = found["state"] == "running"
            left_since = None if running else clock() if left_since is None else left_since
            if found["state"] == "done" or (left_since is not None and clock() - left_since >= PATIENCE_SECONDS):
                shown.end(standing)
                return str(found["state"])
            shown.show(standing)
            sleep(EVERY_SECONDS)
        except KeyboardInterrupt:
            if standing is not None:
                shown.end(standing)
            raise


def standing_of(status: Mapping[str, Any]) -> Standing:
    """The standing that a status describes."""
    trials, epochs, stages = (status[name] for name in ("trials", "epochs", "stages"))
    return Standing(
        asked=trials["asked"],
        done=trials["done"],
        failed=trials["failed"],
        stopped=trials["stopped"],
        running=trials["running"],
        epochs_asked=epochs["asked"],
        epochs_run=epochs["run"],
        stages_asked=stages["asked"],
        stages_run=stages["run"],
        retries=sum(status["retries"].values()),
        best=dict(status["best"]),
        remark=_silence(status["driver"]),
    )


def _silence(driver: Mapping[str, Any] | None) -> str:
    """What is to be said of a driver that gives no sign of life."""
    if driver is None:
        return ""
    if driver["alive"] is False and not driver["silent_seconds"]:
        return f"{driver['held_by']} is gone"
    silent = driver["silent_seconds"]
    return f"no sign of life from {driver['held_by']} for {silent:.0f} s" if silent >= SILENCE_SECONDS else ""
