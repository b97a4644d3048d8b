"""Who drives a study: one process at a time, each under a number of its own, the epoch.

`lease/<epoch>.json` is created at most once, so that of two drivers which ask at the same time one gets the epoch.

Whether a holder is alive is one rule for all who ask, a second driver, `status` and `gc`, and compares no clocks:

- Who let go holds nothing any more.
- A holder of the reader's own host, boot and process namespace lives as long as its process does: told at once, unless
  that process is stopped (SIGSTOP).
- Such a one and any other is alive once its counter, or the epoch, is seen to move. It is dead when the counter has
  stood still for 15 s between the reader's own looks, by the reader's monotonic clock. Of the time between two looks
  5 s count at most: a reader that slept saw nothing; and none of the time in which the store did not answer: no holder
  could beat then.
- Until either is seen it is not known. A second driver waits, `status` waits, and `gc` waits; who cannot wait takes the
  holder to be alive.

A holder that is wrongly taken for dead loses nothing: it stops at its next beat, and what it measured is kept.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
_PIDS = 2**31


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
        self._look()
        if self.lost:
            return
        self._count += 1
        self.files.write(paths.lease_file(self.study, self.epoch, "beat"), str(self._count).encode())
        self._beaten_at = now

    def check(self) -> None:
        """Raises `StoreError` naming the process that took over, if a beat has seen one."""
        if self.lost:
            raise StoreError(self.lost)

    def look(self) -> None:
        """Looks for a newer epoch at once, and raises as `check` does."""
        self._look()
        self.check()

    def _look(self) -> None:
        newest, _ = _newest(self.files, self.study)
        if newest > self.epoch:
            self.lost = (
                f"study {self.study} was taken over by {_named(_holder(self.files, self.study, newest))}, while this "
                "process stood still: it stops here"
            )

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

    `boot` tells one start of `host` from another. Whether an earlier holder is dead is decided by the rule above; an
    earlier lease of this very process is taken over from at once. `alive` says whether a process of this host runs.
    """
    me = {"host": host, "pid": pid, "boot_id": boot, "token": secrets.token_hex(8), "born": _born(pid)}
    pulse = Pulse(files, study, host=host, boot=boot, pid=pid, clock=clock, alive=alive)
    while True:
        sign = pulse.look()
        if sign.alive is None:
            sleep(_POLL_SECONDS)
            continue
        if sign.alive:
            raise StoreError(f"study {study} is being run by {sign.driver}; stop it first")
        newest = sign.epoch
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
    boot = ""
    with suppress(OSError):  # not Linux: the host's name has to do
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        # Two containers of one machine may have one host name, and each a process 1.
        boot += f" {os.readlink('/proc/self/ns/pid')}"
    return {"host": platform.node(), "pid": os.getpid(), "boot": boot}


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What is known of who drives a study."""

    alive: bool | None
    """None: not known yet."""
    driver: str = ""
    """The holder in words; empty where nobody holds the study."""
    epoch: int = 0
    """The newest one; 0: there was none yet."""
    silent_seconds: float = 0.0
    """For how long this process has seen no sign of life of a holder elsewhere."""

    def as_json(self) -> dict[str, Any] | None:
        """As `orchardist status --format json` prints it; None where nobody holds the study."""
        if not self.driver:
            return None
        return {"held_by": self.driver, "alive": self.alive, "silent_seconds": round(self.silent_seconds, 1)}


class Pulse:
    """A study's driver, observed from look to look by the rule above.

    `host`, `boot` and `pid` name the reader; by default this process, which is then no holder itself: `pid` is 0.
    """

    def __init__(
        self,
        files: Files,
        study: str,
        *,
        host: str = "",
        boot: str = "",
        pid: int = 0,
        clock: Callable[[], float] = time.monotonic,
        alive: Callable[[int], bool] | None = None,
    ) -> None:
        here = this_process()
        self._files = files
        self._study = study
        self._place = (host or here["host"], boot or here["boot"])
        self._pid = pid
        self._clock = clock
        self._alive = alive
        self._holder: tuple[int, dict[str, Any]] = 0, {}
        self._seen: tuple[int, bytes | None] | None = None
        self._moved = False
        self._moved_at = 0.0
        self._looked_at = 0.0
        self._watched = 0.0

    def look(self) -> Sign:
        """Look once more, without waiting."""
        began = self._clock()
        newest, released = _newest(self._files, self._study)
        if not newest or released:
            self._seen = newest, None  # an epoch after it is a sign of life
            return Sign(alive=False, epoch=newest)
        if self._holder[0] != newest:
            self._holder = newest, _holder(self._files, self._study, newest)
        holder = self._holder[1]
        if (holder.get("host"), holder.get("boot_id")) == self._place:
            alive = holder["pid"] != self._pid and (self._alive(holder["pid"]) if self._alive else _runs(holder))
            if not (alive and _is_stopped(holder["pid"])):
                return Sign(alive=alive, driver=_named(holder), epoch=newest)
        count = _bytes(self._files, paths.lease_file(self._study, newest, "beat"))
        now = self._clock()
        if self._seen == (newest, count):
            self._watched += min(began - self._looked_at, BEAT_SECONDS)
        else:
            self._moved = self._seen is not None
            self._seen, self._moved_at, self._watched = (newest, count), now, 0.0
        self._looked_at = now
        known = None if self._watched < DEAD_SECONDS else False
        moves = True if self._moved and known is None else known
        return Sign(alive=moves, driver=_named(holder), epoch=newest, silent_seconds=now - self._moved_at)


def decided(pulse: Pulse, sleep: Callable[[float], None] = time.sleep) -> Sign:
    """What is known of a driver once it is known: at most 15 s later, while the store answers."""
    while (sign := pulse.look()).alive is None:
        sleep(_POLL_SECONDS)
    return sign


def process_alive(pid: int) -> bool:
    """Whether a process of this machine still runs. One that has ended but was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    fields = _stat(pid)
    return not fields or fields[0] not in ("Z", "X")


def _is_stopped(pid: int) -> bool:
    """Whether a process of this machine stands still until it is told to go on; False where that cannot be told."""
    return _stat(pid)[:1] in (["T"], ["t"])


def _runs(holder: Mapping[str, Any]) -> bool:
    """Whether the holder's process runs, and is not a later one that was given its number."""
    pid, born = holder["pid"], holder.get("born")
    return process_alive(pid) and (born is None or _born(pid) in (None, born))


def _born(pid: int) -> int | None:
    """When a process of this machine began, in ticks since boot; None where that cannot be told."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else None


def _stat(pid: int) -> list[str]:
    """What Linux tells of a process, from its condition on; nothing elsewhere."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            # The name in brackets may hold anything, brackets too.
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


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
        if isinstance(holder, dict) and isinstance(holder.get("pid"), int) and 0 < holder["pid"] < _PIDS:
            return holder
    except (FileNotFoundError, ValueError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
    _LOG.warning("%s in the store %s does not say who holds the study; its counter is watched", path, files.name)
    return {}


def _bytes(files: Files, path: str) -> bytes | None:
    try:
        return files.read(path)
    except FileNotFoundError:
        return None
