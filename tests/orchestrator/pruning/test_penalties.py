"""Penalties against autograd of what they say they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from orchestrator.pruning.penalties import PENALTIES, Rows

WRITTEN: dict[str, Callable[[Tensor, Rows], Tensor]] = {
    "l1": lambda weight, rows: weight.abs().sum(),
    "l2": lambda weight, rows: weight.square().sum() / 2,
    "group-lasso": lambda weight, rows: (
        rows.roots * torch.linalg.vector_norm(weight, dim=rows.dims, keepdim=True)
    ).sum(),
}
SHAPES = [((4, 5), (1,)), ((3, 2, 3, 3), (1, 2, 3)), ((2, 4, 3, 2), (1, 3)), ((6, 1), (1,))]


def test_every_penalty_has_its_oracle() -> None:
    assert set(WRITTEN) == set(PENALTIES.names)


@pytest.mark.parametrize(("shape", "dims"), SHAPES)
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_added_is_the_gradient_of_the_written_penalty(
    name: str, shape: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_()
    before = torch.randn(shape, dtype=torch.float64, generator=draw)
    sizes = torch.rand([1 if dim in dims else n for dim, n in enumerate(shape)], dtype=torch.float64, generator=draw)
    rows = Rows(dims=dims, roots=sizes.sqrt())
    (0.3 * WRITTEN[name](weight, rows)).backward()  # type: ignore[no-untyped-call]
    found = before.clone()
    PENALTIES[name].function(weight.detach(), found, 0.3, rows)
    assert weight.grad is not None
    assert torch.allclose(found, before + weight.grad, rtol=1e-14, atol=1e-15)


def test_answers_by_eye() -> None:
    weight = torch.tensor([[3.0, -4.0], [0.0, 0.0], [0.0, -2.0]])
    for name, expected in {
        "l1": [[2, -2], [0, 0], [0, -2]],
        "l2": [[6, -8], [0, 0], [0, -4]],
        # 2 · the root of each row's size · its unit vector.
        "group-lasso": [[4.8, -6.4], [0, 0], [0, -2]],
    }.items():
        gradient = torch.zeros(3, 2)
        PENALTIES[name].function(weight, gradient, 2.0, Rows(dims=(1,), roots=torch.tensor([[4.0], [4.0], [1.0]])))
        assert torch.allclose(gradient, torch.tensor(expected, dtype=torch.float32)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", PENALTIES.names)
def test_zeros_stay_zero_and_nothing_overflows(name: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([[1000.0, -2.0, 0.0], [0.0, 0.0, 0.0], [-0.0, 1e-7, 0.0]]).to(dtype)
    gradient = torch.zeros(3, 3, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    PENALTIES[name].function(
        weight, gradient, 0.5, Rows(dims=(1,), roots=torch.tensor([[1.7], [0.0], [1.7]], dtype=wide))
    )
    assert gradient.dtype == dtype
    assert torch.isfinite(gradient).all()
    assert not gradient[weight == 0].any()
    assert torch.equal(gradient.sign(), weight.sign()) or name == "l2"


def test_a_norm_beyond_the_range_of_halves() -> None:
    weight = torch.tensor([[6e4, 6e4]], dtype=torch.float16)
    gradient = torch.zeros_like(weight)
    PENALTIES["group-lasso"].function(weight, gradient, 0.5, Rows(dims=(1,), roots=torch.tensor([[2**0.5]])))
    assert gradient.tolist() == [[0.5, 0.5]]
