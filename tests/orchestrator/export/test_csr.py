"""Layers that skip their zeros compute what the full ones do."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from orchestrator.errors import InputError
from orchestrator.export.csr import SparseLinear, csr_file, from_csr, to_csr
from orchestrator.tasks.models import Transformer, mlp


def sparse_mlp() -> nn.Sequential:
    """Three quarters of the first layer's weights are zero, and none of the others'."""
    torch.manual_seed(0)
    model = mlp(8, 6, 2)
    with torch.no_grad():
        model.get_parameter("fc1.weight").view(-1)[torch.arange(48) % 4 > 0] = 0
    return model.eval()


@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (8,), (2, 3, 8), (0, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_sparse_layer_computes_the_same(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(8, 6, bias=bias)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    inputs = torch.randn(shape)
    found = SparseLinear(layer.weight, layer.bias)(inputs)
    assert found.shape == (*shape[:-1], 6) and torch.allclose(found, layer(inputs), atol=1e-6)


def test_rows_columns_and_values() -> None:
    layer = SparseLinear(torch.tensor([[0.0, 2.0], [0.0, 0.0], [3.0, 4.0]]), None)
    assert layer.rows.tolist() == [0, 1, 1, 3]
    assert layer.columns.tolist() == [1, 0, 1]
    assert layer.values.tolist() == [2, 3, 4]


def test_only_layers_that_are_sparse_enough_become_sparse() -> None:
    model = sparse_mlp()
    found = to_csr(model)
    assert found is not None
    assert type(found.get_submodule("fc1")) is SparseLinear and type(found.get_submodule("out")) is nn.Linear
    assert torch.allclose(found(torch.ones(2, 8)), model(torch.ones(2, 8)), atol=1e-6)
    assert to_csr(mlp(8, 6, 2)) is None


def test_layers_that_others_read_are_left_alone() -> None:
    model = Transformer(2, 4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = to_csr(model)
    assert found is not None and type(found.get_submodule("layer1.linear1")) is nn.Linear
    assert found(torch.ones(1, 8)).shape == (1, 10)


def test_the_file_comes_back_into_a_fresh_model() -> None:
    model = sparse_mlp()
    sparse = to_csr(model)
    assert sparse is not None
    content = csr_file(sparse)
    assert set(load(content)) == {
        "fc1.rows", "fc1.columns", "fc1.values", "fc1.bias", "out.weight", "out.bias"
    }  # fmt: skip
    back = from_csr(content, mlp(8, 6, 2))
    assert torch.equal(back(torch.ones(3, 8)), sparse(torch.ones(3, 8)))


def test_files_that_do_not_fit_are_refused() -> None:
    sparse = to_csr(sparse_mlp())
    assert sparse is not None
    given = load(csr_file(sparse))
    with pytest.raises(InputError, match="'fc1' is a ReLU in the model"):
        from_csr(csr_file(sparse), nn.ModuleDict({"fc1": nn.ReLU(), "out": nn.Linear(6, 2)}))
    with pytest.raises(InputError, match="'fc1' is not in the model"):
        from_csr(csr_file(sparse), nn.ModuleDict({"out": nn.Linear(6, 2)}))
    with pytest.raises(InputError, match="no valid CSR"):
        from_csr(save(given | {"fc1.columns": given["fc1.columns"] + 8}), mlp(8, 6, 2))
    with pytest.raises(InputError, match="do not fit the model"):
        from_csr(save({name: tensor for name, tensor in given.items() if name != "out.bias"}), mlp(8, 6, 2))
