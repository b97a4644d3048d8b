"""Masks, exact to the single weight. True = kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from orchestrator.errors import NotFinite
from orchestrator.seeds import derive


def keep_top(scores: Tensor, keep: int, ties: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    """Exactly `keep` True entries, at the highest scores.

    Ties fall by magnitude, then by hash; a rule by position would cut whole rows or layers first.

    Args:
        scores: shape (n,); higher is kept.
        keep: how many of the n stay.
        ties: gives what decides between equal scores, magnitudes and then hashes (int64), each of shape (n,). Asked for
            only where equal scores must be told apart.

    Raises:
        NotFinite: a score is NaN or infinite, so that there is no order.
    """
    count = scores.numel()
    assert 0 <= keep <= count, f"cannot keep {keep} of {count}"
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).sum())
        raise NotFinite(f"{bad} of {count} scores are NaN or infinite")
    if keep == 0:
        return torch.zeros(count, dtype=torch.bool)
    threshold = torch.kthvalue(scores, count - keep + 1).values
    kept = scores > threshold
    tied = torch.nonzero(scores == threshold).squeeze(1)
    wanted = keep - int(kept.sum())
    if wanted < tied.numel():
        magnitudes, hashes = ties()
        order = np.lexsort((hashes[tied].numpy(), -magnitudes[tied].double().numpy()))
        tied = tied[torch.from_numpy(order[:wanted].copy())]
    kept[tied] = True
    return kept


def index_hashes(name: str, count: int) -> Tensor:
    """A hash for each entry of the tensor called `name`: shape (count,), int64, the same on every worker."""
    with np.errstate(over="ignore"):  # splitmix64 (Steele et al., 2014) wraps on purpose
        z = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive(0, "ties", name))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy(z.view(np.int64))


def sparsity(masks: Mapping[str, Tensor], total: int) -> float:
    """The masked fraction of `total` prunable weights; tensors without a mask are dense."""
    masked = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
    return masked / total
