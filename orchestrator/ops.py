"""The verbs of a plan as frozen, plain data, and the content address of what they yield.

An op says everything that decides its result, and nothing else: no workers, no store, no logging. Positions are
counted in optimizer steps since init.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from orchestrator.canonical import canonical, digest


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
    """Device type and dtype. One thread on a CPU, always."""


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


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Mask more weights: exactly one of `rate` (of what is left), `sparsity` (overall, afterwards) and `threshold`.

    `factors` lists (tensor name, factor on the rate) for tensors that are not pruned like the rest; factor 0 protects.
    `seed` and `round` are given for criteria that draw at random or from data, and only for these.
    """

    version: ClassVar[int] = 1
    criterion: str
    scope: str
    structure: str = "weight"
    allocation: str = "uniform"
    rate: float | None = None
    sparsity: float | None = None
    threshold: float | None = None
    threshold_unit: Literal["absolute", "std"] = "absolute"
    parameters: tuple[tuple[str, Any], ...] = ()
    factors: tuple[tuple[str, float], ...] = ()
    targets: tuple[tuple[str, float], ...] = ()
    """Per-tensor rates or sparsities where they are given one by one (allocation "given")."""
    seed: int | None = None
    round: int | None = None
    code: str = ""
    """Digest of the source of a user's own criterion."""


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """Parents: a pruned state and, for `what = "weights"`, its ancestor.

    weights: all parameters, buffers, optimizer state and position of the ancestor, under the pruned state's masks.
    lr: weights and buffers stay, the optimizer state goes, the position becomes `to`.
    """

    version: ClassVar[int] = 1
    what: Literal["weights", "lr"]
    to: int | None = None


Op = Init | Train | Prune | Rewind


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
