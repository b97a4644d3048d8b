"""What two tasks have in common: by name and shape, and no more."""

from __future__ import annotations

import pytest
import torch

from orchestrator.errors import PlanError, StageFailed
from orchestrator.ops import Combine, Transfer
from orchestrator.planning.sharing import body, naming, protecting, shared
from orchestrator.settings import Choices, OtherTask, Settings, TrainSettings
from orchestrator.state import State
from orchestrator.tasks.info import Layer, TaskInfo, leaves
from orchestrator.tickets.packed import in_common
from orchestrator.tickets.stage import combine, transferred

BODY = Layer(name="body.weight", shape=(2, 3))
OWN = (BODY, Layer(name="head.weight", shape=(4, 2)))
OTHER = (BODY, Layer(name="head.weight", shape=(3, 2)))
INFO = TaskInfo(
    digest="own",
    layers=OWN,
    train_examples=10,
    others={
        "other": TaskInfo(digest="other", layers=OTHER, train_examples=10),
        "twin": TaskInfo(digest="twin", layers=OWN, train_examples=10),
        "stranger": TaskInfo(digest="x", layers=(Layer(name="trunk.weight", shape=(2, 3)),), train_examples=10),
    },
)


def test_shared_is_what_has_the_same_name_and_shape() -> None:
    assert shared(OWN, OTHER) == ["body.weight"]
    assert shared(OWN, OWN) == ["body.weight", "head.weight"]
    assert shared(OWN, OWN, leave=["head"]) == ["body.weight"]


@pytest.mark.parametrize(
    ("pattern", "name", "named"),
    [
        ("head", "head.weight", True),
        ("head", "head.bias", True),
        ("*.bias", "head.bias", True),
        ("hea", "head.x", False),
    ],
)
def test_a_layer_is_left_with_its_bias(pattern: str, name: str, named: bool) -> None:
    assert leaves(pattern, name) is named


def test_the_body_is_what_all_tasks_share() -> None:
    assert body(INFO, [OtherTask(task="twin"), OtherTask(task="other")]) == ["body.weight"]
    assert body(INFO, [OtherTask(task="twin", leave=("body",))]) == ["head.weight"]


def test_tasks_without_a_common_tensor_are_refused_with_their_names() -> None:
    with pytest.raises(PlanError) as caught:
        body(INFO, [OtherTask(task="other"), OtherTask(task="stranger")])
    assert str(caught.value) == (
        "no prunable tensor of the study's task (body.weight 2x3, head.weight 4x2) has the same name and shape in "
        "'stranger' (trunk.weight 2x3)"
    )
    with pytest.raises(PlanError, match=r"in 'other' \(.*\) without body$"):
        body(INFO, [OtherTask(task="other", leave=("body",))])
    with pytest.raises(PlanError, match="leave: no prunable layer of 'other' matches 'hed'; there are: body, head$"):
        body(INFO, [OtherTask(task="other", leave=("hed",))])


def test_protected_is_what_is_not_shared() -> None:
    settings = Settings(train=TrainSettings(), choices=Choices(rate=0.2))
    assert protecting(settings, INFO, ["body.weight"]).prune.ignore == ("head.weight",)
    assert protecting(settings, INFO, ["body.weight", "head.weight"]) == settings


def test_what_is_refused_elsewhere_says_where() -> None:
    with pytest.raises(PlanError, match=r"^on the task 'digits': no$"), naming("digits"):
        raise PlanError("no")


# --- The ops -------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, False, True], [False, True, True]])


def search(mask: torch.Tensor, classes: int) -> State:
    weights = {"body.weight": torch.ones(2, 3), "head.weight": torch.ones(classes, 2)}
    return State(weights=weights, masks={"body.weight": mask, "head.weight": torch.ones(classes, 2).bool()}).masked()


def ancestor(classes: int = 4) -> State:
    return State(weights={"body.weight": torch.full((2, 3), 5.0), "head.weight": torch.full((classes, 2), 7.0)})


def test_masks_are_combined_over_the_tensors_that_all_share() -> None:
    op = Combine(rule="intersection")
    made = combine(op, [search(MASK, 4), search(MASK.flip(1), 3), ancestor()], ["body.weight", "head.weight"])
    assert made.masks.keys() == {"body.weight"}
    assert torch.equal(made.masks["body.weight"], MASK & MASK.flip(1))
    assert torch.equal(made.weights["head.weight"], ancestor().weights["head.weight"])
    assert made.remarks["outside"] == ["head.weight"]


def test_a_wanted_sparsity_counts_the_heads_too() -> None:
    op = Combine(rule="most-voted", sparsity=3 / 14)
    made = combine(op, [search(MASK, 4), search(MASK.flip(1), 3), ancestor()], ["body.weight", "head.weight"])
    assert int(made.masks["body.weight"].sum()) == 3  # 3 of the 14 weights of body and head are masked


def test_searches_with_nothing_in_common_are_refused() -> None:
    strange = State(weights={"trunk.weight": torch.ones(2, 3)})
    with pytest.raises(StageFailed, match="no prunable tensor in common: body.weight, head.weight differ"):
        combine(Combine(rule="union"), [search(MASK, 4), strange, ancestor()], ["body.weight", "head.weight"])


def test_a_tensor_in_two_types_cannot_have_started_bit_equal() -> None:
    other = search(MASK, 4)
    double = State(weights={name: weight.double() for name, weight in other.weights.items()}, masks=other.masks)
    with pytest.raises(StageFailed, match=r"'body.weight' is float32 in one task, float64 in another$"):
        combine(Combine(rule="union"), [other, double, ancestor()], ["body.weight", "head.weight"])


def test_a_dense_state_gives_its_weights_alone() -> None:
    made = transferred(Transfer(), [ancestor(4), ancestor(3)])
    assert not made.masks and made.remarks == {"taken": ["body.weight"], "dense": ["head.weight"]}
    other = State(weights={"trunk": torch.ones(1)})
    with pytest.raises(PlanError, match=r"^no tensor fits the other model: it has trunk$"):
        transferred(Transfer(), [ancestor(), other])


def test_sets_of_masks_are_compared_where_they_are_alike() -> None:
    first, second = in_common([search(MASK, 4).masks, search(MASK, 3).masks])
    assert first.keys() == second.keys() == {"body.weight"}
    assert in_common([]) == []
