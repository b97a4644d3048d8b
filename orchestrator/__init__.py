"""Orchardist: prune many neural networks side by side, and take home the ones worth keeping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Study", "StudySpec", "load"]

if TYPE_CHECKING:
    from orchestrator.retrieve import load
    from orchestrator.spec import StudySpec
    from orchestrator.study import Study

_HOMES = {"Study": "orchestrator.study", "StudySpec": "orchestrator.spec", "load": "orchestrator.retrieve"}


def __getattr__(name: str) -> Any:
    # The command line answers `--help` before anything heavy is imported.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
