"""The settings of one trial, section by section: what may be said, and what each thing said must look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from orchestrator.errors import InputError, UnknownName
from orchestrator.pruning import allocation, criteria, patterns, penalties, regrow, schedules
from orchestrator.registry import Registry

Optimizer = Literal["adam", "adamw", "sgd"]
LrSchedule = Literal["constant", "step", "linear", "cosine"]
Retrain = Literal["none", "finetune", "rewind", "lr-rewind", "reinit"]
Phase = Literal["before", "during", "after", "ticket"]
ThresholdUnit = Literal["absolute", "std"]
Vary = Literal["order", "criterion", "data", "tasks"]
Rule = Literal["intersection", "union", "at-least", "weighted", "most-voted"]

HOW_MUCH = ("rate", "sparsity", "unit_sparsity", "threshold", "flops_budget", "params_budget")
"""The names that say how much to prune; a proposal has exactly one of them."""
FINAL = ("sparsity", "unit_sparsity", "flops_budget", "params_budget")
"""Those of them that name the end, which a schedule spreads over the rounds."""
NORMS = ("l1", "l2", "linf", "sum", "mean", "first")
"""The names in `structure.NORMS`, which needs torch."""

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
    lr_step_factor: Number = Field(default=0.1, gt=0, le=1, description="what `step` multiplies lr by")
    batch_size: Whole = Field(default=64, ge=1, le=10**9, description="training examples in a step")
    momentum: Number = Field(default=0.0, ge=0, lt=1, description="of sgd")
    weight_decay: Number = Field(default=0.0, ge=0, description="as the optimizer has it")
    warmup_epochs: Epochs = Field(default=0, description="lr rises linearly over them")
    penalty: str = Field(default="none", description="drives weights to zero while training; see `list penalties`")
    penalty_strength: Number = Field(default=0.0, ge=0, description="factor on the penalty in the loss")
    shrunk: bool = Field(
        default=False, strict=True, description="train without the units that are removed, in a really smaller model"
    )
    evaluate_every: Epochs = Field(default=0, description="epochs between points of the learning curve; 0: none")

    @field_validator("penalty")
    @classmethod
    def _penalty(cls, name: str) -> str:
        return _none_or_known(name, penalties.PENALTIES)

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
    floor: Whole = Field(
        default=1,
        ge=0,
        le=10**9,
        description="so many weights, or units, stay in every layer at least; 0: none need to",
    )
    round_to: Whole = Field(default=1, ge=1, le=10**6, description="units left in a layer are a multiple of this")
    recalibrate: Whole = Field(
        default=0, ge=0, le=10**9, description="training examples for new batch-norm statistics after each pruning"
    )

    @field_validator("layer_factors")
    @classmethod
    def _not_negative(cls, factors: dict[str, float]) -> dict[str, float]:
        for pattern, factor in factors.items():
            if factor < 0:
                raise ValueError(f"the factor of {pattern!r} is {factor:g}; legal: 0 or more")
        return factors


class StoppingSettings(Section):
    """`[stopping]`: which trials are not run to their end; see `search.stopping`."""

    rule: Literal["none", "halving"] = Field(
        default="none", description="halving: after some rounds only the best trials of each bracket go on"
    )
    reduction_factor: Whole = Field(
        default=3, ge=2, le=1000, description="one trial of so many goes on; the next rung is so many times as far"
    )
    min_rounds: Whole = Field(default=1, ge=1, le=10**6, description="rounds before trials are first compared")
    bracket: Whole = Field(default=27, ge=2, le=10**6, description="so many trials compete with each other")


class OtherTask(Section):
    """`[[tickets.tasks]]`: another task, for searches on several tasks and for tickets that are tried on another."""

    task: str = Field(description="as the study's own: built in, 'my_task.py' or 'package.module'")
    name: str = Field(default="", description="what the study calls it; default: its task's name")
    task_params: dict[str, Any] = Field(default={}, description="arguments of the task function")
    checkpoint: str = Field(default="", description="a file of weights that its model starts from")
    leave: tuple[str, ...] = Field(
        default=(), description="patterns of layers that stay its own although the study's task has the same"
    )

    @property
    def label(self) -> str:
        """What the study calls it."""
        return self.name or self.task


class TicketSettings(Section):
    """`[tickets]`: what each ticket is compared with. A ticket is a mask over the weights that it starts from."""

    controls: tuple[str, ...] = Field(
        default=(), description="see `list controls`; 'missing-the-mark' is three of them"
    )
    draws: Whole = Field(
        default=1, ge=1, le=100, description="how often a control that draws, or reinitialises, is run"
    )
    rounds: tuple[Whole, ...] = Field(
        default=(), description="the rounds whose tickets are compared; default: the last"
    )
    criteria: tuple[str, ...] = Field(default=(), description="the searches' criteria, where vary = 'criterion'")
    weights: tuple[Number, ...] = Field(
        default=(), description="rule 'weighted': each search's vote; kept is what holds half of all votes"
    )
    tasks: tuple[OtherTask, ...] = Field(default=(), description="other tasks; vary = 'tasks' searches on them in turn")
    transfer_to: tuple[str, ...] = Field(default=(), description="the names of those on which tickets are tried")
    transfer_controls: tuple[str, ...] = Field(
        default=("dense", "dense-transferred", "shuffled", "random-layer", "reinitialised", "one-shot"),
        description="what a ticket is compared with there: controls, and its weights without the mask",
    )
    ticket: str = Field(default="", description="a ticket file to start from, where phase = 'ticket'")

    @field_validator("criteria")
    @classmethod
    def _known_criteria(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for place, name in enumerate(names):
            if name not in criteria.CRITERIA or ":" in name:
                raise ValueError(str(UnknownName("criterion", name, criteria.CRITERIA.names)))
            if name in names[:place]:
                raise ValueError(f"{name!r} is named twice: two searches would be one")
        return names

    @field_validator("weights")
    @classmethod
    def _votes(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        for weight in weights:
            if weight <= 0:
                raise ValueError(f"a search's vote weighs {weight:g}; legal: above 0")
        return weights

    @field_validator("controls")
    @classmethod
    def _known_controls(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in CONTROLS and name != "missing-the-mark":
                raise ValueError(str(UnknownName("control", name, [*CONTROLS, "missing-the-mark"])))
        return names

    @field_validator("transfer_controls")
    @classmethod
    def _known_there(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in TRANSFER_CONTROLS:
                raise ValueError(str(UnknownName("control", name, TRANSFER_CONTROLS)))
        return tuple(dict.fromkeys(names))

    @field_validator("ticket")
    @classmethod
    def _file(cls, path: str) -> str:
        if path and not path.endswith(".safetensors"):
            raise ValueError(f"{path!r} must end in .safetensors")
        return path

    @model_validator(mode="after")
    def _named_tasks(self) -> TicketSettings:
        names = [task.label for task in self.tasks]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise ValueError(f"two tasks are called {name!r}; legal: a name for one of them")
        for name in self.transfer_to:
            if name not in names:
                raise ValueError(f"transfer_to: {UnknownName('task in [[tickets.tasks]]', name, names)}")
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """The controls one by one."""
        sets = [MISSING_THE_MARK if name == "missing-the-mark" else (name,) for name in self.controls]
        return tuple(dict.fromkeys(name for names in sets for name in names))


CONTROLS = (
    *("dense", "dense-long", "one-shot", "imp"),
    *("shuffled", "random", "random-layer", "inverted", "reinitialised", "sign-kept", "sign-constant"),
    "sibling",
)
"""What a ticket may be compared with: other ways to get there, and the kinds in `tickets.controls.CONTROLS`.

A sibling is no rival: it is the same network trained again in another order of the data, for `tickets --stability`.
"""
TRANSFER_CONTROLS = ("dense-transferred", *(name for name in CONTROLS if name not in ("dense-long", "sibling")))
"""What a ticket may be compared with on another task; "one-shot" and "imp" find a mask of that task's own."""
MISSING_THE_MARK = ("shuffled", "reinitialised", "inverted")
"""The sanity checks of Frankle et al. (2021) for pruning before training."""


class Choices(Section):
    """What one proposal says of pruning: the names of `[space]` that are not of `[train]`, and their legal ranges."""

    criterion: str = Field(default="magnitude", description="what makes a weight worth keeping; see `list criteria`")
    scope: str = Field(default="layer", description="who is ranked together; see `list scopes`")
    allocation: str = Field(
        default="uniform", description="how a final sparsity spreads over layers; see `list allocations`"
    )
    structure: str = Field(default="weight", description="what is removed as one; see `list structures`")
    fold: bool = Field(
        default=False,
        strict=True,
        description="add what a removed unit gives without its weights, a constant, to the biases of what reads it",
    )
    norm: str = Field(default="", description="how scores of weights become one of a unit; see `list norms`")
    only: str | None = Field(default=None, description="pattern of the layers to prune; all others are left alone")
    rate: Number | None = Field(default=None, gt=0, lt=1, description="fraction of what is left, pruned in each round")
    sparsity: Number | None = Field(
        default=None, gt=0, lt=1, description="masked fraction of all prunable weights in the end"
    )
    unit_sparsity: Number | None = Field(
        default=None, gt=0, lt=1, description="removed fraction of the units in the end"
    )
    flops_budget: Number | None = Field(
        default=None, gt=0, lt=1, description="fraction of the dense model's FLOPs that is left in the end"
    )
    params_budget: Number | None = Field(
        default=None, gt=0, lt=1, description="fraction of the dense model's parameters that is left in the end"
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
    prune_every: Epochs | None = Field(
        default=None, gt=0, description="phase 'during': epochs from one pruning to the next, instead of rounds"
    )
    prune_every_steps: Steps | None = Field(default=None, gt=0, description="the same in optimizer steps")
    regrow: str = Field(default="none", description="what grows back while training; see `list regrowths`")
    regrow_fraction: Number = Field(
        default=0.3, gt=0, lt=1, description="fraction of each layer's kept weights that is replaced, falling to 0"
    )
    searches: Whole = Field(default=1, ge=1, le=1000, description="searches whose masks are combined to one ticket")
    vary: Vary = Field(default="order", description="what differs between the searches")
    rule: Rule = Field(default="intersection", description="how their masks become one; see `list rules`")
    at_least: Whole | None = Field(default=None, ge=1, description="rule 'at-least': how many searches keep a weight")
    ticket_sparsity: Number | None = Field(default=None, gt=0, lt=1, description="rule 'most-voted': what it leaves")
    data_share: Number = Field(default=0.5, gt=0, lt=1, description="vary 'data': fraction that each search trains on")
    regrow_every: Epochs = Field(default=1, gt=0, description="epochs from one replacement to the next")
    regrow_end: Epochs | None = Field(default=None, description="epoch of the last replacement; default: at 3/4")
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

    @field_validator("structure")
    @classmethod
    def _structure(cls, name: str) -> str:
        named = name == "weight" or name in patterns.UNITS
        if not (named or patterns.n_of_m(name) or patterns.block_size(name)):
            legal = ["weight", *patterns.UNITS, "N:M such as 2:4", "RxC such as 4x1"]
            raise ValueError(str(UnknownName("structure", name, legal)))
        return name

    @field_validator("regrow")
    @classmethod
    def _regrow(cls, name: str) -> str:
        return _none_or_known(name, regrow.REGROW)

    @field_validator("norm")
    @classmethod
    def _norm(cls, name: str) -> str:
        if name and name not in NORMS:
            raise ValueError(str(UnknownName("norm", name, NORMS)))
        return name


def _none_or_known(name: str, registry: Registry[Any]) -> str:
    if name != "none" and name not in registry:
        raise ValueError(str(UnknownName(registry.kind, name, ["none", *registry.names])))
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
    prune: PruneSettings = field(default_factory=PruneSettings)
    tickets: TicketSettings = field(default_factory=TicketSettings)
    layer_targets: Mapping[str, float] = field(default_factory=dict)
    criterion_parameters: Mapping[str, Any] = field(default_factory=dict)
    criterion_code: str = ""


def check_value(name: str, value: Any) -> None:
    """Refuse a value that the parameter called `name` in `[space]` can never have.

    Raises:
        InputError: naming the parameter, the value and what would be legal.
    """
    kind, _, rest = name.partition(".")
    if kind == "layers":
        check_layer_target(name, value)
    elif kind == "criteria":
        criterion, _, parameter = rest.rpartition(".")
        if ":" not in criterion:
            check_criterion_parameters(criterion, {parameter: value})
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


def check_criterion_parameters(criterion: str, given: dict[str, Any]) -> dict[str, Any]:
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


def check_layer_target(name: str, value: Any) -> None:
    pattern, _, what = name.removeprefix("layers.").rpartition(".")
    if not pattern or what not in ("rate", "sparsity"):
        raise InputError(f"{name}: a layer's own target reads layers.PATTERN.rate or layers.PATTERN.sparsity")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise InputError(f"{name} = {value!r} must be a number from 0 to below 1")


def during(settings: Settings) -> tuple[float, float]:
    """The epochs of the first and the last pruning in phase 'during'; by default from a quarter to three quarters."""
    begin, end = settings.choices.prune_begin, settings.choices.prune_end
    epochs = settings.train.epochs
    return (epochs / 4 if begin is None else begin), (epochs * 3 / 4 if end is None else end)
