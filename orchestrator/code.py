"""What code this process runs, as a digest: how a driver knows a stale worker, or another package of the same name."""

from __future__ import annotations

from pathlib import Path

import orchestrator
import search
from orchestrator.canonical import digest


def code_digest() -> str:
    """A digest of the installed `orchestrator` and `search` packages: 64 hex digits."""
    texts = {}
    for package in (orchestrator, search):
        folder = Path(next(iter(package.__path__)))
        for path in sorted(folder.rglob("*.py")):
            texts[f"{folder.name}/{path.relative_to(folder).as_posix()}"] = path.read_text()
    return digest(texts)
