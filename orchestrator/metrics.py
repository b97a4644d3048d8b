"""What a running study says of itself in numbers, for whatever its pool's cluster is watched with."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.progress import Standing

METRICS: Mapping[str, str] = {
    "trials_asked": "trials that the study asks for",
    "trials_done": "trials that are done",
    "trials_failed": "trials that failed",
    "trials_stopped": "trials stopped early: others of their bracket were better",
    "trials_running": "trials under way",
    "epochs_run": "epochs of training that were run",
    "epochs_saved": "epochs that finished trials asked for and that were not run, because equal beginnings are shared",
    "stages_run": "stages that were run",
    "queue_length": "stages that wait for a worker",
    "retries": "stages tried again: their worker died or was taken away, or its GPU's memory was too small",
}
"""Name -> what it counts; all of them since the study began, whoever drove it."""


def metrics(standing: Standing, queued: int) -> dict[str, float]:
    """A number for each of `METRICS`."""
    return {
        "trials_asked": standing.asked,
        "trials_done": standing.done,
        "trials_failed": standing.failed,
        "trials_stopped": standing.stopped,
        "trials_running": standing.running,
        "epochs_run": standing.epochs_run,
        "epochs_saved": max(0.0, standing.epochs_asked - standing.epochs_run),
        "stages_run": standing.stages_run,
        "queue_length": queued,
        "retries": standing.retries,
    }
