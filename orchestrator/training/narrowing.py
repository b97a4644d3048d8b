"""Linear layers without the input columns that need no arithmetic: the same training, in less time.

A column needs none when all its weights are masked, or when its input is zero in every training example: it adds
nothing to the output, and its weights get no gradient that counts. Which layers are narrowed follows from the plan
alone (model, masks, recipe, data) and never from a weight's value, so a plan is always or never run this way and stays
reproducible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LEAST_SHARE = 1 / 32
"""A layer is left whole when fewer of its columns than this are idle: gathering the inputs would cost what it saves."""

MULTIPLE = 16
"""Kept columns are filled up with idle ones to a multiple of this, for the matrix kernels' sake."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, kw_only=True)
class Narrowable:
    """The linear layers of a model that may be narrowed, by the names of their weights."""

    alone: frozenset[str] = frozenset()
    """Nothing but the layer's own forward pass looks at the weight, not even at its shape."""
    on_input: frozenset[str] = frozenset()
    """Those of them that are only ever handed the model's input itself, flattened at most."""


class Narrowed:
    """A model in the middle of narrowed training; `columns` are the kept ones of each narrowed weight."""

    def __init__(self, model: nn.Module, columns: Mapping[str, Tensor]) -> None:
        self.columns = columns
        self._layers = {name: _layer(model, name) for name in columns}
        self._whole: dict[str, nn.Parameter] = {}
        self._narrow: dict[str, nn.Parameter] = {}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The model as it is in full while the context lasts: other data than the training split need every column."""
        self._restore()
        try:
            yield
        finally:
            for name in self.columns:
                self._install(name)

    def _install(self, name: str) -> None:
        layer, columns = self._layers[name], self.columns[name]
        whole = layer.weight
        assert isinstance(whole, nn.Parameter)
        if name not in self._narrow:
            self._narrow[name] = nn.Parameter(whole.detach().index_select(1, columns), whole.requires_grad)
        self._whole[name] = whole
        layer.weight = self._narrow[name]

        def forward(self: nn.Linear, input: Tensor) -> Tensor:
            return F.linear(input.index_select(-1, columns), self.weight, self.bias)

        vars(layer)["forward"] = MethodType(forward, layer)

    def _restore(self) -> None:
        while self._whole:
            name, whole = self._whole.popitem()
            with torch.no_grad():
                whole[:, self.columns[name]] = self._narrow[name]  # the idle columns are as they were
            self._layers[name].weight = whole
            vars(self._layers[name]).pop("forward", None)


@contextmanager
def narrowed(
    model: nn.Module, masks: Mapping[str, Tensor], layers: Narrowable, silent: Tensor | None = None
) -> Iterator[Narrowed]:
    """Narrow the model's linear layers while the context lasts, in place; whole again whatever happens.

    Args:
        model: holds masked weights.
        masks: by parameter name.
        layers: of the model, from `examine`.
        silent: bool, one entry for each input feature: True where it is zero in every training example. Only given
            where weights without a gradient stay as they are.
    """
    columns = {}
    for name in sorted(layers.alone):
        weight = _layer(model, name).weight
        idle = torch.zeros(weight.shape[1], dtype=torch.bool)
        if name in masks:
            idle |= ~masks[name].any(dim=0).to("cpu")
        if silent is not None and name in layers.on_input and len(silent) == len(idle):
            idle |= silent
        kept = _kept(idle)
        if LEAST_SHARE * len(idle) <= idle.sum() < len(idle) and len(kept) < len(idle):
            columns[name] = kept.to(weight.device)
    changed = Narrowed(model, columns)
    try:
        for name in columns:
            changed._install(name)
        yield changed
    finally:
        changed._restore()


def widen_columns(tensor: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    """`tensor` of shape (rows, len(columns)) in the full shape of `like`, zero in the other columns."""
    full = torch.zeros_like(like)
    full[:, columns] = tensor
    return full


def examine(model: nn.Module, inputs: Any, step: Callable[[nn.Module], Any]) -> Narrowable:
    """Which linear layers may be narrowed, found by watching one training step.

    Args:
        model: a copy to be thrown away.
        inputs: what the step hands to the model.
        step: computes the training loss on two examples or more, with the user's code in it.
    """
    on_input_at_all = only_torch(model)  # else what comes before the layer might differ from step to step
    watch = _Watch(dict(_candidates(model)), inputs if isinstance(inputs, Tensor) and inputs.ndim > 1 else None)
    if not watch.layers:
        return Narrowable()
    model.train()
    try:
        with watch:
            step(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # what cannot be watched is left whole; if the step itself is wrong, training will say so
        return Narrowable()
    alone = frozenset(watch.called - watch.read)
    return Narrowable(alone=alone, on_input=alone - watch.elsewhere if on_input_at_all else frozenset())


def only_torch(model: nn.Module) -> bool:
    """Whether torch's own modules are all there is: no user's code runs in the forward pass."""
    for module in model.modules():
        if not is_torchs(type(module)) or any(getattr(module, hooks) for hooks in HOOKS):
            return False
        for value in vars(module).values():
            if callable(value) and not isinstance(value, nn.Module) and not is_torchs(value):
                return False
            if isinstance(value, MethodType):  # a forward pass put in the place of the class's
                return False
    return True


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Plain linear layers whose weight is theirs alone, by parameter name."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or any(getattr(module, hooks) for hooks in HOOKS) or "forward" in vars(module):
            continue
        weight = module.weight
        hooked = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
        if type(weight) is nn.Parameter and uses[id(weight)] == 1 and weight.numel() and not hooked:
            yield f"{path}.weight" if path else "weight", module


class _Watch(TorchFunctionMode):
    """Notes who looks at the weights of `layers`: every torch function that is handed one, or a view of one."""

    def __init__(self, layers: Mapping[str, nn.Linear], inputs: Tensor | None) -> None:
        super().__init__()
        self.layers = layers
        self.called: set[str] = set()
        self.read: set[str] = set()
        self.elsewhere: set[str] = set()
        self._inputs = inputs
        self._version = None if inputs is None else inputs._version
        self._inside: str | None = None
        self._names: dict[int, list[str]] = {}
        for name, layer in layers.items():
            self._names.setdefault(_storage(layer.weight), []).append(name)
            vars(layer)["forward"] = self._watched(name, layer)

    def _watched(self, name: str, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            self.called.add(name)
            if type(input) is not Tensor or input.layout is not torch.strided or input.is_nested:
                self.read.add(name)
            if not self._is_inputs(input):
                self.elsewhere.add(name)
            outer, self._inside = self._inside, name
            try:
                return nn.Linear.forward(layer, input)
            finally:
                self._inside = outer

        return forward

    def _is_inputs(self, given: Tensor) -> bool:
        """Whether these are the model's inputs, flattened at most, and nothing has written on them."""
        inputs = self._inputs
        return (
            inputs is not None
            and given.data_ptr() == inputs.data_ptr()
            and given.shape == inputs.flatten(1).shape
            and given.is_contiguous()
            and given._version == self._version
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors(args, kwargs):
            self.read.update(name for name in self._names.get(_storage(tensor), ()) if name != self._inside)
        return func(*args, **(kwargs or {}))


def _tensors(*values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(*value.values())
        elif isinstance(value, (tuple, list)):
            yield from _tensors(*value)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and the like have none
        return 0


def is_torchs(thing: Any) -> bool:
    """Whether a class, a function or an object's class was defined by torch."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0] == "torch"


def _layer(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(layer, nn.Linear)
    return layer


def _kept(idle: Tensor) -> Tensor:
    """Indices of the columns that are kept, with the first idle ones to fill up."""
    filler = torch.nonzero(idle).squeeze(1)[: -int((~idle).sum()) % MULTIPLE]
    keep = ~idle
    keep[filler] = True
    return torch.nonzero(keep).squeeze(1)
