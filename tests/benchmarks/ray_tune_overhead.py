"""Trials that do nothing, under Ray Tune: what it costs to run one more trial.

    python tests/benchmarks/ray_tune_overhead.py [--trials N]

Random search, two CPUs, one per trial, actors reused, no loggers, no dashboard. Prints one JSON line; the start of Ray
is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from typing import Any

# What Tune's own guides advise for many short trials. Read when ray is imported.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_AIR_NEW_OUTPUT="0",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_MAX_PENDING_TRIALS_PG="8",
    TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
)

import ray
from ray import tune


def trial(config: dict[str, Any]) -> None:
    """Nothing but a result."""
    tune.report({"accuracy": 1.0, "sparsity": config["rate"]})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={"rate": tune.uniform(0.1, 0.9)},
            tune_config=tune.TuneConfig(num_samples=options.trials, reuse_actors=True),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        )
        started = time.perf_counter()
        results = tuner.fit()
        seconds = time.perf_counter() - started
    assert len(results) == options.trials
    assert not results.errors
    ray.shutdown()
    per_second = round(options.trials / seconds, 2)
    print(json.dumps({"trials": options.trials, "seconds": round(seconds, 2), "trials_per_second": per_second}))


if __name__ == "__main__":
    main()
