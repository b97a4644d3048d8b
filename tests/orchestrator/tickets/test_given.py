"""A study's ticket file: read as a state, or refused with its name."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from orchestrator.errors import InputError, TaskError
from orchestrator.tasks.info import Layer
from orchestrator.tasks.source import Sent, to_send
from orchestrator.tickets.given import read_given
from orchestrator.tickets.ticket_file import Ticket, to_file_bytes

MASK = torch.tensor([[True, False], [False, True]])


def sent(data: bytes) -> Sent:
    return Sent(kind="ticket", name="t.safetensors", sha256=sha256(data).hexdigest(), data=data)


@cache
def data(weights: bool = True) -> bytes:
    given = {"body.weight": torch.arange(1.0, 5).reshape(2, 2)} if weights else None
    return to_file_bytes(Ticket(masks={"body.weight": MASK}, weights=given, recipe={"seed": 1}, position=7))


def test_the_ticket_is_a_state_of_its_kept_weights() -> None:
    state, found = read_given(sent(data()))
    assert state.weights["body.weight"].tolist() == [[1, 0], [0, 4]] and state.position == 7
    assert found.layers == (Layer(name="body.weight", shape=(2, 2)),)


def test_the_same_ticket_has_one_hash_however_it_is_written() -> None:
    again = [data.__wrapped__() for _ in range(8)]
    assert len({read_given(sent(each))[1].sha256 for each in [data(), *again]}) == 1


def test_a_recipe_without_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"^ticket 't.safetensors' has a recipe for its weights, but not the weights"):
        read_given(sent(data(weights=False)))


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
