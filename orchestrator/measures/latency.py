"""How long a forward pass takes, measured."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn

from orchestrator.tasks.data import call

if TYPE_CHECKING:
    from orchestrator.tasks.data import Nested

WARM_UP = 10
RUNS = 50


def median_ms(model: nn.Module, example: Nested) -> float:
    """The median of 50 forward passes on `example` after 10 to warm up, in milliseconds, on the model's device.

    The model is left in evaluation mode.
    """
    device = next(iter(model.parameters())).device
    model.eval()
    times = []
    with torch.inference_mode():
        for _ in range(WARM_UP + RUNS):
            began = time.perf_counter()
            call(model, example)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return 1000 * median(times[WARM_UP:])
