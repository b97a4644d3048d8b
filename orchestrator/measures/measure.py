"""Everything that is measured of one state: a row of the ledger."""

from __future__ import annotations

from dataclasses import replace
from math import isnan
from typing import TYPE_CHECKING, Any

from torch import nn

from orchestrator.errors import NotFinite
from orchestrator.measures import flops, size
from orchestrator.measures.accuracy import evaluate
from orchestrator.outcome import OUTCOME_COLUMNS
from orchestrator.pruning.masks import sparsity
from orchestrator.state import State, to_bytes

if TYPE_CHECKING:
    from orchestrator.stages import Stages
    from orchestrator.tasks.data import Split
    from orchestrator.tasks.load import LoadedTask


def measure(stages: Stages, state: State, *, latency: bool = False) -> dict[str, Any]:
    """The measures of a state by column name, on the validation and the test split.

    Args:
        stages: holds the task, its model and data on a device.
        state: what to measure.
        latency: also time the forward pass at batch 1 on this device.

    Raises:
        NotFinite: the validation loss is NaN, so that no other figure means anything.
    """
    loaded = stages.loaded
    model = stages.model_of(state)
    found = _split(model, loaded, loaded.valid, stages.device)
    if isnan(found["loss"]):
        raise NotFinite("the validation loss is nan")
    if loaded.test is not None:
        found |= {f"test_{name}": value for name, value in _split(model, loaded, loaded.test, stages.device).items()}
    layers = {layer.name: [_kept(state, layer.name, layer.size), layer.size] for layer in loaded.info.layers}
    nonzero, total = size.parameters(model, state.masks)
    counted = stages.flops
    effective = flops.effective(counted, {name: (kept, of) for name, (kept, of) in layers.items()})
    found |= {
        "sparsity": sparsity(state.masks, sum(of for _, of in layers.values())),
        "layers": layers,
        "nonzero_params": nonzero,
        "total_params": total,
        "compression_ratio": size.compression_ratio(nonzero, total),
        "flops": counted.total,
        "flops_effective": effective,
        "theoretical_speedup": size.theoretical_speedup(counted.total, effective),
        "bytes": len(to_bytes(replace(state, optimizer={}))),
    }
    if latency:
        from orchestrator.measures.latency import median_ms

        found["latency_ms"] = median_ms(model, stages.example)
    columns = {name: value for name, value in found.items() if name in OUTCOME_COLUMNS}
    return columns | {"metrics": {name: value for name, value in found.items() if name not in OUTCOME_COLUMNS}}


def curve_point(model: nn.Module, loaded: LoadedTask) -> list[float]:
    """[validation loss, main metric] of a model in the middle of its training, whose mode is restored."""
    device = next(iter(model.parameters())).device
    found = _split(model, loaded, loaded.valid, device)
    return [found["loss"], found[next(iter(loaded.metrics))]]


def _split(model: nn.Module, loaded: LoadedTask, split: Split, device: Any) -> dict[str, Any]:
    task = loaded.task
    return evaluate(model, split, task.loss, loaded.metrics, loaded.classes, device, step=task.step)


def _kept(state: State, name: str, whole: int) -> int:
    return int(state.masks[name].sum()) if name in state.masks else whole
