"""Floating-point operations of one forward pass: two for every multiply-accumulate.

Counted below the level of modules, at the matrix products and convolutions that torch really runs. So functional calls
count as modules do, a module called twice counts twice, and attention's products of queries, keys and values count too;
biases, norms and activations do not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.tasks.data import Nested, call

UNATTRIBUTED = ""
"""The key of work that no parameter takes part in: attention's QK^T and its product with V."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations in all, and by the parameter whose weights they multiply (its first name, where it is tied)."""

    total: int
    by_tensor: Mapping[str, int]


def count(model: nn.Module, example: Nested) -> Flops:
    """The operations of one forward pass of `model` in evaluation mode on `example`, which holds one row.

    Every matrix product and convolution is counted as dense arithmetic, 2·MACs, including padding and masked weights.
    A weight that the model transforms before it multiplies (a parametrisation) is unattributed: key `""`.

    Args:
        model: on the example's device; its training mode is restored.
        example: inputs as the task gives them, a tensor, tuple or dict.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    counter = _Counter(model)
    try:
        with torch.no_grad(), plain_kernels(), counter:
            call(model, example)
    finally:
        for module, training in modes.items():
            module.training = training
    return Flops(total=sum(counter.flops.values()), by_tensor=counter.flops)


def effective(flops: Flops, kept: Mapping[str, tuple[int, int]]) -> float:
    """Operations if masked weights cost nothing: each tensor's count times its kept fraction.

    Args:
        flops: from `count`.
        kept: parameter name -> (kept, total) weights; tensors that are not named count in full.
    """
    return float(sum(work * _fraction(*kept.get(name, (1, 1))) for name, work in flops.by_tensor.items()))


def _fraction(kept: int, total: int) -> float:
    return kept / total if total else 1.0


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations of what torch runs, by the parameter in whose storage an operand lies."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its whole compiler at the first call, for more than a second

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[str, int] = {}
        self.places: dict[int, list[tuple[int, int, str]]] = {}
        for name, parameter in model.named_parameters():
            start = int(parameter.storage_offset())
            place = (start, start + parameter.numel(), name)
            self.places.setdefault(parameter.untyped_storage().data_ptr(), []).append(place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = OPERANDS.get(func.overloadpacket)
        if operands is not None:
            first, second = (args[index] for index in operands)
            work = 2 * _multiplications(func.overloadpacket, first, second, args, result)
            name = self._name_of(second) or self._name_of(first) or UNATTRIBUTED
            self.flops[name] = self.flops.get(name, 0) + work
        return result

    def _name_of(self, tensor: Tensor) -> str | None:
        offset = tensor.storage_offset()
        for start, end, name in self.places.get(tensor.untyped_storage().data_ptr(), ()):
            if start <= offset < end:
                return name
        return None


aten = torch.ops.aten
OPERANDS: dict[Any, tuple[int, int]] = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.mv: (0, 1),
    aten.dot: (0, 1),
    aten.addmm: (1, 2),
    aten.addmv: (1, 2),
    aten.addbmm: (1, 2),
    aten.baddbmm: (1, 2),
    aten.convolution: (0, 1),
}
"""Where the two operands of each product stand among its arguments. All other operations are made of these, or are no
products."""


def _multiplications(operation: Any, first: Tensor, second: Tensor, args: Any, result: Any) -> int:
    if operation is aten.convolution:
        # A transposed convolution multiplies its whole weight at each place of its input, a plain one at each place of
        # its output. The weight's second dimension is that of one group already.
        transposed = args[6]
        places: Tensor = first if transposed else result
        return places.shape[0] * prod(places.shape[2:]) * second.numel()
    return first.numel() * (second.shape[-1] if second.ndim > 1 else 1)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Fused kernels for attention and recurrent layers off: they hide the products that they are made of, and cannot be
    differentiated twice."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            # Setting oneDNN's flags warns of hardware that is not there.
            warnings.simplefilter("ignore")
            flags: Callable[..., Any] = torch.backends.mkldnn.flags
            with flags(enabled=False), torch.backends.cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
