"""Train under masks: a function of the state, the recipe, the data and the position, and of nothing else.

Batches, augmentation and dropout come from (order seed, epoch, step) and the learning rate from the step, so a run may
be cut anywhere and goes on to the same bits.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from orchestrator.errors import NotFinite, StageFailed
from orchestrator.ops import Recipe, Train
from orchestrator.pruning.penalties import PENALTIES, Rows
from orchestrator.seeds import derive
from orchestrator.state import State, into_model, of_model, zeroed
from orchestrator.tasks.data import Batches, InMemory, Split, call, tensors
from orchestrator.tasks.task import Task
from orchestrator.training import optimizers
from orchestrator.training.narrowing import Narrowable, is_torchs, narrowed, only_torch, widen_columns

Probe = Callable[[int, nn.Module], None]
"""Called with the position and the model in training at each step that is to be evaluated."""

Watch = Callable[[int, Callable[[int], State]], None]
"""Called after every step but the last with the position and with what gives the state there; it may raise to end the
training. Whoever asks for the state must be done with it before returning: the training goes on in the same tensors."""

Penalise = Callable[[Tensor, Tensor], None]
"""Adds a penalty's gradient at a weight, the first argument, to the second in place."""

WHOLE = Narrowable()
MOVEMENT = "movement"


def train(
    model: nn.Module,
    state: State,
    op: Train,
    task: Task,
    data: Split | Batches,
    *,
    steps_per_epoch: int,
    layers: Narrowable = WHOLE,
    silent: Tensor | None = None,
    prunable: Sequence[str] = (),
    probe: Probe | None = None,
    probe_every: int = 0,
    watch: Watch | None = None,
) -> State:
    """Train `state` on until position `op.to`.

    Where the recipe gathers "movement", the result's `gathered` holds, for each prunable tensor, the sum over all steps
    of -gradient · weight (Sanh et al., 2020): of the loss alone, at the weights before the step and without the
    learning rate, so that a schedule does not weigh the steps. It goes on from what the state has gathered. A masked
    weight is zero and adds nothing; nor does a frozen one, which does not move.

    Args:
        model: a fresh copy of the task's model, on the device to train on; its weights are overwritten.
        state: where to go on; its optimizer state is used when it has one.
        op: the recipe, the order of the data and the position to reach. Where the run was cut does not matter.
        task: the loss.
        data: the training split, on the device of the model.
        steps_per_epoch: how many batches it makes in one epoch.
        layers: those that may be narrowed.
        silent: for each input feature whether it is zero in all of `data`; None where that is not known.
        prunable: names of the tensors that the recipe's penalty shrinks and of which it gathers statistics.
        probe: is shown the whole model every `probe_every` steps.
        watch: is asked after every step.

    Raises:
        NotFinite: the loss or a weight became NaN or infinite; a gradient that is so at a masked weight counts too.
        StageFailed: the loss is no scalar, an epoch has too few batches, or the model writes on its masked weights.
    """
    assert state.position <= op.to, f"at step {state.position} already, cannot train to {op.to}"
    recipe = op.recipe
    device = next(iter(model.parameters())).device
    into_model(state.weights, model)
    model.train()
    draws = task.step is not None or not isinstance(data, InMemory) or not (only_torch(model) and is_torchs(task.loss))
    # Weight decay and penalties move weights without a gradient, and a step of the user's own may look at them.
    idle_inputs = silent if not recipe.weight_decay and not recipe.penalty and task.step is None else None
    with arithmetic(device), narrowed(model, state.masks, layers, idle_inputs) as narrow:
        columns = narrow.columns
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        parameters = [p for p in model.parameters() if p.requires_grad]
        masks = {name: _part(state.masks[name].to(device), columns.get(name)) for name in names if name in state.masks}
        factors = [_factor(masks.get(name), p) for name, p in zip(names, parameters, strict=True)]
        optimizer = optimizers.get(recipe.optimizer)
        slots = _slots(optimizer, names, parameters, state, columns)
        penalties = _penalties(recipe, model, names, parameters, state, prunable)
        moved = _movements(recipe, names, parameters, state, columns, prunable)

        def reached(position: int) -> State:
            weights = of_model(model)
            found = State(
                weights=weights,
                masks=state.masks,
                optimizer=_moments(optimizer, names, parameters, slots, columns, state),
                position=position,
                gathered=_gathered(recipe, names, moved, columns, state, prunable),
            ).masked()
            _check(weights, found, state)
            return found

        def reached_so_far(position: int) -> State:
            with narrow.whole():
                return reached(position)

        for position, batch in _batches(op, data, state.position, steps_per_epoch, device, draws):
            loss = loss_of(model, batch, task)
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                _update(
                    optimizer, parameters, slots, factors, penalties, moved, recipe, learning_rate(recipe, position)
                )
            for parameter in parameters:
                parameter.grad = None
            done = position + 1
            if done == op.to or done % 64 == 0:
                _refuse_not_finite(loss, done)
            if probe is not None and probe_every and done % probe_every == 0:
                with narrow.whole():
                    probe(done, model)
            if watch is not None and done < op.to:
                watch(done, reached_so_far)
    return reached(op.to)


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
    """The task's loss on one batch.

    Raises:
        StageFailed: it is no scalar tensor.
    """
    if task.step is not None:
        loss = task.step(model, batch)
    else:
        inputs, targets = batch
        loss = task.loss(call(model, inputs), targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise StageFailed(f"the training loss must be a scalar tensor, not {_kind(loss)}")
    return loss


def rows_of(batch: tuple[Any, Any]) -> int:
    """How many examples are in a batch."""
    return len(next(tensors(batch[0]))[1])


def _batches(
    op: Train, data: Split | Batches, position: int, per_epoch: int, device: torch.device, draws: bool
) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """(position, batch) for every step from `position` to `op.to`; `draws` as `_seed_everything` has it."""
    size = op.recipe.batch_size
    while position < op.to:
        epoch, first = divmod(position, per_epoch)
        generator = torch.Generator().manual_seed(derive(op.order_seed, "order", epoch))
        noise = derive(op.order_seed, "noise", epoch)
        last = min(per_epoch, first + op.to - position)
        if isinstance(data, Batches):
            batches = data.epoch(epoch, generator)
            for index in range(last):
                # Before the batch is made, so that whatever its maker draws does not depend on where training was cut.
                _seed_everything(noise + index, device, draws)
                batch = next(batches, None)
                if batch is None:
                    made = f"the batches of epoch {epoch} end after {index}"
                    raise StageFailed(f"{made}, but every epoch must have as many as epoch 0: {per_epoch}")
                if index >= first:
                    yield epoch * per_epoch + index, batch
        else:
            order = torch.randperm(len(data), generator=generator)
            for index in range(first, last):
                _seed_everything(noise + index, device, draws)
                yield epoch * per_epoch + index, data.take(order[index * size : (index + 1) * size])
        position = epoch * per_epoch + last


def _seed_everything(seed: int, device: torch.device, draws: bool) -> None:
    """Seed dropout and augmentation for one step.

    Python's and numpy's generators take time: only where `draws` says that the user's code is run, which may use them.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    if draws:
        random.seed(seed)
        np.random.seed(seed % 2**32)


@contextmanager
def arithmetic(device: torch.device) -> Iterator[None]:
    """One thread and no denormals on a CPU, whoever calls; what the process had before comes back afterwards."""
    threads = torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    flushed = sys.float_info.min * 0.5 == 0.0  # torch cannot be asked
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        yield
    finally:
        torch.set_flush_denormal(flushed)
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _update(
    optimizer: optimizers.Optimizer,
    parameters: list[nn.Parameter],
    slots: Mapping[str, list[Tensor]],
    factors: list[Tensor | None],
    penalties: list[Penalise | None],
    moved: list[Tensor | None],
    recipe: Recipe,
    lr: float,
) -> None:
    """One optimizer step on the masked gradients; a parameter without a gradient is left alone, as torch.optim does.

    All lists are as long as `parameters`, but `penalties` and `moved` are empty where the recipe has none.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if len(gradients) < len(parameters):
        some = [index for index, p in enumerate(parameters) if p.grad is not None]
        if some:
            chosen = {slot: [kept[index] for index in some] for slot, kept in slots.items()}
            beside = [penalties[i] for i in some] if penalties else [], [moved[i] for i in some] if moved else []
            _update(optimizer, [parameters[i] for i in some], chosen, [factors[i] for i in some], *beside, recipe, lr)
        return
    if moved:
        for parameter, gradient, total in zip(parameters, gradients, moved, strict=True):
            if total is not None:
                total.addcmul_(gradient, parameter, value=-1)
    masked = [(gradient, factor) for gradient, factor in zip(gradients, factors, strict=True) if factor is not None]
    if masked:
        torch._foreach_mul_([gradient for gradient, _ in masked], [factor for _, factor in masked])
    if penalties:
        for parameter, gradient, penalise in zip(parameters, gradients, penalties, strict=True):
            if penalise is not None:
                penalise(parameter, gradient)
    optimizer.step(parameters, gradients, slots, recipe, lr)


def _factor(mask: Tensor | None, parameter: Tensor) -> Tensor | None:
    """What the gradient is multiplied by; None where nothing is masked."""
    return None if mask is None or bool(mask.all()) else mask.to(parameter.dtype)


def _check(weights: Mapping[str, Tensor], masked: State, before: State) -> None:
    """Refuse what went wrong on the way from `before` to `weights`, of which `masked` is the masked state.

    A buffer may be infinite if it was, as attention masks are.
    """
    for name, tensor in weights.items():
        if (
            not (tensor.is_floating_point() or tensor.is_complex())
            or _finite(tensor)
            or not _finite(before.weights[name])
        ):
            continue
        raise NotFinite(f"{name} holds NaN or infinite values at step {masked.position}: the training diverged")
    for name, mask in masked.masks.items():
        # Equal but for the sign of zeros, or a NaN that was there before: most often this is all there is to see.
        if not torch.equal(weights[name], masked.weights[name]) and zeroed(weights[name], ~mask).any():
            raise StageFailed(f"masked weights of {name!r} came back in training: something else writes on them")


def _finite(tensor: Tensor) -> bool:
    """Whether all entries are; one that is not makes the sum so, which is far quicker, but may overflow by itself."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


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
            stored.to(device, copy=True)
            if stored.dim() == 0
            else _part(stored.to(device, copy=True), columns.get(name))
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


def _penalties(
    recipe: Recipe,
    model: nn.Module,
    names: list[str],
    parameters: list[nn.Parameter],
    state: State,
    prunable: Sequence[str],
) -> list[Penalise | None]:
    """What the recipe's penalty adds to each parameter's gradient; nothing for one that is not prunable."""
    if not recipe.penalty:
        return []
    add = PENALTIES[recipe.penalty].function

    def of(name: str, parameter: nn.Parameter) -> Penalise:
        see, dims = _in_rows(model.get_submodule(name.rpartition(".")[0]), parameter)
        kept = see(state.masks.get(name, torch.ones(state.weights[name].shape, dtype=torch.bool)))
        sizes = kept.sum(dims, keepdim=True).to(parameter.device, _sum_dtype(parameter))
        rows = Rows(dims=dims, roots=sizes.sqrt())
        return lambda weight, gradient: add(see(weight), see(gradient), recipe.penalty_strength, rows)

    return [of(n, p) if n in prunable else None for n, p in zip(names, parameters, strict=True)]


def _in_rows(module: nn.Module, weight: Tensor) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """A view of the module's weight, or of some of its columns, and the dimensions that one row spans in it.

    A row lies along the first dimension, but in transposed convolutions along the second of each group of channels.
    """
    if weight.dim() < 2:
        return lambda tensor: tensor.reshape(-1, 1), (1,)
    if isinstance(module, _ConvTransposeNd):
        groups = module.groups
        return lambda tensor: tensor.unflatten(0, (groups, -1)), (1, *range(3, weight.dim() + 1))
    return lambda tensor: tensor, tuple(range(1, weight.dim()))


def _movements(
    recipe: Recipe,
    names: list[str],
    parameters: list[nn.Parameter],
    state: State,
    columns: Mapping[str, Tensor],
    prunable: Sequence[str],
) -> list[Tensor | None]:
    """The sums so far, beside each prunable parameter and on its device; in single precision or better."""
    if MOVEMENT not in recipe.gather:
        return []

    def of(name: str, parameter: nn.Parameter) -> Tensor:
        stored = state.gathered.get(f"{MOVEMENT}/{name}")
        if stored is None:
            return torch.zeros_like(parameter, dtype=_sum_dtype(parameter))
        return _part(stored.to(parameter.device, copy=True), columns.get(name))

    return [of(n, p) if n in prunable else None for n, p in zip(names, parameters, strict=True)]


def _gathered(
    recipe: Recipe,
    names: list[str],
    moved: list[Tensor | None],
    columns: Mapping[str, Tensor],
    state: State,
    prunable: Sequence[str],
) -> dict[str, Tensor]:
    """The sums of every prunable tensor by `"movement/parameter"`, in full coordinates on the CPU."""
    if MOVEMENT not in recipe.gather:
        return {}
    sums = dict(zip(names, moved, strict=True))
    gathered = {}
    for name in prunable:
        label = f"{MOVEMENT}/{name}"
        total = sums.get(name)
        if total is None or name in columns:
            # What is not trained, frozen or of an idle column, adds nothing to what was gathered before.
            weight = state.weights[name]
            whole = state.gathered.get(label, torch.zeros_like(weight, dtype=_sum_dtype(weight)))
            gathered[label] = whole if total is None else whole.index_copy(1, columns[name].to("cpu"), total.to("cpu"))
        else:
            gathered[label] = total.to("cpu")
    return gathered


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _kind(value: Any) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _refuse_not_finite(loss: Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise NotFinite(f"the training loss is {loss.item()} at step {step}: the training diverged")
