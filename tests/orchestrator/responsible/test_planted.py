"""Planted truths: rare digits pay for the pruning and the account says so; where none is rare, none is said to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import Study, StudySpec
from orchestrator.pools.local import LocalPool
from orchestrator.responsible.account import account
from orchestrator.responsible.across import Contrast, minority_contrast
from orchestrator.responsible.words import leads

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "responsible.toml"
RARE = ["8", "9"]


def judged(folder: Path, share: float, seeds: tuple[int, ...], **train: Any) -> dict[str, Any]:
    """The account of the example at 95 %, with `share` of the rows of 8 and 9 left."""
    plain = StudySpec.load(EXAMPLE).model_dump(exclude_defaults=True)
    plain |= {"trials": 1, "seeds": seeds, "train": plain["train"] | train}
    plain["task_params"] = {"minority": [8, 9], "minority_share": share}
    study = Study(StudySpec(**plain), folder)
    assert study.run(LocalPool()).done == 1
    found = account(study)
    assert found["chosen"]["sparsity"] == pytest.approx(0.95, abs=1e-4)
    return found


def contrast(found: dict[str, Any]) -> Contrast:
    """Of the digits 8 and 9, rare or not."""
    rows = {(row["group"], row["seed"]): row["change"] for row in found["rows"]}
    digits, seeds = [str(digit) for digit in range(10)], sorted(found["chosen"]["seeds"])
    changes = np.array([[rows[digit, seed] for seed in seeds] for digit in digits])
    return minority_contrast(changes, np.array([digit in RARE for digit in digits]), [27] * 10)


def test_rare_digits_are_found_lost(tmp_path: Path) -> None:
    found = judged(tmp_path, 0.1, (0, 1), epochs=10)
    assert found["minority"]["classes"] == RARE
    assert found["minority"]["change"] < found["minority"]["change_of_others"] - 0.2
    assert found["minority"]["claim"] == "too few seeds"
    lost = {row["group"] for row in found["rows"] if row["verdict"] == "lost by pruning"}
    assert lost and lost <= set(RARE)


@pytest.mark.slow
def test_the_minority_loses_more_and_in_balanced_data_no_minority_does(tmp_path: Path) -> None:
    seeds = (0, 1, 2, 3, 4)
    found = judged(tmp_path / "rare", 0.1, seeds)
    assert found["minority"]["claim"] == "the minority loses more"
    assert found["minority"]["change"] < -0.28 and found["minority"]["change_of_others"] > -0.1
    assert any(line.startswith("The minority loses more: the rare classes (8, 9)") for line in leads(found))
    lost = {row["group"] for row in found["across_seeds"] if row["verdict"] == "lost by pruning"}
    assert set(RARE) <= lost

    control = judged(tmp_path / "balanced", 1.0, seeds)
    assert control["minority"] is None
    assert not any("rare" in line for line in leads(control))
    assert contrast(found).claim == "the minority loses more"
    assert contrast(control).claim == "no evidence"


def test_a_public_network_gives_up_one_digit_before_the_mean_shows_it(tmp_path: Path) -> None:
    space = {"criterion": "magnitude", "scope": "global", "sparsity": [0.8], "retrain": "none"}
    spec = StudySpec(name="public", task="mnist-pretrained", trials=1, sampler="grid", train={"epochs": 0}, space=space)
    study = Study(spec, tmp_path)
    study.run(LocalPool())
    found = account(study)
    chosen, worst = found["chosen"], min(found["rows"], key=lambda row: float(row["change"]))
    assert chosen["dense"] - chosen["pruned"] < 0.03
    assert worst["change"] < -0.2 and worst["verdict"] == "lost by pruning"
    said = leads(found)[0]
    assert said.startswith("At 80.0% sparse the mean accuracy falls by 2.8 points")
    assert f"class '{worst['group']}' falls by {-100 * worst['change']:.1f} points" in said


def test_a_search_finds_that_network_at_80_percent_with_no_digit_given_up(tmp_path: Path) -> None:
    plain = StudySpec.load(EXAMPLE.with_name("pretrained_mnist.toml")).model_dump(exclude_defaults=True)
    plain |= {"trials": 2, "space": plain["space"] | {"sparsity": [0.8]}}
    study = Study(StudySpec(**plain), tmp_path)
    assert study.run(LocalPool()).done == 2
    (found,) = study.front(["sparsity >= 0.8", "worst_class_accuracy >= 0.95"]).points
    assert found["params"]["retrain"] == "finetune" and found["test_worst_class_accuracy"] >= 0.95
    assert found["worst_class_accuracy"] > min(row["worst_class_accuracy"] for row in study.table().to_pylist()) + 0.2
