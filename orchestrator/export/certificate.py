"""The proof that a fetched model is the one it says it is, in each of its forms, and what it costs on this device."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from orchestrator.canonical import finite
from orchestrator.errors import InputError, TaskError
from orchestrator.export import MASKS, WEIGHTS, ExportRefused, artefact
from orchestrator.export.card import in_words
from orchestrator.export.semi import HalfPrecision, accelerated, why_not
from orchestrator.measures.accuracy import BATCH_SIZE, concatenate
from orchestrator.measures.latency import compare
from orchestrator.measures.memory import peak_bytes
from orchestrator.ops import Init
from orchestrator.stages import Stages, build
from orchestrator.tasks.data import Nested, Split, call, move, tensors, transform
from orchestrator.tasks.load import LoadedTask
from orchestrator.training.loop import arithmetic

BATCHES = (1, 64)
"""Rows in a timed forward pass."""

COMPARED = 256
"""Validation rows, at most, on which the forms' outputs are compared."""

SCORED = 10_000
"""Rows, at most, on which each form's accuracy is measured."""

SECONDS = 0.5
"""About how long each pair of models is timed at each batch."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of the pruned model, and the dense model in the same form.

    Args:
        pruned: in evaluation mode, on the device.
        dense: what it is timed against; None: it is not timed.
        rows: 1 where both take only one row at a time; None: they take any number.
    """

    pruned: nn.Module
    dense: nn.Module | None = None
    rows: Literal[1] | None = None


def certify(
    loaded: LoadedTask,
    masked: nn.Module,
    forms: Mapping[str, Form],
    *,
    device: str = "cpu",
    threads: int = 1,
    seconds: float = SECONDS,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compares the forms of a pruned model with the masked one, and times them.

    Args:
        loaded: the task, whose validation rows the outputs are compared on.
        masked: the full model with zeros for what is gone, on the device.
        forms: by name; "torch" is the shrunk model where units were cut out, else the masked one. Others are "shrunk",
            "csr", "2:4", "pt2" and "onnx".
        device: "cpu" or "cuda".
        threads: of a CPU.
        seconds: about how long each form is timed at each batch.

    Returns:
        The certificate: by form the greatest absolute difference of its outputs, beside how far `rounding` alone takes
        the masked model's from those in double precision; the accuracies; and the peak memory of a forward pass. And
        one entry for each form and batch that was timed: medians and quartiles in milliseconds, and the 95 % interval
        of dense time over pruned time.
    """
    with _arithmetic(device, threads):
        found: dict[str, Any] = {"device": device_name(device), "threads": threads, "at": _now()}
        rows = sample(loaded.valid, min(COMPARED, len(loaded.valid)), device)
        # In the same batches, so that rounding is all that can differ.
        expected = {
            alone: _outputs(masked, _batches_of(rows, alone)) for alone in {form.rows for form in forms.values()}
        }
        found["compared_rows"] = len(next(tensors(rows))[1])
        found["largest_output"] = max(float(tensor.abs().max()) for _, tensor in tensors(expected[None]))
        found["rounding"] = _rounding(masked, rows, expected[None])
        for name, form in forms.items():
            outputs = _outputs(form.pruned, _batches_of(rows, form.rows), expected[form.rows])
            found[name] = difference(expected[form.rows], outputs)
        del found["torch"]
        found["accuracy"] = _accuracies(loaded, {"masked": Form(pruned=masked), **forms}, device)
        eager = forms["torch"]
        assert eager.dense is not None
        many = _repeated(rows, BATCHES[-1])
        found["peak_memory"] = {
            "batch": BATCHES[-1],
            "dense": peak_bytes(eager.dense, many),
            "pruned": peak_bytes(eager.pruned, many),
        }
        timed = [
            _timed(name, form, _repeated(rows, batch), batch, device, threads, seconds)
            for name, form in forms.items()
            for batch in BATCHES
            if form.dense is not None and form.rows in (None, batch)
        ]
    return found, timed


def measure(
    folder: str | Path, task: str | None = None, *, device: str | None = None, threads: int = 1
) -> dict[str, Any]:
    """Certifies a fetched model again, on this device, and adds that to its card.

    The latencies of other devices stay as they are, and so does what they certified.

    Args:
        folder: what `fetch` wrote.
        task: the user's task file or module; built-in tasks need none.
        device: "cpu" or "cuda"; by default a GPU where there is one. On a GPU only safetensors are measured.
        threads: of a CPU.

    Returns:
        The card as it is now; `measured` is this certificate.

    Raises:
        InputError: the folder, the task or the device is not what it should be.
    """
    folder = Path(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _refuse_device(device, threads)
    card = artefact.read_card(folder)
    there = [name for name in card["files"] if name in (WEIGHTS, MASKS) or (folder / name).exists()]
    files = artefact.read_files(folder, card, there)
    loaded = artefact.task_of(folder, card, task)
    # With a checkpoint the digest is also of its file, which need not be on this machine.
    if not card["checkpoint"] and loaded.info.digest != card["task_digest"]:
        raise TaskError(f"the task {task or card['task']!r} is not the one that {folder} was made with: it has changed")
    stages = Stages(loaded)
    masked = artefact.build("masked", files, stages).to(device)
    forms = forms_of(files, stages, masked, card["exports"], device=device, threads=threads)
    found, timed = certify(loaded, masked, forms, device=device, threads=threads)
    found = {name: card["certificate"].get(name) for name in ("reloaded",)} | found
    where = (found["device"], found["threads"])
    card["latency"] = [e for e in card["latency"] if (e["device"], e["threads"]) != where] + timed
    if _where(card["certificate"]) in (where, None):
        card["certificate"] |= found
        card["says"] = in_words(card, found)
    else:
        others = [other for other in card.get("elsewhere", []) if _where(other["certificate"]) != where]
        card["elsewhere"] = [*others, {"certificate": found, "says": in_words(card, found)}]
    artefact.write(folder / artefact.CARD, card_bytes(card))
    return card | {"measured": found | {"says": in_words(card, found), "latency": timed}}


def forms_of(
    files: Mapping[str, bytes],
    stages: Stages,
    masked: nn.Module,
    exports: Mapping[str, Mapping[str, Any]],
    *,
    device: str = "cpu",
    threads: int = 1,
) -> dict[str, Form]:
    """Every form that can be made of some files, each with the dense model beside it; for `certify`.

    Args:
        files: contents by name.
        stages: of the task, on the CPU.
        masked: the full model with zeros, on the device.
        exports: the card's: for pt2 and onnx `rows`, 1 where they take only one row at a time, else None.
        device: on another one than "cpu" there are only "torch", "shrunk" and, where it skips what is gone, "2:4".
        threads: for ONNX Runtime.
    """
    there = artefact.forms_of(list(files))
    dense = build(stages.loaded, Init(seed=0)).eval().to(device)
    small = artefact.build("shrunk", files, stages).to(device) if "shrunk" in there else None
    forms = {"torch": Form(pruned=masked if small is None else small, dense=dense)}
    if small is not None:
        forms["shrunk"] = Form(pruned=small)
    if "2:4" in there:
        packed = artefact.build("2:4", files, stages).to(device)
        if not why_not(packed):
            forms["2:4"] = Form(pruned=accelerated(packed), dense=HalfPrecision(copy.deepcopy(dense).half()))
        elif device == "cpu":
            forms["2:4"] = Form(pruned=packed)
    if device != "cpu":
        return forms
    if "csr" in there:
        forms["csr"] = Form(pruned=artefact.build("csr", files, stages), dense=dense)
    graphs = [name for name in artefact.WITHOUT_TASK if name in there]
    whole = _as_graphs(dense, graphs, stages.loaded, threads)
    for name in graphs:
        pruned = artefact.build(name, files, threads=threads)
        forms[name] = Form(pruned=pruned, dense=whole.get(name), rows=exports[name]["rows"])
    return forms


def _as_graphs(dense: nn.Module, names: Sequence[str], loaded: LoadedTask, threads: int) -> dict[str, nn.Module]:
    """The dense model in the forms of the pruned one, as far as it can be exported."""
    if not names:
        return {}
    from orchestrator.export import onnx, pt2

    found = {}
    with suppress(ExportRefused):
        program = pt2.export(dense, sample(loaded.valid, pt2.MANY + 1))
        for name in names:
            content = pt2.to_bytes(program) if name == "pt2" else onnx.to_bytes(program)
            found[name] = artefact.build(name, {artefact.NEEDS[name][0]: content}, threads=threads)
    return found


def latency_rows(latency: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a card's latencies as rows of words, times in milliseconds with their quartiles."""
    return [
        {
            "device": entry["device"],
            "threads": entry["threads"],
            "format": entry["format"],
            "batch": entry["batch"],
            "dense ms": _spread(entry["dense_ms"]),
            "pruned ms": _spread(entry["pruned_ms"]),
            "dense / pruned": f"{entry['speedup']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})",
        }
        for entry in latency
    ]


def device_name(device: str) -> str:
    """What a device is called in cards: `cpu: AMD EPYC 7B13`, `cuda: NVIDIA H100`."""
    if device == "cuda":
        return f"cuda: {torch.cuda.get_device_name()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"cpu: {models[0] if models else platform.processor() or platform.machine()}"


def card_bytes(card: Mapping[str, Any]) -> bytes:
    """A card as JSON."""
    return (json.dumps(finite(card), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _refuse_device(device: str, threads: int) -> None:
    if device not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is unknown; legal: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda': this machine has no GPU that torch can use; legal: cpu")
    if threads < 1:
        raise InputError(f"threads must be 1 or more, not {threads}")


@contextmanager
def _arithmetic(device: str, threads: int) -> Iterator[None]:
    with arithmetic(torch.device(device)):
        torch.set_num_threads(threads)  # which `arithmetic` sets back
        yield


def sample(split: Split, count: int, device: str = "cpu") -> Nested:
    """The inputs of `count` rows of a split; it begins anew where it has fewer."""
    inputs, _ = split.take(torch.arange(count) % len(split))
    return move(inputs, device)


def _repeated(inputs: Nested, count: int) -> Nested:
    return transform(lambda tensor: tensor[torch.arange(count) % len(tensor)].contiguous(), inputs)


def _batches_of(inputs: Nested, rows: Literal[1] | None) -> Iterator[Nested]:
    """The same rows as a model takes them: one alone and then the others, or one at a time."""
    count = len(next(tensors(inputs))[1])
    starts = [0, *range(1, count, rows or count)]
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        yield transform(itemgetter(slice(start, end)), inputs)


def _rounding(masked: nn.Module, inputs: Nested, outputs: Nested) -> float | None:
    """How far the model's outputs are from those in double precision; None where it cannot be run in it."""
    with suppress(Exception):  # a model's own code may insist on its type
        double = transform(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, inputs)
        return difference(_outputs(copy.deepcopy(masked).double(), [double]), outputs)
    return None


def _outputs(model: nn.Module, batches: Iterable[Nested], like: Nested = None) -> Nested:
    """The model's outputs on all batches; in the form of `like`, where a runtime gives a bare tuple."""
    with torch.no_grad():
        gathered = [call(model, batch) for batch in batches]
    return concatenate([outputs if like is None else _in_form(like, outputs) for outputs in gathered])


def _in_form(like: Nested, outputs: Nested) -> Nested:
    flat = iter([tensor for _, tensor in tensors(outputs)])
    return transform(lambda _: next(flat), like)


def difference(expected: Nested, found: Nested) -> float:
    """The greatest absolute difference between the tensors of two models' outputs."""
    pairs = zip(tensors(expected), tensors(found), strict=True)
    return max(float((one.double() - other.double()).abs().max()) for (_, one), (_, other) in pairs)


def _accuracies(loaded: LoadedTask, forms: Mapping[str, Form], device: str) -> dict[str, Any]:
    """The main metric of each form on the test split, or on the validation split where there is none."""
    name, metric = next(iter(loaded.metrics.items()))
    split = loaded.valid if loaded.test is None else loaded.test
    count = min(SCORED, len(split))
    some = split.subset(torch.arange(count)).to(device)
    found: dict[str, Any] = {"metric": name, "split": "valid" if loaded.test is None else "test", "rows": count}
    like = None
    for form, of in forms.items():
        if form != "torch":
            batches = list(some.batches(of.rows or BATCH_SIZE))
            outputs = _outputs(of.pruned, (inputs for inputs, _ in batches), like)
            like = outputs if like is None else like
            found[form] = float(metric.function(outputs, concatenate([targets for _, targets in batches])))
    return found


def _timed(
    name: str, form: Form, inputs: Nested, batch: int, device: str, threads: int, seconds: float
) -> dict[str, Any]:
    assert form.dense is not None
    found = asdict(compare(form.dense, form.pruned, inputs, seconds=seconds))
    return {
        "device": device_name(device),
        "threads": threads,
        "format": name,
        "batch": batch,
        "dense_ms": found.pop("before"),
        "pruned_ms": found.pop("after"),
        **found,
        "at": _now(),
        "torch": torch.__version__,
    }


def _spread(times: Mapping[str, float]) -> str:
    return f"{times['median']:.3g} ({times['low']:.3g} to {times['high']:.3g})"


def _where(certificate: Mapping[str, Any]) -> tuple[str, int] | None:
    return (certificate["device"], certificate["threads"]) if "device" in certificate else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
