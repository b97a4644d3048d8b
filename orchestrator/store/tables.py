"""A study's ledger as it stands: which of its files count, and the rows in them.

Which files cover which is told in `orchestrator.store.ledger`. A file that goes while it is looked for was merged into
one that is there by then: the reader lists again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped,unused-ignore]

from orchestrator.errors import StoreError
from orchestrator.store import paths
from orchestrator.store.files import Files
from orchestrator.store.paths import Part
from orchestrator.store.rows import COLUMNS, Rows, Unreadable, Watermarks, concat, merge

_LOG = logging.getLogger("orchardist.store")

_READ_ATTEMPTS = 10


def read(files: Files, study: str, kind: str, columns: Sequence[str] | None = None) -> Any:
    """A `pyarrow.Table` of all committed rows of a kind, with the given columns or all; no rows for an unknown study.

    Proposals and events come in the order in which they were written. Outcomes have one row for each key, sorted by
    (trial, round, seed) as far as they are merged; while nothing is uncovered, the merged file is returned as is.
    An unreadable file is reported to the log and left out.
    """
    assert kind in COLUMNS, kind
    assert columns is None or set(columns) <= set(COLUMNS[kind]), (kind, columns)
    skip = partial(_skip, files)
    for _ in range(_READ_ATTEMPTS):
        # Listing first: what a compaction deletes from now on is in the merged file that is opened afterwards.
        found = parts_of(files, study, report=True)
        try:
            if kind != "outcomes":
                _, before, parts = merged_and_parts(files, study, found, kind, skip, columns)
                later = [_load_or_skip(files, study, part, columns) for part in parts]
                return concat(kind, [*before, *later], columns)
            for merged in merged_outcomes(files, study, found, skip):
                parts = uncovered_outcomes(found, merged)
                rows = concat("outcomes", [_load_or_skip(files, study, part, None) for part in parts])
                try:
                    if merged and not parts:
                        return merged.rows.table(columns)
                    return merge(merged.rows if merged else None, rows, columns)
                except Unreadable as error:
                    assert merged is not None
                    skip(merged.path, error)
        except FileNotFoundError:
            continue
    raise StoreError(f"{paths.ledger(study)} in the store {files.name} changes too fast to be read")


class Outcomes:
    """A study's outcomes as they stand at one moment: columns of all rows, and single rows in full."""

    def __init__(self, files: Files, study: str) -> None:
        self._files = files
        self._study = study
        found, merged = newest_outcomes(files, study, report=True)
        self._merged = merged
        self._table = read(files, study, "outcomes") if merged is None or uncovered_outcomes(found, merged) else None

    def table(self, columns: Sequence[str]) -> Any:
        """The columns of every row, as a `pyarrow.Table`."""
        if self._table is not None:
            return self._table.select(list(columns))
        assert self._merged is not None
        try:
            return self._merged.rows.table(columns)
        except Unreadable:
            self._table = read(self._files, self._study, "outcomes")  # which says so, and has what is left
            return self._table.select(list(columns))

    def starting_with(self, key: str) -> list[int]:
        """The rows whose key begins so; indices count the rows of `table`."""
        return list(np.flatnonzero(pc.starts_with(self.table(["key"])["key"], key).to_numpy()).tolist())

    def rows(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The given columns, or all, of the rows at `indices`, in that order; indices count the rows of `table`.

        Raises:
            StoreError: the rows are damaged, though not in the columns that were read before.
        """
        if self._table is not None:
            table = self._table if columns is None else self._table.select(list(columns))
            return list(table.take(indices).to_pylist())
        assert self._merged is not None
        try:
            return self._merged.rows.rows(indices, columns)
        except Unreadable as error:
            raise StoreError(
                f"{self._merged.path} in the store {self._files.name} is damaged ({error}); run the study once "
                "more: its states still know what was measured"
            ) from error


class Merged(NamedTuple):
    """Merged outcomes, their rows still unread."""

    rows: Rows
    path: str
    part: Part | None
    """None: they are those of `outcomes.parquet`."""


def merged_outcomes(
    files: Files, study: str, found: Sequence[Part], spoilt: Callable[[str, Unreadable], None]
) -> Iterator[Merged | None]:
    """The newest merged outcomes that can be opened, and where their rows prove to be spoilt older ones; then None.

    `outcomes.parquet`, which an older driver's late request may have overwritten, counts where no file of the ledger
    has what it says: where it is the only one, as it was in stores of before, and in the place of a spoilt one.
    """

    def opened(path: str, part: Part | None) -> Merged | None:
        try:
            return Merged(Rows(files.map(path), "outcomes"), path, part)
        except Unreadable as error:
            spoilt(path, error)
            return None

    merged = [part for part in reversed(found) if part.kind == "outcomes" and part.merged]
    if merged and (newest := opened(paths.part(study, merged[0]), merged[0])):
        yield newest
    copy = None
    with suppress(FileNotFoundError):
        copy = opened(paths.outcomes(study), None)
    for part in merged[1:]:
        if copy is not None and (copy.rows.merged or (0, 0)) > part.position:
            yield copy
            copy = None
        if older := opened(paths.part(study, part), part):
            yield older
    if copy is not None:
        yield copy
    yield None


def newest_outcomes(files: Files, study: str, *, report: bool = False) -> tuple[list[Part], Merged | None]:
    """The ledger's files, and the newest merged outcomes that can be opened."""
    for _ in range(_READ_ATTEMPTS):
        found = parts_of(files, study, report=report)
        with suppress(FileNotFoundError):
            return found, next(merged_outcomes(files, study, found, partial(_skip, files)))
    raise StoreError(f"{paths.ledger(study)} in the store {files.name} changes too fast to be read")


def uncovered_outcomes(found: Sequence[Part], merged: Merged | None) -> list[Part]:
    """The parts whose outcomes are not among the merged ones."""
    watermarks = merged.rows.watermarks if merged else {}
    return [part for part in found if part.kind == "outcomes" and not part.merged and not covers(watermarks, part)]


def covers(watermarks: Watermarks, part: Part) -> bool:
    """Whether merged outcomes hold those of a part."""
    return part.seq <= watermarks.get(part.epoch, 0)


def merged_and_parts(
    files: Files,
    study: str,
    found: list[Part],
    kind: str,
    spoilt: Callable[[str, Unreadable], None],
    columns: Sequence[str] | None = None,
) -> tuple[Part | None, list[Any], list[Part]]:
    """The newest merged file of proposals or events, its rows, and the parts that it does not cover.

    A spoilt one covers nothing: it is taken out of `found`, and what it was made of counts as far as that is there.
    """
    while True:
        merged, parts = uncovered(found, kind)
        if merged is None:
            return None, [], parts
        try:
            return merged, [load(files, study, merged, columns)], parts
        except Unreadable as error:
            spoilt(paths.part(study, merged), error)
            found.remove(merged)


def load(files: Files, study: str, part: Part, columns: Sequence[str] | None) -> Any:
    """The rows of one file. Raises `Unreadable` or `FileNotFoundError`."""
    return Rows(files.read(paths.part(study, part)), part.kind).table(columns)


def _load_or_skip(files: Files, study: str, part: Part, columns: Sequence[str] | None) -> Any:
    try:
        return load(files, study, part, columns)
    except Unreadable as error:
        _skip(files, paths.part(study, part), error)
        return concat(part.kind, [], columns)


def _skip(files: Files, path: str, error: Unreadable) -> None:
    _LOG.warning("%s in the store %s is unreadable (%s); skipped", path, files.name, error)


def parts_of(files: Files, study: str, *, report: bool = False) -> list[Part]:
    """The ledger's files in the order of writing."""
    found = []
    for name in files.list(paths.ledger(study)):
        part = paths.parse_part(name)
        if part is not None and part.kind in COLUMNS:
            found.append(part)
        elif report:
            _LOG.warning(
                "%s/%s in the store %s is no file of the ledger; skipped", paths.ledger(study), name, files.name
            )
    return sorted(found)


def uncovered(found: Sequence[Part], kind: str) -> tuple[Part | None, list[Part]]:
    """The newest merged file of proposals or events, if any, and the parts that it does not cover."""
    ours = [part for part in found if part.kind == kind]
    merged = max((part for part in ours if part.merged), default=None)
    return merged, [part for part in ours if not part.merged and (merged is None or part.position > merged.position)]
