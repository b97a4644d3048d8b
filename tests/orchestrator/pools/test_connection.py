"""Ray is started, interrupted while it starts, and ended again by whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import InputError
from orchestrator.pools import connection
from orchestrator.pools import ray as pools
from tests.cluster import ROOT
from tests.orchestrator.pools.test_staffing import Clock, FakeRay, clock, job  # noqa: F401


class Startable(FakeRay):
    """One that is not there before it is started; `trouble` comes up at one of the calls."""

    up = False
    trouble: dict[str, BaseException] = {}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        self._private.worker = SimpleNamespace()
        self._private.utils = SimpleNamespace(
            set_sigterm_handler=lambda handler: signal.signal(signal.SIGTERM, handler)
        )
        self.said: list[str] = []

    def is_initialized(self) -> bool:
        return self.up

    def init(self, **_: Any) -> None:
        self._call("init")
        self.up = True

    def shutdown(self) -> None:
        self._call("shutdown")
        self.up = False

    def nodes(self) -> list[dict[str, Any]]:
        self._call("nodes")
        return super().nodes()

    def kill(self, actor: Any) -> None:
        self._call("kill")
        super().kill(actor)

    def _call(self, name: str) -> None:
        self.said.append(name)
        if name in self.trouble:
            raise self.trouble[name]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Startable:  # noqa: F811
    fake = Startable(cores={"here": 2})
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


@pytest.mark.parametrize("where", ["init", "nodes"])
@pytest.mark.parametrize("trouble", [KeyboardInterrupt(), SystemExit(1), RuntimeError("no disk")])
def test_what_goes_wrong_while_a_pool_begins_leaves_no_ray(ray: Startable, where: str, trouble: BaseException) -> None:
    ray.trouble = {where: trouble}
    with pytest.raises(type(trouble)):
        pools.RayPool(1)
    assert ray.said[-1] == "shutdown" and not ray.up


def test_no_room_leaves_no_ray(ray: Startable) -> None:
    with pytest.raises(InputError, match="no room for 9 workers"):
        pools.RayPool(9)
    assert ray.said[-1] == "shutdown"


def test_a_ray_that_was_there_is_left_alone_whatever_goes_wrong(ray: Startable) -> None:
    ray.up, ray.trouble = True, {"nodes": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        pools.RayPool(1)
    assert "shutdown" not in ray.said


def test_ray_is_ended_also_where_a_worker_cannot_be(ray: Startable) -> None:
    pool = pools.RayPool(1)
    pool.prepare(job())
    ray.trouble = {"kill": RuntimeError("the head does not answer")}
    with pytest.raises(RuntimeError):
        pool.close()
    assert ray.said[-1] == "shutdown"


def interrupted(ray: Startable, times: int) -> list[str]:
    """What became of a start during which Ctrl-C was pressed so often."""
    said: list[str] = []

    def init(**options: Any) -> None:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        said.append("whole")
        ray._private.utils.set_sigterm_handler(signal.SIG_IGN)

    ray.init = init  # type: ignore[method-assign]
    signals = signal.SIGINT, signal.SIGTERM
    before = [*map(signal.getsignal, signals)]
    try:
        pools.RayPool(1)
    except KeyboardInterrupt:
        said.append("interrupted")
    assert [*map(signal.getsignal, signals)] == before
    return said


def test_one_interrupt_waits_until_ray_has_started_so_that_it_can_be_ended(ray: Startable) -> None:
    assert interrupted(ray, 0) == ["whole"]
    assert interrupted(ray, 1) == ["whole", "interrupted"]
    assert ray.said[-1] == "shutdown"


def test_who_presses_a_third_time_does_not_wait(ray: Startable) -> None:
    assert interrupted(ray, 2) == ["whole", "interrupted"]
    assert interrupted(ray, 3) == ["interrupted"]


def test_while_ray_starts_sigterm_stays_ours_and_waits(ray: Startable) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    theirs = ray._private.utils.set_sigterm_handler

    def init(**options: Any) -> None:
        ray._private.utils.set_sigterm_handler(lambda *_: came.append(0))
        signal.raise_signal(signal.SIGTERM)
        assert not came

    ray.init = init  # type: ignore[method-assign]
    try:
        pools.RayPool(1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]
    assert ray._private.utils.set_sigterm_handler is theirs


def test_an_interrupt_in_the_end_waits_until_ray_is_down(ray: Startable) -> None:
    pool = pools.RayPool(1)
    pool.prepare(job())
    down = ray.shutdown

    def shutdown() -> None:
        signal.raise_signal(signal.SIGINT)
        down()

    ray.shutdown = shutdown  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        pool.close()
    assert not ray.up


def test_off_the_main_thread_signals_are_left_alone(ray: Startable) -> None:
    found: list[pools.RayPool] = []
    thread = threading.Thread(target=lambda: found.append(pools.RayPool(1)))
    thread.start()
    thread.join(10)
    assert found and ray.up


def test_the_users_own_size_of_log_files_holds(ray: Startable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ROTATION_MAX_BYTES", "1000")
    pools.RayPool(1)
    assert os.environ["RAY_ROTATION_MAX_BYTES"] == "1000"
    monkeypatch.delenv("RAY_ROTATION_MAX_BYTES")
    pools.RayPool(1)
    ray.up = False
    pools.RayPool(1)
    assert os.environ["RAY_ROTATION_MAX_BYTES"] == str(connection.LOG_BYTES)


@pytest.mark.parametrize("mode", ["disabled", "", "token"])
def test_rays_own_loader_is_not_asked_for_a_token(ray: Startable, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """A driver that has loaded one wants it of its cluster, too, and is taken for dead where that has none."""
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(pools, "refuse_silence", lambda address: None)
    ray._raylet = SimpleNamespace(GcsClient=lambda address: None)  # type: ignore[attr-defined]
    pools.RayPool(1, address="127.0.0.1:1")
    assert ray.up


INTERRUPTED = """
import psutil, sys
from orchestrator.pools.ray import RayPool
try:
    print("begins", flush=True)
    RayPool(1)
except KeyboardInterrupt:
    gone, left = psutil.wait_procs(psutil.Process().children(recursive=True), 10)
    print("left", [process.name() for process in left if process.status() != psutil.STATUS_ZOMBIE])
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_while_ray_starts_leaves_no_process_of_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        env=os.environ | {"PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "begins\n"
        deadline = time.monotonic() + 60
        while not any("gcs_server" in name for name in names_under(process.pid)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert said == "left []\n"
    finally:
        process.kill()


def names_under(pid: int) -> list[str]:
    """The names of the processes that a process has started."""
    import psutil  # type: ignore[import-untyped,unused-ignore]

    return [child.name() for child in psutil.Process(pid).children(recursive=True)]
