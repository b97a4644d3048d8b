"""The contract of registries, held by each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest

from orchestrator.errors import UnknownName
from orchestrator.pruning.allocation import ALLOCATIONS, SCOPES
from orchestrator.pruning.criteria import CRITERIA
from orchestrator.pruning.penalties import PENALTIES
from orchestrator.pruning.regrow import REGROW
from orchestrator.pruning.schedules import SCHEDULES
from orchestrator.pruning.statistics import STATISTICS
from orchestrator.pruning.structure import NORMS
from orchestrator.registry import Registry
from orchestrator.settings import Optimizer
from orchestrator.tasks.metrics import METRICS
from orchestrator.training.optimizers import OPTIMIZERS
from tests.contracts.registry import REGISTRY_CHECKS

REGISTRIES: list[Registry[Any]] = [
    *[CRITERIA, SCOPES, ALLOCATIONS, SCHEDULES, NORMS, PENALTIES, REGROW, STATISTICS],
    *[OPTIMIZERS, METRICS],
]


@pytest.mark.parametrize("check", REGISTRY_CHECKS, ids=lambda check: str(check.__name__))
@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: str(registry.kind))
def test_contract(registry: Registry[Any], check: Callable[[Registry[Any]], None]) -> None:
    check(registry)


def test_the_contract_has_teeth() -> None:
    registry: Registry[Any] = Registry("thing")
    registry.register("undocumented")(lambda: None)
    caught = []
    for check in REGISTRY_CHECKS:
        try:
            check(registry)
        except AssertionError:
            caught.append(check.__name__)
    assert caught == ["every_entry_says_in_one_line_what_it_is"]


def test_a_users_function_is_bound_in_this_process_and_listed_nowhere() -> None:
    registry: Registry[Any] = Registry("thing")
    registry.register("one")(lambda: 1)
    with pytest.raises(UnknownName):
        registry["mine:two"]
    registry.bind("mine:two", lambda: 2)
    assert registry["mine:two"].function() == 2
    registry.bind("mine:two", lambda: 3)
    assert registry["mine:two"].function() == 3
    assert registry.names == ["one"] and "mine:two" not in registry


def test_a_study_can_name_every_optimizer() -> None:
    assert set(get_args(Optimizer)) == set(OPTIMIZERS.names)
