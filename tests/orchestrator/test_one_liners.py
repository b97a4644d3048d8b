"""A question to the ledger in DuckDB's SQL and in polars has the answer that `front` gives, as the README shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator import Study
from orchestrator.pools.local import LocalPool
from tests.orchestrator.pools import small

BOUNDS = ["accuracy >= dense - 0.1", "sparsity >= 0.4"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = small.write_task(tmp_path_factory.mktemp("root"))
    found = Study(small.spec(trials=8), root / "store", root=root)
    found.run(LocalPool())
    return found


@pytest.fixture
def path(study: Study) -> str:
    return str(Path(study.store.url) / "studies" / "small" / "outcomes.parquet")


@pytest.fixture
def chosen(study: Study) -> dict[str, Any]:
    (point,) = study.front(BOUNDS, minimise="bytes").points
    return point


def test_in_sql(path: str, chosen: dict[str, Any]) -> None:
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.execute(
        f"""WITH o AS (FROM '{path}') SELECT key, bytes FROM o WHERE trial >= 0 AND sparsity >= 0.4
        AND accuracy >= (SELECT avg(accuracy) FROM o WHERE trial = -1) - 0.1 ORDER BY bytes LIMIT 1"""
    ).fetchall()
    assert [size for _, size in found] == [chosen["bytes"]]


def test_in_polars(path: str, chosen: dict[str, Any]) -> None:
    polars = pytest.importorskip("polars")
    table, c = polars.read_parquet(path), polars.col
    dense = table.filter(c("trial") == -1)["accuracy"].mean()
    found = table.filter(c("trial") >= 0, c("sparsity") >= 0.4, c("accuracy") >= dense - 0.1).bottom_k(1, by="bytes")
    assert found["bytes"].to_list() == [chosen["bytes"]]


def test_several_seeds_are_aggregated_in_sql_as_front_does(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    root = small.write_task(tmp_path)
    study = Study(small.spec(trials=4, seeds=(0, 1, 2)), root / "store", root=root)
    study.run(LocalPool())
    path = root / "store" / "studies" / "small" / "outcomes.parquet"
    found = duckdb.execute(
        f"""SELECT trial, round, avg(accuracy), stddev(accuracy), count(*) FROM '{path}' WHERE trial >= 0
        GROUP BY ALL HAVING count(*) = 3"""
    ).fetchall()
    means = {(trial, number): (mean, spread) for trial, number, mean, spread, _ in found}
    for point in study.front().points:
        mean, spread = means[point["trial"], point["round"]]
        assert point["accuracy"] == pytest.approx(mean) and point["std"]["accuracy"] == pytest.approx(spread)
        assert point["n"] == 3 and point["half_width"]["accuracy"] == pytest.approx(4.3026527 * spread / 3**0.5)
