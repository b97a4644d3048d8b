"""The states that a worker lately made or read, in memory, and how much of the machine they may take."""

from __future__ import annotations

import math
import os
import platform
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from orchestrator.errors import InputError

MOST_BYTES = 4 << 30
"""Nobody who does not ask for it has more than this held in one worker."""

SHARE = 8
"""Of the memory that would be a worker's, one part in so many is for recent states."""

_GIGABYTE = 10**9

Held = TypeVar("Held")


class Recent(Generic[Held]):
    """Values by key up to a number of bytes in all, of which the last one stays whatever its size; the one that was
    least lately used goes first."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._held: OrderedDict[str, tuple[Held, int]] = OrderedDict()

    def get(self, key: str) -> Held | None:
        """The value of a key, if it is still here."""
        return self._held[key][0] if key in self._held else None

    def hold(self, key: str, value: Held, size: int) -> None:
        """Keep a value, which takes `size` bytes, as the one last used."""
        self._drop(key)
        self._held[key] = value, size
        self.bytes += size
        while len(self._held) > 1 and self.bytes > self.most_bytes:
            self._drop(next(iter(self._held)))

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self.bytes = 0

    def _drop(self, key: str) -> None:
        if key in self._held:
            self.bytes -= self._held.pop(key)[1]


def asked_bytes(gigabytes: float | None) -> int | None:
    """What `--cache-gb F` asks for; None where nobody asked.

    Raises:
        InputError: it is no amount of memory.
    """
    if gigabytes is None:
        return None
    if not 0 <= gigabytes <= 1e6:  # nor NaN
        raise InputError(f"--cache-gb {gigabytes:g}: legal: gigabytes for each worker, such as 0.5; 0: the last state")
    return round(gigabytes * _GIGABYTE)


def cache_bytes(asked: int | None, workers: int | None, memory: int, cores: int) -> int:
    """How many bytes of recent states a worker on a machine may hold.

    Args:
        asked: by the user; None: an eighth of a worker's part of the memory, up to `MOST_BYTES`.
        workers: how many there are at most; None: one for each core.
        memory: of the machine, in bytes.
        cores: of the machine.

    Raises:
        InputError: a single worker would take more than there is.
    """
    if asked is None:
        return min(MOST_BYTES, memory // max(1, min(workers or cores, cores)) // SHARE)
    if asked > memory:
        raise InputError(
            f"--cache-gb {asked / _GIGABYTE:g}: there are {memory / _GIGABYTE:.1f} GB of memory on {platform.node()}; "
            "legal: less, for each of its workers"
        )
    return asked


def machine(cgroups: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> tuple[int, int]:
    """Memory in bytes and cores that this process may use: the machine's, or less where its container or batch system
    says so."""
    memory = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    cores = [float(os.cpu_count() or 1)]
    for folder in _groups(cgroups, mine):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # a limit of "max" is none
                memory.append(int((folder / name).read_text()))
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            cores.append(int(quota) / int(period))
    return min(memory), max(1, math.ceil(min(cores)))


def _groups(cgroups: Path, mine: Path) -> Iterator[Path]:
    """The control groups of this process that may limit its memory or cores, with those that they are in."""
    with suppress(OSError):
        for line in mine.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = cgroups / "memory" if controllers else cgroups
            folder = Path(group.lstrip("/"))
            yield from (top / each for each in (folder, *folder.parents))
