"""A task of one's own: tell benign from malignant tumours by 30 measurements (569 patients, from scikit-learn)."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from orchestrator.tasks import Metric, Task


class Screen(nn.Module):
    """Two hidden layers; any module will do, and `orchestrator.load` gives this very class back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(30, width)
        self.hidden2 = nn.Linear(width, width)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden2(F.relu(self.hidden1(x)))))


def missed(outputs: Tensor, targets: Tensor) -> float:
    """The share of malignant tumours (class 0) that are called benign, over a whole split."""
    malignant = targets == 0
    return float((outputs.argmax(1)[malignant] == 1).float().mean())


def task(width: int = 64) -> Task:
    data = load_breast_cancer()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    x = (x - x[:369].mean(0)) / x[:369].std(0)
    return Task(
        model=lambda: Screen(width),
        train=(x[:369], y[:369]),
        valid=(x[369:469], y[369:469]),
        test=(x[469:], y[469:]),
        metrics={"accuracy": "accuracy", "missed": Metric(missed, "minimise")},
        classes=list(data.target_names),
    )
