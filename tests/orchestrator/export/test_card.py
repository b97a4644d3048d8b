"""What a card says is no more than what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.export.card import claim, explained, in_words

HERE = {"device": "cpu: X", "threads": 1}


def entry(speedup: float, low: float, high: float, *, format: str = "torch", batch: int = 1) -> dict[str, Any]:
    return HERE | {"format": format, "batch": batch, "speedup": speedup, "low": low, "high": high}


def card(*latency: dict[str, Any], shrunk: int = 0, csr: bool = False, sparsity: float = 0.75) -> dict[str, Any]:
    """A card of 1,000 bytes dense and 400 packed; `shrunk` bytes where units were cut out."""
    files = {"weights.safetensors": 1000, "packed.safetensors": 400}
    files |= {"shrunk.safetensors": shrunk} if shrunk else {}
    files |= {"csr.safetensors": 500} if csr else {}
    return {
        "measures": {"sparsity": sparsity, "flops": 100, "flops_shrunk": 30, "flops_effective": 25},
        "files": {name: {"bytes": size} for name, size in files.items()},
        "latency": list(latency),
        "exports": {},
        "refused": {},
    }


@pytest.mark.parametrize(
    ("speedup", "low", "high", "expected"),
    [
        (1.9, 1.8, 2.0, "faster"),
        (1.9, 0.9, 3.0, ""),
        (1.06, 1.05, 1.07, ""),
        (0.5, 0.4, 0.6, "slower"),
        (0.5, 0.4, 1.1, ""),
        (0.94, 0.93, 0.95, ""),
        (4.1, 4.0, 4.2, "busy"),
    ],
)
def test_a_claim_needs_an_interval_without_one_and_more_than_a_few_percent(
    speedup: float, low: float, high: float, expected: str
) -> None:
    assert claim(entry(speedup, low, high), explained=2.0) == expected


def test_cut_out_units_are_faster_where_it_was_measured() -> None:
    said = in_words(card(entry(1.93, 1.8, 2.0), entry(1.2, 0.8, 1.5, batch=64), shrunk=295), HERE)
    assert said == (
        "75.0% of the prunable weights are gone: 3.4× smaller with its units cut out (295 bytes instead of 1,000). "
        "1.9× faster at batch 1 (1.80 to 2.00), no speed-up at batch 64 (0.80 to 1.50), "
        "on this device (cpu: X, 1 thread)."
    )


def test_more_than_the_smaller_network_explains_is_not_claimed() -> None:
    said = in_words(card(entry(408.2, 267.48, 486.67), shrunk=295), HERE)
    assert "Nothing sure at batch 1: 3.4× fewer operations or bytes do not explain 267.48 to 486.67, on this" in said
    assert "faster" not in said


@pytest.mark.parametrize(("form", "expected"), [("shrunk", 1000 / 295), ("csr", 4.0)])
def test_what_is_fewer_counts_operations_and_bytes(form: str, expected: float) -> None:
    measures = card()["measures"]
    sizes = {"weights.safetensors": 1000, "shrunk.safetensors": 295, "csr.safetensors": 500}
    assert explained(measures, sizes, form) == pytest.approx(expected)
    assert explained({"flops": 100}, {"weights.safetensors": 1000}, form) == 1


def test_unstructured_zeros_are_never_called_faster() -> None:
    said = in_words(card(entry(1.5, 1.4, 1.6)), HERE)
    assert said == (
        "75.0% of the prunable weights are gone: 2.5× smaller as kept values and their places (400 bytes instead of 1,000). "
        "No speed-up on this device (cpu: X, 1 thread): unstructured zeros are not skipped (dense time over pruned time: "
        "1.50 at batch 1)."
    )


def test_sparse_rows_are_named_where_they_are_faster() -> None:
    sparse = [entry(0.5, 0.4, 0.6, format="csr"), entry(2.8, 2.5, 3.0, format="csr", batch=64)]
    said = in_words(card(entry(1, 0.9, 1.1), *sparse, csr=True), HERE)
    assert said.endswith(
        "With linear layers as CSR: 2.0× slower at batch 1 (0.40 to 0.60), 2.8× faster at batch 64 (2.50 to 3.00)."
    )


def test_times_of_other_devices_are_not_said_of_this_one() -> None:
    elsewhere = entry(3, 2, 4) | {"device": "cuda: Y"}
    assert "faster" not in in_words(card(elsewhere, shrunk=295), HERE)
    assert "3.0× faster" in in_words(card(elsewhere, shrunk=295), HERE | {"device": "cuda: Y"})


def test_without_a_certificate_only_sizes_are_said() -> None:
    assert "speed" not in in_words(card(entry(2, 1.9, 2.1), shrunk=295), {})


def test_a_dense_model_and_one_that_is_no_smaller() -> None:
    assert in_words(card(sparsity=0.0), HERE) == "The model is dense: nothing of it is pruned."
    small = card(sparsity=0.01)
    small["files"]["packed.safetensors"]["bytes"] = 1010
    assert "the files are no smaller for it (1,010 bytes instead of 1,000)" in in_words(small, HERE)


def test_what_was_refused_is_said() -> None:
    assert in_words(card() | {"refused": {"onnx": "no eig"}}, {}).endswith("No onnx: no eig.")


def test_a_graph_for_one_row_is_said_to_be_one() -> None:
    exports = {"pt2": {"rows": 1, "reason": "it reshapes"}, "onnx": {"rows": None, "reason": ""}}
    assert in_words(card() | {"exports": exports}, {}).endswith(" As pt2 it takes one row at a time: it reshapes.")
