"""A model that comes already trained: here it trains itself once; a checkpoint of one's own would be loaded instead."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from orchestrator.tasks import Task
from orchestrator.tasks.digits import task as digits


def untrained() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


@cache
def weights() -> dict[str, torch.Tensor]:
    """In earnest: `safetensors.torch.load_file("model.safetensors")`. The same on every worker, whatever its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2024)
        model, (x, y) = untrained(), digits().train
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.state_dict()


def trained() -> nn.Module:
    model = untrained()
    model.load_state_dict(weights())
    return model


def task() -> Task:
    data = digits()
    return Task(
        model=trained,
        fresh=untrained,  # says that model() comes trained; needed for retrain = "reinit"
        train=data.train,  # for retraining, and for criteria that look at gradients
        valid=data.valid,
        test=data.test,
        classes=data.classes,
    )
