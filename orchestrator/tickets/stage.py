"""The ticket ops run on their parents' states: combine, control, transfer, and pruning as in a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from torch import Tensor

from orchestrator.errors import StageFailed
from orchestrator.ops import Combine, Control, Prune, Transfer
from orchestrator.state import State
from orchestrator.tasks.info import leaves
from orchestrator.tickets import algebra, votes
from orchestrator.tickets.packed import Masks
from orchestrator.tickets.transfer import transfer
from orchestrator.tickets.verified import control


def combine(op: Combine, parents: Sequence[State], prunable: Sequence[str]) -> State:
    """The ancestor's weights, the last parent's, under one mask of the searches', the other parents'.

    Searches on several tasks are combined where all have the same tensor, by name and shape; other prunable tensors
    stay dense and are remarked as "outside". A layer that would be cut off gets back its most-voted weights, which is
    remarked as "repaired": {name: how many}.

    Raises:
        StageFailed: the ancestor has masks of its own, the searches have no tensor in common, or one in two types, or
            the wanted sparsity cannot be reached.
    """
    *searches, ancestor = parents
    if ancestor.masks:
        raise StageFailed(f"searches start from dense weights; their ancestor has a mask of {min(ancestor.masks)!r}")
    outside = [name for name in prunable if not all(_alike(name, ancestor, state) for state in searches)]
    shared = [name for name in prunable if name not in outside]
    if not shared:
        raise StageFailed(f"the searches have no prunable tensor in common: {', '.join(outside)} differ")
    for name in shared:
        kinds = sorted({str(state.weights[name].dtype).removeprefix("torch.") for state in parents})
        if len(kinds) > 1:
            raise StageFailed(
                f"the searches did not start bit-equal: {name!r} is {' in one task, '.join(kinds)} in another"
            )
    masks = [{name: state.masks[name] for name in shared if name in state.masks} for state in searches]
    combined = _rule(op, masks, searches, total=sum(ancestor.weights[name].numel() for name in prunable))
    remarks: dict[str, Any] = {"outside": outside} if outside else {}
    if algebra.cut_off(combined):
        polled = algebra.poll(masks, op.weights or None)
        repaired = algebra.repair(combined, polled, op.seed, _standing(searches, tuple(combined)))
        combined, remarks = dict(repaired.masks), remarks | {"repaired": repaired.added}
    return replace(ancestor, masks=combined, remarks=remarks).masked()


def _alike(name: str, one: State, other: State) -> bool:
    return name in other.weights and one.weights[name].shape == other.weights[name].shape


def controlled(op: Control, parents: Sequence[State]) -> State:
    """The control of the first parent, a ticket, over the second, its ancestor; verified."""
    ticket, ancestor, *other = parents
    return control(op.kind, ticket, ancestor, seed=op.seed, other=other[0] if other else None)


def transferred(op: Transfer, parents: Sequence[State]) -> State:
    """The first parent, a ticket, on the second, another model's init; what was taken over is remarked."""
    ticket, other = parents
    leave = {name for name in other.weights if any(leaves(pattern, name) for pattern in op.leave)}
    made = transfer(ticket, other, leave)
    return replace(made.state, remarks={"taken": list(made.taken), "dense": list(made.dense)})


def like_reference(op: Prune, state: State, reference: State, sizes: Mapping[str, int]) -> Prune:
    """The op with how much said in numbers: exactly as many as the reference keeps, or `part` of the way there.

    Args:
        op: with `like`.
        state: to be pruned.
        reference: the state whose masks say how much.
        sizes: how many weights each prunable tensor has.

    Raises:
        StageFailed: the state keeps fewer weights already than are to be left.
    """
    wanted = _kept(reference, sizes)
    now = _kept(state, sizes)
    if op.like == "overall":
        total = sum(sizes.values())
        left = _part(op, sum(wanted.values()), total)
        _refuse_fewer("the network", sum(now.values()), left)
        return replace(op, like="", part=1.0, sparsity=1 - left / total)
    # Said as rates: they are rounded to whole weights, where given sparsities would have to add up.
    rates = []
    for name, size in sizes.items():
        left = _part(op, wanted[name], size)
        _refuse_fewer(f"{name!r}", now[name], left)
        rates.append((name, max(0.0, min(now[name] - left, now[name] - 0.25)) / max(1, now[name])))
    return replace(
        op, like="", part=1.0, scope="layer", allocation="uniform", rate=0.0, factors=(), targets=tuple(rates), floor=0
    )


def _rule(op: Combine, masks: Sequence[Masks], searches: Sequence[State], total: int) -> dict[str, Tensor]:
    match op.rule:
        case "intersection":
            return algebra.intersection(masks)
        case "union":
            return algebra.union(masks)
        case "at-least":
            assert op.least is not None
            return algebra.at_least(masks, op.least)
        case "weighted":
            return algebra.weighted_vote(masks, op.weights)
        case "most-voted":
            assert op.sparsity is not None
            return _most_voted(op.sparsity, op.seed, masks, searches, total)
    raise AssertionError(op.rule)


def _most_voted(
    sparsity: float, seed: int, masks: Sequence[Masks], searches: Sequence[State], total: int
) -> dict[str, Tensor]:
    """As many weights as the sparsity of `total` leaves; tensors that no search pruned, protected ones, stay whole."""
    polled = algebra.poll(masks)
    shapes = {name: tuple(mask.shape) for name, mask in masks[0].items()}
    sizes = {name: mask.numel() for name, mask in masks[0].items()}
    ranked = {name: shape for name, shape in shapes.items() if polled.fewest[name] < sizes[name]}
    keep = algebra.keep_for(ranked, sparsity, total=total)
    keep |= {(name,): size for name, size in sizes.items() if name not in ranked}
    return algebra.most_voted(polled, keep, seed, _standing(searches, *keep))


def _standing(searches: Sequence[State], *groups: tuple[str, ...]) -> dict[str, Tensor]:
    """The sums of each weight's ranks in the searches, by the magnitude that it ended with; dropped ones come last."""
    ranks = [
        votes.standing({name: state.weights[name].abs() for g in groups for name in g}, groups) for state in searches
    ]
    return reduce(votes.merge_standing, ranks)


def _kept(state: State, sizes: Mapping[str, int]) -> dict[str, int]:
    return {name: int(state.masks[name].sum()) if name in state.masks else size for name, size in sizes.items()}


def _refuse_fewer(where: str, now: int, left: int) -> None:
    if left > now:
        raise StageFailed(f"pruning cannot add weights: {where} keeps {now}, and {left} are to be left as elsewhere")


def _part(op: Prune, kept: int, size: int) -> int:
    """How many of `size` weights stay after this part of the way to `kept`, every step at the same rate."""
    left: float = size * (kept / size) ** op.part
    return round(left)
