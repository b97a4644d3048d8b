"""What makes a weight worth keeping: one function per criterion, from tensors to a score of the same shape.

Higher is kept. What a criterion needs beside the weight it takes by that name and says in `needs`:

    gradient    of the mean training loss at the weight, over `examples` examples of the training split
    generator   a seeded `torch.Generator`, for scores drawn at random

Further keyword arguments are the criterion's own parameters, which a study sets in `[space.criteria.NAME]`. Criteria
whose score is a magnitude of the weight (`magnitude_like`) may be cut at a threshold.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError
from orchestrator.registry import Entry, Registry

if TYPE_CHECKING:  # the driver reads this registry, and has no use for torch
    from torch import Generator, Tensor

CRITERIA: Registry[Callable[..., Tensor]] = Registry("criterion")
criterion = CRITERIA.register

NEEDS = ("gradient", "generator")
EXAMPLES = 1024
"""How many training examples a gradient is taken over, where the study does not say."""


@criterion("magnitude", magnitude_like=True)
def magnitude(weight: Tensor) -> Tensor:
    """Absolute value of the weight (Han et al., 2015)."""
    return weight.abs()


@criterion("random", needs="generator")
def random(weight: Tensor, generator: Generator) -> Tensor:
    """A uniform draw: the baseline that every criterion has to beat."""
    # Single precision has so few values that large tensors tie, and ties fall by magnitude.
    return weight.new_empty(weight.shape).double().uniform_(generator=generator)


@criterion("taylor", needs="gradient")
def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """First-order change in loss if each weight were removed (Molchanov et al., 2017)."""
    return (weight * gradient).abs()


def needs(entry: Entry[Callable[..., Tensor]]) -> tuple[str, ...]:
    """What the criterion takes beside the weight, from its registration or, for a user's function, its signature."""
    if "needs" in entry.facts:
        said = entry.facts["needs"]
        return (said,) if isinstance(said, str) else tuple(said)
    names = inspect.signature(entry.function).parameters
    return tuple(name for name in NEEDS if name in names)


def parameters(entry: Entry[Callable[..., Tensor]]) -> dict[str, Any]:
    """The criterion's own parameters with their defaults."""
    own = {
        p.name: p.default
        for p in inspect.signature(entry.function).parameters.values()
        if p.name not in ("weight", *NEEDS) and p.default is not inspect.Parameter.empty
    }
    return own | ({"examples": EXAMPLES} if "gradient" in needs(entry) else {})


def check_parameters(name: str, given: dict[str, Any]) -> None:
    """Refuse a parameter that the criterion does not have.

    Raises:
        InputError: naming the parameter and the legal ones.
    """
    legal = parameters(CRITERIA[name])
    for parameter in given:
        if parameter not in legal:
            known = ", ".join(sorted(legal)) or "none"
            raise InputError(f"criterion {name!r} has no parameter {parameter!r}; legal: {known}")
