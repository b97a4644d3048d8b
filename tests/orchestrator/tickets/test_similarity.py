"""Agreement between masks, and the agreement that chance alone gives."""

from __future__ import annotations

from itertools import combinations, product
from math import comb, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from orchestrator.errors import PlanError
from orchestrator.tickets.packed import Packed, pack
from orchestrator.tickets.similarity import agreement, by_permutation, k_of_n


def drawn(size: int, kept: int, seed: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    return mask


def packs(*masks: list[int] | Tensor) -> list[Packed]:
    return [pack({"w": torch.as_tensor(mask).bool()}) for mask in masks]


def test_by_eye() -> None:
    found = agreement(packs([1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0])).overall
    assert found.size == 6
    assert found.shared.tolist() == [[2, 1], [1, 3]]
    assert found.jaccard.tolist() == [[1, 1 / 4], [1 / 4, 1]]
    assert found.hamming.tolist() == [[0, 3 / 6], [3 / 6, 0]]
    assert found.overlap.tolist() == [[1, 1 / 2], [1 / 2, 1]]
    assert found.chance_shared[0, 1] == 2 * 3 / 6
    assert found.chance_hamming[0, 1] == pytest.approx((2 + 3 - 2) / 6)
    assert found.chance_overlap[0, 1] == 1 / 2
    assert found.z[0, 1] == 0
    assert found.excess[0, 1] == 0


@pytest.mark.parametrize(("size", "a", "b"), [(6, 2, 3), (7, 4, 4), (8, 1, 7), (5, 5, 2)])
def test_chance_is_what_all_pairs_of_masks_give(size: int, a: int, b: int) -> None:
    first = set(range(a))
    shared = np.array([len(first & set(second)) for second in combinations(range(size), b)])
    found = agreement(packs(torch.arange(size) < a, torch.arange(size) < b)).overall
    assert found.chance_shared[0, 1] == pytest.approx(shared.mean())
    assert found.chance_shared_std[0, 1] == pytest.approx(shared.std())
    assert found.chance_hamming[0, 1] == pytest.approx(((a + b - 2 * shared) / size).mean())
    assert found.chance_overlap[0, 1] == pytest.approx((shared / min(a, b)).mean())
    assert found.chance_jaccard[0, 1] == pytest.approx((shared / (a + b - shared)).mean(), abs=0.02)


@pytest.mark.parametrize(("density", "jaccard"), [(0.64, 0.471), (0.2, 0.111), (0.1, 0.0526), (0.01, 0.005)])
def test_the_chance_jaccard_of_two_large_masks(density: float, jaccard: float) -> None:
    size = 1_000_000
    kept = int(density * size)
    found = agreement(packs(torch.arange(size) < kept, torch.arange(size) >= size - kept)).overall
    assert found.chance_jaccard[0, 1] == pytest.approx(density / (2 - density), abs=1e-5)
    assert found.chance_jaccard[0, 1] == pytest.approx(jaccard, abs=5e-4)


def test_the_chance_jaccard_is_that_of_the_hypergeometric_law() -> None:
    law = stats.hypergeom(200, 60, 90)
    shared = np.arange(61)
    exact = float((law.pmf(shared) * shared / (150 - shared)).sum())
    found = agreement(packs(drawn(200, 60, 1), drawn(200, 90, 2))).overall
    assert found.chance_jaccard[0, 1] == pytest.approx(exact, abs=2e-5)
    assert found.chance_shared_std[0, 1] == pytest.approx(law.std())


def test_layers_add_up() -> None:
    one = {"a": drawn(50, 10, 1), "b": drawn(20, 15, 2)}
    two = {"a": drawn(50, 30, 3), "b": drawn(20, 15, 4)}
    found = agreement([pack(one), pack(two)])
    assert found.overall.shared[0, 1] == sum(layer.shared[0, 1] for layer in found.layers.values())
    assert found.overall.chance_shared[0, 1] == pytest.approx(10 * 30 / 50 + 15 * 15 / 20)
    variance = sum(layer.chance_shared_std[0, 1] ** 2 for layer in found.layers.values())
    assert found.overall.chance_shared_std[0, 1] == pytest.approx(sqrt(variance))
    # Equal layer densities that differ look alike by chance, overall: that is no agreement.
    dense_and_empty = {"a": torch.zeros(50, dtype=torch.bool), "b": torch.ones(20, dtype=torch.bool)}
    alike = agreement([pack(dense_and_empty)] * 2).overall
    assert alike.jaccard[0, 1] == alike.chance_jaccard[0, 1] == 1
    assert np.isnan(alike.z[0, 1]) and np.isnan(alike.excess[0, 1])


def test_independent_masks_have_no_excess() -> None:
    masks = [{"a": drawn(4000, 1500, 10 + i), "b": drawn(900, 90, 50 + i)} for i in range(12)]
    found = agreement([pack(each) for each in masks])
    upper = np.triu_indices(12, 1)
    for each in (found.overall, *found.layers.values()):
        z = each.z[upper]
        assert abs(z.mean()) < 4 / sqrt(z.size)
        assert 0.75 < z.std() < 1.25
        assert (np.abs(each.excess[upper]) < 4.5 * each.excess_error[upper]).all()
        np.testing.assert_allclose(z, each.excess[upper] / each.excess_error[upper])


@given(st.integers(2, 40), st.data())
def test_the_excess_is_greatest_for_equal_masks_alone(size: int, data: st.DataObject) -> None:
    row = st.lists(st.booleans(), min_size=size, max_size=size).filter(lambda bits: 0 < sum(bits) < size)
    one, two = data.draw(row), data.draw(row)
    excess = agreement(packs(torch.tensor(one), torch.tensor(two))).overall.excess
    assert excess[0, 0] == pytest.approx(1)
    assert excess[0, 1] == excess[1, 0]
    assert (excess[0, 1] == pytest.approx(1)) == (one == two)
    assert excess[0, 1] < 1 + 1e-12


def test_a_subset_agrees_less_than_an_equal() -> None:
    found = agreement(packs([1, 0, 0, 0], [1, 1, 0, 0])).overall
    assert found.overlap[0, 1] == 1
    assert found.excess[0, 1] == pytest.approx((1 - 0.5) / (1.5 - 0.5))


def test_empty_masks_are_equal() -> None:
    found = agreement(packs([0, 0], [0, 0], [1, 0])).overall
    assert found.jaccard[0].tolist() == [1, 1, 0]
    assert found.overlap[0].tolist() == [1, 1, 1]
    assert np.isnan(found.z[0, 1])


def test_shuffling_gives_the_chance_that_is_computed() -> None:
    masks = [pack({"a": drawn(300, 100, i), "b": drawn(70, 7 + 5 * i, 9 + i)}) for i in range(3)]
    draws = 400
    shuffled, computed = by_permutation(masks, draws, seed=1), agreement(masks)
    upper = np.triu_indices(3, 1)
    pairs = [(shuffled.overall, computed.overall)]
    pairs += [(shuffled.layers[name], computed.layers[name]) for name in ("a", "b")]
    for found, expected in pairs:
        error = expected.chance_shared_std[upper] / sqrt(draws)
        assert (np.abs(found.shared[upper] - expected.chance_shared[upper]) < 4 * error).all()
        np.testing.assert_allclose(found.shared_std[upper], expected.chance_shared_std[upper], rtol=0.15)
        jaccard_error = found.jaccard_std[upper] / sqrt(draws)
        assert (np.abs(found.jaccard[upper] - expected.chance_jaccard[upper]) < 4 * jaccard_error + 2e-3).all()
        np.testing.assert_allclose(found.z[upper], expected.z[upper], atol=0.5)
        assert np.isnan(found.z[0, 0])
        assert found.draws == draws


def test_permutations_are_seeded() -> None:
    masks = packs(drawn(100, 30, 1), drawn(100, 30, 2))
    first, again, other = (by_permutation(masks, 5, seed).overall.shared[0, 1] for seed in (1, 1, 2))
    assert first == again != other
    with pytest.raises(PlanError, match="1 permutations; legal: 2 and more"):
        by_permutation(masks, 1, 0)


def test_a_curve_by_eye() -> None:
    found = k_of_n(packs([1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0])).overall
    assert found.share == (3 / 4, 1 / 4, 1 / 4)
    # Chances 1/2, 1/2, 1/4 in each place.
    assert found.chance == pytest.approx((1 - 3 / 16, 1 / 4 + 2 * 1 / 16, 1 / 16))


def test_the_published_consensus_is_hardly_above_chance() -> None:
    # Five independent masks of which each keeps 64 % share 0.64⁵ = 10.7 %.
    found = k_of_n(packs(*(drawn(10_000, 6_400, i) for i in range(5)))).overall
    assert found.chance[4] == pytest.approx(0.64**5)
    assert found.share[4] == pytest.approx(0.64**5, abs=0.01)
    for k in range(1, 6):
        expected = sum(comb(5, j) * 0.64**j * 0.36 ** (5 - j) for j in range(k, 6))
        assert found.chance[k - 1] == pytest.approx(expected)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=5))
def test_curves_are_composed_of_layers(kept: list[tuple[int, int]]) -> None:
    masks = [pack({"a": drawn(4, a, i), "b": drawn(6, b, 20 + i)}) for i, (a, b) in enumerate(kept)]
    found = k_of_n(masks)
    for k in range(len(kept)):
        for field in ("share", "chance"):
            by_layer = {name: getattr(curve, field)[k] for name, curve in found.layers.items()}
            assert getattr(found.overall, field)[k] == pytest.approx(0.4 * by_layer["a"] + 0.6 * by_layer["b"])
    assert sum(found.overall.share) == pytest.approx(sum(a + b for a, b in kept) / 10)
    assert sum(found.overall.chance) == pytest.approx(sum(a + b for a, b in kept) / 10)


def test_chance_curves_are_what_all_placings_give() -> None:
    places = [list(combinations(range(4), kept)) for kept in (1, 2, 3)]
    at_least_two = [sum(sum(p in mask for mask in masks) >= 2 for p in range(4)) / 4 for masks in product(*places)]
    found = k_of_n(packs([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0])).overall
    assert found.chance[1] == pytest.approx(np.mean(at_least_two))


def test_words_are_compared_across_chunks() -> None:
    size = 64 * 2048 * 2 + 77
    masks = [drawn(size, size // 3, i) for i in range(3)]
    found = agreement(packs(*masks)).overall.shared
    for i, j in product(range(3), range(3)):
        assert found[i, j] == int((masks[i] & masks[j]).sum())


def test_masks_of_other_tensors_are_refused() -> None:
    wrong = [pack({"w": drawn(4, 2, 0)}), pack({"v": drawn(4, 2, 0)})]
    for measure in (agreement, k_of_n, lambda masks: by_permutation(masks, 2, 0)):
        with pytest.raises(PlanError, match="'v' is in only some of them"):
            measure(wrong)
