"""A mask update in the middle of training beside training steps of the same model: one Prune op by magnitude.

    python tests/benchmarks/updates.py [--repeats N]

Digits in batches of 60 with Adam, from a state that is half pruned and in training already: the update scores, selects,
and zeroes weights and moments, to a sparsity of 0.6, globally. Steps are the difference between longer and shorter
training of that state; `cut` is what it costs to end a stage of training and begin the next. All in turns, on one
thread, in processor time. Prints one JSON line with a row for each model: medians in milliseconds, and `steps`, the
median of update over step within each turn.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from orchestrator.ops import Init, Op, Prune, Recipe, Train
from orchestrator.stages import Stages
from orchestrator.state import State
from orchestrator.tasks.load import load
from orchestrator.tasks.source import collect

MODELS = {"lenet-300-100": 30, "lenet-conv": 20, "resnet": 4}
"""With the steps of the shorter training."""
BEGUN = 10
LONGER = 3
"""The longer training has so many times the steps of the shorter."""


def row(name: str, short: int, repeats: int) -> dict[str, Any]:
    """The figures of one model."""
    stages = Stages(load(collect("mnist", Path()), {"model": name}))
    recipe = Recipe(optimizer="adam", lr=1.2e-3, batch_size=60)

    def seconds(op: Op, state: State, times: int = 1) -> float:
        began = time.process_time()
        for _ in range(times):
            stages.run(op, [state])
        return (time.process_time() - began) / times

    def trained(state: State, steps: int) -> Train:
        return Train(recipe=recipe, order_seed=0, to=state.position + steps)

    state = stages.run(Init(seed=0), [])
    state = stages.run(trained(state, BEGUN), [state])
    state = stages.run(Prune(criterion="magnitude", scope="global", sparsity=0.5), [state])
    state = stages.run(trained(state, BEGUN), [state])
    update = Prune(criterion="magnitude", scope="global", sparsity=0.6, floor=1)
    seconds(update, state)
    updates, steps, cuts = [], [], []
    for _ in range(repeats):
        updates.append(seconds(update, state, 5))
        shorter = seconds(trained(state, short), state)
        longer = seconds(trained(state, LONGER * short), state)
        steps.append((longer - shorter) / ((LONGER - 1) * short))
        cuts.append(shorter - short * steps[-1])
    ratios = [one / other for one, other in zip(updates, steps, strict=True)]
    return {
        "model": name,
        "update_ms": round(1000 * median(updates), 3),
        "step_ms": round(1000 * median(steps), 3),
        "cut_ms": round(1000 * median(cuts), 3),
        "steps": round(median(ratios), 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"rows": [row(name, short, options.repeats) for name, short in MODELS.items()]}))


if __name__ == "__main__":
    main()
