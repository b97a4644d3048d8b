"""From an op and weights to masks: exact, only ever smaller, and refused where no order can be made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import NotFinite, StageFailed
from orchestrator.ops import Prune
from orchestrator.pruning import ranking
from orchestrator.pruning.allocation import after_rate, exact
from orchestrator.pruning.criteria import CRITERIA
from orchestrator.pruning.prune import Network, prune

A = torch.tensor([[4.0, -1.0], [0.5, 3.0]])
B = torch.tensor([-2.0, 0.25, 0.125, 8.0])


def nothing(need: str) -> Mapping[str, Any]:
    raise AssertionError(f"{need} is not needed")


def run(masks: Mapping[str, Tensor] | None = None, weights: Mapping[str, Tensor] | None = None, **given: Any) -> Any:
    op = Prune(**{"criterion": "magnitude", "scope": "layer", **given})
    network = Network(weights=weights or {"a": A, "b": B}, masks=masks or {})
    return prune(op, network, given.get("supply", nothing)).masks


def lists(masks: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    return {name: mask.int().tolist() for name, mask in masks.items()}


@pytest.fixture
def bound() -> Iterator[Callable[[Callable[..., Any]], str]]:
    """Binds a function as a user's criterion for the length of a test."""

    def bind(function: Callable[..., Any]) -> str:
        CRITERIA.bind("mine:criterion", function)
        return "mine:criterion"

    yield bind
    CRITERIA._of_users.pop("mine:criterion", None)


def test_each_layer_by_itself() -> None:
    assert lists(run(rate=0.5)) == {"a": [[1, 0], [0, 1]], "b": [1, 0, 0, 1]}


def test_all_layers_together() -> None:
    assert lists(run(scope="global", rate=0.5)) == {"a": [[1, 0], [0, 1]], "b": [1, 0, 0, 1]}
    assert lists(run(scope="global", sparsity=0.25)) == {"a": [[1, 1], [1, 1]], "b": [1, 0, 0, 1]}
    assert lists(run(scope="global", sparsity=0.75)) == {"a": [[1, 0], [0, 0]], "b": [0, 0, 0, 1]}


def test_a_threshold_drops_what_is_below_it() -> None:
    assert lists(run(threshold=0.5)) == {"a": [[1, 1], [1, 1]], "b": [1, 0, 0, 1]}
    assert lists(run(threshold=100.0)) == {"a": [[0, 0], [0, 0]], "b": [0, 0, 0, 0]}
    # The standard deviation of ±1 is 1, that of ±4 is 4.
    weights = {"a": torch.tensor([1.0, -1.0, 1.0, -1.0]), "b": torch.tensor([4.0, -4.0, 4.0, -4.0])}
    assert lists(run(weights=weights, threshold=1.0, threshold_unit="std")) == {"a": [1] * 4, "b": [1] * 4}
    assert lists(run(weights=weights, threshold=1.01, threshold_unit="std")) == {"a": [0] * 4, "b": [0] * 4}


def test_a_std_is_that_of_the_kept_weights() -> None:
    masks = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([False] * 4)}
    weights = {"a": torch.tensor([1.0, -1.0, 0.0, 0.0]), "b": torch.zeros(4)}
    kept = run(masks, weights, threshold=0.9, threshold_unit="std")
    assert lists(kept) == {"a": [1, 1, 0, 0], "b": [0, 0, 0, 0]}


def test_ignored_tensors_stay_as_they_are() -> None:
    mask = {"b": torch.tensor([True, True, True, False])}
    assert lists(run(mask, rate=0.5, factors=(("b", 0.0),)))["b"] == [1, 1, 1, 0]
    assert lists(run(mask, threshold=100.0, factors=(("b", 0.0),)))["b"] == [1, 1, 1, 0]


def test_what_is_masked_stays_masked_even_at_the_best_score(bound: Any) -> None:
    masks = {"b": torch.tensor([True, True, True, False])}
    assert lists(run(masks, rate=0.3))["b"] == [1, 1, 0, 0]
    smallest = bound(lambda weight: -weight.abs())
    assert lists(run(masks, criterion=smallest, rate=0.3))["b"] == [0, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_float_and_ties_in_it(dtype: torch.dtype, scope: str) -> None:
    weights = {"a": torch.ones(10, 10, dtype=dtype), "b": torch.ones(20, dtype=dtype)}
    kept = run(weights=weights, scope=scope, sparsity=0.5)
    assert sum(int(mask.sum()) for mask in kept.values()) == 60
    assert 0 < int(kept["b"].sum()) < 20  # no tensor is cut first
    assert int(kept["a"].sum(1).max()) < 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-2, 2, width=16), min_size=6, max_size=30),
    st.sampled_from(["layer", "global"]),
    st.sampled_from([("rate", 0.2), ("rate", 0.55), ("sparsity", 0.3), ("sparsity", 0.9), ("threshold", 0.5)]),
    st.integers(0, 2**30),
)
def test_laws(values: list[float], scope: str, how: tuple[str, float], bits: int) -> None:
    everything = torch.tensor(values)
    weights = {"a": everything[:4].reshape(2, 2), "b": everything[4:]}
    flat = torch.tensor([bool(bits >> (index % 30) & 1) for index in range(len(values))])
    before = {"a": flat[:4].reshape(2, 2), "b": flat[4:]}
    weights = {name: torch.where(before[name], weight, 0.0) for name, weight in weights.items()}
    kept = int(flat.sum())
    name, amount = how
    after = run(before, weights, scope=scope, **{name: amount})
    assert not any((after[tensor] & ~before[tensor]).any() for tensor in after), "a mask grew"
    left = sum(int(mask.sum()) for mask in after.values())
    if name == "sparsity":
        wanted = int(exact(amount) * len(values) + Fraction(1, 2))
        assert len(values) - left == max(wanted, len(values) - kept)
    elif name == "rate" and scope == "global":
        assert left == after_rate(kept, exact(amount))
    elif name == "rate":
        assert all(int(after[t].sum()) == after_rate(int(before[t].sum()), exact(amount)) for t in after)
    else:
        assert all(torch.equal(after[t], before[t] & (weights[t].abs() >= amount)) for t in after)


def test_a_mask_that_grows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "select", lambda scores, *rest: [torch.ones_like(s, dtype=torch.bool) for s in scores])
    with pytest.raises(AssertionError, match="a mask grew"):
        run({"b": torch.tensor([True, True, True, False])}, rate=0.5)


@pytest.mark.parametrize("how", [{"rate": 0.5}, {"threshold": 0.5}])
def test_scores_that_are_not_finite(bound: Any, how: dict[str, float]) -> None:
    said = r"^criterion 'mine:criterion': 4 of the 4 scores of 'a' are NaN or infinite$"
    with pytest.raises(StageFailed, match=said) as caught:
        run(criterion=bound(lambda weight: weight / 0 - weight / 0), **how)
    assert type(caught.value) is StageFailed, "no training diverged"
    with pytest.raises(NotFinite, match=r"^criterion 'magnitude': 1 of the 2 scores of 'a' are NaN or infinite$"):
        run(weights={"a": torch.tensor([1.0, torch.nan])}, **how)
    with pytest.raises(NotFinite):
        run(weights={"a": torch.tensor([1.0, torch.nan])}, criterion=bound(lambda weight: weight), **how)
    # At a masked weight a score does not count.
    masks = {"b": torch.tensor([True, True, True, False])}
    weights = {"b": torch.tensor([4.0, 3.0, 2.0, 0.0])}
    kept = run(masks, weights, criterion=bound(lambda weight: weight / weight * weight), **how)
    assert lists(kept)["b"] == ([1, 0, 0, 0] if "rate" in how else [1, 1, 1, 0])


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda weight: weight.sum(0), r"returned scores of shape \(2,\) for a weight of shape \(2, 2\) \('a'\)$"),
        (lambda weight: None, r"returned NoneType for 'a', not a tensor of real numbers$"),
        (lambda weight: 1.0, r"returned float for 'a', not a tensor of real numbers$"),
        (lambda weight: weight * 1j, r"returned torch.complex64 for 'a', not a tensor of real numbers$"),
    ],
)
def test_what_is_no_score(bound: Any, function: Callable[..., Any], said: str) -> None:
    with pytest.raises(StageFailed, match=f"^criterion 'mine:criterion' {said}"):
        run(criterion=bound(function), rate=0.5)


def test_scores_may_be_whole_numbers_or_truths(bound: Any) -> None:
    assert lists(run(criterion=bound(lambda weight: weight > 2), rate=0.5))["a"] == [[1, 0], [0, 1]]
    assert lists(run(criterion=bound(lambda weight: weight.long()), rate=0.5))["a"] == [[1, 0], [0, 1]]


def test_a_criterion_cannot_write_on_the_weights(bound: Any) -> None:
    weights = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    gradients = {name: torch.ones_like(weight) for name, weight in weights.items()}

    def rude(weight: Tensor, gradient: Tensor) -> Tensor:
        gradient.zero_()
        return weight.neg_()

    op = Prune(criterion=bound(rude), scope="layer", rate=0.5, seed=0)
    assert lists(prune(op, Network(weights=weights), lambda need: gradients).masks) == {"a": [0, 1], "b": [1, 0]}
    assert weights["a"].tolist() == [3.0, 1.0]
    assert gradients["a"].tolist() == [1.0, 1.0]


def test_halves_are_scored_in_single_precision() -> None:
    # The products 2^-18 and 2^-20 times 2^-10 would both be zero in half precision.
    weights = {"w": torch.tensor([2.0**-18, 2.0**-20, 1.0, 1.0], dtype=torch.float16)}
    gradients = {"w": torch.tensor([2.0**-12, 2.0**-9, 0.0, 0.0], dtype=torch.float16)}
    op = Prune(criterion="taylor", scope="layer", sparsity=0.75, seed=0)
    assert lists(prune(op, Network(weights=weights), lambda need: gradients).masks) == {"w": [0, 1, 0, 0]}


def test_a_criterion_gets_its_parameters(bound: Any) -> None:
    def mine(weight: Tensor, sign: float = 1.0, examples: int = 0) -> Tensor:
        return weight * sign + examples

    criterion = bound(mine)
    assert lists(run(criterion=criterion, rate=0.5))["a"] == [[1, 0], [0, 1]]
    turned = run(criterion=criterion, rate=0.5, parameters=(("examples", 5), ("sign", -1.0)))
    assert lists(turned)["a"] == [[0, 1], [1, 0]]
