"""One measured state is one row: the measures by name, and the fixed columns of the ledger.

This module is plain data. `store/rows.py` turns the column tables into Arrow schemas; a golden test pins them.
"""

from __future__ import annotations

SCHEMA_VERSION = 2

DENSE_TRIAL = -1
"""The trial number of the dense models, which are run outside `trials`."""

CONTROL_TRIAL = -2
"""The trial number of the controls that tickets are compared with, and of every state of another task than the study's
own, which are no points of a front."""

MEASURES: dict[str, str] = {
    "accuracy": "float",
    "test_accuracy": "float",
    "loss": "float",
    "test_loss": "float",
    "worst_class_accuracy": "float",
    "test_worst_class_accuracy": "float",
    "sparsity": "float",
    "unit_sparsity": "float",
    "nonzero_params": "integer",
    "total_params": "integer",
    "compression_ratio": "float",
    "flops": "integer",
    "flops_effective": "float",
    "flops_shrunk": "integer",
    "theoretical_speedup": "float",
    "bytes": "integer",
    "latency_ms": "float",
}
"""Measures with a column of their own. A task's other metrics live in the JSON column `metrics`, by name, with their
`test_` twins; a measure that does not apply is null."""

OUTCOME_COLUMNS: dict[str, str] = {
    "key": "text",
    "trial": "integer",
    "round": "integer",
    "seed": "integer",
    "params": "json",
    **MEASURES,
    "class_accuracy": "floats",
    "test_class_accuracy": "floats",
    "layers": "json",
    "metrics": "json",
    "curve": "json",
    "position_steps": "integer",
    "task_digest": "text",
    "device": "text",
    "seconds": "float",
    "finished_at": "float",
    "versions": "json",
}
"""`outcomes.parquet`, one row per evaluated state. `trial` is the first trial that reached the state (-1: the dense
model), `round` the number of prunings behind it, `layers` maps each prunable tensor to [kept, total], `seconds` is
the time of the stages run for it, `curve` lists
[step, valid loss, valid main metric] along its training where `evaluate_every` asks for it, `finished_at` is in
seconds since 1970 UTC."""

PROPOSAL_COLUMNS: dict[str, str] = {
    "trial": "integer",
    "params": "json",
    "attrs": "json",
    "proposed_at": "float",
}
"""What the sampler chose, durable before the first stage of the trial runs; `attrs` are the sampler's own notes."""

EVENT_COLUMNS: dict[str, str] = {
    "event": "text",
    "trial": "integer",
    "seed": "integer",
    "key": "text",
    "at": "float",
    "detail": "json",
}
"""`event` is one of: started, ended (a driver); done, failed (a trial); tickets (of a trial: its tickets, with the keys
of their controls); dense failed (the dense model, and with it the study); stage failed (one stage, with its traceback);
shorter (the first rounds of a trial, told to the sampler as a trial of their own); work (one stage that was run or
found: epochs, stages, seconds)."""
