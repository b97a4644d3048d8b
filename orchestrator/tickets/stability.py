"""Linear mode connectivity: whether training from one point ends in one valley, whatever the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from orchestrator.errors import NotFinite, PlanError

Weights = Mapping[str, Tensor]

POINTS = 30
STABLE = 0.02
"""An error barrier below it is called stable (Frankle et al., 2020)."""


@dataclass(frozen=True, kw_only=True)
class Barrier:
    """The error on the line between two networks.

    Args:
        alphas: where on the line, 0 (the first network) to 1 (the second).
        errors: there.
        barrier: the highest of them, less the mean of the two ends; never below 0.
    """

    alphas: tuple[float, ...]
    errors: tuple[float, ...]
    barrier: float

    @property
    def stable(self) -> bool:
        """Whether the barrier is below 2 % error."""
        return self.barrier < STABLE


def barrier(
    first: Weights,
    second: Weights,
    error: Callable[[dict[str, Tensor]], float],
    *,
    points: int = POINTS,
    recalibrate: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Barrier:
    """The error barrier between two networks that were trained from one (Frankle et al., 2020).

    Args:
        first: weights and buffers by name; second: of the same names, shapes and types.
        second: the other end.
        error: of weights and buffers, 0 to 1, as on the test split.
        points: evenly spaced on the line, both ends among them.
        recalibrate: gives the weights with their buffers recomputed, as batch norm's running statistics must be; at
            every point, the ends too, so that all are measured alike. Without it buffers are interpolated.

    Raises:
        PlanError: the two do not fit, or there are fewer than 2 points.
        NotFinite: an error is not finite.
    """
    if points < 2:
        raise PlanError(f"{points} points on the line; legal: 2 and more")
    alphas = tuple(np.linspace(0, 1, points).tolist())
    errors = []
    for alpha in alphas:
        weights = interpolate(first, second, alpha)
        found = float(error(weights if recalibrate is None else recalibrate(weights)))
        if not isfinite(found):
            raise NotFinite(f"the error at {alpha:g} of the line is {found}")
        errors.append(found)
    return Barrier(alphas=alphas, errors=tuple(errors), barrier=max(errors) - (errors[0] + errors[-1]) / 2)


def interpolate(first: Weights, second: Weights, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) · first + alpha · second, in double precision, then in each tensor's own type.

    Tensors of whole numbers, such as counts of batches, are the first's. At 0 and 1 the ends come out bit for bit.

    Raises:
        PlanError: the two differ in a name, a shape or a type.
    """
    if first.keys() != second.keys():
        raise PlanError(f"no line between the two networks: {min(first.keys() ^ second.keys())!r} is in only one")
    result = {}
    for name, start in first.items():
        end = second[name]
        if (start.shape, start.dtype) != (end.shape, end.dtype):
            found = f"{start.dtype} {tuple(start.shape)} in one, {end.dtype} {tuple(end.shape)} in the other"
            raise PlanError(f"no line between the two networks: {name!r} is {found}")
        if not (start.is_floating_point() or start.is_complex()):
            result[name] = start.clone()
            continue
        wide = torch.promote_types(start.dtype, torch.float64)
        result[name] = ((1 - alpha) * start.to(wide) + alpha * end.to(wide)).to(start.dtype)
    return result
