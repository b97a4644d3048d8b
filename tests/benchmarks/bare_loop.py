"""Epochs a second of the bare PyTorch loop: no masks, nothing recorded. The ceiling for any worker.

    python tests/benchmarks/bare_loop.py [--epochs N] [--repeats N]

LeNet-300-100 on 4,000 MNIST digits, batches of 60 by index from memory, fused Adam, one thread: the same network, data
and batches as in the comparison with Ray Tune. Prints one JSON line: the best of the repeats, so that a busy machine
does not flatter us.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F

from orchestrator.tasks.mnist import task

BATCH = 60
LR = 1.2e-3


def seconds(epochs: int) -> float:
    """How long this many epochs take, after one to warm up."""
    torch.manual_seed(0)
    digits = task()
    model, (inputs, targets) = digits.model(), digits.train
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    started = 0.0
    for epoch in range(epochs + 1):
        if epoch == 1:
            started = time.perf_counter()
        for chosen in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    best = min(seconds(options.epochs) for _ in range(options.repeats))
    print(json.dumps({"epochs_per_second": round(options.epochs / best, 2)}))


if __name__ == "__main__":
    main()
