"""What a study says that changes nothing: settings that no proposal of it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.pruning.patterns import UNITS, n_of_m
from orchestrator.settings import FINAL, IN_SPACE, Settings, TrainSettings
from orchestrator.spec import StudySpec
from orchestrator.tasks.info import TaskInfo


@dataclass(frozen=True, kw_only=True)
class _Use:
    """When a setting means something, and that in words."""

    names: tuple[str, ...]
    used: Callable[[Settings], bool]
    words: str


def idle(spec: StudySpec, mixes: Sequence[Settings], info: TaskInfo) -> Iterator[str]:
    """A line for each thing that the study file says and that changes none of its `mixes`."""
    names = spec.search_space().names
    in_train = spec.train.model_fields_set | {name for name in names if IN_SPACE.get(name) is TrainSettings}
    for table, prefix, said in (
        (OF_SPACE, "space", set(names)),
        (OF_TRAIN, "train", in_train),
        (OF_PRUNE, "prune", spec.prune.model_fields_set),
    ):
        for use in table:
            if not any(map(use.used, mixes)):
                for name in use.names:
                    if name in said and _meant(spec, name):
                        place = f"space.{name}" if name in names else f"{prefix}.{name}"
                        yield f"{place} does nothing in this study: {use.words}"
    chosen = {settings.choices.criterion for settings in mixes}
    for name in names:
        if name.startswith("criteria."):
            criterion = name.removeprefix("criteria.").rpartition(".")[0]
            if criterion not in chosen:
                yield f"space.{name} does nothing in this study: its criterion is never {criterion!r}"
    rule = spec.halving()
    if spec.stopping.rule != "none" and not any(rule.next_rung(0, _rounds(settings)) for settings in mixes):
        yield f"stopping does nothing in this study: no proposal shows more than {rule.min_rounds} rounds"
    if info.norms == 0 and spec.prune.recalibrate:
        yield "prune.recalibrate does nothing in this study: the model has no BatchNorm with running statistics"


def _meant(spec: StudySpec, name: str) -> bool:
    """Whether more is said than that something is off."""
    on = {"shrunk": spec.train.shrunk, "round_to": spec.prune.round_to > 1}
    return on.get(name, True) or name in spec.search_space().names


def _ranks(settings: Settings) -> bool:
    return settings.choices.threshold is None and n_of_m(settings.choices.structure) is None


def _spreads(settings: Settings) -> bool:
    choices = settings.choices
    every = choices.prune_every is not None or choices.prune_every_steps is not None
    return any(getattr(choices, name) is not None for name in FINAL) and (choices.rounds > 1 or every)


def _rounds(settings: Settings) -> int:
    """After how many rounds a trial shows a point."""
    choices = settings.choices
    return choices.rounds if choices.phase == "after" and choices.searches == 1 else 1


def _retrains(settings: Settings) -> bool:
    return settings.choices.phase != "after" or settings.choices.retrain != "none"


OF_SPACE = (
    _Use(names=("scope",), used=_ranks, words="a threshold and an N:M pattern rank nobody"),
    _Use(names=("schedule",), used=_spreads, words="it spreads a final sparsity, or a budget, over several rounds"),
    _Use(names=("threshold_unit",), used=lambda s: s.choices.threshold is not None, words="it goes with a threshold"),
    _Use(
        names=("prune_begin", "prune_end"),
        used=lambda s: s.choices.phase == "during",
        words="it belongs to phase 'during'",
    ),
    _Use(names=("retrain",), used=lambda s: s.choices.phase == "after", words="it belongs to phase 'after'"),
    _Use(
        names=("rewind_epoch", "rewind_step"),
        used=lambda s: s.choices.phase == "after" and s.choices.retrain == "rewind",
        words="it belongs to phase 'after' with retrain 'rewind'",
    ),
    _Use(
        names=("regrow_fraction", "regrow_every", "regrow_end"),
        used=lambda s: s.choices.regrow not in ("none", "all"),
        words="nothing grows back by parts",
    ),
    _Use(names=("vary", "rule"), used=lambda s: s.choices.searches > 1, words="there is one search"),
    _Use(
        names=("data_share",),
        used=lambda s: s.choices.searches > 1 and s.choices.vary == "data",
        words="it belongs to searches that vary in their data",
    ),
)
OF_TRAIN = (
    _Use(names=("momentum",), used=lambda s: s.train.optimizer == "sgd", words="it is of optimizer 'sgd'"),
    _Use(
        names=("lr_step_epochs", "lr_step_factor"),
        used=lambda s: s.train.lr_schedule == "step",
        words="it is of lr_schedule 'step'",
    ),
    _Use(
        names=("lr_final_fraction",),
        used=lambda s: s.train.lr_schedule in ("linear", "cosine"),
        words="it is of lr_schedule 'linear' and 'cosine'",
    ),
    _Use(names=("penalty_strength",), used=lambda s: s.train.penalty != "none", words="there is no penalty"),
    _Use(
        names=("retrain_epochs",),
        used=lambda s: s.choices.phase == "after" and s.choices.retrain in ("finetune", "lr-rewind"),
        words="it belongs to phase 'after' with retrain 'finetune' or 'lr-rewind'",
    ),
    _Use(
        names=("shrunk",),
        used=lambda s: s.choices.structure in UNITS and _retrains(s),
        words=f"a smaller model is trained where whole units are pruned ({', '.join(UNITS)}) and training follows",
    ),
)
OF_PRUNE = (
    _Use(
        names=("round_to",),
        used=lambda s: s.choices.structure in UNITS,
        words=f"it counts the units of a layer, and no structure is made of units ({', '.join(UNITS)})",
    ),
    _Use(
        names=("floor",),
        used=lambda s: n_of_m(s.choices.structure) is None,
        words="an N:M pattern says itself what stays in every layer",
    ),
    _Use(
        names=("threshold_any_criterion",),
        used=lambda s: s.choices.threshold is not None,
        words="nothing is pruned by a threshold",
    ),
)
