"""A store on a local folder, or on a mounted network folder.

fsspec's own local writes are in place, so that readers could see a torn file: here a file has another name until it is
whole and durable.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO

from orchestrator.store.backend import Data, Found

_NO_HARD_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}

# Some network file systems, Windows, and folders that one may write but not read.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EACCES, errno.EPERM}

_TEMPORARY = re.compile(r"\.[0-9a-f]{24}\.tmp")
_DEEPEST = 4


class Folder:
    """One folder; `root` is its absolute path. A link that leads nowhere is an empty file: torn, to be set aside."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            raise NotADirectoryError(errno.ENOTDIR, "it is not a folder")

    def read(self, path: str, start: int, end: int | None) -> bytes:
        with self._open(path) as file:
            file.seek(start)
            length = (os.fstat(file.fileno()).st_size if end is None else end) - start
            data = file.read(max(length, 0))
            # One read call gives at most 2 GiB on Linux.
            while len(data) < length and (more := file.read(length - len(data))):
                data += more
            return data

    def map(self, path: str) -> Data:
        with self._open(path) as file:
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
        try:
            status = os.stat(self._full(path))
        except FileNotFoundError:
            if os.path.islink(self._full(path)):
                return 0
            raise
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return status.st_size

    def list(self, folder: str) -> list[str]:
        return os.listdir(self._full(folder))

    def delete(self, path: str) -> None:
        os.unlink(self._full(path))

    def modified(self, path: str) -> float:
        return os.lstat(self._full(path)).st_mtime

    def used(self, folder: str) -> int:
        return sum(status.st_size for _, status in self._walk(self._full(folder)))

    def unfinished(self) -> Iterator[Found]:
        """Temporary files, whose writers may be dead or still at work."""
        for path, status in self._walk(self.root):
            if _TEMPORARY.fullmatch(os.path.basename(path)):
                name = os.path.relpath(path, self.root).replace(os.sep, "/")
                yield Found(path=name, bytes=status.st_size, modified=status.st_mtime)

    def remove(self, found: Found) -> None:
        self.delete(found.path)

    def _walk(self, folder: str, depth: int = 0) -> Iterator[tuple[str, os.stat_result]]:
        """The files below the root, as deep as any store has them; those that go meanwhile are left out."""
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_dir():
                    if depth < _DEEPEST:
                        yield from self._walk(entry.path, depth + 1)
                else:
                    yield entry.path, entry.stat()

    def _open(self, path: str) -> FileIO:
        full = self._full(path)
        try:
            return open(full, "rb", buffering=0)
        except FileNotFoundError:
            if os.path.islink(full):
                return open(os.devnull, "rb", buffering=0)
            raise

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
