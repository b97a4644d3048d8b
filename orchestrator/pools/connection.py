"""Ray itself: started inside this process, or a cluster that is joined; and let go of again."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.interrupts import held
from orchestrator.pools.share import Share
from orchestrator.pools.shipped import for_workers

CONNECT_SECONDS = 10.0

LOG_BYTES = 64 << 20
"""What the user's code prints goes to files of Ray's on the worker's disk, each of which begins anew at this size."""


def connect(ray: Any, workers: int | None, address: str | None) -> None:
    """Start Ray inside this process, or join the cluster at `address`. Signals wait until that is done: nobody could
    find and end the processes of a Ray that is half started.

    Raises:
        InputError: there is no cluster, or it does not let us in.
    """
    # A uv environment would be shipped to the workers, which run in this very environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    with held(), _sigterm_stays_ours(ray):
        if address is None:
            _start(ray, workers)
        else:
            _join(ray, address)


def disconnect(ray: Any) -> None:
    """End what `connect` began, also where it was interrupted."""
    with held():
        # Ray's own monitor lets a shutdown wait for more than a second: end it first, where this Ray shows it to us.
        node = getattr(ray._private.worker, "_global_node", None)
        for info in getattr(node, "all_processes", {}).get("monitor", []):
            info.process.kill()
        ray.shutdown()


def refuse_silence(address: str) -> None:
    """Ray tries an address at which nothing answers for minutes; here a connection is tried for seconds, first."""
    if "://" in address:
        raise InputError(f"--address {address}: a cluster is joined from one of its nodes; legal: auto, HOST:PORT")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto", or for Ray to refuse
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no Ray cluster answers at {address}: {error}; legal: auto, HOST:PORT") from error


def refuse_no_room(workers: int, room: int, share: Share, resources: Mapping[str, float]) -> None:
    """On one machine no room comes up later: Ray would let workers wait for ever."""
    if not 0 < workers <= room:
        there = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        each = f" with {share.says()} each" if share.gpus or share.resources or share.labels else ""
        legal = f"up to {room} workers" if room else "--address of a cluster that has them"
        raise InputError(f"no room for {max(1, workers)} workers{each}: there are {there}; legal: {legal}")


_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def _join(ray: Any, address: str) -> None:
    mode = "" if _token_mode() else "RAY_AUTH_MODE=token, and "
    where = f"{mode}RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds the cluster's token"
    try:
        _ask(ray, address)
        ray.init(address=address, **for_workers(), **_QUIET)
    except ray.exceptions.AuthenticationError as error:
        raise InputError(f"the Ray cluster at {address!r} does not let us in: set {where}") from error
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RpcError) as error:
        raise InputError(f"no Ray cluster at {address!r}: {str(error).strip().partition(chr(10))[0]}") from error


def _ask(ray: Any, address: str) -> None:
    """With a wrong token Ray tries for twenty seconds, and says so each time: ask the cluster once, first."""
    # Without a token that must be there this would end the process. Ray's own loader is not to be asked for it: what it
    # has once loaded is demanded of everybody who calls this process, of a cluster without a token too.
    if ":" in address and (_has_token() or not _token_mode()):
        ray._raylet.GcsClient(address=address)


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()


def _token_mode() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _start(ray: Any, workers: int | None) -> None:
    # The first connection to a raylet that is still coming up is otherwise given up for a whole second.
    os.environ.setdefault("RAY_raylet_client_connect_timeout_milliseconds", "50")
    # Without a size the files that workers print to grow as long as there is room on the disk.
    os.environ.setdefault("RAY_ROTATION_MAX_BYTES", str(LOG_BYTES))
    os.environ.setdefault("RAY_ROTATION_BACKUP_COUNT", "1")
    ray.init(address="local", num_cpus=workers, include_dashboard=False, **_QUIET)


@contextmanager
def _sigterm_stays_ours(ray: Any) -> Iterator[None]:
    """Ray would end this process at SIGTERM, in the middle of whatever it does."""
    theirs = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = theirs
