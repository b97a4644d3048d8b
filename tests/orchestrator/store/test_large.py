"""A ledger of 20,000 trials on a real S3 server, and a study's outcomes in the hands of other programs while it runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Study
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Event
from orchestrator.store import Ledger
from orchestrator.store.rows import SCHEMAS
from tests.orchestrator.pools import small
from tests.orchestrator.store.conftest import Serve, reach
from tests.orchestrator.store.test_s3 import large
from tests.servers import BUCKET

MOST_FILES = 36
MOST_REQUESTS = 12


@pytest.mark.slow
def test_a_front_of_20_000_trials_on_s3(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(serve("moto"), monkeypatch)
    url = f"s3://{BUCKET}/20000"
    written = large(url, 20_000)
    assert len(written.store.files.list("studies/small/ledger")) <= MOST_FILES
    opened = Study.open(url, "small")
    requests: Counter[str] = Counter()
    driver = opened.store.files._backend.fs  # type: ignore[attr-defined]
    driver.s3.meta.events.register("before-send.s3", lambda request, **_: requests.update([request.method]))
    assert len(opened.front().points) > 100
    assert 0 < requests.total() <= MOST_REQUESTS, requests


# --- Other programs ------------------------------------------------------------------------------------------------


def with_duckdb(path: str) -> list[tuple[str, float]]:
    import duckdb

    return list(duckdb.execute(f"select key, accuracy from '{path}'").fetchall())


def with_pandas(path: str) -> list[tuple[str, float]]:
    import pandas

    return list(pandas.read_parquet(path)[["key", "accuracy"]].itertuples(index=False, name=None))


def with_polars(path: str) -> list[tuple[str, float]]:
    import polars

    return list(polars.read_parquet(path).select("key", "accuracy").iter_rows())


PROGRAMS: Sequence[Callable[[str], list[tuple[str, float]]]] = (with_duckdb, with_pandas, with_polars)


class LookedAt(LocalPool):
    """While the study runs, every program reads what is there after each report."""

    def __init__(self, path: Path, replaced: threading.Lock) -> None:
        super().__init__()
        self._path = path
        self._replaced = replaced
        self.seen: list[list[list[tuple[str, float]]]] = []

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        if self._path.exists():
            # Each of them opens the file more than once. Between two openings it may be replaced, and then they say
            # that it is broken: in a study that happens every ten seconds, here it would with every report.
            with self._replaced:
                self.seen.append([read(str(self._path)) for read in PROGRAMS])
        return super().completed(timeout_seconds)


def test_other_programs_read_the_outcomes_while_the_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced, right = threading.Lock(), Ledger.compact

    def compact(self: Ledger, grace_seconds: float = 0.0) -> None:
        with replaced:
            right(self, grace_seconds)

    # A study of a second is over before its ledger is merged for the first time.
    monkeypatch.setattr("orchestrator.driver.FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(Ledger, "should_compact", lambda self: True)
    monkeypatch.setattr(Ledger, "compact", compact)
    root = small.write_task(tmp_path / "root")
    pool = LookedAt(tmp_path / "store" / "studies" / "small" / "outcomes.parquet", replaced)
    study = Study(small.spec(), tmp_path / "store", root=root)
    assert study.run(pool).done == 6
    rows = {row["key"]: row["accuracy"] for row in study.table().to_pylist()}
    assert len(pool.seen) > 5
    counts = [len(found[0]) for found in pool.seen]
    assert counts[0] < counts[-1] <= len(rows) and counts == sorted(counts)
    for found in pool.seen:
        for each in found:
            assert len(dict(each)) == len(each)
            assert dict(each).items() <= rows.items()


def test_every_program_reads_every_column(tmp_path: Path) -> None:
    import duckdb
    import pandas
    import polars

    root = small.write_task(tmp_path / "root")
    study = Study(small.spec(trials=2), tmp_path / "store", root=root)
    study.run(LocalPool())
    path = str(tmp_path / "store" / "studies" / "small" / "outcomes.parquet")
    names = SCHEMAS["outcomes"].names
    columns: dict[str, Any] = {
        "duckdb": [each[0] for each in duckdb.execute(f"describe select * from '{path}'").fetchall()],
        "pandas": list(pandas.read_parquet(path).columns),
        "polars": polars.read_parquet(path).columns,
    }
    assert columns == dict.fromkeys(columns, names)
