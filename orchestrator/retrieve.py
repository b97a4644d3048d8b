"""Take a model home: weights, masks and a card that says what it is; and load it back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import nn

from orchestrator import __version__
from orchestrator.canonical import finite
from orchestrator.errors import InputError, QueryError, TaskError
from orchestrator.outcome import MEASURES
from orchestrator.state import State, from_bytes, into_model, to_bytes
from orchestrator.tasks import BUILTIN
from orchestrator.tasks.data import call, transform
from orchestrator.tasks.load import LoadedTask, isolated
from orchestrator.tasks.load import load as load_task
from orchestrator.tasks.source import collect

if TYPE_CHECKING:
    from orchestrator.study import Study

WEIGHTS, MASKS, PACKED, CARD = "weights.safetensors", "masks.safetensors", "packed.safetensors", "card.json"
_SHORTEST_KEY = 6


def fetch(
    study: Study, key: str | None, folder: Path, *, where: Sequence[str] = (), minimise: str | None = None
) -> Path:
    """Write one model of a study into `folder`.

    `weights.safetensors` is a plain state dict with zeros for what was pruned, `masks.safetensors` has a 0/1 tensor for
    each pruned weight, `packed.safetensors` is the smallest copy (mask bits and kept values), `card.json` says what the
    model is: measures, lineage, digests, versions.

    Args:
        study: an opened study.
        key: which state, or its first characters; None takes the knee of the front, or the best by `minimise`.
        folder: is made; files of the same names in it are replaced.
        where: bounds for choosing from the front.
        minimise: the measure to choose by.

    Raises:
        QueryError: no such state, or nothing keeps the bounds.
        InputError: `folder` cannot be written.
    """
    _refuse_folder(folder)
    chosen = _row(study, key if key is not None else _choose(study, where, minimise))
    data = study.store.states.read(chosen["key"])
    if data is None:
        raise QueryError(f"the state {chosen['key'][:12]} is no longer in the store {study.store.name}; run it again")
    state = replace(from_bytes(data), optimizer={})
    header = study.store.states.header(chosen["key"]) or {}
    files = {
        WEIGHTS: save(dict(state.weights)),
        MASKS: save({name: mask.to(torch.uint8) for name, mask in state.masks.items()}),
        PACKED: to_bytes(state),
    }
    for name, content in files.items():
        _write(folder / name, content)
    card = _card(study, chosen, json.loads(header.get("lineage", "[]")), files)
    try:
        loaded = _load_task(card["task"], card, study.root)
        if loaded.info.digest != card["task_digest"]:
            raise TaskError("the task has changed since")
        card["certificate"]["reloaded"] = _difference(loaded, state, _model(folder, loaded))
    except TaskError as error:
        card["says"] += f" The model was not rebuilt to compare: {error}."
    _write(folder / CARD, (json.dumps(finite(card), indent=2, allow_nan=False) + "\n").encode())
    return folder


def load(folder: str | Path, task: str | None = None) -> nn.Module:
    """The pruned model that was fetched into `folder`, in evaluation mode.

    Args:
        folder: what `fetch` wrote.
        task: the user's task file or module, whose model class it is; built-in tasks need none.

    Raises:
        InputError: a file is missing or not what the card says, or the model does not fit the weights.
    """
    folder = Path(folder)
    try:
        card = json.loads((folder / CARD).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no fetched model: cannot read {CARD} ({error})") from error
    for name, expected in card["files"].items():
        content = _read(folder / name)
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise InputError(f"{folder / name} is not the file that was fetched: its hash differs from the card's")
    name = task or card["task"]
    if task is None and name not in BUILTIN:
        raise InputError(f"{folder} is a model of your own task: orchestrator.load({str(folder)!r}, task={name!r})")
    return _model(folder, _load_task(name, card, Path.cwd()))


def _load_task(name: str, card: Mapping[str, Any], root: Path) -> LoadedTask:
    return load_task(collect(name, root), card["task_params"], root)


def _model(folder: Path, loaded: LoadedTask) -> nn.Module:
    with isolated(0):
        model = loaded.model()
    try:
        into_model(load_tensors(_read(folder / WEIGHTS)), model)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error
    return model.eval()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _refuse_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before anything is read for it."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise InputError(f"cannot write a model into {folder}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write a model into {folder}: {there} is not writable")


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _difference(loaded: LoadedTask, state: State, model: nn.Module) -> float:
    """The greatest absolute difference between the outputs of the fetched model and of the stored state."""
    with isolated(0):
        original = loaded.model()
    into_model(state.masked().weights, original)
    inputs, _ = loaded.valid.take(torch.arange(min(64, len(loaded.valid))))
    with torch.no_grad():
        pairs = zip(_flat(call(original.eval(), inputs)), _flat(call(model, inputs)), strict=True)
        return max(float((one.double() - other.double()).abs().max()) for one, other in pairs)


def _flat(outputs: Any) -> list[torch.Tensor]:
    """Every tensor of a model's outputs, in order."""
    found: list[torch.Tensor] = []
    transform(found.append, outputs)
    return found


def _choose(study: Study, where: Sequence[str], minimise: str | None) -> str:
    found = study.front(where, minimise)
    if not found.points or found.knee is None:
        if study.spec.constraints and study.status()["trials"]["done"]:
            bounds = " and ".join(f"{measure} {bound}" for measure, bound in study.spec.constraints.items())
            raise QueryError(f"no point of the study {study.spec.name!r} keeps its constraints: {bounds}")
        raise QueryError(f"the study {study.spec.name!r} has no finished trial yet")
    key = found.points[0 if minimise else found.knee]["key"]
    assert isinstance(key, str)
    return key


def _row(study: Study, key: str) -> dict[str, Any]:
    """The outcome whose key begins with `key`."""
    table = study.table()
    keys: list[str] = table["key"].to_pylist()
    found = [index for index, full in enumerate(keys) if full.startswith(key)]
    if len(key) < _SHORTEST_KEY or not found:
        raise QueryError(
            f"no state {key!r} in the study {study.spec.name!r}; `front` shows keys, "
            f"{_SHORTEST_KEY} characters are enough"
        )
    if len(found) > 1:
        raise QueryError(f"{len(found)} states begin with {key!r}: give more of the key")
    row = table.take(found).to_pylist()[0]
    assert isinstance(row, dict)
    return row


def _card(
    study: Study, row: Mapping[str, Any], lineage: list[dict[str, Any]], files: Mapping[str, bytes]
) -> dict[str, Any]:
    measures = {name: row[name] for name in MEASURES if row[name] is not None} | json.loads(row["metrics"] or "{}")
    for name in ("class_accuracy", "test_class_accuracy"):
        if row[name] is not None:
            measures[name] = row[name]
    return {
        "key": row["key"],
        "study": study.spec.name,
        "trial": row["trial"],
        "round": row["round"],
        "seed": row["seed"],
        "params": json.loads(row["params"] or "{}"),
        "measures": measures,
        "layers": json.loads(row["layers"] or "{}"),
        "lineage": lineage,
        "certificate": {"reloaded": None, "shrunk": None, "pt2": None, "onnx": None},
        "latency": [],
        "bytes": {name.partition(".")[0]: len(content) for name, content in files.items()},
        "says": _says(measures, files),
        "task": study.spec.task,
        "task_params": study.spec.task_params,
        "task_digest": row["task_digest"],
        "root": str(study.root),
        "study_digest": study.spec.digest(),
        "versions": json.loads(row["versions"] or "{}") | {"orchardist": __version__},
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }


def _says(measures: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
    plain, packed = len(files[WEIGHTS]), len(files[PACKED])
    return (
        f"{measures['sparsity']:.1%} of the prunable weights are gone: {measures['compression_ratio']:.1f}x fewer "
        f"parameters, {packed:,} bytes packed instead of {plain:,}. No speed-up is claimed: runtimes do not skip "
        "unstructured zeros."
    )
