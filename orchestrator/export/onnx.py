"""A model as an ONNX graph, and that graph run by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.errors import InputError
from orchestrator.export import ExportRefused
from orchestrator.export.pt2 import Exported, quiet
from orchestrator.removal.proof import first_line
from orchestrator.tasks.data import tensors

OPSET = 20
"""The version of ONNX's operators that the graph is written in."""

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def refuse_without_packages() -> None:
    """Refuse to begin where the packages are missing that ONNX needs."""
    from importlib.util import find_spec

    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX needs {' and '.join(missing)}: pip install 'orchardist[export]'")


def to_bytes(exported: Exported) -> bytes:
    """The content of an `.onnx` file, weights included; open in the first dimension where the graph is.

    Raises:
        ExportRefused: an operation has no counterpart in ONNX; the message names the first.
    """
    with quiet():
        try:
            written = torch.onnx.export(exported.program, dynamo=True, opset_version=OPSET, verbose=False)
            assert written is not None
            content = written.model_proto.SerializeToString()
        except Exception as error:  # the exporter raises many kinds
            while error.__cause__ is not None and isinstance(error.__cause__, Exception):
                error = error.__cause__
            raise ExportRefused(f"torch.onnx cannot write the model: {first_line(error)}") from error
    assert isinstance(content, bytes)
    return content


def from_bytes(content: bytes, threads: int = 1) -> nn.Module:
    """The graph of an `.onnx` file as a module that ONNX Runtime runs on the CPU.

    It takes and gives tensors, a tuple of them where the graph has several outputs; a dict of inputs goes by name.

    Raises:
        InputError: ONNX Runtime is missing, or cannot read the graph.
    """
    refuse_without_packages()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return Graph(onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]))
    except Exception as error:  # its errors have no family of their own
        raise InputError(f"ONNX Runtime cannot read the model: {first_line(error)}") from error


class Graph(nn.Module):
    """A session of ONNX Runtime as a module; for evaluation, on the CPU."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.names = [given.name for given in session.get_inputs()]
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_place = dict(zip(self.names, (tensor for _, tensor in tensors(args)), strict=False))
        given = by_place | {name: tensor for name, tensor in kwargs.items() if isinstance(tensor, Tensor)}
        # Numbers that the model does not read are no inputs of the graph.
        feed = {name: given[name].numpy() for name in self.names if name in given}
        outputs = tuple(torch.from_numpy(output) for output in self.session.run(None, feed))
        return outputs[0] if len(outputs) == 1 else outputs

    def train(self, mode: bool = True) -> Graph:
        if mode:
            raise InputError("a model that ONNX Runtime runs cannot be trained")
        return self
