from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from orchestrator.errors import QueryError
from orchestrator.front import Front, front, joined
from orchestrator.objectives import OBJECTIVES, Objective
from orchestrator.store.store import Store

BOTH = [OBJECTIVES["accuracy"], OBJECTIVES["sparsity"]]


def row(trial: int, round_: int, accuracy: float | None, sparsity: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    key = f"{trial + 1:02d}{round_:02d}{seed:02d}".ljust(64, "0")
    named = {"key": key, "trial": trial, "round": round_, "seed": seed, "params": {"rate": 0.5}}
    return named | {"accuracy": accuracy, "sparsity": sparsity, "metrics": {}} | more


def of(*rows: dict[str, Any], seeds: int = 1, objectives: Sequence[Objective] = tuple(BOTH), **query: Any) -> Front:
    store = Store(f"memory://{uuid4().hex}")
    ledger = store.ledger("s", 1)
    ledger.append("outcomes", rows)
    ledger.flush()
    return front(store, "s", objectives, seeds=seeds, **query)


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


def test_means_over_seeds_come_with_their_intervals() -> None:
    rows = [row(0, 1, accuracy, 0.5, seed) for seed, accuracy in enumerate((0.5, 0.6, 0.9))]
    (point,) = of(*rows, seeds=3).points
    # Student's t for two degrees of freedom is 4.3027.
    assert point["half_width"]["accuracy"] == pytest.approx(4.3027 * 0.20817 / 3**0.5, rel=1e-4)
    assert point["half_width"]["sparsity"] == 0
    (alone,) = of(row(0, 1, 0.5, 0.5)).points
    assert alone["std"] == alone["half_width"] == {}


def test_the_hypervolume_is_that_of_the_points_up_to_a_stated_reference() -> None:
    rows = [row(-1, 0, 0.9, 0.0), row(0, 1, 0.8, 0.5), row(1, 1, 0.6, 0.9), row(2, 1, 0.5, 0.5)]
    assert of(*rows).hypervolume == {
        "value": pytest.approx(0.8 * 0.5 + 0.6 * 0.4),
        "reference": {"accuracy": 0, "sparsity": 0},
    }
    bounded = of(*rows, where=["sparsity > 0.6"]).hypervolume
    assert bounded is not None and bounded["value"] == pytest.approx(0.6 * 0.9)
    assert of(*rows, minimise="sparsity").hypervolume is None


def test_of_what_is_minimised_the_dense_model_is_the_reference() -> None:
    rows = [row(-1, 0, 0.9, 0.0, bytes=100), row(0, 1, 0.8, 0.5, bytes=40)]
    found = of(*rows, objectives=[OBJECTIVES["accuracy"], OBJECTIVES["bytes"]])
    assert found.hypervolume == {"value": pytest.approx(0.8 * 60), "reference": {"accuracy": 0, "bytes": 100}}
    assert of(*rows[1:], objectives=[OBJECTIVES["accuracy"], OBJECTIVES["bytes"]]).hypervolume is None


def test_one_front_over_several_studies() -> None:
    one = of(row(-1, 0, 0.9, 0.0), row(0, 1, 0.8, 0.5), row(1, 1, 0.6, 0.9))
    other = replace(of(row(0, 1, 0.85, 0.4), row(1, 1, 0.7, 0.6), row(2, 1, 0.75, 0.3)), study="t")
    found = joined([one, other])
    assert [(point["study"], point["trial"]) for point in found.points] == [("t", 0), ("s", 0), ("t", 1), ("s", 1)]
    assert found.study == "s, t" and found.dense == one.dense and found.knee in range(4)
    volume = 0.85 * 0.4 + 0.8 * 0.1 + 0.7 * 0.1 + 0.6 * 0.3
    assert found.hypervolume is not None and found.hypervolume["value"] == pytest.approx(volume)


def test_the_least_of_several_studies() -> None:
    one, other = (of(row(0, 1, 0.8, 0.5, bytes=size), minimise="bytes") for size in (50, 40))
    found = joined([one, replace(other, study="t")], "bytes")
    assert [(point["study"], point["bytes"]) for point in found.points] == [("t", 40)]
    assert found.knee == 0 and found.hypervolume is None


def test_studies_with_other_objectives_do_not_join() -> None:
    other = of(row(0, 1, 0.8, 0.5, bytes=4), objectives=[OBJECTIVES["accuracy"], OBJECTIVES["bytes"]])
    with pytest.raises(QueryError, match="'s' and 's' do not compare: their objectives are accuracy, sparsity; and"):
        joined([of(row(0, 1, 0.8, 0.5)), other])


def test_a_bound_on_what_nobody_measured_says_so() -> None:
    with pytest.raises(QueryError, match=r"'latency_ms' was not measured in the study 's'; a study with it among"):
        of(row(0, 1, 0.9, 0.1), where=["latency_ms <= 2"])


def test_times_on_several_devices_choose_no_model() -> None:
    rows = [row(0, 1, 0.9, 0.1, latency_ms=1.0, device="cpu"), row(1, 1, 0.5, 0.9, latency_ms=0.1, device="cuda")]
    with pytest.raises(QueryError, match=r"several devices \(cpu, cuda\), whose times do not compare"):
        of(*rows, where=["latency_ms <= 2"])
    assert places(of(rows[0], where=["latency_ms <= 2"])) == [(0, 1)]


def test_what_was_not_measured_is_left_out_and_never_wins() -> None:
    found = of(row(0, 1, None, 0.99), row(1, 1, 0.5, 0.5))
    assert places(found) == [(1, 1)]
    assert "latency_ms" not in found.points[0]


def test_bounds_are_kept_together_and_the_nearest_miss_is_named() -> None:
    rows = [row(-1, 0, 0.9, 0.0), row(0, 1, 0.85, 0.5), row(1, 1, 0.95, 0.2), row(2, 1, 0.6, 0.9)]
    assert places(of(*rows, where=["accuracy >= dense - 0.1", "sparsity >= 0.3"])) == [(0, 1)]
    with pytest.raises(QueryError, match=r"no point keeps .* and .*; the nearest \(trial 0, round 1\) has"):
        of(*rows, where=["accuracy >= 0.86", "sparsity >= 0.5"])


def test_a_nearest_miss_of_many_has_no_exponent() -> None:
    rows = [row(-1, 0, 0.9, 0.0), row(0, 1, 0.85, 0.5, bytes=43_470)]
    with pytest.raises(QueryError, match=r"has bytes = 43,470$"):
        of(*rows, where=["bytes <= 10"])


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


@pytest.mark.parametrize(
    "query",
    [{"where": ["test_accuracy >= 0.5"]}, {"where": ["sparsity > 0", "test_f1 > 1"]}, {"minimise": "test_loss"}],
)
def test_the_test_split_chooses_no_model(query: dict[str, Any]) -> None:
    rows = [row(0, 1, 0.9, 0.1, test_accuracy=0.8, test_loss=0.3, metrics={"f1": 0.3, "test_f1": 0.2})]
    with pytest.raises(QueryError, match=r"'test_(\w+)' cannot choose a model: .* only ever reported; legal: '\1'$"):
        of(*rows, **query)


def test_single_rows_are_read_in_the_columns_that_were_asked_for() -> None:
    store = Store(f"memory://{uuid4().hex}")
    ledger = store.ledger("s", 1)
    for compacted in (False, True):
        ledger.append("outcomes", [row(int(compacted), 1, 0.5, 0.5)])
        ledger.flush()
        if compacted:
            ledger.compact()
        (found,) = store.outcomes("s").rows([0], ["sparsity", "key"])
        assert found == {"sparsity": 0.5, "key": row(0, 1, 0.5, 0.5)["key"]}


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
    assert found.as_json() == {
        "study": "s",
        "objectives": ["accuracy", "sparsity"],
        "dense": None,
        "hypervolume": {"value": 0.0, "reference": {"accuracy": 0.0, "sparsity": 0.0}},
        "front": [],
    }
