"""Transposed convolutions, whose weights lie inputs first: rows, patterns and criteria of rows mean their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from orchestrator.ops import Prune
from orchestrator.pruning.criteria import CRITERIA
from orchestrator.pruning.patterns import turned
from orchestrator.pruning.prune import Network, prune

CONVOLUTIONS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


def run(weight: Tensor, groups: int = 1, supplied: Mapping[str, Tensor] | None = None, **said: Any) -> Tensor:
    """The mask of a transposed convolution's weight, called "w"."""
    op = Prune(**{"criterion": "magnitude", "scope": "layer", "transposed": (("w", groups),), **said})
    given = supplied or {}
    return prune(op, Network(weights={"w": weight}), lambda need: {"w": given[need]}).masks["w"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 3), inputs=st.integers(1, 3), outputs=st.integers(1, 3), kernel=st.sampled_from([1, 2]))
def test_turned_is_where_torch_looks_for_an_output(groups: int, inputs: int, outputs: int, kernel: int) -> None:
    shape = (groups * inputs, outputs, *[2] * kernel)
    weight = drawn(*shape)
    seen = turned(weight, groups)
    assert seen.shape == (groups * outputs, inputs, *[2] * kernel)
    assert torch.equal(turned(seen, groups), weight)
    module = CONVOLUTIONS[kernel](groups * inputs, groups * outputs, 2, groups=groups, bias=False)
    module.weight.data.copy_(weight)
    for output in range(groups * outputs):
        one = torch.zeros_like(seen)
        one[output] = seen[output]
        module.weight.data.copy_(turned(one, groups))
        made = module(torch.ones(1, groups * inputs, *[3] * kernel))[0].flatten(1).abs().sum(dim=1)
        assert made.nonzero().flatten().tolist() == [output], "a row makes one output, and nothing else"


def test_a_row_is_an_output_by_eye() -> None:
    # Two inputs, three outputs: the weights of output o are the column o.
    weight = torch.tensor([[9.0, 1.0, 5.0], [8.0, 2.0, 6.0]]).unsqueeze(-1)
    assert run(weight, scope="row", rate=0.5)[:, :, 0].int().tolist() == [[1, 0, 0], [0, 1, 1]]
    assert run(weight, scope="row", sparsity=0.5)[:, :, 0].int().tolist() == [[1, 0, 0], [0, 1, 1]]


def test_rows_of_groups_by_eye() -> None:
    # Two groups of two inputs and two outputs each.
    weight = torch.tensor([[1.0, 4.0], [2.0, 3.0], [8.0, 5.0], [7.0, 6.0]]).unsqueeze(-1)
    assert run(weight, 2, scope="row", rate=0.5)[:, :, 0].int().tolist() == [[0, 1], [1, 0], [1, 0], [0, 1]]


def test_patterns_run_along_the_inputs_at_each_kernel_place() -> None:
    weight = drawn(4, 3, 2, 2)
    mask = run(weight, structure="2:4")
    for output, row, column in product(range(3), range(2), range(2)):
        best = weight[:, output, row, column].abs().topk(2).indices
        assert mask[:, output, row, column].nonzero().flatten().tolist() == sorted(best.tolist())


def test_patterns_run_along_the_inputs_of_a_group() -> None:
    weight = drawn(8, 3, 2)
    mask = run(weight, 2, structure="1:4")
    assert mask.reshape(2, 4, 3, 2).sum(dim=1).eq(1).all()


def test_what_does_not_fit_stays_dense() -> None:
    op = Prune(criterion="magnitude", scope="layer", structure="2:4", transposed=(("w", 1), ("v", 1)))
    found = prune(op, Network(weights={"w": drawn(6, 4, 2), "v": drawn(4, 6, 2)}), lambda need: {})
    assert found.remarks == {"dense": ["w"]} and found.masks["w"].all() and found.masks["v"].sum() == 24


def test_blocks_are_of_outputs_and_what_they_read() -> None:
    weight = torch.ones(2, 4, 1)
    weight[:, :2] = 3.0  # outputs 0 and 1 are the first two rows
    assert run(weight, structure="2x2", rate=0.5)[:, :, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_a_criterion_sees_rows_that_are_outputs() -> None:
    weight = torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 9.0]]).unsqueeze(-1)  # output 1 lies between the others
    assert run(weight, criterion="fpgm", rate=0.3)[:, :, 0].int().tolist() == [[1, 0, 1], [1, 0, 1]]
    scales = {"batchnorm_scale": torch.tensor([-3.0, 1.0, 2.0])}
    assert run(weight, criterion="batchnorm", rate=0.3, supplied=scales)[:, :, 0].int().tolist() == [[1, 0, 1]] * 2


@pytest.fixture
def mine() -> Iterator[Callable[[Callable[..., Tensor]], str]]:
    """Binds a user's criterion for the length of a test."""

    def bind(function: Callable[..., Tensor]) -> str:
        CRITERIA.bind("mine:criterion", function)
        return "mine:criterion"

    yield bind
    CRITERIA._of_users.pop("mine:criterion", None)


def test_a_users_criterion_gets_outputs_first_and_the_gradient_with_it(mine: Callable[..., str]) -> None:
    shapes = []

    def keep_the_first_output(weight: Tensor, gradient: Tensor) -> Tensor:
        shapes.append((weight.shape, gradient.shape))
        return weight * gradient

    weight, gradient = drawn(3, 2, 2), drawn(3, 2, 2, seed=1)
    mask = run(weight, criterion=mine(keep_the_first_output), rate=0.5, supplied={"gradient": gradient})
    assert shapes == [((2, 3, 2), (2, 3, 2))]
    assert set((weight * gradient)[mask].tolist()) == set((weight * gradient).flatten().topk(6).values.tolist())


def test_blocks_of_a_hessian_are_over_the_entries_as_they_lie() -> None:
    weight = torch.ones(2, 3, 1)
    hessian = torch.diag(torch.tensor([6.0, 1.0, 5.0, 2.0, 4.0, 3.0])).unsqueeze(0)
    mask = run(weight, criterion="obs", scope="row", rate=0.5, supplied={"hessian_blocks": hessian})
    assert mask[:, :, 0].int().tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("how", [{"rate": 0.5}, {"sparsity": 0.5}, {"threshold": 0.5, "threshold_unit": "std"}])
def test_layer_scope_does_not_ask_how_a_weight_lies(how: dict[str, Any]) -> None:
    weight = drawn(4, 6, 3)
    assert torch.equal(run(weight, **how), run(weight, transposed=(), **how))
    assert torch.equal(run(weight, scope="global", **how), run(weight, transposed=(), scope="global", **how))
