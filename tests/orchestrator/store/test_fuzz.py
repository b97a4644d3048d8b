"""Stores with bytes flipped, files cut off, gone, renamed or planted: no traceback, no hang, and nothing intact lost."""

from __future__ import annotations

import logging
import os
import pickle
import random
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator import Study
from orchestrator.errors import OrchardistError
from orchestrator.pools.local import LocalPool
from orchestrator.store import Store
from tests.faulty import Faulty, Killed
from tests.orchestrator.pools import small
from tests.orchestrator.store.conftest import hurry

Objects = Mapping[str, bytes]


MARKER = Path(tempfile.gettempdir()) / f"unpickled-{uuid4().hex}"


class Planted:
    """What it does when it is unpickled is seen."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(MARKER),)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_task(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def stores(root: Path) -> list[Objects]:
    """A study that has ended, and one whose driver was killed in the middle."""
    found: list[Objects] = []
    for killed_at in (None, 60):
        server = Faulty(uuid4().hex, {killed_at: "kills"} if killed_at else {})
        study = Study(small.spec(), server.url, root=root)
        if killed_at is None:
            study.run(LocalPool())
        else:
            with pytest.raises(Killed):
                study.run(LocalPool())
        found.append(dict(server.objects))
    assert any("outcomes.parquet" in path for path in found[0])
    assert sum("/ledger/" in path for path in found[1]) > 1
    return found


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.CRITICAL, "orchardist")
    hurry(monkeypatch)  # a damaged lease says of nobody here that he holds the study


def mutated(before: Objects, draw: random.Random) -> dict[str, bytes]:
    objects = dict(before)
    for _ in range(draw.randint(1, 4)):
        path = draw.choice(sorted(objects))
        data = objects[path]
        match draw.choice(["flip", "cut", "remove", "rename", "swap", "empty", "foreign", "pickle", "plant"]):
            case "flip" if data:
                changed = bytearray(data)
                for _ in range(draw.randint(1, 8)):
                    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
                objects[path] = bytes(changed)
            case "cut":
                objects[path] = data[: draw.randrange(len(data) + 1)]
            case "remove":
                del objects[path]
            case "rename":
                folder, _, name = path.rpartition("/")
                objects[f"{folder}/{draw.choice(['x', name[:-1], name.swapcase(), '9' + name])}"] = objects.pop(path)
            case "swap":
                other = draw.choice(sorted(objects))
                objects[path], objects[other] = objects[other], data
            case "empty":
                objects[path] = b""
            case "foreign":
                objects[path] = draw.randbytes(draw.randrange(200))
            case "pickle":
                objects[path] = pickle.dumps(Planted())
            case "plant":
                folder = path.rpartition("/")[0]
                name = draw.choice(["x.pkl", "000009-00000001-events.parquet", "000009.json", "999999.beat", "a b/c"])
                objects[f"{folder}/{name}"] = draw.choice([b"", b"{}", pickle.dumps(Planted()), data])
    return objects


def check_readers(url: str, folder: Path) -> None:
    """What only looks at the store works, or says in its own words what is wrong."""
    looks: list[Callable[[], object]] = [
        Store(url).studies,
        lambda: list(Store(url).states.keys()),
        lambda: Study.open(url, "small").status(),
        lambda: Study.open(url, "small").front(),
        lambda: Study.open(url, "small").front(["accuracy >= 0.1"], "nonzero_params"),
        lambda: Study.open(url, "small").table(),
        lambda: Study.open(url, "small").fetch(None, folder),
    ]
    for look in looks:
        with suppress(OrchardistError):
            look()


def check_mutated(before: Objects, seed: int, folder: Path, root: Path, *, run: bool) -> None:
    server = Faulty(uuid4().hex)
    server.objects = mutated({path.removeprefix("root/"): data for path, data in before.items()}, random.Random(seed))
    server.objects = {f"root/{path}": data for path, data in server.objects.items()}
    intact = {path: data for path, data in server.objects.items() if before.get(path) == data}
    check_readers(server.url, folder)
    assert all(server.objects.get(path) == data for path, data in intact.items()), "a reader lost something"
    if run:
        study = Study(small.spec(), server.url, root=root)
        with suppress(OrchardistError):
            study.run(LocalPool())
        lost = [path for path in intact if path not in server.objects and path.startswith("root/states/")]
        assert not lost
        check_readers(server.url, folder)


@pytest.mark.parametrize(
    ("seeds", "run_every"), [(range(60), 20), pytest.param(range(60, 1060), 10, marks=pytest.mark.slow)]
)
def test_mutated_stores(seeds: range, run_every: int, stores: list[Objects], root: Path, tmp_path: Path) -> None:
    for seed in seeds:
        try:
            check_mutated(stores[seed % 2], seed, tmp_path / str(seed), root, run=seed % run_every == 0)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    assert not MARKER.exists(), "a planted pickle was loaded"


def test_the_canary_pickle_would_be_seen() -> None:
    pickle.loads(pickle.dumps(Planted()))
    assert MARKER.exists()
    MARKER.rmdir()
