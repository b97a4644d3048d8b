"""The smallest copy of a pruned model gives back every bit, and is as small as its masks allow."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from orchestrator.export.packed import coded, decoded, from_packed, packed_file
from orchestrator.export.tensors import files_of
from orchestrator.state import State, to_bytes
from orchestrator.tasks.models import lenet_conv, mlp


def random_mask(entries: int, kept: int, seed: int = 0) -> Tensor:
    """`kept` of the entries, anywhere."""
    order = torch.randperm(entries, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(entries, dtype=torch.bool)
    mask[order[:kept]] = True
    return mask


def entropy_bytes(entries: int, kept: int) -> float:
    """What no code of all masks with so many kept entries can beat on average."""
    return (math.lgamma(entries + 1) - math.lgamma(kept + 1) - math.lgamma(entries - kept + 1)) / math.log(2) / 8


@given(st.lists(st.booleans(), max_size=70))
def test_every_mask_comes_back(kept: list[bool]) -> None:
    mask = torch.tensor(kept, dtype=torch.bool)
    assert torch.equal(decoded(coded(mask), mask.shape), mask)


@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 5))
def test_every_share_of_kept_entries_comes_back_in_little_more_than_one_bit_each(
    n: int, share: float, seed: int
) -> None:
    mask = random_mask(n, round(n * share), seed)
    code = coded(mask)
    assert torch.equal(decoded(code, [n]), mask)
    assert len(code) <= 1 + -(-n // 8)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.2, 0.8, 0.95, 0.99])
def test_a_rare_kind_is_written_in_little_more_than_its_entropy(share: float) -> None:
    n = 60_000
    assert len(coded(random_mask(n, round(n * share)))) < 1.06 * entropy_bytes(n, round(n * share)) + 6


def test_whole_rows_and_patterns_take_next_to_nothing() -> None:
    rows = torch.zeros(300, 784, dtype=torch.bool)
    rows[::3] = True
    assert len(coded(rows)) < 0.02 * rows.numel() / 8
    assert coded(rows)[0] == 64
    assert coded(torch.zeros(10_000, dtype=torch.bool)).tolist() == [0, 0, 0, 0, 0]
    assert len(coded(torch.ones(10_000, dtype=torch.bool))) == 5


def test_gaps_as_they_are_written() -> None:
    mask = torch.zeros(40, dtype=torch.bool)
    mask[[0, 5, 39]] = True  # gaps 0, 4, 33
    code = coded(mask)
    assert code[0] == 65 and len(code) == 6, "so few entries are written as bits"
    longer = torch.cat([mask, torch.zeros(600, dtype=torch.bool)])
    assert coded(longer)[:5].tolist() == [3, 3, 0, 0, 0], "three low bits, three entries"
    assert coded(~longer)[0] == 32 + 3
    assert np.unpackbits(coded(longer)[5:])[:16].tolist() == [1, 1, 0, 0, 0, 0, 1, *(0, 0, 0), *(1, 0, 0), *(0, 0, 1)]


def pruned(model: torch.nn.Module, share: float) -> State:
    """A random share of every weight of two dimensions or more is kept."""
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masks = {
        name: random_mask(tensor.numel(), round(share * tensor.numel())).reshape(tensor.shape)
        for name, tensor in weights.items()
        if tensor.dim() > 1
    }
    return State(weights=weights, masks=masks).masked()


@pytest.mark.parametrize("lenet", [lambda: mlp(784, 300, 100, 10), lenet_conv])
def test_a_lenet_at_95_percent_takes_a_fourteenth(lenet: Callable[[], torch.nn.Module]) -> None:
    state = pruned(lenet(), 0.05)
    files = files_of(state)
    content, dense = files["packed.safetensors"], files["weights.safetensors"]
    again = from_packed(content)
    assert again.weights.keys() == state.weights.keys() and again.masks.keys() == state.masks.keys()
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in state.weights.items())
    assert all(torch.equal(again.masks[name], mask) for name, mask in state.masks.items())
    assert len(content) / len(dense) < 0.072
    assert len(content) < 0.85 * len(to_bytes(state))


def test_bits_of_any_type_come_back() -> None:
    weights = {
        "half": torch.tensor([[1.5, 0.0], [-0.0, float("nan")]], dtype=torch.float16),
        "whole": torch.tensor([3, 0, 7]),
        "scalar": torch.tensor(4.0),
    }
    masks = {"half": torch.tensor([[True, False], [True, True]]), "whole": torch.tensor([True, False, True])}
    again = from_packed(packed_file(State(weights=weights, masks=masks)))
    assert again.weights["half"].view(torch.int16).tolist() == weights["half"].view(torch.int16).tolist()
    assert again.weights["whole"].tolist() == [3, 0, 7] and again.weights["scalar"].item() == 4


def test_a_file_of_an_earlier_version_is_read() -> None:
    state = pruned(lenet_conv(), 0.05)
    again = from_packed(to_bytes(state))
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in state.weights.items())


def test_what_does_not_fit_together_is_refused() -> None:
    state = pruned(lenet_conv(), 0.05)
    content = packed_file(state)
    tensors, shapes = load(content), {name: list(mask.shape) for name, mask in state.masks.items()}
    first = next(iter(state.masks))

    def changed(name: str, tensor: Tensor, shape: list[int] | None = None, version: str = "2") -> bytes:
        told = shapes | ({} if shape is None else {first: shape})
        return save({**tensors, name: tensor}, {"packed": version, "shapes": json.dumps(told)})

    mask = tensors[f"masks/{first}"]
    for broken, complaint in (
        (changed(f"weights/{first}", torch.zeros(3)), "has 3 values for"),
        (changed(f"masks/{first}", mask[:-9]), "cut off"),
        (changed(f"masks/{first}", mask[:3]), "cut off"),
        (changed(f"masks/{first}", mask, [7]), "names one beyond"),
        (changed(f"masks/{first}", torch.tensor([65, 1], dtype=torch.uint8)), "bytes of bits"),
        (changed(f"masks/{first}", torch.tensor([64, 1, 2], dtype=torch.uint8)), "cannot be read"),
        (changed(f"masks/{first}", torch.tensor([99], dtype=torch.uint8)), "does not know"),
        (changed(f"masks/{first}", mask, version="3"), "reads '2' and older"),
        (content[:-1], "not a safetensors file"),
    ):
        with pytest.raises(ValueError, match=complaint):
            from_packed(broken)
