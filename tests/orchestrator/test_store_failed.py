"""A store that fails in the middle of a run is no wrong input: exit code 1, and the same command goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import InputError, StoreError, StoreFailed, StoreFull
from orchestrator.store.folder import Folder
from orchestrator.store.lease import Lease
from tests.orchestrator.test_cli import Shell, place, shell

__all__ = ["place", "shell"]

RUN = ("run", "study.toml", "--local")
METHODS = ("read", "write", "create", "list", "delete", "modified")


def failing(monkeypatch: pytest.MonkeyPatch, number: int, once: Callable[[Folder], bool]) -> None:
    """From the moment at which `once` says so, the disk fails with this error, whatever is asked of it."""
    monkeypatch.setenv("ORCHARDIST_PATIENCE_SECONDS", "0.2")
    for name in METHODS:
        real = getattr(Folder, name)

        def act(folder: Folder, *arguments: object, real: Callable[..., object] = real) -> object:
            if once(folder):
                raise OSError(number, os.strerror(number))
            return real(folder, *arguments)

        monkeypatch.setattr(Folder, name, act)


def under_way(folder: Folder) -> bool:
    return len(list(Path(folder.root).glob("states/*/*.safetensors"))) > 2


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EIO, "what is finished is kept: run it again to go on"),
        (errno.ENOSPC, "free some room and run it again: what is finished is not lost"),
    ],
)
def test_a_run_whose_store_fails_ends_with_1_and_the_same_command_goes_on(
    place: Path, shell: Shell, number: int, says: str
) -> None:
    with pytest.MonkeyPatch.context() as broken:
        failing(broken, number, under_way)
        failed = shell(*RUN)
    assert failed.code == 1, failed.err
    said = [line for line in failed.err.splitlines() if "in the store" in line or says in line]
    assert says in said[-1] and "Traceback" not in failed.err
    done = shell(*RUN)
    assert done.code == 0 and "4/4 trials" in done.err


def test_a_store_that_fails_before_the_study_begins_is_wrong_input(place: Path, shell: Shell) -> None:
    with pytest.MonkeyPatch.context() as broken:
        failing(broken, errno.EIO, lambda folder: True)
        assert shell(*RUN).code == 2


def test_a_study_that_was_taken_over_is_still_refused(
    place: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Lease) -> None:
        self.lost = "study small was taken over by another"
        raise StoreError(self.lost)

    monkeypatch.setattr(Lease, "check", lost)
    refused = shell(*RUN)
    assert refused.code == 2 and "was taken over by another" in refused.err


def test_the_family_tells_them_apart() -> None:
    assert not issubclass(StoreFailed, InputError) and issubclass(StoreFull, InputError)
