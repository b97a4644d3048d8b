"""What a proposal prunes, layer by layer and round by round, as ops; and what of it this model cannot do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from orchestrator.errors import PlanError, StageFailed
from orchestrator.ops import Prune
from orchestrator.planning.reach import refuse_unreachable
from orchestrator.pruning import criteria, schedules
from orchestrator.pruning.allocation import Tensors, by_group, counts
from orchestrator.pruning.patterns import UNITS, block_count, block_size, fits, n_of_m
from orchestrator.settings import FINAL, Choices, Settings
from orchestrator.tasks.info import TaskInfo, matches

MOST_NAMED = 4
"""So many layers are named in a message."""


def prune_ops(settings: Settings, info: TaskInfo, *, seed: int, count: int) -> list[Prune]:
    """One Prune op a round; what is asked for in the end is resolved to the target of each round."""
    choices = settings.choices
    factors = tensor_factors(settings, info)
    given = by_pattern(settings.layer_targets, info, "space.layers")
    _refuse_idle_layer_settings(choices, factors, given)
    _refuse_unfit(settings, factors, info)
    by_threshold = choices.threshold is not None
    pattern = n_of_m(choices.structure)
    entry = criteria.CRITERIA[choices.criterion]
    of_units = choices.structure in UNITS
    op = Prune(
        criterion=choices.criterion,
        # A threshold and an N:M pattern rank nobody, so that equal plans get equal keys.
        scope="layer" if by_threshold or pattern else choices.scope,
        structure=choices.structure,
        norm="" if choices.norm == entry.facts.get("norm", "l2") else choices.norm,
        allocation=choices.allocation,
        rate=choices.rate,
        threshold=choices.threshold,
        threshold_unit=choices.threshold_unit if by_threshold else "absolute",
        parameters=tuple(sorted(settings.criterion_parameters.items())),
        factors=tuple(sorted(factors.items())),
        targets=tuple(sorted(given.items())),
        floor=0 if pattern else settings.prune.floor,
        round_to=settings.prune.round_to if of_units else 1,
        fold=choices.fold,
        transposed=tuple((layer.name, layer.transposed) for layer in info.layers if layer.transposed),
        code=settings.criterion_code,
    )
    _refuse_lacking(op, info)
    needed = criteria.needs(entry)
    draws = "generator" in needed or any(need in criteria.FROM_DATA for need in needed)
    seeds: list[dict[str, Any]] = [{"seed": seed, "round": number} if draws else {} for number in range(1, count + 1)]
    final = next((name for name in FINAL if getattr(choices, name) is not None), None)
    if final is None:
        return [replace(op, **fields) for fields in seeds]
    amounts = _amounts(final, getattr(choices, final), choices.schedule, count)
    of_layers = {name: schedules.targets(choices.schedule, target, count) for name, target in op.targets}
    rounds = []
    for index, fields in enumerate(seeds):
        fields |= {final: amounts[index], "targets": tuple((name, own[index]) for name, own in of_layers.items())}
        rounds.append(replace(op, **fields))
    refuse_unreachable(rounds[-1], info)
    return rounds


def _amounts(name: str, final: float, schedule: str, count: int) -> list[float]:
    """What the op's field called `name` says in each round; a budget falls as the sparsity rises."""
    if name.endswith("_budget"):
        return [round(1 - target, 12) for target in schedules.targets(schedule, 1 - final, count)]
    return schedules.targets(schedule, final, count)


def _refuse_unfit(settings: Settings, factors: Mapping[str, float], info: TaskInfo) -> None:
    """Refuse a structure that fits none of the layers to be pruned."""
    structure = settings.choices.structure
    free = [layer for layer in info.layers if factors.get(layer.name) != 0.0]
    pattern = n_of_m(structure)
    if pattern is not None and not any(fits(layer.rows_first, pattern[1]) for layer in free):
        sizes = ", ".join(f"{layer.label} {layer.rows_first[1] if len(layer.shape) > 1 else 1}" for layer in free)
        raise PlanError(f"structure {structure!r} fits no layer: {pattern[1]} divides none of their inputs ({sizes})")
    if structure in info.units:
        groups = info.units[structure].groups
        if not groups:
            raise PlanError(f"the model has no {structure} that can be removed{_why(info, structure)}")
        names = {layer.name for layer in free}
        if not any(names.issuperset(makers) for made_by in groups.values() for makers in made_by):
            raise PlanError(
                f"every {structure} that can be removed lies in a layer that is ignored; there are: {', '.join(groups)}"
            )
    block = block_size(structure)
    if block is not None and all(block_count(layer.rows_first, *block) == 1 for layer in free):
        raise PlanError(f"structure {structure!r} fits no layer: every layer is a single block; legal: smaller blocks")


def _refuse_lacking(op: Prune, info: TaskInfo) -> None:
    """Refuse a criterion without what it needs of the layers that it would score."""
    scored = _scored(op, info)
    for need in criteria.needs(criteria.CRITERIA[op.criterion]):
        lacking = info.lacks.get(need, {})
        if "" in lacking:
            raise PlanError(f"criterion {op.criterion!r} cannot be used on this task: {lacking['']}")
        without = [name for name in scored if name in lacking]
        if without:
            named = ", ".join(repr(name) for name in without[:MOST_NAMED])
            more = f" and {len(without) - MOST_NAMED} more" if len(without) > MOST_NAMED else ""
            ignored = "" if len(without) == len(scored) else ", or name them in prune.ignore"
            raise PlanError(
                f"criterion {op.criterion!r} has no {need} of {named}{more}: {lacking[without[0]]}; "
                f"legal: another criterion{ignored}"
            )


def _scored(op: Prune, info: TaskInfo) -> list[str]:
    """The tensors that the criterion would score.

    Raises:
        PlanError: it would score none of those that say what some unit is worth.
    """
    protected = {name for name, factor in op.factors if factor == 0}
    pattern = n_of_m(op.structure)
    names = [layer.name for layer in info.layers if layer.name not in protected]
    if pattern is not None:
        sizes = {layer.name: layer.rows_first for layer in info.layers}
        return [name for name in names if fits(sizes[name], pattern[1])]
    if op.structure not in info.units:
        return names
    roles = criteria.scored_roles(op.criterion, op.structure)
    among = [layer.name for layer in info.layers] if roles == ("reads",) else names
    found = info.units[op.structure]
    scored: set[str] = set()
    for group, pieces in found.pieces.items():
        mine = {piece.tensor for piece in pieces if piece.role in roles}.intersection(among)
        free = any(protected.isdisjoint(makers) for makers in found.groups[group])
        if free and not mine:
            raise PlanError(
                f"criterion {op.criterion!r} scores a unit over the weights that read it, and no prunable weight reads "
                f"those of {group!r}; legal: another criterion, or name it in prune.ignore"
            )
        scored |= mine
    return [name for name in among if name in scored]


def _why(info: TaskInfo, structure: str) -> str:
    refused = info.units[structure].refused
    if not refused and structure == "head":
        return ": it has no nn.MultiheadAttention, whose heads are known"
    return f": {refused[0][0]}: {refused[0][1]}" if refused else ""


def _refuse_idle_layer_settings(choices: Choices, factors: Mapping[str, float], given: Mapping[str, float]) -> None:
    """Refuse factors and targets of layers that would change nothing."""
    scaled = any(factor not in (0.0, 1.0) for factor in factors.values())
    if n_of_m(choices.structure):
        if scaled:
            raise PlanError(
                f"structure {choices.structure!r} keeps as much everywhere; legal in prune.layer_factors: 0"
            )
    elif choices.threshold is not None:
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


def tensor_factors(settings: Settings, info: TaskInfo) -> dict[str, float]:
    """The factor on the rate of each tensor that is not pruned like the rest; 0 where it is ignored."""
    factors = by_pattern(settings.prune.layer_factors, info, "prune.layer_factors")
    factors |= by_pattern(dict.fromkeys(settings.prune.ignore, 0.0), info, "prune.ignore")
    if settings.choices.only is not None:
        chosen = by_pattern({settings.choices.only: 1.0}, info, "only")
        factors |= {layer.name: 0.0 for layer in info.layers if layer.name not in chosen}
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


def refuse_empty(settings: Settings, prunes: Sequence[Prune], info: TaskInfo) -> None:
    """Refuse rounds that would leave no weight, or unit, in a group that is ranked together.

    Without a floor, layers may become empty, but not the whole network.

    Raises:
        PlanError: naming the group and the round.
    """
    ranked = [_ranked(op, info) for op in prunes]
    sizes = {name: prod(shape) for name, shape in ranked[0][1].items()} if ranked else {}
    kept = dict(sizes)
    for number, (op, shapes) in enumerate(ranked, start=1):
        if not shapes:
            return  # what is left depends on the weights
        if settings.choices.regrow == "all":
            kept = dict(sizes)  # every mask was opened since
        try:
            groups = counts(op, Tensors(shapes=shapes, kept=kept))
        except StageFailed as error:
            raise PlanError(f"round {number} of {len(prunes)}: {error}") from error
        for group, left in groups.items():
            if left <= 0 and op.floor and op.structure == "weight":  # of units, the floor keeps some
                where = f"layer {group[0].removesuffix('.weight')!r}" if len(group) == 1 else "the network"
                raise PlanError(
                    f"round {number} of {len(prunes)} leaves no weight in {where}: prune less, or fewer rounds"
                )
            # Where in a group the weights are left depends on them; only their number counts here.
            held = sum(min(op.floor, sizes[name]) for name in group)
            kept.update(dict.fromkeys(group, 0))
            kept[group[0]] = max(left, held)
        if not any(kept.values()):
            raise PlanError(
                f"round {number} of {len(prunes)} leaves nothing in the network: prune less, or fewer rounds"
            )


def _ranked(op: Prune, info: TaskInfo) -> tuple[Prune, dict[str, tuple[int, ...]]]:
    """The op over what is counted layer by layer, and the shapes of that; none where counts do not say what is left."""
    counted = op.rate is not None or op.unit_sparsity is not None
    if op.unit_sparsity is not None:
        op = replace(op, sparsity=op.unit_sparsity)
    if op.structure == "weight" and (counted or op.sparsity is not None):
        return op, {layer.name: layer.rows_first for layer in info.layers}
    block = block_size(op.structure)
    if block is not None and counted:
        sizes = {layer.name: block_count(layer.rows_first, *block) for layer in info.layers}
        return by_group(op, {name: {(name,): size} for name, size in sizes.items()})
    if op.structure in info.units and counted:
        return by_group(op, info.units[op.structure].groups)
    return op, {}
