"""Masks as bits: nothing is lost, and merges keep the laws of sets."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import PlanError
from orchestrator.tickets.packed import Packed, check_alike, intersect, kept_counts, pack, unite, unpack

Bits = list[bool]


def masks_of(*bits: Bits) -> list[dict[str, Tensor]]:
    return [{"w": torch.tensor(each, dtype=torch.bool), "v": ~torch.tensor(each, dtype=torch.bool)} for each in bits]


def same(a: Packed, b: Packed) -> bool:
    return a.shapes == b.shapes and all(np.array_equal(words, b.words[name]) for name, words in a.words.items())


def triples() -> st.SearchStrategy[tuple[Bits, Bits, Bits]]:
    row = st.integers(0, 150).flatmap(lambda n: st.tuples(*[st.lists(st.booleans(), min_size=n, max_size=n)] * 3))
    return row


@given(triples())
def test_the_laws_of_sets(bits: tuple[Bits, Bits, Bits]) -> None:
    a, b, c = (pack(each) for each in masks_of(*bits))
    for law in (intersect, unite):
        assert same(law(a, b), law(b, a))
        assert same(law(law(a, b), c), law(a, law(b, c)))
        assert same(law(a, a), a)
    assert same(intersect(a, unite(a, b)), a)
    assert same(unite(a, intersect(a, b)), a)
    assert same(intersect(a, unite(b, c)), unite(intersect(a, b), intersect(a, c)))


@given(triples())
def test_bits_are_what_the_masks_are(bits: tuple[Bits, Bits, Bits]) -> None:
    first, second, _ = masks_of(*bits)
    both, either = intersect(pack(first), pack(second)), unite(pack(first), pack(second))
    for name in first:
        assert torch.equal(unpack(pack(first))[name], first[name])
        assert torch.equal(unpack(both)[name], first[name] & second[name])
        assert torch.equal(unpack(either)[name], first[name] | second[name])
        assert kept_counts(both)[name] == int((first[name] & second[name]).sum())


def test_shapes_come_back() -> None:
    mask = torch.tensor([[[True, False], [False, True], [True, True]]])
    packed = pack({"w": mask, "scalar": torch.tensor(True), "none": torch.zeros(0, 3, dtype=torch.bool)})
    assert packed.nbytes == 16
    assert torch.equal(unpack(packed)["w"], mask)
    assert unpack(packed)["scalar"].item() is True
    assert unpack(packed)["none"].shape == (0, 3)
    assert kept_counts(packed) == {"w": 4, "scalar": 1, "none": 0}


def test_a_transposed_mask_is_packed_as_it_reads() -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]]).T
    assert torch.equal(unpack(pack({"w": mask}))["w"], mask)


def test_what_is_no_mask_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^the mask of 'w' holds torch.float32; legal: torch.bool$"):
        pack({"w": torch.ones(3)})


def test_unequal_tensors_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"^the masks are not of the same tensors: 'b' is in only some of them$"):
        check_alike([{"a": (1,), "b": (2,), "c": (3,)}, {"a": (1,)}])
    with pytest.raises(PlanError, match=r"'a' has the shapes \(1, 2\) and \(2, 1\)$"):
        check_alike([{"a": (1, 2), "b": (2,)}, {"a": (2, 1), "b": (3,)}])
    with pytest.raises(PlanError, match=re.escape("'z' is in only some of them")):
        check_alike([{"a": (1,)}, {"a": (1,)}, {"a": (1,), "z": (1,)}])
    with pytest.raises(PlanError, match="there are no masks"):
        check_alike([])
    small, large = pack({"w": torch.ones(2, dtype=torch.bool)}), pack({"w": torch.ones(3, dtype=torch.bool)})
    for law in (intersect, unite):
        with pytest.raises(PlanError, match="'w' has the shapes"):
            law(small, large)
