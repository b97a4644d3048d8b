"""From a Prune op and the weights to smaller masks, and to weights where the criterion moves them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import NotFinite, OrchardistError, StageFailed
from orchestrator.ops import Prune
from orchestrator.pruning.allocation import Tensors
from orchestrator.pruning.budget import Costs, goal
from orchestrator.pruning.criteria import CRITERIA, LIKE_WEIGHT, needs, of_rows, scored_roles
from orchestrator.pruning.masks import count, index_hashes
from orchestrator.pruning.parts import Part, Things, blocks, grouped, single_weights
from orchestrator.pruning.patterns import UNITS, block_size, fits, keep_n_of_m, n_of_m, turned
from orchestrator.pruning.ranking import Chosen, above, best, within
from orchestrator.pruning.structure import Units, without

Supply = Callable[[str], Mapping[str, Any]]
"""Gives what a criterion needs, by its name in `needs`, for each tensor that is `scored`."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a pruning may look at and mask.

    Args:
        weights: the prunable tensors in model order.
        masks: so far, by parameter name; a tensor without one is dense.
        shapes: of all parameters; units mask biases and norms too.
        units: of the op's structure, where it is made of units.
        costs: asked for only where a budget is to be met.
    """

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    units: tuple[Units, ...] = ()
    costs: Callable[[], Costs] | None = None


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a pruning gives: every mask a subset of the one before.

    Args:
        masks: by parameter name.
        moved: the weights of those tensors whose kept weights the criterion moved.
        remarks: what is worth saying: layers that the floor held, layers that stay dense, units that are left.
    """

    masks: Mapping[str, Tensor]
    moved: Mapping[str, Tensor] = field(default_factory=dict)
    remarks: Mapping[str, Any] = field(default_factory=dict)


def prune(op: Prune, network: Network, supply: Supply) -> Pruned:
    """The masks after `op`, and the weights where the criterion moves them.

    Args:
        op: what to do.
        network: what to do it to.
        supply: gives gradients, generators and other needs of the criterion.

    Raises:
        NotFinite: a score is NaN or infinite.
        StageFailed: it is that by a user's own criterion; the criterion returned no scores of the weight's shape; or
            what is asked for cannot be reached.
    """
    entry = CRITERIA[op.criterion]
    supplied = {need: supply(need) for need in needs(entry)}
    before = {name: network.masks.get(name, _dense(weight)) for name, weight in network.weights.items()}
    try:
        if n_of_m(op.structure) is not None:
            pruned = _by_pattern(op, network, before, supplied)
        else:
            pruned = _by_rank(op, network, before, supplied)
    except NotFinite as error:
        raise NotFinite(f"criterion {op.criterion!r}: {error}") from error
    grown = [name for name, mask in network.masks.items() if count(pruned.masks[name] & ~mask)]
    assert not grown, f"a mask grew: {grown}"
    return pruned


def scored(op: Prune, network: Network) -> dict[str, Tensor]:
    """The weights that are scored: those that are not protected and, for units, that say what a unit is worth.

    What reads a unit may say so though it is protected itself.
    """
    free = _free(op, network)
    if op.structure not in UNITS:
        return free
    roles = scored_roles(op.criterion, op.structure)
    among = network.weights if roles == ("reads",) else free
    mine = {piece.tensor for group in network.units for piece in group.slices if piece.role in roles}
    return {name: weight for name, weight in among.items() if name in mine}


def score(
    op: Prune,
    weights: Mapping[str, Tensor],
    supplied: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The criterion's score of each tensor: a real number for each weight, on the CPU.

    Criteria are handed copies in single precision or better: they may write on them, and halves would tie.

    Args:
        op: names the criterion.
        weights: to score.
        supplied: what the criterion needs beside them.
        before: the masks so far: where one is False the score may be anything.
    """
    own = _own(op)
    # Blocks of a Hessian are over the entries as they lie.
    groups = {} if "hessian_blocks" in supplied else dict(op.transposed)
    scores = {}
    for name, stored in weights.items():
        weight = _copied(stored)
        given = {need: _copied(value) for need, value in _given(op, name, supplied).items()}
        if name in groups:
            given = {n: turned(value, groups[name]) if n in LIKE_WEIGHT else value for n, value in given.items()}
            weight = turned(weight, groups[name])
        found = _called(op, name, weight, given | own)
        if not isinstance(found, Tensor) or found.is_complex():
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise StageFailed(f"criterion {op.criterion!r} returned {kind} for {name!r}, not a tensor of real numbers")
        if found.shape != weight.shape:
            shapes = f"{tuple(found.shape)} for a weight of shape {tuple(weight.shape)}"
            raise StageFailed(f"criterion {op.criterion!r} returned scores of shape {shapes} ({name!r})")
        found = found.detach().to("cpu")
        found = turned(found, groups[name]) if name in groups else found
        scores[name] = found if found.is_floating_point() else found.double()
        _refuse_not_finite(op, name, stored, scores[name], before[name])
    return scores


def _by_rank(
    op: Prune, network: Network, before: Mapping[str, Tensor], supplied: Mapping[str, Mapping[str, Any]]
) -> Pruned:
    """The masks without what is worth least: single weights, blocks of them, or units."""
    scores = score(op, scored(op, network), supplied, before)
    things, masks_of = _things(op, network, before, scores)
    if op.threshold is not None:
        chosen = above(things, partial(_unit, op, network))
    elif op.flops_budget is not None or op.params_budget is not None or (op.structure != "weight" and op.sparsity):
        assert network.costs is not None
        chosen = within(things, goal(op, network.costs()), masks_of)
    else:
        chosen = best(things)
    after, moved = _moved(op, network, before, masks_of(chosen.kept), supplied)
    return Pruned(masks=after, moved=moved, remarks=_remarks(op, things.counts, chosen))


def _by_pattern(
    op: Prune, network: Network, before: Mapping[str, Tensor], supplied: Mapping[str, Mapping[str, Any]]
) -> Pruned:
    """The masks that keep n of every m weights, in the layers that m divides."""
    pattern = n_of_m(op.structure)
    assert pattern is not None
    free = _free(op, network)
    fitting = {n: free[n] for n, weight in _rows_first(op, free).items() if fits(weight.shape, pattern[1])}
    chosen = {}
    if "solve" not in CRITERIA[op.criterion].facts:
        weights, there = _rows_first(op, fitting), _rows_first(op, before)
        for name, found in _rows_first(op, score(op, fitting, supplied, before)).items():
            sizes, hashes = weights[name].abs(), index_hashes(name, found.numel()).reshape(found.shape)
            chosen[name] = keep_n_of_m(found, there[name], sizes, hashes, *pattern)
    masks = {**network.masks, **before, **_rows_first(op, chosen)}
    after, moved = _moved(op, replace(network, weights=fitting), before, masks, supplied)
    dense = [name for name in free if name not in fitting]
    return Pruned(masks=after, moved=moved, remarks={"dense": dense} if dense else {})


def _moved(
    op: Prune,
    network: Network,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    supplied: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks, and the weights that the criterion moves so that they make up for what goes."""
    facts, own, pattern = CRITERIA[op.criterion].facts, _own(op), n_of_m(op.structure)
    masks = dict(after)
    moved: dict[str, Tensor] = {}
    if not {"solve", "compensate"} & facts.keys():
        return masks, moved
    for name, weight in _free(op, network).items():
        given = _given(op, name, supplied)
        if "solve" in facts:
            rows = masks[name].reshape(len(weight), -1).sum(dim=1) if op.scope == "row" else None
            keep = count(masks[name]) if rows is None else rows
            masks[name], moved[name] = facts["solve"](weight, before[name], keep, pattern, **given, **own)
        elif not torch.equal(masks[name], before[name]):
            moved[name] = facts["compensate"](weight, before[name], masks[name], **given, **own)
    return masks, moved


def _things(
    op: Prune, network: Network, before: Mapping[str, Tensor], scores: Mapping[str, Tensor]
) -> tuple[Things, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]:
    """What is ranked, and how the masks of all parameters follow from what is kept of it."""
    masks = {**network.masks, **before}
    weights = _rows_first(op, network.weights)
    if op.structure == "weight":
        things = single_weights(op, _rows_first(op, scores), weights, _rows_first(op, network.masks))
        return things, lambda kept: masks | _rows_first(op, kept)
    facts = CRITERIA[op.criterion].facts
    norm = op.norm or facts.get("norm", "l2")
    # A draw, or the score of a whole row, is the same whatever of the row is masked.
    as_they_are = norm == "first" or of_rows(op.criterion)
    seen = scores if as_they_are else {name: found.where(before[name], 0) for name, found in scores.items()}
    block = block_size(op.structure)
    if block is None:
        roles = scored_roles(op.criterion, op.structure)
        things = grouped(op, network.units, seen, network.weights, masks, norm=norm, roles=roles)
        named = {group.name: group for group in network.units}
        held = {part.name: part.held for part in things.parts}
        return things, lambda kept: without(
            [(named[name], mask | held[name]) for name, mask in kept.items()], masks, network.shapes
        )
    flat = [{name: tensor.reshape(-1) for name, tensor in found.items()} for found in (seen, network.weights, masks)]
    groups = blocks({name: weight.shape for name, weight in weights.items()}, *block, dict(op.transposed))
    owners = {group.name: group.slices[0].owner.reshape(before[group.name].shape) for group in groups}
    things = grouped(op, groups, *flat, norm=norm, roles=("makes",))
    return things, lambda kept: masks | {name: before[name] & mask[owners[name]] for name, mask in kept.items()}


def _free(op: Prune, network: Network) -> dict[str, Tensor]:
    """The prunable weights that the op does not protect."""
    protected = {name for name, factor in op.factors if factor == 0}
    return {name: weight for name, weight in network.weights.items() if name not in protected}


def _unit(op: Prune, network: Network, part: Part) -> float:
    """What the threshold is a multiple of: the standard deviation of the kept weights, or 1."""
    if op.threshold_unit == "absolute" or not part.kept:
        return 1.0
    weight = _rows_first(op, {part.name: network.weights[part.name]})[part.name]
    return float((weight if part.among is None else weight[part.among]).double().std(correction=0))


def _rows_first(op: Prune, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of weights' shapes with the outputs first, where they lie inputs first, and the other way round."""
    groups = dict(op.transposed)
    return {name: turned(tensor, groups[name]) if name in groups else tensor for name, tensor in tensors.items()}


def _remarks(op: Prune, counts: Tensors, chosen: Chosen) -> dict[str, Any]:
    remarks: dict[str, Any] = {"floored": list(chosen.floored)} if chosen.floored else {}
    if op.structure != "weight":
        others = sum(kept for name, kept in counts.kept.items() if name not in chosen.kept)
        remarks["units"] = [others + sum(map(count, chosen.kept.values())), counts.total]
    return remarks


def _given(op: Prune, name: str, supplied: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the criterion needs beside the tensor called `name`."""
    for need, values in supplied.items():
        if name not in values:
            raise StageFailed(
                f"criterion {op.criterion!r}: there is no {need} of {name!r}; name what cannot be scored in "
                "prune.ignore"
            )
    return {need: values[name] for need, values in supplied.items()}


def _refuse_not_finite(op: Prune, name: str, weight: Tensor, scores: Tensor, before: Tensor) -> None:
    if not scores.numel() or all(bool(end.isfinite()) for end in scores.aminmax()):
        return
    bad = count(before & ~scores.isfinite())
    if not bad:
        return
    said = f"{bad} of the {count(before)} scores of {name!r} are NaN or infinite"
    if ":" in op.criterion and bool(weight.isfinite().all()):  # it is the user's function, not the training
        raise StageFailed(f"criterion {op.criterion!r}: {said}")
    raise NotFinite(said)


def _called(op: Prune, name: str, weight: Tensor, given: Mapping[str, Any]) -> Any:
    try:
        return CRITERIA[op.criterion].function(weight, **given)
    except (MemoryError, torch.OutOfMemoryError, OrchardistError):
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise StageFailed(f"criterion {op.criterion!r} raised {type(error).__name__} for {name!r}: {said}") from error


def _own(op: Prune) -> dict[str, Any]:
    """The criterion's own parameters; the others say how what it needs was gathered."""
    if not op.parameters:
        return {}
    takes = inspect.signature(CRITERIA[op.criterion].function).parameters
    return {name: value for name, value in op.parameters if name in takes}


def _dense(weight: Tensor) -> Tensor:
    return torch.ones(weight.shape, dtype=torch.bool)


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
