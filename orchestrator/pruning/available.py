"""What criteria need of the model and the data, tried out beforehand: what cannot be had, of which tensors, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from orchestrator.errors import NotFinite, StageFailed
from orchestrator.pruning.statistics import Unavailable, gather
from orchestrator.tasks.data import Nested
from orchestrator.tasks.task import Task

CHEAP = {"probes": 1, "exact_up_to": 0, "block": 1}
"""What a statistic is tried with: whether it can be had does not depend on these."""


def missing(
    what: str,
    model: Callable[[], nn.Module],
    task: Task,
    batches: Sequence[tuple[Any, Any]],
    names: Sequence[str],
    example: Nested,
) -> dict[str, str]:
    """Why the statistic `what` cannot be had, by parameter; under "" where it cannot be had of any. Empty: of all.

    What is NaN or infinite here may be finite in a trained model, and is no reason.

    Args:
        what: a name in `statistics.STATISTICS`.
        model: gives a fresh copy of it, on its device.
        task: the loss.
        batches: (inputs, targets) pairs of a few training examples, on that device.
        names: of the prunable parameters.
        example: inputs of one example.
    """
    found: dict[str, str] = {}
    while len(found) < len(names):
        open_ = [name for name in names if name not in found]
        try:
            gather(what, model(), task, batches, open_, seed=0, example=example, parameters=CHEAP)
            break
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Unavailable as error:
            found |= dict.fromkeys(error.names, error.reason)
        except NotFinite:
            break
        except StageFailed as error:
            return {"": str(error)}
        except Exception as error:  # whatever a model, a loss or a derivative that torch does not have may raise
            said = str(error).strip().partition("\n")[0]
            return {"": f"its {what} cannot be had: {type(error).__name__}: {said}"}
    return found
