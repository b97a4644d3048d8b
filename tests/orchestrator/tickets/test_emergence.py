"""Structure beside the structure that a random mask has."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import PlanError
from orchestrator.tickets.emergence import (
    Found,
    adjacent_pairs,
    by_permutation,
    empty_and_full,
    on_a_path,
    varying,
)


def bits(*rows: str) -> Tensor:
    return torch.tensor([[bit == "1" for bit in row] for row in rows])


def every_mask(shape: tuple[int, ...], kept: int) -> list[Tensor]:
    size = int(np.prod(shape))
    masks = []
    for places in combinations(range(size), kept):
        flat = torch.zeros(size, dtype=torch.bool)
        flat[list(places)] = True
        masks.append(flat.reshape(shape))
    return masks


def drawn(shape: tuple[int, ...], kept: int, seed: int = 0) -> Tensor:
    size = int(np.prod(shape))
    flat = torch.arange(size) < kept
    return flat[torch.randperm(size, generator=torch.Generator().manual_seed(seed))].reshape(shape)


def test_rows_and_columns_by_eye() -> None:
    found = empty_and_full(bits("1110", "0000", "1000"))
    assert found["rows"].groups == 3
    assert found["rows"].empty.value == pytest.approx(1 / 3)
    assert found["rows"].full.value == 0
    assert found["columns"].empty.value == 1 / 4
    assert empty_and_full(bits("11", "01"))["columns"].full.value == 1 / 2


def test_filters_channels_and_kernels_by_eye() -> None:
    mask = torch.zeros(2, 3, 1, 2, dtype=torch.bool)
    mask[0, 0] = True
    mask[0, 1, 0, 0] = True
    found = empty_and_full(mask)
    assert set(found) == {"filters", "channels", "kernels"}
    assert found["filters"].empty.value == 1 / 2
    assert found["channels"].empty.value == pytest.approx(1 / 3)
    assert found["kernels"].empty.value == pytest.approx(4 / 6)
    assert found["kernels"].full.value == pytest.approx(1 / 6)
    with pytest.raises(PlanError, match="two dimensions or more"):
        empty_and_full(torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(("shape", "kept"), [((2, 4), 3), ((3, 3), 6), ((4, 2), 7), ((2, 3), 0), ((1, 5), 2)])
def test_chance_is_what_all_masks_give(shape: tuple[int, ...], kept: int) -> None:
    masks = every_mask(shape, kept)
    expected = empty_and_full(masks[0])
    for kind in ("rows", "columns"):
        for what in ("empty", "full"):
            values = [getattr(empty_and_full(mask)[kind], what).value for mask in masks]
            found = getattr(expected[kind], what)
            assert found.chance == pytest.approx(np.mean(values), abs=1e-12)
            assert found.chance_std == pytest.approx(np.std(values), abs=1e-7)


@pytest.mark.parametrize("constant", [None, torch.tensor([False, True, False, False, False, False])])
@pytest.mark.parametrize("within", ["layer", "row"])
@pytest.mark.parametrize("geometry", [(6,), (2, 3), (2, 1, 3)])
def test_chance_pairs_are_what_all_masks_give(geometry: tuple[int, ...], within: str, constant: Tensor | None) -> None:
    mask = bits("110000", "101000")
    usable = torch.ones(6, dtype=torch.bool) if constant is None else ~constant
    inputs = int(usable.sum())
    masks = []
    if within == "layer":
        kept = int((mask & usable).sum())
        masks = every_mask((2, inputs), kept)
    else:
        first, second = (every_mask((1, inputs), int(row.sum())) for row in mask & usable)
        masks = [torch.cat([a, b]) for a in first for b in second]
    values = []
    for each in masks:
        whole = torch.zeros(2, 6, dtype=torch.bool)
        whole[:, usable] = each
        values.append(adjacent_pairs(whole, geometry, constant, within=within).value)
    found = adjacent_pairs(mask, geometry, constant, within=within)
    assert found.chance == pytest.approx(np.mean(values))
    assert found.chance_std == pytest.approx(np.std(values))


def test_neighbours_by_eye() -> None:
    assert adjacent_pairs(bits("1101", "0110"), (4,)).value == 2
    image = bits("111010000")
    assert adjacent_pairs(image, (3, 3)).value == 3
    assert adjacent_pairs(image, (9,)).value == 2  # in one line the middle of the second row has no neighbour
    assert adjacent_pairs(bits("11001100"), (2, 2, 2)).value == 2  # across channels nothing is next to anything
    middle = torch.tensor([False, True, False, False])
    assert adjacent_pairs(bits("1101", "0110"), (4,), middle).value == 0


def test_a_mask_of_blocks_has_more_neighbours_than_chance() -> None:
    blocks = torch.zeros(20, 40, dtype=torch.bool)
    for unit in range(20):
        blocks[unit, unit : unit + 4] = True
    assert adjacent_pairs(blocks, (40,)).z > 5
    scattered = [adjacent_pairs(drawn((20, 40), 80, seed), (40,)).z for seed in range(40)]
    assert abs(np.mean(scattered)) < 4 / np.sqrt(40)
    assert 0.6 < np.std(scattered) < 1.4


def test_geometries_that_do_not_fit_are_refused() -> None:
    for geometry in [(5,), (2, 3), (), (1, 1, 1, 4)]:
        with pytest.raises(PlanError, match=r"legal: \(units, inputs\) over \(width,\)"):
            adjacent_pairs(bits("1101"), geometry)
    with pytest.raises(PlanError, match="legal: 'layer', 'row'"):
        adjacent_pairs(bits("1101"), (4,), within="column")


def test_shuffling_gives_the_chance_that_is_computed() -> None:
    mask = drawn((12, 10), 20, seed=4)
    figures = {
        "columns": (lambda m: empty_and_full(m)["columns"].empty.value, empty_and_full(mask)["columns"].empty),
        "pairs": (lambda m: adjacent_pairs(m, (2, 5)).value, adjacent_pairs(mask, (2, 5))),
    }
    for figure, exact in figures.values():
        found = by_permutation(mask, figure, draws=300, seed=2)
        assert found.value == exact.value
        assert abs(found.chance - exact.chance) <= 4 * exact.chance_std / np.sqrt(300)
        assert found.chance_std == pytest.approx(exact.chance_std, rel=0.2)
    again = by_permutation(mask, figures["pairs"][0], draws=300, seed=2)
    assert again == by_permutation(mask, figures["pairs"][0], draws=300, seed=2)
    with pytest.raises(PlanError, match="legal: 2 and more"):
        by_permutation(mask, figures["pairs"][0], draws=1, seed=2)


def test_columns_of_constant_inputs_are_no_structure() -> None:
    mask = drawn((30, 20), 300, seed=1)
    edge = torch.arange(20) >= 15
    mask[:, edge] = False  # a pruner drops what reads nothing
    naive = empty_and_full(mask)["columns"].empty
    honest = empty_and_full(varying(mask, edge))["columns"].empty
    assert naive.value == 1 / 4 and naive.z > 10
    assert honest.value == 0
    assert varying(mask, edge).shape == (30, 15)
    with pytest.raises(PlanError, match="legal: one each"):
        varying(mask, edge[:3])


def test_without_freedom_there_is_no_z() -> None:
    assert np.isnan(empty_and_full(bits("11", "11"))["rows"].full.z)
    assert Found(value=3.0, chance=1.0, chance_std=2.0).z == 1.0


def test_paths_by_eye() -> None:
    masks = {
        "first": bits("110", "000", "001"),  # the second unit reads nothing
        "second": bits("110", "000"),  # the third unit is read by nobody
        "out": bits("11"),  # the second of `second` reads nothing
    }
    found = on_a_path(masks)
    assert torch.equal(found["first"], bits("110", "000", "000"))
    assert torch.equal(found["second"], bits("100", "000"))
    assert torch.equal(found["out"], bits("10"))
    assert list(found) == list(masks)


def test_a_constant_input_starts_no_path() -> None:
    masks = {"first": bits("10", "01"), "out": bits("11")}
    found = on_a_path(masks, torch.tensor([True, False]))
    assert torch.equal(found["first"], bits("00", "01"))
    assert torch.equal(found["out"], bits("01"))


def test_a_convolution_is_flattened_channel_by_channel() -> None:
    kernels = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    kernels[0, 0, 1, 1] = True  # the second filter is empty
    masks = {"conv": kernels, "fc": bits("10000010"), "out": bits("1", "0")}
    found = on_a_path(masks)
    assert torch.equal(found["conv"], kernels)
    assert torch.equal(found["fc"], bits("10000000"))
    assert torch.equal(found["out"], masks["out"])
    masks["fc"] = bits("00000010")
    assert not any(mask.any() for mask in on_a_path(masks).values())


def test_whole_masks_are_all_on_a_path() -> None:
    masks = {"a": torch.ones(4, 3, 3, 3, dtype=torch.bool), "b": torch.ones(5, 36, dtype=torch.bool)}
    assert all(mask.all() for mask in on_a_path(masks).values())


def test_a_broken_chain_is_refused() -> None:
    ones = torch.ones
    with pytest.raises(PlanError, match=r"'b' does not follow in the chain: it has 5 inputs; .* 4 outputs of 'a'$"):
        on_a_path({"a": ones(4, 2).bool(), "b": ones(3, 5).bool()})
    with pytest.raises(PlanError, match="'b' of shape"):
        on_a_path({"a": ones(4, 2).bool(), "b": ones(3).bool()})


@given(st.data())
def test_what_is_off_every_path_cannot_reach_the_output(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=4))
    masks = {}
    for layer, (inputs, outputs) in enumerate(pairwise(widths)):
        flat = data.draw(st.lists(st.booleans(), min_size=inputs * outputs, max_size=inputs * outputs))
        masks[str(layer)] = torch.tensor(flat).reshape(outputs, inputs)
    found = on_a_path(masks)
    # The number of paths through each weight, counted with matrices of 0 and 1.
    numbers = [mask.double() for mask in masks.values()]
    for layer, name in enumerate(masks):
        before = torch.ones(widths[0], dtype=torch.float64)
        for matrix in numbers[:layer]:
            before = matrix @ before
        after = torch.ones(widths[-1], dtype=torch.float64)
        for matrix in reversed(numbers[layer + 1 :]):
            after = after @ matrix
        assert torch.equal(found[name], after[:, None] * numbers[layer] * before[None, :] > 0)
    assert all(torch.equal(mask, found[name]) for name, mask in on_a_path(found).items())
