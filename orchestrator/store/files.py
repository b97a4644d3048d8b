"""Small, whole files on a local folder or on any fsspec URL.

A file is written at once or not at all: a reader sees the old bytes, the new bytes or no file, whoever is killed. A
store that stops answering is waited for, with growing, jittered pauses, for a bounded time.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.errors import StoreError
from orchestrator.store import paths
from orchestrator.store.address import address, without_credentials, without_secrets
from orchestrator.store.backend import Backend, Data, Found
from orchestrator.store.folder import Folder
from orchestrator.store.objects import Memory, Objects

T = TypeVar("T")

PATIENCE_SECONDS = 300.0
"""How long a store that has answered before is waited for, where the environment has no ORCHARDIST_PATIENCE_SECONDS."""

FIRST_PATIENCE_SECONDS = 5.0
"""How long one is waited for that never answered, or that was given up: its address may be wrong."""

_SHORTEST_PAUSE_SECONDS = 0.1
# Well below the time after which a lease that stands still counts as given up.
_LONGEST_PAUSE_SECONDS = 4.0
_SAY_EVERY_SECONDS = 30.0

_LOG = logging.getLogger("orchardist.store")
_FULL = {errno.ENOSPC, errno.EDQUOT}

# What may pass by itself: a server that restarts, is busy or out of reach, and a network folder that is away.
_PASSING = {
    getattr(errno, name, errno.EIO)
    for name in (
        *("EIO", "EREMOTEIO", "EAGAIN", "EBUSY", "EINTR", "ETIMEDOUT", "ESTALE", "EPIPE", "ENOTCONN", "ECONNREFUSED"),
        *("ECONNRESET", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
    )
}
# What the drivers of object stores raise then, by the names of the classes: they need not be installed.
_PASSING_NAMES = {
    *("ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseParserError"),  # botocore
    *("ClientConnectionError", "ClientPayloadError", "ServerTimeoutError"),  # aiohttp
    *("ServiceRequestError", "ServiceResponseError"),  # Azure
}
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}


class NoRoom(StoreError):
    """The disk is full."""


class Files:
    """The files under one root. Paths are relative to it, with forward slashes, and come from `paths.py`.

    `url` is a local path (`~` expands, a relative one is resolved once, now) or a URL that fsspec opens. Whatever goes
    wrong is a `StoreError` of one line without credentials; an absent file is a `FileNotFoundError`. `clock` gives
    monotonic seconds; it and `sleep` are for waiting until a store answers again.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = os.fspath(url)
        self.name = without_credentials(self.url)
        """The URL as it may be shown."""
        self.creates_once = True
        """Whether `create` lets one of many writers win whatever they do; `probe` finds out."""
        self._clock = clock
        self._sleep = sleep
        self._answered = False
        self._backend: Backend
        found = address(self.url)
        self.local = found.kind == "folder"
        try:
            kinds: dict[str, Callable[[str], Backend]] = {"folder": Folder, "memory": Memory, "objects": Objects}
            self._backend = kinds[found.kind](found.place)
        except Exception as error:
            raise self._error("open", "", error) from None

    @property
    def absolute_url(self) -> str:
        """The URL for another process, whose working directory may be another one."""
        return self._backend.root if isinstance(self._backend, Folder) else self.url

    def read(self, path: str) -> bytes:
        """The whole file. Raises `FileNotFoundError` when it is absent."""
        return self._do("read", path, lambda: self._backend.read(_checked(path), 0, None))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive), fewer where the file ends. Raises `FileNotFoundError` as `read` does."""
        assert 0 <= start <= end, (start, end)
        return self._do("read", path, lambda: self._backend.read(_checked(path), start, end))

    def write(self, path: str, data: Data, first: Callable[[], None] | None = None) -> None:
        """Puts `data` in the place of whatever the file was. Durable on return.

        `first` is called before every attempt: what was right when the store stopped answering need not be so when it
        answers again. Whatever it raises ends the waiting.
        """
        self._do("write", path, lambda: self._backend.write(_checked(path), data), absent_is_an_error=True, first=first)

    def create(self, path: str, data: Data) -> bool:
        """True when this call made the file, durably; False, and no change, when it exists. One of many writers wins.

        Where a store's answer is lost, equal bytes count as this call's own: data that tell writers apart need a token.
        """
        return self._do("write", path, lambda: self._backend.create(_checked(path), data), absent_is_an_error=True)

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """In bytes. Raises `FileNotFoundError` when the file is absent."""
        return self._do("read", path, lambda: self._backend.size(_checked(path)))

    def list(self, folder: str) -> list[str]:
        """Sorted names of what lies in the folder now, folders included, hidden ones left out; [] without a folder."""
        # A killed writer's temporary file is hidden, so that it is neither seen nor in anybody's way.
        return sorted(name for name in self._names(folder) if name and not name.startswith("."))

    def delete(self, path: str) -> None:
        """Nothing happens when the file is absent."""
        with suppress(FileNotFoundError):
            self._do("delete", path, lambda: self._backend.delete(_checked(path)))

    def map(self, path: str) -> Data:
        """The whole file, mapped into memory where it is local: what is not looked at is not read. It stays what it was
        when it was opened. Raises `FileNotFoundError` when it is absent."""
        return self._do("read", path, lambda: self._backend.map(_checked(path)))

    def set_aside(self, path: str, why: str, torn: Callable[[bytes], bool], *, stays: bool = False) -> bool:
        """Reports a torn or foreign file and moves it out of the way, unless a whole one has taken its place.

        With `stays` only a copy is put away, and whoever has the whole file writes over it: a store may carry out a
        delete late, or another process may, and it would hit what has taken the torn one's place.

        Returns whether no whole file is under the name.
        """
        try:
            data = self.read(path)
            if not torn(data):
                return False
            aside = paths.set_aside(path, hashlib.sha256(data).hexdigest()[:8])
            known = self.exists(aside)
            if not known:
                self.write(aside, data)
            if not stays:
                self.delete(path)
        except FileNotFoundError:
            return True  # somebody else was faster
        except StoreError as error:  # one who may only read the store can still go on without the file
            _LOG.warning("%s in the store %s %s; left where it is: %s", path, self.name, why, error)
        else:
            if not (known and stays):  # whoever looks next need not hear it again
                _LOG.warning(
                    "%s in the store %s %s; %s %s", path, self.name, why, "copied to" if stays else "moved to", aside
                )
        return True

    def age(self, path: str) -> float:
        """Seconds since the file was written, by the store's own clock. Raises `FileNotFoundError` if it is absent."""
        now = self._now()
        return now - self._do("read", path, lambda: self._backend.modified(_checked(path)))

    def used(self, folder: str) -> int:
        """The bytes of everything in the folder, and in those within it; 0 without a folder."""
        try:
            return self._do("read", folder, lambda: self._backend.used(_checked(folder)))
        except FileNotFoundError:
            return 0

    def leftovers(self, *folders: str) -> Sequence[Leftover]:
        """What writers began and have not finished, dead ones or such as are still at work: temporary files, probes,
        uploads in parts that were not completed; and every file of the folders."""
        now = self._now()
        found = [*self._do("list", "", lambda: list(self._backend.unfinished()))]
        probes = [name for name in self._names("") if paths.is_probe(name)]
        for path in [*probes, *(f"{folder}/{name}" for folder in folders for name in self.list(folder))]:
            with suppress(FileNotFoundError):
                at = self._do("read", path, lambda path=path: self._backend.modified(path))  # type: ignore[misc]
                found.append(Found(path=path, bytes=self.size(path), modified=at))
        return [Leftover(self, each, now - each.modified) for each in found]

    def _now(self) -> float:
        """What the store takes the time to be: of two machines that write to it neither may be right."""
        path = paths.probe(secrets.token_hex(8))
        self.write(path, b"")
        try:
            return self._do("read", path, lambda: self._backend.modified(path))
        finally:
            self.delete(path)

    def probe(self) -> None:
        """Finds out what the store can promise. Raises `StoreError` where it cannot be written and read back.

        One that lets several writers create one file is used all the same, with a warning and `creates_once` False.
        """
        token = secrets.token_hex(8)
        path, data = paths.probe(token), token.encode()
        self.write(path, data)
        try:
            found = self.read(path)
        except FileNotFoundError:
            found = b""
        if found != data:
            raise StoreError(f"the store {self.name} does not give back what was written to it")
        self.delete(path)
        if isinstance(self._backend, Objects):
            with ThreadPoolExecutor(_PROBES) as threads:
                won = list(threads.map(lambda number: self.create(path, f"{token} {number}".encode()), range(_PROBES)))
            self.delete(path)
            self.creates_once = sum(won) == 1
            if not self.creates_once:
                _LOG.warning(
                    "the store %s lets several writers create the same file (it keeps to no If-None-Match): drivers "
                    "that start at the same time wait and look again",
                    self.name,
                )

    def _names(self, folder: str) -> Sequence[str]:
        """What lies in the folder, hidden files included; nothing without a folder."""

        def names() -> Sequence[str]:
            try:
                return self._backend.list(_checked(folder))
            except (FileNotFoundError, NotADirectoryError) as error:
                if _without_a_root(error):
                    raise
                return []

        return self._do("list", folder, names)

    def _do(
        self,
        verb: str,
        path: str,
        act: Callable[[], T],
        *,
        absent_is_an_error: bool = False,
        first: Callable[[], None] | None = None,
    ) -> T:
        """What `act` returns, once the store answers."""
        wait: _Wait | None = None
        while True:
            if first is not None:
                first()
            try:
                result = act()
            except (StoreError, AssertionError):
                raise
            except Exception as error:  # a store's driver raises what it likes: botocore's errors are no OSErrors
                absent = isinstance(error, FileNotFoundError | NotADirectoryError) and not _without_a_root(error)
                if absent and path and not absent_is_an_error:
                    self._hear(wait)
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
                # A bucket does not go: a server that comes up again may not know of it yet.
                if _passing(error) or (self._answered and _without_a_root(error)):
                    if wait is None:
                        wait = _Wait(self._patience(), self._clock)
                    if wait.over():
                        self._answered = False
                        raise self._error(verb, path, error, f" (waited {wait.waited():.0f} s)") from None
                    if wait.worth_a_word():
                        _LOG.warning("%s; waiting for it", self._error(verb, path, error))
                    self._sleep(wait.pause())
                    continue
                # A driver's own error may hold credentials, and a traceback may be kept.
                raise self._error(verb, path, error) from None
            self._hear(wait)
            return result

    def _hear(self, wait: _Wait | None) -> None:
        """The store has answered."""
        self._answered = True
        if wait is not None and wait.said:
            _LOG.warning("the store %s answers again after %.0f s", self.name, wait.waited())

    def _patience(self) -> float:
        longest = float(os.environ.get("ORCHARDIST_PATIENCE_SECONDS") or PATIENCE_SECONDS)
        return longest if self._answered else min(longest, FIRST_PATIENCE_SECONDS)

    def _error(self, verb: str, path: str, error: Exception, more: str = "") -> StoreError:
        """One line that says what cannot be done, where and why, and what would help where that is known."""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        line = self._without_secrets(" ".join(reason.split())) or type(error).__name__
        what = f"{path} in the store {self.name}" if path else f"the store {self.name}"
        if isinstance(error, ImportError) and self.url.startswith(("s3://", "s3a://")):
            line = "s3fs is not installed: pip install 'orchardist[s3]'"
        elif isinstance(error, OSError) and error.errno in _FULL:
            more += "; free some room and run it again: what is finished is not lost"
            return NoRoom(f"cannot {verb} {what}: {line}{more}")
        elif isinstance(error, PermissionError) and not self.local:
            more += "; check the credentials and what they may do there"
        return StoreError(f"cannot {verb} {what}: {line}{more}")

    def _without_secrets(self, text: str) -> str:
        """Without `user:password@`, and without any secret of the environment or of the store's own options."""
        options = (
            getattr(getattr(self._backend, "fs", None), "storage_options", {}) if hasattr(self, "_backend") else {}
        )
        return without_secrets(text, os.environ, options, url=self.url)


@dataclass(frozen=True)
class Leftover:
    """Something that may have been left by a killed writer."""

    _files: Files
    _found: Found
    age_seconds: float
    """By the store's own clock."""

    @property
    def path(self) -> str:
        return self._found.path

    @property
    def bytes(self) -> int:
        """0 where the store does not say."""
        return self._found.bytes

    def remove(self) -> None:
        """Nothing happens when it is gone."""
        with suppress(FileNotFoundError):
            self._files._do("delete", self.path, lambda: self._files._backend.remove(self._found))


_PROBES = 4


class _Wait:
    """A time of waiting for a store."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._began = clock()
        self._longest = _SHORTEST_PAUSE_SECONDS
        self._said_at = float("-inf")
        self.said = False

    def waited(self) -> float:
        return self._clock() - self._began

    def over(self) -> bool:
        return self.waited() >= self._seconds

    def worth_a_word(self) -> bool:
        """Every half minute, and not for what has passed at the second try."""
        if self._longest == _SHORTEST_PAUSE_SECONDS or self._clock() - self._said_at < _SAY_EVERY_SECONDS:
            return False
        self._said_at, self.said = self._clock(), True
        return True

    def pause(self) -> float:
        """The next pause in seconds: longer each time, and never the same for two who wait for one store."""
        longest = self._longest
        self._longest = min(2 * longest, _LONGEST_PAUSE_SECONDS)
        return longest * (0.5 + secrets.randbelow(1000) / 2000)


def _passing(error: Exception) -> bool:
    """Whether the same request may well succeed a little later."""
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    if {getattr(error, name, None) for name in ("code", "status", "status_code")} & _PASSING_STATUS:
        return True
    return any(parent.__name__ in _PASSING_NAMES for parent in type(error).__mro__)


def _without_a_root(error: BaseException) -> bool:
    """Whether not only the file is absent, but the whole bucket."""
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, dict) and response.get("Error", {}).get("Code") == "NoSuchBucket"


def _checked(path: str) -> str:
    assert not path.startswith("/") and ".." not in path.split("/"), f"{path!r} leaves the store's root"
    return path
