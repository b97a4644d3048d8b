"""What each pruning cost and what retraining gave back is measured as the pruning itself would have found it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from orchestrator import Study
from orchestrator.export.lineage import prunings, rows
from orchestrator.measures.accuracy import evaluate
from orchestrator.ops import Prune
from orchestrator.pools.local import LocalPool
from orchestrator.report.lineage import picture
from orchestrator.stages import Stages
from orchestrator.state import from_bytes
from orchestrator.tasks.load import load
from orchestrator.tasks.source import collect
from tests.orchestrator.pools import small


def finished(folder: Path, **space: Any) -> tuple[Study, Stages]:
    root = small.write_task(folder)
    study = Study(small.spec(trials=1, space=space), root / "store", root=root)
    assert study.run(LocalPool()).done == 1
    return study, Stages(load(collect("my_task.py", root), {}, root))


def history(study: Study, stages: Stages, round_: int) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The prunings of the model after so many rounds, and the ledger's rows by round."""
    by_round = {row["round"]: row for row in study.table().to_pylist()}
    header = study.store.states.header(by_round[round_]["key"])
    assert header is not None
    return prunings(json.loads(header["lineage"]), study.store.states, stages), by_round


@pytest.mark.parametrize("retrain", ["finetune", "rewind"])
def test_down_by_pruning_and_up_by_retraining(tmp_path: Path, retrain: str) -> None:
    study, stages = finished(tmp_path, rate=0.5, rounds=3, retrain=retrain)
    found, by_round = history(study, stages, 3)
    assert (found["metric"], found["split"], found["left_out"]) == ("accuracy", "valid", 0)
    assert len(found["prunings"]) == 3
    for number, one in enumerate(found["prunings"], start=1):
        assert one["before"] == by_round[number - 1]["accuracy"]
        assert one["retrained"] == by_round[number]["accuracy"]
        assert one["sparsity"] == by_round[number]["sparsity"]
        assert one["removed"] == one["kept_before"] - one["kept"] > 0 and one["of"] == 56
        data = study.store.states.read(by_round[number - 1]["key"])
        assert data is not None
        state = stages.run(Prune(criterion="magnitude", scope="layer", rate=0.5), [from_bytes(data)])
        model, loaded = stages.model_of(state.masked()), stages.loaded
        measured = evaluate(model, loaded.valid, loaded.task.loss, loaded.metrics)["accuracy"]
        assert one["pruned"] == measured
        assert one["cost"] == one["pruned"] - one["before"] and one["gave_back"] == one["retrained"] - one["pruned"]
        assert one["how"] == {"criterion": "magnitude", "scope": "layer", "structure": "weight", "rate": 0.5} or {
            "criterion",
            "scope",
            "rate",
        } <= set(one["how"])
    assert [row["pruning"] for row in rows(found)] == [1, 2, 3]
    assert rows(found)[0]["weights removed"] == "28"


def test_without_retraining_nothing_is_given_back(tmp_path: Path) -> None:
    study, stages = finished(tmp_path, sparsity=0.5, retrain="none")
    found, by_round = history(study, stages, 1)
    (one,) = found["prunings"]
    assert one["pruned"] == by_round[1]["accuracy"] and one["retrained"] is None and one["gave_back"] is None
    assert rows(found)[0]["retrained"] == "not measured"


def test_what_is_gone_from_the_store_is_not_made_up(tmp_path: Path) -> None:
    study, stages = finished(tmp_path, rate=0.5, rounds=2, retrain="finetune")
    _, by_round = history(study, stages, 2)
    header = study.store.states.header(by_round[2]["key"])
    assert header is not None
    study.store.states.delete(by_round[0]["key"])
    first, second = prunings(json.loads(header["lineage"]), study.store.states, stages)["prunings"]
    assert first["before"] is None and first["cost"] is None and first["pruned"] is None and first["removed"] is None
    assert second["cost"] is not None


def test_a_criterion_that_moves_weights_is_not_measured_by_its_mask_alone(tmp_path: Path) -> None:
    study, stages = finished(tmp_path, criterion="obs", sparsity=0.5, retrain="finetune")
    (one,) = history(study, stages, 1)[0]["prunings"]
    assert one["pruned"] is None and one["before"] is not None and one["retrained"] is not None


def test_the_card_has_the_table_and_the_folder_the_picture(tmp_path: Path) -> None:
    study, _ = finished(tmp_path, rate=0.5, rounds=2, retrain="finetune")
    key = study.front().points[0]["key"]
    folder = study.fetch(key, tmp_path / "out")
    card = json.loads((folder / "card.json").read_text())
    assert card["prunings"]["prunings"] and "lineage.svg" in card["files"] and "lineage" not in card["bytes"]
    drawn = ElementTree.fromstring((folder / "lineage.svg").read_bytes())
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"


def test_a_picture_has_a_place_for_each_measured_model() -> None:
    one = {"before": 0.9, "pruned": 0.5, "retrained": 0.8, "sparsity": 0.5}
    two = {"before": 0.8, "pruned": None, "retrained": 0.7, "sparsity": 0.75}
    text = picture({"metric": "accuracy", "split": "valid", "prunings": [one, two]}, "The <way>").decode()
    drawn = ElementTree.fromstring(text)
    assert len(drawn.findall(".//{*}circle")) == 5 and len(drawn.findall(".//{*}rect")) == 2
    heights = [float(dot.get("cy", "nan")) for dot in drawn.findall(".//{*}circle")]
    assert heights[0] < heights[2] == heights[3] < heights[4] < heights[1], "more accuracy stands higher"
    assert "The &lt;way&gt;" in text and "pruned (red)" in text
    empty = picture({"metric": "accuracy", "split": "valid", "prunings": []}, "dense").decode()
    assert "nothing on the way was measured" in empty
