"""What may be said over seeds."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.responsible.across import across_seeds, minority_contrast

# Two classes that lose much and four that lose little, over five seeds.
STEPS = np.array([0.00, 0.01, -0.01, 0.02, -0.02])
LOSSES = np.array([-0.50, -0.46, -0.03, -0.05, 0.0, -0.02])
CHANGES = LOSSES[:, None] + STEPS
RARE = np.array([True, True, False, False, False, False])
SUPPORTS = [25] * 6


def test_a_mean_over_seeds_by_hand() -> None:
    (mean, verdict), *_ = across_seeds(CHANGES[:1], [25])
    assert (mean.n, mean.mean) == (5, pytest.approx(-0.5))
    assert mean.std == pytest.approx(0.0158114)
    assert mean.half_width == pytest.approx(2.776445 * 0.0158114 / 5**0.5, rel=1e-5)
    assert mean.p == mean.p_holm and verdict == "lost by pruning"


def test_every_trend() -> None:
    found = across_seeds(np.stack([CHANGES[0], -CHANGES[0], STEPS]), [25] * 3)
    assert [verdict for _, verdict in found] == ["lost by pruning", "gained", "no evidence"]
    assert {verdict for _, verdict in across_seeds(CHANGES[:, :4], SUPPORTS)} == {"too few seeds"}


def test_one_seed_has_no_spread() -> None:
    (mean, verdict), *_ = across_seeds(CHANGES[:, :1], SUPPORTS)
    assert (mean.std, mean.half_width, mean.p, mean.p_holm, verdict) == (None, None, None, None, "too few seeds")


def test_the_minority_loses_more() -> None:
    found = minority_contrast(CHANGES, RARE, SUPPORTS)
    assert found.claim == "the minority loses more"
    assert found.over_seeds.mean == pytest.approx(-0.455)
    assert minority_contrast(CHANGES, ~RARE, SUPPORTS).claim == "the minority loses less"


def test_the_test_among_classes_is_student_s() -> None:
    from scipy.stats import ttest_ind

    expected = ttest_ind(LOSSES[:2], LOSSES[2:], equal_var=True).pvalue
    assert minority_contrast(CHANGES, RARE, SUPPORTS).p_classes == pytest.approx(expected)


def test_classes_that_differ_anyway_are_no_minority_contrast() -> None:
    # Over seeds alone this would be a finding, but the other classes lie as far apart.
    changes = np.array([-0.10, -0.02, 0.0, -0.12, -0.05])[:, None] + STEPS / 100
    found = minority_contrast(changes, np.array([True, False, False, False, False]), [25] * 5)
    assert found.over_seeds.p is not None and found.over_seeds.p < 0.05
    assert found.claim == "no evidence"


def test_four_seeds_or_one_other_class_are_too_few() -> None:
    assert minority_contrast(CHANGES[:, :4], RARE, SUPPORTS).claim == "too few seeds"
    found = minority_contrast(CHANGES[:3], RARE[:3], SUPPORTS[:3])
    assert found.p_classes is None and found.claim == "no evidence"


def test_classes_that_are_all_alike() -> None:
    flat = np.zeros((4, 5))
    rare = np.array([True, False, False, False])
    assert minority_contrast(flat, rare, [25] * 4).claim == "no evidence"
    flat[0] = -0.2
    assert minority_contrast(flat, rare, [25] * 4).claim == "the minority loses more"
