"""The verbs of a plan as frozen, plain data, and the content address of what they yield.

An op says everything that decides its result, and nothing else: no workers, no store, no logging. Positions are
counted in optimizer steps since init.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from orchestrator.canonical import canonical, digest

SHRUNK = " shrunk"
"""Ends the arithmetic of training that goes without the units that are removed."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. `horizon`, `warmup` and `milestones` are in steps; a constant schedule has no horizon."""

    optimizer: str
    lr: float
    batch_size: int
    lr_schedule: str = "constant"
    horizon: int = 0
    warmup: int = 0
    lr_final_fraction: float = 0.0
    milestones: tuple[int, ...] = ()
    lr_step_factor: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    arithmetic: str = "cpu float32"
    """Device type and dtype, and `shrunk` where removed units are cut away while training. One thread on a CPU."""
    penalty: str = ""
    penalty_strength: float = 0.0
    gather: tuple[str, ...] = ()
    """Statistics that are gathered at every step, for criteria that need them."""


@dataclass(frozen=True, kw_only=True)
class Init:
    """The model as built under `seed`; `fresh` asks for the untrained builder of a model that comes trained."""

    version: ClassVar[int] = 1
    seed: int
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train on from the parent until position `to`. The parent is the state where the *run* of training starts,
    wherever the run is cut on the way. `fresh_optimizer` drops the parent's optimizer state."""

    version: ClassVar[int] = 1
    recipe: Recipe
    order_seed: int
    to: int
    fresh_optimizer: bool = False
    share: float = 1.0
    """Fraction of the training data, drawn under `share_seed`; as many steps as with all of them."""
    share_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Mask more weights. Parents: the state to prune and, for criteria that need data, the statistics gathered of it.

    Exactly one of `rate` (of what is left), `sparsity` (masked fraction of all prunable weights, afterwards),
    `unit_sparsity` (fraction of the units that the structure is made of), `threshold`, `flops_budget` and
    `params_budget` (fraction of the dense model's that stays) says how much. N:M patterns say it themselves.

    `factors` lists (tensor name, factor on the rate) for tensors that are not pruned like the rest; factor 0 protects.
    `seed` and `round` are given for criteria that draw at random, and only for these.
    """

    version: ClassVar[int] = 1
    criterion: str
    scope: str
    structure: str = "weight"
    norm: str = ""
    """How scores of weights become one of a unit; empty: as the criterion has it."""
    allocation: str = "uniform"
    rate: float | None = None
    sparsity: float | None = None
    unit_sparsity: float | None = None
    flops_budget: float | None = None
    params_budget: float | None = None
    threshold: float | None = None
    threshold_unit: Literal["absolute", "std"] = "absolute"
    parameters: tuple[tuple[str, Any], ...] = ()
    factors: tuple[tuple[str, float], ...] = ()
    targets: tuple[tuple[str, float], ...] = ()
    """Per-tensor rates or sparsities where they are given one by one (allocation "given")."""
    like: Literal["", "overall", "layers"] = ""
    """How much is said by a reference, the last parent: its count overall, or layer by layer."""
    part: float = 1.0
    """With `like`: the part of the way from dense to the reference, in equal rates, that this pruning reaches."""
    floor: int = 0
    """So many weights, or units, stay in every layer at least."""
    round_to: int = 1
    """Kept units of a layer are filled up to a multiple of this."""
    seed: int | None = None
    round: int | None = None
    fold: bool = False
    """What removed units give without their weights moves into the biases of what reads them."""
    transposed: tuple[tuple[str, int], ...] = ()
    """(tensor name, groups) of transposed convolutions, whose weights lie inputs first."""
    code: str = ""
    """Digest of the source of a user's own criterion."""


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Statistics of the training data at the parent's weights, for criteria that need them.

    `what` names the statistics; `examples` training examples are drawn under (seed, round).
    """

    version: ClassVar[int] = 1
    what: tuple[str, ...]
    examples: int
    seed: int
    round: int
    parameters: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Regrow:
    """Drop a fraction of each layer's kept weights and grow as many others; "all" releases the masks.

    Parents: the state and, for `by` that need them, its statistics. Grown weights start at zero.
    """

    version: ClassVar[int] = 1
    by: str
    fraction: float
    factors: tuple[tuple[str, float], ...] = ()
    seed: int | None = None
    round: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recalibrate:
    """Running statistics of every batch normalisation, computed anew over `examples` training examples."""

    version: ClassVar[int] = 1
    examples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Combine:
    """One mask of several. Parents: the pruned states of the searches, sorted, and the ancestor whose weights stay.

    `rule` is intersection, union, at-least (`least` of the searches), weighted (at least half of `weights`) or
    most-voted (as many weights as a `sparsity` leaves). A layer that would be cut off is repaired.
    """

    version: ClassVar[int] = 1
    rule: str
    least: int | None = None
    weights: tuple[float, ...] = ()
    sparsity: float | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Control:
    """What a ticket has to beat, at the ticket's own counts.

    Parents: the ticket, the ancestor that it starts from, dense, and another init for kinds that need one. `seed` is
    that of the draw or, with another init, that init's.
    """

    version: ClassVar[int] = 1
    kind: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Given:
    """A ticket that came as a file: its masks over the kept weights that it starts from. It has no parents."""

    version: ClassVar[int] = 1
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A ticket on another model. Parents: the ticket, over its starting weights, and the other model's init.

    The ticket's mask and weights where name and shape agree; the rest is the other init's, dense. A dense state in the
    ticket's place gives its weights alone.
    """

    version: ClassVar[int] = 1
    leave: tuple[str, ...] = ()
    """Patterns of tensors that are not taken over even where they would fit."""


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """Parents: a pruned state and, for `what = "weights"`, its ancestor.

    weights: all parameters, buffers, optimizer state and position of the ancestor, under the pruned state's masks.
    lr: weights and buffers stay, the optimizer state goes, the position becomes `to`.
    """

    version: ClassVar[int] = 1
    what: Literal["weights", "lr"]
    to: int | None = None


Op = Init | Given | Train | Prune | Gather | Regrow | Recalibrate | Combine | Control | Transfer | Rewind


def key(op: Op, parents: Sequence[str], task_digest: str) -> str:
    """The content address of the state that `op` yields: 64 hex digits."""
    return digest(
        {
            "op": type(op).__name__,
            "version": op.version,
            "parameters": canonical(op),
            "parents": list(parents),
            "task": task_digest,
        }
    )


def to_plain(op: Op) -> dict[str, Any]:
    """`op` as JSON-ready data, for messages to workers and for lineages."""
    return {"op": type(op).__name__, **canonical(op)}
