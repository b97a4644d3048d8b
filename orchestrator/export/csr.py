"""Linear layers whose zeros are skipped: compressed sparse rows (CSR), for CPUs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from orchestrator.errors import InputError
from orchestrator.state import into_model, of_model

SPARSE_ENOUGH = 0.7
"""The least share of zeros at which a layer is made sparse; with fewer, dense products are faster everywhere."""


class SparseLinear(nn.Module):
    """What `nn.Linear` computes, from the non-zero weights alone; for evaluation.

    Args:
        weight: (out, in), strided.
        bias: (out,) or None.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        with _without_warnings():
            sparse = weight.detach().to_sparse_csr()
        self.shape = tuple(weight.shape)
        self.register_buffer("rows", sparse.crow_indices().to(torch.int32))
        self.register_buffer("columns", sparse.col_indices().to(torch.int32))
        self.register_buffer("values", sparse.values())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._weight: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, self.shape[1])
        weight = self._sparse()
        product = torch.mv(weight, flat[0])[None] if len(flat) == 1 else (weight @ flat.t()).t()
        outputs = product if self.bias is None else product + self.bias
        return outputs.reshape(*inputs.shape[:-1], self.shape[0])

    def _sparse(self) -> Tensor:
        # Made once: building it takes longer than a product.
        if self._weight is None:
            with _without_warnings(), torch.inference_mode(False):
                self._weight = torch.sparse_csr_tensor(
                    self.rows, self.columns, self.values, self.shape, check_invariants=True
                )
        return self._weight


def to_csr(model: nn.Module) -> nn.Module | None:
    """A copy of the model whose sparse linear layers are `SparseLinear`; None where no layer is sparse enough.

    Layers that a module above reads directly, as `nn.MultiheadAttention` does, are left as they are.
    """
    small = copy.deepcopy(model)
    names = [name for name, layer in linear_layers(small) if float((layer.weight == 0).float().mean()) >= SPARSE_ENOUGH]
    for name in names:
        layer = small.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        _replace(small, name, SparseLinear(layer.weight, layer.bias))
    return small.eval() if names else None


def csr_file(model: nn.Module) -> bytes:
    """The tensors of a model of `to_csr`: each sparse layer's `rows` (out + 1), `columns` and `values` (non-zeros)."""
    return save(of_model(model))


def from_csr(content: bytes, model: nn.Module) -> nn.Module:
    """The model with the sparse layers of `csr_file`; the model given is changed.

    Raises:
        InputError: the tensors do not fit the model, or are no valid CSR.
    """
    given = load(content)
    for name in [name.removesuffix(".columns") for name in given if name.endswith(".columns")]:
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"the sparse layer {name!r} is not in the model") from error
        if not isinstance(layer, nn.Linear):
            raise InputError(f"the sparse layer {name!r} is a {type(layer).__name__} in the model, not a Linear")
        _replace(model, name, _from_tensors(name, layer, given))
    try:
        into_model(given, model)
    except ValueError as error:
        raise InputError(str(error)) from error
    return model.eval()


def _from_tensors(name: str, layer: nn.Linear, given: Mapping[str, Tensor]) -> SparseLinear:
    empty = SparseLinear(torch.zeros_like(layer.weight), layer.bias)
    for part in ("rows", "columns", "values"):
        setattr(empty, part, given[f"{name}.{part}"].clone())
    try:
        empty._sparse()
    except RuntimeError as error:
        raise InputError(f"the sparse layer {name!r} is no valid CSR: {str(error).splitlines()[0]}") from error
    return empty


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers that are only ever called."""
    readers = tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.TransformerEncoderLayer) and name
    )
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name and not any(name.startswith(f"{reader}.") for reader in readers)
    ]


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, local = name.rpartition(".")
    setattr(model.get_submodule(parent), local, layer)


class _without_warnings(warnings.catch_warnings):
    """Torch calls CSR a beta feature, once in each process."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
