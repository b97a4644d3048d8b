"""What code this process runs, as a digest: how a driver knows a stale worker, or another package of the same name."""

from __future__ import annotations

from pathlib import Path

import orchestrator
import search
from orchestrator.canonical import digest


def code_digest() -> str:
    """A digest of `orchestrator` and `search` as they stood when this process imported them: 64 hex digits.

    What stands on the disk later is not what this process runs: a driver that was left open over an update is stale.
    """
    return _AS_IMPORTED


def _digest() -> str:
    texts = {}
    for package in (orchestrator, search):
        folder = Path(next(iter(package.__path__)))
        for path in sorted(folder.rglob("*.py")):
            texts[f"{folder.name}/{path.relative_to(folder).as_posix()}"] = path.read_text()
    return digest(texts)


_AS_IMPORTED = _digest()
