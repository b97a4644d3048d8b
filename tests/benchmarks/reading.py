"""The front of a large ledger: seconds for `front` beyond start-up, beside the bare scan and a numpy sort, as JSON."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time

import numpy as np

from orchestrator import Study, StudySpec
from orchestrator.outcome import DENSE_TRIAL, OUTCOME_COLUMNS
from orchestrator.store.store import Store

ROUNDS = 5


def fill(store: Store, rows: int) -> None:
    """A study of `rows` made-up outcomes with every column filled, and its dense model."""
    spec = StudySpec(name="large", task="mnist", trials=rows // ROUNDS, space={"rate": [0.1, 0.5]})
    names = [{"name": n, "column": n, "direction": "maximise"} for n in ("accuracy", "sparsity")]
    store.write_study("large", spec.to_toml(), {"digest": spec.digest(), "objectives": names})
    rng = np.random.default_rng(0)
    ledger = store.ledger("large", 1)
    for begin in range(0, rows, 50_000):
        ledger.append("outcomes", [_row(index, rng) for index in range(begin, min(begin + 50_000, rows))])
        ledger.flush()
    ledger.compact()


def _row(index: int, rng: np.random.Generator) -> dict[str, object]:
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
            "task_digest": "0" * 64,
            "device": "cpu",
            "versions": {"torch": "2.13.0"},
        }
    )


def main() -> None:
    """Fill a store, read its front, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fill(Store(folder), options.rows)
        study = Study.open(folder, "large")
        study.store.table("large", "outcomes", ["trial"])  # start-up: pyarrow is imported
        began = time.perf_counter()
        table = study.store.table("large", "outcomes", ["accuracy", "sparsity"])
        scan = time.perf_counter() - began
        began = time.perf_counter()
        np.lexsort((np.asarray(table["sparsity"]), np.asarray(table["accuracy"])))
        sort = time.perf_counter() - began
        began = time.perf_counter()
        points = study.front().points
        front = time.perf_counter() - began
    found = {"rows": options.rows, "front_s": front, "scan_s": scan, "sort_s": sort, "points": len(points)}
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
