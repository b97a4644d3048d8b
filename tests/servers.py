"""Real S3 servers on loopback, each a process of its own: moto (in memory) and SeaweedFS (on disk, may be killed)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from botocore.config import Config  # type: ignore[import-untyped,unused-ignore]
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped,unused-ignore]
from botocore.session import get_session  # type: ignore[import-untyped,unused-ignore]

ACCESS_KEY, SECRET_KEY = "an-access-key-for-tests", "a-secret-key-for-tests"
BUCKET = "orchard"
_START_SECONDS = 60.0

# What SeaweedFS listens at beside S3, all of it on loopback.
_PORTS = ("master", "volume", "filer", "webdav", "admin")
_GRPC = ("master", "volume", "filer", "admin", "s3")
_OTHER = ("s3.port.iceberg", "s3.port.lance", "metricsPort")


class Server:
    """A server process with a port and a folder that stay the same when it is killed and started again."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self.command = command
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once the server answers."""
        environment = os.environ | {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the server does not answer:\n{self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, and gone when this returns. Nothing happens when it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def environment(self) -> dict[str, str]:
        """What a client's environment must say to reach it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def _answers(self) -> bool:
        """Whether the S3 side is up with its bucket; moto has one from the first time on that somebody asks."""
        client = get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}),
        )
        try:
            if not any(bucket["Name"] == BUCKET for bucket in client.list_buckets()["Buckets"]):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="is-it-up", Body=b"")
        except (ClientError, BotoCoreError):
            return False
        finally:
            client.close()
        return True


@contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """moto's S3, with the bucket; a restart would lose everything."""
    with free_ports(1) as (port,):
        pass
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(Server(command, port, folder / "moto.log")) as server:
        yield server


@contextmanager
def seaweed(folder: Path) -> Iterator[Server]:
    """SeaweedFS with its data in `folder`, and the bucket."""
    data = folder / "data"
    data.mkdir()
    with free_ports(1 + len(_PORTS) + len(_GRPC) + len(_OTHER)) as (s3, *others):
        pass
    names = [f"{name}.port" for name in _PORTS] + [f"{name}.port.grpc" for name in _GRPC] + list(_OTHER)
    command = [
        os.path.join(sysconfig.get_path("scripts"), "weed"),
        "mini",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={s3}",
        "-admin.ui=false",
        "-s3.autoCreateBucket=false",
        "-master.telemetry=false",
        *(f"-{name}={port}" for name, port in zip(names, others, strict=True)),
    ]
    try:
        with _running(Server(command, s3, folder / "seaweed.log")) as server:
            yield server
    finally:
        for port in (s3, *others):  # what a killed one leaves behind
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()


@contextmanager
def free_ports(count: int) -> Iterator[list[int]]:
    """Ports that nobody listens at now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        yield [each.getsockname()[1] for each in sockets]


@contextmanager
def _running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill()
