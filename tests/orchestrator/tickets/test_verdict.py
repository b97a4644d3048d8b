"""What is claimed follows from the numbers, and claims that are false are rare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from orchestrator.errors import PlanError
from orchestrator.tickets.verdict import (
    ACCURACY,
    Comparison,
    Contender,
    Scale,
    decide,
    holm,
    judge,
    pair,
    paired,
    steps,
    summary,
)


def contender(name: str, values: list[Any], kept: int | None = 80) -> Contender:
    seeds = range(len(values))
    return Contender(
        name=name,
        test=dict(zip(seeds, values, strict=True)),
        kept=None if kept is None else dict.fromkeys(seeds, kept),
    )


def compare(
    ticket: list[Any], *others: list[Any], scale: Scale = ACCURACY, n_test: int = 1000
) -> tuple[Comparison, ...]:
    names = ["the shuffled mask", "one-shot", "dense"]
    pairs = [
        pair(contender("the ticket", ticket), contender(name, other), n_test=n_test, prunable=1000, scale=scale)
        for name, other in zip(names, others, strict=False)
    ]
    return decide(pairs)


TICKET = [0.95, 0.94, 0.96, 0.95, 0.95]


def test_a_clear_win() -> None:
    (found,) = compare(TICKET, [0.92, 0.915, 0.92, 0.925, 0.915])
    assert found.claim == "beats"
    expected = stats.ttest_rel(TICKET, [0.92, 0.915, 0.92, 0.925, 0.915])
    low, high = expected.confidence_interval()
    assert found.difference == pytest.approx(3.1)
    assert found.p == found.p_holm == pytest.approx(expected.pvalue)
    assert found.difference - found.half_width == pytest.approx(100 * low)  # type: ignore[operator]
    assert found.difference + found.half_width == pytest.approx(100 * high)  # type: ignore[operator]
    assert found.sparsity == pytest.approx(0.92)
    assert (found.n, found.gap) == (5, 0)
    says = "beats the shuffled mask by 3.1 ± 0.8 points (n = 5, n_test = 1,000) at 92.0 % sparse"
    assert found.sentence == says


def test_a_clear_loss() -> None:
    (found,) = compare([value - 0.02 for value in TICKET], [0.95, 0.945, 0.955, 0.955, 0.95])
    assert found.claim == "loses to"
    assert found.sentence.startswith("loses to the shuffled mask by 2.1 ± 0.5 points (n = 5,")


def test_not_to_find_a_difference_is_not_to_match() -> None:
    noisy, close = compare(TICKET, [0.97, 0.91, 0.98, 0.93, 0.95], [0.951, 0.939, 0.961, 0.949, 0.949])
    assert noisy.claim == "not distinguishable from"
    assert noisy.sentence.startswith("not distinguishable from the shuffled mask: +0.2 ± ")
    assert close.claim == "matches"
    assert close.sentence.startswith("matches one-shot to within ±1 points: +0.0 ± 0.1 points (n = 5,")


def test_the_whole_interval_must_lie_within_the_margin() -> None:
    differences = np.array([0.1, 0.5, 0.9, 0.5, 0.5]) - 0.42
    mean, half_width, _ = (float(value) for value in paired(differences, 0.1))
    assert abs(mean) + half_width < 1
    inside = replace(ACCURACY, margin=abs(mean) + half_width + 1e-9)
    outside = replace(ACCURACY, margin=abs(mean) + half_width - 1e-9)
    assert judge(np.array(mean), np.array(half_width), np.array(0.7), 5, inside) == "matches"
    assert judge(np.array(mean), np.array(half_width), np.array(0.7), 5, outside) == "not distinguishable from"


def test_fewer_than_five_seeds_are_too_few() -> None:
    four = compare(TICKET[:4], [0.5, 0.51, 0.5, 0.52])[0]
    assert four.claim == "too few"
    assert four.p is not None and four.p < 1e-4
    assert four.sentence.startswith("too few seeds for a claim against the shuffled mask: +44.2 ± ")
    one = compare(TICKET[:1], [0.5])[0]
    assert (one.claim, one.half_width, one.p, one.p_holm) == ("too few", None, None, None)
    assert one.sentence.startswith("too few seeds for a claim against the shuffled mask: +45.0 points (n = 1,")
    three = decide([pair(contender("t", TICKET[:3]), contender("c", [0.5, 0.51, 0.5]), n_test=9, prunable=99)], 3)
    assert three[0].claim == "beats"


def test_every_printed_comparison_makes_each_claim_harder() -> None:
    ticket = [0.95, 0.94, 0.96, 0.95, 0.95]
    close = [0.94, 0.935, 0.945, 0.946, 0.93]
    noise = [0.97, 0.91, 0.98, 0.93, 0.95]
    alone = compare(ticket, close)[0]
    among = compare(ticket, close, noise, noise)[0]
    assert alone.claim == "beats"
    assert among.p == alone.p
    assert among.p_holm == pytest.approx(3 * alone.p)  # type: ignore[operator]


def test_comparisons_of_several_measures_are_one_family() -> None:
    ticket, close = contender("t", TICKET), contender("c", [0.94, 0.935, 0.945, 0.946, 0.93])
    fast, slow = contender("t", [900, 1000, 900, 1100, 1000]), contender("c", [2000, 2300, 2200, 2100, 2200])
    accuracy = pair(ticket, close, n_test=1000, prunable=1000)
    speed = pair(fast, slow, n_test=1000, prunable=1000, scale=steps(100))
    both = decide([accuracy, speed])
    assert [found.claim for found in both] == ["beats", "beats"]
    assert both[0].p_holm == both[0].p  # the larger of the two
    assert both[1].p_holm == pytest.approx(2 * decide([speed])[0].p)  # type: ignore[operator]


def test_what_is_lost_among_all_comparisons_is_said() -> None:
    close, noise = [0.94, 0.937, 0.951, 0.948, 0.938], [0.97, 0.91, 0.98, 0.93, 0.95]
    assert compare(TICKET, close)[0].claim == "beats"
    found = compare(TICKET, close, noise, noise)[0]
    assert found.claim == "not distinguishable from"
    assert found.sentence.startswith(
        "not distinguishable from the shuffled mask: +0.7 ± 0.6 points, p = 0.07 among all com"
    )


@pytest.mark.parametrize(("by", "claim"), [(0.0, "matches"), (0.001, "matches"), (0.02, "beats"), (-0.02, "loses to")])
def test_equal_differences_are_as_sure_as_one_test_example(by: float, claim: str) -> None:
    found = compare(TICKET, [value - by for value in TICKET])[0]
    assert found.claim == claim
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 4) * 0.1 / np.sqrt(5))
    assert found.p is not None and (by == 0.0 or 0 < found.p < 1)


def test_a_small_test_split_cannot_match() -> None:
    assert compare(TICKET, TICKET, n_test=50)[0].claim == "not distinguishable from"


def test_without_a_resolution_equal_differences_are_taken_as_they_are() -> None:
    mean, half_width, p = paired(np.array([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), 0.0)
    assert mean.tolist() == [2, 0]
    assert half_width.tolist() == [0, 0]
    assert p.tolist() == [0, 1]


def test_several_draws_under_one_seed_are_averaged() -> None:
    reinits = [[0.92, 0.93, 0.91], [0.91, 0.92], [0.92], 0.925, [0.915]]
    (found,) = compare(TICKET, reinits)
    assert found.n == 5
    assert found.difference == pytest.approx(3.1)


def test_learning_speed_is_better_when_lower_and_never_matches() -> None:
    found = compare([900, 1000, 900, 1100, 1000], [2000, 2300, 2200, 2100, 2200], scale=steps(100))[0]
    assert found.claim == "beats"
    assert found.difference == -1180
    assert found.sentence.startswith("beats the shuffled mask by 1,180 ± ")
    assert " steps (n = 5" in found.sentence
    same = compare([900, 1000, 900, 1100, 1000], [900, 1000, 900, 1100, 1000], scale=steps(100))[0]
    assert same.claim == "not distinguishable from"


def test_a_dense_contender_is_compared_as_it_is() -> None:
    dense = contender("dense", [0.9501, 0.9402, 0.9599, 0.95, 0.9498], kept=None)
    (found,) = decide([pair(contender("the ticket", TICKET), dense, n_test=10_000, prunable=1000)])
    assert found.claim == "matches"
    assert found.gap is None


def test_unequal_sparsity_is_refused() -> None:
    ticket = contender("the ticket", TICKET)
    with pytest.raises(
        PlanError,
        match=r"^not at the same sparsity: under seed 0 the ticket keeps 80 weights, "
        r"one-shot 81; legal: a difference of 0 at most$",
    ):
        pair(ticket, contender("one-shot", TICKET, kept=81), n_test=10, prunable=1000)
    found = pair(ticket, contender("one-shot", TICKET, kept=81), n_test=10, prunable=1000, tolerance=1)
    assert found.gap == 1
    drawn = replace(contender("reinit", TICKET), kept={**dict.fromkeys(range(4), 80), 4: [80, 79]})
    with pytest.raises(PlanError, match="under seed 4 .* reinit 79"):
        pair(ticket, drawn, n_test=10, prunable=1000)


def test_unmatched_seeds_are_refused() -> None:
    ticket = contender("the ticket", TICKET)
    with pytest.raises(PlanError, match=r"^one-shot and the ticket cannot be paired: seed 5 is in only one of them$"):
        pair(ticket, contender("one-shot", [*TICKET, 0.9]), n_test=10, prunable=1000)
    half = replace(contender("one-shot", TICKET), kept={0: 80})
    with pytest.raises(PlanError, match="one-shot has either no result or no kept weights for seed 1"):
        pair(ticket, half, n_test=10, prunable=1000)
    with pytest.raises(PlanError, match="comes without a seed, kept weights"):
        pair(contender("the ticket", TICKET, kept=None), ticket, n_test=10, prunable=1000)
    with pytest.raises(PlanError, match="one-shot has the test result nan under seed 1; legal: finite numbers"):
        pair(ticket, contender("one-shot", [0.9, float("nan"), 0.9, 0.9, 0.9]), n_test=10, prunable=1000)


def test_seeds_may_be_pairs_in_any_order() -> None:
    seeds = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    ticket = Contender(name="t", test=dict(zip(seeds, TICKET, strict=True)), kept=dict.fromkeys(seeds, 8))
    lower = {seed: value - 0.01 for seed, value in reversed(list(ticket.test.items()))}  # type: ignore[operator]
    found = pair(ticket, Contender(name="c", test=lower, kept=dict.fromkeys(seeds, 8)), n_test=10, prunable=100)
    assert found.differences == pytest.approx([1.0] * 5)


def test_a_summary_is_one_sentence() -> None:
    found = compare(TICKET, [0.92, 0.915, 0.92, 0.925, 0.915], [0.97, 0.91, 0.98, 0.93, 0.95])
    assert summary(found).startswith("Beats the shuffled mask by 3.1 ± 0.8 points (n = 5, n_test = 1,000) at 92.0 %")
    assert "; not distinguishable from one-shot: " in summary(found)
    assert summary(()) == "Nothing was compared."


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_holm(p: list[float]) -> None:
    adjusted = holm(np.array(p))
    for level in (0.01, 0.05, 0.3):
        # As Holm wrote it: from the smallest p on, each at its share of the level, until the first that fails.
        claimed = set()
        for step, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[index] * (len(p) - step) > level:
                break
            claimed.add(index)
        assert {i for i, value in enumerate(adjusted) if value <= level} == claimed
    assert (adjusted >= p).all() and (adjusted <= 1).all()


def test_holm_takes_each_family_by_itself() -> None:
    p = np.array([[0.01, 0.04, 0.03], [0.5, 0.02, 0.9]])
    np.testing.assert_allclose(holm(p), [[0.03, 0.06, 0.06], [1.0, 0.06, 1.0]])


def test_false_claims_stay_under_five_percent() -> None:
    """Studies in which nothing differs: ticket and controls share each seed's luck, and one false claim is one too many."""
    studies, controls, seeds, n_test = 20_000, 6, 5, 1_000
    draw = np.random.default_rng(0)
    chance = 0.9 + 0.01 * draw.standard_normal((studies, 1, seeds))  # of a seed, common to all
    accuracy = draw.binomial(n_test, np.clip(chance, 0, 1), (studies, 1 + controls, seeds)) / n_test
    differences = 100 * (accuracy[:, :1] - accuracy[:, 1:])
    mean, half_width, p = paired(differences, 100 / n_test)
    claims = judge(mean, half_width, holm(p), seeds)
    false = np.isin(claims, ["beats", "loses to"]).any(axis=1).mean()
    slack = 3 * np.sqrt(0.05 * 0.95 / studies)
    assert 0.005 < false < 0.05 + slack
    # Canary: without the adjustment the same studies claim far too much.
    unadjusted = np.isin(judge(mean, half_width, p, seeds), ["beats", "loses to"]).any(axis=1).mean()
    assert unadjusted > 0.1


def test_studies_of_few_test_examples_and_perfect_models_claim_nothing_false() -> None:
    studies, seeds, n_test = 20_000, 5, 100
    draw = np.random.default_rng(1)
    accuracy = draw.binomial(n_test, 0.995, (studies, 4, seeds)) / n_test
    mean, half_width, p = paired(100 * (accuracy[:, :1] - accuracy[:, 1:]), 100 / n_test)
    false = np.isin(judge(mean, half_width, holm(p), seeds), ["beats", "loses to"]).any(axis=1).mean()
    assert false < 0.05


def test_differences_at_the_margin_are_rarely_called_none() -> None:
    draw = np.random.default_rng(2)
    differences = 1.0 + 0.3 * draw.standard_normal((20_000, 5))
    mean, half_width, p = paired(differences, 0.1)
    matches = (judge(mean, half_width, holm(p[:, None])[:, 0], 5) == "matches").mean()
    assert matches < 0.025 + 0.004
