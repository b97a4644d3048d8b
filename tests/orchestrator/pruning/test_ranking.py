"""Who stays: units of a small network, under every scope and amount, against what can be counted by hand."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import PlanError, StageFailed
from orchestrator.ops import Prune
from orchestrator.pruning.allocation import after_rate, exact, rounded_half_up
from orchestrator.pruning.budget import Costs
from orchestrator.pruning.prune import Network, Pruned, prune
from orchestrator.pruning.structure import Slice, Units, kept_units, without
from tests.orchestrator.pruning.test_budget import work

WIDTHS = (3, 6, 5, 2)
"""Inputs, two hidden layers, outputs."""


def piece(tensor: str, dim: int, count: int, role: Any) -> Slice:
    return Slice(tensor=tensor, dim=dim, owner=torch.arange(count), role=role)


UNITS = tuple(
    Units(
        name=f"{name}.weight",
        count=count,
        slices=(
            piece(f"{name}.weight", 0, count, "makes"),
            piece(f"{name}.bias", 0, count, "makes"),
            piece(f"{reader}.weight", 1, count, "reads"),
        ),
    )
    for name, reader, count in (("a", "b", 6), ("b", "c", 5))
)


def nothing(need: str) -> Mapping[str, Any]:
    raise AssertionError(f"{need} is not needed")


def network(seed: int = 0, gone: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())) -> Network:
    """Two hidden layers with random weights, without the units `gone`."""
    draw = torch.Generator().manual_seed(seed)
    names = ("a", "b", "c")
    shapes = {f"{n}.weight": (WIDTHS[i + 1], WIDTHS[i]) for i, n in enumerate(names)}
    shapes |= {f"{n}.bias": (WIDTHS[i + 1],) for i, n in enumerate(names)}
    kept = []
    for group, units in zip(UNITS, gone, strict=True):
        stays = torch.ones(group.count, dtype=torch.bool)
        stays[list(units)] = False
        kept.append((group, stays))
    masks = without(kept, {}, shapes) if any(gone) else {}
    # Whole numbers, so that units tie.
    weights = {name: torch.randint(-2, 3, shapes[name], generator=draw).float() for name in shapes if "weight" in name}
    weights = {name: weight.where(masks[name], 0) if name in masks else weight for name, weight in weights.items()}
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    flops = {name: 2 * sizes[name] for name in weights} | {"": 7}
    costs = Costs(sizes=sizes, prunable=frozenset(weights), flops=work(flops))
    return Network(weights=weights, masks=masks, shapes=shapes, units=UNITS, costs=lambda: costs)


def run(where: Network, **said: Any) -> Pruned:
    return prune(Prune(**{"criterion": "magnitude", "scope": "layer", "structure": "neuron", **said}), where, nothing)


def left(masks: Mapping[str, Tensor]) -> list[int]:
    """How many units of each group are kept."""
    return [int(kept_units(group, masks).sum()) for group in UNITS]


def masked(masks: Mapping[str, Tensor]) -> int:
    """How many prunable weights are masked."""
    return sum(int((~mask).sum()) for name, mask in masks.items() if "weight" in name)


GONE = st.tuples(st.sets(st.integers(0, 5), max_size=5), st.sets(st.integers(0, 4), max_size=4)).map(
    lambda pair: (tuple(pair[0]), tuple(pair[1]))
)
AMOUNTS = st.sampled_from([0.1, 0.25, 0.5, 0.6, 0.8])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 9),
    gone=GONE,
    scope=st.sampled_from(["layer", "global"]),
    how=st.sampled_from(["rate", "unit_sparsity", "sparsity", "flops_budget", "params_budget", "threshold"]),
    amount=AMOUNTS,
    floor=st.integers(0, 3),
    round_to=st.sampled_from([1, 1, 2, 4]),
    protect=st.booleans(),
)
def test_laws(
    seed: int, gone: Any, scope: str, how: str, amount: float, floor: int, round_to: int, protect: bool
) -> None:
    before = network(seed, gone)
    factors = (("a.weight", 0.0),) if protect else ()
    there = left(before.masks)
    try:
        found = run(before, scope=scope, floor=floor, round_to=round_to, factors=factors, **{how: amount})
    except StageFailed:
        assert protect or floor or how == "flops_budget"
        return
    after = left(found.masks)
    for name, mask in before.masks.items():
        assert not (found.masks[name] & ~mask).any(), "a mask grew"
    for group in UNITS:  # a unit is kept or gone in all of its tensors; what reads it may have gone for itself
        kept = kept_units(group, found.masks)
        weight, bias, reader = (found.masks.get(piece.tensor) for piece in group.slices)
        assert bias is None or torch.equal(bias, kept)
        assert weight is not None and not weight[~kept].any()
        assert reader is not None and not reader[:, ~kept].any()
    if protect:
        assert after[0] == there[0]
    free = after[1:] if protect else after
    for number, kept_ in zip((1,) if protect else (0, 1), free, strict=True):
        assert kept_ >= min(floor, there[number])
        assert kept_ % round_to == 0 or kept_ in (there[number], UNITS[number].count)
    if floor or round_to > 1:
        return
    if how == "rate" and scope == "layer":
        assert free == [after_rate(k, exact(amount)) for k in (there[1:] if protect else there)]
    if how == "rate" and scope == "global":
        assert sum(free) == after_rate(sum(there[1:] if protect else there), exact(amount))
    if how == "unit_sparsity":
        assert 11 - sum(after) == max(rounded_half_up(exact(amount) * 11), 11 - sum(there))
    if how == "sparsity":
        assert masked(found.masks) >= rounded_half_up(exact(amount) * 58)
    if how in ("sparsity", "flops_budget", "params_budget") and scope == "global" and sum(after) < sum(there):
        _one_more_would_be_too_much(before, found, how, amount, factors)


def _one_more_would_be_too_much(before: Network, found: Pruned, how: str, amount: float, factors: Any) -> None:
    """Dropping as many but one of the worst does not reach the goal."""
    free = sum(left(found.masks)) - (left(found.masks)[0] if factors else 0)
    total = sum(left(before.masks)) - (left(before.masks)[0] if factors else 0)
    fewer = run(before, scope="global", factors=factors, rate=float(Fraction(total - free - 1, total) + 1e-9))
    assert sum(left(fewer.masks)) == sum(left(found.masks)) + 1
    sizes = before.costs().sizes if before.costs else {}
    if how == "sparsity":
        assert masked(fewer.masks) < rounded_half_up(exact(amount) * 58)
    elif how == "params_budget":
        gone = sum(int((~mask).sum()) for mask in fewer.masks.values())
        assert sum(sizes.values()) - gone > exact(amount) * sum(sizes.values())
    else:
        assert 2 * (58 - masked(fewer.masks)) + 7 > exact(amount) * (2 * 58 + 7)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9), gone=GONE, amount=AMOUNTS, scope=st.sampled_from(["layer", "global"]))
def test_the_best_units_stay(seed: int, gone: Any, amount: float, scope: str) -> None:
    before = network(seed, gone)
    found = run(before, scope=scope, rate=amount, norm="l1")
    scores = {g.name: before.weights[g.name].abs().sum(dim=1) for g in UNITS}
    there = {g.name: kept_units(g, before.masks) for g in UNITS}
    kept = {g.name: kept_units(g, found.masks) for g in UNITS}
    together = [list(scores)] if scope == "global" else [[name] for name in scores]
    for names in together:
        best = torch.cat([scores[name][kept[name]] for name in names])
        worst = torch.cat([scores[name][there[name] & ~kept[name]] for name in names])
        assert not len(best) or not len(worst) or best.min() >= worst.max()


def test_a_protected_layer_stays_in_the_denominator() -> None:
    weights = {"a": torch.arange(1.0, 5.0), "b": torch.arange(1.0, 5.0)}
    op = Prune(criterion="magnitude", scope="layer", sparsity=0.25, factors=(("b", 0.0),))
    assert prune(op, Network(weights=weights), nothing).masks["a"].int().tolist() == [0, 0, 1, 1]
    # Half of the eleven units have to come out of five.
    found = run(network(), unit_sparsity=0.4, factors=(("a.weight", 0.0),))
    assert left(found.masks) == [6, 1] and found.remarks["units"] == [7, 11]


def test_units_of_a_protected_maker_are_held_and_counted() -> None:
    # Four units, of which `first` makes two and `second` two: whole branches, say.
    group = Units(
        name="first",
        count=4,
        slices=tuple(
            Slice(tensor=name, dim=0, owner=torch.tensor(owner), role="makes")
            for name, owner in (("first", [0, 1]), ("second", [2, 3]))
        ),
    )
    weights = {"first": torch.tensor([[1.0], [2.0]]), "second": torch.tensor([[3.0], [4.0]])}
    where = Network(weights=weights, shapes=dict.fromkeys(weights, (2, 1)), units=(group,))
    found = run(where, structure="layer", unit_sparsity=0.25, factors=(("first", 0.0),))
    assert [found.masks[name].flatten().int().tolist() for name in weights] == [[1, 1], [0, 1]]
    assert found.remarks["units"] == [3, 4]
    # The floor counts those that are protected, too.
    found = run(where, structure="layer", threshold=9.0, factors=(("first", 0.0),), floor=3)
    assert [found.masks[name].flatten().int().tolist() for name in weights] == [[1, 1], [0, 1]]
    assert found.remarks["floored"] == ["first"]


def test_a_collapse_is_held_by_the_floor_and_said() -> None:
    weights = {"a": torch.arange(1.0, 9.0), "b": torch.arange(11.0, 19.0)}

    def pruned(floor: int, **said: Any) -> Pruned:
        return prune(Prune(criterion="magnitude", floor=floor, **said), Network(weights=weights), nothing)

    off = pruned(0, scope="global", sparsity=0.5)
    assert [int(mask.sum()) for mask in off.masks.values()] == [0, 8] and not off.remarks
    on = pruned(2, scope="global", sparsity=0.5)
    assert [int(mask.sum()) for mask in on.masks.values()] == [2, 6] and on.remarks == {"floored": ["a"]}
    assert on.masks["a"].nonzero().flatten().tolist() == [6, 7]
    assert on.masks["b"].nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7]
    high = pruned(1, scope="layer", threshold=10.0)
    assert [int(mask.sum()) for mask in high.masks.values()] == [1, 8] and high.remarks == {"floored": ["a"]}
    budget = Network(
        weights=weights, costs=lambda: Costs(sizes={"a": 8, "b": 8}, prunable=frozenset("ab"), flops=work({}))
    )
    op = Prune(criterion="magnitude", scope="global", params_budget=0.5, floor=3)
    met = prune(op, budget, nothing)
    assert [int(mask.sum()) for mask in met.masks.values()] == [3, 5] and met.remarks == {"floored": ["a"]}


@pytest.mark.parametrize("amount", [{"rate": 0.7}, {"sparsity": 0.7}])
def test_rows(amount: dict[str, float]) -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 7.0, 6.0]])
    op = Prune(criterion="magnitude", scope="row", **amount)
    found = prune(op, Network(weights={"w": weight}), nothing)
    counts = found.masks["w"].sum(dim=1).tolist()
    assert found.masks["w"][0, 3] and found.masks["w"][1, 0]
    assert counts == [1, 1] if "rate" in amount else sorted(counts) == [1, 1]
    held = prune(Prune(criterion="magnitude", scope="row", floor=5, **amount), Network(weights={"w": weight}), nothing)
    assert int(held.masks["w"].sum()) == 5 and held.remarks == {"floored": ["w"]}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 6),
    amount=st.sampled_from([0.2, 0.5, 0.9]),
    rate=st.booleans(),
    bits=st.integers(0, 2**24 - 1),
)
def test_rows_keep_their_best_and_share_the_count(rows: int, width: int, amount: float, rate: bool, bits: int) -> None:
    flat = torch.tensor([bool(bits >> index & 1) for index in range(rows * width)])
    before = flat.reshape(rows, width)
    weight = (torch.arange(rows * width) % 3 + 1.0).reshape(rows, width).where(before, 0)
    op = Prune(criterion="magnitude", scope="row", **{"rate" if rate else "sparsity": amount})
    after = prune(op, Network(weights={"w": weight}, masks={"w": before}), nothing).masks["w"]
    assert not (after & ~before).any()
    there = before.sum(dim=1).tolist()
    if rate:
        assert after.sum(dim=1).tolist() == [after_rate(k, exact(amount)) for k in there]
    else:
        wanted = max(rounded_half_up(exact(amount) * rows * width), rows * width - sum(there))
        assert int((~after).sum()) == wanted
        share = Fraction(rows * width - wanted, max(1, sum(there)))
        assert all(abs(int(k) - share * t) < 1 for k, t in zip(after.sum(dim=1).tolist(), there, strict=True))
    for kept, was, values in zip(after, before, weight, strict=True):
        if kept.any() and (was & ~kept).any():
            assert values[kept].min() >= values[was & ~kept].max()


def test_single_weights_may_meet_a_budget() -> None:
    weights = {"a": torch.arange(1.0, 7.0).reshape(2, 3), "b": torch.arange(1.0, 5.0)}
    costs = Costs(sizes={"a": 6, "b": 4, "bias": 2}, prunable=frozenset("ab"), flops=work({"a": 120, "b": 8, "": 12}))

    def pruned(**said: Any) -> list[int]:
        found = prune(Prune(criterion="magnitude", **said), Network(weights=weights, costs=lambda: costs), nothing)
        return [int(mask.sum()) for mask in found.masks.values()]

    assert pruned(scope="global", params_budget=0.5) == [3, 1]
    # 70 of 140: 20 for each of `a`, 2 for each of `b`, 12 for nothing of them. Half of each leaves 76.
    assert pruned(scope="layer", flops_budget=0.5) == [2, 2]
    with pytest.raises(StageFailed, match=r"^a flops_budget of 0.4 cannot be met: 0.5571 of the dense model is left"):
        pruned(scope="layer", flops_budget=0.4, floor=3)


def test_a_factor_above_one_ends_at_the_floor() -> None:
    weights = {"a": torch.arange(1.0, 11.0), "b": torch.arange(1.0, 11.0)}
    costs = Costs(sizes={"a": 10, "b": 10}, prunable=frozenset("ab"), flops=work({}))
    op = Prune(criterion="magnitude", scope="layer", params_budget=0.25, factors=(("a", 3.0),), floor=1)
    found = prune(op, Network(weights=weights, costs=lambda: costs), nothing)
    assert [int(mask.sum()) for mask in found.masks.values()] == [1, 4]
    assert found.remarks == {"floored": ["a"]}


def test_a_rate_of_one_is_refused_where_it_is_said() -> None:
    with pytest.raises(PlanError, match=r"^the rate in 'a.weight' comes to 1.5; legal: below 1$"):
        run(network(), rate=0.5, factors=(("a.weight", 3.0),))


def test_no_reader_no_score() -> None:
    where = network()
    lonely = tuple(Units(name=g.name, count=g.count, slices=g.slices[:2]) for g in UNITS)
    alone = Network(weights=where.weights, shapes=where.shapes, units=lonely)
    op = Prune(criterion="skeletonization", scope="layer", structure="neuron", rate=0.5)
    with pytest.raises(StageFailed, match=r"scores a unit over the weights that read it.*'a.weight'$"):
        prune(op, alone, lambda need: {name: torch.ones_like(weight) for name, weight in where.weights.items()})


def test_a_protected_reader_still_says_what_a_unit_is_worth() -> None:
    where = network()
    gradients = {name: -torch.ones_like(weight) for name, weight in where.weights.items()}
    op = Prune(criterion="skeletonization", scope="layer", structure="neuron", rate=0.2, factors=(("c.weight", 0.0),))
    found = prune(op, where, lambda need: gradients)
    worth = where.weights["c.weight"].sum(dim=0)
    gone = ~kept_units(UNITS[1], found.masks)
    assert int(gone.sum()) == 1 and float(worth[gone]) == float(worth.min())


def test_a_draw_for_a_unit_is_its_own_whatever_is_masked_before_it() -> None:
    # The first input of every unit of `b` is gone with unit 0 of `a`: its draws count all the same.
    drawn = []
    for seed in range(8):
        where = network(0, ((0,), ()))
        op = Prune(criterion="random", scope="layer", structure="neuron", rate=0.2, seed=seed)
        generators = {name: torch.Generator().manual_seed(seed) for name in where.weights}
        found = prune(op, where, lambda need, given=generators: given)  # type: ignore[misc]
        drawn.append(int((~kept_units(UNITS[1], found.masks)).nonzero()))
    assert len(set(drawn)) > 2


def test_blocks_by_eye() -> None:
    weight = torch.tensor([[1.0, 1.0, 9.0], [1.0, 1.0, 0.0], [2.0, 2.0, 0.0]])
    op = Prune(criterion="magnitude", scope="layer", structure="2x2", rate=0.5)
    found = prune(op, Network(weights={"w": weight}), nothing)
    assert found.masks["w"].int().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    assert found.remarks == {"units": [2, 4]}


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    block=st.sampled_from([(1, 1), (2, 2), (4, 1), (1, 4), (3, 5)]),
    amount=AMOUNTS,
    scope=st.sampled_from(["layer", "global"]),
)
def test_blocks_go_as_a_whole(shape: tuple[int, int], block: tuple[int, int], amount: float, scope: str) -> None:
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    costs = Costs(sizes={n: w.numel() for n, w in weights.items()}, prunable=frozenset(weights), flops=work({}))
    where = Network(weights=weights, costs=lambda: costs)
    name = f"{block[0]}x{block[1]}"
    assume(weights["a"].numel() > 1)
    found = prune(Prune(criterion="magnitude", scope=scope, structure=name, sparsity=amount), where, nothing)
    dropped = sum(int((~mask).sum()) for mask in found.masks.values())
    assert dropped >= rounded_half_up(exact(amount) * 2 * weights["a"].numel())
    for mask in found.masks.values():
        for rows in mask.split(block[0]):
            for tile in rows.split(block[1], dim=1):
                assert bool(tile.all()) or not bool(tile.any())


def test_of_a_pattern_what_does_not_fit_stays_dense() -> None:
    weights = {"a": torch.randn(2, 8), "b": torch.randn(2, 6), "c": torch.randn(2, 8)}
    op = Prune(criterion="magnitude", scope="layer", structure="2:4", factors=(("c", 0.0),))
    found = prune(op, Network(weights=weights), nothing)
    assert [int(mask.sum()) for mask in found.masks.values()] == [8, 12, 16]
    assert found.remarks == {"dense": ["b"]}
