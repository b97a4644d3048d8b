"""Planted coefficients are recovered, and their intervals cover what they promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from statsmodels.regression.linear_model import OLS

from orchestrator.responsible.regression import Observations, fit

PLANTED = {
    "intercept": -0.1,
    "sparsity": -0.3,
    "dense": -0.5,
    "log share": 0.05,
    "complexity": -0.02,
    "sparsity x dense": 0.4,
    "sparsity x log share": 0.2,
    "sparsity x complexity": -0.1,
}


def planted(seed: int, classes: int = 32, runs: int = 24, noise: float = 1.0) -> Observations:
    """Models of two sparsities; classes and runs have effects of their own, which make the rows of each alike."""
    draw = np.random.default_rng(seed)
    class_, run, sparsity = (
        each.ravel() for each in np.meshgrid(range(classes), range(runs), [0.5, 0.9], indexing="ij")
    )
    covariates = {"log share": draw.normal(0, 0.7, classes)[class_], "complexity": draw.normal(size=classes)[class_]}
    dense = 0.9 + 0.05 * draw.normal(size=classes)[class_] + 0.03 * draw.normal(size=len(class_))
    centred = {n: v - v.mean() for n, v in {"sparsity": sparsity, "dense": dense, **covariates}.items()}
    change = np.full(len(class_), PLANTED["intercept"])
    for name, values in centred.items():
        change += PLANTED[name] * values
        if name != "sparsity":
            change += PLANTED[f"sparsity x {name}"] * centred["sparsity"] * values
    effects = draw.normal(size=(2, classes))[:, class_], draw.normal(size=(2, runs))[:, run]
    change += noise * (0.05 * effects[0][0] + 0.03 * effects[1][0] + 0.05 * draw.normal(size=len(class_)))
    change += noise * centred["sparsity"] * (0.1 * effects[0][1] + 0.1 * effects[1][1])
    return Observations(change=change, sparsity=sparsity, dense=dense, covariates=covariates, class_=class_, run=run)


def coefficients(seen: Observations) -> Mapping[str, float]:
    found = fit(seen)
    assert found is not None
    return {term.name: term.coefficient for term in found.terms}


def test_without_noise_the_planted_coefficients_come_back_exactly() -> None:
    assert coefficients(planted(0, noise=0)) == pytest.approx(PLANTED, abs=1e-9)


def test_planted_coefficients_are_recovered_at_nominal_coverage() -> None:
    studies = 200
    covered = dict.fromkeys(PLANTED, 0)
    naive = dict.fromkeys(PLANTED, 0)
    for seed in range(studies):
        seen = planted(seed)
        found = fit(seen)
        assert found is not None
        for term in found.terms:
            assert term.low is not None and term.high is not None
            covered[term.name] += term.low <= PLANTED[term.name] <= term.high
        if seed % 4 == 0:
            for name, (low, high) in zip(PLANTED, _unclustered(seen), strict=True):
                naive[name] += low <= PLANTED[name] <= high
    # 0.95 of 200, and what chance may add or take in one of a thousand.
    assert all(0.89 <= count / studies <= 0.995 for count in covered.values()), covered
    assert 0.93 <= sum(covered.values()) / (studies * len(covered)) <= 0.98
    # The canary: errors that know of no clusters are far too small.
    assert naive["log share"] / 50 < 0.7 and naive["sparsity"] / 50 < 0.7


def _unclustered(seen: Observations) -> list[tuple[float, float]]:
    centred = {n: v - v.mean() for n, v in {"sparsity": seen.sparsity, "dense": seen.dense, **seen.covariates}.items()}
    columns = [np.ones_like(seen.change), *centred.values()]
    columns += [centred["sparsity"] * values for name, values in centred.items() if name != "sparsity"]
    return [(low, high) for low, high in OLS(seen.change, np.column_stack(columns)).fit().conf_int().tolist()]


def test_class_covariates_want_twenty_classes() -> None:
    found = fit(planted(0, classes=19))
    assert found is not None
    assert [term.name for term in found.terms] == ["intercept", "sparsity", "dense", "sparsity x dense"]
    assert "19 classes are too few for log share, complexity: it takes 20" in found.notes
    assert "19 clusters by class are fewer than 20: errors may be too small" in found.notes
    enough = fit(planted(0, classes=20))
    assert enough is not None and len(enough.terms) == 8
    assert not any("fewer" in note for note in enough.notes)


def test_one_seed_is_no_cluster() -> None:
    found = fit(planted(0, runs=1))
    assert found is not None and found.clusters == {"class": 32, "run": 1}
    assert "all is one run: errors are not clustered by it" in found.notes
    assert all(term.error is not None for term in found.terms)


def test_all_of_one_cluster_has_coefficients_and_no_errors() -> None:
    seen = planted(0, classes=1, runs=1)
    longer = {n: np.tile(getattr(seen, n), 3) for n in ("change", "sparsity", "dense", "class_", "run")}
    found = fit(replace(seen, **longer, covariates={}))
    assert found is not None and all(term.error is None and term.p is None for term in found.terms)


def test_a_regressor_that_others_determine_is_left_out() -> None:
    seen = planted(0)
    twice = {**seen.covariates, "the same again": 2 * seen.covariates["complexity"]}
    found = fit(replace(seen, covariates=twice))
    assert found is not None and "the same again" not in {term.name for term in found.terms}
    assert "the same again is left out: it does not vary, or others determine it" in found.notes


def test_one_sparsity_is_nothing_to_fit() -> None:
    seen = planted(0)
    assert fit(replace(seen, sparsity=np.full_like(seen.sparsity, 0.5))) is None


def test_as_plain_data() -> None:
    found = fit(planted(0))
    assert found is not None
    plain = found.as_json()
    assert plain["rows"] == 32 * 24 * 2 and plain["clusters"] == {"class": 32, "run": 24}
    assert set(plain["terms"][0]) == {"name", "coefficient", "error", "low", "high", "p"}
    assert 0 < plain["r_squared"] < 1
