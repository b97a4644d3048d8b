"""From a proposal to a plan: which stages follow which, in each phase and mode of retraining."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.errors import PlanError
from orchestrator.ops import Init, Prune, Rewind
from orchestrator.plan import Plan
from orchestrator.planning import tickets as ticket_plan
from orchestrator.planning import transfer as transfer_plan
from orchestrator.planning.builder import Builder
from orchestrator.planning.pruning import prune_ops, refuse_empty
from orchestrator.pruning.regrow import fraction_at
from orchestrator.seeds import derive
from orchestrator.settings import Settings, TrainSettings, during
from orchestrator.tasks.info import TaskInfo


def dense_plan(
    train: TrainSettings, seed: int, info: TaskInfo, *, device: str = "cpu", cuts: Sequence[float] = ()
) -> Plan:
    """The unpruned model, trained in full; states at the epochs `cuts` are kept, to rewind to or go on from."""
    builder = Builder(info, train, seed, device)
    return builder.plan([(0, builder.dense(cuts))])


def trial_plan(settings: Settings, seed: int, info: TaskInfo, *, device: str = "cpu") -> Plan:
    """The plan of one proposal under one seed.

    Raises:
        PlanError: a mix that makes no sense for this task, with the reason.
    """
    builder = Builder(info, settings.train, seed, device, settings)
    if settings.choices.phase == "ticket":
        return builder.plan(transfer_plan.given(builder, settings))
    rounds = settings.choices.rounds
    if settings.choices.phase == "during":
        rounds = _rounds(settings, builder.steps_per_epoch)
    prunes = prune_ops(settings, info, seed=seed, count=rounds)
    refuse_empty(settings, prunes, info)
    phase = {"before": _before, "during": _during, "after": _after}[settings.choices.phase]
    points = phase(builder, settings, prunes)
    transfer_plan.carry_over(builder, settings)
    return builder.plan(points)


def _before(builder: Builder, settings: Settings, prunes: Sequence[Prune]) -> list[tuple[int, str]]:
    state = builder.init()
    for op in prunes:
        state = builder.prune(op, state)
    start = _replacing(builder, settings, state)
    trained = builder.show(builder.train_on(start, to=builder.end))
    if start == state and settings.choices.structure == "weight":
        ticket_plan.compare(builder, settings, len(prunes), state, trained, builder.init())
    return [(len(prunes), trained)]


def _replacing(builder: Builder, settings: Settings, state: str) -> str:
    """Sparse from the start, with weights that are replaced while training, fewer and fewer of them."""
    choices = settings.choices
    if choices.regrow == "none":
        return state
    every = max(1, round(choices.regrow_every * builder.steps_per_epoch))
    last = settings.train.epochs * 3 / 4 if choices.regrow_end is None else choices.regrow_end
    end = min(round(last * builder.steps_per_epoch), builder.end - 1)
    if every > end:
        raise PlanError(
            f"regrow {choices.regrow!r} would replace nothing in {builder.end} steps: it is every {every} steps up to "
            f"step {end}; legal: a smaller regrow_every, or a later regrow_end"
        )
    for number, position in enumerate(range(every, end + 1, every), start=1):
        fraction = fraction_at(choices.regrow_fraction, position, end + every)
        trained = builder.train_on(state, to=position, resumable=True)
        state = builder.regrow(choices.regrow, round(fraction, 12), trained, number)
    return state


def _during(builder: Builder, settings: Settings, prunes: Sequence[Prune]) -> list[tuple[int, str]]:
    begin, end = _window(settings, builder.steps_per_epoch)
    gap = (end - begin) / max(1, len(prunes) - 1)
    positions = [round(begin + gap * index) for index in range(len(prunes))]
    if len(set(positions)) < len(positions) or not 0 < positions[0] <= positions[-1] < builder.end:
        raise PlanError(
            f"{len(prunes)} prunings from step {round(begin)} to step {round(end)} of {builder.end} need steps of "
            "their own, with training before and after; legal: fewer rounds, or prune_begin and prune_end further apart"
        )
    state = builder.init()
    for number, (op, position) in enumerate(zip(prunes, positions, strict=True), start=1):
        # Dense training until the first pruning is what many trials share; what follows is this trial's own.
        trained = builder.train_on(state, to=position, stored=number == 1, resumable=True)
        state = builder.prune(op, trained)
        if settings.choices.regrow != "none" and number < len(prunes):
            halfway = (position + positions[number]) // 2
            if halfway == position:
                raise PlanError("prunings a step apart leave no room to open the masks between them; legal: fewer")
            state = builder.regrow("all", 1.0, builder.train_on(state, to=halfway, resumable=True), number)
    trained = builder.train_on(state, to=builder.end)
    return [(len(prunes), builder.show(trained))]


def _window(settings: Settings, steps_per_epoch: int) -> tuple[float, float]:
    """The positions of the first and the last pruning in phase 'during', in steps."""
    begin, end = (epoch * steps_per_epoch for epoch in during(settings))
    every = _every(settings, steps_per_epoch)
    return (begin, end) if every is None else (begin, begin + every * (_rounds(settings, steps_per_epoch) - 1))


def _every(settings: Settings, steps_per_epoch: int) -> float | None:
    """Steps from one pruning to the next, where the settings say so."""
    if settings.choices.prune_every is not None:
        return settings.choices.prune_every * steps_per_epoch
    return settings.choices.prune_every_steps


def _rounds(settings: Settings, steps_per_epoch: int) -> int:
    """How many prunings there are: as said, or as often as fits between prune_begin and prune_end."""
    every = _every(settings, steps_per_epoch)
    if every is None:
        return settings.choices.rounds
    if every < 1:
        raise PlanError(f"prunings every {every:g} steps, {steps_per_epoch} to an epoch; legal: every step at most")
    begin, end = (epoch * steps_per_epoch for epoch in during(settings))
    return int((end - begin) / every + 1e-9) + 1


def _after(builder: Builder, settings: Settings, prunes: Sequence[Prune]) -> list[tuple[int, str]]:
    ancestor = _ancestor(builder, settings)
    if settings.choices.searches > 1:
        assert ancestor is not None
        return ticket_plan.consensus(builder, settings, prunes, ancestor)
    state = builder.dense()
    points = []
    position = builder.end
    retrain_steps = round(settings.train.retrain_epochs * builder.steps_per_epoch)
    for number, op in enumerate(prunes, start=1):
        pruned = builder.prune(op, state)
        if settings.choices.retrain == "none":
            state = pruned
        elif settings.choices.retrain == "finetune":
            position += retrain_steps
            state = builder.train_on(pruned, to=position, fresh_optimizer=True)
        else:
            if ancestor is not None:
                rewound = builder.add(Rewind(what="weights"), [pruned, ancestor])
            else:
                back = max(0, builder.end - retrain_steps)
                rewound = builder.add(Rewind(what="lr", to=back), [pruned])
            state = builder.train_on(rewound, to=builder.end)
            if settings.choices.retrain == "rewind" and settings.choices.structure == "weight":
                assert ancestor is not None
                ticket_plan.compare(builder, settings, number, rewound, state, ancestor)
        points.append((number, builder.show(state)))
    return points


def _ancestor(builder: Builder, settings: Settings) -> str | None:
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
