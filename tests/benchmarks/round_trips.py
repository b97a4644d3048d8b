"""Every model of the zoo, pruned in every way it can be, fetched in every format and certified: one Markdown table.

    python tests/benchmarks/round_trips.py [--only WORD] [--epochs N] [--figures]

Each model is trained on the digits that ship with scikit-learn and pruned once: 95 % of a LeNet's weights and 80 % of
another's, or half of its channels, neurons or heads. Columns:

    bytes           as fractions of the dense model's safetensors, raw and compressed: the packed copy, or the state dict
                    of the shrunk model where units were cut out
    shrunk … CSR    the greatest difference of its outputs from the masked model's, on up to 256 validation images
    rounding        that of the masked model from itself in double precision
    all equal       whether every form has the accuracy on the test split that the study measured
    torch, 64 …     dense time over pruned time at that batch, with its 95 % interval, on one thread

With --figures the run fails unless every difference is at most 1e-5 and every accuracy is equal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator import Study, StudySpec
from orchestrator.pools.local import LocalPool
from orchestrator.tasks.models import IMAGE_MODELS

STRUCTURES = {
    "lenet-300-100": ("weight", "neuron"),
    "lenet-conv": ("weight", "channel"),
    "resnet": ("weight", "channel"),
    "depthwise": ("weight", "channel"),
    "transformer": ("weight", "neuron", "head"),
    "lstm": ("weight", "neuron"),
    "tied": ("weight", "channel"),
}
CLOSE = 1e-5
HEADER = (
    *("model", "structure", "bytes", "compressed", "shrunk", "pt2", "onnx", "CSR", "rounding", "accuracy", "all equal"),
    *("torch, batch 1", "torch, 64", "CSR, 1", "CSR, 64", "ONNX, 1", "ONNX, 64"),
)


def cards(only: str, epochs: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Model, structure and the card of each case."""
    for model in IMAGE_MODELS:
        for structure in STRUCTURES[model]:
            if only in f"{model} {structure}":
                print(f"{model}, {structure}", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    yield model, structure, card(model, structure, epochs, Path(folder))


def card(model: str, structure: str, epochs: float, folder: Path) -> dict[str, Any]:
    """One model, trained, pruned and fetched in every format."""
    sparsity = 0.95 if model.startswith("lenet") else 0.8  # at which they still tell digits apart
    amount = {"sparsity": sparsity} if structure == "weight" else {"unit_sparsity": 0.5}
    spec = StudySpec(
        name="round-trip",
        task="digits",
        task_params={"model": model, "size": 28 if model == "lenet-conv" else 8},
        trials=1,
        sampler="random",
        train={"epochs": epochs, "retrain_epochs": epochs},
        space={"structure": structure} | amount,
    )
    study = Study(spec, folder / "store")
    study.run(LocalPool())
    (pruned,) = [row for row in study.table().to_pylist() if row["trial"] >= 0]
    fetched = study.fetch(pruned["key"], folder / "out", formats=["pt2", "onnx"])
    found: dict[str, Any] = json.loads((fetched / "card.json").read_text())
    return found


def cells(model: str, structure: str, card: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    sizes, compressed, certificate = card["bytes"], card["compressed"]["bytes"], card["certificate"]
    least = "shrunk" if "shrunk" in sizes else "packed"
    times = {(entry["format"], entry["batch"]): entry for entry in card["latency"]}
    return [
        model,
        structure,
        f"{sizes[least] / sizes['weights']:.3f}",
        f"{compressed[least] / sizes['weights']:.3f}",
        *(_shown(certificate[name], card["refused"].get(name)) for name in ("shrunk", "pt2", "onnx", "csr")),
        f"{certificate['rounding']:.0e}",
        f"{card['measures']['test_accuracy']:.3f}",
        "yes" if equal(card) else f"no: {accuracies(card)}",
        *(_ratio(times.get((format, batch))) for format in ("torch", "csr", "onnx") for batch in (1, 64)),
    ]


def accuracies(card: Mapping[str, Any]) -> dict[str, float]:
    """The accuracy of each form."""
    return {name: value for name, value in card["certificate"]["accuracy"].items() if isinstance(value, float)}


def equal(card: Mapping[str, Any]) -> bool:
    """Whether all forms have the accuracy that the study measured."""
    return set(accuracies(card).values()) == {card["measures"]["test_accuracy"]}


def close(card: Mapping[str, Any]) -> bool:
    """Whether pt2 and ONNX were written, and every form is as near to the masked model as promised."""
    found = [card["certificate"][name] for name in ("shrunk", "csr", "pt2", "onnx")]
    return None not in found[2:] and all(value <= CLOSE for value in found if value is not None)


def _shown(difference: float | None, reason: str | None) -> str:
    if difference is not None:
        return f"{difference:.0e}" if difference else "0"
    return "" if reason is None else "not faster" if "not faster" in reason else "refused"


def _ratio(entry: Mapping[str, Any] | None) -> str:
    return "" if entry is None else f"{entry['speedup']:.2f} ({entry['low']:.2f}–{entry['high']:.2f})"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a model's or a structure's name")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--figures", action="store_true", help="fail where a figure is missed")
    options = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n| {' | '.join(['---'] * len(HEADER))} |")
    missed = []
    for model, structure, found in cards(options.only, options.epochs):
        print(f"| {' | '.join(cells(model, structure, found))} |", flush=True)
        if not (equal(found) and close(found)):
            missed.append(f"{model}, {structure}")
    if missed:
        print(f"not equal, or not within {CLOSE}: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed and options.figures else 0


if __name__ == "__main__":
    sys.exit(main())
