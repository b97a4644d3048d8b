"""S3 servers for the tests of the store: each is started at most once, and ended with the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from uuid import uuid4

import pytest

from orchestrator.store import lease
from tests import servers
from tests.servers import BUCKET, Server

Serve = Callable[[str], Server]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Gives a running server by its name, moto or seaweed."""
    running: dict[str, Server] = {}
    with ExitStack() as stack:

        def get(name: str) -> Server:
            if name not in running:
                start = {"moto": servers.moto, "seaweed": servers.seaweed}[name]
                running[name] = stack.enter_context(start(tmp_path_factory.mktemp(name)))
            return running[name]

        yield get


@pytest.fixture(params=["moto", "seaweed"])
def s3(request: pytest.FixtureRequest, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty root on a real S3 server, whose address and credentials are in the environment."""
    reach(serve(request.param), monkeypatch)
    return f"s3://{BUCKET}/{uuid4().hex}"


@pytest.fixture
def seaweed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same on SeaweedFS alone."""
    reach(serve("seaweed"), monkeypatch)
    return f"s3://{BUCKET}/{uuid4().hex}"


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver elsewhere is known to be dead after half a second instead of fifteen."""
    times = {"BEAT_SECONDS": 0.1, "DEAD_SECONDS": 0.5, "_POLL_SECONDS": 0.02, "_BEAT_CHECK_SECONDS": 0.02}
    for name, value in times.items():
        monkeypatch.setattr(lease, name, value)


def reach(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the way to a server into the environment."""
    from s3fs import S3FileSystem

    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    # fsspec keeps one object for all who ask with the same arguments, whatever the environment says now.
    S3FileSystem.clear_instance_cache()
