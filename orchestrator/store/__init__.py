"""Everything that is kept: states, ledger and lease. The only importer of pyarrow and fsspec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.store.files import Files
from orchestrator.store.lease import Lease, acquire
from orchestrator.store.states import States
from orchestrator.store.store import Store

if TYPE_CHECKING:
    from orchestrator.store.ledger import Ledger

__all__ = ["Files", "Lease", "Ledger", "States", "Store", "acquire"]


def __getattr__(name: str) -> Any:
    # pyarrow takes longer to import than everything else that a worker needs of the store.
    if name == "Ledger":
        from orchestrator.store.ledger import Ledger

        return Ledger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
