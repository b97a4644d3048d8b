"""Questions to a large ledger, as JSON: seconds beyond start-up for `front`, for finding what `fetch` is to take home by
bounds and by key, and for `responsible` (the models that it runs included), beside the bare scan and a numpy sort.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import Study, StudySpec
from orchestrator.outcome import DENSE_TRIAL, OUTCOME_COLUMNS
from orchestrator.retrieve import meant
from orchestrator.stages import Stages
from orchestrator.state import State, of_model, to_bytes
from orchestrator.store.store import Store
from orchestrator.tasks.load import load
from orchestrator.tasks.source import collect

ROUNDS = 5
ASKED = (["accuracy >= dense - 0.1", "sparsity >= 0.5"], "bytes")
"""Bounds, and what is to be the least of."""


def fill(store: Store, rows: int) -> None:
    """A study of `rows` made-up outcomes with every column filled, and its dense model."""
    spec = StudySpec(name="large", task="mnist", trials=rows // ROUNDS, space={"rate": [0.1, 0.5]})
    names = [{"name": n, "column": n, "direction": "maximise"} for n in ("accuracy", "sparsity")]
    store.write_study("large", spec.to_toml(), {"digest": spec.digest(), "objectives": names})
    rng = np.random.default_rng(0)
    ledger = store.ledger("large", 1)
    task = load(collect("mnist", Path()), {}).info.digest
    for begin in range(0, rows, 50_000):
        ledger.append("outcomes", [_row(index, rng, task) for index in range(begin, min(begin + 50_000, rows))])
        ledger.flush()
    ledger.compact()


def _row(index: int, rng: np.random.Generator, task: str) -> dict[str, object]:
    sparsity = float(rng.random())
    accuracy = round(500 * (0.98 - 0.2 * sparsity**4 - 0.05 * float(rng.random()))) / 500  # of 500 validation rows
    measures = {name: accuracy for name, kind in OUTCOME_COLUMNS.items() if kind == "float"}
    integers = {name: int(1e5 * (1 - sparsity)) for name, kind in OUTCOME_COLUMNS.items() if kind == "integer"}
    return (
        measures
        | integers
        | {
            "key": hashlib.sha256(str(index).encode()).hexdigest(),
            "trial": DENSE_TRIAL if index == 0 else index // ROUNDS,
            "round": 0 if index == 0 else index % ROUNDS + 1,
            "seed": 0,
            "params": {"rate": 0.1 + (index % 9) * 0.05, "rounds": 5},
            "sparsity": 0.0 if index == 0 else sparsity,
            "class_accuracy": [accuracy] * 10,
            "test_class_accuracy": [accuracy] * 10,
            "layers": {"fc1.weight": [int(235200 * (1 - sparsity)), 235200]},
            "metrics": {},
            "task_digest": task,
            "device": "cpu",
            "versions": {"torch": "2.13.0"},
        }
    )


def write_models(study: Study, keys: Sequence[str]) -> None:
    """States for the keys, to be run: the dense network with nothing pruned."""
    model = Stages(load(collect("mnist", Path()), {})).model()
    for key in keys:
        study.store.states.commit(key, to_bytes(State(weights=of_model(model)), {"lineage": "[]"}))


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it gave."""
    began = time.perf_counter()
    found = what()
    return time.perf_counter() - began, found


def main() -> None:
    """Fill a store, read its front, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fill(Store(folder), options.rows)
        study = Study.open(folder, "large")
        study.store.table("large", "outcomes", ["trial"])  # start-up: pyarrow is imported
        scan, table = timed(lambda: study.store.table("large", "outcomes", ["accuracy", "sparsity"]))
        sort, _ = timed(lambda: np.lexsort((np.asarray(table["sparsity"]), np.asarray(table["accuracy"]))))
        front, points = timed(lambda: study.front())
        by_bounds, chosen = timed(lambda: meant(study, None, *ASKED))
        by_key, again = timed(lambda: meant(study, chosen["key"][:12], [], None))
        assert again["key"] == chosen["key"] and points.knee is not None and points.dense is not None
        knee = points.points[points.knee]["key"]
        write_models(study, [chosen["key"], knee, points.dense["key"]])
        study.responsible(knee)  # start-up: scipy and statsmodels are imported
        one, _ = timed(lambda: study.responsible(where=ASKED[0], minimise=ASKED[1]))
        every, account = timed(lambda: study.responsible())
    found = {
        **{"rows": options.rows, "front_s": front, "scan_s": scan, "sort_s": sort, "points": len(points.points)},
        **{"fetch_by_bounds_s": by_bounds, "fetch_by_key_s": by_key},
        **{"responsible_one_s": one, "responsible_s": every, "responsible_rows": len(account["rows"])},
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
