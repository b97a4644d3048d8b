"""From a proposal to a plan: the small graph of stages that is one trial, with every choice resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from orchestrator import ops
from orchestrator.errors import PlanError, StageFailed
from orchestrator.ops import Init, Op, Prune, Recipe, Rewind, Train
from orchestrator.pruning import criteria, schedules
from orchestrator.pruning.allocation import Tensors, counts
from orchestrator.seeds import derive
from orchestrator.settings import Choices, Settings, TrainSettings, during
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
    for op in prunes:
        state = builder.add(op, [state])
    trained = builder.train_on(state, to=builder.epochs)
    return [(len(prunes), builder.show(trained))]


def _during(builder: _Builder, settings: Settings, prunes: Sequence[Prune]) -> list[tuple[int, str]]:
    begin, end = (epoch * builder.steps_per_epoch for epoch in during(settings))
    gap = (end - begin) / max(1, len(prunes) - 1)
    positions = [round(begin + gap * index) for index in range(len(prunes))]
    if len(set(positions)) < len(positions) or not 0 < positions[0] <= positions[-1] < builder.epochs:
        raise PlanError(
            f"{len(prunes)} prunings from step {round(begin)} to step {round(end)} of {builder.epochs} need steps of "
            "their own, with training before and after; legal: fewer rounds, or prune_begin and prune_end further apart"
        )
    state = builder.init()
    for op, position in zip(prunes, positions, strict=True):
        # Dense training until the first pruning is what many trials share; what follows is this trial's own.
        trained = builder.train_on(state, to=position, stored=position == positions[0], resumable=True)
        state = builder.add(op, [trained])
    trained = builder.train_on(state, to=builder.epochs)
    return [(len(prunes), builder.show(trained))]


def _after(builder: _Builder, settings: Settings, prunes: Sequence[Prune]) -> list[tuple[int, str]]:
    ancestor = _ancestor(builder, settings)
    state = builder.dense()
    points = []
    position = builder.epochs
    retrain_steps = round(settings.train.retrain_epochs * builder.steps_per_epoch)
    for number, op in enumerate(prunes, start=1):
        pruned = builder.add(op, [state])
        if settings.choices.retrain == "none":
            state = pruned
        elif settings.choices.retrain == "finetune":
            position += retrain_steps
            state = builder.train_on(pruned, to=position, fresh_optimizer=True)
        else:
            if ancestor is not None:
                rewound = builder.add(Rewind(what="weights"), [pruned, ancestor])
            else:
                back = max(0, builder.epochs - retrain_steps)
                rewound = builder.add(Rewind(what="lr", to=back), [pruned])
            state = builder.train_on(rewound, to=builder.epochs)
        points.append((number, builder.show(state)))
    return points


def _ancestor(builder: _Builder, settings: Settings) -> str | None:
    """The state that weights are rewound to; None where weights are not rewound."""
    if settings.choices.retrain == "reinit":
        if not builder.info.init_varies:
            raise PlanError(
                "retrain 'reinit' needs new weights, but model() gives the same ones under every seed; "
                "legal with it: a Task with fresh, the untrained builder"
            )
        return builder.add(Init(seed=derive(builder.seed, "reinit"), fresh=builder.info.comes_trained), [])
    if settings.choices.retrain != "rewind":
        return None
    step = settings.choices.rewind_step
    if step is None:
        step = round(settings.choices.rewind_epoch * builder.steps_per_epoch)
    return builder.train_on(builder.init(), to=step, stored=True, resumable=True) if step else builder.init()


class _Builder:
    """Collects the nodes of one plan, each after its parents; equal stages come out once."""

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
    choices = settings.choices
    factors = _factors(settings, info)
    given = by_pattern(settings.layer_targets, info, "space.layers")
    _refuse_idle_layer_settings(choices, factors, given)
    by_threshold = choices.threshold is not None
    op = Prune(
        criterion=choices.criterion,
        scope="layer" if by_threshold else choices.scope,  # a threshold ranks nobody, so equal plans get equal keys
        structure=choices.structure,
        allocation=choices.allocation,
        rate=choices.rate,
        threshold=choices.threshold,
        threshold_unit=choices.threshold_unit if by_threshold else "absolute",
        parameters=tuple(sorted(settings.criterion_parameters.items())),
        factors=tuple(sorted(factors.items())),
        targets=tuple(sorted(given.items())),
        code=settings.criterion_code,
    )
    rounds = range(1, choices.rounds + 1)
    draws = bool(criteria.needs(criteria.CRITERIA[op.criterion]))
    seeds: list[dict[str, Any]] = [{"seed": seed, "round": number} if draws else {} for number in rounds]
    if choices.sparsity is None:
        return [replace(op, **fields) for fields in seeds]
    targets = schedules.targets(choices.schedule, choices.sparsity, choices.rounds)
    of_layers = {name: schedules.targets(choices.schedule, target, choices.rounds) for name, target in op.targets}
    return [
        replace(op, sparsity=target, targets=tuple((name, own[index]) for name, own in of_layers.items()), **fields)
        for index, (target, fields) in enumerate(zip(targets, seeds, strict=True))
    ]


def _refuse_idle_layer_settings(choices: Choices, factors: Mapping[str, float], given: Mapping[str, float]) -> None:
    """Refuse factors and targets of layers that would change nothing."""
    scaled = any(factor not in (0.0, 1.0) for factor in factors.values())
    if choices.threshold is not None:
        if scaled:
            raise PlanError("prune.layer_factors scale a rate or a final sparsity, not a threshold; legal with it: 0")
    elif choices.scope == "global" and (given or scaled):
        raise PlanError(
            "layer factors and per-layer targets mean nothing where all layers are ranked together; "
            "legal with them: scope = 'layer'"
        )
    elif choices.allocation != "uniform" and scaled:
        raise PlanError(f"allocation {choices.allocation!r} takes no layer factors but 0 and 1; legal: 'uniform'")
    both = sorted(name for name in given if factors.get(name, 1.0) != 1.0)
    if both:
        raise PlanError(f"{both[0]!r} has a target of its own in [space.layers] and a factor or ignore in [prune]")


def _factors(settings: Settings, info: TaskInfo) -> dict[str, float]:
    """The factor on the rate of each tensor that is not pruned like the rest; 0 where it is ignored."""
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


def refuse_empty(settings: Settings, prunes: Sequence[Prune], info: TaskInfo) -> None:
    """Refuse rounds that would leave no weight in a group that is ranked together.

    Raises:
        PlanError: naming the group and the round.
    """
    if settings.choices.threshold is not None:
        return  # what a threshold leaves is an outcome
    shapes = {layer.name: layer.shape for layer in info.layers}
    kept = {layer.name: layer.size for layer in info.layers}
    for number, op in enumerate(prunes, start=1):
        try:
            groups = counts(op, Tensors(shapes=shapes, kept=kept))
        except StageFailed as error:
            raise PlanError(f"round {number} of {len(prunes)}: {error}") from error
        for group, left in groups.items():
            if left <= 0:
                where = f"layer {group[0].removesuffix('.weight')!r}" if len(group) == 1 else "the network"
                raise PlanError(
                    f"round {number} of {len(prunes)} leaves no weight in {where}: prune less, or fewer rounds"
                )
            # Where in a group the weights are left depends on them; only their number counts here.
            kept.update(dict.fromkeys(group, 0))
            kept[group[0]] = left
