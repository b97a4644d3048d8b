"""The forms in which a pruned model is taken home, one module each: files of tensors, CSR layers, pt2 and ONNX."""

from __future__ import annotations

from orchestrator.errors import OrchardistError

FORMATS = {
    "safetensors": "weights, masks, a packed copy; also without removed units, as CSR where that is faster, and as 2:4",
    "pt2": "the whole model as a graph of torch.export, which needs neither the task nor its classes",
    "onnx": "the whole model as an ONNX graph, with any number of rows where the model takes any",
}
"""What `fetch --format` knows; safetensors are always written."""


WEIGHTS, MASKS, PACKED = "weights.safetensors", "masks.safetensors", "packed.safetensors"
SHRUNK, CSR = "shrunk.safetensors", "csr.safetensors"
PT2, ONNX = "model.pt2", "model.onnx"
SEMI = "two_of_four.safetensors"
LINEAGE = "lineage.svg"


class ExportRefused(OrchardistError):
    """A model that cannot be written in a form, or not shown to compute the same there; the message says why."""
