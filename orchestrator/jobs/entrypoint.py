"""What a cluster's job runs: a study's driver, started again when it dies.

`python -m orchestrator.jobs.entrypoint STUDY --store URL …` takes what `orchardist run` takes. A driver that ends by
itself ends the job with its exit code; one that was killed, that fell over a bug, or whose store failed while it
worked, goes on from the store in a new process. What was shipped is copied first: see `pools.shipped`.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from orchestrator.errors import OrchardistError, StoreError, StoreFailed
from orchestrator.joblog import DOINGS
from orchestrator.pools.shipped import Place, own_copy
from orchestrator.store.files import Files

MOST_STARTS = 10
"""A driver that dies is started so often in a row."""

LONG_SECONDS = 3600.0
"""A driver that lived for so long has got on: its death counts as the first. A study may take weeks."""

FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 120.0

AWAY_SECONDS = 300.0
"""A store that does not answer when the job begins is tried so long: a study may be resumed while it is away."""

CRASHED = 70
"""The exit code of a driver that raised what no part of Orchardist raises on purpose."""

STORE_FAILED = 75
"""That of one whose store failed while it worked."""

STARTED = "the store answers; the study is driven from"
"""Said once in the job's log before the driver starts."""

BEGUN = "the study has begun"
"""Said there by each driver when the study is in the store and its work begins."""

INTERRUPTED = 130
_AGAIN = {CRASHED: "crashed", STORE_FAILED: "lost its store"}
_GRACE_SECONDS = 2.0
_DRIVE = "from orchestrator.jobs.entrypoint import drive; drive()"


def main() -> int:
    """Run the study that the command line names; returns the exit code."""
    try:
        with own_copy() as place:
            return _run(place, sys.argv[1:])
    except OrchardistError as error:
        _say(str(error))
        return 1


def _run(place: Place, arguments: Sequence[str]) -> int:
    driver = _Driver(place, arguments)
    signal.signal(signal.SIGTERM, driver.stop)
    signal.signal(signal.SIGINT, driver.stop)
    files: Files | None = None
    if "--store" in arguments[:-1]:
        try:
            files = Files(arguments[arguments.index("--store") + 1])
            reach(files.probe, sleep=driver.pause, told=_say)
        except StoreError as error:
            _say(str(error))
            return 2
    _say(f"{STARTED} {platform.node()}")

    def run() -> int | None:
        if files is not None and driver.started:
            try:
                files.probe()  # for as long as stores are waited for that have answered before
            except StoreError as error:
                _say(str(error))
                return STORE_FAILED
        return driver.run()

    return restarted(run, sleep=driver.pause, told=_say)


def reach(
    probe: Callable[[], None],
    *,
    sleep: Callable[[float], None],
    clock: Callable[[], float] = time.monotonic,
    told: Callable[[str], None],
) -> None:
    """Call `probe` until the store answers, for five minutes.

    Raises:
        StoreError: it does not, or it is wrong in a way that waiting does not mend.
    """
    end, pause = clock() + AWAY_SECONDS, FIRST_PAUSE_SECONDS
    while True:
        try:
            probe()
            return
        except StoreError as error:
            if "(waited " not in str(error) or clock() + pause >= end:  # so says one that may have come back
                raise
            told(f"{error}; tried again in {pause:.0f} s")
        sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def restarted(
    run: Callable[[], int | None],
    *,
    most: int = MOST_STARTS,
    sleep: Callable[[float], None],
    clock: Callable[[], float] = time.monotonic,
    told: Callable[[str], None],
) -> int:
    """Call `run` until it ends by itself, with growing pauses, and `most` times in a row at most. Returns its last exit
    code.

    Args:
        run: runs the driver; returns its exit code, negative where a signal ended it, None where it was asked to stop.
        most: how often it is called when it keeps dying soon.
        sleep: waits so many seconds.
        clock: seconds that only grow.
        told: takes a line for every death.
    """
    start, pause = 1, FIRST_PAUSE_SECONDS
    while True:
        began = clock()
        code = run()
        if code is None:
            return INTERRUPTED
        if code >= 0 and code not in _AGAIN:
            return code
        how = _AGAIN.get(code, f"was killed by signal {-code}")
        if clock() - began >= LONG_SECONDS:
            start, pause = 1, FIRST_PAUSE_SECONDS
        if start == most:
            told(f"the driver {how}, {most} times now: giving up; what is finished is in the store")
            return 1
        start += 1
        told(f"the driver {how}; start {start} of {most} in {pause:.0f} s")
        sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def drive() -> None:
    """`orchardist run`, in a process of its own that tells a crash from everything else by its exit code.

    It stops when the process that started it is gone: nobody could stop it then, and the next job would be refused.
    """
    from orchestrator.cli import main

    threading.Thread(target=_stop_at_the_end_of, args=[sys.stdin.fileno()], daemon=True).start()
    DOINGS.addHandler(_Begun())
    DOINGS.setLevel(logging.INFO)
    sys.argv[:1] = ["orchardist", "run"]
    try:
        main()
    except SystemExit as end:
        if isinstance(end.__context__, StoreFailed):  # of which the command line makes a 1
            sys.exit(STORE_FAILED)
        raise
    except Exception:
        traceback.print_exc()
        sys.exit(CRASHED)


def _stop_at_the_end_of(pipe: int) -> None:
    os.read(pipe, 1)  # nothing is ever written: it ends with the process at its other end
    os.kill(os.getpid(), signal.SIGTERM)


class _Begun(logging.Handler):
    """Says that the study has begun, once it has."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "said", {}).get("event") == "started":
            _say(BEGUN)
            DOINGS.removeHandler(self)
            DOINGS.setLevel(logging.NOTSET)


class _Driver:
    """The driver's process. A signal to stop goes to the whole group: it is passed on to a driver that got none."""

    def __init__(self, place: Place, arguments: Sequence[str]) -> None:
        self._command = [sys.executable, "-c", _DRIVE, *arguments]
        self._place = place
        self._stopped = False
        self.started = False

    def stop(self, *_: object) -> None:
        """No driver is started any more."""
        self._stopped = True

    def pause(self, seconds: float) -> None:
        """Wait, but not when nothing comes after it."""
        end = time.monotonic() + seconds
        while not self._stopped and time.monotonic() < end:
            time.sleep(min(0.2, seconds))

    def run(self) -> int | None:
        """Start a driver and wait for its end."""
        if self._stopped:
            return None
        self.started = True
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, cwd=self._place.folder, env=self._place.environment
        )
        passed_on = False
        while True:
            try:
                code = process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                if self._stopped and not passed_on:
                    process.terminate()
                    passed_on = True
            else:
                assert process.stdin is not None
                process.stdin.close()
                return None if self._stopped and code else code


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
