"""A Ray head with a dashboard in a process of its own, which asks for a token."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
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
