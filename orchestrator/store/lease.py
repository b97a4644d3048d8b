"""Who drives a study: one process at a time, each under a number of its own, the epoch.

`lease/<epoch>.json` is created at most once, so that of two drivers which ask at the same time one gets the epoch. No
clocks are compared between machines: a holder elsewhere is dead when its counter stands still on the reader's clock.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from orchestrator.errors import StoreError
from orchestrator.store import paths
from orchestrator.store.files import Files

_LOG = logging.getLogger("orchardist.store")

BEAT_SECONDS = 5.0
"""`Lease.beat` writes at most this often."""
DEAD_SECONDS = 15.0
"""A counter that stands still this long belongs to a dead holder."""
_POLL_SECONDS = 1.0
_SETTLE_SECONDS = 3.0
_BEAT_CHECK_SECONDS = 1.0


class Lease:
    """The right to drive `study` under `epoch`. The holder calls `beat` all the time and `release` in the end.

    A holder that stood still too long may find that another driver took over; `check` says so then.
    """

    def __init__(self, files: Files, study: str, epoch: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.files = files
        self.study = study
        self.epoch = epoch
        self._clock = clock
        self.lost = ""
        """Who took over, once that was seen."""
        self._count = 0
        self._beaten_at = float("-inf")

    def beat(self) -> None:
        """Shows that the holder is alive and looks for a newer epoch; does nothing within 5 s of the last time."""
        now = self._clock()
        if self.lost or now - self._beaten_at < BEAT_SECONDS:
            return
        newest, _ = _newest(self.files, self.study)
        if newest > self.epoch:
            self.lost = (
                f"study {self.study} was taken over by {_named(_holder(self.files, self.study, newest))}, while this "
                "process stood still: it stops here"
            )
            return
        self._count += 1
        self.files.write(paths.lease_file(self.study, self.epoch, "beat"), str(self._count).encode())
        self._beaten_at = now

    def check(self) -> None:
        """Raises `StoreError` naming the process that took over, if a beat has seen one."""
        if self.lost:
            raise StoreError(self.lost)

    def release(self) -> None:
        """Gives the study free for the next driver, which need not wait then. May be called again."""
        self.files.create(paths.lease_file(self.study, self.epoch, "released"), b"")


def acquire(
    files: Files,
    study: str,
    *,
    host: str,
    pid: int,
    boot: str,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    alive: Callable[[int], bool] | None = None,
) -> Lease:
    """The next epoch of the study, once nobody else drives it. Raises `StoreError` naming the process that does.

    `boot` tells one start of `host` from another. A holder of the same host and boot is asked for by its process id
    (`alive`), a dead one is taken over from at once; an earlier lease of this very process is, too. Any other holder is
    watched until its counter moves or has stood still for 15 s.
    """
    me = {"host": host, "pid": pid, "boot_id": boot, "token": secrets.token_hex(8)}
    while True:
        newest, released = _newest(files, study)
        if newest and not released:
            holder = _holder(files, study, newest)
            if (holder.get("host"), holder.get("boot_id")) != (host, boot):
                stopped = _stands_still(files, study, newest, clock, sleep)
            else:
                stopped = holder.get("pid") == pid or not (alive or process_alive)(holder.get("pid", 0))
            if not stopped:
                raise StoreError(f"study {study} is being run by {_named(holder)}; stop it first")
        # Whoever creates the next number has the study; who comes second looks at the winner as at any holder.
        started = datetime.now(UTC).isoformat(timespec="seconds")
        content = json.dumps({**me, "started_at": started}, sort_keys=True).encode()
        path = paths.lease_file(study, newest + 1, "json")
        if files.create(path, content):
            if not files.creates_once:
                sleep(_SETTLE_SECONDS)  # then everybody who asked at the same time finds who wrote last
                if _bytes(files, path) != content:
                    continue
            return Lease(files, study, newest + 1, clock)


@contextmanager
def beating(lease: Lease) -> Iterator[None]:
    """Show other drivers that this one is alive, however long a stage in this process takes, until it is superseded."""
    over = threading.Event()

    def beat() -> None:
        while True:
            try:
                lease.beat()
            except StoreError as error:
                _LOG.warning("the lease could not be renewed: %s", error)
            if lease.lost or over.wait(_BEAT_CHECK_SECONDS):
                return

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def this_process() -> dict[str, Any]:
    """What names this process to other drivers: the arguments `host`, `pid` and `boot` of `acquire`."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
    except OSError:
        boot = ""
    return {"host": platform.node(), "pid": os.getpid(), "boot": boot}


def held(files: Files, study: str) -> bool:
    """Whether somebody drives the study, as far as can be told at once: a holder elsewhere is taken to be alive."""
    newest, released = _newest(files, study)
    if not newest or released:
        return False
    holder, here = _holder(files, study, newest), this_process()
    if (holder.get("host"), holder.get("boot_id")) != (here["host"], here["boot"]):
        return True
    return process_alive(holder.get("pid", 0))


def process_alive(pid: int) -> bool:
    """Whether a process of this machine still runs. One that has ended but was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            # The name in brackets may hold anything, brackets too; the process's condition is the letter behind it.
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return True


def _newest(files: Files, study: str) -> tuple[int, bool]:
    """The newest epoch, 0 where there is none, and whether its holder let go."""
    names = [lease for name in files.list(paths.lease(study)) if (lease := paths.parse_lease(name))]
    newest = max((epoch for epoch, _ in names), default=0)
    return newest, (newest, "released") in names


def _named(holder: Mapping[str, Any]) -> str:
    host, since = holder.get("host", "an unknown host"), holder.get("started_at", "an unknown time")
    return f"process {holder.get('pid', 'unknown')} on {host} since {since}"


def _holder(files: Files, study: str, epoch: int) -> dict[str, Any]:
    """What the holder wrote of itself; {} where that is foreign or gone."""
    path = paths.lease_file(study, epoch, "json")
    try:
        holder = json.loads(files.read(path))
        if isinstance(holder, dict) and isinstance(holder.get("pid"), int):
            return holder
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
    _LOG.warning("%s in the store %s does not say who holds the study; its counter is watched", path, files.name)
    return {}


def _stands_still(
    files: Files, study: str, epoch: int, clock: Callable[[], float], sleep: Callable[[float], None]
) -> bool:
    """Watches a holder's counter for 15 s; False as soon as it moves, True as well when the holder lets go."""
    path = paths.lease_file(study, epoch, "beat")
    first = _bytes(files, path)
    watched = 0.0
    while watched < DEAD_SECONDS:
        before = clock()
        sleep(_POLL_SECONDS)
        # While the store did not answer, the holder's counter could not move.
        watched += min(clock() - before, 2 * _POLL_SECONDS)
        if files.exists(paths.lease_file(study, epoch, "released")):
            return True
        if _bytes(files, path) != first:
            return False
    return True


def _bytes(files: Files, path: str) -> bytes | None:
    try:
        return files.read(path)
    except FileNotFoundError:
        return None
