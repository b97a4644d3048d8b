from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator import Study, retention
from orchestrator.errors import StoreFailed
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Event
from orchestrator.store import Store
from orchestrator.store.objects import Objects
from tests import servers
from tests.contracts.store import CHECKS
from tests.faulty import Faulty
from tests.orchestrator.pools import small
from tests.orchestrator.store.conftest import reach
from tests.servers import BUCKET, Server


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[str], None], s3: str) -> None:
    check(s3)


# --- Whole studies -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_task(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The small study as it comes out on a local folder."""
    study = Study(small.spec(), tmp_path_factory.mktemp("undisturbed"), root=root)
    assert study.run(LocalPool()).done == 6
    return study


STANDS = ("state", "trials", "failures")


def assert_same(study: Study, undisturbed: Study) -> None:
    """The same keys, weights, front and counts; nothing twice."""
    mine, theirs = small.models(study.store), small.models(undisturbed.store)
    assert mine.keys() == theirs.keys()
    assert all(small.same_bits(mine[key], theirs[key]) for key in mine)
    assert [point["key"] for point in study.front().points] == [point["key"] for point in undisturbed.front().points]
    one, other = study.status(), undisturbed.status()
    assert {what: one[what] for what in STANDS} == {what: other[what] for what in STANDS}
    assert [one[what]["asked"] for what in ("epochs", "stages")] == [
        other[what]["asked"] for what in ("epochs", "stages")
    ]
    trials = study.store.table("small", "proposals", ["trial"])["trial"].to_pylist()
    assert sorted(trials) == list(range(6))
    done = [row["trial"] for row in study.store.table("small", "events").to_pylist() if row["event"] == "done"]
    assert sorted(done) == list(range(6))


def test_a_whole_study(s3: str, root: Path, undisturbed: Study) -> None:
    study = Study(small.spec(), s3, root=root)
    assert study.run(LocalPool()).done == 6
    assert_same(Study.open(s3, "small"), undisturbed)
    assert study.run(LocalPool()).done == 6, "nothing is left to do"
    assert_same(study, undisturbed)
    assert len(study.store.files.list("studies/small/ledger")) == 3
    folder = study.fetch(None, root / "fetched")
    assert (folder / "card.json").exists()


class Killing(LocalPool):
    """Kills the server as it hands over its n-th report; it comes back some time later, or never."""

    def __init__(self, server: Server, at: int, back_after: float | None) -> None:
        super().__init__()
        self._server = server
        self._left = at
        self._back_after = back_after
        self.coming: threading.Thread | None = None

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        events = super().completed(timeout_seconds)
        self._left -= 1
        if self._left == 0:
            self._server.kill()
            if self._back_after is not None:
                self.coming = threading.Timer(self._back_after, self._server.start)
                self.coming.start()
        return events


@pytest.fixture
def mortal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A SeaweedFS of the test's own."""
    with servers.seaweed(tmp_path) as server:
        reach(server, monkeypatch)
        yield server


@pytest.mark.parametrize("at", [9, pytest.param(2, marks=pytest.mark.slow)])
def test_a_store_that_is_killed_and_comes_back(
    mortal: Server, at: int, root: Path, undisturbed: Study, caplog: pytest.LogCaptureFixture
) -> None:
    study = Study(small.spec(), f"s3://{BUCKET}/root", root=root)
    pool = Killing(mortal, at, back_after=2.0)
    with caplog.at_level(logging.WARNING, "orchardist.store"):
        assert study.run(pool).done == 6
    assert pool.coming is not None
    pool.coming.join()
    assert "answers again" in caplog.text
    assert_same(study, undisturbed)


def test_a_store_that_stays_away_ends_the_run_clearly_and_nothing_is_lost(
    mortal: Server, root: Path, undisturbed: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "orchardist")
    monkeypatch.setenv("ORCHARDIST_PATIENCE_SECONDS", "0.2")
    study = Study(small.spec(), f"s3://{BUCKET}/root", root=root)
    said = r"^cannot \w+ .*s3://orchard/root: .*\(waited \d+ s\)\nwhat is finished is kept: run it again to go on$"
    with pytest.raises(StoreFailed, match=said) as caught:
        study.run(Killing(mortal, 5, back_after=None))
    assert servers.SECRET_KEY not in str(caught.value)
    mortal.start()
    monkeypatch.delenv("ORCHARDIST_PATIENCE_SECONDS")  # a server that has just come up is not at once itself
    assert study.run(LocalPool()).done == 6
    assert_same(study, undisturbed)


def test_of_two_drivers_one_runs(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, sys\n"
        "from orchestrator.errors import StoreError\n"
        "from orchestrator.store import Files, acquire\n"
        "files = Files(sys.argv[1])\n"
        "files.exists('warm')\n"
        "print('ready', flush=True)\n"
        "for study in sys.stdin:\n"
        "    try:\n"
        "        print(acquire(files, study.strip(), host='h', pid=os.getpid(), boot='b').epoch, flush=True)\n"
        "    except StoreError as error:\n"
        "        assert 'stop it first' in str(error)\n"
        "        print('refused', flush=True)\n"
    )
    with ExitStack() as stack:
        both = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code, s3], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for _ in range(2)
        ]
        assert [answer(process) for process in both] == ["ready", "ready"]
        for turn in range(50):
            for process in both:
                assert process.stdin is not None
                process.stdin.write(f"s{turn}\n")
                process.stdin.flush()
            assert sorted(answer(process) for process in both) == ["1", "refused"]
        for process in both:
            process.communicate()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("s3", ["seaweed", "moto"], indirect=True)
def test_uploads_that_were_never_completed_are_swept(
    s3: str, root: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    study = Study(small.spec(trials=1), s3, root=root)
    study.run(LocalPool())
    backend = study.store.files._backend
    assert isinstance(backend, Objects)
    bucket, _, below = backend.root.partition("/")
    name = f"states/cc/{'c' * 64}.safetensors"
    for key in (f"{below}/{name}", f"{below}x/{name}"):
        upload = backend.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
        backend.fs.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"part")
    if "seaweed" in request.node.name:  # moto says that every upload began in 2010
        assert study.sweep().leftovers == 0, "it is under way"
        monkeypatch.setattr(retention, "STALE_SECONDS", -10.0)
    assert study.sweep().leftovers == 1
    left = backend.fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", ())
    assert [each["Key"] for each in left if each["Key"].startswith(below)] == [f"{below}x/{name}"], "another store's"


def test_the_room_that_states_take(s3: str) -> None:
    store = Store(s3)
    assert store.used() == 0
    for number in range(3):
        store.files.write(f"states/a{number}/x", bytes(1000))
    store.files.write("checkpoints/y", bytes(24))
    assert Store(s3).used() == 3024
    store.files.delete("states/a0/x")
    assert store.used() == 2024


# --- Requests ------------------------------------------------------------------------------------------------------


def large(url: str, trials: int) -> Study:
    """A study of so many trials, as its driver leaves it: recorded in small parts, merged now and then."""
    study = Study(small.spec(trials=trials), url)
    objectives = [{"name": n, "column": n, "direction": "maximise"} for n in ("accuracy", "sparsity")]
    study.store.write_study("small", study.spec.to_toml(), {"digest": study.spec.digest(), "objectives": objectives})
    ledger = study.store.ledger("small", 1)
    for start in range(0, trials, 500):
        numbers = range(start, min(start + 500, trials))
        params = {"criterion": "magnitude", "rate": 0.3, "rounds": 1, "retrain": "finetune"}
        ledger.append("proposals", [{"trial": n, "params": params, "attrs": {}} for n in numbers])
        ledger.append("outcomes", [outcome(n, params) for n in numbers])
        ledger.append("events", [{"event": "done", "trial": n, "detail": {"values": [0.5, 0.5]}} for n in numbers])
        ledger.flush()
        if start % 5000 == 0:
            ledger.compact()
    ledger.compact()
    return study


def outcome(number: int, params: dict[str, object]) -> dict[str, object]:
    place = number * 7919 % 20_000 / 20_000
    measured = {"accuracy": place, "sparsity": 1 - place**2, "total_params": 67, "nonzero_params": 20}
    return {"key": f"{number:064x}", "trial": number, "round": 1, "seed": 0, "params": params} | measured


def test_a_front_of_20_000_trials_takes_few_files_and_few_requests() -> None:
    server = Faulty(uuid4().hex)
    large(server.url, 20_000)
    assert len(server.objects) <= 6
    server.counts.clear()
    found = Study.open(server.url, "small").front()
    assert len(found.points) > 100
    assert server.counts.total() <= 8, server.counts
    server.counts.clear()
    assert Study.open(server.url, "small").status()["trials"]["done"] == 20_000
    assert server.counts.total() <= 12, server.counts


def test_a_front_on_a_real_server_takes_few_requests(s3: str) -> None:
    large(s3, 1_000)
    requests: list[str] = []
    opened = Study.open(s3, "small")
    driver = opened.store.files._backend.fs  # type: ignore[attr-defined]
    driver.s3.meta.events.register("before-send.s3", lambda request, **_: requests.append(request.method))
    assert opened.front().points
    assert 0 < len(requests) <= 8, requests


@pytest.mark.ray
@pytest.mark.slow
def test_ray_workers_on_a_store_that_is_killed_and_comes_back(
    mortal: Server, root: Path, undisturbed: Study, caplog: pytest.LogCaptureFixture
) -> None:
    """The workers find the way to the store in their environment, and wait for it as the driver does."""
    from orchestrator.pools.ray import RayPool

    caplog.set_level(logging.CRITICAL, "orchardist")
    study = Study(small.spec(), f"s3://{BUCKET}/root", root=root)
    back = threading.Timer(3.0, mortal.start)

    def pool() -> RayPool:
        made = RayPool(2)
        completed = made.completed

        def killing(timeout_seconds: float) -> Sequence[Event]:
            events = completed(timeout_seconds)
            if events and not back.is_alive() and not back.finished.is_set():
                mortal.kill()
                back.start()
            return events

        made.completed = killing  # type: ignore[method-assign]
        return made

    assert study.run(pool).done == 6
    back.join()
    assert_same(study, undisturbed)
