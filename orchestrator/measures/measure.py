"""Everything that is measured of one state: a row of the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import nn

from orchestrator.errors import NotFinite
from orchestrator.export.packed import packed_file
from orchestrator.measures import flops, size
from orchestrator.measures.accuracy import evaluate
from orchestrator.outcome import OUTCOME_COLUMNS
from orchestrator.pruning.masks import sparsity
from orchestrator.state import State, of_model

if TYPE_CHECKING:
    from orchestrator.stages import Stages
    from orchestrator.tasks.load import LoadedTask


def measure(
    stages: Stages, state: State, *, remarks: Mapping[str, Any] | None = None, latency: bool = False
) -> dict[str, Any]:
    """The measures of a state by column name, on the validation and the test split.

    Args:
        stages: holds the task, its model and data on a device.
        state: what to measure.
        remarks: what the last pruning behind the state had to say; None for a dense model.
        latency: also time the forward pass at batch 1 on this device.

    Raises:
        NotFinite: the validation loss is NaN, so that no other figure means anything.
    """
    loaded = stages.loaded
    model = stages.model_of(state)
    found = _split(model, loaded, "valid", stages.device)
    if isnan(found["loss"]):
        raise NotFinite("the validation loss is nan")
    if loaded.test is not None:
        found |= {f"test_{name}": value for name, value in _split(model, loaded, "test", stages.device).items()}
    layers = {layer.name: [_kept(state, layer.name, layer.size), layer.size] for layer in loaded.info.layers}
    nonzero, total = size.parameters(model, state.masks)
    counted = stages.flops
    effective = float(flops.left(counted, state.masks))
    found |= {
        "sparsity": sparsity(state.masks, {name: of for name, (_, of) in layers.items()}),
        "layers": layers,
        "nonzero_params": nonzero,
        "total_params": total,
        "compression_ratio": size.compression_ratio(nonzero, total),
        "flops": counted.total,
        "flops_effective": effective,
        "theoretical_speedup": size.theoretical_speedup(counted.total, effective),
        "bytes": _file_bytes(state.without_optimizer()),
    }
    timed = model
    if remarks is not None:
        found |= {"floored_layers": len(remarks.get("floored", ())), "dense_layers": len(remarks.get("dense", ()))}
        if "units" in remarks:
            kept_units, of_units = remarks["units"]
            found["unit_sparsity"] = 1 - kept_units / of_units
            timed = _shrunk(stages, state, found) or model
    if latency:
        from orchestrator.measures.latency import median_ms

        found["latency_ms"] = median_ms(timed, stages.example)
    columns = {name: value for name, value in found.items() if name in OUTCOME_COLUMNS}
    return columns | {"metrics": {name: value for name, value in found.items() if name not in OUTCOME_COLUMNS}}


def _file_bytes(state: State) -> int:
    """The smaller of the two files that are fetched: with kept values and their places, or with zeros in full."""
    return min(len(packed_file(state)), len(save(dict(state.weights))))


def _shrunk(stages: Stages, state: State, found: dict[str, Any]) -> nn.Module | None:
    """The really smaller model, whose figures are entered in `found`; None where units cannot be cut away."""
    from orchestrator.removal.shrinking import ShrinkRefused, narrow

    try:
        shrunk = stages.shrunk(state)
    except ShrinkRefused:
        return None
    if shrunk is None:
        return None
    small = State(
        weights=of_model(shrunk.model),
        masks={name: mask for name, mask in narrow(state.masks, shrunk.kept).items() if not mask.all()},
    )
    found["flops_shrunk"] = flops.count(shrunk.model, stages.example).total
    found["bytes"] = min(found["bytes"], _file_bytes(small))
    return shrunk.model


def curve_point(model: nn.Module, loaded: LoadedTask) -> list[float]:
    """[validation loss, main metric] of a model in the middle of its training, whose mode is restored."""
    device = next(iter(model.parameters())).device
    found = _split(model, loaded, "valid", device)
    return [found["loss"], found[next(iter(loaded.metrics))]]


def _split(model: nn.Module, loaded: LoadedTask, name: str, device: Any) -> dict[str, Any]:
    task, split = loaded.task, loaded.test if name == "test" else loaded.valid
    assert split is not None
    groups = loaded.groups.get(name)
    return evaluate(model, split, task.loss, loaded.metrics, loaded.classes, device, groups=groups, step=task.step)


def _kept(state: State, name: str, whole: int) -> int:
    return int(state.masks[name].sum()) if name in state.masks else whole
