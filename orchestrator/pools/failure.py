"""What a worker says of an error that a stage, or the user's code in it, has raised: short, and without secrets."""

from __future__ import annotations

import os
import re
import traceback

import torch

from orchestrator.errors import NotFinite, StageFailed, StoreError, TimedOut
from orchestrator.store.address import without_secrets

MOST_LETTERS = 2_000
"""Of a message."""

MOST_LINES, LONGEST_LINE = 100, 500
"""Of a traceback: the last lines say where it was."""

_READ = 200_000
"""More letters than this of a text are not even looked at."""

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

_NO_GPU_MEMORY = ("CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""How CUDA's libraries say so in errors of other kinds."""


def kind_of(error: BaseException) -> str:
    """One of the kinds in `protocol.Failed` that are an error's."""
    said = _words(error)
    if isinstance(error, NotFinite):
        return "diverged"
    if isinstance(error, TimedOut):
        return "timed out"
    if isinstance(error, torch.OutOfMemoryError) or any(words in said for words in _NO_GPU_MEMORY):
        return "out of GPU memory"
    if isinstance(error, StoreError):
        return "store"
    if isinstance(error, MemoryError) or "not enough memory" in said:
        return "out of memory"
    return "raised"


def message_of(error: BaseException) -> str:
    """What an error says, in one line; with the name of its kind where that is not one of our own."""
    ours = isinstance(error, StageFailed | StoreError)
    said = readable(_words(error) if ours else f"{type(error).__name__}: {_words(error)}")
    return _cut(re.sub(r"\s*\n\s*", " ", said), MOST_LETTERS)


def traceback_of(error: BaseException) -> str:
    """Where an error comes from."""
    try:
        text = readable("".join(traceback.format_exception(error)))
    except BaseException as trouble:  # the user's own class may answer anything, to be asked for its name, too
        return f"it cannot be told: {type(trouble).__name__}"
    return "\n".join(_cut(line, LONGEST_LINE) for line in text.splitlines()[-MOST_LINES:])


def readable(text: str) -> str:
    """What every file and terminal takes, without what this process is to keep to itself."""
    said = without_secrets(text[:_READ].encode("utf-8", "backslashreplace").decode(), os.environ)
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", said)


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as trouble:  # the user's own __str__ may raise anything, too
        return f"what it says cannot be read: its __str__ raises {type(trouble).__name__}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
