"""Compute BatchNorm's running statistics anew: those of the dense model are wrong for the pruned one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from orchestrator.errors import StageFailed
from orchestrator.tasks.data import call
from orchestrator.training.loop import arithmetic


def recalibrate(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> int:
    """Replace the running mean and variance of every BatchNorm by those of `batches`, in place.

    Each is the mean over the batches of the batch's mean and unbiased variance, weighted by how many values a channel
    has in it (adaptive batch normalisation; Li et al., 2020). Layers further up see what the recalibrated ones below
    yield in training mode; all else is in evaluation mode, and no parameter changes. The count of batches tracked
    becomes how often the layer was called for the new statistics.

    Args:
        model: holds the masked weights, on the device of the batches.
        batches: of training examples.

    Returns:
        How many modules were recalibrated; 0 where the model has none that keeps statistics, and `batches` is left.

    Raises:
        StageFailed: a channel has a single value in a batch, and so no variance; or there is no batch.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = {module: module.momentum for module in norms.values()}
    device = next(iter(norms.values())).running_mean.device  # type: ignore[union-attr]
    hooks = []
    try:
        model.eval()
        for name, module in norms.items():
            module.train()
            module.reset_running_stats()
            hooks.append(module.register_forward_pre_hook(_weighted(name)))
        seen = 0
        with arithmetic(device), torch.no_grad():
            for inputs, _ in batches:
                call(model, inputs)
                seen += 1
        if not seen:
            raise StageFailed("there is no batch to recalibrate BatchNorm on")
    finally:
        for hook in hooks:
            hook.remove()
        for module, momentum in momenta.items():
            module.momentum = momentum
        for each, mode in modes.items():
            each.training = mode
    return len(norms)


def _weighted(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that sets the momentum of each call so that the running statistics are a mean over all values so far."""
    seen = 0

    def before(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        nonlocal seen
        assert isinstance(module, _BatchNorm)
        values = given[0].numel() // module.num_features
        if values == 1:
            raise StageFailed(f"cannot recalibrate {name!r} on a batch with a single value per channel: no variance")
        seen += values
        module.momentum = values / seen

    return before
