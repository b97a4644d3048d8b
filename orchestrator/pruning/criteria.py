"""What makes a weight worth keeping: one function per criterion, from tensors to a score of the weight's shape.

Higher is kept. What a criterion needs beside the weight it takes by that name, and says in `needs`. From `examples`
examples of the training split, at the masked weights and in evaluation mode:

    gradient            of the mean training loss at the weight; the weight's shape
    hessian_diagonal    of the mean training loss, estimated with `probes` random probes; the weight's shape
    hessian_gradient    Hessian times gradient, both of the mean training loss; the weight's shape
    hessian_blocks      the Hessian over the weight's n entries in row-major order, generalised Gauss-Newton: whole,
                        (1, n, n), up to `exact_up_to` entries, else in blocks of b = `block` consecutive entries,
                        (ceil(n / b), b, b), of which the last is filled up with the identity
    input_norm          Euclidean norm of each input feature over examples and places; broadcasts over the weight
    input_gram          mean of x·xᵀ over examples and places: (d, d) for a weight of d entries a row, or (groups, d, d)
                        where equal groups of rows read different inputs
    activation          mean absolute output of each row of the weight: (rows,)

From the model alone:

    synaptic_flow       ∂R/∂|w| of SynFlow's R, the summed output of the network of absolute weights on an input of ones
    batchnorm_scale     γ of the BatchNorm that reads the layer's output: (rows,)

Gathered while training, or drawn:

    movement            Σ −g·w over the steps of training; the weight's shape
    generator           a seeded `torch.Generator`

A transposed convolution's weight comes as a plain one's, (out, in / groups, …), and so does all that has its shape; but
where blocks of the Hessian are needed it comes as it lies.

Further keyword arguments are the criterion's own parameters, which a study sets in `[space.criteria.NAME]`, beside
those of what it needs. What is registered with a criterion: `norm`, how the scores of single weights become one of a
unit by default; `reads`, where a unit is scored over the weights that read it, not those that make it;
`magnitude_like`, where the score is a size of the weight and may be cut at a threshold; `before_training`, where it is
meant for untrained networks; `paper`; and `compensate` or `solve`, a function that moves the kept weights, called as
`solvers.py` says with all that the criterion is called with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import InputError
from orchestrator.registry import Entry, Registry

if TYPE_CHECKING:  # the driver reads this registry, and has no use for torch
    from torch import Generator, Tensor

CRITERIA: Registry[Callable[..., Tensor]] = Registry("criterion")
criterion = CRITERIA.register

EXAMPLES = 1024
"""How many training examples a statistic is taken over by default, where it takes no second derivatives."""

FROM_DATA: dict[str, dict[str, int]] = {
    "gradient": {"examples": EXAMPLES},
    "hessian_diagonal": {"examples": 256, "probes": 128},
    "hessian_gradient": {"examples": 256},
    "hessian_blocks": {"examples": 256, "exact_up_to": 2048, "block": 64},
    "input_norm": {"examples": EXAMPLES},
    "input_gram": {"examples": EXAMPLES},
    "activation": {"examples": EXAMPLES},
}
"""What is taken from the training data, with the parameters it brings to a criterion that needs it, and defaults."""
FROM_STATE = ("synaptic_flow", "batchnorm_scale")
"""What follows from the model and its weights."""
WHILE_TRAINING = ("movement",)
"""What is gathered in the course of training."""
LARGE = ("hessian_blocks", "input_gram")
"""Many times the size of the weights: gathered again rather than stored."""
LIKE_WEIGHT = ("gradient", "hessian_diagonal", "hessian_gradient", "synaptic_flow", "movement")
"""Of the weight's own shape."""
NEEDS = (*FROM_DATA, *FROM_STATE, *WHILE_TRAINING, "generator")

DAMPING = 1e-2
"""Added to a Hessian's diagonal before it is inverted, relative to the diagonal's mean, as in SparseGPT's paper."""


def _surgeon(*args: Any, **supplied: Any) -> Tensor:
    from orchestrator.pruning.solvers import surgeon

    return surgeon(*args, **supplied)


def _sweep(*args: Any, **supplied: Any) -> tuple[Tensor, Tensor]:
    from orchestrator.pruning.solvers import sweep

    return sweep(*args, **supplied)


@criterion("magnitude", norm="l2", magnitude_like=True, paper="Han et al., 2015")
def magnitude(weight: Tensor) -> Tensor:
    """Absolute value of the weight (Han et al., 2015)."""
    return weight.abs()


@criterion("random", needs="generator", norm="first")
def random(weight: Tensor, generator: Generator) -> Tensor:
    """A uniform draw: the baseline that every criterion has to beat."""
    # Single precision has so few values that large tensors tie, and ties fall by magnitude.
    return weight.new_empty(weight.shape).double().uniform_(generator=generator)


@criterion("gradient", needs="gradient", norm="l2", paper="Blalock et al., 2020")
def gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """Absolute gradient of the loss at the weight (Blalock et al., 2020)."""
    return gradient.abs()


@criterion("taylor", needs="gradient", norm="sum", paper="Molchanov et al., 2017")
def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """First-order change in loss if each weight were removed (Molchanov et al., 2017)."""
    return (weight * gradient).abs()


@criterion("obd", needs="hessian_diagonal", norm="sum", paper="LeCun et al., 1990")
def obd(weight: Tensor, hessian_diagonal: Tensor) -> Tensor:
    """Optimal Brain Damage: second-order change in loss by the Hessian's diagonal, ½·|h|·w² (LeCun et al., 1990)."""
    # At a minimum h is not negative: what is below zero here is the noise of its estimate.
    return hessian_diagonal.abs() * weight.square() / 2


@criterion("obs", needs="hessian_blocks", norm="sum", compensate=_surgeon, paper="Hassibi & Stork, 1993")
def obs(weight: Tensor, hessian_blocks: Tensor, damping: float = DAMPING) -> Tensor:
    """Optimal Brain Surgeon: change in loss once the others made up for it, w² / 2[H⁻¹]_qq (Hassibi & Stork, 1993).

    An entry that is exactly zero counts as removed before: the others cannot make use of it. Double precision.
    """
    from orchestrator.pruning.solvers import inverse_diagonal

    found = inverse_diagonal(hessian_blocks, (weight != 0).reshape(-1), damping)
    return weight.double().square() / (2 * found.reshape(weight.shape))


@criterion("skeletonization", needs="gradient", norm="sum", reads=True, paper="Mozer & Smolensky, 1989")
def skeletonization(weight: Tensor, gradient: Tensor) -> Tensor:
    """Relevance −∂L/∂α of a gate α = 1 on the connection, summed for a unit's (Mozer & Smolensky, 1989)."""
    return -weight * gradient


@criterion("snip", needs="gradient", norm="sum", before_training=True, paper="Lee et al., 2019")
def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """Connection sensitivity |∂L/∂c| of a gate c = 1 on the connection (Lee et al., 2019)."""
    return (weight * gradient).abs()


@criterion("grasp", needs="hessian_gradient", norm="sum", before_training=True, paper="Wang et al., 2020")
def grasp(weight: Tensor, hessian_gradient: Tensor) -> Tensor:
    """What removal would take from the gradient's squared norm, to first order: w·(Hg) (Wang et al., 2020).

    The paper removes the highest −w·(Hg), weights whose removal makes the gradient larger; so the sign is turned here.
    """
    return weight * hessian_gradient


@criterion("synflow", needs="synaptic_flow", norm="sum", before_training=True, paper="Tanaka et al., 2020")
def synflow(weight: Tensor, synaptic_flow: Tensor) -> Tensor:
    """Synaptic flow through the weight, |w·∂R/∂w|; meant for many rounds in global scope (Tanaka et al., 2020)."""
    return (weight * synaptic_flow).abs()


@criterion("movement", needs="movement", norm="sum", paper="Sanh et al., 2020")
def movement(weight: Tensor, movement: Tensor) -> Tensor:
    """How far training moved the weight away from zero, Σ −g·w over its steps (Sanh et al., 2020)."""
    return movement


@criterion("batchnorm", needs="batchnorm_scale", norm="mean", paper="Liu et al., 2017")
def batchnorm(weight: Tensor, batchnorm_scale: Tensor) -> Tensor:
    """Absolute scale |γ| of the BatchNorm behind the layer, the same for a whole channel (Liu et al., 2017)."""
    return _over_rows(batchnorm_scale.abs(), weight)


@criterion("fpgm", norm="mean", paper="He et al., 2019")
def fpgm(weight: Tensor) -> Tensor:
    """Summed distance of a filter to the layer's others: the most replaceable go first (He et al., 2019)."""
    from torch import cdist

    rows = weight.double().reshape(len(weight), -1)
    return _over_rows(cdist(rows, rows).sum(dim=1), weight)


@criterion("lamp", norm="sum", paper="Lee et al., 2021")
def lamp(weight: Tensor) -> Tensor:
    """w² over the sum of the layer's squares that are as large; meant for global scope (Lee et al., 2021).

    Equal weights get equal scores, each counting the other; a zero scores zero. Double precision.
    """
    from torch import searchsorted

    squares = weight.double().square().reshape(-1)
    ascending = squares.sort().values
    at_least = ascending.flip(0).cumsum(0).flip(0)
    first_equal = searchsorted(ascending, squares)
    scores = (squares / at_least[first_equal]).where(squares > 0, squares)
    return scores.reshape(weight.shape)


@criterion("activation", needs="activation", norm="mean", paper="Molchanov et al., 2017")
def activation(weight: Tensor, activation: Tensor) -> Tensor:
    """Mean absolute output of the unit that the weight feeds, the same for its row (Molchanov et al., 2017)."""
    return _over_rows(activation, weight)


@criterion("wanda", needs="input_norm", norm="l2", paper="Sun et al., 2024")
def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|w| times the norm of its input over the data; meant for row scope (Sun et al., 2024).

    A convolution's input is that which the weight itself sees: its channel at its place in the kernel.
    """
    return weight.abs() * input_norm


@criterion("sparsegpt", needs="input_gram", norm="sum", solve=_sweep, paper="Frantar & Alistarh, 2023")
def sparsegpt(weight: Tensor, input_gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Error in the layer's output once the row made up for it, w² / [H⁻¹]_jj (Frantar & Alistarh, 2023).

    H is the damped `input_gram`. Double precision.
    """
    from orchestrator.pruning.solvers import output_errors

    return output_errors(weight, input_gram, damping)


def needs(entry: Entry[Callable[..., Tensor]]) -> tuple[str, ...]:
    """What the criterion takes beside the weight, from its registration or, for a user's function, its signature."""
    if "needs" in entry.facts:
        said = entry.facts["needs"]
        return (said,) if isinstance(said, str) else tuple(said)
    names = inspect.signature(entry.function).parameters
    return tuple(name for name in NEEDS if name in names)


def scored_roles(criterion: str, structure: str) -> tuple[Literal["makes", "reads"], ...]:
    """Over which of its weights a unit is scored: those that make it, those that read it, or both."""
    facts = CRITERIA[criterion].facts
    if facts.get("reads"):
        return ("reads",)
    return ("makes", "reads") if structure == "channel" and not of_rows(criterion) else ("makes",)


def of_rows(criterion: str) -> bool:
    """Whether the criterion scores whole rows: what it says of a row that reads a unit is not said of the unit."""
    return bool(CRITERIA[criterion].facts.get("norm") == "mean")


def parameters(entry: Entry[Callable[..., Tensor]]) -> dict[str, Any]:
    """The criterion's own parameters and those of what it needs, with their defaults."""
    own = {
        p.name: p.default
        for p in inspect.signature(entry.function).parameters.values()
        if p.name not in ("weight", *NEEDS) and p.default is not inspect.Parameter.empty
    }
    return own | gathering(entry)


def gathering(entry: Entry[Callable[..., Tensor]]) -> dict[str, int]:
    """Those of `parameters` that say how its needs are taken from the data; the function itself is not handed them.

    Where two needs differ in a default the smaller holds.
    """
    merged: dict[str, int] = {}
    for need in needs(entry):
        for name, default in FROM_DATA.get(need, {}).items():
            merged[name] = min(default, merged.get(name, default))
    return merged


def check_parameters(name: str, given: dict[str, Any]) -> None:
    """Refuse a parameter that the criterion does not have, or a value out of range.

    Raises:
        InputError: naming the parameter and the legal ones.
    """
    entry = CRITERIA[name]
    legal = parameters(entry)
    for parameter, value in given.items():
        if parameter not in legal:
            known = ", ".join(sorted(legal)) or "none"
            raise InputError(f"criterion {name!r} has no parameter {parameter!r}; legal: {known}")
        number = isinstance(value, (int, float))
        if parameter in gathering(entry) and number and value < 1:
            raise InputError(f"criteria.{name}.{parameter} = {value!r} must be 1 or more")
        if parameter == "damping" and name in CRITERIA and number and not value >= 0:
            raise InputError(f"criteria.{name}.damping = {value!r} must be 0 or more")


def check_signature(name: str, function: Callable[..., Any]) -> None:
    """Refuse a user's function that could not be called as a criterion.

    Raises:
        InputError: it does not take the weight first, or needs something that nobody can hand it; names the
            parameter and the legal ones.
    """
    try:
        taken = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise InputError(f"criterion {name!r} does not say which parameters it takes: write it as a `def`") from error
    first = next(iter(taken.values()), None)
    if first is None or first.name != "weight" or first.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise InputError(f"criterion {name!r} must take the tensor to score as its first parameter, called `weight`")
    for parameter in taken.values():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        if parameter.name not in ("weight", *NEEDS) and parameter.default is inspect.Parameter.empty:
            legal = ", ".join(("weight", *NEEDS))
            wanted = f"criterion {name!r} has a parameter {parameter.name!r} without a default, which nobody gives it"
            raise InputError(f"{wanted}; legal without one: {legal}")


def _over_rows(values: Tensor, weight: Tensor) -> Tensor:
    """Values of shape (rows,), each for its whole row of the weight."""
    return values.reshape(-1, *[1] * (weight.dim() - 1)).expand(weight.shape).contiguous()
