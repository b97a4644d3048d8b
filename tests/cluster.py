"""Ray clusters for tests: a head with a dashboard that asks for a token, and nodes that come and go."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
TOKEN = "a-token-for-tests-0123456789abcdef"
# Every port is free or chosen by Ray: the usual one of the agent, which starts jobs, may be another cluster's.
_HEAD = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(
    num_cpus=2, num_gpus=0, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=int(sys.argv[1]),
    dashboard_agent_listen_port=0,
))
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def head(folder: Path) -> Iterator[tuple[str, str]]:
    """The addresses of its dashboard and of its GCS. It ends with the block, and with this process."""
    port = _free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PYTHONPATH": ROOT,  # what its nodes run is what these tests test, wherever another copy is installed
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    environment.pop("RAY_ADDRESS", None)
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _HEAD, str(port)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, (folder / "head.log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}", address
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class Nodes:
    """A cluster of `ray start` processes, each node in a process group of its own, which nobody else's Ray is in."""

    def __init__(self, folder: Path, *, dashboard: bool = False) -> None:
        self.folder = folder
        # Ray puts sockets there, whose paths must be short.
        self._temporary = Path(tempfile.mkdtemp(prefix="ray-"))
        self.scaled = self._temporary / "session_latest" / "logs" / "monitor.log"
        """What the autoscaler says, where there is one."""
        port = _free_port()
        self.address = f"127.0.0.1:{port}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        shown = _free_port() if dashboard else 0
        self.dashboard = f"http://127.0.0.1:{shown}"
        """Where jobs are sent, if there is one; it asks for the token, as all nodes do then."""
        self._environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} if dashboard else {}
        self._head = [
            *("--head", f"--port={port}", "--num-cpus=0", "--node-ip-address=127.0.0.1"),
            *(f"--temp-dir={self._temporary}", f"--ray-client-server-port={_free_port()}"),
            *(["--dashboard-host=127.0.0.1", f"--dashboard-port={shown}"] if dashboard else []),
            f"--include-dashboard={str(dashboard).lower()}",
        ]

    def answers(self) -> bool:
        """Whether the head can be joined."""
        host, _, port = self.address.partition(":")
        with suppress(OSError), socket.create_connection((host, int(port)), 1):
            return True
        return False

    def head(self, *flags: str, **environment: str) -> subprocess.Popen[bytes]:
        """A head without cores."""
        return self._start(*self._head, *flags, **environment)

    def worker(self, name: str, *flags: str) -> subprocess.Popen[bytes]:
        """A node with a core and the label name=NAME; it joins some seconds later."""
        flags = flags or ("--num-cpus=1",)
        return self._start(f"--address={self.address}", "--node-ip-address=127.0.0.1", f"--labels=name={name}", *flags)

    def drain(self, name: str, seconds: float) -> None:
        """What a cloud's notice does: the node is to be gone in so many seconds."""
        from ray.core.generated import autoscaler_pb2

        deadline = int((time.time() + seconds) * 1000)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
        accepted, why = self._gcs().drain_node(self.alive()[name], reason, "a test", deadline)
        assert accepted, why

    def alive(self) -> dict[str, str]:
        """The ids of the worker nodes that are there, by name."""
        found = self._gcs().get_all_node_info().values()
        return {node.labels["name"]: node.node_id.hex() for node in found if node.state == 0 and "name" in node.labels}

    def ids(self, name: str) -> list[str]:
        """The ids of all worker nodes of this name that are there."""
        found = self._gcs().get_all_node_info().values()
        return [node.node_id.hex() for node in found if node.state == 0 and node.labels.get("name") == name]

    def kill_raylet(self, node: subprocess.Popen[bytes]) -> None:
        """As when a machine is switched off: nothing on the node says goodbye."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                _, _, rest = path.read_text().rpartition(") ")
                if int(rest.split()[1]) == node.pid and "(raylet)" in path.read_text():
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    return
        raise AssertionError(f"no raylet under {node.pid}")

    def end(self) -> None:
        """End every process that was started here."""
        for node in self._nodes:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _start(self, *flags: str, **environment: str) -> subprocess.Popen[bytes]:
        if self._nodes:  # two that start at once on one machine may choose the same names for their sockets
            last = self.folder / f"node-{len(self._nodes) - 1}.log"
            until(lambda: "Ray runtime started" in last.read_text(), 60, f"the node before has started ({last})")
        common = ("--block", "--num-gpus=0", "--object-store-memory=80000000", "--dashboard-agent-listen-port=0")
        with (self.folder / f"node-{len(self._nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                [str(Path(sys.executable).parent / "ray"), "start", *common, *flags],
                env=os.environ
                | {"PYTHONPATH": ROOT, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "5"}
                # Jobs are started with the `python` on the path.
                | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
                | self._environment
                | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._nodes.append(node)
        return node

    def _gcs(self) -> Any:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        return GcsClient(address=self.address)


@contextmanager
def nodes(folder: Path, *, dashboard: bool = False) -> Iterator[Nodes]:
    """A cluster that ends with the block; its logs are in `folder`. With a dashboard it takes jobs, and wants a token."""
    found = Nodes(folder, dashboard=dashboard)
    try:
        yield found
    finally:
        found.end()


@contextmanager
def explained(*logs: Path) -> Iterator[None]:
    """What fails within the block says how these files end: what they tell is gone afterwards."""
    try:
        yield
    except (AssertionError, subprocess.TimeoutExpired) as error:
        for path in logs:
            error.add_note(f"--- {path} ends with:\n{path.read_text()[-3000:] if path.exists() else 'no such file'}")
        raise


def until(true: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
