"""Where a study's tickets agree, as it is told: every pair and layer beside chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from orchestrator import Study
from orchestrator.pools.local import LocalPool
from orchestrator.tickets.packed import pack
from orchestrator.tickets.similarity import agreement
from orchestrator.tickets.study import agreement as told
from orchestrator.tickets.study.structure import Body
from orchestrator.tickets.study.table import read
from tests.orchestrator.pools import small

SPACE = {"rate": 0.5, "rounds": 1, "retrain": "rewind", "searches": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_task(tmp_path_factory.mktemp("root"))


def run(root: Path, space: dict[str, Any], **fields: Any) -> Study:
    spec = small.spec(**{"trials": 1, "sampler": "grid", "space": space, "seeds": [0, 1]} | fields)
    study = Study(spec, f"memory://{uuid4().hex}", root=root)
    assert study.run(LocalPool()).failed == 0
    return study


@pytest.fixture(scope="module")
def by_criterion(root: Path) -> Study:
    return run(root, SPACE | {"vary": "criterion"}, tickets={"criteria": ["magnitude", "taylor", "random"]})


def test_each_pair_of_criteria_stands_beside_chance(by_criterion: Study) -> None:
    found = told.agreements(by_criterion)
    (each,) = found["sets"]
    assert each["labels"] == ["magnitude", "taylor", "random"] and each["seeds"] == 2
    assert list(each["layers"]) == ["", "0.weight", "2.weight"]
    pairs = each["layers"][""]["pairs"]
    assert [(pair["one"], pair["other"]) for pair in pairs] == [
        ("magnitude", "taylor"),
        ("magnitude", "random"),
        ("taylor", "random"),
    ]
    (compared,) = told.comparable(by_criterion, list(read(by_criterion)))
    alone = [agreement([pack(masks) for masks in seed]).overall for seed in compared.by_seed]
    assert pairs[0]["hamming"] == pytest.approx(sum(one.hamming[0, 1] for one in alone) / 2)
    assert pairs[0]["z"] == pytest.approx(sum(one.z[0, 1] for one in alone) / 2)
    assert pairs[0]["shuffled_jaccard"] == pytest.approx(pairs[0]["chance_jaccard"], abs=0.05)
    assert each["layers"][""]["k_of_n"]["share"][0] > each["layers"][""]["k_of_n"]["share"][2]


def test_the_table_has_a_row_for_each_pair_and_layer(by_criterion: Study) -> None:
    document = told.agreements(by_criterion)
    rows = told.rows(document)
    assert len(rows) == 9 and [row["layer"] for row in rows[::3]] == ["all", "0", "2"]
    assert rows[0]["masks"] == "magnitude, taylor" and rows[0]["of"] == "3 searches of one ticket"
    assert any(line.startswith("Kept by at least k of 3") and "chance: k = 1 " in line for line in told.says(document))


def test_searches_on_tasks_are_called_by_them(root: Path) -> None:
    tasks = [{"task": "my_task.py", "name": "spread", "task_params": {"spread": 2.0}}]
    study = run(root, SPACE | {"vary": "tasks", "searches": 2}, tickets={"tasks": tasks})
    (each,) = told.agreements(study)["sets"]
    assert each["labels"] == ["my_task.py", "spread"]


def test_without_masks_to_compare_it_says_what_has_some(root: Path) -> None:
    study = run(root, SPACE | {"searches": 1})
    assert told.says(told.agreements(study))[0].startswith("There are no masks to compare")
    assert told.rows(told.agreements(study)) == []


def masks(*kept: Sequence[int]) -> tuple[dict[str, torch.Tensor], ...]:
    return tuple({"fc.weight": torch.tensor([rows] * 2).bool()} for rows in kept)


def test_canary_weights_of_constant_inputs_that_agree_anyway_are_left_out() -> None:
    """Two masks that agree on the two constant inputs and nowhere else."""
    compared = told.Compared(
        name="", title="two", labels=("a", "b"), by_seed=(masks([1, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 1]),)
    )
    body = Body(
        chain=("fc.weight",),
        shapes={"fc.weight": (2, 6)},
        geometry=(6,),
        constant=torch.tensor([1, 1, 0, 0, 0, 0]).bool(),
    )
    counted = told.mean_agreement(compared)["fc.weight"]["jaccard"][0, 1]
    left = told.mean_agreement(told._varying(compared, body))["fc.weight"]["jaccard"][0, 1]
    assert counted == pytest.approx(1 / 3) and left == 0
