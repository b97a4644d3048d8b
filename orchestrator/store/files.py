"""Small, whole files on a local folder or on any fsspec URL.

A file is written at once or not at all: a reader sees the old bytes, the new bytes or no file, whoever is killed. A
store that stops answering is waited for, with growing, jittered pauses, for a bounded time.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import mmap
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

from orchestrator.errors import StoreError
from orchestrator.store import paths

Data: TypeAlias = bytes | memoryview

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
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_CREDENTIALS = re.compile(r"://[^/]*@")
_SECRET = r"key|secret|token|sig|signature|passw(?:or)?d|credential|sas"
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
_SECRET_ARGUMENT = re.compile(rf"([?&;][^=&#\s]*(?:{_SECRET})[^=&#\s]*=)[^&;#\s]+", re.IGNORECASE)
_SHORTEST_SECRET = 6
_NO_HARD_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}

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

# Some network file systems, Windows, and folders that one may write but not read.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EACCES, errno.EPERM}


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
        if not self.url:
            raise StoreError("the store's URL is empty: give a folder or a URL such as s3://bucket/folder")
        self._clock = clock
        self._sleep = sleep
        self._answered = False
        self._backend: _Backend
        scheme = _URL.fullmatch(self.url)
        chained = "::" in self.url and "://" in self.url
        self.local = not chained if scheme is None else scheme[1].lower() in ("file", "local")
        try:
            if self.local:
                self._backend = _Folder(scheme[2] if scheme else self.url)
            elif scheme is not None and scheme[1].lower() == "memory":
                self._backend = _Memory(self.url)
            else:
                self._backend = _Objects(self.url)
        except Exception as error:
            raise self._error("open", "", error) from None

    @property
    def absolute_url(self) -> str:
        """The URL for another process, whose working directory may be another one."""
        return self._backend.root if isinstance(self._backend, _Folder) else self.url

    def read(self, path: str) -> bytes:
        """The whole file. Raises `FileNotFoundError` when it is absent."""
        return self._do("read", path, lambda: self._backend.read(_checked(path), 0, None))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive), fewer where the file ends. Raises `FileNotFoundError` as `read` does."""
        assert 0 <= start <= end, (start, end)
        return self._do("read", path, lambda: self._backend.read(_checked(path), start, end))

    def write(self, path: str, data: Data) -> None:
        """Puts `data` in the place of whatever the file was. Durable on return."""
        self._do("write", path, lambda: self._backend.write(_checked(path), data), absent_is_an_error=True)

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

        def names() -> list[str]:
            try:
                return self._backend.list(_checked(folder))
            except (FileNotFoundError, NotADirectoryError) as error:
                if _without_a_root(error):
                    raise
                return []

        # A killed writer's temporary file is hidden, so that it is neither seen nor in anybody's way.
        return sorted(name for name in self._do("list", folder, names) if name and not name.startswith("."))

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
        if isinstance(self._backend, _Objects):
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

    def _do(self, verb: str, path: str, act: Callable[[], T], *, absent_is_an_error: bool = False) -> T:
        """What `act` returns, once the store answers."""
        wait: _Wait | None = None
        while True:
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
        elif isinstance(error, PermissionError) and not self.local:
            more += "; check the credentials and what they may do there"
        return StoreError(f"cannot {verb} {what}: {line}{more}")

    def _without_secrets(self, text: str) -> str:
        """Without `user:password@`, and without any secret of the environment or of the store's own options."""
        options = (
            getattr(getattr(self._backend, "fs", None), "storage_options", {}) if hasattr(self, "_backend") else {}
        )
        for secret in {*_secrets(os.environ), *_secrets(options)}:
            text = text.replace(secret, "***")
        return without_credentials(text)


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


def without_credentials(url: str) -> str:
    """`user:password@`, and the values of arguments such as `?token=`, are left out of every URL in the text."""
    return _SECRET_ARGUMENT.sub(r"\1***", _CREDENTIALS.sub("://", url))


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    """The texts under names such as SECRET or token, at any depth."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif isinstance(value, str) and len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(str(name)):
            yield value


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


class _Backend(Protocol):
    def read(self, path: str, start: int, end: int | None) -> bytes: ...
    def map(self, path: str) -> Data: ...
    def write(self, path: str, data: Data) -> None: ...
    def create(self, path: str, data: Data) -> bool: ...
    def size(self, path: str) -> int: ...
    def list(self, folder: str) -> list[str]: ...
    def delete(self, path: str) -> None: ...


class _Folder:
    """Local, or a mounted network folder. fsspec's own local writes are in place: readers could see a torn file."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            raise NotADirectoryError(errno.ENOTDIR, "it is not a folder")

    def read(self, path: str, start: int, end: int | None) -> bytes:
        with open(self._full(path), "rb", buffering=0) as file:
            file.seek(start)
            length = (os.fstat(file.fileno()).st_size if end is None else end) - start
            data = file.read(max(length, 0))
            # One read call gives at most 2 GiB on Linux.
            while len(data) < length and (more := file.read(length - len(data))):
                data += more
            return data

    def map(self, path: str) -> Data:
        with open(self._full(path), "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""  # which cannot be mapped
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def write(self, path: str, data: Data) -> None:
        target = self._full(path)
        temporary = self._temporary(target, data)
        try:
            os.replace(temporary, target)
        except BaseException:
            _unlink(temporary)
            raise
        _sync_folder(os.path.dirname(target))

    def create(self, path: str, data: Data) -> bool:
        target = self._full(path)
        if os.path.lexists(target):
            return False
        temporary = self._temporary(target, data)
        try:
            try:
                os.link(temporary, target)
            except FileExistsError:
                # NFS may lose the reply to a link that it made and refuse the repeated request.
                if not os.path.samefile(temporary, target):
                    return False
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                if not _claim_and_replace(temporary, target):
                    return False
        finally:
            _unlink(temporary)
        _sync_folder(os.path.dirname(target))
        return True

    def size(self, path: str) -> int:
        status = os.stat(self._full(path))
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return status.st_size

    def list(self, folder: str) -> list[str]:
        return os.listdir(self._full(folder))

    def delete(self, path: str) -> None:
        os.unlink(self._full(path))

    def _full(self, path: str) -> str:
        return os.path.join(self.root, path)

    def _temporary(self, target: str, data: Data) -> str:
        """Durable bytes under a unique hidden name beside the target: only within a file system is a rename atomic."""
        folder = os.path.dirname(target)
        temporary = os.path.join(folder, f".{secrets.token_hex(12)}.tmp")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(temporary, flags, 0o666)
        except FileNotFoundError:
            _make_folder(folder)
            descriptor = os.open(temporary, flags, 0o666)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
        except BaseException:
            _unlink(temporary)
            raise
        return temporary


def _claim_and_replace(temporary: str, target: str) -> bool:
    """Create-once without hard links: an empty file is the claim, the winner replaces it by the whole one."""
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    try:
        os.replace(temporary, target)
    except BaseException:
        _unlink(target)
        raise
    return True


def _make_folder(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    with suppress(FileExistsError):
        os.mkdir(folder)
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    """A new name is durable only once its folder is."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


class _Objects:
    """Any fsspec file system where one put is atomic, as on object stores."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped,unused-ignore]  # 70 ms, not for local folders

        # s3fs never forgets a listing: another process's new files would stay unseen.
        fs, root = url_to_fs(url, use_listings_cache=False, **_options(url))
        self.fs: Any = fs
        self.root: str = root.rstrip("/")

    def read(self, path: str, start: int, end: int | None) -> bytes:
        full = self._full(path)
        if start == 0 and end is None:
            return bytes(self.fs.cat_file(full))
        try:
            return bytes(self.fs.cat_file(full, start=start, end=end))
        except FileNotFoundError:
            raise
        except Exception:
            # S3 answers 416 to a range that begins at the end or behind it, an empty object's first byte included.
            if start < self.size(path):
                raise
            return b""

    def map(self, path: str) -> Data:
        return self.read(path, 0, None)

    def write(self, path: str, data: Data) -> None:
        self.fs.pipe_file(self._full(path), bytes(data))

    def create(self, path: str, data: Data) -> bool:
        try:
            self.fs.pipe_file(self._full(path), bytes(data), mode="create")
        except OSError as error:
            # A lost race is a FileExistsError on some stores and any OSError on others, and a repeated request may
            # have lost against itself: only what lies there now can tell.
            with suppress(FileNotFoundError):
                return self.size(path) == len(data) and self.read(path, 0, None) == data
            if error.errno != errno.ENOSYS:
                raise
            # A store that refuses the condition: what was not there a moment ago is written without it.
            self.write(path, data)
        return True

    def size(self, path: str) -> int:
        info = self.fs.info(self._full(path))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return int(info["size"])

    def list(self, folder: str) -> list[str]:
        full = self._full(folder)
        self.fs.invalidate_cache()
        found = [name.rstrip("/") for name in self.fs.ls(full, detail=False)]
        # Some stores list a folder's own placeholder object among its contents.
        return [name.rpartition("/")[2] for name in found if name.strip("/") != full.strip("/")]

    def delete(self, path: str) -> None:
        self.fs.rm_file(self._full(path))

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root


def _options(url: str) -> dict[str, Any]:
    """What fsspec's driver of a scheme is told, where the user's own configuration of fsspec says nothing of it."""
    if not url.startswith(("s3://", "s3a://")):
        return {}
    from fsspec.config import conf  # type: ignore[import-untyped,unused-ignore]

    if any("config_kwargs" in conf.get(scheme, {}) for scheme in ("s3", "s3a")):
        return {}
    # botocore would try five times within some seconds; whoever waits here does so for longer, and says so.
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 10}}


class _Memory(_Objects):
    """This process's own memory, shared by all its `memory://` stores; for tests and the in-process pool."""

    # fsspec's memory is one per process, so its lock must be, too: create looks first and writes then.
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def write(self, path: str, data: Data) -> None:
        with self._lock:
            super().write(path, data)

    def create(self, path: str, data: Data) -> bool:
        with self._lock:
            if self.fs.isfile(self._full(path)):
                return False
            super().write(path, data)
            return True

    def list(self, folder: str) -> list[str]:
        with self._lock:  # fsspec's listing trips over what goes meanwhile
            return super().list(folder)

    def delete(self, path: str) -> None:
        with self._lock:
            super().delete(path)

    def size(self, path: str) -> int:
        # fsspec's info walks through every file there is.
        try:
            return int(self.fs.store[self._full(path)].size)
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None


def _checked(path: str) -> str:
    assert not path.startswith("/") and ".." not in path.split("/"), f"{path!r} leaves the store's root"
    return path
