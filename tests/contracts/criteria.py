"""What every criterion promises: a finite score for each weight, from nothing but what it is handed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orchestrator.pruning.criteria import needs
from orchestrator.registry import Entry

SHAPES = ((4,), (3, 2), (2, 3, 1, 1), (1, 1))


def supplied(entry: Entry[Callable[..., Tensor]], shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """A weight of `shape`, with zeros in it, and whatever else the criterion needs."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=draw, dtype=dtype)
    weight.view(-1)[0] = 0
    has = {"gradient": torch.randn(shape, generator=draw, dtype=dtype), "generator": torch.Generator().manual_seed(2)}
    return {"weight": weight, **{need: has[need] for need in needs(entry)}}


def same_shape_and_finite(entry: Entry[Callable[..., Tensor]], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scores = entry.function(**supplied(entry, shape, dtype))
    assert scores.shape == shape
    assert torch.isfinite(scores).all()


def deterministic(entry: Entry[Callable[..., Tensor]], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    first = entry.function(**supplied(entry, shape, dtype))
    torch.manual_seed(4)
    assert torch.equal(first, entry.function(**supplied(entry, shape, dtype)))


def leaves_its_inputs_alone(entry: Entry[Callable[..., Tensor]], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = {name: value for name, value in supplied(entry, shape, dtype).items() if isinstance(value, Tensor)}
    copies = {name: value.clone() for name, value in given.items()}
    entry.function(**{**supplied(entry, shape, dtype), **given})
    assert all(torch.equal(value, copies[name]) for name, value in given.items())


def says_what_it_is(entry: Entry[Callable[..., Tensor]], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert entry.summary.endswith(".")
    assert isinstance(entry.facts.get("magnitude_like", False), bool)


CHECKS = (same_shape_and_finite, deterministic, leaves_its_inputs_alone, says_what_it_is)
