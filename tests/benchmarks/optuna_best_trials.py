"""How long Optuna's own front takes: `Study.best_trials` of a study in memory with two objectives.

    python tests/benchmarks/optuna_best_trials.py [--trials N] [--repeats N]

Prints one JSON line with the best of the repeats.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import optuna


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize", "maximize"])
    values = np.random.default_rng(0).random((options.trials, 2))
    study.add_trials([optuna.create_trial(values=row) for row in values.tolist()])
    seconds, front = float("inf"), []
    for _ in range(options.repeats):
        started = time.perf_counter()
        front = study.best_trials
        seconds = min(seconds, time.perf_counter() - started)
    print(json.dumps({"trials": options.trials, "seconds": round(seconds, 4), "front": len(front)}))


if __name__ == "__main__":
    main()
