"""What a fetched folder holds, read back: every file is the one that its card describes, or it is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from orchestrator.errors import InputError, UnknownName
from orchestrator.export import CSR, LINEAGE, MASKS, ONNX, PACKED, PT2, SEMI, SHRUNK, WEIGHTS
from orchestrator.export.csr import from_csr
from orchestrator.export.packed import from_packed
from orchestrator.export.semi import from_semi
from orchestrator.export.tensors import masks_of
from orchestrator.stages import Stages
from orchestrator.state import State, into_model
from orchestrator.tasks import BUILTIN
from orchestrator.tasks.load import LoadedTask
from orchestrator.tasks.load import load as load_task
from orchestrator.tasks.source import collect

CARD = "card.json"

NEEDS: Mapping[str, Sequence[str]] = {
    "masked": (WEIGHTS,),
    "packed": (PACKED,),
    "shrunk": (WEIGHTS, MASKS, SHRUNK),
    "csr": (CSR,),
    "2:4": (SEMI,),
    "pt2": (PT2,),
    "onnx": (ONNX,),
}
"""The files that each form of a model is made of."""

FILES = (*dict.fromkeys(name for needed in NEEDS.values() for name in needed), LINEAGE)
"""All that a card may list."""

WITHOUT_TASK = ("pt2", "onnx")
"""Forms that need neither the task nor its classes."""


def load(folder: str | Path, task: str | None = None, *, format: str | None = None, shrunk: bool = True) -> nn.Module:
    """The pruned model that was fetched into `folder`, in evaluation mode.

    Args:
        folder: what `fetch` wrote.
        task: the user's task file or module, whose model class it is; built-in tasks, pt2 and ONNX need none.
        format: "safetensors", "packed" (the smallest copy), "csr" (sparse linear layers), "2:4" (see
            `orchestrator.export.semi`), "pt2" or "onnx" (run by ONNX
            Runtime). By default safetensors, but pt2 for a model of the user's own task that comes without the task.
        shrunk: of safetensors without the units that were removed, where they could be cut out; else, and where only
            single weights were pruned, the model in full with zeros for what is gone.

    Raises:
        InputError: a file is missing or not what the card says, the folder has not this format, or the model does not
            fit the weights.
        ShrinkRefused: the shrunk model does not compute what the masked one does.
    """
    folder = Path(folder)
    card = read_card(folder)
    form = _form(folder, card, task, format, shrunk)
    files = read_files(folder, card, NEEDS[form])
    stages = None if form in WITHOUT_TASK else Stages(task_of(folder, card, task))
    try:
        return build(form, files, stages)
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: {error}") from error


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a fetched folder.

    Raises:
        InputError: there is none, or it is none of ours.
    """
    try:
        card = json.loads((folder / CARD).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no fetched model: cannot read {CARD} ({error})") from error
    if not isinstance(card, dict) or not isinstance(card.get("files"), dict) or "task" not in card:
        raise InputError(f"{folder} holds no fetched model: {CARD} is not a card that `fetch` wrote")
    for name in card["files"]:
        if name not in FILES:
            raise InputError(f"{folder / CARD} lists {name!r}, which no fetch writes; legal: {', '.join(FILES)}")
    return card


def read_files(folder: Path, card: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, bytes]:
    """The contents of some files of a fetched folder; all others that are there are checked too.

    Raises:
        InputError: a wanted file is missing, or one differs from what the card says.
    """
    found = {}
    for name, expected in card["files"].items():
        path = folder / name
        if name not in wanted and not path.exists():
            continue
        content = _read(path)
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise InputError(f"{path} is not the file that was fetched: its hash differs from the card's")
        if name in wanted:
            found[name] = content
    for name in wanted:
        if name not in found:
            raise InputError(f"{folder} holds no {name}: legal: {', '.join(card['files'])}")
    return found


def task_of(folder: Path, card: Mapping[str, Any], task: str | None) -> LoadedTask:
    """The task of a fetched model: a built-in one, or the user's that they name.

    Raises:
        InputError: it is a user's task and none was named; TaskError: it cannot be loaded.
    """
    name = task or card["task"]
    if task is None and name not in BUILTIN:
        raise InputError(f"{folder} is a model of your own task: orchestrator.load({str(folder)!r}, task={name!r})")
    return load_named(name, card, Path.cwd())


def load_named(name: str, card: Mapping[str, Any], root: Path, checkpoint: str = "") -> LoadedTask:
    """The task called `name` with the card's parameters."""
    return load_task(collect(name, root, checkpoint), card["task_params"], root)


def build(form: str, files: Mapping[str, bytes], stages: Stages | None = None, *, threads: int = 1) -> nn.Module:
    """A model in one of the forms of `NEEDS` from the contents of its files, in evaluation mode on the CPU.

    Args:
        form: "masked" is the full model with zeros, whatever was cut out.
        files: by name.
        stages: of the model's task on the CPU, for all forms but pt2 and onnx.
        threads: for ONNX Runtime.

    Raises:
        InputError: a file cannot be read; ValueError: the model does not fit it.
    """
    if form == "pt2":
        from orchestrator.export import pt2  # torch's exporters take their time to import

        return pt2.from_bytes(files[PT2])
    if form == "onnx":
        from orchestrator.export import onnx

        return onnx.from_bytes(files[ONNX], threads)
    assert stages is not None
    match form:
        case "csr":
            return from_csr(files[CSR], stages.model())
        case "2:4":
            return from_semi(files[SEMI], stages.model())
        case "packed":
            return _filled(stages.model(), from_packed(files[PACKED]).weights)
        case "shrunk":
            small = stages.shrunk(state_of(files))
            if small is None:
                raise InputError("its masks remove no whole unit, so that nothing can be cut out")
            return _filled(small.model, load_tensors(files[SHRUNK]))
        case _:
            return _filled(stages.model(), load_tensors(files[WEIGHTS]))


def state_of(files: Mapping[str, bytes]) -> State:
    """Weights and masks in full coordinates."""
    return State(weights=load_tensors(files[WEIGHTS]), masks=masks_of(files[MASKS]))


def forms_of(files: Sequence[str]) -> list[str]:
    """The forms that can be made of some files."""
    return [form for form, needed in NEEDS.items() if set(needed) <= set(files)]


def write(path: Path, content: bytes) -> None:
    """Write one file of a fetched folder, which is made where it is not there.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _form(folder: Path, card: Mapping[str, Any], task: str | None, format: str | None, shrunk: bool) -> str:
    """The form that a user asks for."""
    there = forms_of(card["files"])
    own = card["task"] not in BUILTIN
    if format is None:
        format = "pt2" if own and task is None and "pt2" in there else "safetensors"
    legal = ["safetensors", *(form for form in NEEDS if form not in ("masked", "shrunk"))]
    if format not in legal:
        raise UnknownName("format", format, legal)
    if format == "safetensors":
        return "shrunk" if shrunk and "shrunk" in there else "masked"
    if format not in there:
        has = ", ".join(name for name in legal if name == "safetensors" or name in there)
        raise InputError(f"{folder} was not fetched as {format}; legal: {has}")
    return format


def _filled(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    into_model(weights, model)
    return model.eval()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
