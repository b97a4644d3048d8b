"""Rows of one kind as the bytes of a Parquet file, and back: one fixed, versioned schema for each kind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.compute as pc  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

from orchestrator.outcome import EVENT_COLUMNS, MEASURES, OUTCOME_COLUMNS, PROPOSAL_COLUMNS, SCHEMA_VERSION
from orchestrator.store.backend import Data

COLUMNS: dict[str, dict[str, str]] = {
    "proposals": PROPOSAL_COLUMNS,
    "outcomes": OUTCOME_COLUMNS,
    "events": EVENT_COLUMNS,
}
"""Column tables by kind, in the order in which a flush writes: no event speaks of an outcome that is not there yet."""

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


class Unreadable(Exception):
    """A torn or foreign Parquet file."""


class Rows:
    """One of this module's Parquet files, its rows still unread. Raises `Unreadable`, here or when they are read."""

    def __init__(self, data: Data, kind: str) -> None:
        self.kind = kind
        try:
            self._file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(data)), page_checksum_verification=True)
            self._present = set(self._file.schema_arrow.names)
            metadata = self._file.schema_arrow.metadata or {}
            self._version = int(metadata[b"schema_version"])
            covers = metadata.get(b"covers", b"").decode().split()
            self.watermarks = dict(map(_position, covers))
            merged = metadata.get(b"merged", b"").decode()
            self.merged = _position(merged) if merged else None
            """The (epoch, seq) of the merged file that this is, or is a copy of; None: it is not merged, or was written
            when `outcomes.parquet` was the only merged file of outcomes."""
            if {name for other, name in _TELLING.items() if other != kind} & self._present:
                raise Unreadable(f"it holds no {kind}")
        except KeyError:
            raise Unreadable("it has no schema_version") from None
        except _ARROW_ERRORS as error:
            raise Unreadable(_line(error)) from error

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
            raise Unreadable(_line(error)) from error
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=SCHEMAS[self.kind].metadata))


def _position(text: str) -> tuple[int, int]:
    epoch, _, seq = text.partition("-")
    return int(epoch), int(seq)


def _as(column: Any, type_: Any) -> Any:
    """The column in the type of now; a cast that changes nothing costs as much as a read."""
    return column if column.type == type_ else column.cast(type_)


# What pyarrow raises for bytes that are not, or not wholly, the file they should be. Reading them is not in here.
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError)


def _line(error: Exception) -> str:
    """An error of pyarrow, which may be long and of several lines."""
    return " ".join(str(error).split())[:200]


def unreadable(kind: str) -> Callable[[bytes], bool]:
    """Whether no ledger can have written these bytes for a kind."""

    def check(data: bytes) -> bool:
        try:
            Rows(data, kind).table()
        except Unreadable:
            return True
        return False

    return check


def batch_of(kind: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """A record batch in the schema of now; a value of the wrong type is a `TypeError` that names its column."""
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


def concat(kind: str, tables: Sequence[Any], columns: Sequence[str] | None = None) -> Any:
    """The rows of all the tables; an empty table of the kind where there are none."""
    if tables:
        return pa.concat_tables(tables)
    empty = SCHEMAS[kind].empty_table()
    return empty if columns is None else empty.select(list(columns))


def serialise(table: Any, **metadata: str) -> Data:
    """The bytes of a Parquet file with more metadata: `covers` and `merged`, for merged outcomes."""
    if metadata:
        table = table.replace_schema_metadata({**table.schema.metadata, **metadata})
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


def merge(opened: Rows | None, rows: Any, columns: Sequence[str] | None) -> Any:
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


def in_order(rows: Any) -> Any:
    """By trial, round and seed."""
    order = np.lexsort([_integers(rows[name]) for name in ("seed", "round", "trial")])
    return rows if (order[1:] > order[:-1]).all() else rows.take(order)


def _integers(column: Any) -> Any:
    """As numpy, null behind every number."""
    return column.fill_null(np.iinfo(np.int64).max).to_numpy()
