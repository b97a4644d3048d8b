"""Train under masks: a function of the state, the recipe, the data and the position, and of nothing else.

Batches, augmentation and dropout come from (order seed, epoch, step) and the learning rate from the step, so a run may
be cut anywhere and goes on to the same bits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator import optimizers
from orchestrator.errors import NotFinite
from orchestrator.narrowing import narrowed, widen_columns
from orchestrator.ops import Recipe, Train
from orchestrator.seeds import derive
from orchestrator.state import State, into_model, of_model
from orchestrator.tasks.data import Batches, InMemory, Split, call, tensors
from orchestrator.tasks.task import Task

Probe = Callable[[int, nn.Module], None]
"""Called with the position and the model in training at each step that is to be evaluated."""


def train(
    model: nn.Module,
    state: State,
    op: Train,
    task: Task,
    data: Split | Batches,
    *,
    steps_per_epoch: int,
    example: Any,
    probe: Probe | None = None,
    probe_every: int = 0,
) -> State:
    """Train `state` on until position `op.to`.

    Args:
        model: a fresh copy of the task's model, on the device to train on; its weights are overwritten.
        state: where to go on; its optimizer state is used when it has one.
        op: the recipe, the order of the data and the position to reach. Where the run was cut does not matter.
        task: the loss.
        data: the training split, on the device of the model.
        steps_per_epoch: how many batches it makes in one epoch.
        example: inputs of one example, on the device of the model.
        probe: is shown the model every `probe_every` steps.

    Raises:
        NotFinite: the loss or a weight became NaN or infinite.
    """
    recipe = op.recipe
    device = next(iter(model.parameters())).device
    into_model(state.weights, model)
    model.train()
    with arithmetic(device), narrowed(model, state.masks, example) as columns:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        parameters = [p for p in model.parameters() if p.requires_grad]
        masks = {name: _part(state.masks[name].to(device), columns.get(name)) for name in names if name in state.masks}
        held = [(p, masks[n].to(p.dtype)) for n, p in zip(names, parameters, strict=True) if n in masks and not masks[n].all()]
        masked, factors = [p for p, _ in held], [factor for _, factor in held]
        optimizer = optimizers.get(recipe.optimizer)
        slots = _slots(optimizer, names, parameters, state, columns)
        for position, batch in _batches(op, data, state.position, steps_per_epoch):
            loss = loss_of(model, batch, task)
            loss.backward()  # type: ignore[no-untyped-call]
            if masked:
                torch._foreach_mul_([p.grad for p in masked], factors)
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
            with torch.no_grad():
                optimizer.step(parameters, gradients, slots, recipe, learning_rate(recipe, position))
            for parameter in parameters:
                parameter.grad = None
            done = position + 1
            if done == op.to or done % 64 == 0:
                _refuse_not_finite(loss, done)
            if probe is not None and probe_every and done % probe_every == 0:
                probe(done, model)
        moments = _moments(optimizer, names, parameters, slots, columns, state)
    weights = of_model(model)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NotFinite(f"{name} holds NaN or infinite values at step {op.to}: the training diverged")
    return State(weights=weights, masks=state.masks, optimizer=moments, position=op.to).masked()


def gradient(model: nn.Module, state: State, task: Task, batches: Iterable[tuple[Any, Any]]) -> dict[str, Tensor]:
    """The gradient of the mean training loss over the batches' examples, by parameter name, on the CPU.

    Taken at the masked weights, in evaluation mode (no dropout, fixed normalisation statistics).
    """
    into_model(state.weights, model)
    device = next(iter(model.parameters())).device
    model.eval()
    rows = 0
    with arithmetic(device):
        for batch in batches:
            size = _rows(batch)
            (loss_of(model, batch, task) * size).backward()  # type: ignore[no-untyped-call]
            rows += size
    return {
        name: torch.zeros(p.shape) if p.grad is None else (p.grad / rows).to("cpu")
        for name, p in model.named_parameters()
    }


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of the update at `step`; after the horizon a schedule stays at its final rate."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.lr_schedule == "constant":
        return recipe.lr
    if recipe.lr_schedule == "step":
        return recipe.lr * recipe.lr_step_factor ** sum(step >= milestone for milestone in recipe.milestones)
    progress = min(1.0, (step - recipe.warmup) / max(1, recipe.horizon - recipe.warmup))
    fall = (1 + math.cos(math.pi * progress)) / 2 if recipe.lr_schedule == "cosine" else 1 - progress
    return recipe.lr * (recipe.lr_final_fraction + (1 - recipe.lr_final_fraction) * fall)


def loss_of(model: nn.Module, batch: tuple[Any, Any], task: Task) -> Tensor:
    """The task's loss on one batch."""
    if task.step is not None:
        return task.step(model, batch)
    inputs, targets = batch
    return task.loss(call(model, inputs), targets)


def _batches(
    op: Train, data: Split | Batches, position: int, per_epoch: int
) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """(position, batch) for every step from `position` to `op.to`."""
    size = op.recipe.batch_size
    while position < op.to:
        epoch, first = divmod(position, per_epoch)
        generator = torch.Generator().manual_seed(derive(op.order_seed, "order", epoch))
        noise = derive(op.order_seed, "noise", epoch)
        last = min(per_epoch, first + op.to - position)
        if isinstance(data, Batches):
            _seed_everything(noise, python_too=True)
            epoch_batches = enumerate(data.epoch(epoch, generator))
            for index, batch in epoch_batches:
                if index >= last:
                    break
                if index >= first:
                    _seed_everything(noise + index, python_too=True)
                    yield epoch * per_epoch + index, batch
        else:
            order = torch.randperm(len(data), generator=generator)
            for index in range(first, last):
                _seed_everything(noise + index, python_too=not isinstance(data, InMemory))
                yield epoch * per_epoch + index, data.take(order[index * size : (index + 1) * size])
        position = epoch * per_epoch + last


def _seed_everything(seed: int, *, python_too: bool) -> None:
    """Seed dropout and augmentation for one step; Python's and numpy's generators only where user code draws data."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    if python_too:
        random.seed(seed)
        np.random.seed(seed % 2**32)


@contextmanager
def arithmetic(device: torch.device) -> Iterator[None]:
    """One thread and no denormals on a CPU, whoever calls; what the process had before comes back afterwards."""
    threads = torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _rows(batch: tuple[Any, Any]) -> int:
    return len(next(tensors(batch[0]))[1])


def _part(tensor: Tensor, columns: Tensor | None) -> Tensor:
    return tensor if columns is None else tensor.index_select(1, columns)


def _slots(
    optimizer: optimizers.Optimizer,
    names: list[str],
    parameters: list[nn.Parameter],
    state: State,
    columns: Mapping[str, Tensor],
) -> dict[str, list[Tensor]]:
    """The state's optimizer slots on the parameters' device, or fresh ones."""
    if not state.optimizer:
        return optimizers.fresh_slots(optimizer, parameters)
    device = parameters[0].device
    return {
        slot: [
            stored.to(device, copy=True) if stored.dim() == 0 else _part(stored.to(device, copy=True), columns.get(name))
            for name, stored in ((name, state.optimizer[f"{slot}/{name}"]) for name in names)
        ]
        for slot in optimizer.slots
    }


def _moments(
    optimizer: optimizers.Optimizer,
    names: list[str],
    parameters: list[nn.Parameter],
    slots: Mapping[str, list[Tensor]],
    columns: Mapping[str, Tensor],
    state: State,
) -> dict[str, Tensor]:
    """The slots by `"slot/parameter"`, in full coordinates on the CPU."""
    moments = {}
    for slot in optimizer.slots:
        for name, tensor in zip(names, slots[slot], strict=True):
            whole = tensor.to("cpu")
            if name in columns and whole.dim():
                whole = widen_columns(whole, columns[name].to("cpu"), state.weights[name])
            moments[f"{slot}/{name}"] = whole
    return moments


def _refuse_not_finite(loss: Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise NotFinite(f"the training loss is {float(loss)} at step {step}: the training diverged")
