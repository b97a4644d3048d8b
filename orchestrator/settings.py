"""The settings of one trial: what the study fixes, with what the sampler chose laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, ValidationInfo, field_validator

from orchestrator.errors import InputError, PlanError, UnknownName
from orchestrator.pruning import allocation, criteria, schedules
from orchestrator.registry import Registry

Optimizer = Literal["adam", "adamw", "sgd"]
LrSchedule = Literal["constant", "step", "linear", "cosine"]
Retrain = Literal["none", "finetune", "rewind", "lr-rewind", "reinit"]
Phase = Literal["before", "during", "after"]
Structure = Literal["weight"]
ThresholdUnit = Literal["absolute", "std"]

Number = Annotated[float, Strict()]
"""An int or a float; neither true nor "0.5"."""
Whole = Annotated[int, Strict()]
"""An int; neither true nor 8.0."""
Epochs = Annotated[Number, Field(ge=0, le=1e6)]
Steps = Annotated[Whole, Field(ge=0, le=10**9)]


class Section(BaseModel):
    """A table of the study file: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrainSettings(Section):
    """`[train]`: how models are trained and retrained."""

    epochs: Epochs = Field(default=10, description="of dense training, and the horizon of the learning-rate schedule")
    retrain_epochs: Epochs = Field(default=4, description="of retraining after each pruning (finetune, lr-rewind)")
    optimizer: Optimizer = "adam"
    lr: Number = Field(default=1e-3, gt=0, description="the learning rate at its peak")
    lr_schedule: LrSchedule = "constant"
    lr_final_fraction: Number = Field(
        default=0.1,
        ge=0,
        le=1,
        description="linear and cosine schedules end at this fraction of lr; fine-tuning goes on at it",
    )
    lr_step_epochs: tuple[Number, ...] = Field(
        default=(), description="where `step` lowers lr; default: at 1/2 and 3/4 of epochs"
    )
    lr_step_factor: Number = Field(default=0.1, gt=0, le=1)
    batch_size: Whole = Field(default=64, ge=1, le=10**9)
    momentum: Number = Field(default=0.0, ge=0, lt=1, description="of sgd")
    weight_decay: Number = Field(default=0.0, ge=0)
    warmup_epochs: Epochs = Field(default=0, description="lr rises linearly over them")
    evaluate_every: Epochs = Field(default=0, description="epochs between points of the learning curve; 0: none")

    def step_epochs(self) -> tuple[float, ...]:
        """Where the `step` schedule lowers the learning rate."""
        return self.lr_step_epochs or (self.epochs / 2, self.epochs * 3 / 4)


class PruneSettings(Section):
    """`[prune]`: constants of pruning."""

    ignore: tuple[str, ...] = Field(default=(), description="patterns of layers that are never pruned")
    layer_factors: dict[str, Number] = Field(default={}, description="pattern -> factor on the rate (scope 'layer')")
    threshold_any_criterion: bool = Field(
        default=False, description="allow a threshold on scores that are no magnitudes"
    )

    @field_validator("layer_factors")
    @classmethod
    def _not_negative(cls, factors: dict[str, float]) -> dict[str, float]:
        for pattern, factor in factors.items():
            if factor < 0:
                raise ValueError(f"the factor of {pattern!r} is {factor:g}; legal: 0 or more")
        return factors


class Choices(Section):
    """What one proposal says of pruning: the names of `[space]` that are not of `[train]`, and their legal ranges."""

    criterion: str = Field(default="magnitude", description="what makes a weight worth keeping; see `list criteria`")
    scope: str = Field(default="layer", description="who is ranked together; see `list scopes`")
    allocation: str = Field(
        default="uniform", description="how a final sparsity spreads over layers; see `list allocations`"
    )
    structure: Structure = Field(default="weight", description="what is removed as one")
    rate: Number | None = Field(default=None, gt=0, lt=1, description="fraction of what is left, pruned in each round")
    sparsity: Number | None = Field(
        default=None, gt=0, lt=1, description="masked fraction of all prunable weights in the end"
    )
    threshold: Number | None = Field(default=None, gt=0, description="scores below it are pruned in each round")
    threshold_unit: ThresholdUnit = "absolute"
    rounds: Whole = Field(default=1, ge=1, le=1000, description="prune-retrain rounds")
    schedule: str = Field(
        default="exponential", description="how a final sparsity spreads over rounds; see `list schedules`"
    )
    phase: Phase = "after"
    prune_begin: Epochs | None = Field(default=None, description="phase 'during': epoch of the first pruning")
    prune_end: Epochs | None = Field(default=None, description="phase 'during': epoch of the last pruning")
    retrain: Retrain = "finetune"
    rewind_epoch: Epochs = Field(default=0, description="where `rewind` goes back to; 0 is init")
    rewind_step: Steps | None = Field(default=None, description="the same in optimizer steps")

    @field_validator("criterion", "scope", "allocation", "schedule")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        registry = _REGISTRIES[str(info.field_name)]
        of_user = info.field_name == "criterion" and ":" in name  # its source is read before the study runs
        if name not in registry and not of_user:
            raise ValueError(str(UnknownName(registry.kind, name, registry.names)))
        return name


_REGISTRIES: dict[str, Registry[Any]] = {
    "criterion": criteria.CRITERIA,
    "scope": allocation.SCOPES,
    "allocation": allocation.ALLOCATIONS,
    "schedule": schedules.SCHEDULES,
}
IN_SPACE: dict[str, type[Section]] = {
    **dict.fromkeys(Choices.model_fields, Choices),
    **dict.fromkeys(set(TrainSettings.model_fields) - {"evaluate_every"}, TrainSettings),
}
"""The plain names that `[space]` may use, each with the section that says what is legal."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One proposal, resolved and known to make sense on its own."""

    train: TrainSettings
    choices: Choices
    ignore: tuple[str, ...] = ()
    layer_factors: Mapping[str, float] = field(default_factory=dict)
    layer_targets: Mapping[str, float] = field(default_factory=dict)
    criterion_parameters: Mapping[str, Any] = field(default_factory=dict)
    criterion_code: str = ""


def resolve(
    train: TrainSettings, prune: PruneSettings, params: Mapping[str, Any], code: Mapping[str, str] | None = None
) -> Settings:
    """Lay a proposal's flat parameters over the study's constants.

    Args:
        train: the study's `[train]`.
        prune: the study's `[prune]`.
        params: name -> value as the sampler chose them; `layers.PATTERN.rate` and `criteria.NAME.PARAMETER` included.
        code: digests of the sources of users' own criteria, by name.

    Raises:
        PlanError: a value out of its range or a mix that makes no sense, with the reason.
    """
    plain = {name: value for name, value in params.items() if "." not in name}
    over_train = {name: value for name, value in plain.items() if IN_SPACE.get(name) is TrainSettings}
    try:
        merged = TrainSettings.model_validate(train.model_dump() | over_train)
        choices = Choices.model_validate({n: v for n, v in plain.items() if n not in over_train})
    except ValidationError as error:
        raise PlanError("; ".join(complaints(error))) from error
    try:
        parameters = _criterion_parameters(choices.criterion, params)
        layer_targets = _layer_targets(choices, params)
    except InputError as error:
        raise PlanError(str(error)) from error
    settings = Settings(
        train=merged,
        choices=choices,
        ignore=prune.ignore,
        layer_factors=prune.layer_factors,
        layer_targets=layer_targets,
        criterion_parameters=parameters,
        criterion_code=(code or {}).get(choices.criterion, ""),
    )
    _refuse_nonsense(settings, prune)
    return settings


def check_value(name: str, value: Any) -> None:
    """Refuse a value that the parameter called `name` in `[space]` can never have.

    Raises:
        InputError: naming the parameter, the value and what would be legal.
    """
    kind, _, rest = name.partition(".")
    if kind == "layers":
        _check_layer_target(name, value)
    elif kind == "criteria":
        criterion, _, parameter = rest.rpartition(".")
        if ":" not in criterion:
            _check_criterion_parameters(criterion, {parameter: value})
    else:
        try:
            IN_SPACE[name].model_validate({name: value})
        except ValidationError as error:
            raise InputError(complaints(error)[0]) from error


def complaints(error: ValidationError) -> list[str]:
    """A validation error as short lines: where, what, and what would be legal."""
    lines = []
    problems = error.errors()
    for problem in problems:
        place = problem["loc"]
        inside = any(len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in problems)
        if problem["type"] == "too_short" and inside:
            continue  # the wrong items were left out before the rest was counted
        where = ".".join(str(part) for part in place)
        message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
        if problem["type"] == "too_short":
            message = "must not be empty"
        message = _PLAINER.get(problem["type"], message)
        given = problem.get("input")
        said = isinstance(given, str) and repr(given) in message
        shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) and not said else ""
        lines.append(f"{where}: {message[:1].lower()}{message[1:]}{shown}" if where else message)
    return lines


_PLAINER = {"int_type": "must be a whole number", "float_type": "must be a number"}
"""Words for what pydantic calls a valid integer and a valid number."""


def _criterion_parameters(criterion: str, params: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"criteria.{criterion}."
    given = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
    defaults = _check_criterion_parameters(criterion, given)
    return {name: value for name, value in given.items() if value != defaults[name]}


def _check_criterion_parameters(criterion: str, given: dict[str, Any]) -> dict[str, Any]:
    """The criterion's parameters with their defaults, whose types the given values must have."""
    criteria.check_parameters(criterion, given)
    defaults = criteria.parameters(criteria.CRITERIA[criterion])
    for name, value in given.items():
        kind = type(defaults[name])
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"criteria.{criterion}.{name} = {value!r} must be like its default, {defaults[name]!r}")
        if name == "examples" and value < 1:
            raise InputError(f"criteria.{criterion}.examples = {value!r} must be 1 or more")
    return defaults


def _layer_targets(choices: Choices, params: Mapping[str, Any]) -> dict[str, float]:
    """Values of `[space.layers]` by pattern."""
    kind = next((name for name in ("threshold", "sparsity", "rate") if getattr(choices, name) is not None), "")
    targets = {}
    for name, value in params.items():
        if name.startswith("layers."):
            _check_layer_target(name, value)
            pattern, _, what = name.removeprefix("layers.").rpartition(".")
            if kind == "threshold":
                raise PlanError(f"{name}: per-layer targets go with rate or sparsity, not with a threshold")
            if what != kind:
                raise PlanError(f"{name}: the study prunes by {kind}; legal here: layers.{pattern}.{kind}")
            targets[pattern] = float(value)
    return targets


def _check_layer_target(name: str, value: Any) -> None:
    pattern, _, what = name.removeprefix("layers.").rpartition(".")
    if not pattern or what not in ("rate", "sparsity"):
        raise InputError(f"{name}: a layer's own target reads layers.PATTERN.rate or layers.PATTERN.sparsity")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise InputError(f"{name} = {value!r} must be a number from 0 to below 1")


def _refuse_nonsense(settings: Settings, prune: PruneSettings) -> None:
    choices, train = settings.choices, settings.train
    how_much = [name for name in ("rate", "sparsity", "threshold") if getattr(choices, name) is not None]
    if len(how_much) != 1:
        given = " and ".join(how_much) or "none of them"
        raise PlanError(f"how much to prune is said by exactly one of rate, sparsity and threshold; given: {given}")
    entry = criteria.CRITERIA[choices.criterion]
    if choices.threshold is not None and not entry.facts.get("magnitude_like") and not prune.threshold_any_criterion:
        legal = ", ".join(e.name for e in criteria.CRITERIA if e.facts.get("magnitude_like"))
        raise PlanError(
            f"a threshold on the scores of {choices.criterion!r} is no size of a weight; legal: {legal}, "
            "or prune.threshold_any_criterion = true"
        )
    if choices.sparsity is None and choices.allocation != "uniform":
        raise PlanError(f"allocation {choices.allocation!r} spreads a final sparsity; legal with it: sparsity")
    if choices.scope == "global" and choices.allocation != "uniform":
        raise PlanError(f"allocation {choices.allocation!r} is for scope 'layer': the global ranking spreads by itself")
    if choices.sparsity is not None and bool(settings.layer_targets) != (choices.allocation == "given"):
        raise PlanError("per-layer sparsities ([space.layers]) and allocation = 'given' go together")
    if choices.phase != "after":
        if choices.retrain not in ("none", "finetune"):
            raise PlanError(f"retrain {choices.retrain!r} belongs to phase 'after'; legal in {choices.phase!r}: none")
        if train.epochs == 0:
            raise PlanError(
                f"phase {choices.phase!r} trains after pruning, but epochs = 0; legal: more, or phase 'after'"
            )
    else:
        _refuse_retrain(choices, train)
    if choices.phase == "during":
        begin, end = during(settings)
        if not 0 < begin <= end < train.epochs:
            raise PlanError(
                f"prune_begin {begin:g} to prune_end {end:g} must lie inside training (0 to {train.epochs:g})"
            )


def _refuse_retrain(choices: Choices, train: TrainSettings) -> None:
    if choices.retrain in ("finetune", "lr-rewind") and train.retrain_epochs == 0:
        raise PlanError(f"retrain {choices.retrain!r} with retrain_epochs = 0 trains nothing; legal: more, or 'none'")
    if choices.retrain == "lr-rewind":
        if train.lr_schedule == "constant":
            raise PlanError(
                "retrain 'lr-rewind' under a constant learning rate is the same as 'finetune'; "
                "legal with it: lr_schedule step, linear or cosine"
            )
        if train.retrain_epochs > train.epochs:
            raise PlanError(f"retrain 'lr-rewind' goes back {train.retrain_epochs:g} of only {train.epochs:g} epochs")
    if choices.retrain == "reinit" and train.epochs == 0:
        raise PlanError("retrain 'reinit' trains for epochs, which is 0; legal: more epochs, or 'none' or 'finetune'")
    if choices.rewind_step is not None and "rewind_epoch" in choices.model_fields_set:
        raise PlanError("rewind_epoch and rewind_step say the same thing twice; legal: one of them")
    if choices.retrain == "rewind" and choices.rewind_step is None and choices.rewind_epoch >= train.epochs:
        raise PlanError(
            f"rewind_epoch {choices.rewind_epoch:g} leaves nothing to train; legal: below epochs = {train.epochs:g}"
        )
    if choices.retrain == "finetune" and train.lr_schedule in ("linear", "cosine") and train.lr_final_fraction == 0:
        raise PlanError(
            "fine-tuning goes on at the schedule's final learning rate, which is 0; legal: lr_final_fraction > 0"
        )


def during(settings: Settings) -> tuple[float, float]:
    """The epochs of the first and the last pruning in phase 'during'; by default from a quarter to three quarters."""
    begin, end = settings.choices.prune_begin, settings.choices.prune_end
    epochs = settings.train.epochs
    return (epochs / 4 if begin is None else begin), (epochs * 3 / 4 if end is None else end)
