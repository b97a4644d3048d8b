"""Criteria against answers that can be checked by eye, and the contract that all of them keep."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.errors import InputError, StageFailed
from orchestrator.pruning import criteria
from orchestrator.pruning.criteria import (
    CRITERIA,
    NEEDS,
    activation,
    batchnorm,
    check_parameters,
    check_signature,
    fpgm,
    gathering,
    gradient,
    grasp,
    lamp,
    magnitude,
    movement,
    needs,
    obd,
    obs,
    parameters,
    random,
    skeletonization,
    snip,
    sparsegpt,
    synflow,
    taylor,
    wanda,
)
from orchestrator.pruning.structure import Slice, Units, unit_scores
from orchestrator.registry import Entry
from tests.contracts.criteria import CHECKS, SHAPES, deterministic, leaves_its_inputs_alone, same_shape_and_finite

ROOT = Path(__file__).resolve().parents[3]
WEIGHT = torch.tensor([[1.0, -2.0], [0.5, -0.0]])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CRITERIA.names)
def test_contract(name: str, shape: tuple[int, ...], dtype: torch.dtype, check: Any) -> None:
    check(CRITERIA[name], shape, dtype)


def regression() -> tuple[Tensor, Tensor]:
    """Correlated inputs (20, 6) and targets (20, 1)."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(20, 6, generator=draw, dtype=torch.float64) @ torch.randn(6, 6, generator=draw).double()
    return mixed, torch.randn(20, 1, generator=draw, dtype=torch.float64)


def test_reading_the_registry_takes_no_torch() -> None:
    code = "import sys, orchestrator.pruning.criteria; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


def returns_a_row(weight: Tensor) -> Tensor:
    return weight[0]


def returns_nan(weight: Tensor) -> Tensor:
    return weight / weight


def draws_unseeded(weight: Tensor) -> Tensor:
    return torch.rand_like(weight)


def writes_on_its_weight(weight: Tensor) -> Tensor:
    return weight.add_(1)


@pytest.mark.parametrize(
    ("function", "check"),
    [
        (returns_a_row, same_shape_and_finite),
        (returns_nan, same_shape_and_finite),
        (draws_unseeded, deterministic),
        (writes_on_its_weight, leaves_its_inputs_alone),
    ],
)
def test_the_contract_catches(function: Callable[..., Tensor], check: Any) -> None:
    with pytest.raises(AssertionError):
        check(Entry(name="bad", function=function), (3, 2), torch.float32)


def test_magnitude() -> None:
    assert magnitude(WEIGHT).tolist() == [[1.0, 2.0], [0.5, 0.0]]


def test_taylor_is_weight_times_gradient() -> None:
    assert taylor(WEIGHT, torch.tensor([[-3.0, 0.5], [4.0, 9.0]])).tolist() == [[3.0, 1.0], [2.0, 0.0]]


def test_gradient_is_absolute() -> None:
    assert gradient(WEIGHT, torch.tensor([[-3.0, 0.5], [4.0, -0.0]])).tolist() == [[3.0, 0.5], [4.0, 0.0]]


def test_obd_is_the_change_in_loss_on_a_diagonal_quadratic() -> None:
    curvature = torch.tensor([[4.0, 0.5], [2.0, 1.0]], dtype=torch.float64)
    minimum = WEIGHT.double()

    def loss(weight: Tensor) -> Tensor:
        return (curvature * (weight - minimum).square()).sum() / 2

    removals = (1 - torch.eye(4, dtype=torch.float64)).reshape(4, 2, 2)
    changes = torch.stack([loss(minimum * kept) - loss(minimum) for kept in removals]).reshape(2, 2)
    assert torch.equal(obd(minimum, curvature), changes)
    assert torch.equal(obd(minimum, -curvature), changes), "what an estimate says below zero is noise"


def test_obs_is_the_rise_in_loss_after_a_least_squares_refit() -> None:
    inputs, targets = regression()
    hessian = 2 * inputs.t() @ inputs / len(inputs)
    weight = torch.linalg.lstsq(inputs, targets).solution
    loss = (inputs @ weight - targets).square().mean()
    rises = []
    for removed in range(len(weight)):
        others = [column for column in range(len(weight)) if column != removed]
        refitted = torch.linalg.lstsq(inputs[:, others], targets).solution
        rises.append((inputs[:, others] @ refitted - targets).square().mean() - loss)
    found = obs(weight.t(), hessian.unsqueeze(0), damping=0.0)
    assert torch.allclose(found, torch.stack(rises).unsqueeze(0), rtol=1e-9, atol=0)


def test_obs_does_not_count_on_weights_that_are_gone() -> None:
    inputs, targets = regression()
    hessian = 2 * inputs.t() @ inputs / len(inputs)
    left = torch.linalg.lstsq(inputs[:, :4], targets).solution
    alone = obs(left.t(), hessian[:4, :4].unsqueeze(0), damping=0.0)
    among = obs(torch.cat([left, torch.zeros(2, 1).double()]).t(), hessian.unsqueeze(0), damping=0.0)
    assert torch.allclose(among[:, :4], alone, rtol=1e-12, atol=0)
    assert among[:, 4:].tolist() == [[0.0, 0.0]]


def test_obs_by_blocks_is_obs_of_each_block() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 5, generator=draw, dtype=torch.float64)
    spread = torch.randn(2, 3, 3, generator=draw, dtype=torch.float64)
    blocks = spread @ spread.mT
    blocks[1, 2, :] = blocks[1, :, 2] = 0
    blocks[1, 2, 2] = 1  # the filling
    apart = [obs(weight[:, :3], blocks[:1], damping=0.0), obs(weight[:, 3:], blocks[1:, :2, :2], damping=0.0)]
    assert torch.allclose(obs(weight, blocks, damping=0.0), torch.cat(apart, dim=1), rtol=1e-12, atol=0)


def test_the_filling_of_a_block_does_not_count_for_damping() -> None:
    whole = torch.diag(torch.tensor([8.0, 4.0, 6.0], dtype=torch.float64))
    filled = torch.eye(4, dtype=torch.float64)
    filled[:3, :3] = whole
    weight = torch.ones(3, dtype=torch.float64)
    found = obs(weight, torch.stack([filled[:2, :2], filled[2:, 2:]]), damping=0.5)
    assert torch.allclose(found, obs(weight, whole.unsqueeze(0), damping=0.5), rtol=1e-12)
    assert found.tolist() == pytest.approx([11 / 2, 7 / 2, 9 / 2])


def test_obs_of_a_dead_layer_ranks_by_magnitude() -> None:
    assert obs(WEIGHT, torch.zeros(1, 4, 4)).tolist() == [[0.5, 2.0], [0.125, 0.0]]


def test_obs_refuses_a_hessian_that_has_no_inverse() -> None:
    with pytest.raises(
        StageFailed, match=r"^a Hessian cannot be inverted with damping = 0\.0: a larger one is needed$"
    ):
        obs(torch.ones(2), torch.ones(1, 2, 2), damping=0.0)


@pytest.mark.parametrize("function", [snip, skeletonization])
def test_a_gate_on_each_connection_has_the_sensitivity(function: Callable[..., Tensor]) -> None:
    inputs, targets = regression()
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(1, 6).requires_grad_()
    gates = torch.ones_like(weight).requires_grad_()
    loss = F.mse_loss(torch.tanh(inputs @ (gates * weight).t()), targets)
    by_weight, by_gate = torch.autograd.grad(loss, (weight, gates))
    expected = by_gate.abs() if function is snip else -by_gate
    assert torch.allclose(function(weight.detach(), by_weight), expected, rtol=1e-12)


def test_the_relevance_of_a_unit_is_that_of_a_gate_on_its_output() -> None:
    inputs, targets = regression()
    draw = torch.Generator().manual_seed(3)
    makes, reads = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((4, 6), (1, 4)))
    reads.requires_grad_()

    def loss(gates: Tensor) -> Tensor:
        return F.mse_loss((gates * torch.tanh(inputs @ makes.t())) @ reads.t(), targets)

    ones = torch.ones(4, dtype=torch.float64)
    (slope,) = torch.autograd.grad(loss(ones), reads)
    units = Units(name="h", count=4, slices=(Slice(tensor="reads", dim=1, owner=torch.arange(4), role="reads"),))
    facts = CRITERIA["skeletonization"].facts
    assert facts["reads"]
    scores = {"reads": skeletonization(reads.detach(), slope)}
    step = 1e-5 * torch.eye(4, dtype=torch.float64)
    with torch.no_grad():
        differences = torch.stack([(loss(ones - h) - loss(ones + h)) / 2e-5 for h in step])
    assert torch.allclose(unit_scores(units, scores, facts["norm"], ("reads",)), differences, rtol=1e-7)


def test_grasp_keeps_what_carries_the_gradient() -> None:
    # L = 2·a² + b²/2 with g = (4a, b): H·g = (16a, b), and removing a takes all that a adds to |g|²/2.
    assert grasp(torch.tensor([1.0, -2.0]), torch.tensor([16.0, -2.0])).tolist() == [16.0, 4.0]
    assert grasp(torch.tensor([1.0]), torch.tensor([-1.0])).tolist() == [-1.0]


def test_synflow_is_the_flow_through_the_absolute_weight() -> None:
    assert synflow(WEIGHT, torch.tensor([[3.0, 0.5], [4.0, 9.0]])).tolist() == [[3.0, 1.0], [2.0, 0.0]]


def test_movement_is_what_was_gathered() -> None:
    assert movement(WEIGHT, torch.tensor([[3.0, -0.5], [0.0, 9.0]])).tolist() == [[3.0, -0.5], [0.0, 9.0]]


def test_batchnorm_and_activation_are_the_same_for_a_row() -> None:
    kernels = torch.ones(2, 1, 1, 2)
    expected = [[[[3.0, 3.0]]], [[[0.5, 0.5]]]]
    assert batchnorm(kernels, torch.tensor([-3.0, 0.5])).tolist() == expected
    assert activation(kernels, torch.tensor([3.0, 0.5])).tolist() == expected


def test_fpgm_is_the_summed_distance_to_the_other_filters() -> None:
    filters = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]])
    assert fpgm(filters).tolist() == [[8.0, 8.0], [9.0, 9.0], [7.0, 7.0]]


def test_lamp_divides_by_the_squares_that_are_as_large() -> None:
    found = lamp(torch.tensor([[1.0, -2.0], [3.0, 2.0]]))
    assert found.flatten().tolist() == pytest.approx([1 / 18, 4 / 17, 1.0, 4 / 17])


def test_lamp_of_nothing_is_nothing() -> None:
    assert lamp(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert lamp(torch.tensor([0.0, 1.0, -1.0])).tolist() == [0.0, 0.5, 0.5]


def test_lamp_keeps_the_largest_of_each_layer_longest() -> None:
    small, large = lamp(torch.tensor([1e-3, 1e-4])), lamp(torch.tensor([5.0, 4.0, 3.0]))
    assert small.max() == large.max() == 1.0


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_lamp_is_what_it_says(values: list[int]) -> None:
    expected = [v * v / sum(u * u for u in values if abs(u) >= abs(v)) if v else 0.0 for v in values]
    assert lamp(torch.tensor(values, dtype=torch.float32)).tolist() == pytest.approx(expected)


def test_wanda_weighs_by_the_inputs() -> None:
    assert wanda(WEIGHT, torch.tensor([[2.0, 0.5]])).tolist() == [[2.0, 1.0], [1.0, 0.0]]


def test_sparsegpt_is_the_rise_in_output_error_after_a_refit() -> None:
    inputs, _ = regression()
    gram = inputs.t() @ inputs
    weight = torch.linspace(1, 2, 12, dtype=torch.float64).reshape(2, 6)
    found = sparsegpt(weight, gram, damping=0.0)
    for row in range(2):
        for removed in range(6):
            others = [column for column in range(6) if column != removed]
            refitted = torch.linalg.lstsq(inputs[:, others], inputs @ weight[row]).solution
            error = (inputs[:, others] @ refitted - inputs @ weight[row]).square().sum()
            assert float(found[row, removed]) == pytest.approx(float(error), rel=1e-9)


def test_random_is_uniform_and_ignores_the_weights() -> None:
    def draw(weight: Tensor) -> Tensor:
        return random(weight, torch.Generator().manual_seed(0))

    scores = draw(torch.zeros(100, 100, dtype=torch.bfloat16))
    assert torch.equal(scores, draw(torch.full((100, 100), 7.0)))
    tenths = torch.bincount((scores.flatten() * 10).long(), minlength=10)
    assert len(tenths) == 10
    # 1,000 each are expected, give or take 30 (one standard deviation).
    assert tenths.min() > 850
    assert tenths.max() < 1150
    assert len(set(scores.flatten().tolist())) == scores.numel()


def test_needs_and_parameters() -> None:
    assert [needs(CRITERIA[name]) for name in ("magnitude", "random", "taylor")] == [(), ("generator",), ("gradient",)]
    assert parameters(CRITERIA["magnitude"]) == {}
    assert parameters(CRITERIA["taylor"]) == {"examples": criteria.EXAMPLES}

    def mine(weight: Tensor, gradient: Tensor, power: float = 2.0) -> Tensor:
        return (weight.abs() ** power) * gradient

    entry: Entry[Callable[..., Tensor]] = Entry(name="m:mine", function=mine)
    assert needs(entry) == ("gradient",)
    assert parameters(entry) == {"power": 2.0, "examples": criteria.EXAMPLES}


def test_an_unknown_parameter_is_refused() -> None:
    check_parameters("taylor", {"examples": 5})
    with pytest.raises(InputError, match=r"^criterion 'taylor' has no parameter 'power'; legal: examples$"):
        check_parameters("taylor", {"power": 2})
    with pytest.raises(InputError, match=r"; legal: none$"):
        check_parameters("magnitude", {"examples": 2})


def test_a_value_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"^criteria.obd.probes = 0 must be 1 or more$"):
        check_parameters("obd", {"probes": 0})
    with pytest.raises(InputError, match=r"^criteria.obs.damping = -0.1 must be 0 or more$"):
        check_parameters("obs", {"damping": -0.1})
    with pytest.raises(InputError, match=r"^criteria.obs.damping = nan must be 0 or more$"):
        check_parameters("obs", {"damping": float("nan")})
    check_parameters("obs", {"damping": 0.0, "exact_up_to": 1, "block": 1, "examples": 1})


def test_what_is_gathered_is_told_apart_from_what_the_function_takes() -> None:
    assert parameters(CRITERIA["obs"]) == {"damping": 1e-2, "examples": 256, "exact_up_to": 2048, "block": 64}
    assert gathering(CRITERIA["obs"]) == {"examples": 256, "exact_up_to": 2048, "block": 64}

    def both(weight: Tensor, gradient: Tensor, hessian_diagonal: Tensor) -> Tensor:
        return weight

    entry: Entry[Callable[..., Tensor]] = Entry(name="m:both", function=both)
    assert gathering(entry) == {"examples": 256, "probes": 128}


def takes_what_there_is(weight: Tensor, gradient: Tensor, *, input_norm: Tensor, power: float = 2.0) -> Tensor:
    return weight


def takes_anything(weight: Tensor, *others: Any, **supplied: Any) -> Tensor:
    return weight


@pytest.mark.parametrize("function", [takes_what_there_is, takes_anything, magnitude])
def test_a_function_that_can_be_called_is_accepted(function: Callable[..., Tensor]) -> None:
    check_signature("m:f", function)


def needs_a_labels_tensor(weight: Tensor, labels: Tensor) -> Tensor:
    return weight


def has_no_weight(w: Tensor) -> Tensor:
    return w


def takes_the_weight_second(gradient: Tensor, weight: Tensor) -> Tensor:
    return weight


def takes_by_position(gradient: Tensor, /, weight: Tensor) -> Tensor:
    return weight


def takes_a_need_by_position(weight: Tensor, gradient: Tensor, /) -> Tensor:
    return weight


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            needs_a_labels_tensor,
            "has a parameter 'labels' without a default, which nobody gives it; legal without one: weight, "
            + ", ".join(NEEDS),
        ),
        (has_no_weight, "must take the tensor to score as its first parameter, called `weight`"),
        (takes_the_weight_second, "must take the tensor to score as its first parameter, called `weight`"),
        (takes_by_position, "must take the tensor to score as its first parameter, called `weight`"),
        (takes_a_need_by_position, "must take the tensor to score as its first parameter, called `weight`"),
        (lambda: WEIGHT, "must take the tensor to score as its first parameter, called `weight`"),
        (dict, "does not say which parameters it takes: write it as a `def`"),
    ],
)
def test_a_function_that_could_not_be_called_is_refused(function: Callable[..., Tensor], said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_signature("m:f", function)
    assert str(caught.value) == f"criterion 'm:f' {said}"
