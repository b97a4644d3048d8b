"""Processes that are killed, put to sleep, or started twice: drivers, workers, raylets and the S3 server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from uuid import uuid4

import psutil  # type: ignore[import-untyped,unused-ignore]

from tests import servers
from tests.chaos.drive import DONE, REFUSED, noted, start
from tests.chaos.judge import Verdict, Witness
from tests.chaos.place import PATIENCE_SECONDS, ROOT, Place, wait_for
from tests.chaos.study import PACE, STEPS


def driver(place: Place) -> Verdict:
    """SIGKILL of the driver at random times, up to four times in a study; then the same again to its end."""
    witness, kills = Witness(), 0
    wanted = place.draw.randint(1, 4)
    while True:
        process = start(place.drive(pace=0.01))
        if kills < wanted and place.draw.random() < 0.8:  # else while it begins
            place.await_steps(process, place.draw.randint(1, 24))
        process.join(place.draw.uniform(0.0, 0.1) if kills < wanted else PATIENCE_SECONDS)
        if process.exitcode is not None or kills == wanted:
            break
        _end(process)
        kills += 1
        witness.look(place.url)
    return place.judge(witness, faults=kills, says=_said(place, process, DONE))


def driver_between_checkpoints(place: Place) -> Verdict:
    """SIGKILL of the driver in the middle of trainings that are made durable after every second step: no more than
    the steps since then are taken again, and one that was under way."""
    witness, kills = Witness(), 0
    while True:
        process = start(place.drive(pace=0.1, checkpoint_seconds=0.15))
        if kills < 3:
            place.await_steps(process, 3)
        process.join(place.draw.uniform(0.0, 1.0) if kills < 3 else PATIENCE_SECONDS)
        if process.exitcode is not None or kills == 3:
            break
        _end(process)
        kills += 1
        witness.look(place.url)
    return place.judge(witness, faults=kills, most_again=4 * kills, says=_said(place, process, DONE))


def driver_with_workers(place: Place) -> Verdict:
    """SIGKILL of `orchardist run --workers 2` at a random time, twice; then the same command again to its end."""
    witness, kills = Witness(), 0
    while True:
        command = place.command("--workers", "2", pace=0.1)
        if kills < 2:  # now and then before a worker is up, mostly in the middle of its work
            place.await_steps(command, 1, place.draw.choice([3.0, 60.0]))
        left = _ended_or_killed(command, place.draw.uniform(0.0, 2.0) if kills < 2 else PATIENCE_SECONDS)
        if not left:
            break
        kills += 1
        witness.look(place.url)
    return place.judge(witness, faults=2 * kills, says=place.must(command.returncode))


def workers(place: Place) -> Verdict:
    """SIGKILL of one of two Ray workers every two or three seconds, four times in a study; one command to its end."""
    witness, kills = Witness(), 0
    command = place.command("--workers", "2", pace=0.2)
    try:
        while kills < 4 and command.poll() is None:
            # Now and then before a new one is up, mostly in the middle of its work.
            place.await_steps(command, 1, place.draw.choice([3.0, 60.0]))
            time.sleep(place.draw.uniform(0.0, 2.0))
            found = _actors(command.pid)
            if found:
                place.draw.choice(found).kill()
                kills += 1
                witness.look(place.url)
        _ended_or_killed(command, PATIENCE_SECONDS)
    finally:
        _end_all(command)
    return place.judge(witness, faults=kills, says=place.must(command.returncode))


_NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
node = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    (raylet,) = node.all_processes["raylet"]
    raylet.process.kill()
    raylet.process.wait()
    node = cluster.add_node(num_cpus=1)
    print("again", flush=True)
cluster.shutdown()
"""


def raylet(place: Place) -> Verdict:
    """SIGKILL of the raylet of one of two nodes, twice in a study; another node joins each time."""
    witness, kills = Witness(), 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), STEPS: str(place.steps), PACE: "0.25"}
    environment.pop("RAY_ADDRESS", None)
    with (
        place.log.open("ab") as log,
        subprocess.Popen(
            [sys.executable, "-c", _NODES],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        ) as nodes,
    ):
        assert nodes.stdin is not None and nodes.stdout is not None
        try:
            address = nodes.stdout.readline().strip()
            command = place.command("--address", address, "--workers", "2", pace=0.25)
            try:
                while kills < 2 and command.poll() is None:
                    place.await_steps(command, place.draw.randint(2, 30))
                    time.sleep(place.draw.uniform(0.0, 2.0))
                    witness.look(place.url)
                    nodes.stdin.write("\n")
                    nodes.stdin.flush()
                    kills += 1
                    nodes.stdout.readline()
                _ended_or_killed(command, PATIENCE_SECONDS)
            finally:
                _end_all(command)
            nodes.stdin.close()
            nodes.wait(30)
        finally:
            _end_all(nodes)
    return place.judge(witness, faults=kills, says=place.must(command.returncode))


def server(place: Place) -> Verdict:
    """SIGKILL of SeaweedFS at random times, three times in a study; it comes back after up to two seconds."""
    witness, kills = Witness(), 0
    url = f"s3://{servers.BUCKET}/{uuid4().hex}"
    with servers.seaweed(place.folder) as s3, _reaching(s3):
        process = start(place.drive(url=url, pace=0.03, environment=s3.environment()))
        while kills < 3:
            process.join(place.draw.uniform(0.3, 1.5))
            if process.exitcode is not None:
                break
            witness.look(url)
            s3.kill()
            kills += 1
            time.sleep(place.draw.uniform(0.0, 2.0))
            s3.start()
        process.join(PATIENCE_SECONDS)
        return place.judge(witness, faults=kills, url=url, most_again=0, says=_said(place, process, DONE))


def clocks(place: Place) -> Verdict:
    """Drivers on two machines, their clocks an hour apart: one is killed, or put to sleep and wakes up as a zombie,
    and the other takes the study over. While the first one is alive the other is refused."""
    witness = Witness()
    ahead = place.draw.choice([-1.0, 1.0])
    first = start(place.drive(host="one", hours_off=ahead, pace=0.03))
    place.await_steps(first, 1)
    refused = start(place.drive(host="two", hours_off=-ahead))
    refused.join(PATIENCE_SECONDS)
    says = _said(place, refused, REFUSED)
    zombie = bool(place.number % 2)
    os.kill(first.pid or 0, signal.SIGSTOP if zombie else signal.SIGKILL)
    witness.look(place.url)
    second = start(place.drive(host="two", hours_off=-ahead, pace=0.03))
    if zombie:
        lease = place.folder / "store" / "studies" / "small" / "lease" / "000002.json"
        wait_for(lambda: lease.exists() or second.exitcode is not None)
        time.sleep(place.draw.uniform(0.0, 1.0))
        os.kill(first.pid or 0, signal.SIGCONT)
        first.join(PATIENCE_SECONDS)
        says += _said(place, first, REFUSED)
    second.join(PATIENCE_SECONDS)
    says += _said(place, second, DONE)
    first.join()
    # A zombie does not know that it is one before it looks, and works on for as long.
    most_again = 24 if zombie else None
    return place.judge(witness, faults=1, most_again=most_again, says=says)


def at_once(place: Place) -> Verdict:
    """Two drivers started at the same instant, of one machine or of two: exactly one runs, the other is refused."""
    at = time.monotonic() + 0.5
    hosts = ("", "") if place.number % 2 else ("one", "two")
    both = [start(place.drive(host=host, not_before=at, pace=0.005)) for host in hosts]
    for process in both:
        process.join(PATIENCE_SECONDS)
    codes = sorted(process.exitcode or 0 for process in both)
    says: tuple[str, ...] = () if codes == [DONE, REFUSED] else (f"two drivers at once ended with {codes}",)
    if "is being run by process" not in place.log.read_text():
        says += ("nobody was told who runs the study",)
    return place.judge(Witness(), faults=1, most_again=0, says=says)


def side_by_side(place: Place) -> Verdict:
    """Two studies of one store that share all their states and start at once: each state is made by one of them."""
    at = time.monotonic() + 0.5
    both = [start(place.drive(name=name, not_before=at, pace=0.01)) for name in ("small", "other")]
    for process in both:
        process.join(PATIENCE_SECONDS)
    says = tuple(line for process in both for line in _said(place, process, DONE))
    reports = noted(place.notes)
    made = Counter(report["key"] for report in reports if report["made"])
    adopted = Counter(report["key"] for report in reports if report["adopted"])
    if {key for key, times in (made + adopted).items() if made[key] != 1 or adopted[key] > 1}:
        says += ("a shared state was not made once and adopted at most once",)
    verdicts = [
        place.judge(Witness(), faults=1, name=name, most_again=place.reference.steps, says=says)
        for name in ("small", "other")
    ]
    one, other = verdicts
    return replace(
        one,
        lost=one.lost + other.lost,
        doubled=one.doubled + other.doubled,
        keys=one.keys and other.keys,
        weights=one.weights and other.weights,
        says=tuple(dict.fromkeys([*one.says, *other.says])),
    )


@contextmanager
def _reaching(s3: servers.Server) -> Iterator[None]:
    """Puts the way to a server into the environment of this process, for as long as the block lasts."""
    from s3fs import S3FileSystem

    before = dict(os.environ)
    os.environ.update(s3.environment())
    S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        S3FileSystem.clear_instance_cache()


def _said(place: Place, process: ForkServerProcess, wanted: int) -> tuple[str, ...]:
    """What is to be said of how a driver ended; one that hangs is ended."""
    if process.exitcode is None:
        _end(process)
        return (f"a driver did not end within {PATIENCE_SECONDS:.0f} s",)
    return place.must(process.exitcode, wanted)


def _end(process: ForkServerProcess) -> None:
    process.kill()
    process.join()


def _ended_or_killed(command: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the command still ran after so many seconds; then it is killed, and with it what it left behind."""
    try:
        command.wait(seconds)
    except subprocess.TimeoutExpired:
        _end_all(command)
        return True
    return False


def _end_all(command: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """SIGKILL of a process; those that it started get some time to see it, and are ended then."""
    if command.poll() is not None:
        return
    children = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.wait()
    _, left = psutil.wait_procs(children, timeout=15)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=15)


def _actors(pid: int) -> list[psutil.Process]:
    """The Ray workers that a driver has started on this machine."""
    found = []
    try:
        for process in psutil.Process(pid).children(recursive=True):
            if process.name().startswith("ray::Actor"):
                found.append(process)
    except psutil.NoSuchProcess:
        return []
    return found
