"""The ticket ops run on their parents' states: combine, control, transfer, and pruning as in a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.errors import StageFailed
from orchestrator.ops import Combine, Control, Prune, Transfer
from orchestrator.state import State
from orchestrator.tasks.info import matches
from orchestrator.tickets import algebra
from orchestrator.tickets.packed import Masks
from orchestrator.tickets.transfer import transfer
from orchestrator.tickets.verified import control


def combine(op: Combine, parents: Sequence[State], prunable: Sequence[str]) -> State:
    """The ancestor's weights, the last parent's, under one mask of the searches', the other parents'.

    Raises:
        StageFailed: the ancestor has masks of its own, or the wanted sparsity cannot be reached.
    """
    *searches, ancestor = parents
    if ancestor.masks:
        raise StageFailed(f"searches start from dense weights; their ancestor has a mask of {min(ancestor.masks)!r}")
    masks = [{name: state.masks[name] for name in prunable if name in state.masks} for state in searches]
    votes = algebra.poll(masks, op.weights or None)
    repaired = algebra.repair(_rule(op, masks), votes, op.seed)
    remarks = {"repaired": repaired.added} if repaired.added else {}
    return replace(ancestor, masks=repaired.masks, remarks=remarks).masked()


def _rule(op: Combine, masks: Sequence[Masks]) -> Masks:
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
            votes = algebra.poll(masks)
            keep = algebra.keep_for({name: tuple(mask.shape) for name, mask in masks[0].items()}, op.sparsity)
            return algebra.most_voted(votes, keep, op.seed)
    raise AssertionError(op.rule)


def controlled(op: Control, parents: Sequence[State]) -> State:
    """The control of the first parent, a ticket, over the second, its ancestor; verified."""
    ticket, ancestor, *other = parents
    return control(op.kind, ticket, ancestor, seed=op.seed, other=other[0] if other else None)


def transferred(op: Transfer, parents: Sequence[State]) -> State:
    """The first parent, a ticket, on the second, another model's init; what was taken over is remarked."""
    ticket, other = parents
    leave = {name for name in other.weights for pattern in op.leave if matches(pattern, name.removesuffix(".weight"))}
    made = transfer(ticket, other, leave)
    return replace(made.state, remarks={"taken": list(made.taken), "dense": list(made.dense)})


def like_reference(op: Prune, reference: State, sizes: dict[str, int]) -> Prune:
    """The op with how much said in numbers: those of the reference's masks, or `part` of the way there.

    Args:
        op: with `like`.
        reference: the state whose masks say how much.
        sizes: how many weights each prunable tensor has.
    """
    kept = {name: int(reference.masks[name].sum()) if name in reference.masks else size for name, size in sizes.items()}
    total = sum(sizes.values())
    if op.like == "layers":
        targets = tuple((name, 1 - _part(op, kept[name], size) / size) for name, size in sizes.items())
        left = sum(_part(op, kept[name], size) for name, size in sizes.items())
        return replace(
            op, like="", part=1.0, scope="layer", allocation="given", sparsity=1 - left / total, targets=targets
        )
    return replace(op, like="", part=1.0, sparsity=1 - _part(op, sum(kept.values()), total) / total)


def _part(op: Prune, kept: int, size: int) -> int:
    """How many of `size` weights stay after this part of the way to `kept`, every step at the same rate."""
    left: float = size * (kept / size) ** op.part
    return round(left)
