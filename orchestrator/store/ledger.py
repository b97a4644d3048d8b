"""The Parquet record of a study: outcomes, proposals and events.

A driver appends rows and flushes them as immutable parts; compaction merges the parts from time to time. A part's
place in the order is (epoch, seq): the epoch is its driver's lease, seq counts that driver's flushes.

    proposals, events   parts -> `<epoch>-<seq>-<kind>.all.parquet`, which stands for everything up to (epoch, seq);
                        a driver's first one has seq 0: later decisions of older drivers count for nothing
    outcomes            parts -> `outcomes.parquet`, whose metadata `covers` names, for each epoch, the last seq in it:
                        a late part of an older driver is a fact like any other, and is not taken for covered

Files are deleted only after the one that covers them is durable, so a reader that finds a file gone lists again. While
a driver is at work they stay for some time longer: a merged file may be overwritten by the late request of an older
driver, or of this one, and then nothing is lost.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.compute as pc  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

from orchestrator.errors import StoreError
from orchestrator.outcome import EVENT_COLUMNS, MEASURES, OUTCOME_COLUMNS, PROPOSAL_COLUMNS, SCHEMA_VERSION
from orchestrator.store import paths
from orchestrator.store.files import Data, Files
from orchestrator.store.paths import Part

_LOG = logging.getLogger("orchardist.store")

COLUMNS: dict[str, dict[str, str]] = {
    "proposals": PROPOSAL_COLUMNS,
    "outcomes": OUTCOME_COLUMNS,
    "events": EVENT_COLUMNS,
}
"""Column tables by kind, in the order in which a flush writes: no event speaks of an outcome that is not there yet."""

MOST_PARTS = 64
"""More uncovered parts of one kind than this are due for compaction."""

GRACE_SECONDS = 30.0
"""How long a running driver keeps the parts that a merged file covers."""

_SHORTEST_INTERVAL_SECONDS = 10.0
_INTERVAL_PER_DURATION = 20.0
_READ_ATTEMPTS = 10
# Small groups let a reader fetch a few rows in full without decoding the rest; still smaller ones slow the whole
# column down.
_ROWS_PER_GROUP = 2 * 1024
# Columns whose values repeat from row to row. Unique ones such as keys only cost time in a dictionary.
_REPEATING = {"trial", "round", "seed", "params", "task_digest", "device", "versions", "event", "total_params", "flops"}

_TELLING = {"proposals": "proposed_at", "outcomes": "round", "events": "event"}
"""A column that only this kind has: files may have been swapped."""

Watermarks = dict[int, int]
"""For each epoch the last seq that a merged file holds."""


def schema(kind: str) -> Any:
    """The fixed Arrow schema of a kind of row, `schema_version` in its metadata. Every column may be null."""
    types = {
        "text": pa.string(),
        "json": pa.string(),
        "integer": pa.int64(),
        "float": pa.float64(),
        "floats": pa.list_(pa.float64()),
    }
    fields = [pa.field(name, types[type_]) for name, type_ in COLUMNS[kind].items()]
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION)})


SCHEMAS = {kind: schema(kind) for kind in COLUMNS}


class Ledger:
    """One driver's pen. Safe to share between threads; the lease sees to it that an epoch has one writer only.

    `clock` gives monotonic seconds; only `should_compact` looks at it.
    """

    def __init__(self, files: Files, study: str, epoch: int, clock: Callable[[], float] = time.monotonic) -> None:
        assert epoch >= 0, epoch
        self.files = files
        self.study = study
        self.epoch = epoch
        self._clock = clock
        self._buffers: dict[str, list[Any]] = {kind: [] for kind in COLUMNS}
        self._buffer_lock = threading.Lock()
        self._part_lock = threading.RLock()
        self._compaction_lock = threading.Lock()
        self._seq: int | None = None
        self._unsure: dict[str, _Unsure] = {}
        self._covered_at: dict[Part, float] = {}
        self._uncovered = dict.fromkeys(COLUMNS, 0)
        self._compacted_at = clock()
        self._compaction_seconds = 0.0
        paths.study(study)  # a wrong name is refused now, not at the first flush

    def append(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Buffers rows until the next `flush`. Missing columns become null; JSON columns take Python objects, in which
        NaN and infinities become null. A value of the wrong type is a `TypeError`; nothing of the call is kept then."""
        assert kind in COLUMNS, kind
        if not rows:
            return
        batch = _batch(kind, rows)
        with self._buffer_lock:
            self._buffers[kind].append(batch)

    def flush(self) -> None:
        """Makes everything that was appended durable: one part for each kind with rows, proposals first, events last.
        Rows that could not be written stay buffered; the next flush tries again."""
        with self._part_lock:
            for kind, buffer in self._buffers.items():
                while buffer:
                    if kind not in self._unsure:
                        with self._buffer_lock:
                            batches = tuple(buffer)
                        data = _serialise(pa.Table.from_batches(batches).combine_chunks())
                        self._unsure[kind] = _Unsure(self._next(kind), data, len(batches))
                    # After an answer that was lost, the same bytes go under the same name: no row is there twice.
                    unsure = self._unsure[kind]
                    while not self.files.create(paths.part(self.study, unsure.part), unsure.data):
                        unsure = self._unsure[kind] = unsure._replace(part=self._next(kind))
                    self._uncovered[kind] += 1
                    with self._buffer_lock:
                        del buffer[: unsure.batches]
                    del self._unsure[kind]

    def should_compact(self) -> bool:
        """Whether a kind has more than 64 uncovered parts, or some, and enough time has passed since the last
        compaction: 10 s, or 20 times as long as that one took."""
        with self._part_lock:
            self._start()
            most = max(self._uncovered.values())
        interval = max(_SHORTEST_INTERVAL_SECONDS, _INTERVAL_PER_DURATION * self._compaction_seconds)
        return most > MOST_PARTS or (most > 0 and self._clock() - self._compacted_at >= interval)

    def compact(self, grace_seconds: float = 0.0) -> None:
        """Merges the parts of each kind and deletes what merged files have covered for `grace_seconds`. Buffered rows
        are not flushed; another thread may append and flush meanwhile.

        A driver that finds a newer epoch's lease or parts leaves the files alone: the newer driver merges them.
        """
        with self._compaction_lock:
            began = self._clock()
            with self._part_lock:
                self._start()
            try:
                for kind in COLUMNS:
                    compact = self._compact_outcomes if kind == "outcomes" else self._compact_decisions
                    merged = compact(kind, grace_seconds)
                    with self._part_lock:
                        self._uncovered[kind] -= merged
            except (_Superseded, FileNotFoundError):
                _LOG.warning(
                    "study %s has a newer driver than epoch %d, which merges its parts", self.study, self.epoch
                )
            self._compacted_at = self._clock()
            self._compaction_seconds = self._compacted_at - began

    def _start(self) -> None:
        """Finds where this epoch's numbers go on: a part numbered below a merged file's end would count as covered."""
        if self._seq is not None:
            return
        found = _list(self.files, self.study)
        opened = _open_outcomes(self.files, self.study)
        watermarks = opened.watermarks if opened else {}
        self._seq = max([part.seq for part in found if part.epoch == self.epoch] + [watermarks.get(self.epoch, 0)])
        for kind in COLUMNS:
            self._uncovered[kind] = len(_uncovered(found, kind, watermarks)[1])

    def _next(self, kind: str) -> Part:
        """The next name for a part."""
        self._start()
        assert self._seq is not None
        self._seq += 1
        return Part(self.epoch, self._seq, kind, merged=False)

    def _delete(self, covered: Sequence[Part], grace_seconds: float) -> None:
        now = self._clock()
        for part in covered:
            if now - self._covered_at.setdefault(part, now) >= grace_seconds:
                self.files.delete(paths.part(self.study, part))
                del self._covered_at[part]

    def _refuse_if_superseded(self) -> None:
        leases = [lease[0] for name in self.files.list(paths.lease(self.study)) if (lease := paths.parse_lease(name))]
        if max([part.epoch for part in _list(self.files, self.study)] + leases, default=0) > self.epoch:
            raise _Superseded

    def _compact_decisions(self, kind: str, grace_seconds: float) -> int:
        found = _list(self.files, self.study)
        torn: list[Part] = []

        def aside(part: Part, error: _Unreadable) -> None:
            torn.append(part)
            self._set_aside(part, error, stays=True)

        merged, before, parts = _opened(self.files, self.study, found, kind, aside)
        newest = parts[-1]._replace(merged=True) if parts else merged
        if newest is None and self.epoch <= 1 and not torn:
            return 0
        # An epoch's first merge stands before its own first part: what an older driver still writes comes before it
        # and is covered, unread.
        last = max([newest or Part(0, 0, kind, merged=True), Part(self.epoch, 0, kind, merged=True), *torn])
        if last != merged:
            tables = [*before, *(self._load_or_set_aside(part) for part in parts)]
            data = _serialise(_concat(kind, tables))
            self._refuse_if_superseded()
            path = paths.part(self.study, last)
            # A file of this name can only be the same merge, or what a broken connection left of it.
            spoilt = partial(self.files.set_aside, path, "is torn", _unreadable(kind), stays=True)
            if not self.files.create(path, data) and spoilt():
                self.files.write(path, data)
        covered = [part for part in found if part.kind == kind and part != last and part.position <= last.position]
        self._delete(covered, grace_seconds)
        return len(parts)

    def _compact_outcomes(self, kind: str, grace_seconds: float) -> int:
        found = _list(self.files, self.study)
        opened = _open_outcomes(self.files, self.study)
        if opened is None:
            # Nothing happens here unless the file is unreadable; the states' headers still know what it held.
            self.files.set_aside(paths.outcomes(self.study), "is unreadable", _unreadable("outcomes"), stays=True)
        watermarks = dict(opened.watermarks) if opened else {}
        _, parts = _uncovered(found, kind, watermarks)
        if parts:
            rows = _concat(kind, [self._load_or_set_aside(part) for part in parts])
            try:
                rows = _merge(opened, rows, None)
            except _Unreadable as error:
                why, path = f"is damaged ({error})", paths.outcomes(self.study)
                self.files.set_aside(path, why, _unreadable("outcomes"), stays=True)
                rows = _merge(None, rows, None)
            for part in parts:
                watermarks[part.epoch] = max(part.seq, watermarks.get(part.epoch, 0))
            covers = " ".join(f"{epoch:06d}-{seq:08d}" for epoch, seq in sorted(watermarks.items()))
            data = _serialise(_sorted(rows), covers=covers)
            # There is no replace-if-unchanged: an older driver that was asleep must not undo a newer one's merge.
            self._refuse_if_superseded()
            self.files.write(paths.outcomes(self.study), data)
        covered = [part for part in found if part.kind == kind and part.seq <= watermarks.get(part.epoch, 0)]
        self._delete(covered, grace_seconds)
        return len(parts)

    def _load_or_set_aside(self, part: Part) -> Any:
        try:
            return _load(self.files, self.study, part, None)
        except _Unreadable as error:
            self._set_aside(part, error)
            return SCHEMAS[part.kind].empty_table()

    def _set_aside(self, part: Part, error: _Unreadable, *, stays: bool = False) -> None:
        path = paths.part(self.study, part)
        self.files.set_aside(path, f"is unreadable ({error})", _unreadable(part.kind), stays=stays)


def read(files: Files, study: str, kind: str, columns: Sequence[str] | None = None) -> Any:
    """A `pyarrow.Table` of all committed rows of a kind, with the given columns or all; no rows for an unknown study.

    Proposals and events come in the order in which they were written. Outcomes have one row for each key, sorted by
    (trial, round, seed) as far as they are compacted; while nothing is uncovered, `outcomes.parquet` is returned as is.
    An unreadable file is reported to the log and left out.
    """
    assert kind in COLUMNS, kind
    assert columns is None or set(columns) <= set(COLUMNS[kind]), (kind, columns)
    for _ in range(_READ_ATTEMPTS):
        # Listing first: what a compaction deletes from now on is in the merged file that is opened afterwards.
        found = _list(files, study, report=True)
        opened = _open_outcomes(files, study) if kind == "outcomes" else None
        try:
            if kind != "outcomes":
                _, before, parts = _opened(files, study, found, kind, partial(_skip, files, study), columns)
                later = [_load_or_skip(files, study, part, columns) for part in parts]
                return _concat(kind, [*before, *later], columns)
            parts = _uncovered(found, kind, opened.watermarks if opened else {})[1]
            rows = _concat("outcomes", [_load_or_skip(files, study, part, None) for part in parts])
            try:
                return opened.table(columns) if opened and not parts else _merge(opened, rows, columns)
            except _Unreadable as error:
                _LOG.warning("%s in the store %s is damaged (%s); skipped", paths.outcomes(study), files.name, error)
                return _merge(None, rows, columns)
        except FileNotFoundError:
            continue
    raise StoreError(f"{paths.ledger(study)} in the store {files.name} changes too fast to be read")


class Outcomes:
    """A study's outcomes as they stand at one moment: columns of all rows, and single rows in full."""

    def __init__(self, files: Files, study: str) -> None:
        self._files = files
        self._study = study
        found = _list(files, study, report=True)
        self._opened = _open_outcomes(files, study)
        parts = _uncovered(found, "outcomes", self._opened.watermarks if self._opened else {})[1]
        self._table = read(files, study, "outcomes") if parts or self._opened is None else None

    def table(self, columns: Sequence[str]) -> Any:
        """The columns of every row, as a `pyarrow.Table`."""
        if self._table is not None:
            return self._table.select(list(columns))
        assert self._opened is not None
        try:
            return self._opened.table(columns)
        except _Unreadable:
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
        assert self._opened is not None
        try:
            return self._opened.rows(indices, columns)
        except _Unreadable as error:
            path = paths.outcomes(self._study)
            raise StoreError(
                f"{path} in the store {self._files.name} is damaged ({error}); run the study once more: its states "
                "still know what was measured"
            ) from error


class _Unsure(NamedTuple):
    """A part that may or may not be durable: the store's answer is still to come, or was lost."""

    part: Part
    data: Data
    batches: int
    """How many of the buffered batches are in it, from the first."""


class _Unreadable(Exception):
    """A torn or foreign Parquet file."""


class _Superseded(Exception):
    """A newer driver is at work."""


class _Parquet:
    """One of this module's Parquet files, its rows still unread. Raises `_Unreadable`, here or when they are read."""

    def __init__(self, data: Data, kind: str) -> None:
        self.kind = kind
        try:
            self._file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(data)), page_checksum_verification=True)
            self._present = set(self._file.schema_arrow.names)
            metadata = self._file.schema_arrow.metadata or {}
            self._version = int(metadata[b"schema_version"])
            covers = metadata.get(b"covers", b"").decode().split()
            self.watermarks = {int(epoch): int(seq) for epoch, _, seq in (cover.partition("-") for cover in covers)}
            if {name for other, name in _TELLING.items() if other != kind} & self._present:
                raise _Unreadable(f"it holds no {kind}")
        except KeyError:
            raise _Unreadable("it has no schema_version") from None
        except _ARROW_ERRORS as error:
            raise _Unreadable(_line(error)) from error

    def rows(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows at `indices` in that order; only the row groups that hold them are read."""
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        wanted = np.asarray(indices, dtype=np.int64)
        groups = np.searchsorted(starts, wanted, side="right") - 1
        found: dict[int, dict[str, Any]] = {}
        for group in np.unique(groups).tolist():
            of_group = wanted[groups == group]
            table = self.table(columns, group=group).take(of_group - starts[group])
            found.update(zip(of_group.tolist(), table.to_pylist(), strict=True))
        return [found[index] for index in wanted.tolist()]

    def table(self, columns: Sequence[str] | None = None, *, group: int | None = None) -> Any:
        """In the schema of now: columns that an older version lacked are null, those of a later one are left out."""
        fields = [SCHEMAS[self.kind].field(name) for name in (COLUMNS[self.kind] if columns is None else columns)]
        names = [field.name for field in fields if field.name in self._present]
        try:
            # In this thread: another could still hold the buffer, a Python object, while Python ends, and crash it.
            if group is None:
                found = self._file.read(names, use_threads=False)
            else:
                found = self._file.read_row_group(group, names, use_threads=False)
            arrays = [
                _as(found[field.name], field.type)
                if field.name in self._present
                else pa.nulls(found.num_rows, field.type)
                for field in fields
            ]
        except _ARROW_ERRORS as error:
            raise _Unreadable(_line(error)) from error
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=SCHEMAS[self.kind].metadata))


def _as(column: Any, type_: Any) -> Any:
    """The column in the type of now; a cast that changes nothing costs as much as a read."""
    return column if column.type == type_ else column.cast(type_)


# What pyarrow raises for bytes that are not, or not wholly, the file they should be. Reading them is not in here.
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _unreadable(kind: str) -> Callable[[bytes], bool]:
    """Whether no ledger can have written these bytes for a kind."""

    def check(data: bytes) -> bool:
        try:
            _Parquet(data, kind).table()
        except _Unreadable:
            return True
        return False

    return check


def _open_outcomes(files: Files, study: str) -> _Parquet | None:
    """The merged outcomes, their rows unread; None when they are absent or, with a warning, unreadable."""
    path = paths.outcomes(study)
    try:
        return _Parquet(files.map(path), "outcomes")
    except FileNotFoundError:
        return None
    except _Unreadable as error:
        _LOG.warning("%s in the store %s is unreadable (%s); skipped", path, files.name, error)
        return None


def _opened(
    files: Files,
    study: str,
    found: list[Part],
    kind: str,
    spoilt: Callable[[Part, _Unreadable], None],
    columns: Sequence[str] | None = None,
) -> tuple[Part | None, list[Any], list[Part]]:
    """The newest merged file of a kind, its rows, and the parts that it does not cover.

    A spoilt one covers nothing: it is taken out of `found`, and what it was made of counts as far as that is there.
    """
    while True:
        merged, parts = _uncovered(found, kind, {})
        if merged is None:
            return None, [], parts
        try:
            return merged, [_load(files, study, merged, columns)], parts
        except _Unreadable as error:
            spoilt(merged, error)
            found.remove(merged)


def _load(files: Files, study: str, part: Part, columns: Sequence[str] | None) -> Any:
    return _Parquet(files.read(paths.part(study, part)), part.kind).table(columns)


def _load_or_skip(files: Files, study: str, part: Part, columns: Sequence[str] | None) -> Any:
    try:
        return _load(files, study, part, columns)
    except _Unreadable as error:
        _skip(files, study, part, error)
        return _concat(part.kind, [], columns)


def _skip(files: Files, study: str, part: Part, error: _Unreadable) -> None:
    _LOG.warning("%s in the store %s is unreadable (%s); skipped", paths.part(study, part), files.name, error)


def _list(files: Files, study: str, *, report: bool = False) -> list[Part]:
    """The ledger's files in the order of writing."""
    found = []
    for name in files.list(paths.ledger(study)):
        part = paths.parse_part(name)
        if part is not None and part.kind in COLUMNS and not (part.merged and part.kind == "outcomes"):
            found.append(part)
        elif report:
            _LOG.warning(
                "%s/%s in the store %s is no file of the ledger; skipped", paths.ledger(study), name, files.name
            )
    return sorted(found)


def _uncovered(found: list[Part], kind: str, watermarks: Watermarks) -> tuple[Part | None, list[Part]]:
    """The newest merged file of a kind, if any, and the parts that neither it nor `outcomes.parquet` covers."""
    ours = [part for part in found if part.kind == kind]
    merged = max((part for part in ours if part.merged), default=None)
    return merged, [
        part
        for part in ours
        if not part.merged
        and (merged is None or part.position > merged.position)
        and part.seq > watermarks.get(part.epoch, 0)
    ]


def _batch(kind: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    columns = COLUMNS[kind]
    for row in rows:
        assert row.keys() <= columns.keys(), f"{kind} have no columns {sorted(row.keys() - columns.keys())}"
        assert kind != "outcomes" or row.get("key"), "an outcome without a key"
    arrays = []
    for name, type_ in columns.items():
        values = [row.get(name) for row in rows]
        try:
            if type_ == "json":
                values = [None if value is None else _json(value) for value in values]
            arrays.append(pa.array(values, SCHEMAS[kind].field(name).type))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{kind}, column {name} ({type_}): {_line(error)}") from error
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMAS[kind])


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), sort_keys=True, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _concat(kind: str, tables: Sequence[Any], columns: Sequence[str] | None = None) -> Any:
    if tables:
        return pa.concat_tables(tables)
    empty = SCHEMAS[kind].empty_table()
    return empty if columns is None else empty.select(list(columns))


def _serialise(table: Any, covers: str | None = None) -> Data:
    if covers is not None:
        table = table.replace_schema_metadata({**table.schema.metadata, "covers": covers})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="snappy",  # two thirds more on disk than zstd, and read in a third of the time
        row_group_size=_ROWS_PER_GROUP,
        use_dictionary=[name for name in table.column_names if name in _REPEATING],
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue()).cast("B")


def _merge(opened: _Parquet | None, rows: Any, columns: Sequence[str] | None) -> Any:
    """Merged outcomes with new rows behind them, one row for each key, in the given columns.

    The merged ones have each key once already, so that only rows whose key comes again are looked at.
    """
    chosen = list(COLUMNS["outcomes"] if columns is None else columns)
    if opened is None:
        return _deduplicated(rows).select(chosen)
    merged = opened.table(chosen if "key" in chosen else [*chosen, "key"])
    known = pc.is_in(merged["key"], value_set=rows["key"].combine_chunks())
    if pc.any(known).as_py():
        rows = pa.concat_tables([opened.table().filter(known), rows])
        merged = merged.filter(pc.invert(known))
    return pa.concat_tables([merged.select(chosen), _deduplicated(rows).select(chosen)])


def _deduplicated(rows: Any) -> Any:
    """One row for each key: one with measures before one without, then the lowest (trial, round), then the first."""
    if rows.num_rows == 0:
        return rows
    key = rows["key"].combine_chunks().dictionary_encode().indices.to_numpy()
    unmeasured = np.ones(rows.num_rows, dtype=bool)
    for name in MEASURES:
        unmeasured &= rows[name].is_null().to_numpy()
    order = np.lexsort((_integers(rows["round"]), _integers(rows["trial"]), unmeasured, key))
    first = np.ones(rows.num_rows, dtype=bool)
    first[1:] = key[order][1:] != key[order][:-1]
    return rows if first.all() else rows.take(np.sort(order[first]))


def _sorted(rows: Any) -> Any:
    order = np.lexsort([_integers(rows[name]) for name in ("seed", "round", "trial")])
    return rows if (order[1:] > order[:-1]).all() else rows.take(order)


def _integers(column: Any) -> Any:
    """As numpy, null behind every number."""
    return column.fill_null(np.iinfo(np.int64).max).to_numpy()
