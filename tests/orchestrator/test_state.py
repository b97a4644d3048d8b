"""States: zeros under masks, and bytes that give back every bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor, nn

from orchestrator.header import read_header
from orchestrator.state import State, from_bytes, into_model, of_model, pack_bits, to_bytes, unpack_bits, zeroed

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int8, torch.bool]


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_bits(state: State) -> dict[str, Any]:
    found = {"position": state.position}
    for kind in ("weights", "masks", "optimizer", "gathered"):
        found |= {f"{kind} {name}": bits(tensor) for name, tensor in getattr(state, kind).items()}
    return found


def example(dtype: torch.dtype = torch.float32) -> State:
    mask = torch.tensor([[True, False], [False, True]])
    weight = torch.tensor([[1.0, -2.0], [-0.0, 4.0]]).to(dtype)
    return State(
        weights={"fc.weight": weight, "fc.bias": torch.tensor([-0.0, 1.0]), "count": torch.tensor(7)},
        masks={"fc.weight": mask},
        optimizer={"step/fc.weight": torch.tensor(3.0), "exp_avg/fc.weight": weight.clone()},
        position=12,
    )


def test_masked_puts_plus_zero_under_every_mask() -> None:
    state = example().masked()
    assert state.weights["fc.weight"].tolist() == [[1, 0], [0, 4]]
    assert state.optimizer["exp_avg/fc.weight"].tolist() == [[1, 0], [0, 4]]
    assert not torch.signbit(state.weights["fc.weight"]).any()
    # What has no mask, or no weights' shape, is as it was: a step count and a bias of -0.0.
    assert state.optimizer["step/fc.weight"].item() == 3
    assert torch.signbit(state.weights["fc.bias"]).tolist() == [True, False]
    assert zeroed(torch.tensor([float("nan"), 1.0]), torch.tensor([False, True])).tolist() == [0, 1]


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """NaNs with a payload, -0.0, denormals and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:  # other bytes than 0 and 1 are no bools
        return torch.rand(shape, generator=generator) < 0.5
    numbers = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return numbers.view(dtype).reshape(shape)


@pytest.mark.parametrize("shape", [(), (5,), (40, 30), (3, 4, 2)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128])
def test_zeroing_keeps_every_other_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for seed in range(5):
        tensor = random_bytes(shape, dtype, seed)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        expected = torch.where(mask, tensor, torch.zeros((), dtype=dtype))
        assert bits(zeroed(tensor, mask)) == bits(expected)
        # And of a tensor whose entries do not lie one after another.
        assert bits(zeroed(tensor.mT, mask.mT)) == bits(expected.mT) if len(shape) > 1 else True


def test_masked_leaves_its_state_alone() -> None:
    state = example()
    state.masked()
    assert state.weights["fc.weight"].tolist() == [[1, -2], [0, 4]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_of_every_dtype(dtype: torch.dtype) -> None:
    state = example(dtype).masked()
    assert all_bits(from_bytes(to_bytes(state))) == all_bits(state)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_round_trip_bit_for_bit(data: st.DataObject) -> None:
    def tensor(shape: tuple[int, ...]) -> Tensor:
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64]))
        return random_bytes(shape, dtype, data.draw(st.integers(0, 99)))

    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    named = data.draw(st.dictionaries(st.sampled_from(["a", "b.weight", "c/d", "masks/e"]), shapes, max_size=4))
    masked = data.draw(st.sets(st.sampled_from(sorted(named)))) if named else set()
    state = State(
        weights={name: tensor(shape) for name, shape in named.items()},
        masks={name: torch.rand(named[name]) < 0.5 for name in masked if named[name]},
        optimizer={
            **{f"exp_avg/{name}": tensor(shape) for name, shape in named.items()},
            **{f"step/{name}": torch.tensor(3.0) for name in named},
        },
        position=data.draw(st.integers(0, 10**9)),
        gathered={f"movement/{name}": tensor(shape) for name, shape in named.items() if data.draw(st.booleans())},
    ).masked()
    back = from_bytes(to_bytes(state, {"key": "k"}))
    assert all_bits(back) == all_bits(state)
    assert len(to_bytes(back, {"key": "k"})) == len(to_bytes(state, {"key": "k"}))


def test_names_stand_in_one_order_however_the_state_was_made() -> None:
    state = example().masked()
    backwards = State(
        weights=dict(reversed(state.weights.items())),
        masks=dict(reversed(state.masks.items())),
        optimizer=dict(reversed(state.optimizer.items())),
    )
    for other in (backwards, replace(backwards, position=1), from_bytes(to_bytes(backwards))):
        assert list(other.weights) == list(state.weights) == sorted(state.weights)
        assert list(other.masks) == list(state.masks) and list(other.optimizer) == list(state.optimizer)


def test_a_masked_weight_is_not_in_the_bytes() -> None:
    big = State(weights={"w": torch.ones(64, 64)}, masks={"w": torch.zeros(64, 64, dtype=torch.bool)})
    assert len(to_bytes(big)) < 64 * 64 / 8 + 512
    planted = State(weights={"w": torch.tensor([5.0, 6.0])}, masks={"w": torch.tensor([True, False])})
    assert from_bytes(to_bytes(planted)).weights["w"].tolist() == [5.0, 0.0]


def stored(state: State) -> tuple[dict[str, Any], dict[str, str]]:
    """What the bytes say: safetensors writes its metadata in any order."""
    data = to_bytes(state)
    return {name: bits(tensor) for name, tensor in load(data).items()}, read_header(data)


def test_kept_entries_are_stored_in_their_order() -> None:
    mask = torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    state = State(weights={"w": torch.arange(63.0).reshape(7, 9)}, masks={"w": mask})
    assert torch.equal(load(to_bytes(state))["weights/w"], state.weights["w"][mask])
    other = State(weights={"w": state.weights["w"].mT.contiguous().mT}, masks={"w": mask})
    assert stored(other) == stored(state)


def test_gathered_statistics_are_stored_as_they_are() -> None:
    statistic = torch.tensor([[0.5, -1.0], [-0.0, 2.0]], dtype=torch.float64)
    plain = example().masked()
    state = replace(plain, gathered={"movement/fc.weight": statistic})
    assert state.masked().gathered["movement/fc.weight"] is statistic
    assert bits(from_bytes(to_bytes(state)).gathered["movement/fc.weight"]) == bits(statistic)
    assert set(load(to_bytes(state))) - set(load(to_bytes(plain))) == {"gathered/movement/fc.weight"}
    assert state.nbytes == plain.nbytes + 32
    assert state.without_optimizer().gathered == {}


def test_remarks_are_not_in_the_bytes() -> None:
    state = replace(example(), remarks={"floor": ["fc"]})
    assert stored(state) == stored(example())
    assert state.masked().remarks == {"floor": ["fc"]}
    assert from_bytes(to_bytes(state)).remarks == {}


def test_the_header_is_text_beside_the_tensors() -> None:
    header = read_header(to_bytes(example(), {"key": "abc", "outcome": '{"accuracy": 1}'}))
    assert header["key"] == "abc"
    assert header["outcome"] == '{"accuracy": 1}'
    assert header["position"] == "12"


@given(st.lists(st.booleans(), max_size=40))
def test_bits_are_packed(kept: list[bool]) -> None:
    mask = torch.tensor(kept, dtype=torch.bool)
    assert pack_bits(mask).numel() == -(-len(kept) // 8)
    assert unpack_bits(pack_bits(mask), [len(kept)]).tolist() == kept


def test_first_entry_is_the_highest_bit() -> None:
    assert pack_bits(torch.tensor([[True, False], [False, False]])).tolist() == [0b10000000]


class Everything(nn.Module):
    """Tied weights, normalisation, a buffer that is not stored and one that is absent."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.out = nn.Linear(2, 3, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.register_buffer("absent", None)
        self.register_state_dict_post_hook(rename)


def rename(module: nn.Module, found: dict[str, Any], prefix: str, metadata: Any) -> None:
    """As some libraries do it; the names of a state are the module's own."""
    for name in list(found):
        found["renamed." + name] = found.pop(name)


def test_of_model_and_back() -> None:
    model = Everything()
    model.norm.running_mean += 5
    weights = of_model(model)
    assert list(weights) == [
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    other = Everything()
    into_model(weights, other)
    assert torch.equal(other.out.weight, model.embed.weight)
    assert other.out.weight is other.embed.weight
    assert other.norm.running_mean.tolist() == [5, 5]
    with torch.no_grad():
        other.embed.weight.zero_()
    assert weights["embed.weight"].abs().sum() > 0, "a state must not change with the model"


def test_weights_that_do_not_fit() -> None:
    weights = of_model(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"^the weights do not fit the model: 'bias' is in only one of them$"):
        into_model(weights, nn.Linear(2, 3, bias=False))
    with pytest.raises(ValueError, match=r"'bias' has shape \(3,\), the model wants \(2,\)$"):
        into_model({**weights, "weight": torch.zeros(2, 2)}, nn.Linear(2, 2))


def test_fresh_optimizer_and_size() -> None:
    state = example()
    assert state.without_optimizer().optimizer == {}
    assert state.without_optimizer().position == 12
    assert state.nbytes == 16 + 8 + 8 + 4 + 4 + 16
