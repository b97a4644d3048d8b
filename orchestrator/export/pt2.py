"""A model as a graph that runs without its classes (`torch.export`), in a file that holds no pickle."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._sympy.numbers import int_oo

from orchestrator.errors import InputError
from orchestrator.export import ExportRefused
from orchestrator.export.archive import refuse_code
from orchestrator.removal.proof import first_line
from orchestrator.tasks.data import Nested, call, tensors, transform

MANY = 2
"""The rows of the inputs that a model for any number of rows is traced on."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A model as a graph. `rows` is 1 where it takes one row at a time, and `reason` says why; None: any number."""

    program: ExportedProgram
    rows: Literal[1] | None
    reason: str = ""


def export(model: nn.Module, inputs: Nested) -> Exported:
    """The graph of a model in evaluation mode, for any number of rows where the model allows it.

    Args:
        model: on the CPU; stays as it is.
        inputs: real inputs of three rows.

    Raises:
        ExportRefused: torch cannot trace the model; the message names the first reason.
    """
    reason = ""
    for rows in (MANY, 1):
        some = _first(inputs, rows)
        try:
            program = _traced(model, some, any_number=rows > 1)
            if rows == 1:
                return Exported(program=program, rows=1, reason=reason)
            if _takes_any_number(program) and _same(program, model, inputs):
                return Exported(program=program, rows=None)
            reason = "what it computes depends on the number of rows"
        except Exception as error:  # whatever a model's own code raises while it is traced
            reason = reason or f"{type(error).__name__}: {first_line(error)}"
    raise ExportRefused(f"torch.export cannot trace the model: {reason}")


def to_bytes(exported: Exported) -> bytes:
    """The content of a `.pt2` file: weights as plain numbers, the graph as JSON, no sample inputs.

    Raises:
        ExportRefused: torch could only write a part of it as a pickle, which nobody should have to read.
    """
    program = copy.copy(exported.program)
    program.example_inputs = None  # what torch would pickle
    buffer = BytesIO()
    with quiet():
        torch.export.save(program, buffer)
    try:
        refuse_code(buffer.getvalue())
    except InputError as error:
        raise ExportRefused(f"the pt2 file would not be safe to read: {error}") from error
    return buffer.getvalue()


def from_bytes(content: bytes) -> nn.Module:
    """The model of a `.pt2` file, in evaluation mode for good. Nothing is unpickled.

    Raises:
        InputError: this is no such file, or it holds a pickle, compiled code, or a shape that is not plain arithmetic.
    """
    refuse_code(content)
    try:
        with quiet():
            return Program(torch.export.load(BytesIO(content)).module())
    except Exception as error:  # torch raises many kinds on what it did not write
        raise InputError(f"torch cannot read the model: {first_line(error)}") from error


class Program(nn.Module):
    """A graph as a module that can be evaluated like any other; it cannot be trained."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph(*args, **kwargs)

    def train(self, mode: bool = True) -> Program:
        if mode:
            raise InputError("a model that was loaded from pt2 is for evaluation: it cannot be trained")
        return self


@contextmanager
def quiet() -> Iterator[None]:
    """Torch's exporters without their warnings and notes, which concern those who write exporters."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Logits(nn.Module):
    """A model that returns an object, reduced to its logits; takes what the model takes, under the same names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        def forward(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs).logits

        # Torch finds the inputs' places by the signature.
        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
        self.forward = forward


def arguments(inputs: Nested) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as a call of the model takes them: by position and by name."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _traced(model: nn.Module, inputs: Nested, *, any_number: bool) -> ExportedProgram:
    model = copy.deepcopy(model).eval()  # tracing leaves traces in an LSTM
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        if hasattr(model(*args, **kwargs), "logits"):
            model = _Logits(model).eval()
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for _, tensor in tensors(inputs):
        if tensor.dim():
            shapes[tensor] = {0: Dim.AUTO}
    with quiet(), torch.no_grad():
        dynamic = shapes.dynamic_shapes(model, args, kwargs) if any_number else None  # type: ignore[no-untyped-call]
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic)


def _takes_any_number(program: ExportedProgram) -> bool:
    """Whether the first dimension of every input was left open, from one row on."""
    given = set(program.graph_signature.user_inputs)
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in given]
    rows = [shape[0] for shape in shapes if len(shape)]
    if not rows or any(isinstance(number, int) for number in rows):
        return False
    bounds = [program.range_constraints[number.node.expr] for number in rows]
    return all(bound.lower <= 2 and bound.upper == int_oo for bound in bounds)


def _same(program: ExportedProgram, model: nn.Module, inputs: Nested) -> bool:
    """Whether the graph computes what the model does for one row and for several: it may have asked how many."""
    graph = program.module()
    for rows in (1, MANY + 1):
        some = _first(inputs, rows)
        with torch.no_grad():
            pairs = zip(tensors(call(graph, some)), tensors(call(model, some)), strict=True)
            if not all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for (_, one), (_, other) in pairs):
                return False
    return True


def _first(inputs: Nested, rows: int) -> Nested:
    return transform(lambda tensor: tensor[:rows].clone() if tensor.dim() else tensor, inputs)
