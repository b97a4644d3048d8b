"""An object store in memory whose n-th call goes wrong as the test wishes: `faulty://NAME/…` for fsspec."""

from __future__ import annotations

import errno
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import fsspec  # type: ignore[import-untyped,unused-ignore]

FAULTS = ("fails", "is lost", "comes late", "is done twice", "is torn", "finds the disk full", "kills")
"""What may happen to a call: an error and nothing done; done, but the answer is lost; an error now, and done some calls
later; done, and done again as a repeated request is; half of the data are written, and an error; no room; or the
process does not live to see the answer, and neither does any later call of it."""

PASSING = FAULTS[:5]
"""Those that are over when the call is tried again."""


class Killed(BaseException):
    """What a killed process would not live to see."""


@dataclass
class Faulty:
    """The server's side. `faults` maps the number of a call, from 1, to what happens to it."""

    name: str
    faults: dict[int, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    calls: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """How many calls there were of each kind: get, put, head, list, delete."""
    down: str = ""
    """While it is set every call ends in this fault."""
    late_by: int = 5

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self._late: list[tuple[int, Callable[[], Any]]] = []
        FaultyFileSystem.servers[self.name] = self

    @property
    def url(self) -> str:
        return f"faulty://{self.name}/root"

    def call(self, kind: str, act: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
        """The call's answer, or its fault; `torn` does half of it."""
        with self.lock:
            self.calls += 1
            self.counts[kind] += 1
            for due, late in [entry for entry in self._late if entry[0] <= self.calls]:
                self._late.remove((due, late))
                _quietly(late)
            match self.down or self.faults.get(self.calls, ""):
                case "fails":
                    raise OSError(errno.EIO, "the call failed")
                case "is lost":
                    _quietly(act)
                    raise TimeoutError("the answer is lost")
                case "comes late":
                    self._late.append((self.calls + self.late_by, act))
                    raise TimeoutError("no answer yet")
                case "is done twice":
                    act()
                case "is torn" if torn is not None:
                    torn()
                    raise OSError(errno.EIO, "the connection broke")
                case "finds the disk full" if torn is not None:
                    raise OSError(errno.ENOSPC, "No space left on device")
                case "kills":
                    self.down = "kills"
                    if threading.current_thread() is threading.main_thread():
                        raise Killed
                    raise PermissionError(errno.EPERM, "the process is dead")
            return act()


def random_faults(seed: int, among: tuple[str, ...], *, calls: int, count: int) -> dict[int, str]:
    """`count` faults within the first `calls` calls."""
    draw = random.Random(seed)
    return {number: draw.choice(among) for number in draw.sample(range(1, calls + 1), count)}


def _quietly(act: Callable[[], Any]) -> None:
    """What nobody waits for: a condition that does not hold is nobody's business either."""
    with suppress(OSError):
        act()


class FaultyFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc,unused-ignore]
    """The client's side: as much of fsspec as a store needs. A put is whole, unless it is torn on purpose."""

    protocol = "faulty"
    cachable = False
    servers: ClassVar[dict[str, Faulty]] = {}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        server, name = self._at(path)

        def get() -> bytes:
            if name not in server.objects:
                raise FileNotFoundError(path)
            return server.objects[name][start:end]

        return bytes(server.call("get", get))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        server, name = self._at(path)

        def put(data: bytes) -> None:
            if mode == "create" and name in server.objects:
                raise FileExistsError(path)
            server.objects[name] = data

        server.call("put", lambda: put(value), lambda: put(value[: len(value) // 2]))

    def info(self, path: str, **_: Any) -> Mapping[str, Any]:
        server, name = self._at(path)

        def head() -> Mapping[str, Any]:
            if name not in server.objects:
                raise FileNotFoundError(path)
            return {"name": path, "type": "file", "size": len(server.objects[name])}

        found: Mapping[str, Any] = server.call("head", head)
        return found

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[str]:
        assert not detail
        server, name = self._at(path)
        prefix = f"{name}/" if name else ""

        def names() -> list[str]:
            below = [each for each in server.objects if each.startswith(prefix)]
            return sorted({prefix + each[len(prefix) :].partition("/")[0] for each in below})

        found: list[str] = server.call("list", names)
        return [f"{server.name}/{each}" for each in found]

    def rm_file(self, path: str) -> None:
        server, name = self._at(path)
        server.call("delete", lambda: server.objects.pop(name, None))

    def _at(self, path: str) -> tuple[Faulty, str]:
        server, _, name = self._strip_protocol(path).partition("/")
        return self.servers[server], name


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
