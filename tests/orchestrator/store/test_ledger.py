from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import StoreError
from orchestrator.outcome import SCHEMA_VERSION
from orchestrator.store import Files, Ledger, tables
from orchestrator.store.rows import COLUMNS, schema
from orchestrator.store.tables import read as read_ledger
from tests.faulty import Faulty
from tests.orchestrator.store.test_lease import Time

GOLDEN = Path(__file__).parents[2] / "golden" / "ledger_schema.txt"
BEFORE = Path(__file__).parents[2] / "golden" / "store_of_before"
"""Written when `outcomes.parquet` was the only file of merged outcomes: trials 1 to 3 are merged, 4 is not."""
LEDGER = "studies/s/ledger"
OUTCOMES = "studies/s/outcomes.parquet"


@pytest.fixture(params=["folder", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return Files(tmp_path if request.param == "folder" else f"memory://{uuid4().hex}")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def outcome(number: int, **more: Any) -> dict[str, Any]:
    return {"key": f"{number:064x}", "trial": number, "round": 0, "seed": 0, "accuracy": number / 100, **more}


def proposal(trial: int) -> dict[str, Any]:
    return {"trial": trial, "params": {"rate": 0.2}}


def write(ledger: Ledger, *numbers: int) -> None:
    ledger.append("outcomes", [outcome(number) for number in numbers])
    ledger.append("proposals", [proposal(number) for number in numbers])
    ledger.append("events", [{"event": "done", "trial": number} for number in numbers])
    ledger.flush()


def trials(files: Files, kind: str = "outcomes") -> list[int]:
    found: list[int] = read_ledger(files, "s", kind, ["trial"])["trial"].to_pylist()
    return found


def parts(files: Files, kind: str) -> list[str]:
    return [name for name in files.list(LEDGER) if kind in name]


def test_the_schema_is_pinned() -> None:
    lines = [f"{kind}.{field.name}: {field.type}" for kind in COLUMNS for field in schema(kind)]
    versions = {kind: schema(kind).metadata[b"schema_version"].decode() for kind in COLUMNS}
    lines += [f"{kind} schema_version: {version}" for kind, version in versions.items()]
    assert "\n".join(lines) + "\n" == GOLDEN.read_text(), "change SCHEMA_VERSION and the golden file on purpose only"


def test_an_unknown_study_has_no_rows(files: Files) -> None:
    for kind in COLUMNS:
        table = read_ledger(files, "s", kind)
        assert table.num_rows == 0 and table.schema.equals(schema(kind), check_metadata=True)
    assert read_ledger(files, "s", "outcomes", ["seed", "key"]).column_names == ["seed", "key"]


def test_rows_come_back_in_order_before_and_after_compaction(files: Files) -> None:
    ledger = Ledger(files, "s", 1)
    write(ledger, 3, 1)
    write(ledger, 2)
    assert parts(files, "") == [
        f"000001-0000000{seq}-{kind}.parquet"
        for seq, kind in zip(range(1, 7), ["proposals", "outcomes", "events"] * 2, strict=True)
    ]
    for kind in COLUMNS:
        assert trials(files, kind) == [3, 1, 2]
    ledger.compact()
    assert files.list(LEDGER) == [
        "000001-00000004-proposals.all.parquet",
        "000001-00000006-events.all.parquet",
        "000001-00000007-outcomes.all.parquet",
    ]
    assert trials(files, "proposals") == trials(files, "events") == [3, 1, 2]
    assert trials(files) == [1, 2, 3], "outcomes are sorted"
    write(ledger, 0)
    assert trials(files, "events") == [3, 1, 2, 0]
    assert trials(files) == [1, 2, 3, 0]
    ledger.compact()
    ledger.compact()
    assert trials(files, "events") == [3, 1, 2, 0]
    assert trials(files) == [0, 1, 2, 3]
    for kind in COLUMNS:
        assert read_ledger(files, "s", kind).schema.equals(schema(kind), check_metadata=True)


def test_what_is_not_flushed_is_not_there(files: Files) -> None:
    ledger = Ledger(files, "s", 1)
    ledger.append("outcomes", [outcome(1)])
    assert trials(files) == []
    ledger.flush()
    ledger.flush()
    assert trials(files) == [1] and len(files.list(LEDGER)) == 1


def test_values_survive(files: Files) -> None:
    row = outcome(
        1,
        params={"b": [1, 2.5, None, "ü"], "a": float("nan"), "c": {"d": float("inf")}},
        class_accuracy=[0.5, None, 1.0],
        flops=2**40,
        device="cpu",
    )
    ledger = Ledger(files, "s", 1)
    ledger.append("outcomes", [row])
    ledger.flush()
    for _ in range(2):
        (found,) = read_ledger(files, "s", "outcomes").to_pylist()
        assert found.keys() == COLUMNS["outcomes"].keys()
        assert json.loads(found["params"]) == {"b": [1, 2.5, None, "ü"], "a": None, "c": {"d": None}}
        assert list(json.loads(found["params"])) == ["a", "b", "c"]
        assert found["class_accuracy"] == [0.5, None, 1.0] and found["flops"] == 2**40
        assert found["layers"] is None and found["test_accuracy"] is None
        ledger.compact()


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"key": "k", "acuracy": 1.0}, AssertionError),
        ({"trial": 1}, AssertionError),
        ({"key": "k", "trial": "one"}, TypeError),
        ({"key": "k", "params": {"x": object()}}, TypeError),
    ],
)
def test_a_wrong_row_raises_where_it_is_appended(files: Files, row: Mapping[str, Any], error: type[Exception]) -> None:
    ledger = Ledger(files, "s", 1)
    with pytest.raises(error):
        ledger.append("outcomes", [outcome(1), row])
    ledger.flush()
    assert files.list(LEDGER) == []


def test_one_row_for_each_key(files: Files) -> None:
    ledger = Ledger(files, "s", 1)
    ledger.append("outcomes", [outcome(1, trial=7, accuracy=0.7), outcome(2)])
    ledger.flush()
    ledger.append("outcomes", [outcome(1, trial=5, accuracy=0.5), outcome(1, trial=3, accuracy=None)])
    ledger.flush()
    assert sorted(trials(files)) == [2, 5]
    ledger.compact()
    assert trials(files) == [2, 5]
    ledger.append("outcomes", [outcome(1, trial=9), outcome(2, trial=1, accuracy=0.1), outcome(3)])
    ledger.flush()
    for columns in (["trial", "accuracy"], None):
        table = read_ledger(files, "s", "outcomes", columns)
        assert sorted(zip(table["trial"].to_pylist(), table["accuracy"].to_pylist(), strict=True)) == [
            (1, 0.1),
            (3, 0.03),
            (5, 0.5),
        ]
    ledger.compact()
    assert trials(files) == [1, 3, 5]


def test_the_merged_file_is_trusted_as_it_is(files: Files) -> None:
    """Duplicates that were planted in it come back: readers do not pay for what compaction did."""
    ledger = Ledger(files, "s", 1)
    write(ledger, 1, 2)
    ledger.compact()
    (merged,) = parts(files, "outcomes")
    table = pq.read_table(pa.BufferReader(files.read(f"{LEDGER}/{merged}")))
    assert table.schema.metadata[b"covers"] == b"000001-00000002"
    assert table.schema.metadata[b"merged"] == b"000001-00000004"
    assert table.schema.metadata[b"schema_version"] == str(SCHEMA_VERSION).encode()
    assert files.read(OUTCOMES) == files.read(f"{LEDGER}/{merged}")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables([table, table]), sink)
    files.write(f"{LEDGER}/{merged}", sink.getvalue().to_pybytes())
    assert trials(files) == [1, 2, 1, 2]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.booleans()), max_size=4), max_size=6),
    st.data(),
)
def test_when_it_is_compacted_does_not_matter(flushes: list[list[tuple[int, int, bool]]], data: st.DataObject) -> None:
    files = Files(f"memory://{uuid4().hex}")
    ledger = Ledger(files, "s", 1)
    best: dict[str, tuple[bool, int]] = {}
    for flush in flushes:
        for key, trial, measured in flush:
            row = outcome(key, trial=trial, accuracy=0.5 if measured else None)
            ledger.append("outcomes", [row])
            best[row["key"]] = min(best.get(row["key"], (True, 99)), (not measured, trial))
        ledger.flush()
        if data.draw(st.booleans()):
            ledger.compact()
    table = read_ledger(files, "s", "outcomes")
    assert dict(zip(table["key"].to_pylist(), table["trial"].to_pylist(), strict=True)) == {
        key: trial for key, (_, trial) in best.items()
    }
    assert table.num_rows == len(best)


def test_a_ledger_opened_again_in_the_same_epoch_goes_on_counting(files: Files) -> None:
    write(Ledger(files, "s", 1), 1)
    write(Ledger(files, "s", 1), 2)
    Ledger(files, "s", 1).compact()
    write(Ledger(files, "s", 1), 3)
    assert trials(files) == [1, 2, 3] and trials(files, "events") == [1, 2, 3]


def test_two_pens_of_one_epoch_overwrite_nothing(files: Files) -> None:
    one, other = Ledger(files, "s", 1), Ledger(files, "s", 1)
    for ledger, number in ((one, 1), (other, 2), (one, 3), (other, 4)):
        write(ledger, number)
    assert sorted(trials(files)) == [1, 2, 3, 4]


def test_a_late_outcome_of_an_older_driver_is_kept(files: Files) -> None:
    old, new = Ledger(files, "s", 1), Ledger(files, "s", 2)
    write(old, 1)
    write(new, 2)
    new.compact()
    write(old, 3)
    assert trials(files) == [1, 2, 3]
    assert trials(files, "proposals") == [1, 2], "a decision of an older driver, made after the newer one's merge"
    new.compact()
    write(new, 4)
    new.compact()
    assert trials(files) == [1, 2, 3, 4]
    assert len(files.list(LEDGER)) == 3


def test_an_older_driver_does_not_undo_a_newer_ones_merge(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    old, new = Ledger(files, "s", 1), Ledger(files, "s", 2)
    write(old, 1)
    write(new, 2)
    before = files.list(LEDGER)
    with caplog.at_level(logging.WARNING, "orchardist.store"):
        old.compact()
    assert "newer driver" in caplog.text
    assert files.list(LEDGER) == before and trials(files) == [1, 2]


def test_a_lease_alone_supersedes(files: Files) -> None:
    old = Ledger(files, "s", 1)
    write(old, 1)
    files.write("studies/s/lease/000002.json", b"{}")
    old.compact()
    assert not files.exists(OUTCOMES)


def test_when_to_compact(files: Files) -> None:
    clock = Clock()
    ledger = Ledger(files, "s", 1, clock)
    clock.now = 100.0
    assert not ledger.should_compact(), "there is nothing to merge"
    write(ledger, 1)
    assert ledger.should_compact()
    ledger.compact()
    assert not ledger.should_compact()
    write(ledger, 2)
    clock.now = 109.9
    assert not ledger.should_compact()
    clock.now = 110.0
    assert ledger.should_compact()
    ledger.compact()
    for number in range(64):
        ledger.append("events", [{"event": "done", "trial": number}])
        ledger.flush()
    assert not ledger.should_compact()
    ledger.append("events", [{"event": "done"}])
    ledger.flush()
    assert ledger.should_compact()
    assert Ledger(files, "s", 2, clock).should_compact(), "a new driver counts what it finds"


def test_slow_compactions_are_rarer(tmp_path: Path) -> None:
    clock = Clock()

    class Slow(Files):
        def write(self, path: str, data: Any, *more: Any) -> None:
            clock.now += 3.0
            super().write(path, data, *more)

    ledger = Ledger(Slow(tmp_path), "s", 1, clock)
    write(ledger, 1)
    ledger.compact()
    assert clock.now == 3.0
    write(ledger, 2)
    clock.now += 59.0
    assert not ledger.should_compact()
    clock.now += 1.0
    assert ledger.should_compact()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "no footer": lambda data: data[:-8],
    "foreign": lambda data: b"not parquet at all",
    "foreign parquet": lambda data: _parquet({"a": [1, 2]}, {}),
    "wrong type": lambda data: _parquet({"trial": ["x"]}, {"schema_version": "1"}),
    "wrong version": lambda data: _parquet({"trial": [1]}, {"schema_version": "new"}),
    "pages overwritten": lambda data: data[:4] + b"\xff" * 400 + data[404:],
}


def _parquet(columns: Mapping[str, list[Any]], metadata: Mapping[str, str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", list(COLUMNS))
def test_a_damaged_part_is_reported_and_set_aside(
    files: Files, kind: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(files, "s", 1)
    for number in (1, 2, 3):
        write(ledger, number)
    torn = f"{LEDGER}/{parts(files, kind)[1]}"
    files.write(torn, DAMAGES[damage](files.read(torn)))
    with caplog.at_level(logging.WARNING, "orchardist.store"):
        assert trials(files, kind) == [1, 3]
        assert torn in caplog.text
        assert files.exists(torn), "readers change nothing"
        ledger.compact()
    assert trials(files, kind) == [1, 3]
    assert len(files.list(f"set-aside/{LEDGER}")) == 1
    write(ledger, 4)
    ledger.compact()
    assert trials(files, kind) == [1, 3, 4]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_merged_outcomes_stop_nobody(files: Files, damage: str) -> None:
    ledger = Ledger(files, "s", 1)
    write(ledger, 1, 2)
    ledger.compact()
    for path in (OUTCOMES, f"{LEDGER}/{parts(files, 'outcomes')[0]}"):
        files.write(path, DAMAGES[damage](files.read(path)))
    assert trials(files) == []
    ledger = Ledger(files, "s", 2)
    write(ledger, 3)
    assert trials(files) == [3]
    ledger.compact()
    write(ledger, 4)
    assert trials(files) == [3, 4]
    assert len(files.list("set-aside/studies/s")) == 2 and len(files.list(f"set-aside/{LEDGER}")) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_two_copies_of_the_outcomes_one_is_enough(files: Files, damage: str) -> None:
    ledger = Ledger(files, "s", 1)
    for number, spoilt in enumerate(("merged", "copy", "merged")):
        write(ledger, number)
        ledger.compact()
        path = OUTCOMES if spoilt == "copy" else f"{LEDGER}/{parts(files, 'outcomes')[-1]}"
        files.write(path, DAMAGES[damage](files.read(path)))
        assert trials(files) == list(range(number + 1)), spoilt
    write(ledger, 3)
    assert trials(files) == [0, 1, 2, 3]
    ledger.compact()
    assert trials(files) == [0, 1, 2, 3] and len(parts(files, "outcomes")) == 1
    assert files.read(OUTCOMES) == files.read(f"{LEDGER}/{parts(files, 'outcomes')[0]}")


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_store_of_before_is_read_and_goes_on(files: Files, epoch: int) -> None:
    for path in (path for path in BEFORE.rglob("*") if path.is_file()):
        files.write(path.relative_to(BEFORE).as_posix(), path.read_bytes())
    for kind in COLUMNS:
        assert sorted(trials(files, kind)) == [1, 2, 3, 4]
    rows = read_ledger(files, "s", "outcomes", ["trial", "accuracy"]).to_pylist()
    assert {"trial": 1, "accuracy": 0.01} in rows, "a row without measures does not take its place"
    write(Ledger(files, "s", epoch), 5)
    assert sorted(trials(files)) == [1, 2, 3, 4, 5]
    Ledger(files, "s", epoch).compact()
    assert trials(files) == [1, 2, 3, 4, 5] and len(files.list(LEDGER)) == 3
    files.delete(OUTCOMES)
    assert trials(files) == [1, 2, 3, 4, 5]
    Ledger(files, "s", 3).compact()
    assert files.read(OUTCOMES) == files.read(f"{LEDGER}/{parts(files, 'outcomes')[0]}")


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("kind", ["proposals", "events"])
def test_a_torn_merge_covers_nothing_and_what_it_was_made_of_counts(files: Files, kind: str, epoch: int) -> None:
    ledger = Ledger(files, "s", 1)
    write(ledger, 1, 2)
    ledger.compact()
    write(ledger, 3)
    ledger.compact(grace_seconds=60.0)
    merged = max(name for name in parts(files, kind) if ".all." in name)
    files.write(f"{LEDGER}/{merged}", b"")  # a store without hard links is left so by a killed writer
    assert trials(files, kind) == [1, 2, 3]
    later = Ledger(files, "s", epoch)
    write(later, 4)
    later.compact()
    assert trials(files, kind) == [1, 2, 3, 4] and parts(files, kind)[-1] != merged
    later.compact()
    assert trials(files, kind) == [1, 2, 3, 4] and len(parts(files, kind)) == 1


def test_foreign_names_are_reported_and_left_alone(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(files, "s", 1)
    write(ledger, 1)
    foreign = ["README", "1-2-events.parquet", "000001-00000001-other.parquet"]
    for name in foreign:
        files.write(f"{LEDGER}/{name}", b"")
    with caplog.at_level(logging.WARNING, "orchardist.store"):
        assert trials(files) == [1]
    assert all(name in caplog.text for name in foreign)
    ledger.compact()
    assert trials(files) == [1] and set(foreign) < set(files.list(LEDGER))


def test_an_older_version_is_filled_with_nulls(files: Files) -> None:
    key = "0" * 64
    old = _parquet({"key": [key], "trial": [1], "retired": ["x"]}, {"schema_version": "0"})
    files.write(f"{LEDGER}/000001-00000001-outcomes.parquet", old)
    assert read_ledger(files, "s", "outcomes", ["accuracy", "trial"]).to_pylist() == [{"accuracy": None, "trial": 1}]
    files.write(OUTCOMES, _parquet({"key": ["1" * 64], "trial": [0]}, {"schema_version": "0"}))
    Ledger(files, "s", 2).compact()
    table = read_ledger(files, "s", "outcomes")
    assert table.schema.equals(schema("outcomes"), check_metadata=True)
    assert table["trial"].to_pylist() == [0, 1] and table["accuracy"].null_count == 2


class Killed(BaseException):
    pass


class Mortal(Files):
    """Dies just before its n-th change to the store."""

    def __init__(self, url: str | Path, changes: int) -> None:
        super().__init__(url)
        self.changes = changes

    def _live(self) -> None:
        self.changes -= 1
        if self.changes < 0:
            raise Killed

    def write(self, path: str, data: Any, *more: Any) -> None:
        self._live()
        super().write(path, data, *more)

    def create(self, path: str, data: Any) -> bool:
        self._live()
        return super().create(path, data)

    def delete(self, path: str) -> None:
        self._live()
        super().delete(path)


def _life(files: Files, acknowledged: list[int]) -> Iterator[None]:
    ledger = Ledger(files, "s", 1)
    for number in range(4):
        write(ledger, number)
        acknowledged.append(number)
        if number % 2:
            ledger.compact()
        yield


def test_a_driver_may_be_killed_between_any_two_changes() -> None:
    """Before, between and after parts, merged files and deletions: what was flushed is there, once."""
    for changes in range(100):
        url = f"memory://{uuid4().hex}"
        acknowledged: list[int] = []
        try:
            for _ in _life(Mortal(url, changes), acknowledged):
                pass
        except Killed:
            pass
        else:
            assert changes > 20, "every step was killed once"
            return
        files = Files(url)
        for _ in range(2):
            for kind in COLUMNS:
                found = trials(files, kind)
                assert len(found) == len(set(found)), (changes, kind, found)
                assert set(acknowledged) <= set(found) <= {*acknowledged, len(acknowledged)}, (changes, kind, found)
            Ledger(files, "s", 2).compact()
        assert len(files.list(LEDGER)) <= 3, "leftovers of the killed one are tidied up"
    raise AssertionError("the driver never came to its end")


def test_rows_that_could_not_be_written_are_written_by_the_next_flush(tmp_path: Path) -> None:
    class Full(Files):
        full = True

        def create(self, path: str, data: Any) -> bool:
            if self.full and "outcomes" in path:
                raise StoreError("cannot write: No space left on device")
            return super().create(path, data)

    files = Full(tmp_path)
    ledger = Ledger(files, "s", 1)
    with pytest.raises(StoreError):
        write(ledger, 1)
    files.full = False
    ledger.flush()
    for kind in COLUMNS:
        assert trials(files, kind) == [1]


@pytest.mark.parametrize("kind", list(COLUMNS))
def test_a_reader_whose_files_are_merged_away_lists_again(tmp_path: Path, kind: str) -> None:
    ledger = Ledger(Files(tmp_path), "s", 1)
    write(ledger, 1)
    write(ledger, 2)

    class Overtaken(Files):
        times = 0

        def list(self, folder: str) -> list[str]:
            names = super().list(folder)
            if self.times < 3:
                self.times += 1
                write(ledger, 10 + self.times)
                ledger.compact()
            return names

    files = Overtaken(tmp_path)
    found = trials(files, kind)
    assert found[:2] == [1, 2] and len(found) == len(set(found))
    assert files.times > 0


def test_a_reader_that_is_always_overtaken_gives_up(tmp_path: Path) -> None:
    write(Ledger(Files(tmp_path), "s", 1), 1)

    class Gone(Files):
        def read(self, path: str) -> bytes:
            raise FileNotFoundError(path)

    with pytest.raises(StoreError, match="too fast"):
        trials(Gone(tmp_path), "events")


def test_readers_beside_a_writer_lose_and_double_nothing(files: Files) -> None:
    ledger = Ledger(files, "s", 1)
    written = [0]
    done = threading.Event()
    wrong: list[object] = []

    def look() -> None:
        while not done.is_set():
            least = written[0]
            for kind in COLUMNS:
                found = trials(files, kind)
                if len(found) != len(set(found)) or len(found) < least:
                    wrong.append((kind, least, found))

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number in range(24):
            write(ledger, number)
            written[0] = number + 1
            if number % 3 == 0:
                ledger.compact()
    finally:
        done.set()
        reader.join()
    assert not wrong


def test_a_flush_beside_a_compaction_is_counted(tmp_path: Path) -> None:
    class During(Files):
        """Another thread flushes while the merged outcomes are being written."""

        def write(self, path: str, data: Any, *more: Any) -> None:
            thread = threading.Thread(target=write, args=(ledger, 2))
            thread.start()
            thread.join(timeout=10)
            assert not thread.is_alive(), "a flush waits for no compaction"
            super().write(path, data, *more)

    clock = Clock()
    files = During(tmp_path)
    ledger = Ledger(files, "s", 1, clock)
    write(ledger, 1)
    ledger.compact()
    assert trials(files) == [1, 2]
    clock.now = 100.0
    assert ledger.should_compact(), "the part that came meanwhile is still uncovered"


def test_a_wrong_study_name_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a study name"):
        Ledger(Files(tmp_path), "../x", 1)


def test_what_an_older_driver_decides_after_a_newer_ones_first_merge_counts_for_nothing(files: Files) -> None:
    old = Ledger(files, "s", 1)
    write(old, 1)
    Ledger(files, "s", 2).compact(grace_seconds=30.0)
    write(old, 2)
    for kind in ("proposals", "events"):
        assert trials(files, kind) == [1]
    assert trials(files) == [1, 2], "what was measured is a fact"
    newest = Ledger(files, "s", 3)
    newest.compact()
    assert trials(files, "proposals") == [1]
    assert parts(files, "proposals") == ["000003-00000000-proposals.all.parquet"]


def test_covered_parts_stay_for_a_while_so_that_a_torn_merge_loses_nothing(files: Files) -> None:
    clock = Clock()
    ledger = Ledger(files, "s", 1, clock)
    write(ledger, 1)
    ledger.compact(grace_seconds=30.0)
    write(ledger, 2)
    clock.now = 29.0
    ledger.compact(grace_seconds=30.0)
    for path in (OUTCOMES, f"{LEDGER}/{parts(files, 'outcomes')[-1]}"):
        files.write(path, b"")
    assert trials(files) == [1, 2]
    ledger.compact(grace_seconds=30.0)
    assert trials(files) == [1, 2]
    clock.now = 60.0
    ledger.compact(grace_seconds=30.0)
    assert trials(files) == [1, 2] and len(files.list(LEDGER)) == 3


# --- A driver that was taken for dead, and its late requests -------------------------------------------------------


class Asleep(BaseException):
    """The driver stands still for as long as nobody wakes it."""


class Late(Files):
    """Sends its n-th change, and falls asleep before the store has carried it out."""

    def __init__(self, url: str | Path, changes: int) -> None:
        super().__init__(url)
        self.changes = changes
        self.under_way: Callable[[], object] | None = None

    def _sleep_over(self, act: Callable[[], object]) -> None:
        self.changes -= 1
        if self.changes < 0:
            self.under_way = act
            raise Asleep

    def write(self, path: str, data: Any, first: Callable[[], None] | None = None) -> None:
        if first is not None:
            first()
        self._sleep_over(lambda: Files.write(self, path, data))
        super().write(path, data)

    def create(self, path: str, data: Any) -> bool:
        self._sleep_over(lambda: Files.create(self, path, data))
        return super().create(path, data)

    def delete(self, path: str) -> None:
        self._sleep_over(lambda: Files.delete(self, path))
        super().delete(path)


def test_whatever_a_driver_has_sent_may_arrive_when_the_next_one_has_ended() -> None:
    """Nothing of the newer one is lost for our readers, and whoever comes next puts right what others read."""
    for changes in range(100):
        files = Late(f"memory://{uuid4().hex}", changes)
        acknowledged: list[int] = []
        try:
            for _ in _life(files, acknowledged):
                pass
        except Asleep:
            pass
        else:
            assert changes > 20, "every request came late once"
            return
        files.changes = 100
        files.create("studies/s/lease/000002.json", b"{}")
        newer = Ledger(files, "s", 2)
        newer.compact(grace_seconds=30.0)
        for number in range(10, 14):
            write(newer, number)
        newer.compact()
        before = {kind: trials(files, kind) for kind in COLUMNS}
        assert {*acknowledged, 10, 11, 12, 13} <= set(before["outcomes"]), changes
        assert files.under_way is not None
        files.under_way()
        for kind in COLUMNS:
            assert set(trials(files, kind)) >= set(before[kind]), (changes, kind)
            assert kind == "outcomes" or trials(files, kind) == before[kind], (changes, "it decides nothing any more")
        after = trials(files)
        Ledger(files, "s", 3).compact()
        assert trials(files) == sorted(after), changes
        published = pq.read_table(pa.BufferReader(files.read(OUTCOMES)))
        assert published["trial"].to_pylist() == sorted(after), changes
    raise AssertionError("the driver never came to its end")


def test_the_canary_sees_rows_that_only_a_copy_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was once: what a late request overwrites was the only place of the newer driver's rows."""
    right = tables.parts_of

    def blind(*args: Any, **more: Any) -> list[Any]:
        return [part for part in right(*args, **more) if not (part.merged and part.kind == "outcomes")]

    monkeypatch.setattr(tables, "parts_of", blind)
    with pytest.raises(AssertionError):
        test_whatever_a_driver_has_sent_may_arrive_when_the_next_one_has_ended()


def test_a_driver_that_waits_for_its_store_looks_at_the_lease_before_every_attempt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The store is away while the outcomes are published; when it answers again another driver has them."""
    server, time_ = Faulty(uuid4().hex), Time()
    files = Files(server.url, clock=time_, sleep=time_.sleep)
    ledger = Ledger(files, "s", 1)
    write(ledger, 1)

    def fail_at_the_copy(kind: str, act: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
        if kind == "put" and any("outcomes.all" in name for name in server.objects) and not time_.now:
            raise TimeoutError("no answer")
        return right(kind, act, torn)

    def overtaken() -> None:
        server.objects["root/studies/s/lease/000002.json"] = b"{}"

    right, server.call = server.call, fail_at_the_copy  # type: ignore[method-assign]
    time_.then = overtaken
    with caplog.at_level(logging.WARNING, "orchardist.store"):
        ledger.compact()
    assert "newer driver" in caplog.text and time_.now > 0
    assert not files.exists(OUTCOMES) and len(parts(files, "outcomes")) == 2, "nothing is overwritten or deleted"
    assert trials(files) == [1]


def test_a_copy_that_a_late_request_has_overwritten_is_put_right_by_who_comes_next(files: Files) -> None:
    ledger = Ledger(files, "s", 1)
    write(ledger, 1)
    ledger.compact()
    before = files.read(OUTCOMES)
    write(ledger, 2)
    ledger.compact()
    files.write(OUTCOMES, before)
    assert trials(files) == [1, 2]
    Ledger(files, "s", 2).compact()
    assert files.read(OUTCOMES) == files.read(f"{LEDGER}/{parts(files, 'outcomes')[0]}") != before
    assert len(parts(files, "outcomes")) == 1


def test_the_first_outcomes_are_published_at_once(files: Files) -> None:
    clock = Clock()
    ledger = Ledger(files, "s", 1, clock)
    ledger.append("events", [{"event": "started"}])
    ledger.flush()
    assert not ledger.should_compact()
    write(ledger, 1)
    assert ledger.should_compact()
    ledger.compact(grace_seconds=30.0)
    assert files.exists(OUTCOMES)
    write(ledger, 2)
    assert not ledger.should_compact() and not Ledger(files, "s", 2, clock).should_compact()


@pytest.mark.parametrize("kind", list(COLUMNS))
def test_a_file_of_another_kind_is_set_aside(files: Files, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(files, "s", 1)
    write(ledger, 1)
    for other in set(COLUMNS) - {kind}:
        data = files.read(f"{LEDGER}/{parts(files, other)[0]}")
        files.write(f"{LEDGER}/{parts(files, kind)[0]}", data)
        with caplog.at_level(logging.WARNING, "orchardist.store"):
            assert trials(files, kind) == []
        assert f"it holds no {kind}" in caplog.text


@pytest.mark.parametrize("kind", list(COLUMNS))
def test_a_link_that_leads_nowhere_is_set_aside(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    files = Files(tmp_path)
    ledger = Ledger(files, "s", 1)
    write(ledger, 1)
    link = tmp_path / LEDGER / f"000001-00000009-{kind}.parquet"
    link.symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING, "orchardist.store"):
        assert trials(files, kind) == [1]
    assert f"{link.name} in the store" in caplog.text
    Ledger(files, "s", 2).compact()
    assert trials(files, kind) == [1] and not link.is_symlink()
    assert len(files.list(f"set-aside/{LEDGER}")) == 1
