"""How much memory a forward pass takes beside the model and its inputs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator.tasks.data import Nested, call, tensors


def peak_bytes(model: nn.Module, inputs: Nested) -> int:
    """The most that a forward pass without gradients holds at once, in bytes; weights and inputs are not counted.

    On a CPU the tensors that torch's operations return are added up, without what a kernel needs inside, and with whole
    encoder layers run operation by operation; on CUDA it is what the allocator gave out at most.
    """
    device = next((tensor.device for _, tensor in tensors(inputs)), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            call(model, inputs)
        return torch.cuda.max_memory_allocated(device) - before
    held = [tensor for _, tensor in tensors(inputs)] + [*model.parameters(), *model.buffers()]
    counter = _Held(held)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), counter:
            call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.peak


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that are alive, each once; those known beforehand count nothing."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its whole compiler at the first call, for more than a second

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = [tensor.untyped_storage() for tensor in known if tensor.layout is torch.strided]
        self.storages: weakref.WeakSet[Any] = weakref.WeakSet(self.known)
        self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self.storages:
            return
        self.storages.add(storage)
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size
