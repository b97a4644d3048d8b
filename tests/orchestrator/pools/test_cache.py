"""How much of recent states a worker holds: what is usual, what the user asks for, and that it is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import Study, cli
from orchestrator.errors import InputError
from orchestrator.pools import cache, worker
from orchestrator.pools.cache import MOST_BYTES, Recent, asked_bytes, cache_bytes, machine
from orchestrator.pools.local import LocalPool
from tests.contracts.pool import job, segments
from tests.orchestrator.pools import small

GIB = 1 << 30


@given(
    most=st.integers(0, 20),
    held=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 12)), max_size=40),
)
def test_what_is_held_keeps_to_its_bytes_but_for_the_last(most: int, held: list[tuple[str, int]]) -> None:
    recent: Recent[int] = Recent(most)
    for key, size in held:
        recent.hold(key, size, size)
        there = {name: found for name in "abcdefgh" if (found := recent.get(name)) is not None}
        assert recent.bytes == sum(there.values())
        assert recent.bytes <= most or len(there) == 1
        assert recent.get(key) == size


def test_the_least_lately_used_goes_first() -> None:
    recent: Recent[str] = Recent(3)
    for key in "abcab":
        recent.hold(key, key, 1)
    recent.hold("d", "d", 1)
    assert [recent.get(key) for key in "abcd"] == ["a", "b", None, "d"]
    recent.clear()
    assert (recent.get("a"), recent.bytes) == (None, 0)


@pytest.mark.parametrize(("asked", "held"), [(None, None), (0, 0), (0.5, 5 * 10**8), (2, 2 * 10**9)])
def test_gigabytes_are_bytes(asked: float | None, held: int | None) -> None:
    assert asked_bytes(asked) == held


@pytest.mark.parametrize("asked", [-1, -1e-9, math.nan, math.inf, -math.inf, 1e300])
def test_what_is_no_amount_of_memory_is_refused(asked: float) -> None:
    with pytest.raises(InputError, match=r"^--cache-gb \S+: legal: gigabytes for each worker"):
        asked_bytes(asked)


@pytest.mark.parametrize(
    ("workers", "memory", "cores", "held"),
    [
        (1, 16 * GIB, 8, 2 * GIB),
        (4, 16 * GIB, 8, GIB // 2),
        (None, 16 * GIB, 8, GIB // 4),  # one for each core
        (1000, 16 * GIB, 8, GIB // 4),  # they are not all on this machine
        (1, 500 * GIB, 64, MOST_BYTES),
    ],
)
def test_what_is_usual_goes_by_the_machine(workers: int | None, memory: int, cores: int, held: int) -> None:
    assert cache_bytes(None, workers, memory, cores) == held


def test_what_is_asked_for_holds_unless_the_machine_has_less() -> None:
    assert cache_bytes(9 * GIB, 4, 16 * GIB, 8) == 9 * GIB
    with pytest.raises(InputError, match=r"^--cache-gb 20\.5: there are 17\.2 GB of memory on .*; legal: less"):
        cache_bytes(20_500_000_000, 4, 16 * GIB, 8)


def group(folder: Path, **limits: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, limit in limits.items():
        (folder / name.replace("_max", ".max").replace("memory_limit", "memory.limit")).write_text(limit + "\n")


def test_a_container_or_a_batch_job_has_less_than_its_machine(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("0::/slurm/job_7/step_0\n")
    group(tmp_path, memory_max="max", cpu_max="max 100000")
    bare = machine(tmp_path, mine)
    assert bare == machine(tmp_path / "none", tmp_path / "none"), "no limit is none"
    group(tmp_path / "slurm" / "job_7", memory_max="1048576", cpu_max="150000 100000")
    group(tmp_path / "slurm" / "job_7" / "step_0", memory_max="2097152", cpu_max="max 100000")
    assert machine(tmp_path, mine) == (1048576, min(2, bare[1]))


def test_an_older_kind_of_limit_counts_too(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("12:cpuset:/docker\n3:cpu,memory:/docker/ab\n1:name=systemd:/\n")
    group(tmp_path / "memory", memory_limit_in_bytes="9223372036854771712")
    group(tmp_path / "memory" / "docker", memory_limit_in_bytes="4096")
    assert machine(tmp_path, mine)[0] == 4096


def test_this_machine_has_memory_and_cores() -> None:
    memory, cores = machine()
    assert memory > 1 << 28 and cores >= 1


class Counting(LocalPool):
    """Counts states that are read back, and the most bytes that were held."""

    most = 0

    def completed(self, timeout_seconds: float) -> Any:
        found = super().completed(timeout_seconds)
        assert self._worker is not None
        self.most = max(self.most, self._worker._cache.bytes)
        return found


def run_with(folder: Path, held: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, int, int]:
    """A study with so much held; the states that its worker read back, and the most bytes that it held."""
    reads: list[str] = []
    read = worker.Worker._read

    def counted(self: worker.Worker, key: str) -> Any:
        reads.append(key)
        return read(self, key)

    monkeypatch.setattr(worker.Worker, "_read", counted)
    study, pool = Study(small.spec(), f"memory://{uuid4().hex}", root=small.write_task(folder)), Counting(cache=held)
    assert study.run(pool).failed == 0
    monkeypatch.setattr(worker.Worker, "_read", read)
    return study, len(reads), pool.most


def test_with_little_memory_states_are_read_back_and_come_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, few, much = run_with(tmp_path, None, monkeypatch)
    study, many, little = run_with(tmp_path, 0, monkeypatch)
    assert few < many and little < much / 4
    one, other = small.models(usual.store), small.models(study.store)
    assert one.keys() == other.keys() and all(small.same_bits(one[key], other[key]) for key in one)
    assert little <= max(state.nbytes for state in one.values()) * 3, "one state, with its optimizer"


def test_of_a_long_segment_only_what_it_still_needs_is_held_beside_the_cache(tmp_path: Path) -> None:
    ours = worker.Worker(job(tmp_path), cache=0)
    (segment,) = segments(ours.info, rounds=8, rate=0.2)
    running = ours.run(segment)
    held = [len(running.gi_frame.f_locals["made"]) for _ in running if running.gi_frame is not None]  # type: ignore[attr-defined]
    assert len(held) > 8 and max(held) <= 2


@pytest.mark.parametrize("command", ["run", "submit"])
@pytest.mark.parametrize("asked", ["-1", "nan", "inf", "many"])
def test_the_command_line_refuses_what_makes_no_sense(
    command: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--address", "http://127.0.0.1:9"] if command == "submit" else ["--local"]
    words = [command, "study.toml", "--store", str(tmp_path), "--cache-gb", asked, *more]
    monkeypatch.setattr("sys.argv", ["orchardist", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "--cache-gb" in said[0] and len(said) <= 2


def test_what_the_command_line_says_reaches_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.write_task(tmp_path)
    (tmp_path / "study.toml").write_text(small.spec(trials=1).to_toml())
    held: list[int] = []

    class Noted(Recent[Any]):
        def __init__(self, most_bytes: int) -> None:
            held.append(most_bytes)
            super().__init__(most_bytes)

    monkeypatch.setattr(worker, "Recent", Noted)
    monkeypatch.chdir(tmp_path)
    for asked, code in (("0.25", 0), ("100000", 2)):
        monkeypatch.setattr("sys.argv", ["orchardist", "run", "study.toml", "--local", "--cache-gb", asked])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (end.value.code or 0) == code
    assert held == [250_000_000]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "--cache-gb" in line]
    assert line.startswith("--cache-gb 100000: there are ") and line.endswith("legal: less, for each of its workers")
    assert cache.SHARE == 8, "the README says so"
