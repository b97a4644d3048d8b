"""Puts a plan together: stages with their keys, and how each is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator import ops
from orchestrator.errors import PlanError
from orchestrator.ops import (
    Combine,
    Control,
    Gather,
    Given,
    Init,
    Op,
    Prune,
    Recalibrate,
    Recipe,
    Regrow,
    Rewind,
    Train,
    Transfer,
)
from orchestrator.plan import Node, Plan, Ticket, merged
from orchestrator.planning.pruning import tensor_factors
from orchestrator.pruning import criteria
from orchestrator.pruning.patterns import UNITS
from orchestrator.pruning.regrow import needs as regrowth_needs
from orchestrator.settings import Settings, TrainSettings
from orchestrator.tasks.info import TaskInfo


class Builder:
    """Collects the nodes of one plan, each after its parents; equal stages come out once."""

    def __init__(
        self, info: TaskInfo, train: TrainSettings, seed: int, device: str, settings: Settings | None = None
    ) -> None:
        self.seed = seed
        self.settings = settings
        self._train = train
        self._device = device
        self._home = info
        self._enter("", info)
        self.shrinks = train.shrunk and settings is not None and settings.choices.structure in UNITS
        self.nodes: dict[str, Node] = {}
        self.depths: dict[str, int] = {}
        """How many trainings follow one another on the longest way to a state: no number of workers shortens it."""
        self._positions: dict[str, int] = {}
        self._pruned: set[str] = set()
        self.tickets: list[Ticket] = []

    def _enter(self, task: str, info: TaskInfo) -> None:
        self.task = task
        self.info = info
        self.steps_per_epoch = info.steps_per_epoch(self._train.batch_size)
        self.end = round(self._train.epochs * self.steps_per_epoch)
        self.recipe = _recipe(self._train, self.steps_per_epoch, self.end, self._device, self.settings)

    def on(self, task: str) -> Builder:
        """A builder of the same plan whose stages run in the study's other task of that name; "" is its own task."""
        other = copy.copy(self)
        other._enter(task, self._home.others[task] if task else self._home)
        return other

    def position(self, key: str) -> int:
        """Where training stands in a state, in steps of the task that it was trained in."""
        return self._positions[key]

    def trains_to_the_end(self, key: str) -> bool:
        """Whether a stage is a whole training; what a rewind point cuts off is part of one."""
        node = self.nodes[key]
        if not isinstance(node.op, Train):
            return False
        info = self._home.others[node.task] if node.task else self._home
        return node.op.to == round(self._train.epochs * info.steps_per_epoch(self._train.batch_size))

    def init(self) -> str:
        return self.add(Init(seed=self.seed), [])

    def dense(self, cuts: Sequence[float] = ()) -> str:
        init = self.init()
        for epoch in sorted(cuts):
            step = round(epoch * self.steps_per_epoch)
            if 0 < step < self.end:
                self.train_on(init, to=step, stored=True, resumable=True)
        return self.show(self.train_on(init, to=self.end) if self.end else init)

    def train_on(
        self,
        start_of_run: str,
        *,
        to: int,
        fresh_optimizer: bool = False,
        order_seed: int | None = None,
        share: float = 1.0,
        share_seed: int = 0,
        **marks: Any,
    ) -> str:
        """Train from `start_of_run` until position `to`, in the run's own order unless another is given."""
        start = self._positions[start_of_run]
        if to <= start:
            raise PlanError(
                f"this would train from step {start} to step {to}, that is not at all; "
                "legal: more epochs or retrain_epochs, or an earlier rewind_epoch"
            )
        recipe = self.recipe
        if self.shrinks and start_of_run in self._pruned:
            recipe = replace(recipe, arithmetic=recipe.arithmetic + ops.SHRUNK)
        op = Train(
            recipe=recipe,
            order_seed=self.seed if order_seed is None else order_seed,
            to=to,
            fresh_optimizer=fresh_optimizer,
            share=share,
            share_seed=share_seed,
        )
        return self.add(op, [start_of_run], start=start, **marks)

    def prune(self, op: Prune, state: str, *, reference: str | None = None) -> str:
        """Prune `state`, with what the criterion needs of the data gathered beforehand, and norms set right after.

        With `op.like`, as much as in the state `reference`.
        """
        assert self.settings is not None
        entry = criteria.CRITERIA[op.criterion]
        what = tuple(need for need in criteria.needs(entry) if need in criteria.FROM_DATA)
        parents = [state]
        if what:
            given = dict(op.parameters)
            how = {name: given.get(name, default) for name, default in criteria.gathering(entry).items()}
            parents.append(self.gather(what, how, state, op.round or 1))
            own = {name: value for name, value in given.items() if name not in how}
            op = replace(op, parameters=tuple(sorted(own.items())))
        if "generator" not in criteria.needs(entry):
            op = replace(op, round=None, seed=None)  # they say which data were drawn
        if reference is not None:
            parents.append(reference)
        pruned = self.add(op, parents)
        if self.settings.prune.recalibrate:
            pruned = self.add(Recalibrate(examples=self.settings.prune.recalibrate, seed=self.seed), [pruned])
        return pruned

    def gather(self, what: tuple[str, ...], how: Mapping[str, Any], state: str, number: int) -> str:
        """Statistics of the training data at `state`, before pruning `number`.

        Those of the first pruning are stored: many trials prune the same dense model.
        """
        others = {name: value for name, value in how.items() if name != "examples"}
        op = Gather(
            what=what, examples=how["examples"], seed=self.seed, round=number, parameters=tuple(sorted(others.items()))
        )
        return self.add(op, [state], stored=number == 1 and not set(what) & set(criteria.LARGE))

    def regrow(self, by: str, fraction: float, state: str, number: int) -> str:
        """Replace weights of `state`, or open its masks."""
        assert self.settings is not None
        factors = tuple((n, f) for n, f in sorted(tensor_factors(self.settings, self.info).items()) if f == 0)
        parents = [state]
        if "gradient" in regrowth_needs(by):
            parents.append(self.gather(("gradient",), criteria.FROM_DATA["gradient"], state, -number))
        draws: dict[str, Any] = {"seed": self.seed, "round": number} if "generator" in regrowth_needs(by) else {}
        return self.add(Regrow(by=by, fraction=fraction, factors=factors, **draws), parents)

    def add(self, op: Op, parents: Sequence[str], **marks: Any) -> str:
        key = ops.key(op, parents, self.info.digest)
        node = Node(key=key, op=op, parents=tuple(parents), task=self.task, **marks)
        self.nodes[key] = merged(self.nodes[key], node) if key in self.nodes else node
        self.depths[key] = max((self.depths[parent] for parent in parents), default=0)
        self.depths[key] += isinstance(op, Train) and op.to == self.end
        self._positions[key] = self._position(op, parents)
        if isinstance(op, Prune) or self._pruned.intersection(parents[:1]):
            self._pruned.add(key)
        return key

    def _position(self, op: Op, parents: Sequence[str]) -> int:
        """Where training stands after `op`, in steps."""
        match op:
            case Train(to=to):
                return to
            case Rewind(what="lr", to=to):
                assert to is not None
                return to
            case Rewind() | Transfer():
                return self._positions[parents[1]]
            case Combine() | Control():  # over another init where there is one, else over the ancestor
                return self._positions[parents[-1]]
            case Init() | Given():
                return 0
            case _:
                return self._positions[parents[0]]

    def store(self, key: str) -> None:
        """Mark the state as one that is stored."""
        self.nodes[key] = replace(self.nodes[key], stored=True)

    def show(self, key: str) -> str:
        """Mark the state as a point that is evaluated and stored."""
        self.nodes[key] = replace(self.nodes[key], evaluated=True, stored=True)
        return key

    def plan(self, points: Sequence[tuple[int, str]]) -> Plan:
        tasks = dict.fromkeys(["", *(node.task for node in self.nodes.values())])
        return Plan(
            nodes=tuple(self.nodes.values()),
            points=tuple(points),
            steps_per_epoch={task: self.on(task).steps_per_epoch for task in tasks},
            tickets=tuple(self.tickets),
        )


def _recipe(train: TrainSettings, steps_per_epoch: int, horizon: int, device: str, settings: Settings | None) -> Recipe:
    falling = train.lr_schedule in ("linear", "cosine")
    stepped = train.lr_schedule == "step"
    penalised = train.penalty != "none"
    return Recipe(
        optimizer=train.optimizer,
        lr=train.lr,
        batch_size=train.batch_size,
        lr_schedule=train.lr_schedule,
        horizon=horizon if falling else 0,
        warmup=round(train.warmup_epochs * steps_per_epoch),
        lr_final_fraction=train.lr_final_fraction if falling else 0.0,
        milestones=tuple(round(e * steps_per_epoch) for e in train.step_epochs()) if stepped else (),
        lr_step_factor=train.lr_step_factor if stepped else 0.1,
        momentum=train.momentum if train.optimizer == "sgd" else 0.0,
        weight_decay=train.weight_decay,
        arithmetic=f"{device} float32",
        penalty=train.penalty if penalised else "",
        penalty_strength=train.penalty_strength if penalised else 0.0,
        gather=_gathered(settings),
    )


def _gathered(settings: Settings | None) -> tuple[str, ...]:
    """What training gathers for the criterion of this trial."""
    if settings is None:
        return ()
    needs = criteria.needs(criteria.CRITERIA[settings.choices.criterion])
    return tuple(need for need in needs if need in criteria.WHILE_TRAINING)
