"""The Parquet record of a study: outcomes, proposals and events.

A driver appends rows and flushes them as immutable parts; compaction merges the parts from time to time. A part's
place in the order is (epoch, seq): the epoch is its driver's lease, seq counts that driver's files.

    proposals, events   parts -> `<epoch>-<seq>-<kind>.all.parquet`, which stands for everything up to (epoch, seq);
                        a driver's first one has seq 0: later decisions of older drivers count for nothing
    outcomes            parts -> `<epoch>-<seq>-outcomes.all.parquet`, whose metadata `covers` names, for each epoch,
                        the last seq in it: a late part of an older driver is a fact like any other, and is not taken
                        for covered; `merged` is the file's own (epoch, seq)
                        -> `outcomes.parquet`, a copy of it for other programs, under a name that stays

Of merged files the newest counts. None is ever written again, so that the request of an older driver that is carried
out late makes a file that nobody looks at. It may overwrite `outcomes.parquet`, which our own readers look at only
where no merged file can be read; `merged` says what it is a copy of, and whoever next drives the study, or collects
its garbage, puts it right.

Files are deleted only after the one that covers them is durable and while no newer driver is there, so a reader that
finds a file gone lists again. While a driver is at work they stay for some time longer: what a broken connection tears
can be made again from them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

from orchestrator.store import paths
from orchestrator.store.backend import Data
from orchestrator.store.files import Files
from orchestrator.store.paths import Part
from orchestrator.store.rows import (
    COLUMNS,
    SCHEMAS,
    Rows,
    Unreadable,
    batch_of,
    concat,
    in_order,
    merge,
    serialise,
    unreadable,
)
from orchestrator.store.tables import (
    Merged,
    covers,
    load,
    merged_and_parts,
    merged_outcomes,
    newest_outcomes,
    parts_of,
    uncovered,
    uncovered_outcomes,
)

_LOG = logging.getLogger("orchardist.store")

MOST_PARTS = 64
"""More uncovered parts of one kind than this are due for compaction."""

GRACE_SECONDS = 30.0
"""How long a running driver keeps the parts that a merged file covers."""

_SHORTEST_INTERVAL_SECONDS = 10.0
_INTERVAL_PER_DURATION = 20.0


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
        self._hidden = True
        """There are no merged outcomes yet: other programs see nothing of the study."""
        self._compacted_at = clock()
        self._compaction_seconds = 0.0
        paths.study(study)  # a wrong name is refused now, not at the first flush

    def append(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Buffers rows until the next `flush`. Missing columns become null; JSON columns take Python objects, in which
        NaN and infinities become null. A value of the wrong type is a `TypeError`; nothing of the call is kept then."""
        assert kind in COLUMNS, kind
        if not rows:
            return
        batch = batch_of(kind, rows)
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
                        data = serialise(pa.Table.from_batches(batches).combine_chunks())
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
        compaction: 10 s, or 20 times as long as that one took. The first outcomes wait for nothing."""
        with self._part_lock:
            self._start()
            most = max(self._uncovered.values())
            if self._hidden and self._uncovered["outcomes"]:
                return True
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
                        self._hidden = self._hidden and not (kind == "outcomes" and merged)
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
        found, merged = newest_outcomes(self.files, self.study)
        watermark = merged.rows.watermarks.get(self.epoch, 0) if merged else 0
        self._seq = max([part.seq for part in found if part.epoch == self.epoch] + [watermark])
        for kind in COLUMNS:
            parts = uncovered_outcomes(found, merged) if kind == "outcomes" else uncovered(found, kind)[1]
            self._uncovered[kind] = len(parts)
        self._hidden = merged is None

    def _next(self, kind: str) -> Part:
        """The next name for a part."""
        self._start()
        assert self._seq is not None
        self._seq += 1
        return Part(self.epoch, self._seq, kind, merged=False)

    def _delete(self, covered: Sequence[Part], grace_seconds: float) -> None:
        now = self._clock()
        due = [part for part in covered if now - self._covered_at.setdefault(part, now) >= grace_seconds]
        if due:
            # A newer driver may have begun before the file that covers these was there, and then it needs them. One
            # that begins from now on finds that file.
            self._refuse_if_superseded()
        for part in due:
            self.files.delete(paths.part(self.study, part))
            del self._covered_at[part]

    def _refuse_if_superseded(self) -> None:
        leases = [lease[0] for name in self.files.list(paths.lease(self.study)) if (lease := paths.parse_lease(name))]
        if max([part.epoch for part in parts_of(self.files, self.study)] + leases, default=0) > self.epoch:
            raise _Superseded

    def _compact_decisions(self, kind: str, grace_seconds: float) -> int:
        found = parts_of(self.files, self.study)
        torn: list[Part] = []

        def aside(path: str, error: Unreadable) -> None:
            torn.extend(part for part in found if paths.part(self.study, part) == path)
            self._set_aside(path, kind, error, stays=True)

        merged, before, parts = merged_and_parts(self.files, self.study, found, kind, aside)
        newest = parts[-1]._replace(merged=True) if parts else merged
        if newest is None and self.epoch <= 1 and not torn:
            return 0
        # An epoch's first merge stands before its own first part: what an older driver still writes comes before it
        # and is covered, unread.
        last = max([newest or Part(0, 0, kind, merged=True), Part(self.epoch, 0, kind, merged=True), *torn])
        if last != merged:
            tables = [*before, *(self._load_or_set_aside(part) for part in parts)]
            data = serialise(concat(kind, tables))
            self._refuse_if_superseded()
            path = paths.part(self.study, last)
            # A file of this name can only be the same merge, or what a broken connection left of it.
            spoilt = partial(self.files.set_aside, path, "is torn", unreadable(kind), stays=True)
            if not self.files.create(path, data) and spoilt():
                self.files.write(path, data)
        covered = [part for part in found if part.kind == kind and part != last and part.position <= last.position]
        self._delete(covered, grace_seconds)
        return len(parts)

    def _compact_outcomes(self, kind: str, grace_seconds: float) -> int:
        found = parts_of(self.files, self.study)
        spoilt = False

        def aside(path: str, error: Unreadable) -> None:
            nonlocal spoilt
            spoilt = True
            if not self._set_aside(path, kind, error, stays=True):
                raise FileNotFoundError(path)  # it is whole by now

        for merged in merged_outcomes(self.files, self.study, found, aside):
            parts = uncovered_outcomes(found, merged)
            try:
                data = None
                if parts or spoilt or (merged is not None and merged.part is None):
                    merged, data = self._merge_outcomes(merged, parts)
                break
            except Unreadable as error:
                assert merged is not None
                aside(merged.path, error)
        if merged is not None and merged.part is not None:
            newest = merged.part
            if data is not None or self._published() != newest.position:
                copy = self.files.map(merged.path) if data is None else data
                self.files.write(paths.outcomes(self.study), copy, self._refuse_if_superseded)
            covered = [
                part
                for part in found
                if part.kind == kind and (part < newest if part.merged else covers(merged.rows.watermarks, part))
            ]
            self._delete(covered, grace_seconds)
        return len(parts)

    def _merge_outcomes(self, merged: Merged | None, parts: Sequence[Part]) -> tuple[Merged, Data]:
        """A new merged file of what was merged and of the parts. Raises `Unreadable` for what was merged."""
        rows = concat("outcomes", [self._load_or_set_aside(part) for part in parts])
        rows = in_order(merge(merged.rows if merged else None, rows, None))
        watermarks = dict(merged.rows.watermarks) if merged else {}
        for part in parts:
            watermarks[part.epoch] = max(part.seq, watermarks.get(part.epoch, 0))
        told = " ".join(_position(*item) for item in sorted(watermarks.items()))
        while True:
            with self._part_lock:
                part = self._next("outcomes")._replace(merged=True)
            data = serialise(rows, covers=told, merged=_position(*part.position))
            self._refuse_if_superseded()
            path = paths.part(self.study, part)
            if self.files.create(path, data):
                return Merged(Rows(data, "outcomes"), path, part), data

    def _published(self) -> tuple[int, int] | None:
        """Of which merged file `outcomes.parquet` is a copy; None where it is absent, or none of ours."""
        path = paths.outcomes(self.study)
        try:
            return Rows(self.files.map(path), "outcomes").merged
        except FileNotFoundError:
            return None
        except Unreadable as error:
            self._set_aside(path, "outcomes", error, stays=True)
            return None

    def _load_or_set_aside(self, part: Part) -> Any:
        try:
            return load(self.files, self.study, part, None)
        except Unreadable as error:
            self._set_aside(paths.part(self.study, part), part.kind, error)
            return SCHEMAS[part.kind].empty_table()

    def _set_aside(self, path: str, kind: str, error: Unreadable, *, stays: bool = False) -> bool:
        return self.files.set_aside(path, f"is unreadable ({error})", unreadable(kind), stays=stays)


def _position(epoch: int, seq: int) -> str:
    return f"{epoch:06d}-{seq:08d}"


class _Unsure(NamedTuple):
    """A part that may or may not be durable: the store's answer is still to come, or was lost."""

    part: Part
    data: Data
    batches: int
    """How many of the buffered batches are in it, from the first."""


class _Superseded(Exception):
    """A newer driver is at work."""
