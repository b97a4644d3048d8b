"""Run one op on its parents' states: torch only, no ray, no files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator import training
from orchestrator.measures.flops import Flops, count
from orchestrator.narrowing import HOOKS, Narrowable, examine
from orchestrator.ops import Init, Op, Prune, Rewind, Train
from orchestrator.pruning import criteria
from orchestrator.pruning.prune import prune
from orchestrator.seeds import derive
from orchestrator.state import State, into_model, of_model
from orchestrator.tasks.data import Batches, InMemory, move
from orchestrator.tasks.describe import example_of
from orchestrator.tasks.load import LoadedTask, isolated


class Stages:
    """Runs ops for one task on one device; holds the model and the data there."""

    def __init__(self, loaded: LoadedTask, device: str = "cpu") -> None:
        self.loaded = loaded
        self.device = torch.device(device)
        self.train = loaded.train.to(self.device)
        self.example = move(example_of(loaded), self.device)
        self._template: nn.Module | None = None

    @cached_property
    def silent(self) -> Tensor | None:
        """For each feature of the flattened training inputs whether it is zero throughout; None if not in memory."""
        if not isinstance(self.train, InMemory) or not isinstance(self.train.inputs, Tensor):
            return None
        return ~(self.train.inputs != 0).reshape(len(self.train), -1).any(dim=0).to("cpu")

    @cached_property
    def narrowable(self) -> Narrowable:
        """The linear layers that may be narrowed in training; none where the user's own step may look at any weight."""
        if self.loaded.task.step is not None:
            return Narrowable()
        with isolated(0), training.arithmetic(self.device):
            batch = next(self._examples(2, torch.Generator().manual_seed(0)))
            return examine(self.model(), batch[0], lambda model: training.loss_of(model, batch, self.loaded.task))

    @cached_property
    def flops(self) -> Flops:
        """The dense model's operations at batch 1; masks do not change them."""
        return count(self.model(), self.example)

    @property
    def prunable(self) -> list[str]:
        """Names of the prunable tensors in model order."""
        return [layer.name for layer in self.loaded.info.layers]

    def model(self) -> nn.Module:
        """A fresh copy of the model on the device, with whatever weights; modules that keep counts start anew."""
        if self._template is None:
            built = build(self.loaded, Init(seed=0))
            if not copies_truly(built):
                return built.to(self.device)
            self._template = built
        return copy.deepcopy(self._template).to(self.device)

    def model_of(self, state: State) -> nn.Module:
        """The model with the state's masked weights, on the device."""
        model = self.model()
        into_model(state.weights, model)
        return model

    def run(self, op: Op, parents: Sequence[State], probe: training.Probe | None = None, probe_every: int = 0) -> State:
        """The state that `op` yields from its parents' states.

        For a Train op the parent is any state of the same run, at or before `op.to`, or the state where it starts.

        Raises:
            StageFailed: the stage could not be done; NotFinite where numbers were no longer finite.
        """
        match op:
            case Init():
                return State(weights=of_model(build(self.loaded, op)))
            case Train():
                return training.train(
                    self.model(),
                    parents[0],
                    op,
                    self.loaded.task,
                    self.train,
                    steps_per_epoch=self.loaded.info.steps_per_epoch(op.recipe.batch_size),
                    layers=self.narrowable,
                    silent=self.silent,
                    probe=probe,
                    probe_every=probe_every,
                )
            case Prune():
                return self._prune(op, parents[0])
            case Rewind():
                return rewind(op, parents)

    def _prune(self, op: Prune, state: State) -> State:
        weights = {name: state.weights[name] for name in self.prunable}

        def supply(need: str) -> Mapping[str, Tensor]:
            return self._generators(op) if need == "generator" else self._gradient(op, state)

        return replace(state, masks=prune(op, weights, state.masks, supply)).masked()

    def _generators(self, op: Prune) -> dict[str, Any]:
        assert op.seed is not None
        return {
            name: torch.Generator().manual_seed(derive(op.seed, op.criterion, op.round or 0, name))
            for name in self.prunable
        }

    def _gradient(self, op: Prune, state: State) -> Mapping[str, Tensor]:
        assert op.seed is not None
        examples = dict(op.parameters).get("examples", criteria.EXAMPLES)
        generator = torch.Generator().manual_seed(derive(op.seed, "examples", op.criterion, op.round or 0))
        # A dataset may augment, and a model may draw in evaluation mode too.
        with isolated(derive(op.seed, "gradient", op.criterion, op.round or 0)):
            return training.gradient(self.model(), state, self.loaded.task, self._examples(examples, generator))

    def _examples(self, count: int, generator: torch.Generator) -> Iterator[Any]:
        """`count` training examples in batches, drawn by `generator`; whole batches where data bring their own."""
        if isinstance(self.train, Batches):
            for batch in self.train.epoch(0, generator):
                yield batch
                count -= training.rows_of(batch)
                if count <= 0:
                    break
        else:
            for indices in torch.split(torch.randperm(len(self.train), generator=generator)[:count], 256):
                yield self.train.take(indices)


def build(loaded: LoadedTask, op: Init) -> nn.Module:
    """The model as built under the op's init seed, on the CPU."""
    with isolated(op.seed):
        return loaded.model(fresh=op.fresh)


def copies_truly(model: nn.Module) -> bool:
    """Whether `deepcopy` makes an independent model: hooks and closures would still reach into the original."""
    for module in model.modules():
        values = [value for kept in vars(module).values() for value in _flat(kept)]
        closed = any(isinstance(value, FunctionType) and value.__closure__ for value in values)
        if closed or any(getattr(module, hooks) for hooks in HOOKS):
            return False
    for parameter in model.parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return False
    try:
        copy.deepcopy(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # not every model can be copied: some hold a lock, a file or a tensor with a history
        return False
    return True


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple, set)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    else:
        yield value


def rewind(op: Rewind, parents: Sequence[State]) -> State:
    """Weights: the ancestor as it was, under the pruned state's masks. Lr: only the optimizer and position go back."""
    pruned = parents[0]
    if op.what == "lr":
        assert op.to is not None
        return replace(pruned, optimizer={}, position=op.to)
    return replace(parents[1], masks=pruned.masks).masked()
