"""One state, one row: figures that can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from orchestrator.errors import NotFinite
from orchestrator.export.packed import packed_file
from orchestrator.measures.measure import curve_point, measure
from orchestrator.ops import Init, Prune
from orchestrator.outcome import OUTCOME_COLUMNS
from orchestrator.stages import Stages
from orchestrator.state import State
from orchestrator.tasks import Metric, Task
from orchestrator.tasks.load import LoadedTask, load
from orchestrator.tasks.source import Source, collect

X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 3.0]])
Y = torch.tensor([0, 1, 0, 0])


def stages(**given: Any) -> Stages:
    fields: dict[str, Any] = {"model": lambda: nn.Linear(2, 2), "train": (X, Y), "valid": (X, Y), **given}
    return Stages(LoadedTask(Task(**fields), Source(name="fake.py", module="fake", files={}, digest="0"), {}))


def identity(*masked: tuple[int, int]) -> State:
    """Predicts the larger input; the last of the four rows wrongly."""
    mask = torch.ones(2, 2, dtype=torch.bool)
    for place in masked:
        mask[place] = False
    return State(weights={"weight": torch.eye(2), "bias": torch.zeros(2)}, masks={"weight": mask}).masked()


def test_by_hand() -> None:
    found = measure(stages(test=(X[:2], Y[:2]), classes=["a", "b"]), identity((0, 1)))
    assert found["accuracy"] == 0.75
    assert found["test_accuracy"] == 1.0
    assert found["class_accuracy"] == pytest.approx([2 / 3, 1.0])
    assert found["worst_class_accuracy"] == pytest.approx(2 / 3)
    assert found["test_worst_class_accuracy"] == 1.0
    assert found["loss"] == pytest.approx(float(F.cross_entropy(X, Y)))
    assert found["test_loss"] == pytest.approx(float(F.cross_entropy(X[:2], Y[:2])))
    assert found["sparsity"] == 0.25
    assert found["layers"] == {"weight": [3, 4]}
    assert (found["nonzero_params"], found["total_params"]) == (5, 6)
    assert found["compression_ratio"] == 6 / 5
    assert (found["flops"], found["flops_effective"]) == (8, 6)
    assert found["theoretical_speedup"] == 8 / 6
    assert found["metrics"] == {}
    assert set(found) <= set(OUTCOME_COLUMNS)
    assert "latency_ms" not in found


def test_without_test_split_and_classes() -> None:
    found = measure(stages(), identity())
    assert not [name for name in found if name.startswith("test_") or "class" in name]
    assert found["sparsity"] == 0.0
    assert found["compression_ratio"] == 1.0
    assert found["theoretical_speedup"] == 1.0


@pytest.mark.parametrize("masked", range(11))
def test_sparsity_is_the_nearest_number_there_is(masked: int) -> None:
    room = stages(model=lambda: nn.Linear(2, 5, bias=False), train=(X, Y), valid=(X, Y))
    state = State(weights={"weight": torch.ones(5, 2)}, masks={"weight": (torch.arange(10) >= masked).reshape(5, 2)})
    found = measure(room, state.masked())
    assert found["sparsity"] == masked / 10  # 1 - 0.8 would be 0.19999999999999996
    assert found["nonzero_params"] == 10 - masked


def test_nothing_left() -> None:
    found = measure(stages(), identity((0, 0), (0, 1), (1, 0), (1, 1)))
    assert found["sparsity"] == 1.0
    assert found["nonzero_params"] == 2  # the biases
    assert found["theoretical_speedup"] == float("inf")


def test_a_metric_to_be_minimised_and_one_of_the_users_own() -> None:
    def error(outputs: Tensor, targets: Tensor) -> float:
        return float((outputs.argmax(1) != targets).float().mean())

    room = stages(metrics={"error": Metric(error, "minimise"), "accuracy": "accuracy"}, test=(X[:2], Y[:2]))
    found = measure(room, identity())
    assert found["metrics"] == {"error": 0.25, "test_error": 0.0}
    assert found["accuracy"] == 0.75
    assert curve_point(room.model_of(identity()), room.loaded) == [found["loss"], 0.25]


def test_bytes_are_those_of_the_smaller_artefact() -> None:
    state = replace(identity((0, 1)), optimizer={"exp_avg/weight": torch.ones(2, 2)}, position=7)
    packed, full = len(packed_file(replace(state, optimizer={}))), len(save(dict(state.weights)))
    assert full < packed, "so small a tensor is not worth its mask"
    assert measure(stages(), state)["bytes"] == full


def test_a_loss_that_is_nan_is_no_outcome() -> None:
    state = identity()
    spoilt = replace(state, weights={**state.weights, "bias": torch.tensor([float("nan"), 0.0])})
    with pytest.raises(NotFinite, match=r"^the validation loss is nan$"):
        measure(stages(), spoilt)


def test_the_model_keeps_its_modes_for_a_curve() -> None:
    room = stages(model=lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)))
    model = room.model().train()
    model[0].eval()  # type: ignore[index]
    assert curve_point(model, room.loaded) == curve_point(model, room.loaded)
    assert [module.training for module in model.modules()] == [True, False, True]


def test_lenet() -> None:
    room = Stages(load(collect("mnist", Path()), {}))
    dense = room.run(Init(seed=0), [])
    found = measure(room, dense)
    assert found["flops"] == found["flops_effective"] == 2 * 266_200
    assert found["total_params"] == found["nonzero_params"] == 266_610
    assert found["bytes"] > 4 * 266_610
    op = Prune(criterion="magnitude", scope="layer", rate=0.2, factors=(("out.weight", 0.5),))
    pruned = measure(room, room.run(op, [dense]))
    assert pruned["layers"] == {
        "fc1.weight": [188_160, 235_200],
        "fc2.weight": [24_000, 30_000],
        "out.weight": [900, 1_000],
    }
    assert pruned["sparsity"] == 53_140 / 266_200
    assert pruned["flops_effective"] == 2 * 213_060
    assert pruned["nonzero_params"] == 213_470
    assert pruned["theoretical_speedup"] == 266_200 / 213_060
    # Three quarters of a bit for each weight, at a fifth gone, in place of the four bytes of those that are.
    assert found["bytes"] - pruned["bytes"] == pytest.approx(4 * 53_140 - 0.75 * 266_200 / 8, abs=1_000)


def test_latency_is_measured_on_request() -> None:
    found = measure(stages(), identity(), latency=True)
    assert found["latency_ms"] > 0
