"""Floating-point operations of one forward pass: two for every multiply-accumulate.

Counted below the level of modules, at the matrix products and convolutions that torch really runs. So functional calls
count as modules do, a module called twice counts twice, and attention's products of queries, keys and values count too,
which go with the heads that they belong to; biases, norms and activations do not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.pruning.masks import count as kept_count
from orchestrator.tasks.data import Nested, call

UNATTRIBUTED = ""
"""The key of work that no parameter takes part in, such as the products in an attention written by hand."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The products of an `nn.MultiheadAttention` that no parameter takes part in: QK^T, and its product with V.

    Args:
        work: operations of all heads together; each has the same share.
        count: how many heads there are.
        makers: the parameters that make the heads, each with how often it goes through all of them.
    """

    work: int
    count: int
    makers: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations in all, by the parameter whose weights they multiply (its first name, where it is tied), and of heads.

    The heads of an attention stand under the name of the first parameter that makes them.
    """

    total: int
    by_tensor: Mapping[str, int]
    by_heads: Mapping[str, Heads] = field(default_factory=dict)


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
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    handles = [module.register_forward_pre_hook(counter.enter) for module in attentions]
    handles += [module.register_forward_hook(counter.leave, always_call=True) for module in attentions]
    try:
        with torch.no_grad(), plain_kernels(), counter:
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    heads = counter.heads()
    total = sum(counter.flops.values()) + sum(each.work for each in heads.values())
    return Flops(total=total, by_tensor=counter.flops, by_heads=heads)


def left(flops: Flops, masks: Mapping[str, Tensor]) -> Fraction:
    """Operations if masked weights cost nothing, exactly.

    Each tensor's count times its kept fraction, and each attention's products times the fraction of its heads of which
    anything that makes them is kept.

    Args:
        flops: from `count`.
        masks: by parameter name, a tied parameter's first; True = kept. A tensor without one is dense.
    """
    of_tensors = (_left(masks.get(name), work) for name, work in flops.by_tensor.items())
    of_heads = (Fraction(each.work * _alive(each, masks), each.count) for each in flops.by_heads.values())
    return sum(of_tensors, Fraction(0)) + sum(of_heads, Fraction(0))


def _left(mask: Tensor | None, work: int) -> Fraction:
    return Fraction(work) if mask is None or not mask.numel() else Fraction(work * kept_count(mask), mask.numel())


def _alive(heads: Heads, masks: Mapping[str, Tensor]) -> int:
    """How many heads are kept."""
    alive = torch.zeros(heads.count, dtype=torch.bool)
    for name, times in heads.makers:
        if name not in masks:
            return heads.count
        alive |= masks[name].reshape(times, heads.count, -1).any(dim=2).any(dim=0)
    return kept_count(alive)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations of what torch runs, by the parameter in whose storage an operand lies."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its whole compiler at the first call, for more than a second

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[str, int] = {}
        self.places: dict[int, list[tuple[int, int, str]]] = {}
        self.inside: list[nn.Module] = []
        self.products: dict[nn.Module, int] = {}
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
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
            if name == UNATTRIBUTED and self.inside:
                self.products[self.inside[-1]] = self.products.get(self.inside[-1], 0) + work
            else:
                self.flops[name] = self.flops.get(name, 0) + work
        return result

    def enter(self, attention: nn.Module, given: Any) -> None:
        """A hook before an attention."""
        self.inside.append(attention)

    def leave(self, attention: nn.Module, given: Any, output: Any) -> None:
        """A hook behind it."""
        self.inside.pop()

    def heads(self) -> dict[str, Heads]:
        """The products of each attention, by the name of its first projection."""
        found: dict[str, Heads] = {}
        for attention, work in self.products.items():
            assert isinstance(attention, nn.MultiheadAttention)
            held = [(getattr(attention, local), times) for local, times in PROJECTIONS]
            makers = tuple((self.names[id(tensor)], times) for tensor, times in held if id(tensor) in self.names)
            before = found[makers[0][0]].work if makers[0][0] in found else 0
            found[makers[0][0]] = Heads(work=before + work, count=attention.num_heads, makers=makers)
        return found

    def _name_of(self, tensor: Tensor) -> str | None:
        offset = tensor.storage_offset()
        for start, end, name in self.places.get(tensor.untyped_storage().data_ptr(), ()):
            if start <= offset < end:
                return name
        return None


PROJECTIONS = (
    *(("in_proj_weight", 3), ("q_proj_weight", 1), ("k_proj_weight", 1), ("v_proj_weight", 1)),
    ("in_proj_bias", 3),
)
"""What an `nn.MultiheadAttention` makes its heads with, and how often each goes through all of them."""

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
