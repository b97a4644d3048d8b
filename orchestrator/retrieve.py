"""Take a model home: choose it, write it in the forms that were asked for, and certify what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator import history
from orchestrator.errors import InputError, QueryError, TaskError, UnknownName
from orchestrator.export import CSR, FORMATS, LINEAGE, SEMI, SHRUNK, ExportRefused, artefact
from orchestrator.export.card import card_of, claim, enter_files, explained, in_words
from orchestrator.export.certificate import card_bytes, certify, difference, forms_of, sample
from orchestrator.export.csr import csr_file, to_csr
from orchestrator.export.lineage import prunings
from orchestrator.export.semi import packable, semi_file
from orchestrator.export.tensors import files_of, shrunk_file
from orchestrator.removal.shrinking import ShrinkRefused
from orchestrator.report.lineage import picture
from orchestrator.stages import Stages
from orchestrator.state import State, from_bytes
from orchestrator.tasks.data import call
from orchestrator.tasks.load import LoadedTask

if TYPE_CHECKING:
    from orchestrator.store.states import States
    from orchestrator.study import Study

_SHORTEST_KEY = 6
_FARTHEST = 1e-3
"""A form whose outputs differ by more from the masked model's, relative to the largest of these, is not handed out."""


def fetch(
    study: Study,
    key: str | None,
    folder: Path,
    *,
    where: Sequence[str] = (),
    minimise: str | None = None,
    formats: Sequence[str] = ("safetensors",),
) -> Path:
    """Write one model of a study into `folder`.

    `weights.safetensors` is a plain state dict with zeros for what was pruned, `masks.safetensors` has a 0/1 tensor for
    each pruned weight, `packed.safetensors` is the smallest copy of both (kept values and where they stand). Where
    whole units are gone and can be cut out, `shrunk.safetensors` is the state dict of the smaller model; where linear
    layers run faster as compressed sparse rows on this CPU, measured, `csr.safetensors` holds them so; those of the
    structure 2:4 are in `two_of_four.safetensors`, for GPUs that skip what is gone. `model.pt2` and `model.onnx` are
    the model, without its removed units, as a graph; `lineage.svg` draws the way to it. `card.json` says what the model
    is: measures, lineage, what each pruning removed and cost and what retraining gave back, digests, versions, and the
    certificate: that all of these compute the same, and how fast each is here.

    Args:
        study: an opened study.
        key: which state, or its first characters; None takes the knee of the front, or the best by `minimise`.
        folder: is made; files of the same names in it are replaced, and those of an earlier fetch go.
        where: bounds for choosing from the front.
        minimise: the measure to choose by.
        formats: any of `FORMATS`; safetensors are always written. One that the model cannot be written in is left out,
            and the card's `refused` says why.

    Raises:
        UnknownName: a format that is none.
        QueryError: no such state, or nothing keeps the bounds.
        InputError: `folder` cannot be written, or what ONNX needs is not installed.
    """
    _refuse_formats(formats)
    refuse_folder(folder)
    chosen = meant(study, key, where, minimise)
    data = study.state(chosen)
    state = from_bytes(data).without_optimizer()
    header = study.store.states.header(chosen["key"]) or {}
    files = files_of(state)
    card = card_of(study, chosen, json.loads(header.get("lineage", "[]")))
    note = ""
    try:
        loaded = artefact.load_named(card["task"], card, study.root, study.task_of(chosen).checkpoint)
        if loaded.info.digest != card["task_digest"]:
            raise TaskError("the task has changed since")
        note = _certified(card, files, loaded, state, formats, study.store.states)
    except TaskError as error:
        card["refused"] |= {name: str(error) for name in formats if name != "safetensors"}
        note = f" The model was not rebuilt to compare: {error}."
    enter_files(card, files)
    card["says"] = in_words(card, card["certificate"]) + note
    _remove_earlier(folder, files)
    for name, content in files.items():
        artefact.write(folder / name, content)
    artefact.write(folder / artefact.CARD, card_bytes(card))
    return folder


def meant(study: Study, key: str | None, where: Sequence[str], minimise: str | None) -> dict[str, Any]:
    """The outcome that is to be fetched; arguments as for `fetch`."""
    return _row(study, key if key is not None else _choose(study, where, minimise))


def _certified(
    card: dict[str, Any],
    files: dict[str, bytes],
    loaded: LoadedTask,
    state: State,
    formats: Sequence[str],
    states: States,
) -> str:
    """Adds the other files and the certificate; gives what else is to be said."""
    note = ""
    stages = Stages(loaded)
    masked = artefact.build("masked", files, stages)
    small = None
    try:
        shrunk = stages.shrunk(state)
        small = None if shrunk is None else shrunk.model.eval()
    except ShrinkRefused as error:
        note = f" The removed units are still there as zeros: {error}."
    sparse = to_csr(masked) if small is None else None
    if small is not None:
        files[SHRUNK] = shrunk_file(small)
    if sparse is not None:
        files[CSR] = csr_file(sparse)
    if any(entry.get("structure") == "2:4" for entry in card["lineage"]) and packable(masked):
        files[SEMI] = semi_file(masked)
    _export(card, files, masked if small is None else small, loaded, formats)
    card["prunings"] = prunings(card["lineage"], states, stages)
    files[LINEAGE] = picture(card["prunings"], f"The way to {card['key'][:12]}")
    found, card["latency"] = certify(loaded, masked, forms_of(files, stages, masked, card["exports"]))
    card["certificate"] |= found
    rows = sample(loaded.valid, 64)
    with torch.no_grad():
        stored = call(stages.model_of(state.masked()).eval(), rows)
        card["certificate"]["reloaded"] = difference(stored, call(masked, rows))
    _withdraw(card, files)
    return note


def _export(
    card: dict[str, Any], files: dict[str, bytes], model: nn.Module, loaded: LoadedTask, formats: Sequence[str]
) -> None:
    """Adds the graphs that were asked for, or why one is not there."""
    wanted = [name for name in artefact.WITHOUT_TASK if name in formats]
    if not wanted:
        return
    from orchestrator.export import onnx, pt2

    try:
        program = pt2.export(model, sample(loaded.valid, pt2.MANY + 1))
    except ExportRefused as error:
        card["refused"] |= dict.fromkeys(wanted, str(error))
        return
    for name in wanted:
        (file,) = artefact.NEEDS[name]
        try:
            content = pt2.to_bytes(program) if name == "pt2" else onnx.to_bytes(program)
            artefact.build(name, {file: content})
        except (ExportRefused, InputError) as error:
            card["refused"][name] = str(error)
            continue
        files[file] = content
        card["exports"][name] = {"rows": program.rows, "reason": program.reason}
        if name == "onnx":
            card["exports"][name]["opset"] = onnx.OPSET


def _withdraw(card: dict[str, Any], files: dict[str, bytes]) -> None:
    """Takes back the files that are not what they should be: another model's outputs, or a CSR that is no faster."""
    certificate = card["certificate"]
    limit = _FARTHEST * certificate["largest_output"]
    most = explained(card["measures"], {name: len(content) for name, content in files.items()}, "csr")
    for name in ("pt2", "onnx", "csr"):
        difference = certificate[name]
        if difference is None:
            continue
        reason = ""
        if not difference <= limit:
            reason = f"its outputs differ from the masked model's by {difference:.1e}"
        elif name == "csr" and not any(claim(e, most) == "faster" for e in card["latency"] if e["format"] == name):
            reason = "linear layers as compressed sparse rows are not faster here"
        if reason:
            card["refused"][name] = reason
            certificate[name] = None
            card["exports"].pop(name, None)
            del files[artefact.NEEDS[name][0]]


def _refuse_formats(formats: Sequence[str]) -> None:
    for name in formats:
        if name not in FORMATS:
            raise UnknownName("format", name, FORMATS)
    if "onnx" in formats:
        from orchestrator.export import onnx

        onnx.refuse_without_packages()


def refuse_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before anything is read for it."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise InputError(f"cannot write a model into {folder}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write a model into {folder}: {there} is not writable")


def _remove_earlier(folder: Path, files: Mapping[str, bytes]) -> None:
    """Removes what an earlier fetch wrote and this one does not: it would be of another model."""
    with suppress(InputError, OSError):
        for name in artefact.read_card(folder)["files"]:
            if name not in files:
                (folder / name).unlink(missing_ok=True)


def _choose(study: Study, where: Sequence[str], minimise: str | None) -> str:
    found = study.front(where, minimise)
    if not found.points or found.knee is None:
        endings = history.read(study.store, study.spec.name).endings.values()
        if study.spec.constraints and any(ending.state != "failed" for ending in endings):
            bounds = " and ".join(f"{measure} {bound}" for measure, bound in study.spec.constraints.items())
            raise QueryError(f"no point of the study {study.spec.name!r} keeps its constraints: {bounds}")
        raise QueryError(f"the study {study.spec.name!r} has no finished trial yet")
    key = found.points[0 if minimise else found.knee]["key"]
    assert isinstance(key, str)
    return key


def _row(study: Study, key: str) -> dict[str, Any]:
    """The outcome whose key begins with `key`."""
    outcomes = study.store.outcomes(study.spec.name)
    found = outcomes.starting_with(key)
    if len(key) < _SHORTEST_KEY or not found:
        raise QueryError(
            f"no state {key!r} in the study {study.spec.name!r}; `front` shows keys, "
            f"{_SHORTEST_KEY} characters are enough"
        )
    if len(found) > 1:
        raise QueryError(f"{len(found)} states begin with {key!r}: give more of the key")
    (row,) = outcomes.rows(found)
    return row
