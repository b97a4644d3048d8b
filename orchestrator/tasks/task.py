"""What a task is: a model, its data, and how well it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Metric:
    """A figure over a whole split: `function(outputs, targets) -> float`, and whether more or less of it is better."""

    function: Callable[[Any, Any], float]
    direction: Literal["maximise", "minimise"] = "maximise"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model with its data: everything that Orchardist has to know of a user's problem.

    Args:
        model: builds the model, under the init seed; it may come with pretrained weights.
        train: `(inputs, targets)` tensors, a map-style `Dataset` of `(input, target)`, or a function
            `f(epoch, generator)` that returns the epoch's batches. Inputs may be a tensor, a tuple (passed to the model
            by position) or a dict (passed by keyword) of tensors, with examples along the first dimension.
        valid: steers the search; tensors or a `Dataset`.
        test: is only ever reported; tensors, a `Dataset`, or None.
        loss: `f(outputs, targets) -> scalar tensor`, the mean over the batch. Outputs are what the model returns, or
            its `.logits` where it returns an object that has them.
        step: `f(model, batch) -> loss`, instead of `loss`, for models that compute their own; `batch` is
            `(inputs, targets)`.
        metrics: name -> a built-in name ("accuracy"), a callable, or a `Metric`; over the whole split's outputs. The
            first is the main one.
        fresh: the untrained builder, for a `model` that comes trained.
        example: inputs of one example, for counting FLOPs; by default the first of `train`.
        classes: the classes' names, which turns on the per-class measures.
        prunable: `f(parameter_name, parameter) -> bool`; by default the weights of linear, convolution and attention
            projection layers.
        groups: a name, such as "sex" -> "valid" and "test" -> the label of each example of that split: a sequence of
            words or whole numbers, or a tensor. Turns on the group measures; needs `classes`.
        data_version: names the data where they are not tensors in memory and so cannot be hashed; where it is given,
            tensors are not hashed either.
    """

    model: Callable[[], nn.Module]
    train: Any
    valid: Any
    test: Any = None
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    step: Callable[[nn.Module, Any], Tensor] | None = None
    metrics: Mapping[str, str | Callable[[Any, Any], float] | Metric] = field(
        default_factory=lambda: {"accuracy": "accuracy"}
    )
    fresh: Callable[[], nn.Module] | None = None
    example: Any = None
    classes: Sequence[str] | None = None
    prunable: Callable[[str, Tensor], bool] | None = None
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data_version: str = ""
