"""What a kind of storage must do for `Files`: whole files under relative paths with forward slashes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

Data: TypeAlias = bytes | memoryview


@dataclass(frozen=True, kw_only=True)
class Found:
    """Something that a writer began and has not finished."""

    path: str
    bytes: int
    modified: float
    """By the storage's own clock, in seconds since 1970."""
    upload: str = ""
    """On S3 the number of an upload in parts."""


class Backend(Protocol):
    """Raises whatever its driver raises; an absent file is a `FileNotFoundError`."""

    root: str

    def read(self, path: str, start: int, end: int | None) -> bytes: ...
    def map(self, path: str) -> Data: ...
    def write(self, path: str, data: Data) -> None: ...
    def create(self, path: str, data: Data) -> bool: ...
    def size(self, path: str) -> int: ...
    def list(self, folder: str) -> list[str]: ...
    def delete(self, path: str) -> None: ...

    def modified(self, path: str) -> float:
        """When the file was written, by the storage's own clock, in seconds since 1970."""
        ...

    def used(self, folder: str) -> int:
        """The bytes of everything in a folder; 0 without one."""
        ...

    def unfinished(self) -> Iterator[Found]:
        """What writers began and have not finished; they may be dead or still at work."""
        ...

    def remove(self, found: Found) -> None: ...
