"""Trainings in the middle: a state every few minutes, so that whoever takes over goes on from there.

A checkpoint lies under the key of the stage that is being trained and its position. It is never under a state's name:
nobody takes it for finished. It goes when the stage is done; what a killed worker leaves is swept with its study.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.header import read_header
from orchestrator.store import paths
from orchestrator.store.files import Files
from orchestrator.store.states import metadata_of


@dataclass(frozen=True, order=True, kw_only=True)
class Place:
    """Where a training was: a stage's key and a position in optimizer steps."""

    key: str
    position: int


class Checkpoints:
    """The checkpoints of one store. A torn or foreign file is reported and set aside: it is absent."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def places(self) -> Iterator[Place]:
        """Every checkpoint there is, in order; the store is asked once."""
        for name in self.files.list(paths.CHECKPOINTS):
            found = paths.parse_checkpoint(name)
            if found is not None:
                yield Place(key=found[0], position=found[1])

    def positions(self) -> dict[str, int]:
        """By key the last position there is."""
        return {place.key: place.position for place in self.places()}

    def write(self, place: Place, data: bytes) -> None:
        """Make a whole safetensors file durable, over whatever a killed worker may have left there."""
        self.files.write(paths.checkpoint(place.key, place.position), data)

    def latest(self, key: str) -> bytes | None:
        """The last whole checkpoint of a stage; None where there is none."""
        for place in reversed([place for place in self.places() if place.key == key]):
            path = paths.checkpoint(key, place.position)
            try:
                data = self.files.read(path)
            except FileNotFoundError:
                continue  # somebody has finished the stage, or gone further
            if _is_of(place, data):
                return data
            self.files.set_aside(path, "is no whole checkpoint", lambda data, place=place: not _is_of(place, data))  # type: ignore[misc]
        return None

    def size(self, place: Place) -> int:
        """In bytes. Raises `FileNotFoundError` when the checkpoint is absent."""
        return self.files.size(paths.checkpoint(place.key, place.position))

    def age(self, place: Place) -> float:
        """Seconds since it was written, by the store's own clock. Raises `FileNotFoundError` as `size` does."""
        return self.files.age(paths.checkpoint(place.key, place.position))

    def study(self, place: Place) -> str | None:
        """The study for which it was written; None where the checkpoint is absent, torn or foreign."""
        try:
            header = metadata_of(self.files, paths.checkpoint(place.key, place.position))
        except FileNotFoundError:
            return None
        return None if header is None else header.get("study")

    def delete(self, place: Place) -> None:
        """Nothing happens when the checkpoint is absent."""
        self.files.delete(paths.checkpoint(place.key, place.position))

    def delete_all(self, key: str) -> None:
        """Every checkpoint of a stage that is done."""
        for place in list(self.places()):
            if place.key == key:
                self.delete(place)


def _is_of(place: Place, data: bytes) -> bool:
    """Whether the file is a whole checkpoint of that stage at that position."""
    try:
        header = read_header(data)
    except ValueError:
        return False
    return header.get("key") == place.key and header.get("position") == str(place.position)
