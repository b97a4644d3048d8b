"""The 40 proposals of proposals.json as a Ray Tune user would run them, for comparison with Orchardist.

    python tests/benchmarks/ray_tune_baseline.py --variant plain|tuned [--limit N]

Every proposal trains LeNet-300-100 on 4,000 MNIST digits for 10 epochs and then prunes and retrains round by round,
with `torch.nn.utils.prune` in a function trainable that reports each round: two CPUs, one per trial, actors reused, no
dashboard. `plain` feeds batches by a DataLoader to Adam, under Tune's default settings; `tuned` takes them by index from
memory, fuses Adam, and has Tune set as its guides advise. Data, split and network are those of the task `mnist`. Prints
one JSON line; `seconds` run from the start of this process to the last result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when ray is imported.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0", RAY_AIR_NEW_OUTPUT="0")
if "tuned" in sys.argv:  # what Tune's own guides advise for many short trials
    os.environ.update(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_MAX_PENDING_TRIALS_PG="8",
        TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
    )

import psutil
import ray
import torch
import torch.nn.functional as F
from ray import tune
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.tasks.mnist import task
from orchestrator.tasks.models import mlp

EPOCHS = 10
FINETUNE_EPOCHS = 4
BATCH = 60
LR = 1.2e-3

Rows = tuple[Tensor, Tensor]


def batches(data: Rows, variant: str) -> Iterator[Rows]:
    """One epoch of shuffled batches."""
    inputs, targets = data
    if variant == "plain":
        yield from DataLoader(TensorDataset(inputs, targets), batch_size=BATCH, shuffle=True)
        return
    for chosen in torch.randperm(len(inputs)).split(BATCH):
        yield inputs[chosen], targets[chosen]


def fit(model: nn.Module, data: Rows, epochs: int, variant: str) -> None:
    """Train with a fresh optimizer."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=variant == "tuned")
    for _ in range(epochs):
        for inputs, targets in batches(data, variant):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Rows) -> float:
    """Share of the rows classified correctly."""
    inputs, targets = data
    return float((model(inputs).argmax(1) == targets).float().mean())


def trial(config: dict[str, Any], splits: dict[str, Any], variant: str) -> None:
    """One proposal from its dense training to its last round."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, valid, test = ((torch.from_numpy(x), torch.from_numpy(y)) for x, y in splits.values())
    proposal = config["proposal"]
    model = mlp(784, 300, 100, 10)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    initial = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in layers]
    fit(model, train, EPOCHS, variant)
    epochs = EPOCHS
    method = {"l1": prune.l1_unstructured, "random": prune.random_unstructured}[proposal["criterion"]]
    for _ in range(proposal["rounds"]):
        for layer in layers:
            method(layer, "weight", amount=proposal["amount"])
        rewound = proposal["strategy"] == "rewind"
        if rewound:
            with torch.no_grad():
                for layer, (weight, bias) in zip(layers, initial, strict=True):
                    layer.weight_orig.copy_(weight)
                    layer.bias.copy_(bias)
        retrain = EPOCHS if rewound else FINETUNE_EPOCHS
        fit(model, train, retrain, variant)
        epochs += retrain
        # Every round is a point of the front, here as there.
        kept = sum(float(layer.weight_mask.sum()) for layer in layers)
        tune.report(
            {
                "accuracy": accuracy(model, valid),
                "test_accuracy": accuracy(model, test),
                "sparsity": 1 - kept / sum(layer.weight.numel() for layer in layers),
                "epochs": epochs,
            }
        )


def main() -> None:
    """Run the proposals and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=["plain", "tuned"], required=True)
    parser.add_argument("--limit", type=int, help="only the first N proposals")
    options = parser.parse_args()
    proposals = json.loads(Path(__file__).with_name("proposals.json").read_text())[: options.limit]
    digits = task()
    splits = {
        name: (inputs.numpy(), targets.numpy())
        for name, (inputs, targets) in (("train", digits.train), ("valid", digits.valid), ("test", digits.test))
    }
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(trial, splits=splits, variant=options.variant), {"cpu": 1}),
            param_space={"proposal": tune.grid_search(proposals)},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=folder, verbose=0, failure_config=tune.FailureConfig(max_failures=1)
            ),
        )
        results = tuner.fit()
    seconds = time.time() - psutil.Process().create_time()
    assert not results.errors, results.errors
    rows = [
        result.config["proposal"]
        | {name: result.metrics[name] for name in ("accuracy", "test_accuracy", "sparsity", "epochs")}
        for result in results
    ]
    ray.shutdown()
    print(
        json.dumps(
            {
                "variant": options.variant,
                "seconds": round(seconds, 2),
                "epochs": sum(row["epochs"] for row in rows),
                "mean_test_accuracy": statistics.mean(row["test_accuracy"] for row in rows),
                "trials": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
