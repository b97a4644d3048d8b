"""Optimizer steps on plain tensors.

The arithmetic is PyTorch's own fused kernels, bit for bit what `torch.optim` computes with `fused=True` (a test holds
them together; SGD in half precision is the exception); the optimizer classes around them take a tenth of a small
model's step. Each optimizer is elementwise, so an entry whose weight, gradient and moments are zero stays zero, with or
without weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.ops import Recipe
from orchestrator.registry import Registry

Step = Callable[[Sequence[Tensor], Sequence[Tensor], Mapping[str, list[Tensor]], Recipe, float], None]
OPTIMIZERS: Registry[Step] = Registry("optimizer")

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Optimizer:
    """An optimizer's step and the slots of state that it keeps beside each parameter."""

    step: Step
    slots: tuple[str, ...]


def get(name: str) -> Optimizer:
    """The optimizer called `name`."""
    entry = OPTIMIZERS[name]
    return Optimizer(step=entry.function, slots=tuple(entry.facts["slots"]))


def fresh_slots(optimizer: Optimizer, parameters: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Zeroed state: a scalar step count and moments like the parameters."""
    return {
        slot: [torch.zeros((), device=p.device) if slot == "step" else torch.zeros_like(p) for p in parameters]
        for slot in optimizer.slots
    }


@OPTIMIZERS.register("adam", slots=("step", "exp_avg", "exp_avg_sq"))
def adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    slots: Mapping[str, list[Tensor]],
    recipe: Recipe,
    lr: float,
) -> None:
    """Adam with L2 weight decay (Kingma & Ba, 2015); betas 0.9 and 0.999, epsilon 1e-8."""
    _adam(torch._fused_adam_, parameters, gradients, slots, recipe, lr)


@OPTIMIZERS.register("adamw", slots=("step", "exp_avg", "exp_avg_sq"))
def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    slots: Mapping[str, list[Tensor]],
    recipe: Recipe,
    lr: float,
) -> None:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""
    _adam(torch._fused_adamw_, parameters, gradients, slots, recipe, lr)


def _adam(
    kernel: Callable[..., None],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    slots: Mapping[str, list[Tensor]],
    recipe: Recipe,
    lr: float,
) -> None:
    torch._foreach_add_(slots["step"], 1)
    kernel(
        parameters,
        gradients,
        slots["exp_avg"],
        slots["exp_avg_sq"],
        [],
        slots["step"],
        lr=lr,
        beta1=0.9,
        beta2=0.999,
        weight_decay=recipe.weight_decay,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


@OPTIMIZERS.register("sgd", slots=("momentum",))
def sgd(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    slots: Mapping[str, list[Tensor]],
    recipe: Recipe,
    lr: float,
) -> None:
    """Stochastic gradient descent with classical momentum and L2 weight decay."""
    if any(p.dtype in HALVES for p in parameters):
        _sgd_in_halves(parameters, gradients, slots["momentum"], recipe, lr)
        return
    torch._fused_sgd_(
        list(parameters),
        list(gradients),
        slots["momentum"] if recipe.momentum else [],
        lr=lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def _sgd_in_halves(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], momenta: Sequence[Tensor], recipe: Recipe, lr: float
) -> None:
    """The step in single operations: on a CPU the fused kernel of torch 2.13 is wrong in half precision."""
    for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
        if recipe.weight_decay:
            gradient = gradient.add(parameter, alpha=recipe.weight_decay)
        if recipe.momentum:
            gradient = momentum.mul_(recipe.momentum).add_(gradient)
        parameter.add_(gradient, alpha=-lr)
