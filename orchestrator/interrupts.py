"""Ctrl-C and SIGTERM, which stop a command alike: when they are heard, when they wait, and what a third one does."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)
"""Batch systems end a job with SIGTERM: it stops as cleanly as with Ctrl-C."""

LONGEST_WAIT_SECONDS = 5.0
"""An import is waited for so long."""

MOST_HELD = 2
"""Whoever presses once more than so often does not wait any longer."""


@contextmanager
def heard(last_words: Callable[[], str]) -> Iterator[None]:
    """Within the block the first signal raises KeyboardInterrupt, which is then cleaned up after in peace: the second
    changes nothing, and the third ends the process at once with exit code 130, after `last_words` on stderr. After an
    interrupted block signals do nothing, nor while a process that is done takes itself apart.

    The first waits for the end of an import, though not for long: an interrupted import can leave its module locked
    for good, and a thread that imports it too would never end. One that nobody hears comes again: what is raised in a
    destructor, or in what a library runs around a fork, goes no further.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised, began, more = False, 0.0, 0

    def again() -> None:
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal raised, began, more
        if raised:
            more += 1
            if more > 1:
                _end_at_once(last_words())
            os.write(2, b"stopping; once more ends it at once\n")
            return
        began = began or time.monotonic()
        if _importing(frame) and time.monotonic() - began < LONGEST_WAIT_SECONDS:
            again()
            return
        raised = True
        raise KeyboardInterrupt

    def unheard(ignored: sys.UnraisableHookArgs) -> None:
        nonlocal raised
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            raised = False
            again()
        else:
            said(ignored)

    said, sys.unraisablehook = sys.unraisablehook, unheard
    before = {number: signal.signal(number, handle) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if raised else handler)
        sys.unraisablehook = said
        atexit.unregister(_hear_nothing)
        atexit.register(_hear_nothing)


@contextmanager
def held() -> Iterator[None]:
    """Within the block signals wait for its end, so that what is begun is done whole; a third one does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    caught: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > MOST_HELD and callable(before[number]):
            presses = len(caught)
            caught.clear()
            for _ in range(presses - 1):
                with suppress(KeyboardInterrupt):
                    before[number](number, frame)
            before[number](number, frame)

    for number in STOPS:
        if (handler := signal.getsignal(number)) is not None:  # None: set by other than Python, and not ours to restore
            before[number] = handler
            signal.signal(number, later)
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
        if caught:
            signal.raise_signal(caught[0])


@contextmanager
def noticed(asked: list[int]) -> Iterator[None]:
    """Within the block every Ctrl-C and SIGTERM is noted in `asked`, whatever other people's code makes of the
    KeyboardInterrupt; one that such code raises by itself is not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Callable[[int, FrameType | None], object]] = {
        number: handler for number in STOPS if callable(handler := signal.getsignal(number))
    }

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        before[number](number, frame)

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


def _hear_nothing() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _end_at_once(last_words: str) -> None:
    """Nobody is left to end what this process has started."""
    for pid in list(_descendants(os.getpid())):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os.write(2, f"{last_words}\n".encode())
    os._exit(130)


def _descendants(pid: int) -> Iterator[int]:
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, listed.read_text().split()):
                yield child
                yield from _descendants(child)
