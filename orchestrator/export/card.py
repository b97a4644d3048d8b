"""The card of a fetched model: what it is, where it comes from, what its files weigh, and all that in words."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator import __version__
from orchestrator.export import CSR, LINEAGE, PACKED, SEMI, SHRUNK, WEIGHTS
from orchestrator.export.semi import TAKES
from orchestrator.outcome import MEASURES

if TYPE_CHECKING:
    from orchestrator.study import Study

COMPRESSION = 9
"""The level of zlib at which files are compressed for the card: what a zip file of them would take."""

LEAST_CLAIM = 1.1
"""The least ratio that is called a speed-up. Two copies of one network were seen to differ by 6 %, again and again, for
nothing but where in memory they lay: no interval over passes has that in it."""


MOST_EXPLAINED = 2.0
"""How many times its share of operations or bytes a network may be faster by, for its caches' sake. On a busy machine
two threads waited for each other where one would not have, and a tenth of a network seemed 400 times as fast."""


def card_of(study: Study, row: Mapping[str, Any], lineage: list[dict[str, Any]]) -> dict[str, Any]:
    """The card of a model before anything was written or certified.

    Args:
        study: where it was found.
        row: its outcome.
        lineage: the stages behind it.
    """
    task = study.task_of(row)
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
        "prunings": None,
        "certificate": {"reloaded": None, "shrunk": None, "csr": None, "2:4": None, "pt2": None, "onnx": None},
        "latency": [],
        "exports": {},
        "refused": {},
        "says": "",
        "task": task.task,
        "task_params": task.task_params,
        "checkpoint": task.checkpoint,
        "task_digest": row["task_digest"],
        "root": str(study.root),
        "study_digest": study.spec.digest(),
        "versions": json.loads(row["versions"] or "{}") | {"orchardist": __version__},
    }


def enter_files(card: dict[str, Any], files: Mapping[str, bytes]) -> None:
    """What the files weigh, raw and compressed, and their hashes."""
    models = {name: content for name, content in files.items() if name != LINEAGE}
    card["bytes"] = {_stem(name): len(content) for name, content in models.items()}
    compressed = {_stem(name): len(zlib.compress(content, COMPRESSION)) for name, content in models.items()}
    card["compressed"] = {"with": f"zlib, level {COMPRESSION}", "bytes": compressed}
    card["files"] = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }


def in_words(card: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    """What may be said of the model on the device of a certificate: sizes as they are, and speed-ups that are sure.

    A speed-up is named where its 95 % interval excludes 1 and it is at least `LEAST_CLAIM`; else there is none.
    """
    sentences = [_of_size(card)]
    if "device" in certificate:
        where = (certificate["device"], certificate["threads"])
        timed = [entry for entry in card["latency"] if (entry["device"], entry["threads"]) == where]
        sentences += _of_speed(card, timed, certificate)
    sentences += [f"No {name}: {reason}." for name, reason in card["refused"].items()]
    alone = {name: export for name, export in card["exports"].items() if export["rows"] == 1}
    sentences += [f"As {name} it takes one row at a time: {export['reason']}." for name, export in alone.items()]
    return " ".join(sentences)


def claim(entry: Mapping[str, Any], explained: float) -> str:
    """What one entry of the latencies allows to say.

    Args:
        entry: with the `speedup` and its interval `low` to `high`.
        explained: how many times fewer operations or bytes the pruned model takes, whichever is more.

    Returns:
        "faster" or "slower"; "" where chance may have decided; "busy" where so much is no merit of the model.
    """
    if entry["speedup"] > MOST_EXPLAINED * explained:
        return "busy"
    if entry["low"] > 1 and entry["speedup"] >= LEAST_CLAIM:
        return "faster"
    if entry["high"] < 1 and entry["speedup"] <= 1 / LEAST_CLAIM:
        return "slower"
    return ""


def explained(measures: Mapping[str, Any], sizes: Mapping[str, int], form: str) -> float:
    """How many times fewer operations or bytes a form takes than the dense model, whichever is more.

    Args:
        measures: the card's.
        sizes: of the files in bytes, by name.
        form: "shrunk" or "csr".
    """
    work, file = ("flops_effective", CSR) if form == "csr" else ("flops_shrunk", SHRUNK)
    fewer = measures["flops"] / measures[work] if measures.get(work) else 1.0
    return float(max(fewer, sizes[WEIGHTS] / sizes[file] if file in sizes else 1.0))


def _of_size(card: Mapping[str, Any]) -> str:
    sparsity, files = card["measures"]["sparsity"], card["files"]
    if not sparsity:
        return "The model is dense: nothing of it is pruned."
    whole = files[WEIGHTS]["bytes"]
    least = min((name for name in (PACKED, SHRUNK) if name in files), key=lambda name: int(files[name]["bytes"]))
    how = "with its units cut out" if least == SHRUNK else "as kept values and their places"
    gone = f"{sparsity:.1%} of the prunable weights are gone"
    size = files[least]["bytes"]
    if whole / size < 1.05:  # which would read 1.0×
        return f"{gone}, but the files are no smaller for it ({size:,} bytes instead of {whole:,})."
    return f"{gone}: {whole / size:.1f}× smaller {how} ({size:,} bytes instead of {whole:,})."


def _of_speed(card: Mapping[str, Any], timed: Sequence[Mapping[str, Any]], certificate: Mapping[str, Any]) -> list[str]:
    threads = "1 thread" if certificate["threads"] == 1 else f"{certificate['threads']} threads"
    here = f"on this device ({certificate['device']}, {threads})"
    eager = [entry for entry in timed if entry["format"] == "torch"]
    if not eager or not card["measures"]["sparsity"]:
        return []
    cut_out = SHRUNK in card["files"]
    sizes = {name: file["bytes"] for name, file in card["files"].items()}
    said = []
    if cut_out:
        said.append(f"{_claims(eager, here, explained(card['measures'], sizes, 'shrunk'))}.")
    else:
        ratios = ", ".join(f"{entry['speedup']:.2f} at batch {entry['batch']}" for entry in eager)
        said.append(f"No speed-up {here}: unstructured zeros are not skipped (dense time over pruned time: {ratios}).")
    sparse = [entry for entry in timed if entry["format"] == "csr"]
    if CSR in card["files"] and sparse:
        said.append(f"With linear layers as CSR: {_claims(sparse, '', explained(card['measures'], sizes, 'csr'))}.")
    halved = [entry for entry in timed if entry["format"] == "2:4"]
    if halved:
        said.append(f"Packed as 2:4, in half precision: {_claims(halved, '', 2.0)}.")
    elif SEMI in card["files"]:
        said.append(f"Its 2:4 layers are packed too, but not run so on this device: {TAKES}.")
    return said


def _claims(entries: Sequence[Mapping[str, Any]], here: str, most: float) -> str:
    """One clause for each batch: a sure ratio with its interval, or that there is none."""
    clauses = []
    for entry in entries:
        sure, at = claim(entry, most), f"at batch {entry['batch']}"
        interval = f"{entry['low']:.2f} to {entry['high']:.2f}"
        if sure == "faster":
            clauses.append(f"{entry['speedup']:.1f}× faster {at} ({interval})")
        elif sure == "slower":
            clauses.append(f"{1 / entry['speedup']:.1f}× slower {at} ({interval})")
        elif sure == "busy":
            clauses.append(f"nothing sure {at}: {most:.1f}× fewer operations or bytes do not explain {interval}")
        else:
            clauses.append(f"no speed-up {at} ({interval})")
    text = ", ".join(clauses) + (f", {here}" if here else "")
    return text[0].upper() + text[1:] if here else text


def _stem(name: str) -> str:
    """What a file is called among the sizes: `weights`, `packed`, …; `pt2` and `onnx`."""
    stem, _, ending = name.partition(".")
    return ending if stem == "model" else stem
