"""Drop weights and grow others in their place, so that the pattern of a sparse network changes while it trains.

Each function takes what it needs beside the mask and the weight by name, and says so in `needs`:

    gradient    of the mean training loss at the masked weight, masked entries included
    generator   a seeded `torch.Generator`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.registry import Registry

if TYPE_CHECKING:  # the driver reads this registry, and has no use for torch
    from torch import Generator, Tensor

REGROW: Registry[Callable[..., Tensor]] = Registry("regrowth")
regrown = REGROW.register


@regrown("set", needs="generator")
def at_random(mask: Tensor, weight: Tensor, fraction: float, name: str, *, generator: Generator) -> Tensor:
    """Drops the smallest weights and grows as many at random (SET; Mocanu et al., 2018)."""
    # Single precision has so few values that large tensors tie.
    scores = weight.new_empty(weight.shape).double().uniform_(generator=generator)
    return _exchanged(mask, weight, fraction, name, scores)


@regrown("rigl", needs="gradient")
def by_gradient(mask: Tensor, weight: Tensor, fraction: float, name: str, *, gradient: Tensor) -> Tensor:
    """Drops the smallest weights and grows as many where the gradient is largest (RigL; Evci et al., 2020)."""
    return _exchanged(mask, weight, fraction, name, gradient.abs())


@regrown("all", needs=())
def everything(mask: Tensor, weight: Tensor, fraction: float, name: str) -> Tensor:
    """Grows every masked weight back: the decompression of AC/DC (Peste et al., 2021)."""
    return mask.new_ones(mask.shape)


def regrow(
    by: str,
    mask: Tensor,
    weight: Tensor,
    fraction: float,
    *,
    name: str = "",
    gradient: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """The mask of one tensor after regrowing; "set" and "rigl" keep exactly as many weights as before.

    Of k kept weights, floor(fraction · k + ½) of the smallest magnitude are dropped, and as many grown among all that
    are not kept then. As in both papers the ones just dropped are among these: a dropped weight that grows back is in
    both masks and keeps its value, all others start from the zero that they are masked to. SET as published drops its
    fraction of the positive and of the negative weights each; here, as in RigL, both are ranked together. Ties fall
    by magnitude, then by hash.

    Args:
        by: a name in REGROW.
        mask: True = kept. A dense tensor stays dense.
        weight: of the mask's shape, zero where masked.
        fraction: of the kept weights that is exchanged, in [0, 1]; "all" ignores it.
        name: the tensor's, for the hashes.
        gradient: of the weight's shape, where `by` needs it.
        generator: where `by` needs it.

    Raises:
        NotFinite: a kept weight, or the gradient where it decides, is NaN or infinite.
    """
    assert 0 <= fraction <= 1 and mask.shape == weight.shape, (fraction, mask.shape, weight.shape)
    entry = REGROW[by]
    given = {"gradient": gradient, "generator": generator}
    supplied = {need: given[need] for need in needs(by)}
    assert None not in supplied.values(), f"{by!r} needs {', '.join(supplied)}"
    return entry.function(mask, weight, fraction, name, **supplied)


def needs(by: str) -> tuple[str, ...]:
    """What the way to regrow called `by` takes beside mask and weight."""
    said = REGROW[by].facts["needs"]
    return (said,) if isinstance(said, str) else tuple(said)


def fraction_at(fraction: float, step: int, end: int) -> float:
    """The fraction exchanged at `step`: falls from `fraction` along half a cosine and is 0 from `end` on.

    The decay of RigL (Evci et al., 2020) and of Dettmers & Zettlemoyer (2019).
    """
    return fraction * (1 + math.cos(math.pi * step / end)) / 2 if step < end else 0.0


def _exchanged(mask: Tensor, weight: Tensor, fraction: float, name: str, scores: Tensor) -> Tensor:
    """The mask without its smallest weights, and with as many at the highest scores of those not kept then."""
    kept = int(mask.sum())
    count = math.floor(fraction * kept + 0.5)
    if not count or kept == mask.numel():
        return mask.clone()
    magnitudes = _wide(weight).detach().abs().reshape(-1)
    stays = _best(mask.reshape(-1), magnitudes, kept - count, magnitudes, name)
    grown = _best(~stays, _wide(scores).reshape(-1), count, magnitudes, name)
    after = stays | grown
    assert int(after.sum()) == kept, "regrowing changed the count"
    return after.reshape(mask.shape)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor  # halves cannot be ranked on every device


def _best(among: Tensor, scores: Tensor, keep: int, magnitudes: Tensor, name: str) -> Tensor:
    """Of the entries in `among`, the `keep` with the highest scores; all of shape (n,)."""
    from orchestrator.pruning.masks import index_hashes, keep_top

    def ties() -> tuple[Tensor, Tensor]:
        return magnitudes[among], index_hashes(name, among.numel())[among]

    best = among.clone()
    best[among] = keep_top(scores[among], keep, ties)
    return best
