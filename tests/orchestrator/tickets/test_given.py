"""A study's ticket file: read as a state, or refused with its name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from orchestrator.errors import InputError, TaskError
from orchestrator.ops import Init
from orchestrator.stages import Stages
from orchestrator.state import State
from orchestrator.tasks.info import Layer
from orchestrator.tasks.source import Sent, to_send
from orchestrator.tickets.given import read_given, start_of
from orchestrator.tickets.ticket_file import Ticket, to_file_bytes, weights_sha256
from tests.orchestrator.pools import small

MASK = torch.tensor([[True, False], [False, True]])


def sent(data: bytes) -> Sent:
    return Sent(kind="ticket", name="t.safetensors", sha256=sha256(data).hexdigest(), data=data)


WEIGHTS = {"body.weight": torch.arange(1.0, 5).reshape(2, 2), "body.bias": torch.ones(2)}
RECIPE = {
    "task": "my_task.py",
    "task_digest": "d" * 64,
    "init": {"seed": 3, "fresh": False},
    "steps": 0,
    "weights_sha256": weights_sha256(WEIGHTS, {"body.weight": MASK}),
}


@cache
def data(weights: bool = True, position: int = 0) -> bytes:
    given = WEIGHTS if weights else None
    return to_file_bytes(Ticket(masks={"body.weight": MASK}, weights=given, recipe=RECIPE, position=position))


def recipe(**changes: Any) -> bytes:
    told = {name: value for name, value in (RECIPE | changes).items() if value is not None}
    return to_file_bytes(Ticket(masks={"body.weight": MASK}, weights=None, recipe=told))


class Room:
    """Stages of a task whose inits a test sets."""

    def __init__(self, weights: Mapping[str, torch.Tensor], digest: str = "d" * 64) -> None:
        self.loaded = SimpleNamespace(info=SimpleNamespace(digest=digest))
        self.weights = weights
        self.seen: list[Init] = []

    def run(self, op: Init, parents: list[State]) -> State:
        self.seen.append(op)
        return State(weights=self.weights)


def start(content: bytes, weights: Mapping[str, torch.Tensor] = WEIGHTS, digest: str = "d" * 64) -> State:
    return start_of(read_given(sent(content))[0], cast(Stages, Room(weights, digest)), "t.safetensors")


def test_the_ticket_is_a_state_of_its_kept_weights() -> None:
    state = start(data(position=7))
    assert state.weights["body.weight"].tolist() == [[1, 0], [0, 4]] and state.position == 7
    assert read_given(sent(data()))[1].layers == (Layer(name="body.weight", shape=(2, 2)),)


def test_the_same_ticket_has_one_hash_however_it_is_written() -> None:
    again = [data.__wrapped__() for _ in range(8)]
    assert len({read_given(sent(each))[1].sha256 for each in [data(), *again]}) == 1


def test_weights_that_are_in_the_file_are_not_made_again() -> None:
    room = Room({})
    start_of(read_given(sent(data()))[0], cast(Stages, room), "t.safetensors")
    assert room.seen == []


def test_a_recipe_makes_the_weights_that_it_was_written_for() -> None:
    room = Room(WEIGHTS)
    made = start_of(read_given(sent(data(weights=False)))[0], cast(Stages, room), "t.safetensors")
    assert room.seen == [Init(seed=3)]
    assert small.same_bits(made, start(data()))
    assert len(data(weights=False)) < len(data())


def test_weights_under_the_mask_may_be_others() -> None:
    made = start(recipe(), WEIGHTS | {"body.weight": torch.tensor([[1.0, 9.0], [9.0, 4.0]])})
    assert made.weights["body.weight"].tolist() == [[1, 0], [0, 4]]


@pytest.mark.parametrize(
    "weights",
    [
        WEIGHTS | {"body.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0001]])},
        WEIGHTS | {"body.bias": torch.zeros(2)},
        WEIGHTS | {"body.weight": torch.ones(2, 3)},
        {"trunk.weight": WEIGHTS["body.weight"]},
    ],
    ids=["another weight", "another bias", "another shape", "another name"],
)
def test_canary_a_model_with_other_weights_is_refused(weights: dict[str, torch.Tensor]) -> None:
    says = r"^ticket 't.safetensors' has a recipe .* does not start from them under init seed 3; legal: a file with"
    with pytest.raises(InputError, match=says):
        start(recipe(), weights)
    found = r"under init seed 3: it was found on the task 'my_task.py' of digest dddddddddddd, here it is eeeeeeeeeeee;"
    with pytest.raises(InputError, match=found):
        start(recipe(), weights, "e" * 64)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weights_sha256": None}, "no hash of them"),
        ({"init": None}, "no init seed, or no hash of them"),
        ({"init": {"fresh": False}}, "no init seed, or no hash of them"),
        ({"init": "seed 3"}, "no init seed, or no hash of them"),
        ({"steps": 40}, "trained for 40 steps, which its recipe does not make again"),
    ],
)
def test_a_recipe_that_makes_no_weights_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=rf"^ticket 't.safetensors': its .*{says}; legal: a file with the weights"):
        read_given(sent(recipe(**changes)))


def test_a_tampered_file_is_refused_with_its_name() -> None:
    tampered = bytearray(data())
    tampered[-1] ^= 1
    with pytest.raises(InputError, match=r"^ticket 't.safetensors': the ticket file is damaged"):
        read_given(sent(bytes(tampered)))


def test_a_file_is_sent_with_its_content(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(data())
    assert to_send("ticket", "t.safetensors", tmp_path) == sent(data())
    with pytest.raises(TaskError, match=r"^ticket 'gone.safetensors': cannot read .*gone.safetensors"):
        to_send("ticket", "gone.safetensors", tmp_path)


def test_a_file_too_large_to_be_sent_is_read_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(data())
    large = Sent(kind="ticket", name="t.safetensors", sha256=sha256(data()).hexdigest(), data=None)
    assert torch.equal(read_given(large, tmp_path)[0].masks["body.weight"], MASK)
    (tmp_path / "t.safetensors").write_bytes(data(weights=False))
    with pytest.raises(TaskError, match=r"^ticket 't.safetensors' is too large .* is another file"):
        read_given(large, tmp_path)
