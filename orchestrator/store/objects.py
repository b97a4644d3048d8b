"""A store on any fsspec file system where one put is atomic, as on object stores."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, ClassVar

from orchestrator.store.backend import Data, Found

_S3 = ("s3://", "s3a://")


class Objects:
    """What lies under one URL. Nothing is ever renamed: on an object store that is a copy and a delete."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped,unused-ignore]  # 70 ms, not for local folders

        # s3fs never forgets a listing: another process's new files would stay unseen.
        fs, root = url_to_fs(url, use_listings_cache=False, **_options(url))
        loop = getattr(fs, "loop", None)
        if loop is not None and loop.get_exception_handler() is None:
            loop.set_exception_handler(_of_nobody)
        self.fs: Any = fs
        self.root: str = root.rstrip("/")
        self._url = url

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

    def modified(self, path: str) -> float:
        at: datetime = self.fs.modified(self._full(path))
        return at.timestamp()

    def used(self, folder: str) -> int:
        self.fs.invalidate_cache()
        return sum(int(found["size"] or 0) for found in self.fs.find(self._full(folder), detail=True).values())

    def unfinished(self) -> Iterator[Found]:
        """On S3 the uploads in parts that nobody has completed yet: no listing of files shows them, every bill does."""
        if not self._url.startswith(_S3):
            return
        bucket, _, below = self.root.partition("/")
        more: dict[str, str] = {"Bucket": bucket, "Prefix": f"{below}/" if below else ""}
        while True:
            answer = self.fs.call_s3("list_multipart_uploads", **more)
            for upload in answer.get("Uploads", ()):
                path = upload["Key"][len(more["Prefix"]) :]
                yield Found(path=path, bytes=0, modified=upload["Initiated"].timestamp(), upload=upload["UploadId"])
            if not answer.get("IsTruncated"):
                return
            more |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    def remove(self, found: Found) -> None:
        if not found.upload:
            self.delete(found.path)
            return
        bucket, _, key = self._full(found.path).partition("/")
        self.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=found.upload)

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root


def _of_nobody(loop: Any, context: dict[str, Any]) -> None:
    """What is told of a task that nobody awaits. When a connection breaks aiohttp leaves its writer's behind: the
    request has failed, and whoever made it says so."""
    if not isinstance(context.get("exception"), ConnectionError):
        loop.default_exception_handler(context)


def _options(url: str) -> dict[str, Any]:
    """What fsspec's driver of a scheme is told, where the user's own configuration of fsspec says nothing of it."""
    if not url.startswith(_S3):
        return {}
    from fsspec.config import conf  # type: ignore[import-untyped,unused-ignore]

    if any("config_kwargs" in conf.get(scheme, {}) for scheme in ("s3", "s3a")):
        return {}
    # botocore would try five times within some seconds; whoever waits here does so for longer, and says so.
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 10}}


class Memory(Objects):
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

    def used(self, folder: str) -> int:
        with self._lock:
            return super().used(folder)

    def size(self, path: str) -> int:
        # fsspec's info walks through every file there is.
        try:
            return int(self.fs.store[self._full(path)].size)
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
