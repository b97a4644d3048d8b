"""What a worker writes to its own machine's disk: nothing but what the user's code writes there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator import Study
from orchestrator.pools.local import LocalPool
from tests.orchestrator.pools import mortal
from tests.orchestrator.pools.mortal import ticking

_watched: list[list[str]] = []
"""Who listens: a hook cannot be taken away again."""


def hear(event: str, arguments: tuple[object, ...]) -> None:
    if not _watched:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or (isinstance(mode, str) and set(mode) & set("wax+"))) and isinstance(path, str | os.PathLike):
            _watched[-1].append(os.fspath(path))
    elif event in ("os.mkdir", "tempfile.mkdtemp", "tempfile.mkstemp"):
        _watched[-1].append(str(arguments[0]))


@pytest.fixture
def written() -> Iterator[list[str]]:
    """The files and folders that are written or made from here on."""
    sys.addaudithook(hear)
    _watched.append([])
    yield _watched[0]
    _watched.clear()


def test_a_worker_writes_to_the_store_alone_checkpoints_too(tmp_path: Path, written: list[str]) -> None:
    study = Study(
        mortal.spec(tmp_path, checkpoint_minutes=1 / 60), f"memory://{uuid4().hex}", root=mortal.write_task(tmp_path)
    )
    written.clear()
    assert study.run(LocalPool(ticking())).done == 2
    ours = {path for path in written if path != os.devnull and "__pycache__" not in path}
    assert ours == {str(tmp_path / "batches")}, "which is the user's own"
