from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator.store import paths
from orchestrator.store.checkpoints import Checkpoints, Place
from orchestrator.store.files import Files
from orchestrator.store.states import States
from tests.contracts.store import safetensors
from tests.faulty import Faulty

KEY, OTHER = "a" * 64, "b" * 64


@pytest.fixture(params=["folder", "memory", "objects"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    urls = {"folder": str(tmp_path), "memory": f"memory://{uuid4().hex}", "objects": Faulty(uuid4().hex).url}
    return Files(urls[request.param])


def data(key: str, position: int, study: str = "s") -> bytes:
    return safetensors({"key": key, "position": str(position), "study": study})


def written(files: Files, *places: tuple[str, int]) -> Checkpoints:
    checkpoints = Checkpoints(files)
    for key, position in places:
        checkpoints.write(Place(key=key, position=position), data(key, position))
    return checkpoints


def test_the_last_one_counts_and_all_go_together(files: Files) -> None:
    checkpoints = written(files, (KEY, 9), (KEY, 10), (KEY, 100), (OTHER, 7))
    assert checkpoints.positions() == {KEY: 100, OTHER: 7}
    assert checkpoints.latest(KEY) == data(KEY, 100)
    assert checkpoints.study(Place(key=OTHER, position=7)) == "s"
    checkpoints.delete_all(KEY)
    assert checkpoints.positions() == {OTHER: 7}
    assert checkpoints.latest(KEY) is None
    checkpoints.delete(Place(key=KEY, position=9))


def test_nobody_takes_one_for_a_finished_state(files: Files) -> None:
    written(files, (KEY, 9))
    states = States(files)
    assert not states.has(KEY) and states.header(KEY) is None and list(states.keys()) == []


def test_a_whole_one_takes_the_place_of_a_torn_one(files: Files) -> None:
    files.write(paths.checkpoint(KEY, 9), data(KEY, 9)[:-3])
    checkpoints = written(files, (KEY, 9))
    assert checkpoints.latest(KEY) == data(KEY, 9)


def test_a_torn_or_foreign_one_is_set_aside_and_the_one_before_it_counts(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = written(files, (KEY, 9))
    files.write(paths.checkpoint(KEY, 20), data(KEY, 20)[:-3])
    files.write(paths.checkpoint(KEY, 30), data(OTHER, 30))
    files.write(paths.checkpoint(KEY, 40), b"\x80\x04cos\nsystem\n.")  # a pickle
    files.write(f"{paths.CHECKPOINTS}/notes.txt", b"not ours")
    assert checkpoints.latest(KEY) == data(KEY, 9)
    assert checkpoints.positions() == {KEY: 9}
    assert caplog.text.count("is no whole checkpoint; moved to set-aside/") == 3


def test_names_sort_by_position() -> None:
    names = [paths.checkpoint(KEY, position) for position in (0, 9, 10, 10**11)]
    assert names == sorted(names)
    assert paths.parse_checkpoint(names[2].rpartition("/")[2]) == (KEY, 10)
    assert paths.parse_checkpoint(f"{KEY}.safetensors") is None
