"""What fits is taken with its mask, the rest is the other init's, and both are listed."""

from __future__ import annotations

import pytest
import torch

from orchestrator.errors import PlanError
from orchestrator.state import State
from orchestrator.tickets.transfer import transfer

MASK = torch.tensor([[True, False, True], [False, False, True]])


def ticket() -> State:
    weights = {"body.weight": torch.ones(2, 3), "body.bias": torch.full((2,), 5.0), "head.weight": torch.ones(10, 2)}
    masks = {"body.weight": MASK, "head.weight": torch.eye(10, 2).bool()}
    return State(weights=weights, masks=masks, position=40).masked()


def other(classes: int = 3) -> State:
    weights = {
        "body.weight": torch.full((2, 3), 7.0, dtype=torch.float64),
        "body.bias": torch.zeros(2),
        "head.weight": torch.full((classes, 2), 7.0),
    }
    return State(weights=weights)


def test_the_body_is_taken_and_the_head_stays_dense() -> None:
    found = transfer(ticket(), other())
    assert found.taken == ("body.bias", "body.weight")
    assert found.dense == ("head.weight",)
    assert set(found.state.masks) == {"body.weight"}
    assert torch.equal(found.state.weights["body.weight"], MASK.double())
    assert found.state.weights["body.bias"].tolist() == [5, 5]
    assert torch.equal(found.state.weights["head.weight"], other().weights["head.weight"])
    assert found.state.position == 0


def test_a_head_of_the_same_shape_may_be_left_out() -> None:
    assert transfer(ticket(), other(classes=10)).taken == ("body.bias", "body.weight", "head.weight")
    found = transfer(ticket(), other(classes=10), leave=["head.weight"])
    assert found.dense == ("head.weight",)
    assert (found.state.weights["head.weight"] == 7).all()


def test_where_nothing_fits_it_is_said() -> None:
    wide = State(weights={"body.weight": torch.ones(5, 3), "body.bias": torch.ones(2)})
    with pytest.raises(
        PlanError,
        match=r"^no masked tensor of the ticket fits the other model: "
        r"'body.weight' is \(2, 3\) in the ticket, \(5, 3\) there$",
    ):
        transfer(ticket(), wide)
    with pytest.raises(PlanError, match=r"it has body.weight, head.weight, the other trunk$"):
        transfer(ticket(), State(weights={"trunk": torch.ones(2, 3)}))
    with pytest.raises(PlanError, match="'body.weight' is left out"):
        transfer(ticket(), other(), leave=["body.weight"])
    with pytest.raises(PlanError, match="'hed' cannot be left out: the other model has body.bias, body.weight, "):
        transfer(ticket(), other(), leave=["hed"])
    with pytest.raises(PlanError, match="the other has a mask of 'body.weight'"):
        transfer(ticket(), ticket())
