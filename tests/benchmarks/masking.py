"""Scoring and masking many weights at once, ranked globally by magnitude: processor seconds on one core, and memory.

    python tests/benchmarks/masking.py [--weights N] [--tied N]

One Prune op of sparsity 0.9 over eight tensors, in which every tenth weight is one of three values, the threshold among
them: so ties decide, `at_threshold` of all weights being equal there, and the count must come out exactly. Memory is the
peak of this process above what it took before the weights were there, so that the weights themselves count once. Prints
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from itertools import count

import psutil
import torch
from torch import Tensor

from orchestrator.ops import Prune
from orchestrator.pruning.prune import Network, prune

TENSORS = 8
ROW = 1000
SPARSITY = 0.9
VALUES = (1.0, 1.9, 3.0)


def network(weights: int, tied: int) -> Network:
    """So many normal weights in tensors of unlike sizes; one in `tied` is one of `VALUES`."""
    generator = torch.Generator().manual_seed(0)
    rows = weights // ROW
    parts = [rows * number // sum(range(1, TENSORS + 1)) for number in range(1, TENSORS)]
    sizes = [*parts, rows - sum(parts)]
    return Network(weights={f"layer{n}.weight": _drawn(size, tied, generator) for n, size in zip(count(1), sizes)})


def _drawn(rows: int, tied: int, generator: torch.Generator) -> Tensor:
    values = torch.tensor(VALUES)
    tensor = torch.empty(rows, ROW).normal_(generator=generator)
    for piece in torch.split(tensor, ROW):  # what is drawn here must not be the peak
        places = piece.view(-1)[::tied]
        places.copy_(values[torch.randint(len(values), places.shape, generator=generator)])
    return tensor


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=100_000_000)
    parser.add_argument("--tied", type=int, default=10, help="one weight in so many is one of three values")
    options = parser.parse_args()
    torch.set_num_threads(1)
    op = Prune(criterion="magnitude", scope="global", sparsity=SPARSITY, floor=1)
    prune(
        op, network(100 * TENSORS * ROW, options.tied), lambda need: {}
    )  # what is imported and set up at the first call
    before = psutil.Process().memory_info().rss
    given = network(options.weights, options.tied)
    total = sum(weight.numel() for weight in given.weights.values())
    began = time.process_time()
    masks = prune(op, given, lambda need: {}).masks
    seconds = time.process_time() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = sum(int(mask.sum()) for mask in masks.values())
    least = min(float(weight[masks[name]].abs().min()) for name, weight in given.weights.items())
    equal = sum(int((weight.abs() == least).sum()) for weight in given.weights.values())
    found = {
        "weights": total,
        "tied": options.tied,
        "at_threshold": round(equal / total, 3),
        "seconds": round(seconds, 2),
        "memory": round((peak - before) / (4 * total), 2),
        "exact": total - kept == round(SPARSITY * total),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
