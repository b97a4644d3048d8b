"""The head of a safetensors file, and the seal that tells a flipped bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from orchestrator.header import read_header, sealed

TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7)}
PLAIN = save(TENSORS, {"key": "k", "lineage": '["ö"]'})


def test_a_seal_is_not_in_the_metadata_that_is_read() -> None:
    assert read_header(sealed(PLAIN)) == read_header(PLAIN) == {"key": "k", "lineage": '["ö"]'}
    assert read_header(sealed(save(TENSORS))) == {}


def test_a_sealed_file_is_a_safetensors_file_with_the_same_tensors() -> None:
    found = load(sealed(PLAIN))
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_the_beginning_of_a_sealed_file_is_read_without_its_tensors() -> None:
    data = sealed(PLAIN)
    assert read_header(data[:-8], len(data)) == {"key": "k", "lineage": '["ö"]'}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_one_flipped_bit_makes_it_no_file_or_changes_nothing(data: st.DataObject) -> None:
    whole = sealed(PLAIN)
    place = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[place // 8] ^= 1 << place % 8
    try:
        header = read_header(bytes(flipped))
    except ValueError:
        return
    found = load(bytes(flipped))
    # Only in the seal's own name may a bit flip unseen.
    assert header.items() >= read_header(whole).items() and all(
        torch.equal(found[name], TENSORS[name]) for name in TENSORS
    )


def test_a_damaged_file_says_so() -> None:
    data = sealed(PLAIN)
    with pytest.raises(ValueError, match=r"^the file is damaged: its checksum is not that of what it holds$"):
        read_header(data[:-1] + bytes([data[-1] ^ 1]))
