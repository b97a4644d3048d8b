"""One store: the states that all studies share, and each study's folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.store import paths
from orchestrator.store.checkpoints import Checkpoints
from orchestrator.store.files import Files
from orchestrator.store.states import States

if TYPE_CHECKING:
    from orchestrator.store.ledger import Ledger
    from orchestrator.store.tables import Outcomes

_LOG = logging.getLogger("orchardist.store")

_SUM = "sum"


class Store:
    """What lies under one URL: a local folder or anything that fsspec opens. Nothing is written before it is asked for.

    `url` is as given, `name` the same without credentials, for messages. Errors are `StoreError`s. pyarrow is imported
    with the first ledger or table, so that a worker, which only needs states, starts without it.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.files = Files(url)
        self.states = States(self.files)
        self.checkpoints = Checkpoints(self.files)
        self.url = self.files.url
        self.name = self.files.name

    def used(self) -> int:
        """The bytes of all states and checkpoints, of every study: all but a little of what is in a store."""
        return sum(map(self.files.used, (paths.STATES, paths.CHECKPOINTS)))

    def study_exists(self, name: str) -> bool:
        """Raises `StoreError` for a name that no study can have."""
        return self.files.exists(paths.study_meta(name))

    def studies(self) -> list[str]:
        """The names of the studies, sorted."""
        names = self.files.list(paths.STUDIES)
        return [name for name in names if paths.is_study(name) and self.study_exists(name)]

    def read_study(self, name: str) -> tuple[str, dict[str, Any]] | None:
        """The study file's text and what was noted beside it; None when there is no such study."""
        try:
            meta = self.files.read(paths.study_meta(name))
            text = self.files.read(paths.study_toml(name))
        except FileNotFoundError:
            return None
        try:
            found = json.loads(meta)
            if isinstance(found, dict) and found.pop(_SUM, None) in (None, _sum(found)):
                return text.decode(), found
        except (ValueError, RecursionError):
            pass
        _LOG.warning("%s in the store %s is not a study's; skipped", paths.study(name), self.name)
        return None

    def write_study(
        self, name: str, toml_text: str, meta: Mapping[str, Any], first: Callable[[], None] | None = None
    ) -> None:
        """Puts the study file and what is to be noted beside it in the place of earlier ones; `first` as for
        `Files.write`."""
        data = json.dumps({**meta, _SUM: _sum(meta)}, sort_keys=True, allow_nan=False).encode()
        # The notes come last: a study counts from them on, so that it is never half there.
        self.files.write(paths.study_toml(name), toml_text.encode(), first)
        self.files.write(paths.study_meta(name), data, first)

    def ledger(self, name: str, epoch: int) -> Ledger:
        """The pen of the study's driver under its lease's epoch."""
        from orchestrator.store.ledger import Ledger

        return Ledger(self.files, name, epoch)

    def table(self, name: str, kind: str, columns: Sequence[str] | None = None) -> Any:
        """A `pyarrow.Table` of the study's outcomes, proposals or events; see `tables.read`."""
        from orchestrator.store import tables

        return tables.read(self.files, name, kind, columns)

    def outcomes(self, name: str) -> Outcomes:
        """The study's outcomes as they stand now, to be read in columns and in single rows."""
        from orchestrator.store.tables import Outcomes

        return Outcomes(self.files, name)


def _sum(meta: Mapping[str, Any]) -> str:
    """What tells a study's notes from damaged ones."""
    return hashlib.sha256(json.dumps(dict(meta), sort_keys=True).encode()).hexdigest()
