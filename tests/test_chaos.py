"""A soak in small, and the proof that its judge sees what it is there to see."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrator import Study
from orchestrator.outcome import OUTCOME_COLUMNS
from orchestrator.pools.local import LocalPool
from orchestrator.state import from_bytes, to_bytes
from orchestrator.store import Ledger, Store
from tests.chaos.__main__ import SCENARIOS, disturbed, prepared, row
from tests.chaos.judge import Reference, Verdict, Witness, judge
from tests.chaos.study import spec

SHORT = {
    "driver killed": 1,
    "clocks an hour apart, the driver killed or asleep": 1,
    "two drivers at once": 2,
    "two studies at once": 1,
    "files cut off, foreign files": 1,
    "disk full": 1,
    **{name: 1 for name in SCENARIOS if name.startswith("the n-th call")},
}
"""Those without Ray and without a server; `make chaos` has them all."""


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Reference]:
    folder = tmp_path_factory.mktemp("soak")
    return folder, *prepared(folder)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "orchardist")


@pytest.mark.parametrize("name", SHORT)
def test_nothing_is_lost_and_nothing_counts_twice(name: str, soak: tuple[Path, Path, Reference]) -> None:
    folder, root, reference = soak
    verdicts = list(disturbed(name, folder, root, reference, 0, SHORT[name], time.monotonic() + 600))
    assert [line for verdict in verdicts for line in verdict.says] == []
    assert len(verdicts) == SHORT[name]
    assert row(name, verdicts, 0.0)[3:7] == ["0", "0", "yes", "yes"]


@pytest.mark.slow
def test_two_drivers_at_once_fifty_times(soak: tuple[Path, Path, Reference]) -> None:
    folder, root, reference = soak
    verdicts = list(disturbed("two drivers at once", folder, root, reference, 1, 50, time.monotonic() + 1200))
    assert [line for verdict in verdicts for line in verdict.says] == []
    assert len(verdicts) == 50


# --- Canaries ------------------------------------------------------------------------------------------------------


def judged(url: str | Path, reference: Reference, *, steps: int | None = None, most_again: float = 0) -> Verdict:
    witness = Witness(states=set(reference.models), outcomes=set(reference.rows))
    taken = reference.steps if steps is None else steps
    return judge(str(url), reference, witness, faults=1, steps=taken, most_again=most_again)


def run(url: str | Path, root: Path) -> Study:
    study = Study(spec(), url, root=root)
    assert study.run(LocalPool()).done == spec().trials
    return study


def test_an_undisturbed_study_is_good(soak: tuple[Path, Path, Reference]) -> None:
    _, root, reference = soak
    url = f"memory://{uuid4().hex}"
    run(url, root)
    assert judged(url, reference).good
    assert reference.front and len(reference.rows) > 8


def lost_state(store: Store, reference: Reference) -> None:
    store.states.delete(min(reference.models))


def other_weights(store: Store, reference: Reference) -> None:
    key = min(reference.models)
    data = store.states.read(key)
    assert data is not None
    state = from_bytes(data)
    name = next(iter(state.weights))
    weights = {**state.weights, name: state.weights[name] + 1e-6}
    store.states.replace(key, to_bytes(replace(state, weights=weights), store.states.header(key) or {}))


def doubled_proposal(store: Store, reference: Reference) -> None:
    append(store, "proposals", [{"trial": 0, "params": {}, "attrs": {}, "proposed_at": 0.0}])


def trial_ended_twice(store: Store, reference: Reference) -> None:
    rows = store.table("small", "events").to_pylist()
    detail = next(row["detail"] for row in rows if row["event"] == "done" and row["trial"] == 3)
    append(store, "events", [{"event": "done", "trial": 3, "at": 0.0, "detail": json.loads(detail)}])


def stage_run_again(store: Store, reference: Reference) -> None:
    key = next(iter(reference.work))
    detail = {"epochs": 1.0, "stages": 1, "seconds": 0.1}
    append(store, "events", [{"event": "work", "key": key, "at": 0.0, "detail": detail}] * (reference.work[key] + 1))


def append(store: Store, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    ledger = store.ledger("small", 1)
    ledger.append(kind, rows)
    ledger.flush()


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (lost_state, "states lost"),
        (other_weights, "weights differ"),
        (doubled_proposal, "proposals twice: 0"),
        (trial_ended_twice, "trials ended twice: 3"),
        (stage_run_again, "finished stages run again"),
    ],
)
def test_the_canary_is_seen(
    plant: Callable[[Store, Reference], None], says: str, soak: tuple[Path, Path, Reference], tmp_path: Path
) -> None:
    folder, _, reference = soak
    shutil.copytree(folder / "undisturbed", tmp_path / "store")
    assert judged(tmp_path / "store", reference).good
    plant(Store(tmp_path / "store"), reference)
    verdict = judged(tmp_path / "store", reference)
    assert any(line.startswith(says) for line in verdict.says), verdict


def test_training_that_is_done_again_is_seen(soak: tuple[Path, Path, Reference]) -> None:
    folder, _, reference = soak
    assert judged(folder / "undisturbed", reference, steps=reference.steps + 12, most_again=12).good
    verdict = judged(folder / "undisturbed", reference, steps=reference.steps + 13, most_again=12)
    assert verdict.says == ("13 training steps were taken twice, of which at most 12 may be",)


@pytest.mark.parametrize("kind", ["proposals", "outcomes", "events"])
def test_a_store_that_drops_a_row_is_seen(
    kind: str, soak: tuple[Path, Path, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, root, reference = soak
    right = Ledger.append

    def append(self: Ledger, what: str, rows: Sequence[Mapping[str, Any]]) -> None:
        dropped = [row for row in rows if what == kind and (row.get("round") == 2 or row["trial"] in (2, 3))]
        right(self, what, [row for row in rows if row not in dropped[:1]])

    monkeypatch.setattr(Ledger, "append", append)
    url = f"memory://{uuid4().hex}"
    Study(spec(), url, root=root).run(LocalPool())
    assert not judged(url, reference).good


def test_an_outcome_that_is_gone_is_missed_though_others_have_come_since(
    soak: tuple[Path, Path, Reference], tmp_path: Path
) -> None:
    """One of a trial that had ended: its file and its state are damaged, and later trials make up for the number."""
    folder, root, _ = soak
    shutil.copytree(folder / "undisturbed", tmp_path / "store")
    store = Store(tmp_path / "store")
    (first, *_) = [row for row in store.table("small", "outcomes").to_pylist() if row["trial"] == 0]
    rows = [row for row in store.table("small", "outcomes").to_pylist() if row["key"] != first["key"]]
    extra = {**rows[-1], "key": "0" * 64, "trial": -2}
    (tmp_path / "store" / "studies" / "small" / "outcomes.parquet").unlink()
    store.states.delete(first["key"])
    json_columns = [name for name, kind in OUTCOME_COLUMNS.items() if kind == "json"]
    written = [{**row, **{name: json.loads(row[name] or "null") for name in json_columns}} for row in [*rows, extra]]
    append(store, "outcomes", written)
    run(tmp_path / "store", root)
    assert first["key"] in store.table("small", "outcomes")["key"].to_pylist()
