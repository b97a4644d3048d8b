"""Structure that nobody asked for: empty rows and columns, neighbours kept together, paths that lead nowhere.

Each count stands beside what a random mask with as many kept weights has. Inputs that are constant in training are left
out first (`varying`): a pruner empties their columns because they carry nothing, which is no structure it has found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import exp, lgamma, prod, sqrt

import torch
from torch import Tensor

from orchestrator.errors import PlanError
from orchestrator.seeds import derive

LINEAR_GROUPS = {"rows": (0,), "columns": (1,)}
CONVOLUTION_GROUPS = {"filters": (0,), "channels": (1,), "kernels": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Found:
    """A figure of a mask beside that of count-matched random masks.

    Args:
        value: of the mask.
        chance: expected of a random mask that keeps as many weights of the layer.
        chance_std: its standard deviation.
    """

    value: float
    chance: float
    chance_std: float

    @property
    def z(self) -> float:
        """(value - chance) / chance_std; NaN where chance has no freedom."""
        return (self.value - self.chance) / self.chance_std if self.chance_std > 0 else float("nan")


@dataclass(frozen=True, kw_only=True)
class EmptyAndFull:
    """The shares, 0 to 1, of one kind of group that a mask leaves without a kept weight, or without a masked one.

    Args:
        groups: how many there are.
        empty: the share with nothing kept.
        full: the share with everything kept.
    """

    groups: int
    empty: Found
    full: Found


def empty_and_full(mask: Tensor) -> dict[str, EmptyAndFull]:
    """Rows and columns of a matrix; filters, channels and kernels of a convolution, by these names.

    Chance is exact: the mean and variance of such shares under a uniform draw of as many weights.

    Args:
        mask: bool, of shape (outputs, inputs) or (filters, channels, …).

    Raises:
        PlanError: the mask has fewer than two dimensions.
    """
    if mask.dim() < 2:
        raise PlanError(f"a mask of shape {tuple(mask.shape)} has no rows and columns; legal: two dimensions or more")
    kinds = LINEAR_GROUPS if mask.dim() == 2 else CONVOLUTION_GROUPS
    return {kind: _shares(mask, dims) for kind, dims in kinds.items()}


def varying(mask: Tensor, constant: Tensor) -> Tensor:
    """The mask without the weights that read constant inputs.

    Args:
        mask: of shape (outputs, inputs, …).
        constant: bool of shape (inputs,).
    """
    if constant.shape != mask.shape[1:2]:
        raise PlanError(f"{constant.numel()} inputs are told of a mask of shape {tuple(mask.shape)}; legal: one each")
    return mask[:, ~constant]


def adjacent_pairs(
    mask: Tensor, geometry: Sequence[int], constant: Tensor | None = None, *, within: str = "layer"
) -> Found:
    """How many pairs of neighbouring inputs one unit keeps both of, over all units (Greydanus & Kobak, 2020).

    Neighbours lie side by side in a row of inputs, or beside or above each other in an image; pairs with a constant
    input are not counted. Chance is exact: mean and variance under a uniform draw of as many weights in the layer or,
    for the stricter question whether more than the units' sizes is at work, in each unit.

    Args:
        mask: of a first layer, bool of shape (units, inputs).
        geometry: the shape of the inputs, (width,), (height, width) or (channels, height, width), in the order in which
            they are flattened.
        constant: which inputs are constant in training, bool of shape (inputs,).
        within: "layer" or "row".

    Raises:
        PlanError: the geometry is not that of the inputs.
    """
    if mask.dim() != 2 or not 1 <= len(geometry) <= 3 or prod(geometry) != mask.shape[1]:
        shapes = f"a mask of shape {tuple(mask.shape)} over inputs of shape {tuple(geometry)}"
        raise PlanError(f"{shapes}; legal: (units, inputs) over (width,), (height, width) or (channels, height, width)")
    if within not in ("layer", "row"):
        raise PlanError(f"masks are drawn within {within!r}; legal: 'layer', 'row'")
    usable = torch.ones(mask.shape[1], dtype=torch.bool) if constant is None else ~constant
    first, second = _neighbours(geometry, usable)
    kept = mask & usable
    found = int((kept[:, first] & kept[:, second]).sum())
    degree = torch.bincount(torch.cat([first, second]), minlength=mask.shape[1])
    pairs, touching = first.numel(), int((degree * (degree - 1) // 2).sum())
    rows, inputs = mask.shape[0], int(usable.sum())
    if within == "layer":
        moments = [_pair_moments(int(kept.sum()), rows * inputs, rows * pairs, rows * touching)]
    else:
        moments = [_pair_moments(count, inputs, pairs, touching) for count in kept.sum(dim=1).tolist()]
    mean, variance = sum(m for m, _ in moments), sum(v for _, v in moments)
    return Found(value=found, chance=float(mean), chance_std=sqrt(variance))


def by_permutation(mask: Tensor, figure: Callable[[Tensor], float], draws: int, seed: int) -> Found:
    """Any figure of a mask beside that of masks with the same kept weights shuffled; it checks the exact ones here.

    Args:
        mask: bool; leave constant inputs out beforehand.
        figure: from a mask of that shape to a number.
        draws: how many masks are drawn.
        seed: of the draws.

    Raises:
        PlanError: fewer than 2 draws.
    """
    if draws < 2:
        raise PlanError(f"{draws} permutations; legal: 2 and more")
    generator = torch.Generator().manual_seed(derive(seed, "emergence"))
    flat = mask.reshape(-1)
    drawn = [figure(flat[torch.randperm(flat.numel(), generator=generator)].reshape(mask.shape)) for _ in range(draws)]
    values = torch.tensor(drawn, dtype=torch.float64)
    return Found(value=figure(mask), chance=float(values.mean()), chance_std=float(values.std()))


def on_a_path(masks: Mapping[str, Tensor], constant: Tensor | None = None) -> dict[str, Tensor]:
    """The masks without the kept weights that lie on no path from input to output (2007.04091, appendix C).

    The sparsity of the result is the effective one. A path goes through kept weights alone: what a bias adds to a unit
    without inputs is not counted, nor which positions a kernel's padding cuts away.

    Args:
        masks: of a chain of linear and ungrouped convolution layers, in the order in which the signal passes them.
            Where a layer's inputs are a multiple of the outputs before, the signal was flattened between, channel by
            channel.
        constant: which inputs of the first layer are constant in training, bool of shape (inputs,); they start no path.

    Raises:
        PlanError: a layer's inputs are no multiple of the outputs before; the message names it.
    """
    folds = _folds(masks)
    reached = None if constant is None else ~constant
    sources: dict[str, Tensor] = {}
    for name, mask in masks.items():
        links = _links(mask)
        if reached is None:
            reached = torch.ones(links.shape[1], dtype=torch.bool)
        sources[name] = reached.repeat_interleave(folds[name])
        reached = (links & sources[name]).any(dim=1)
    result: dict[str, Tensor] = {}
    wanted: Tensor | None = None
    for name in reversed(list(masks)):
        mask, links = masks[name], _links(masks[name])
        targets = torch.ones(links.shape[0], dtype=torch.bool) if wanted is None else wanted
        alive = targets[:, None] & sources[name][None, :]
        result[name] = mask & alive.reshape(*alive.shape, *[1] * (mask.dim() - 2))
        wanted = (links & targets[:, None]).any(dim=0).reshape(-1, folds[name]).any(dim=1)
    return {name: result[name] for name in masks}


def _shares(mask: Tensor, dims: tuple[int, ...]) -> EmptyAndFull:
    groups = prod(mask.shape[dim] for dim in dims)
    table = mask.movedim(dims, tuple(range(len(dims)))).reshape(groups, -1)
    size, kept = table.numel(), int(table.sum())
    return EmptyAndFull(
        groups=groups,
        empty=_all_of(~table, size - kept),
        full=_all_of(table, kept),
    )


def _all_of(table: Tensor, marked: int) -> Found:
    """The share of rows that are marked throughout, beside that of as many marks in a uniform draw."""
    groups, width = table.shape
    if not table.numel():
        return Found(value=float("nan"), chance=float("nan"), chance_std=float("nan"))
    one = _all_marked(width, marked, table.numel())
    two = _all_marked(2 * width, marked, table.numel()) if groups > 1 else 0.0
    variance = (one * (1 - one) + (groups - 1) * (two - one * one)) / groups
    return Found(value=float(table.all(dim=1).double().mean()), chance=one, chance_std=sqrt(max(0.0, variance)))


def _all_marked(chosen: int, marked: int, size: int) -> float:
    """The chance that `chosen` places are all among `marked` of `size`."""
    if chosen > marked:
        return 0.0
    return exp(lgamma(marked + 1) - lgamma(marked - chosen + 1) - lgamma(size + 1) + lgamma(size - chosen + 1))


def _neighbours(geometry: Sequence[int], usable: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of neighbours that are both usable, as two index tensors; channels are no neighbours."""
    places = torch.arange(prod(geometry)).reshape(tuple(geometry))
    pairs = []
    for dim in range(max(0, len(geometry) - 2), len(geometry)):
        length = geometry[dim]
        ends = places.narrow(dim, 0, length - 1), places.narrow(dim, 1, length - 1)
        pairs.append(torch.stack([end.reshape(-1) for end in ends]))
    first, second = torch.cat(pairs, dim=1)
    both = usable[first] & usable[second]
    return first[both], second[both]


def _pair_moments(kept: int, size: int, pairs: int, touching: int) -> tuple[Fraction, Fraction]:
    """Mean and variance of the kept ones of `pairs`, of which `touching` pairs of pairs share a place."""
    two, three, four = (_all_kept(chosen, kept, size) for chosen in (2, 3, 4))
    apart = pairs * (pairs - 1) // 2 - touching
    mean = pairs * two
    return mean, mean + 2 * touching * three + 2 * apart * four - mean * mean


def _all_kept(chosen: int, kept: int, size: int) -> Fraction:
    if size < chosen:
        return Fraction(0)
    return Fraction(prod(kept - i for i in range(chosen)), prod(size - i for i in range(chosen)))


def _links(mask: Tensor) -> Tensor:
    """Which outputs read which inputs: of shape (outputs, inputs)."""
    return mask if mask.dim() == 2 else mask.flatten(2).any(dim=2)


def _folds(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many inputs of each layer come from one output of the layer before."""
    folds: dict[str, int] = {}
    before: tuple[str, int] | None = None
    for name, mask in masks.items():
        if mask.dim() < 2:
            raise PlanError(f"{name!r} of shape {tuple(mask.shape)} is no layer; legal: two dimensions or more")
        outputs, inputs = mask.shape[:2]
        fold, left = divmod(inputs, before[1]) if before else (1, 0)
        if before and (left or fold < 1):
            legal = f"a multiple of the {before[1]} outputs of {before[0]!r}"
            raise PlanError(f"{name!r} does not follow in the chain: it has {inputs} inputs; legal: {legal}")
        folds[name] = fold
        before = (name, outputs)
    return folds
