"""What is ranked: which tensors make which units, and what is protected."""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.ops import Prune
from orchestrator.pruning.parts import blocks, grouped, made_by, single_weights
from orchestrator.pruning.structure import Slice, Units


def piece(tensor: str, owner: list[int], role: Any = "makes") -> Slice:
    return Slice(tensor=tensor, dim=0, owner=torch.tensor(owner), role=role)


GROUP = Units(
    name="a",
    count=3,
    slices=(
        piece("a", [0, 1, -1]),
        piece("b", [1, 2]),
        piece("bias", [0, 1, 2]),
        piece("c", [0, 1, 2], "reads"),
    ),
)


def test_who_makes_which_units() -> None:
    assert made_by(GROUP, ["a", "b", "c"]) == {("a",): 1, ("a", "b"): 1, ("b",): 1}
    assert made_by(GROUP, ["a"]) == {("a",): 2, (): 1}
    assert made_by(GROUP, []) == {(): 3}


def test_single_weights_count_what_is_protected() -> None:
    weights = {"a": torch.tensor([3.0, -1.0, 2.0]), "b": torch.tensor([[5.0, 0.0]])}
    masks = {"a": torch.tensor([True, True, False]), "bias": torch.tensor([False])}
    op = Prune(criterion="magnitude", scope="layer", rate=0.5, factors=(("b", 0.0),))
    things = single_weights(op, {"a": weights["a"].abs()}, weights, masks)
    assert things.op == op
    (part,) = things.parts
    assert (part.name, part.kept, part.aside) == ("a", 2, 0)
    assert part.magnitudes(torch.tensor([1, 2])).tolist() == [1.0, 2.0]
    assert things.counts.shapes == {"a": (3,), "b": (1, 2)} and things.counts.kept == {"a": 2, "b": 2}


def test_a_unit_is_protected_with_any_of_its_makers() -> None:
    weights = {name: torch.ones(size) for name, size in (("a", 3), ("b", 2), ("c", 3))}
    op = Prune(criterion="magnitude", scope="layer", rate=0.5, factors=(("b", 0.0),))
    scores = {"a": torch.tensor([4.0, 3.0, 2.0])}
    things = grouped(op, [GROUP], scores, weights, {}, norm="l1", roles=("makes",))
    (part,) = things.parts
    assert part.scores.tolist() == [4.0, 3.0, 0.0]
    assert part.among is not None and part.among.tolist() == [True, False, False]
    assert part.held is not None and part.held.tolist() == [False, True, True] and part.aside == 2
    assert things.counts.shapes == {"a": (1,), "a (protected)": (2,)}
    assert things.counts.kept == {"a": 1, "a (protected)": 2}
    assert dict(things.op.factors) == {"a": 1.0, "a (protected)": 0.0}


def test_sizes_of_units_are_those_of_what_is_kept() -> None:
    weights = {"a": torch.tensor([3.0, 4.0, 9.0]), "b": torch.tensor([3.0, 5.0]), "c": torch.ones(3)}
    masks = {"b": torch.tensor([True, False]), "bias": torch.tensor([True, True, False])}
    op = Prune(criterion="magnitude", scope="layer", rate=0.5)
    things = grouped(op, [GROUP], weights, weights, masks, norm="l1", roles=("makes",))
    (part,) = things.parts
    assert part.magnitudes(torch.arange(3)).tolist() == [3.0, 5.0, 0.0]
    assert part.among is not None and part.among.tolist() == [True, True, False]


def test_blocks_are_units_of_a_flat_tensor() -> None:
    (group,) = blocks({"w": (2, 3)}, 1, 2, {})
    assert (group.name, group.count, group.slices[0].owner.tolist()) == ("w", 4, [0, 0, 1, 2, 2, 3])
    assert made_by(group, ["w"]) == {("w",): 4}
