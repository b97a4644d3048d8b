"""A proposal laid over a study's constants, and refused, with the reason, where its choices do not go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import InputError, PlanError
from orchestrator.pruning import criteria
from orchestrator.pruning.patterns import n_of_m
from orchestrator.settings import (
    HOW_MUCH,
    IN_SPACE,
    Choices,
    PruneSettings,
    Settings,
    TicketSettings,
    TrainSettings,
    check_criterion_parameters,
    check_layer_target,
    complaints,
    during,
)

FOLDED = ("neuron", "filter", "channel", "head")
"""The structures whose units are read by layers that have biases."""


def resolve(
    train: TrainSettings,
    prune: PruneSettings,
    params: Mapping[str, Any],
    code: Mapping[str, str] | None = None,
    tickets: TicketSettings | None = None,
) -> Settings:
    """Lay a proposal's flat parameters over the study's constants.

    Args:
        train: the study's `[train]`.
        prune: the study's `[prune]`.
        params: name -> value as the sampler chose them; `layers.PATTERN.rate` and `criteria.NAME.PARAMETER` included.
        code: digests of the sources of users' own criteria, by name.
        tickets: the study's `[tickets]`.

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
        prune=prune,
        tickets=tickets or TicketSettings(),
        layer_targets=layer_targets,
        criterion_parameters=parameters,
        criterion_code=(code or {}).get(choices.criterion, ""),
    )
    refuse(settings)
    return settings


def refuse(settings: Settings) -> None:
    """Refuse choices that make no sense together.

    Raises:
        PlanError: what does not go together and what would be legal.
    """
    if settings.choices.phase == "ticket":
        _refuse_given(settings)
        return
    _refuse_structure(settings)
    _refuse_how_much(settings)
    _refuse_phase(settings)
    _refuse_regrow(settings.choices)
    _refuse_tickets(settings)
    if settings.train.penalty != "none" and settings.train.penalty_strength == 0:
        raise PlanError(
            f"penalty {settings.train.penalty!r} of strength 0 does nothing; legal: penalty_strength above 0"
        )


def warnings(settings: Settings, examples: int = 0) -> Iterator[str]:
    """What is legal, but hardly what was meant.

    Args:
        settings: of one mix.
        examples: how many there are to train on; 0 where that is not known.
    """
    choices = settings.choices
    entry = criteria.CRITERIA[choices.criterion]
    if entry.facts.get("before_training") and choices.phase != "before":
        yield f"criterion {choices.criterion!r} is made for untrained networks, but phase is {choices.phase!r}"
    if (
        choices.retrain == "none"
        and choices.phase == "after"
        and settings.prune.recalibrate == 0
        and choices.rounds > 1
    ):
        yield "several rounds without retraining between them prune as far as one round would"
    single = choices.structure == "weight" or n_of_m(choices.structure) is not None
    if choices.criterion == "lamp" and single and choices.scope != "global":
        yield f"criterion 'lamp' compares layers: in scope {choices.scope!r} it ranks as 'magnitude' does"
    asked = settings.criterion_parameters.get("examples", 0)
    if examples and asked > examples:
        yield f"criteria.{choices.criterion}.examples = {asked}, but there are {examples} to train on: all are taken"
    if examples and settings.prune.recalibrate > examples:
        yield f"prune.recalibrate = {settings.prune.recalibrate}, but there are {examples} to train on: all are taken"


def _criterion_parameters(criterion: str, params: Mapping[str, Any]) -> dict[str, Any]:
    if ":" in criterion:
        criteria.check_signature(criterion, criteria.CRITERIA[criterion].function)
    prefix = f"criteria.{criterion}."
    given = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
    defaults = check_criterion_parameters(criterion, given)
    return {name: value for name, value in given.items() if value != defaults[name]}


def _layer_targets(choices: Choices, params: Mapping[str, Any]) -> dict[str, float]:
    """Values of `[space.layers]` by pattern."""
    kind = next((name for name in HOW_MUCH if getattr(choices, name) is not None), "structure")
    wanted = {"rate": "rate", "sparsity": "sparsity", "unit_sparsity": "sparsity"}.get(kind)
    targets = {}
    for name, value in params.items():
        if name.startswith("layers."):
            check_layer_target(name, value)
            pattern, _, what = name.removeprefix("layers.").rpartition(".")
            if wanted is None:
                raise PlanError(f"{name}: per-layer targets go with rate or a final sparsity, not with a {kind}")
            if what != wanted:
                raise PlanError(f"{name}: the study prunes by {kind}; legal here: layers.{pattern}.{wanted}")
            targets[pattern] = float(value)
    return targets


def _refuse_structure(settings: Settings) -> None:
    choices = settings.choices
    entry = criteria.CRITERIA[choices.criterion]
    single = choices.structure == "weight" or n_of_m(choices.structure) is not None
    if choices.norm and single:
        raise PlanError(
            f"norm {choices.norm!r} puts weights together to units; structure {choices.structure!r} has none"
        )
    if choices.scope == "row" and not single:
        raise PlanError(f"scope 'row' ranks single weights, not structure {choices.structure!r}; legal: layer, global")
    if "solve" in entry.facts and not single:
        raise PlanError(
            f"criterion {choices.criterion!r} chooses single weights as it solves for the others; "
            f"legal: structure 'weight' or N:M, not {choices.structure!r}"
        )
    if entry.facts.get("reads") and choices.structure == "layer":
        raise PlanError(
            f"criterion {choices.criterion!r} scores a unit over the weights that read it, and nothing reads a whole "
            "layer; legal: neuron, filter, channel, head, or another criterion"
        )
    _refuse_fold(choices)
    if choices.allocation == "erk" and not single:
        raise PlanError("allocation 'erk' is for structure 'weight'; legal here: uniform, given")


def _refuse_fold(choices: Choices) -> None:
    if not choices.fold:
        return
    if choices.structure not in FOLDED:
        raise PlanError(
            f"fold moves the constants of units that other layers read; structure {choices.structure!r} has none; "
            f"legal with it: {', '.join(FOLDED)}"
        )
    if choices.phase == "after" and choices.retrain in ("rewind", "reinit"):
        raise PlanError(
            f"fold moves biases, which retrain {choices.retrain!r} puts back; legal with it: none, finetune, lr-rewind"
        )


def _refuse_how_much(settings: Settings) -> None:
    choices = settings.choices
    given = [name for name in HOW_MUCH if getattr(choices, name) is not None]
    if n_of_m(choices.structure):
        often = ("prune_every", "prune_every_steps")
        given += [name for name in often if getattr(choices, name) is not None]
        given += ["rounds"] if choices.rounds != 1 else []
        if given:
            said = " and ".join(given)
            raise PlanError(f"structure {choices.structure!r} says itself how much stays, in one round; given: {said}")
        if settings.layer_targets or choices.allocation != "uniform":
            raise PlanError(
                f"structure {choices.structure!r} keeps as much everywhere: no allocation, no layer targets"
            )
        return
    if len(given) != 1:
        raise PlanError(
            f"how much to prune is said by exactly one of {', '.join(HOW_MUCH)}; given: {' and '.join(given) or 'none'}"
        )
    _refuse_threshold(settings)
    budget = choices.flops_budget is not None or choices.params_budget is not None
    final = choices.sparsity is not None or choices.unit_sparsity is not None
    if budget and choices.scope == "row":
        raise PlanError("a budget is met layer by layer or over all layers together; legal scopes: layer, global")
    if choices.unit_sparsity is not None and choices.structure == "weight":
        raise PlanError("unit_sparsity counts units, but structure is 'weight'; legal with it: sparsity")
    if not final and choices.allocation != "uniform":
        raise PlanError(f"allocation {choices.allocation!r} spreads a final sparsity; legal with it: sparsity")
    if choices.scope == "global" and choices.allocation != "uniform":
        raise PlanError(f"allocation {choices.allocation!r} is for scope 'layer': the global ranking spreads by itself")
    if final and bool(settings.layer_targets) != (choices.allocation == "given"):
        raise PlanError("per-layer sparsities ([space.layers]) and allocation = 'given' go together")
    if choices.allocation == "given" and choices.sparsity is not None and choices.structure != "weight":
        raise PlanError("per-layer sparsities of units are said in units; legal: unit_sparsity")


def _refuse_threshold(settings: Settings) -> None:
    choices = settings.choices
    if choices.threshold is None:
        return
    entry = criteria.CRITERIA[choices.criterion]
    if not entry.facts.get("magnitude_like") and not settings.prune.threshold_any_criterion:
        legal = ", ".join(e.name for e in criteria.CRITERIA if e.facts.get("magnitude_like"))
        raise PlanError(
            f"a threshold on the scores of {choices.criterion!r} is no size of a weight; legal: {legal}, "
            "or prune.threshold_any_criterion = true"
        )
    if choices.threshold_unit == "std" and choices.structure != "weight":
        raise PlanError("threshold_unit 'std' is that of a tensor's weights, not of units; legal: 'absolute'")


def _refuse_phase(settings: Settings) -> None:
    choices, train = settings.choices, settings.train
    if "movement" in criteria.needs(criteria.CRITERIA[choices.criterion]) and (
        choices.phase == "before" or train.epochs == 0
    ):
        raise PlanError(
            f"criterion {choices.criterion!r} is gathered while training, and nothing is trained before the pruning; "
            "legal: phase 'during' or 'after' with epochs above 0"
        )
    every = choices.prune_every is not None or choices.prune_every_steps is not None
    if every and choices.phase != "during":
        raise PlanError(f"prune_every belongs to phase 'during'; legal in {choices.phase!r}: rounds")
    if every and ("rounds" in choices.model_fields_set or None not in (choices.prune_every, choices.prune_every_steps)):
        raise PlanError("rounds, prune_every and prune_every_steps say the same thing; legal: one of them")
    if choices.phase == "after":
        _refuse_retrain(choices, train)
        return
    if choices.retrain not in ("none", "finetune"):
        raise PlanError(f"retrain {choices.retrain!r} belongs to phase 'after'; legal in {choices.phase!r}: none")
    if train.epochs == 0:
        raise PlanError(f"phase {choices.phase!r} trains after pruning, but epochs = 0; legal: more, or phase 'after'")
    if choices.phase == "during":
        begin, end = during(settings)
        if not 0 < begin <= end < train.epochs:
            raise PlanError(
                f"prune_begin {begin:g} to prune_end {end:g} must lie inside training (0 to {train.epochs:g})"
            )


def _refuse_tickets(settings: Settings) -> None:
    choices, tickets = settings.choices, settings.tickets
    if choices.searches > 1:
        if choices.phase != "after" or choices.retrain != "rewind":
            raise PlanError("searches are combined to a ticket; legal with them: phase 'after' with retrain 'rewind'")
        if choices.structure != "weight":
            raise PlanError(f"masks of single weights are combined, not of structure {choices.structure!r}")
        if choices.vary == "criterion" and len(tickets.criteria) != choices.searches:
            raise PlanError(
                f"vary 'criterion' takes one criterion for each of the {choices.searches} searches; "
                f"[tickets] criteria names {len(tickets.criteria)}"
            )
        if choices.vary == "criterion":
            _refuse_gathering(tickets)
        if choices.vary == "tasks" and choices.searches > 1 + len(tickets.tasks):
            raise PlanError(
                f"vary 'tasks' takes a task for each of the {choices.searches} searches: the study's own and, in "
                f"[[tickets.tasks]], {choices.searches - 1} others; there are {len(tickets.tasks)}"
            )
        if choices.rule == "weighted" and len(tickets.weights) != choices.searches:
            raise PlanError(
                f"rule 'weighted' takes one vote for each of the {choices.searches} searches; "
                f"[tickets] weights gives {len(tickets.weights)}"
            )
        if (choices.rule == "at-least") != (choices.at_least is not None) or (choices.at_least or 1) > choices.searches:
            raise PlanError(f"rule 'at-least' and at_least = 1 to {choices.searches} (searches) go together")
        if (choices.rule == "most-voted") != (choices.ticket_sparsity is not None):
            raise PlanError("rule 'most-voted' and ticket_sparsity go together")
    is_ticket = choices.phase == "before" or (choices.phase == "after" and choices.retrain == "rewind")
    if (tickets.controls or tickets.transfer_to) and is_ticket and choices.structure != "weight":
        raise PlanError(f"controls are drawn weight by weight; structure {choices.structure!r} has none yet")


def _refuse_given(settings: Settings) -> None:
    """In phase 'ticket' nothing is pruned: the file says what stays."""
    choices, tickets = settings.choices, settings.tickets
    if not tickets.ticket:
        raise PlanError(
            "phase 'ticket' starts from a ticket file; legal with it: [tickets] ticket = \"ticket.safetensors\""
        )
    said = sorted(choices.model_fields_set - {"phase"})
    if said:
        raise PlanError(
            f"phase 'ticket' prunes nothing, so that {said[0]} means nothing; legal beside it: [train]'s names"
        )
    if tickets.transfer_to:
        raise PlanError("a ticket file is tried on the study's own task; legal with phase 'ticket': no transfer_to")
    if settings.train.epochs == 0:
        raise PlanError("phase 'ticket' trains the ticket, but epochs = 0; legal: more")


def _refuse_gathering(tickets: TicketSettings) -> None:
    for name in tickets.criteria:
        if set(criteria.needs(criteria.CRITERIA[name])) & set(criteria.WHILE_TRAINING):
            raise PlanError(
                f"criterion {name!r} is gathered while training, and searches that vary in their criterion share one "
                "training; legal in [tickets] criteria: those that look at a trained model"
            )


def _refuse_regrow(choices: Choices) -> None:
    if choices.regrow == "none":
        return
    wanted = "during" if choices.regrow == "all" else "before"
    if choices.phase != wanted:
        raise PlanError(f"regrow {choices.regrow!r} belongs to phase {wanted!r}, not {choices.phase!r}")
    if choices.structure != "weight":
        raise PlanError(f"weights grow back one by one, but structure is {choices.structure!r}; legal: 'weight'")
    every = choices.prune_every is not None or choices.prune_every_steps is not None
    if choices.regrow == "all" and choices.rounds < 2 and not every:
        raise PlanError("regrow 'all' opens the masks between prunings; legal: rounds = 2 or more, or prune_every")


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
