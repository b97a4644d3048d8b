"""From a Prune op and the weights to smaller masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import NotFinite, StageFailed
from orchestrator.ops import Prune
from orchestrator.pruning.allocation import Tensors, counts
from orchestrator.pruning.criteria import CRITERIA, needs
from orchestrator.pruning.masks import index_hashes, keep_top

Supply = Callable[[str], Mapping[str, Tensor]]
"""Gives what a criterion needs, by its name in `needs`, for each tensor."""


def prune(op: Prune, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], supply: Supply) -> dict[str, Tensor]:
    """The masks after `op`: every one a subset of the mask before.

    Args:
        op: what to do.
        weights: the prunable tensors in model order.
        masks: the masks so far; a tensor without one is dense.
        supply: gives gradients and generators where the criterion needs them.

    Raises:
        NotFinite: a score is NaN or infinite.
        StageFailed: the criterion returned no scores of the weight's shape, or the sparsity cannot be reached.
    """
    before = {name: masks.get(name, torch.ones(w.shape, dtype=torch.bool)) for name, w in weights.items()}
    free = [name for name in weights if dict(op.factors).get(name, 1.0) > 0]
    scores = score(op, {name: weights[name] for name in free}, supply)
    if op.threshold is not None:
        after = {name: _above(op, name, scores[name], weights[name], before[name]) for name in free}
    else:
        tensors = Tensors(
            shapes={name: tuple(w.shape) for name, w in weights.items()},
            kept={name: int(mask.sum()) for name, mask in before.items()},
        )
        after = {}
        for group, keep in counts(op, tensors).items():
            after |= _best_of_group(group, keep, scores, weights, before)
    assert all(not (mask & ~before[name]).any() for name, mask in after.items()), "a mask grew"
    return before | after


def score(op: Prune, weights: Mapping[str, Tensor], supply: Supply) -> dict[str, Tensor]:
    """The criterion's score of each tensor: a real number for each weight.

    Criteria are handed copies in single precision or better: they may write on them, and halves would tie.
    """
    entry = CRITERIA[op.criterion]
    supplied = {need: supply(need) for need in needs(entry)}
    own = {name: value for name, value in op.parameters if name != "examples" or "gradient" not in supplied}
    scores = {}
    for name, weight in weights.items():
        given = {need: _copied(values[name]) for need, values in supplied.items()}
        found = entry.function(_copied(weight), **given, **own)
        if not isinstance(found, Tensor) or found.is_complex():
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise StageFailed(f"criterion {op.criterion!r} returned {kind} for {name!r}, not a tensor of real numbers")
        if found.shape != weight.shape:
            shapes = f"{tuple(found.shape)} for a weight of shape {tuple(weight.shape)}"
            raise StageFailed(f"criterion {op.criterion!r} returned scores of shape {shapes} ({name!r})")
        found = found.detach().to("cpu")
        scores[name] = found if found.is_floating_point() else found.double()
    return scores


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _above(op: Prune, name: str, scores: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    """Kept entries with a score of at least the threshold; its std unit is that of the tensor's kept weights."""
    assert op.threshold is not None
    kept = weight[before]
    if not torch.isfinite(scores[before]).all():
        raise NotFinite(f"scores of {name!r} are NaN or infinite")
    unit = float(kept.double().std(correction=0)) if op.threshold_unit == "std" and kept.numel() else 1.0
    return before & (scores.double() >= op.threshold * unit)


def _best_of_group(
    group: tuple[str, ...],
    keep: int,
    scores: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The group's `keep` best entries among those kept before."""

    def ties() -> tuple[Tensor, Tensor]:
        magnitudes = torch.cat([weights[name][before[name]].abs() for name in group])
        return magnitudes, torch.cat([index_hashes(n, before[n].numel())[before[n].reshape(-1)] for n in group])

    kept = keep_top(torch.cat([scores[name][before[name]] for name in group]), keep, ties)
    after = {}
    for name, part in zip(group, torch.split(kept, [int(before[name].sum()) for name in group]), strict=True):
        mask = torch.zeros_like(before[name])
        mask[before[name]] = part
        after[name] = mask
    return after
