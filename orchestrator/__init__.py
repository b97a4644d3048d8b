"""Orchardist: prune many neural networks side by side, and take home the ones worth keeping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Study", "StudySpec", "load"]

if TYPE_CHECKING:
    from orchestrator.export.artefact import load
    from orchestrator.spec import StudySpec
    from orchestrator.study import Study

_HOMES = {"Study": "orchestrator.study", "StudySpec": "orchestrator.spec", "load": "orchestrator.export.artefact"}


def __getattr__(name: str) -> Any:
    # The command line answers `--help` before anything heavy is imported.
    if name in _HOMES:
        from importlib import import_module

        try:
            return getattr(import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "search":
                raise
            import search

            raise ImportError(
                f"another package called 'search' hides Orchardist's own: it was found in {list(search.__path__)}; "
                "rename it, or start Python from another folder"
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
