"""Trials that do nothing, each durably recorded, on two Ray workers: trials per second and driver memory, as JSON."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import psutil

from orchestrator import Study, StudySpec
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Pool
from orchestrator.pools.ray import RayPool
from orchestrator.progress import Standing


class Memory:
    """Notes the driver's memory at each thousandth trial."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.noted: list[tuple[int, float, float]] = []

    def show(self, standing: Standing) -> None:
        """Note (trials, seconds, MB) when another thousand trials have ended."""
        if standing.ended // 1000 > len(self.noted):
            megabytes = psutil.Process(os.getpid()).memory_info().rss / 1e6
            self.noted.append((standing.ended, time.perf_counter() - self.began, megabytes))

    def end(self, standing: Standing) -> None:
        """Nothing more to note."""


def spec(trials: int, sampler: str) -> StudySpec:
    """Every trial prunes four weights at another threshold, and is done."""
    return StudySpec(
        name="nothing",
        task="nothing_task.py",
        trials=trials,
        sampler=sampler,
        train={"epochs": 0},
        space={"threshold": {"low": 1e-6, "high": 1.0}, "retrain": "none", "criterion": "magnitude"},
    )


def main() -> None:
    """Run N trials in a fresh store and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--local", action="store_true")
    options = parser.parse_args()
    pool: Pool = LocalPool() if options.local else RayPool(2)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(spec(options.trials, options.sampler), folder, root=Path(__file__).parent)
        memory = Memory()
        try:
            standing = study.run(pool, progress=memory)
        finally:
            pool.close()
        seconds = time.perf_counter() - memory.began
        rows = study.table().num_rows
    found = {
        "trials": standing.done,
        "rows": rows,
        "per_s": round(standing.done / seconds, 1),
        "sampler": options.sampler,
    }
    if len(memory.noted) > 2:
        first, last = memory.noted[1], memory.noted[-1]
        found["kb_per_trial"] = round(1000 * (last[2] - first[2]) / (last[0] - first[0]), 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
