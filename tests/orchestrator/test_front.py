from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from orchestrator.errors import QueryError
from orchestrator.front import Front, front
from orchestrator.objectives import OBJECTIVES
from orchestrator.store.store import Store

BOTH = [OBJECTIVES["accuracy"], OBJECTIVES["sparsity"]]


def row(trial: int, round_: int, accuracy: float | None, sparsity: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    key = f"{trial + 1:02d}{round_:02d}{seed:02d}".ljust(64, "0")
    named = {"key": key, "trial": trial, "round": round_, "seed": seed, "params": {"rate": 0.5}}
    return named | {"accuracy": accuracy, "sparsity": sparsity, "metrics": {}} | more


def of(*rows: dict[str, Any], seeds: int = 1, **query: Any) -> Front:
    store = Store(f"memory://{uuid4().hex}")
    ledger = store.ledger("s", 1)
    ledger.append("outcomes", rows)
    ledger.flush()
    return front(store, "s", BOTH, seeds=seeds, **query)


def places(found: Front) -> list[tuple[int, int]]:
    return [(point["trial"], point["round"]) for point in found.points]


def test_points_are_not_dominated_and_in_order_of_the_first_objective() -> None:
    found = of(
        row(-1, 0, 0.9, 0.0), row(0, 1, 0.8, 0.5), row(0, 2, 0.95, 0.3), row(1, 1, 0.7, 0.4), row(2, 1, 0.5, 0.9)
    )
    assert places(found) == [(0, 2), (0, 1), (2, 1)]
    assert found.dense is not None and (found.dense["trial"], found.dense["accuracy"]) == (-1, 0.9)
    assert found.knee in range(3)


def test_a_point_is_the_mean_over_all_seeds_and_its_key_the_run_nearest_to_it() -> None:
    accuracies = (0.5, 0.6, 0.9)
    rows = [row(0, 1, accuracy, 0.5, seed, loss=accuracy) for seed, accuracy in enumerate(accuracies)]
    (point,) = of(*rows, row(1, 1, 0.99, 0.99, 0), row(1, 1, 0.99, 0.99, 2), seeds=3).points
    assert point["accuracy"] == pytest.approx(2 / 3) and point["n"] == 3
    assert point["std"]["accuracy"] == pytest.approx(0.2082, abs=1e-4) and point["std"]["sparsity"] == 0
    assert point["key"] == rows[1]["key"] and point["keys"] == [r["key"] for r in rows]


def test_what_was_not_measured_is_left_out_and_never_wins() -> None:
    found = of(row(0, 1, None, 0.99), row(1, 1, 0.5, 0.5))
    assert places(found) == [(1, 1)]
    assert "latency_ms" not in found.points[0]


def test_bounds_are_kept_together_and_the_nearest_miss_is_named() -> None:
    rows = [row(-1, 0, 0.9, 0.0), row(0, 1, 0.85, 0.5), row(1, 1, 0.95, 0.2), row(2, 1, 0.6, 0.9)]
    assert places(of(*rows, where=["accuracy >= dense - 0.1", "sparsity >= 0.3"])) == [(0, 1)]
    with pytest.raises(QueryError, match=r"no point keeps .* and .*; the nearest \(trial 0, round 1\) has"):
        of(*rows, where=["accuracy >= 0.86", "sparsity >= 0.5"])


def test_the_studys_constraints_hold_without_being_asked_for() -> None:
    rows = [row(0, 1, 0.9, 0.1), row(1, 1, 0.5, 0.9)]
    assert places(of(*rows, constraints={"sparsity": ">= 0.5"})) == [(1, 1)]
    assert of(*rows, constraints={"sparsity": ">= 0.95"}).points == ()


def test_minimise_gives_the_least() -> None:
    rows = [row(0, 1, 0.9, 0.1, bytes=10), row(1, 1, 0.5, 0.9, bytes=5), row(2, 1, 0.8, 0.5)]
    assert places(of(*rows, minimise="bytes")) == [(1, 1)]
    assert places(of(*rows, minimise="bytes", where=["accuracy > 0.6"])) == [(0, 1)]
    with pytest.raises(QueryError, match="was not measured"):
        of(*rows, minimise="latency_ms")


def test_a_tasks_own_metric_and_an_unknown_one() -> None:
    rows = [row(0, 1, 0.9, 0.1, metrics={"f1": 0.3}), row(1, 1, 0.5, 0.9, metrics={"f1": 0.7})]
    assert places(of(*rows, where=["f1 > 0.5"])) == [(1, 1)]
    with pytest.raises(QueryError, match="unknown measure 'f2'.*f1"):
        of(*rows, where=["f2 > 0.5"])


def test_the_dense_model_of_a_changed_task_replaces_the_earlier_one() -> None:
    old = row(-1, 0, 0.9, 0.0, task_digest="old", finished_at=1.0)
    new = row(-1, 0, 0.6, 0.0, seed=7, task_digest="new", finished_at=2.0)
    found = of(old, new, row(0, 1, 0.55, 0.5), where=["accuracy >= dense - 0.1"])
    assert found.dense is not None and (found.dense["accuracy"], found.dense["n"]) == (0.6, 1)
    assert places(found) == [(0, 1)]


def test_no_outcomes_no_front() -> None:
    found = of()
    assert (found.points, found.dense, found.knee) == ((), None, None)
    assert found.as_json() == {"study": "s", "objectives": ["accuracy", "sparsity"], "dense": None, "front": []}
