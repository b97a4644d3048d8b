"""What every criterion promises: a finite score for each weight, from nothing but what it is handed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orchestrator.pruning.criteria import NEEDS, needs
from orchestrator.pruning.structure import NORMS
from orchestrator.registry import Entry

SHAPES = ((4,), (3, 2), (2, 3, 1, 1), (1, 1))


def supplied(entry: Entry[Callable[..., Tensor]], shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """A weight of `shape`, with zeros in it, and whatever else the criterion needs."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=draw, dtype=dtype)
    weight.view(-1)[0] = 0
    has: dict[str, Any] = {
        name: torch.randn(shape, generator=draw, dtype=dtype)
        for name in ("gradient", "hessian_diagonal", "hessian_gradient", "synaptic_flow", "movement")
    }
    width = weight[0].numel()
    spread = torch.randn(weight.numel(), weight.numel(), generator=draw, dtype=dtype)
    has |= {
        "hessian_blocks": (spread @ spread.t()).unsqueeze(0),
        "input_norm": torch.rand((1, *shape[1:]), generator=draw, dtype=dtype),
        "input_gram": spread[:width] @ spread[:width].t(),
        "activation": torch.rand(shape[0], generator=draw, dtype=dtype),
        "batchnorm_scale": torch.randn(shape[0], generator=draw, dtype=dtype),
        "generator": torch.Generator().manual_seed(2),
    }
    assert has.keys() == set(NEEDS)
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
    assert entry.facts["norm"] in NORMS
    for fact in ("magnitude_like", "reads", "before_training"):
        assert isinstance(entry.facts.get(fact, False), bool)
    if "paper" in entry.facts:
        assert f"({entry.facts['paper']})" in entry.summary


CHECKS = (same_shape_and_finite, deterministic, leaves_its_inputs_alone, says_what_it_is)
