"""A study's doings as JSON lines, one for each thing that happened, for machines to read.

A line is an object with `at` (seconds since 1970 UTC), `level`, `study` and `event`, and of these what applies: `trial`
(-1: the dense model, -2: a control), `round`, `seed`, `key` (of a state), `worker` (HOST:PID), `seconds`, and whatever
else the event says, as in the ledger. What warns in words has `event` "message" and the words under `message`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from orchestrator.canonical import finite
from orchestrator.errors import InputError
from orchestrator.store.address import without_credentials

DOINGS = logging.getLogger("orchardist.doings")
"""Where every doing is said, under `said`."""

_ROOT = logging.getLogger("orchardist")


def doing(study: str, event: str, said: Mapping[str, Any]) -> None:
    """Say what happened; costs next to nothing while nobody listens."""
    if DOINGS.isEnabledFor(logging.INFO):
        DOINGS.info(event, extra={"said": {"study": study, "event": event, **said}})


@contextmanager
def lines_to(path: str | None) -> Iterator[None]:
    """Within the block every doing and every warning goes to the file at `path` as a JSON line; "-": to stderr.

    Lines are added at the end of a file that is there. None: nobody listens.

    Raises:
        InputError: the file cannot be written.
    """
    if path is None:
        yield
        return
    try:
        handler = logging.StreamHandler(sys.stderr) if path == "-" else logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--log {path} cannot be written: {error.strerror}") from error
    handler.setFormatter(JsonLines())
    before = _ROOT.level, _ROOT.propagate
    _ROOT.addHandler(handler)
    _ROOT.setLevel(logging.INFO)
    _ROOT.propagate = path != "-" and before[1]  # on stderr a warning is not to stand there twice
    try:
        yield
    finally:
        _ROOT.removeHandler(handler)
        _ROOT.setLevel(before[0])
        _ROOT.propagate = before[1]
        handler.close()


class JsonLines(logging.Formatter):
    """Each record as one line of JSON, without credentials in whatever URL it has."""

    def format(self, record: logging.LogRecord) -> str:
        """See the module's docstring."""
        said: Mapping[str, Any] = getattr(record, "said", {"event": "message", "message": record.getMessage()})
        told = {name: value for name, value in said.items() if value not in (None, "")}
        line = {"at": round(record.created, 3), "level": record.levelname.lower(), **told}
        return json.dumps(_open(finite(line)), default=str, ensure_ascii=False, allow_nan=False)


def _open(said: Any) -> Any:
    """Without credentials in any text: in the whole line what hides them would not stop at a text's end."""
    if isinstance(said, Mapping):
        return {name: _open(value) for name, value in said.items()}
    if isinstance(said, list | tuple):
        return [_open(value) for value in said]
    return said if isinstance(said, bool | int | float | None) else without_credentials(str(said))
