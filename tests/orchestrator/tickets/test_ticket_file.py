"""A ticket comes back from its file as it went in, or not at all."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from orchestrator.errors import InputError
from orchestrator.header import read_header
from orchestrator.tickets.ticket_file import _UNSIGNED, KIND, Ticket, _digest, from_file_bytes, to_file_bytes

MASK = torch.tensor([[True, False, True], [False, False, True]])
TICKET = Ticket(
    masks={"body.weight": MASK},
    weights={"body.weight": torch.randn(2, 3) * MASK, "body.bias": torch.tensor([0.1, -0.0]), "n": torch.tensor(3)},
    recipe={"task": "digits", "task_params": {"hidden": 300}, "seed": 4},
    lineage=[
        {"op": "Init", "seed": 4},
        {"op": "Prune", "criterion": "magnitude", "says": '"sha256":"' + _UNSIGNED + '"'},
    ],
    position=12,
)


def test_everything_comes_back() -> None:
    found = from_file_bytes(to_file_bytes(TICKET))
    assert found.weights is not None and TICKET.weights is not None
    assert found.weights.keys() == TICKET.weights.keys()
    for name, tensor in TICKET.weights.items():
        assert torch.equal(found.weights[name], tensor)
    assert torch.equal(found.masks["body.weight"], MASK)
    assert (found.recipe, found.lineage, found.position) == (TICKET.recipe, TICKET.lineage, 12)


def test_a_ticket_may_bring_a_recipe_instead_of_weights() -> None:
    found = from_file_bytes(to_file_bytes(replace(TICKET, weights=None)))
    assert found.weights is None
    assert torch.equal(found.masks["body.weight"], MASK)
    assert found.recipe == TICKET.recipe


def test_a_ticket_is_small() -> None:
    masks = {"fc": torch.arange(100_000).reshape(250, 400) % 20 == 0}
    mask_only = to_file_bytes(Ticket(masks=masks, weights=None, recipe={"seed": 0}))
    whole = to_file_bytes(Ticket(masks=masks, weights={"fc": torch.randn(250, 400)}))
    assert len(mask_only) < 100_000 / 8 + 1_000
    assert len(whole) < 100_000 / 8 + 4 * 5_000 + 1_000


@given(st.data())
def test_canary_a_changed_byte_is_noticed(data: st.DataObject) -> None:
    written = bytearray(to_file_bytes(TICKET))
    place = data.draw(st.integers(0, len(written) - 1))
    written[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(InputError, match=r"^(the ticket file is damaged|not a ticket file)"):
        from_file_bytes(bytes(written))


@given(st.integers(0, len(to_file_bytes(TICKET)) - 1))
def test_canary_a_torn_file_is_noticed(length: int) -> None:
    with pytest.raises(InputError, match=r"^(the ticket file is damaged|not a ticket file)"):
        from_file_bytes(to_file_bytes(TICKET)[:length])


def test_canary_another_lineage_under_the_same_tensors_is_noticed() -> None:
    written = to_file_bytes(TICKET)
    with pytest.raises(InputError, match="^the ticket file is damaged"):
        from_file_bytes(written.replace(b"magnitude", b"mognitude"))


def test_other_files_are_no_tickets() -> None:
    with pytest.raises(InputError, match="not a ticket file: it is of kind 'none'"):
        from_file_bytes(save({"w": torch.ones(2)}))
    for junk in (b"", b"PK\x03\x04" * 9, b"\xff" * 64):
        with pytest.raises(InputError, match="not a ticket file"):
            from_file_bytes(junk)


def test_shapes_that_are_not_the_masks_are_refused_before_memory_is_taken() -> None:
    written = to_file_bytes(TICKET)
    tensors = load(written)
    for shape in ([1 << 20, 1 << 20], [-2, 3], [2, 30]):
        tensors["shapes/body.weight"] = torch.tensor(shape)
        forged = save(tensors, {**read_header(written), "sha256": _UNSIGNED})
        with pytest.raises(InputError, match="not a ticket file: the mask of 'body.weight' has 1 bytes for"):
            from_file_bytes(_signed(forged))


def _signed(forged: bytes) -> bytes:
    place = f'"sha256":"{_UNSIGNED}"'.encode()
    assert forged.count(place) == 1
    return forged.replace(place, f'"sha256":"{_digest(forged)}"'.encode())


def test_what_is_no_ticket_is_not_written() -> None:
    with pytest.raises(InputError, match="a ticket without masks is none"):
        to_file_bytes(replace(TICKET, masks={}))
    with pytest.raises(InputError, match="or a recipe for them"):
        to_file_bytes(replace(TICKET, weights=None, recipe={}))
    for bad in ({"x": float("nan")}, {"x": torch.ones(1)}):
        with pytest.raises(InputError, match="must be plain JSON"):
            to_file_bytes(replace(TICKET, recipe=bad))


def test_the_header_says_what_it_is() -> None:
    header = read_header(to_file_bytes(TICKET))
    assert header["kind"] == KIND
    assert json.loads(header["lineage"])[0] == {"op": "Init", "seed": 4}
