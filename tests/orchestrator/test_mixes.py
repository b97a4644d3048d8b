"""Which choices go together: everything that makes sense is let through, the rest is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import PlanError
from orchestrator.mixes import resolve, warnings
from orchestrator.pruning.criteria import CRITERIA
from orchestrator.settings import PruneSettings, Settings, TrainSettings

COSINE = {"lr_schedule": "cosine"}


def mixed(prune: dict[str, Any] | None = None, **params: Any) -> Settings:
    return resolve(TrainSettings(), PruneSettings(**prune or {}), params)


@pytest.mark.parametrize(
    ("prune", "params"),
    [
        ({}, {"structure": "2:4"}),
        *[({}, {"structure": "2:4", "scope": scope}) for scope in ("layer", "global", "row")],
        *[({}, {"structure": "2:4", "phase": phase}) for phase in ("before", "during")],
        ({}, {"structure": "1:4", "criterion": "sparsegpt"}),
        ({}, {"structure": "4x1", "unit_sparsity": 0.5, "scope": "global", "norm": "l1"}),
        ({}, {"structure": "head", "rate": 0.25, "rounds": 3, "norm": "mean", "criterion": "taylor"}),
        ({}, {"structure": "channel", "criterion": "obs", "flops_budget": 0.4}),
        ({}, {"structure": "channel", "unit_sparsity": 0.5, "allocation": "given", "layers.a.sparsity": 0.5}),
        ({}, {"structure": "layer", "params_budget": 0.8, "rounds": 3, "schedule": "cubic"}),
        ({}, {"structure": "filter", "threshold": 0.1}),
        ({"threshold_any_criterion": True}, {"structure": "filter", "threshold": 0.1, "criterion": "batchnorm"}),
        ({}, {"threshold": 0.5, "threshold_unit": "std", "scope": "row"}),
        ({}, {"criterion": "wanda", "scope": "row", "sparsity": 0.5}),
        ({}, {"scope": "row", "sparsity": 0.5, "allocation": "erk"}),
        ({}, {"scope": "row", "rate": 0.5, "layers.a.rate": 0.2}),
        ({}, {"criterion": "skeletonization", "structure": "2x2", "rate": 0.5}),
        ({}, {"criterion": "synflow", "scope": "global", "sparsity": 0.9, "rounds": 1000}),
        ({}, {"sparsity": 0.9, "phase": "during", "prune_every_steps": 100, "schedule": "cubic"}),
        ({}, {"criterion": "movement", "sparsity": 0.5, "phase": "during", "prune_every": 0.5}),
        ({}, {"rate": 0.9, "phase": "during", "regrow": "all", "prune_every": 1}),
        ({}, {"criterion": "random", "sparsity": 0.9, "allocation": "erk", "phase": "before", "regrow": "rigl"}),
        ({}, {"rate": 0.5, "only": "fc1", "retrain": "none"}),
    ],
)
def test_legal(prune: dict[str, Any], params: dict[str, Any]) -> None:
    assert mixed(prune, **params).choices.structure == params.get("structure", "weight")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "exactly one of rate, sparsity, unit_sparsity, threshold, flops_budget, params_budget; given: none"),
        ({"flops_budget": 0.5, "params_budget": 0.5}, "given: flops_budget and params_budget"),
        ({"structure": "2:4", "threshold": 0.1}, "'2:4' says itself how much stays, in one round; given: threshold"),
        ({"structure": "2:4", "rounds": 2}, "in one round; given: rounds"),
        ({"structure": "2:4", "phase": "during", "prune_every": 1}, "in one round; given: prune_every"),
        ({"structure": "2:4", "allocation": "erk"}, "keeps as much everywhere"),
        ({"structure": "2:4", "norm": "l1"}, "structure '2:4' has none"),
        ({"structure": "4:2", "rate": 0.1}, "unknown structure '4:2'"),
        ({"structure": "neurons", "rate": 0.1}, "unknown structure 'neurons'; did you mean 'neuron'?"),
        ({"norm": "l3", "structure": "filter", "rate": 0.1}, "unknown norm 'l3'"),
        ({"norm": "l1", "rate": 0.1}, "structure 'weight' has none"),
        (
            {"structure": "filter", "scope": "row", "rate": 0.1},
            "scope 'row' ranks single weights, not structure 'filter'",
        ),
        (
            {"structure": "filter", "criterion": "sparsegpt", "rate": 0.1},
            "legal: structure 'weight' or N:M, not 'filter'",
        ),
        ({"structure": "layer", "criterion": "skeletonization", "rate": 0.1}, "nothing reads a whole layer"),
        ({"structure": "filter", "sparsity": 0.5, "allocation": "erk"}, "legal here: uniform, given"),
        (
            {"structure": "filter", "sparsity": 0.5, "allocation": "given", "layers.a.sparsity": 0.5},
            "legal: unit_sparsity",
        ),
        ({"structure": "filter", "threshold": 0.5, "threshold_unit": "std"}, "legal: 'absolute'"),
        ({"unit_sparsity": 0.5}, "unit_sparsity counts units, but structure is 'weight'"),
        ({"flops_budget": 0.5, "scope": "row"}, "legal scopes: layer, global"),
        ({"flops_budget": 0.5, "layers.a.rate": 0.5}, "not with a flops_budget"),
        ({"flops_budget": 1.0}, "flops_budget: must be less than 1"),
        ({"criterion": "movement", "rate": 0.5, "phase": "before"}, "nothing is trained before the pruning"),
        ({"criterion": "movement", "rate": 0.5, "epochs": 0}, "nothing is trained before the pruning"),
        ({"rate": 0.5, "prune_every": 1}, "prune_every belongs to phase 'during'"),
        ({"rate": 0.5, "phase": "during", "prune_every": 1, "rounds": 2}, "legal: one of them"),
        ({"rate": 0.5, "phase": "during", "prune_every": 1, "prune_every_steps": 9}, "legal: one of them"),
        ({"rate": 0.5, "phase": "during", "prune_begin": 0}, "must lie inside training"),
        ({"rate": 0.5, "regrow": "set"}, "regrow 'set' belongs to phase 'before', not 'after'"),
        ({"rate": 0.5, "regrow": "rig"}, "unknown regrowth 'rig'; did you mean 'rigl'?"),
        ({"rate": 0.5, "regrow": "all", "phase": "before"}, "regrow 'all' belongs to phase 'during', not 'before'"),
        ({"rate": 0.5, "regrow": "all", "phase": "during"}, "legal: rounds = 2 or more"),
        ({"rate": 0.5, "regrow": "set", "phase": "before", "structure": "filter"}, "legal: 'weight'"),
        ({"rate": 0.5, "penalty": "l1"}, "penalty 'l1' of strength 0 does nothing"),
        ({"rate": 0.5, "penalty": "l3"}, "unknown penalty 'l3'"),
    ],
)
def test_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        mixed(**params)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@given(
    criterion=st.sampled_from(CRITERIA.names),
    structure=st.sampled_from(["weight", "neuron", "filter", "channel", "head", "layer", "2x2", "2:4"]),
    scope=st.sampled_from(["layer", "global", "row"]),
    how=st.sampled_from(["rate", "sparsity", "unit_sparsity", "threshold", "flops_budget", "params_budget", ""]),
    phase=st.sampled_from(["before", "during", "after"]),
)
def test_the_rules_in_full(criterion: str, structure: str, scope: str, how: str, phase: str) -> None:
    facts = CRITERIA[criterion].facts
    single = structure in ("weight", "2:4")
    legal = (
        (how == "") == (structure == "2:4")
        and (scope != "row" or (single and not how.endswith("budget")))
        and not (how == "unit_sparsity" and single)
        and not (how == "threshold" and not facts.get("magnitude_like"))
        and not ("solve" in facts and not single)
        and not (facts.get("reads") and structure == "layer")
        and not (criterion == "movement" and phase == "before")
    )
    params = {"criterion": criterion, "structure": structure, "scope": scope, "phase": phase} | (
        {how: 0.5} if how else {}
    )
    try:
        mixed(**params)
    except PlanError:
        assert not legal, params
    else:
        assert legal, params


@pytest.fixture
def user_criterion() -> Iterator[str]:
    """The name of a user's criterion, forgotten after the test."""
    yield "mine:criterion"
    CRITERIA._of_users.pop("mine:criterion", None)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda scores: scores, "must take the tensor to score as its first parameter, called `weight`"),
        (lambda weight, loss: weight, "has a parameter 'loss' without a default, which nobody gives it"),
        (max, "criterion 'mine:criterion'"),
    ],
)
def test_a_users_function_that_is_no_criterion(user_criterion: str, function: Any, message: str) -> None:
    CRITERIA.bind(user_criterion, function)
    with pytest.raises(PlanError) as caught:
        mixed(criterion=user_criterion, rate=0.5)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_users_criterion_with_what_it_needs(user_criterion: str) -> None:
    CRITERIA.bind(user_criterion, lambda weight, gradient, power=2.0: weight * gradient**power)
    found = mixed(criterion=user_criterion, rate=0.5, **{"criteria.mine:criterion.examples": 7})
    assert found.criterion_parameters == {"examples": 7}


@pytest.mark.parametrize(
    ("prune", "params", "said"),
    [
        ({}, {"criterion": "synflow", "rate": 0.5}, ["criterion 'synflow' is made for untrained networks"]),
        ({}, {"criterion": "synflow", "rate": 0.5, "phase": "before"}, []),
        ({}, {"rate": 0.5, "rounds": 2, "retrain": "none"}, ["several rounds without retraining between them"]),
        ({"recalibrate": 64}, {"rate": 0.5, "rounds": 2, "retrain": "none"}, []),
        ({}, {"criterion": "lamp", "rate": 0.5}, ["criterion 'lamp' compares layers: in scope 'layer' it ranks as"]),
        (
            {},
            {"criterion": "lamp", "structure": "2:4", "scope": "row"},
            ["in scope 'row' it ranks as 'magnitude' does"],
        ),
        ({}, {"criterion": "lamp", "rate": 0.5, "scope": "global"}, []),
        ({}, {"criterion": "lamp", "rate": 0.5, "structure": "filter"}, []),
    ],
)
def test_legal_but_hardly_meant(prune: dict[str, Any], params: dict[str, Any], said: list[str]) -> None:
    found = list(warnings(mixed(prune, **params)))
    assert len(found) == len(said) and all(part in line for part, line in zip(said, found, strict=True))
