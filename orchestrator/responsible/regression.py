"""The class-accuracy model: what the change of a class goes with, over all classes and pruned models of a study.

Ordinary least squares of (pruned - dense accuracy) on sparsity, the class's dense accuracy, its share of the training
data and its complexity, and on the product of sparsity with each. It asks what Paganini (2020, "Prune Responsibly")
asks, by a specification of its own: its coefficients are not those of that paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

Floats = NDArray[np.float64]

LEAST_CLASSES = 20
"""With fewer classes what sets classes apart is not in the model: there are too few to tell it from the classes."""

LEAST_CLUSTERS = 20
"""Below it clustered errors come out too small, and the document says so."""

LEVEL = 0.05

METHOD = (
    "ordinary least squares, errors clustered by class and by run (data set, seed) "
    "(Cameron, Gelbach & Miller, 2011; cluster jackknife of MacKinnon, Nielsen & Webb, 2023)"
)


@dataclass(frozen=True, kw_only=True)
class Observations:
    """One row for each (pruned model, class), all columns of the same length (n,).

    Args:
        change: accuracy of the class, pruned - dense.
        sparsity: of the model.
        dense: the dense model's accuracy on the class.
        covariates: of the class, by name: the logarithm of its share, its complexity. May be empty.
        class_: the class, as a number.
        run: the (data set, seed), as a number.
    """

    change: Floats
    sparsity: Floats
    dense: Floats
    covariates: Mapping[str, Floats]
    class_: NDArray[np.int64]
    run: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One coefficient; the uncertain parts are None where there are no clusters to tell them from."""

    name: str
    coefficient: float
    error: float | None
    low: float | None
    high: float | None
    p: float | None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The fitted model.

    Args:
        terms: the intercept first, which is the mean change where all else is at its mean.
        rows: observations.
        clusters: how many there are, by "class" and "run".
        r_squared: share of the variance that is explained.
        means: what each regressor is centred at.
        notes: what the reader must know, in words.
    """

    terms: tuple[Term, ...]
    rows: int
    clusters: Mapping[str, int]
    r_squared: float
    means: Mapping[str, float]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The fit as plain data."""
        return {
            "of": "change = pruned - dense accuracy of a class",
            "method": METHOD,
            "terms": [vars(term) for term in self.terms],
            "rows": self.rows,
            "clusters": dict(self.clusters),
            "r_squared": self.r_squared,
            "centred_at": dict(self.means),
            "notes": list(self.notes),
        }


def fit(seen: Observations) -> Fit | None:
    """The class-accuracy model of the observations; None where there are too few to fit even sparsity.

    Regressors are centred at their means before they are multiplied, so that each main effect is the one at the mean of
    all else. One that does not vary is left out, and so is one that others determine. Errors are clustered two ways, by
    class and by run (Cameron, Gelbach & Miller, 2011), each way by leaving one cluster out at a time (MacKinnon,
    Nielsen & Webb, 2023), with Student's t of as many degrees of freedom as the fewer clusters less one; one way only
    where the other has a single cluster.
    """
    from statsmodels.regression.linear_model import OLS  # takes a second to import

    notes = [
        "dense accuracy is on both sides: chance alone makes classes that did well by luck fall, and its coefficient "
        "is too low for that"
    ]
    clusters = {"class": len(np.unique(seen.class_)), "run": len(np.unique(seen.run))}
    columns, means = _columns(seen, clusters["class"], notes)
    if len(seen.change) <= len(columns) or "sparsity" not in columns:
        return None
    design = np.column_stack(list(columns.values()))
    fitted = OLS(seen.change, design).fit()
    total = float(np.square(seen.change - seen.change.mean()).sum())
    degrees, covariance = _clustered(fitted, seen, clusters, notes)
    return Fit(
        terms=tuple(
            _term(name, float(coefficient), None if covariance is None else float(covariance[i, i]) ** 0.5, degrees)
            for i, (name, coefficient) in enumerate(zip(columns, fitted.params, strict=True))
        ),
        rows=len(seen.change),
        clusters=clusters,
        r_squared=1 - float(np.square(fitted.resid).sum()) / total if total else float("nan"),
        means=means,
        notes=tuple(notes),
    )


def _columns(seen: Observations, classes: int, notes: list[str]) -> tuple[dict[str, Floats], dict[str, float]]:
    """The design by column, without those that add nothing, and the means that were taken off."""
    given = {"sparsity": seen.sparsity, "dense": seen.dense}
    if classes >= LEAST_CLASSES:
        given |= seen.covariates
    elif seen.covariates:
        named = ", ".join(seen.covariates)
        notes.append(f"{classes} classes are too few for {named}: it takes {LEAST_CLASSES}")
    means = {name: float(values.mean()) for name, values in given.items()}
    centred = {name: values - means[name] for name, values in given.items()}
    wanted = {"intercept": np.ones_like(seen.change), **centred}
    wanted |= {
        f"sparsity x {name}": centred["sparsity"] * values for name, values in centred.items() if name != "sparsity"
    }
    columns: dict[str, Floats] = {}
    for name, values in wanted.items():
        if _adds(list(columns.values()), values):
            columns[name] = values
        else:
            notes.append(f"{name} is left out: it does not vary, or others determine it")
    return columns, {name: mean for name, mean in means.items() if name in columns}


def _adds(columns: Sequence[Floats], values: Floats) -> bool:
    """Whether a column is not, but for rounding, a combination of the others."""
    size = float(np.linalg.norm(values))
    if not columns:
        return size > 0
    others = np.column_stack(columns)
    left = values - others @ np.linalg.lstsq(others, values, rcond=None)[0]
    return bool(np.linalg.norm(left) > 1e-8 * max(size, 1e-8 * len(values) ** 0.5))


def _clustered(
    fitted: Any, seen: Observations, clusters: Mapping[str, int], notes: list[str]
) -> tuple[int, Floats | None]:
    """Degrees of freedom and covariance of the coefficients; no covariance where all is one cluster."""
    from statsmodels.stats.sandwich_covariance import cov_cluster

    by = {"class": seen.class_, "run": seen.run}
    several = [name for name, count in clusters.items() if count > 1]
    for name, count in clusters.items():
        if count == 1:
            notes.append(f"all is one {name}: errors are not clustered by it")
        elif count < LEAST_CLUSTERS:
            notes.append(f"{count} clusters by {name} are fewer than {LEAST_CLUSTERS}: errors may be too small")
    if not several:
        return 0, None
    try:
        # The plain two-way sandwich covers 0.89 to 0.92 with 30 or 40 classes, for class covariates above all.
        covariance = sum(cov_cluster(fitted, by[name], crv_type="cluster-jk") for name in several)
    except ValueError:
        notes.append("no errors: without one of the clusters the coefficients are not determined")
        return 0, None
    if len(several) > 1:
        cells = np.unique(np.column_stack(list(by.values())), axis=0, return_inverse=True)[1].ravel()
        covariance = covariance - cov_cluster(fitted, cells, crv_type="cluster")
    return min(clusters[name] for name in several) - 1, _positive(np.asarray(covariance), notes)


def _positive(covariance: Floats, notes: list[str]) -> Floats:
    """Two-way covariances may have negative eigenvalues, which become zero (Cameron, Gelbach & Miller, 2011)."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    if values.min() >= -1e-12 * max(values.max(), 0.0):
        return covariance
    notes.append("the two-way covariance had negative eigenvalues, which were set to zero: there are few clusters")
    return np.asarray((vectors * np.maximum(values, 0.0)) @ vectors.T)


def _term(name: str, coefficient: float, error: float | None, degrees: int) -> Term:
    if error is None or not np.isfinite(error) or error == 0:
        return Term(name=name, coefficient=coefficient, error=None, low=None, high=None, p=None)
    half = float(stdtrit(degrees, 1 - LEVEL / 2)) * error
    return Term(
        name=name,
        coefficient=coefficient,
        error=error,
        low=coefficient - half,
        high=coefficient + half,
        p=2 * float(stdtr(degrees, -abs(coefficient) / error)),
    )
