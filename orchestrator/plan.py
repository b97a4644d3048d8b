"""From a proposal to a plan: the small graph of stages that is one trial, with every choice resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from orchestrator import ops
from orchestrator.errors import PlanError
from orchestrator.ops import Init, Op, Prune, Recipe, Rewind, Train
from orchestrator.pruning import criteria, schedules
from orchestrator.pruning.allocation import Tensors, counts
from orchestrator.seeds import derive
from orchestrator.settings import Settings, TrainSettings, during
from orchestrator.tasks.info import TaskInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One stage of a plan and what is wanted of the state that it yields."""

    key: str
    op: Op
    parents: tuple[str, ...]
    start: int = 0
    """For a Train op: the position where its run starts, in steps."""
    evaluated: bool = False
    stored: bool = False
    resumable: bool = False
    """The optimizer state is stored too, since training goes on from here."""
    round: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages of one trial under one seed, each after its parents, and what it shows: (round, key) by round."""

    nodes: tuple[Node, ...]
    points: tuple[tuple[int, str], ...]
    steps: int
    """Optimizer steps that the trial would take on its own."""
    steps_per_epoch: int


def dense_plan(
    train: TrainSettings, seed: int, info: TaskInfo, *, device: str = "cpu", cuts: Sequence[float] = ()
) -> Plan:
    """The unpruned model, trained in full; states at the epochs `cuts` are kept, to rewind to or go on from."""
    builder = _Builder(info, train, seed, device)
    return builder.plan([(0, builder.dense(cuts))])


def trial_plan(settings: Settings, seed: int, info: TaskInfo, *, device: str = "cpu") -> Plan:
    """The plan of one proposal under one seed.

    Raises:
        PlanError: a mix that makes no sense for this task, with the reason.
    """
    builder = _Builder(info, settings.train, seed, device)
    prunes = _prune_ops(settings, seed, info)
    refuse_empty(settings, prunes, info)
    phase = {"before": _before, "during": _during, "after": _after}[settings.choices.phase]
    return builder.plan(phase(builder, settings, prunes))


def _before(builder: _Builder, settings: Settings, prunes: Sequence[Prune]) -> list[tuple[int, str]]:
    state = builder.init()
    for number, op in enumerate(prunes, start=1):
        state = builder.add(op, [state], round=number)
    trained = builder.train_on(state, to=builder.epochs, round=len(prunes))
    return [(len(prunes), builder.show(trained))]


def _during(builder: _Builder, settings: Settings, prunes: Sequence[Prune]) -> list[tuple[int, str]]:
    begin, end = (epoch * builder.steps_per_epoch for epoch in during(settings))
    gap = (end - begin) / max(1, len(prunes) - 1)
    state = builder.init()
    for number, op in enumerate(prunes, start=1):
        trained = builder.train_on(state, to=round(begin + gap * (number - 1)), round=number - 1, resumable=True)
        state = builder.add(op, [trained], round=number)
    trained = builder.train_on(state, to=builder.epochs, round=len(prunes))
    return [(len(prunes), builder.show(trained))]


def _after(builder: _Builder, settings: Settings, prunes: Sequence[Prune]) -> list[tuple[int, str]]:
    ancestor = _ancestor(builder, settings)
    state = builder.dense()
    points = []
    position = builder.epochs
    retrain_steps = round(settings.train.retrain_epochs * builder.steps_per_epoch)
    for number, op in enumerate(prunes, start=1):
        pruned = builder.add(op, [state], round=number)
        if settings.choices.retrain == "none":
            state = pruned
        elif settings.choices.retrain == "finetune":
            position += retrain_steps
            state = builder.train_on(pruned, to=position, round=number, fresh_optimizer=True)
        else:
            if ancestor is not None:
                rewound = builder.add(Rewind(what="weights"), [pruned, ancestor], round=number)
            else:
                back = max(0, builder.epochs - retrain_steps)
                rewound = builder.add(Rewind(what="lr", to=back), [pruned], round=number)
            state = builder.train_on(rewound, to=builder.epochs, round=number)
        points.append((number, builder.show(state)))
    return points


def _ancestor(builder: _Builder, settings: Settings) -> str | None:
    """The state that weights are rewound to; None where weights are not rewound."""
    if settings.choices.retrain == "reinit":
        return builder.add(Init(seed=derive(builder.seed, "reinit"), fresh=builder.info.comes_trained), [])
    if settings.choices.retrain != "rewind":
        return None
    step = settings.choices.rewind_step
    if step is None:
        step = round(settings.choices.rewind_epoch * builder.steps_per_epoch)
    return builder.train_on(builder.init(), to=step, stored=True, resumable=True) if step else builder.init()


class _Builder:
    """Collects the nodes of one plan; equal stages come out once."""

    def __init__(self, info: TaskInfo, train: TrainSettings, seed: int, device: str) -> None:
        self.info = info
        self.seed = seed
        self.steps_per_epoch = info.steps_per_epoch(train.batch_size)
        self.epochs = round(train.epochs * self.steps_per_epoch)
        self.recipe = _recipe(train, self.steps_per_epoch, self.epochs, device)
        self.nodes: dict[str, Node] = {}

    def init(self) -> str:
        return self.add(Init(seed=self.seed), [])

    def dense(self, cuts: Sequence[float] = ()) -> str:
        init = self.init()
        for epoch in sorted(cuts):
            step = round(epoch * self.steps_per_epoch)
            if 0 < step < self.epochs:
                self.train_on(init, to=step, stored=True, resumable=True)
        return self.show(self.train_on(init, to=self.epochs) if self.epochs else init)

    def train_on(self, start_of_run: str, *, to: int, fresh_optimizer: bool = False, **marks: Any) -> str:
        """Train from `start_of_run` until position `to`."""
        start = self._position(start_of_run)
        if to <= start:
            raise PlanError(
                f"this would train from step {start} to step {to}, that is not at all; "
                "legal: more epochs or retrain_epochs, or an earlier rewind_epoch"
            )
        op = Train(recipe=self.recipe, order_seed=self.seed, to=to, fresh_optimizer=fresh_optimizer)
        return self.add(op, [start_of_run], start=start, **marks)

    def _position(self, key: str) -> int:
        node = self.nodes[key]
        match node.op:
            case Train(to=to):
                return to
            case Rewind(what="lr", to=to):
                assert to is not None
                return to
            case Rewind():
                return self._position(node.parents[1])
            case Prune():
                return self._position(node.parents[0])
            case Init():
                return 0

    def add(self, op: Op, parents: Sequence[str], **marks: Any) -> str:
        key = ops.key(op, parents, self.info.digest)
        node = Node(key=key, op=op, parents=tuple(parents), **marks)
        self.nodes[key] = merged(self.nodes[key], node) if key in self.nodes else node
        return key

    def show(self, key: str) -> str:
        """Mark the state as a point that is evaluated and stored."""
        self.nodes[key] = replace(self.nodes[key], evaluated=True, stored=True)
        return key

    def plan(self, points: Sequence[tuple[int, str]]) -> Plan:
        runs: dict[tuple[str, bool], int] = {}
        for node in self.nodes.values():
            if isinstance(node.op, Train):
                run = node.parents[0], node.op.fresh_optimizer
                runs[run] = max(runs.get(run, 0), node.op.to - node.start)
        return Plan(
            nodes=tuple(self.nodes.values()),
            points=tuple(points),
            steps=sum(runs.values()),
            steps_per_epoch=self.steps_per_epoch,
        )


def merged(one: Node, other: Node) -> Node:
    """The same stage as two plans see it: every mark that either asks for."""
    return replace(
        one,
        evaluated=one.evaluated or other.evaluated,
        stored=one.stored or other.stored,
        resumable=one.resumable or other.resumable,
    )


def _recipe(train: TrainSettings, steps_per_epoch: int, horizon: int, device: str) -> Recipe:
    falling = train.lr_schedule in ("linear", "cosine")
    stepped = train.lr_schedule == "step"
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
    )


def _prune_ops(settings: Settings, seed: int, info: TaskInfo) -> list[Prune]:
    """One Prune op a round; a final sparsity is resolved to the target of each round."""
    factors = _factors(settings, info)
    given = by_pattern(settings.layer_targets, info, "space.layers")
    if settings.choices.scope == "global" and (given or any(f not in (0.0, 1.0) for f in factors.values())):
        raise PlanError("layer factors and per-layer targets mean nothing where all layers are ranked together; "
                        "legal with them: scope = 'layer'")
    op = Prune(
        criterion=settings.choices.criterion,
        scope=settings.choices.scope,
        structure=settings.choices.structure,
        allocation=settings.choices.allocation,
        rate=settings.choices.rate,
        threshold=settings.choices.threshold,
        threshold_unit=settings.choices.threshold_unit,
        parameters=tuple(sorted(settings.criterion_parameters.items())),
        factors=tuple(sorted(factors.items())),
        targets=tuple(sorted(given.items())),
        code=settings.criterion_code,
    )
    rounds = range(1, settings.choices.rounds + 1)
    draws = bool(criteria.needs(criteria.CRITERIA[op.criterion]))
    seeds: list[dict[str, Any]] = [{"seed": seed, "round": number} if draws else {} for number in rounds]
    if settings.choices.sparsity is None:
        return [replace(op, **fields) for fields in seeds]
    targets = schedules.targets(settings.choices.schedule, settings.choices.sparsity, settings.choices.rounds)
    layers = [
        tuple((n, schedules.targets(settings.choices.schedule, t, settings.choices.rounds)[r - 1]) for n, t in op.targets) for r in rounds
    ]
    return [
        replace(op, sparsity=target, targets=own, **fields)
        for target, own, fields in zip(targets, layers, seeds, strict=True)
    ]


def _factors(settings: Settings, info: TaskInfo) -> dict[str, float]:
    factors = by_pattern(settings.layer_factors, info, "prune.layer_factors")
    factors |= by_pattern(dict.fromkeys(settings.ignore, 0.0), info, "prune.ignore")
    if info.layers and all(factors.get(layer.name) == 0.0 for layer in info.layers):
        raise PlanError("every prunable layer is ignored: nothing is left to prune")
    return {name: factor for name, factor in factors.items() if factor != 1.0}


def by_pattern(values: Mapping[str, float], info: TaskInfo, place: str) -> dict[str, float]:
    """Values by layer-name pattern, as values by tensor name; a later pattern wins.

    Raises:
        PlanError: a pattern that no prunable layer matches.
    """
    found = {}
    for pattern, value in values.items():
        names = [layer.name for layer in info.layers if matches(pattern, layer.label) or matches(pattern, layer.name)]
        if not names:
            known = ", ".join(layer.label for layer in info.layers)
            raise PlanError(f"{place}: no prunable layer matches {pattern!r}; there are: {known}")
        found.update(dict.fromkeys(names, value))
    return found


def matches(pattern: str, label: str) -> bool:
    """Shell-style match on a layer's dotted name; `*.out` also means a top-level layer called `out`."""
    return fnmatchcase(label, pattern) or fnmatchcase("." + label, pattern)


def refuse_empty_mix(settings: Settings, info: TaskInfo) -> None:
    """Everything that `trial_plan` refuses for a task's layers, without making the plan.

    Raises:
        PlanError: patterns that no layer matches, or rounds that leave no weight.
    """
    refuse_empty(settings, _prune_ops(settings, 0, info), info)


def refuse_empty(settings: Settings, prunes: Sequence[Prune], info: TaskInfo) -> None:
    """Refuse rounds that would leave no weight in a group that is ranked together.

    Raises:
        PlanError: naming the group and the round.
    """
    if settings.choices.threshold is not None:
        return
    shapes = {layer.name: layer.shape for layer in info.layers}
    kept = {layer.name: layer.size for layer in info.layers}
    for number, op in enumerate(prunes, start=1):
        for group, left in counts(op, Tensors(shapes=shapes, kept=kept)).items():
            if left <= 0:
                where = group[0].removesuffix(".weight") if len(group) == 1 else "the network"
                raise PlanError(f"round {number} of {len(prunes)} leaves no weight in {where}: prune less, or fewer rounds")
            share = left / sum(kept[name] for name in group)
            if len(group) == 1:
                kept[group[0]] = left
            else:
                kept.update({name: round(kept[name] * share) for name in group})
                kept[group[-1]] += left - sum(kept[name] for name in group)
