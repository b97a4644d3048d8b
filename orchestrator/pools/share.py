"""What each worker takes of a cluster: a core, a share of a GPU, custom resources, and the nodes on which it may be."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import InputError

LEAST = 0.0001
"""The smallest share that Ray counts."""

_OURS = {
    "CPU": "every worker has one core",
    "GPU": "legal: --gpus-per-worker",
    "memory": "legal: a custom resource",
    "object_store_memory": "legal: a custom resource",
}
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"(?:[a-z0-9](?:[a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_WORD}")
_VALUE = re.compile(rf"(!?)(?:({_WORD})|in\(({_WORD}(?:,{_WORD})*)\))")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one worker takes."""

    gpus: float | None = None
    """The share of a GPU, or how many; None: one where the cluster has GPUs; 0 forces the CPU."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom resources, as nodes are started with them."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's label selector: what a node's label must be: VALUE, !VALUE, in(A,B) or !in(A,B)."""

    def room(self, there: Mapping[str, float], labels: Mapping[str, str]) -> int:
        """How many workers a node with these resources and labels has room for; `gpus` must be a number."""
        if not all(fits(wanted, labels.get(key)) for key, wanted in self.labels.items()):
            return 0
        room = [_times(there.get("CPU", 0), 1)]
        room += [_times(there.get(name, 0), amount) for name, amount in self.resources.items()]
        if self.gpus:
            gpus = there.get("GPU", 0)
            room.append(_times(gpus, self.gpus) if self.gpus >= 1 else int(self.gpu_shares(there)))
        return min(room)

    def gpu_shares(self, there: Mapping[str, float]) -> float:
        """How many shares of a GPU a node has, if nothing else is looked at; without an end where each is no part of
        one."""
        if not self.gpus or self.gpus >= 1:
            return math.inf
        # A worker's share lies on one GPU: what is left over of two makes no third.
        return int(there.get("GPU", 0)) * _times(1, self.gpus)

    def says(self) -> str:
        """As Ray's own messages name it: {CPU: 1, GPU: 0.25}, with the nodes that it is bound to."""
        taken = {"CPU": 1.0, **({"GPU": self.gpus} if self.gpus else {}), **self.resources}
        amounts = ", ".join(f"{name}: {amount:g}" for name, amount in taken.items())
        where = ", ".join(f"{key}={value}" for key, value in self.labels.items())
        return f"{{{amounts}}}" + (f" where {where}" if where else "")


def share(gpus_per_worker: float | None, resources: Sequence[str], label_selector: Sequence[str]) -> Share:
    """What a command line asks for: `--gpus-per-worker F`, `--resource NAME=AMOUNT`, `--label-selector KEY=VALUE`.

    Raises:
        InputError: naming the option and what would be legal.
    """
    return Share(
        gpus=None if gpus_per_worker is None else _gpus(gpus_per_worker),
        resources=_once("--resource", map(_resource, resources)),
        labels=_once("--label-selector", map(_label, label_selector)),
    )


def fits(wanted: str, label: str | None) -> bool:
    """Whether a node's label is what a selector's value asks for."""
    found = _VALUE.fullmatch(wanted)
    assert found is not None, wanted
    inverted, one, several = found.groups()
    return (label in ([one] if one else several.split(","))) != bool(inverted)


def _times(there: float, amount: float) -> int:
    """How many times an amount is there; a tenth is ten times in one."""
    return math.floor(there / amount + 1e-9)


def _once(option: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{option} names {name} twice")
        found[name] = value
    return found


def _gpus(amount: float) -> float:
    where = f"--gpus-per-worker {amount:g}"
    if not math.isfinite(amount) or (amount > 1 and not amount.is_integer()) or 0 < amount < LEAST:
        raise InputError(f"{where}: legal: a fraction of one GPU (from {LEAST:g}), a whole number, or 0 for the CPU")
    return amount


def _resource(text: str) -> tuple[str, float]:
    where = f"--resource {text}"
    name, equals, said = text.partition("=")
    if not equals or not name.strip():
        raise InputError(f"{where}: legal: NAME=AMOUNT, such as trials=1")
    if name in _OURS:
        raise InputError(f"{where}: {_OURS[name]}")
    try:
        amount = float(said)
    except ValueError:
        amount = math.nan
    if not (math.isfinite(amount) and amount >= LEAST and (amount <= 1 or amount.is_integer())):
        raise InputError(f"{where}: legal amounts: a fraction up to 1 (from {LEAST:g}), or a whole number")
    return name, amount


def _label(text: str) -> tuple[str, str]:
    where = f"--label-selector {text}"
    key, equals, value = text.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise InputError(f"{where}: legal: KEY=VALUE, such as ray.io/market-type=spot")
    if not _VALUE.fullmatch(value):
        raise InputError(f"{where}: legal values: VALUE, !VALUE, in(A,B), !in(A,B), of letters, digits and . _ -")
    return key, value
