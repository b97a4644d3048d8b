"""The proof that a smaller model computes what the masked one does, or the first layer where it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from orchestrator.errors import StageFailed
from orchestrator.tasks.data import Nested, call, move, tensors, transform

ROWS = 4
"""Examples in a random batch of the proof."""

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference from the masked model's outputs, relative to the largest of these."""


class ShrinkRefused(StageFailed):
    """A model that cannot be shrunk, or not shown to compute the same afterwards; names the layer and why."""

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"cannot shrink {repr(layer) if layer else 'the model'}: {reason}")
        self.layer = layer
        self.reason = reason

    def __reduce__(self) -> tuple[type[ShrinkRefused], tuple[str, str]]:
        return type(self), (self.layer, self.reason)


def prove(masked: nn.Module, small: nn.Module, example: Nested, *, inputs: Sequence[Nested] = ()) -> None:
    """Shows that two models give equal outputs in evaluation mode; leaves both as they were.

    Equal means within `TOLERANCES` of their type, on random inputs of the example's shape and on each of `inputs`.

    Raises:
        ShrinkRefused: they do not; the message names the first layer whose outputs differ.
    """
    device = next((tensor.device for tensor in masked.parameters()), torch.device("cpu"))
    example = move(example, device)
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)  # TF32 is off by 1e-3
    with exact, evaluated(masked), evaluated(small):
        random, expected = random_batch(masked, example)
        _compare(masked, small, random, expected)
        for batch in inputs:
            batch = move(batch, device)
            _compare(masked, small, batch, outputs_of(masked, batch))


M = TypeVar("M", bound=nn.Module)


def copied(model: M) -> M:
    """A copy of the model.

    Raises:
        ShrinkRefused: it holds what cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # a weight that is computed from others, as by the old weight_norm
        raise ShrinkRefused("", f"it cannot be copied ({first_line(error)})") from error


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode while the context lasts, each module in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def random_batch(model: nn.Module, example: Nested) -> tuple[Nested, list[tuple[str, Tensor]]]:
    """Random inputs like the example, with `ROWS` rows where the model takes so many, and the model's outputs.

    Raises:
        ShrinkRefused: the model runs on neither such inputs nor its example.
    """
    draw = torch.Generator().manual_seed(0)
    reason = ""
    for rows in (ROWS, None):
        batch = transform(partial(_drawn, rows=rows, draw=draw), example)
        try:
            return batch, outputs_of(model, batch)
        except Exception as error:  # it may be bound to a number of rows, or to some values
            reason = first_line(error)
    try:
        return example, outputs_of(model, example)
    except Exception as error:
        raise ShrinkRefused("", f"it runs neither on random inputs ({reason}) nor on its example") from error


def _drawn(tensor: Tensor, rows: int | None, draw: torch.Generator) -> Tensor:
    if not tensor.dim():
        return tensor
    shape = (tensor.shape[0] if rows is None else rows, *tensor.shape[1:])
    if tensor.is_floating_point() or tensor.is_complex():
        values = torch.randn(shape, generator=draw, dtype=tensor.dtype)
        if tensor.is_floating_point() and tensor.numel() and tensor.min() < tensor.max():
            low, high = tensor.min().cpu(), tensor.max().cpu()  # a model may rely on it that shades are from 0 to 1
            values = low + (high - low) * torch.rand(shape, generator=draw, dtype=tensor.dtype)
        return values.to(tensor.device)
    chosen = torch.arange(shape[0]) % tensor.shape[0]
    if tensor.dtype == torch.bool:  # a mask drawn afresh might hide everything
        return tensor[chosen.to(tensor.device)]
    values = tensor.flatten()  # only these are known to be legal
    return values[torch.randint(len(values), shape, generator=draw).to(tensor.device)]


def outputs_of(model: nn.Module, inputs: Nested) -> list[tuple[str, Tensor]]:
    """The model's output tensors with their places; the same random numbers for each call."""
    cuda = [tensor.device for _, tensor in tensors(inputs) if tensor.device.type == "cuda"]
    with torch.no_grad(), torch.random.fork_rng(devices=cuda[:1]):
        torch.manual_seed(0)
        return list(tensors(call(model, transform(torch.clone, inputs))))


def _compare(masked: nn.Module, small: nn.Module, batch: Nested, expected: Sequence[tuple[str, Tensor]]) -> None:
    with _traced(small) as trace:
        try:
            found = outputs_of(small, batch)
        except Exception as error:
            raise ShrinkRefused(trace.place, f"it does not take the narrower tensors ({first_line(error)})") from error
    if not expected or len(expected) != len(found):
        raise ShrinkRefused("", f"it gives {len(found)} tensors to compare with {len(expected)}")
    for (place, before), (_, after) in zip(expected, found, strict=True):
        if before.shape != after.shape:
            layer, _ = _first_difference(masked, small, batch)
            shapes = f"{tuple(after.shape)}, not {tuple(before.shape)}"
            raise ShrinkRefused(layer, f"the model's output{place} would have shape {shapes}")
        error_ = _difference(before, after)
        if error_ > _tolerance(before):
            layer, local = _first_difference(masked, small, batch)
            raise ShrinkRefused(
                layer,
                f"its outputs differ from the masked model's by {local or error_:.1e} of their size"
                f" (the model's output{place} by {error_:.1e})",
            )


def _difference(before: Tensor, after: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where only one is not finite."""
    if not before.numel():
        return 0.0
    if not (before.is_floating_point() or before.is_complex()):
        return 0.0 if torch.equal(before, after) else float("inf")
    finite = torch.isfinite(before)
    if not torch.equal(finite, torch.isfinite(after)):
        return float("inf")
    if not finite.any():
        return 0.0
    gap, scale = (before - after)[finite].abs().max(), before[finite].abs().max()
    return float(gap / scale) if scale else float(gap)


def _tolerance(tensor: Tensor) -> float:
    if tensor.is_floating_point():
        return TOLERANCES.get(tensor.dtype, 16 * torch.finfo(tensor.dtype).eps)
    return 0.0


class _Trace:
    """Which module a forward pass is in: those entered and not left, and the last that was left."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.left = ""

    @property
    def place(self) -> str:
        """The module at work, or, where that is one that calls others, the last one before the trouble."""
        inside = self.inside[-1] if self.inside else ""
        return self.left if not inside or self.left.startswith(f"{inside}.") else inside


@contextmanager
def _traced(model: nn.Module) -> Iterator[_Trace]:
    trace = _Trace()

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: trace.inside.append(path)

    def leave(path: str) -> Callable[..., None]:
        def left(*_: Any) -> None:
            trace.inside.pop()
            trace.left = path

        return left

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path)))
        handles.append(module.register_forward_hook(leave(path)))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(masked: nn.Module, small: nn.Module, batch: Nested) -> tuple[str, float | None]:
    """The first module, in the order in which they finish, that gives anything but a part of what it gave."""
    expected: dict[str, list[list[Tensor]]] = {}
    for path, outputs in _recorded(masked, batch):
        expected.setdefault(path, []).append(outputs)
    for path, outputs in _recorded(small, batch):
        before = expected[path].pop(0) if expected.get(path) else []
        for one, other in zip(before, outputs, strict=False):
            if one.shape == other.shape:
                difference = _difference(one, other)
                if difference > _tolerance(one):
                    return path, difference
            elif not _is_part(other, one):
                return path, None
    return "", None


def _recorded(model: nn.Module, batch: Nested) -> list[tuple[str, list[Tensor]]]:
    """What each module gave, in the order in which they finished."""
    record: list[tuple[str, list[Tensor]]] = []

    def keep(path: str) -> Callable[..., None]:
        return lambda _module, _given, output: record.append((path, [t.clone() for _, t in tensors(output)]))

    handles = [module.register_forward_hook(keep(path)) for path, module in model.named_modules() if path]
    try:
        outputs_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return record


def _is_part(small: Tensor, large: Tensor) -> bool:
    """Whether `small` is `large` without some positions along one dimension."""
    if small.dim() != large.dim():
        return False
    dims = [dim for dim in range(large.dim()) if small.shape[dim] != large.shape[dim]]
    if len(dims) != 1 or small.shape[dims[0]] > large.shape[dims[0]]:
        return False
    rows = iter(large.movedim(dims[0], 0))
    limit = _tolerance(large) * float(large.abs().max()) if large.numel() else 0.0
    return all(any(bool(((row - wanted).abs() <= limit).all()) for row in rows) for wanted in small.movedim(dims[0], 0))


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
