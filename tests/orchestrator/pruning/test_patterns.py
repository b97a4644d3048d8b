"""Blocks and N:M, checked by eye and group by group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.pruning.masks import index_hashes
from orchestrator.pruning.patterns import block_count, block_owner, block_size, fits, keep_n_of_m, n_of_m


def kept(scores: Tensor, before: Tensor | None = None, n: int = 2, m: int = 4) -> Tensor:
    before = torch.ones(scores.shape, dtype=torch.bool) if before is None else before
    hashes = index_hashes("w", scores.numel()).reshape(scores.shape)
    return keep_n_of_m(scores, before, scores.abs(), hashes, n, m)


def test_names_of_patterns() -> None:
    assert (n_of_m("2:4"), n_of_m("1:16"), n_of_m("4x1"), n_of_m("weight")) == ((2, 4), (1, 16), None, None)
    assert [n_of_m(name) for name in ("4:4", "0:4", "2:04", "2:4 ", "2:4:8", "-1:2")] == [None] * 6
    assert (block_size("4x1"), block_size("16x16"), block_size("0x4"), block_size("2:4")) == (
        (4, 1),
        (16, 16),
        None,
        None,
    )


def test_two_of_four_by_eye() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0, 0.0, 9.0, 8.0]])
    assert kept(scores).int().tolist() == [[1, 0, 1, 0, 0, 0, 1, 1]]


def test_of_a_convolution_each_kernel_place_by_itself() -> None:
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scores[0, :, 0, 1] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert kept(scores)[0, :, 0].int().T.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("shape", "m", "whether"), [((3, 8), 4, True), ((3, 6), 4, False), ((8,), 4, False), ((2, 4, 3, 3), 4, True)]
)
def test_what_fits(shape: tuple[int, ...], m: int, whether: bool) -> None:
    assert fits(shape, m) == whether


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.sampled_from([(), (2,), (2, 3)]), st.data())
def test_every_group_keeps_its_best(
    rows: int, groups: int, m: int, kernel: tuple[int, ...], data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m - 1))
    shape = (rows, groups * m, *kernel)
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = torch.randint(-2, 3, shape, generator=draw).float()
    before = torch.rand(shape, generator=draw) < data.draw(st.sampled_from([0.3, 0.8, 1.1]))
    mask = kept(scores, before, n, m)
    assert not (mask & ~before).any() and mask.is_contiguous()
    together = [tensor.movedim(1, -1).reshape(-1, m) for tensor in (mask, before, scores)]
    for chosen, there, values in zip(*together, strict=True):
        assert int(chosen.sum()) == min(n, int(there.sum()))
        if (there & ~chosen).any() and chosen.any():
            assert values[chosen].min() >= values[there & ~chosen].max()


def test_blocks_at_the_edges_are_smaller() -> None:
    owner, count = block_owner((3, 5), 2, 2)
    assert count == block_count((3, 5), 2, 2) == 6
    assert owner.tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]


def test_a_convolution_is_a_matrix_to_blocks() -> None:
    owner, count = block_owner((2, 2, 1, 3), 1, 3)
    assert count == 4
    assert owner.reshape(2, 6).tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]
    assert block_owner((4,), 2, 1)[0].tolist() == [0, 0, 1, 1]
