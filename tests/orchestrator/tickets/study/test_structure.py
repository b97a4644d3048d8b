"""Structure in a study's tickets: what is a chain, what is left out, and figures that can be counted by eye."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.spec import StudySpec
from orchestrator.state import State, to_bytes
from orchestrator.study import Study
from orchestrator.tasks.data import InMemory
from orchestrator.tasks.load import load
from orchestrator.tasks.source import collect
from orchestrator.tickets.study.structure import Body, NoChain, body, chain, geometry, look, rows, says, structure
from orchestrator.tickets.study.table import Found
from tests.orchestrator.pools import small

IMAGE = torch.zeros(1, 1, 8, 8)


class Plain(nn.Module):
    """As users write them: functions, pooling and a view that asks for the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8 * 16, 3)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv(x)), 2)
        return F.log_softmax(self.out(x.view(x.size(0), -1)), dim=1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return cast(Tensor, self.second(x + F.relu(self.first(x))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(F.relu(self.layer(x.flatten(1)))))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x.flatten(1))) if x.sum() > 0 else x


def test_the_layers_of_a_chain_come_in_the_order_of_the_signal() -> None:
    assert chain(Plain(), IMAGE) == ("conv.weight", "out.weight")
    sequential = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    assert chain(sequential, IMAGE) == ("1.weight", "4.weight")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Residual(), "read by 2 operations"),
        (Twice(), "passed more than once"),
        (Branching(), "cannot be traced"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4)), "convolution in groups"),
        (nn.Sequential(nn.Linear(8, 4), nn.Flatten(), nn.Linear(32, 3)), "over many places"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Softmax(1), nn.Linear(5, 3)), "'2' is a Softmax"),
        (nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 3)), "'1' is a LayerNorm"),
        (nn.Flatten(), "no linear layer"),
    ],
)
def test_what_is_no_chain_says_why(model: nn.Module, reason: str) -> None:
    with pytest.raises(NoChain, match=reason):
        chain(model, IMAGE)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64,), (8, 8)), ((784,), (28, 28)), ((40,), (40,)), ((9,), (9,)), ((6, 5), (6, 5)), ((3, 8, 8), (3, 8, 8))],
)
def test_inputs_lie_as_the_example_does(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert geometry(shape) == expected


def test_inputs_that_never_change_are_constant_even_where_they_are_not_zero() -> None:
    inputs = torch.tensor([[1.0, 5.0, 0.0, 2.0], [2.0, 5.0, 0.0, 1.0]])
    loaded = SimpleNamespace()
    found = body(cast(Any, stages_of(loaded, inputs)))
    assert found.constant is not None and found.constant.tolist() == [False, True, True, False]
    assert found.geometry == (4,) and found.first == "0.weight"


def stages_of(loaded: SimpleNamespace, inputs: Tensor) -> SimpleNamespace:
    """A loaded task with these training inputs and a network of one hidden layer."""
    loaded.train = InMemory(inputs, torch.zeros(len(inputs), dtype=torch.int64))
    loaded.task = SimpleNamespace(example=inputs[:1], step=None)
    loaded.weights = None
    loaded.model = lambda fresh=False: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    return loaded


BODY = Body(
    chain=("0.weight", "2.weight"),
    shapes={"0.weight": (3, 4), "2.weight": (2, 3)},
    geometry=(4,),
    constant=torch.tensor([False, False, False, True]),
)
MASKS = {
    # The last input is constant: only its column is left out, and what reads it leads nowhere.
    "0.weight": torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool(),
    "2.weight": torch.tensor([[1, 1, 0], [0, 0, 1]]).bool(),
}


def ticket(masks: Mapping[str, Tensor], seeds: int = 1) -> Found:
    layers = {name: [int(mask.sum()), mask.numel()] for name, mask in masks.items()}
    return Found(
        trial=0,
        params={},
        round=1,
        tickets={seed: {"key": f"{seed:064x}"} for seed in range(seeds)},
        rows={seed: {"layers": json.dumps(layers)} for seed in range(seeds)},
        controls={},
    )


def study(tmp_path: Path, *masks: Mapping[str, Tensor]) -> Study:
    found = Study(StudySpec(name="small", task="my_task.py"), tmp_path / "store", root=tmp_path)
    for seed, each in enumerate(masks):
        weights = {name: torch.ones(mask.shape) for name, mask in each.items()}
        found.store.states.commit(f"{seed:064x}", to_bytes(State(weights=weights, masks=each).masked()))
    return found


def test_structure_can_be_counted(tmp_path: Path) -> None:
    found = structure(study(tmp_path, MASKS), ticket(MASKS), BODY)
    assert found is not None
    first, out = found["layers"]["0.weight"], found["layers"]["2.weight"]
    assert first["rows"]["empty"]["value"] == pytest.approx(2 / 3)  # without the constant input, the third row is empty
    assert (first["columns"]["groups"], first["columns"]["empty"]["value"]) == (3, pytest.approx(1 / 3))
    assert out["columns"]["empty"]["value"] == 0 and out["columns"]["full"]["value"] == 0
    assert found["constant_inputs"] == 1 and found["constant_inputs_reason"] is None
    # On a path lie both weights of the first unit, and what reads it: 3 of 18.
    assert found["effective_sparsity"] == pytest.approx(1 - 3 / 18)
    assert found["adjacent_pairs"]["value"] == 1 and found["adjacent_pairs"]["geometry"] == [4]
    assert list(found["layers"]) == ["0.weight", "2.weight"]


def test_canary_a_constant_input_that_is_counted_looks_like_structure(tmp_path: Path) -> None:
    whole = Body(chain=BODY.chain, shapes=BODY.shapes, geometry=BODY.geometry, not_known="nobody looked")
    found = structure(study(tmp_path, MASKS), ticket(MASKS), whole)
    assert found is not None
    assert found["layers"]["0.weight"]["columns"]["groups"] == 4
    assert found["layers"]["0.weight"]["rows"]["empty"]["value"] == pytest.approx(1 / 3)
    assert found["effective_sparsity"] == pytest.approx(1 - 5 / 18)
    assert found["constant_inputs_reason"] == "nobody looked"


def test_figures_are_means_over_seeds(tmp_path: Path) -> None:
    full = {name: torch.ones_like(mask) for name, mask in MASKS.items()}
    found = structure(study(tmp_path, MASKS, full), ticket(MASKS, seeds=2), BODY)
    assert found is not None
    empty = found["layers"]["0.weight"]["rows"]["empty"]
    assert empty["value"] == pytest.approx(1 / 3)
    assert empty["z"] is None  # the dense mask has no freedom


def test_a_state_that_is_gone_leaves_no_figure(tmp_path: Path) -> None:
    assert structure(study(tmp_path, MASKS), ticket(MASKS, seeds=2), BODY) is None


def test_a_model_that_is_no_chain_has_no_effective_sparsity_but_a_reason(tmp_path: Path) -> None:
    nothing = Body(shapes={}, no_chain="it branches", not_known="it branches")
    found = structure(study(tmp_path, MASKS), ticket(MASKS), nothing)
    assert found is not None
    assert (found["effective_sparsity"], found["effective_sparsity_reason"]) == (None, "it branches")
    assert found["adjacent_pairs"] is None and found["layers"]["0.weight"]["rows"]["groups"] == 3


def test_a_prunable_tensor_beside_the_chain_leaves_the_effective_sparsity_open(tmp_path: Path) -> None:
    beside = MASKS | {"embedding.weight": torch.ones(2, 2, dtype=torch.bool)}
    found = structure(study(tmp_path, beside), ticket(beside), BODY)
    assert found is not None and "prunable too" in found["effective_sparsity_reason"]


def test_a_task_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    found = look(study(tmp_path))
    assert found.first == "" and found.no_chain.startswith("the task could not be loaded: ")


def test_a_real_task_is_looked_at(tmp_path: Path) -> None:
    root = small.write_task(tmp_path)
    found = body(load(collect("my_task.py", root), {}, root))
    assert found.chain == ("0.weight", "2.weight") and found.geometry == (4,) and not found.not_known
    assert found.constant is not None and not found.constant.any()


def test_the_table_leaves_out_what_is_neither_found_nor_expected(tmp_path: Path) -> None:
    found = structure(study(tmp_path, MASKS), ticket(MASKS), BODY)
    document = {"tickets": [{"key": "a" * 64, "round": 1, "sparsity": 0.5, "structure": found}]}
    told = rows(document)
    assert [(row["layer"], row["of"]) for row in told][:2] == [("0", "3 rows"), ("0", "3 columns")]
    assert told[0]["empty"] == "0.667"
    text = says(document)
    assert text[0].startswith("aaaaaaaaaaaa (round 1): 50.00% sparse, effectively 83.33%; 1 pairs")
    assert text[-1] == "Left out, for they are constant in training: 1 inputs."
    gone = {"tickets": [{"key": "a" * 64, "round": 1, "structure": None}]}
    assert rows(gone) == [] and "no longer in the store" in says(gone)[0]
