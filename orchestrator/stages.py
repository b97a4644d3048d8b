"""Run one op on its parents' states: torch only, no ray, no files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import ceil
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orchestrator.errors import StageFailed
from orchestrator.measures.flops import Flops, count
from orchestrator.ops import (
    SHRUNK,
    Combine,
    Control,
    Gather,
    Given,
    Init,
    Op,
    Prune,
    Recalibrate,
    Regrow,
    Rewind,
    Train,
    Transfer,
)
from orchestrator.pruning import criteria
from orchestrator.pruning.budget import Costs
from orchestrator.pruning.parts import made_by, pieces
from orchestrator.pruning.patterns import UNITS
from orchestrator.pruning.prune import Network, prune, scored
from orchestrator.pruning.regrow import needs as regrowth_needs
from orchestrator.pruning.regrow import regrow
from orchestrator.pruning.statistics import Unavailable, gather
from orchestrator.pruning.structure import Units, kept_units
from orchestrator.removal.coordinates import in_full, in_part
from orchestrator.seeds import derive
from orchestrator.state import State, into_model, of_model
from orchestrator.tasks.data import Batches, InMemory, Split, move
from orchestrator.tasks.describe import example_of
from orchestrator.tasks.info import TaskInfo, UnitCounts
from orchestrator.tasks.load import LoadedTask, isolated
from orchestrator.tickets.stage import combine, controlled, like_reference, transferred
from orchestrator.training import loop as training
from orchestrator.training.narrowing import HOOKS, Narrowable, examine
from orchestrator.training.recalibration import recalibrate

if TYPE_CHECKING:
    from orchestrator.pruning.coupling import Found
    from orchestrator.removal.shrinking import Shrunk


PROVED_ON = 64
"""Training examples on which constants are shown to be constant."""
MOST_AT_ONCE = 256
"""Examples in a batch of those that statistics are gathered over, at most."""


class Stages:
    """Runs ops for one task on one device; holds the model and the data there."""

    def __init__(self, loaded: LoadedTask, device: str = "cpu", given: State | None = None) -> None:
        self.loaded = loaded
        self.given = given
        """The ticket that the study was given."""
        self.device = torch.device(device)
        self.train = loaded.train.to(self.device)
        self.example = move(example_of(loaded), self.device)
        self._template: nn.Module | None = None
        self._units: dict[str, Found] = {}

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

    def info(self, structures: Sequence[str] = (), *, budgets: bool = False, needs: Sequence[str] = ()) -> TaskInfo:
        """The task as the driver sees it, with the units of `structures` and what cannot be had of what criteria need.

        For budgets, with the model's FLOPs, too.
        """
        units = {}
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model().named_parameters()}
        for structure in structures:
            found = self.units(structure)
            groups = {group.name: made_by(group, self.prunable) for group in found.units}
            places = {group.name: pieces(group, shapes) for group in found.units}
            units[structure] = UnitCounts(groups=groups, refused=tuple(found.refused.items()), pieces=places)
        return replace(
            self.loaded.info,
            units=units,
            flops=self.flops.by_tensor if budgets else {},
            head_flops={name: heads.work for name, heads in self.flops.by_heads.items()} if budgets else {},
            lacks={need: lacking for need in needs if (lacking := self._lacking(need))},
        )

    def _lacking(self, need: str) -> Mapping[str, str]:
        """Of which prunable tensors what criteria need cannot be had, and why."""
        from orchestrator.pruning.available import missing

        with isolated(0), training.arithmetic(self.device):
            batches = list(self._examples(2, torch.Generator().manual_seed(0)))
            return missing(need, self.model, self.loaded.task, batches, self.prunable, self.example)

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

    def run(
        self,
        op: Op,
        parents: Sequence[State],
        probe: training.Probe | None = None,
        probe_every: int = 0,
        watch: training.Watch | None = None,
    ) -> State:
        """The state that `op` yields from its parents' states.

        For a Train op the parent is any state of the same run, at or before `op.to`, or the state where it starts;
        `probe` and `watch` are for training.

        Raises:
            StageFailed: the stage could not be done; NotFinite where numbers were no longer finite.
        """
        match op:
            case Init():
                return State(weights=of_model(build(self.loaded, op)))
            case Given():
                if self.given is None:
                    raise StageFailed("the ticket file did not come along")
                return self.given
            case Train():
                return self._train(op, parents[0], probe, probe_every, watch)
            case Gather():
                return self._gather(op, parents[0])
            case Prune():
                return self._prune(op, parents)
            case Regrow():
                return self._regrow(op, parents)
            case Recalibrate():
                return self._recalibrate(op, parents[0])
            case Combine():
                return combine(op, parents, self.prunable)
            case Control():
                return controlled(op, parents)
            case Transfer():
                return transferred(op, parents)
            case Rewind():
                return rewind(op, parents)

    def units(self, structure: str) -> Found:
        """The units of a structure that can be removed, and the layers whose units cannot, with the reasons."""
        from orchestrator.pruning.finding import find  # it takes a second, which only structured pruning needs

        if structure not in self._units:
            with isolated(0), training.arithmetic(self.device):
                self._units[structure] = find(self.model(), self.example, structure, self.prunable)
        return self._units[structure]

    @cached_property
    def costs(self) -> Costs:
        """What the dense model costs, for budgets."""
        sizes = {name: parameter.numel() for name, parameter in self.model().named_parameters()}
        return Costs(sizes=sizes, prunable=frozenset(self.prunable), flops=self.flops)

    @cached_property
    def removable(self) -> tuple[Units, ...]:
        """All units that can be cut out of the model."""
        from orchestrator.pruning.finding import removable

        with isolated(0), training.arithmetic(self.device):
            return removable(self.model(), self.example, self.prunable)

    def shrunk(self, state: State) -> Shrunk | None:
        """The state's model without the units that its masks remove; None where they remove none.

        Raises:
            ShrinkRefused: the smaller model could not be shown to compute the same.
        """
        from orchestrator.removal.shrinking import shrink

        if all(bool(kept_units(group, state.masks).all()) for group in self.removable):
            return None
        with isolated(0), training.arithmetic(self.device):
            return shrink(self.model_of(state), state.masks, self.removable, self.example)

    def _train(
        self,
        op: Train,
        state: State,
        probe: training.Probe | None,
        probe_every: int,
        watch: training.Watch | None,
    ) -> State:
        data = self._share(op)
        steps = self.loaded.info.steps_per_epoch(op.recipe.batch_size)
        run = partial(
            training.train,
            op=op,
            task=self.loaded.task,
            data=data,
            steps_per_epoch=steps if isinstance(data, Batches) else ceil(len(data) / op.recipe.batch_size),
            prunable=self.prunable,
            probe=probe,
            probe_every=probe_every,
        )
        shrunk = self.shrunk(state) if op.recipe.arithmetic.endswith(SHRUNK) and state.masks else None
        if shrunk is None:
            return run(self.model(), state, layers=self.narrowable, silent=self.silent, watch=watch)
        trained = [name for name, parameter in self.model().named_parameters() if parameter.requires_grad]
        smaller = shrunk

        def in_whole(position: int, reached: Callable[[int], State]) -> None:
            assert watch is not None
            watch(position, lambda position: in_full(reached(position), state, smaller, trained))

        part = run(
            shrunk.model, in_part(state, shrunk), layers=training.WHOLE, watch=None if watch is None else in_whole
        )
        return in_full(part, state, shrunk, trained)

    def _share(self, op: Train) -> Split | Batches:
        """The training data, or the share of them that `op` trains on."""
        if op.share == 1:
            return self.train
        if isinstance(self.train, Batches):
            raise StageFailed("vary 'data' draws training examples, but the task's train is a function of the epoch")
        generator = torch.Generator().manual_seed(derive(op.share_seed, "share"))
        chosen = torch.randperm(len(self.train), generator=generator)[: ceil(op.share * len(self.train))]
        return self.train.subset(chosen.sort().values)

    def _gather(self, op: Gather, state: State) -> State:
        found: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(derive(op.seed, "examples", op.round))
        # A dataset may augment, and a model may draw in evaluation mode too.
        with isolated(derive(op.seed, "gather", op.round)), training.arithmetic(self.device):
            batches = list(self._examples(op.examples, generator))
            for what in op.what:
                values = self._gathered(what, op, state, batches, self.prunable)
                found |= {f"{what}/{name}": value for name, value in values.items()}
        return State(weights={}, gathered=found, position=state.position)

    def _gathered(
        self, what: str, op: Gather, state: State, batches: Sequence[tuple[Any, Any]], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The statistic of those tensors that it can be had of: the others may be protected."""
        try:
            return gather(
                what,
                self.model_of(state),
                self.loaded.task,
                batches,
                names,
                seed=derive(op.seed, what, op.round),
                example=self.example,
                parameters=dict(op.parameters),
            )
        except Unavailable as error:
            rest = [name for name in names if name not in error.names]
            if not rest:
                raise
            return self._gathered(what, op, state, batches, rest)

    def _prune(self, op: Prune, parents: Sequence[State]) -> State:
        state = parents[0]
        if op.like:
            *parents, reference = parents
            op = like_reference(op, state, reference, {layer.name: layer.size for layer in self.loaded.info.layers})
        gathered = {**state.gathered, **(parents[1].gathered if len(parents) > 1 else {})}

        def supply(need: str) -> Mapping[str, Any]:
            if need == "generator":
                return self._generators(op.criterion, op.seed, op.round)
            if need in criteria.FROM_STATE:
                with isolated(0), training.arithmetic(self.device):
                    return gather(
                        need,
                        self.model_of(state),
                        self.loaded.task,
                        [],
                        list(scored(op, network)),
                        seed=0,
                        example=self.example,
                        parameters={},
                    )
            return _under(need, gathered)

        network = Network(
            weights={name: state.weights[name] for name in self.prunable},
            masks=state.masks,
            shapes={name: tensor.shape for name, tensor in state.weights.items()},
            units=self.units(op.structure).units if op.structure in UNITS else (),
            costs=lambda: self.costs,
        )
        pruned = prune(op, network, supply)
        moved = replace(state, weights={**state.weights, **pruned.moved})
        if op.fold:
            moved = self._folded(op, moved, pruned.masks)
        return replace(moved, masks=pruned.masks, remarks=pruned.remarks).masked()

    def _folded(self, op: Prune, state: State, masks: Mapping[str, Tensor]) -> State:
        """The state with what the units that `masks` remove give without their weights in other units' biases."""
        from orchestrator.removal.folding import fold_removed
        from orchestrator.removal.proof import ShrinkRefused

        with isolated(0), training.arithmetic(self.device):
            inputs = [batch[0] for batch in self._examples(PROVED_ON, torch.Generator().manual_seed(0))]
            units = self.units(op.structure).units
            try:
                model = fold_removed(self.model_of(state), state.masks, masks, units, self.example, inputs=inputs)
            except ShrinkRefused as error:
                where = repr(error.layer) if error.layer else "the model"
                said = f"fold: the constants of removed units cannot move into {where}: {error.reason}"
                raise StageFailed(f"{said}; legal: fold = false") from error
        return replace(state, weights=of_model(model))

    def _regrow(self, op: Regrow, parents: Sequence[State]) -> State:
        state = parents[0]
        needs = regrowth_needs(op.by)
        gradient = _under("gradient", parents[1].gathered) if "gradient" in needs else {}
        generators = self._generators(op.by, op.seed, op.round) if "generator" in needs else {}
        kept = {name for name, factor in op.factors if factor == 0}
        masks = dict(state.masks)
        for name in self.prunable:
            if name in masks and name not in kept:
                masks[name] = regrow(
                    op.by,
                    masks[name],
                    state.weights[name],
                    op.fraction,
                    name=name,
                    gradient=gradient.get(name),
                    generator=generators.get(name),
                )
        return replace(state, masks=masks, remarks={}).masked()

    def _recalibrate(self, op: Recalibrate, state: State) -> State:
        model = self.model_of(state)
        generator = torch.Generator().manual_seed(derive(op.seed, "recalibrate"))
        with isolated(derive(op.seed, "recalibration")), training.arithmetic(self.device):
            recalibrate(model, self._examples(op.examples, generator))
        return replace(state, weights=of_model(model), remarks=state.remarks).masked()

    def _generators(self, purpose: str, seed: int | None, number: int | None) -> dict[str, Any]:
        assert seed is not None
        return {name: torch.Generator().manual_seed(derive(seed, purpose, number or 0, name)) for name in self.prunable}

    def _examples(self, count: int, generator: torch.Generator) -> Iterator[Any]:
        """`count` training examples in batches, drawn by `generator`; whole batches where data bring their own."""
        if isinstance(self.train, Batches):
            for batch in self.train.epoch(0, generator):
                yield batch
                count -= training.rows_of(batch)
                if count <= 0:
                    break
        else:
            chosen = torch.randperm(len(self.train), generator=generator)[:count]
            # Of equal sizes: in a last batch of one example a norm would find no variance.
            for indices in torch.tensor_split(chosen, ceil(len(chosen) / MOST_AT_ONCE)):
                yield self.train.take(indices)


def _under(what: str, gathered: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The statistic `what` by parameter name.

    Raises:
        StageFailed: nobody gathered it.
    """
    found = {name.removeprefix(f"{what}/"): tensor for name, tensor in gathered.items() if name.startswith(f"{what}/")}
    if not found:
        raise StageFailed(f"the criterion needs {what!r}, which the training before this pruning did not gather")
    return found


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
        return replace(pruned.without_optimizer(), position=op.to, remarks={})
    return replace(parents[1], masks=pruned.masks, remarks={}).masked()
