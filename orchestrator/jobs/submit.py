"""A study as a Ray job, over HTTP: sent, joined, followed; and what the nodes of a cluster say of themselves."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError, OrchardistError
from orchestrator.jobs.entrypoint import BEGUN
from orchestrator.pools.connection import CONNECT_SECONDS, disconnect, refuse_silence
from orchestrator.pools.connection import connect as join
from orchestrator.pools.shipped import AGAIN
from orchestrator.store.address import address as read_url
from orchestrator.store.address import without_credentials

if TYPE_CHECKING:
    from orchestrator.jobs.shipping import Shipment

BEGIN_SECONDS = 30.0
"""How long `submit` waits for the driver to say that the study has begun."""

NODES_SECONDS = 60.0
"""How long a node may take to answer the doctor."""

MOST_LOST = 30
"""How often in a row a job that is followed may be out of reach."""

_POLL_SECONDS = 0.5
_LOST_SECONDS = 2.0
_LIVE = ("PENDING", "RUNNING")
_HTTP = re.compile(r"https?://[^/\s@]+(/\S*)?")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_LIVES_HERE = ("memory",)
_ON_A_DISK = ("file", "local")
_SAME = {"s3a": "s3", "gcs": "gs"}
_DIGEST = "orchardist-study"
_CHATTY = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
_ANOTHER_HERE = ("study", "address")
"""What `run` calls by the same name, and what a job knows by itself: the study that was sent, the cluster it is on."""
_SECOND = ("legal: ", "see ", "what is finished is kept", "  ")
"""How the second line of a message begins."""
_TOKEN_HELP = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds the cluster's token"


class Unreachable(OrchardistError):
    """A cluster that answered before does not answer now."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A study's job on a cluster."""

    id: str
    joined: bool
    """Whether it ran already."""
    differs: tuple[str, ...] = ()
    """What of a job that was joined is not as it was to be sent: "files", "options"."""


def refuse_store(url: str) -> None:
    """Refuse a store that another machine could not find, or that shows its credentials in the job's command.

    Raises:
        InputError: with what would be legal.
    """
    legal = "legal: s3://bucket/folder and the like, or an absolute path that every node has"
    shown = without_credentials(url)
    scheme = _URL.fullmatch(url)
    if shown != url:
        raise InputError(
            f"--store {shown}: the URL holds credentials, which a job would show to whoever can see it; give them to "
            "the nodes instead: a role, or variables such as AWS_ACCESS_KEY_ID where Ray is started"
        )
    if scheme is not None and scheme[1].lower() in _LIVES_HERE:
        raise InputError(f"--store {shown}: memory lives in one process; {legal}")
    path = url if scheme is None else scheme[2] if scheme[1].lower() in _ON_A_DISK else None
    if path is not None and not path.startswith("/"):
        raise InputError(f"--store {shown}: a relative path means another folder on every node; {legal}")


def refuse_log(path: str | None) -> None:
    """Refuse a file for JSON lines that would lie in the job's own folder, which Ray removes in the end.

    Raises:
        InputError: with what would be legal.
    """
    if path is not None and path != "-" and not path.startswith("/"):
        raise InputError(
            f"--log {path}: a relative path is gone with the job; legal: - (into the job's log), or an absolute path "
            "on the head"
        )


def connect(address: str) -> Any:
    """A `JobSubmissionClient` for the cluster whose dashboard is at `address`; it lets us in.

    The token, where the cluster asks for one, is the one that Ray itself would take: from RAY_AUTH_TOKEN, the file that
    RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token.

    Raises:
        InputError: the address is wrong, nothing answers there, or the token is missing or wrong.
    """
    if not _HTTP.fullmatch(address):
        raise InputError(f"--address {address}: a job is submitted over HTTP; legal: http://HEAD:8265, https://…")
    address = address.rstrip("/")
    headers: dict[str, str] = {}
    if _version(address, headers) is None:
        token = _token()
        if not token:
            raise InputError(f"the cluster at {address} wants a token, and there is none here: {_TOKEN_HELP}")
        headers = {"Authorization": f"Bearer {token}"}
        if _version(address, headers) is None:
            raise InputError(f"the cluster at {address} does not accept this token: {_TOKEN_HELP}")
    from ray.job_submission import JobSubmissionClient

    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with _blamed(address):
        return JobSubmissionClient(address, headers=headers)


def wants_token(address: str) -> bool:
    """Whether the cluster asks who we are. Raises `InputError` as `connect` does."""
    return _version(address.rstrip("/"), {}) is None


def by_hand(address: str, verb: str, job: str, *, token: bool) -> str:
    """Ray's own command that does `verb` to a job; it shows our token only where it is told that there is one."""
    mode = "RAY_AUTH_MODE=token " if token else ""
    return f"{mode}ray job {verb} --address {shlex.quote(address)} {job}"


def options_of(context: Any) -> list[str]:
    """What `submit` was told, in words for `orchardist run`: every option that both of them have and that was given.

    Args:
        context: typer's, of the `submit` that is running.
    """
    words: list[str] = []
    for option in context.parent.command.commands["run"].params:
        value = None if option.name in _ANOTHER_HERE else context.params.get(option.name)
        if value is True:
            words.append(option.opts[0])
        elif value is not None and value is not False:
            words += [word for one in (value if option.multiple else [value]) for word in (option.opts[0], str(one))]
    return words


def entrypoint(shipped: Shipment, options: Sequence[str]) -> str:
    """The command of the job: the driver under `orchestrator.jobs.entrypoint`, with the options of `orchardist run`."""
    return shlex.join(["python", "-m", "orchestrator.jobs.entrypoint", shipped.study, "--address", "auto", *options])


def run_job(client: Any, shipped: Shipment, *, job: str, command: str, metadata: Mapping[str, str]) -> None:
    """Send the files and start the job. Nothing but the files is in its runtime environment."""
    with _blamed(client.get_address()), tempfile.TemporaryDirectory(prefix="orchardist-") as folder:
        shipped.write(Path(folder))
        client.submit_job(
            entrypoint=command, submission_id=job, runtime_env={"working_dir": folder}, metadata=dict(metadata)
        )


def submit(client: Any, shipped: Shipment, *, name: str, store: str, command: str, again: str = "") -> Submitted:
    """Start the study's job, or find the one that runs.

    A job's id is made of the study's name, its store, and a number, one higher each time: Ray takes no id twice.

    Args:
        client: from `connect`.
        shipped: what the job is given.
        name: the study's.
        store: its URL.
        command: from `entrypoint`.
        again: the user's own command, which a driver that is stopped names to go on with.
    """
    base = f"{name}-{sha256(_canonical(store).encode()).hexdigest()[:8]}"
    metadata = {_DIGEST: shipped.digest, **({AGAIN: without_credentials(again)} if again else {})}
    number, live = _latest(client, base)
    if live is None:
        job = f"{base}-{number + 1}"
        try:
            run_job(client, shipped, job=job, command=command, metadata=metadata)
            return Submitted(id=job, joined=False)
        except OrchardistError:
            # Somebody may have submitted the same study at the same instant.
            _, live = _latest(client, base)
            if live is None:
                raise
    differs = ["files"] if (live.metadata or {}).get(_DIGEST) != shipped.digest else []
    differs += ["options"] if live.entrypoint != command else []
    return Submitted(id=live.submission_id, joined=True, differs=tuple(differs))


def wait_until_begun(
    client: Any,
    job: str,
    *,
    seconds: float = BEGIN_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Wait until the study has begun. False where that takes more than `seconds`, as it does without a free worker.

    Raises:
        InputError: the job ended because its input is wrong, such as data that are not there or an unknown bucket.
        OrchardistError: it ended otherwise.
    """
    end = clock() + seconds
    with _blamed(client.get_address()):
        while True:
            status = str(client.get_job_status(job))
            if status not in (*_LIVE, "SUCCEEDED"):
                raise _why(client, job)
            if status == "SUCCEEDED" or BEGUN in client.get_job_logs(job):
                return True
            if clock() >= end:
                return False
            sleep(_POLL_SECONDS)


def follow(
    client: Any,
    job: str,
    show: Callable[[str], None],
    told: Callable[[str], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Show what the job writes until it ends, across lost connections. Returns the exit code of `orchardist run`.

    Args:
        client: from `connect`.
        job: its id.
        show: takes the log, piece by piece.
        told: takes a line that says why it ended otherwise than well.
        sleep: waits so many seconds.
    """
    shown = lost = 0
    while True:
        shown, whole = asyncio.run(_tail(client, job, shown, show))
        try:
            with _blamed(client.get_address()):
                info = client.get_job_info(job)
        except Unreachable:
            lost += 1
            if lost == MOST_LOST:
                raise
            sleep(_LOST_SECONDS)
            continue
        lost = 0
        if str(info.status) not in _LIVE and whole:
            break
        sleep(_POLL_SECONDS)
    if str(info.status) == "SUCCEEDED":
        return 0
    if str(info.status) == "STOPPED":
        told(f"the job {job} was stopped; nothing finished is lost, and submitting it again goes on")
        return 1
    with _blamed(client.get_address()):
        told(str(_why(client, job)))
    return info.driver_exit_code if info.driver_exit_code in (1, 2, 130) else 1


def wait_for_end(client: Any, job: str, *, seconds: float, sleep: Callable[[float], None] = time.sleep) -> str:
    """What a short job wrote, once it has ended.

    Raises:
        OrchardistError: it takes too long, or could not be started.
    """
    end = time.monotonic() + seconds
    with _blamed(client.get_address()):
        while str(client.get_job_status(job)) in _LIVE:
            if time.monotonic() >= end:
                client.stop_job(job)
                raise OrchardistError(f"the job {job} did not end within {seconds:.0f} s: it was stopped")
            sleep(_POLL_SECONDS)
        if client.get_job_info(job).driver_exit_code is None:
            raise _why(client, job)
        return str(client.get_job_logs(job))


def nodes(address: str, ask: Callable[..., Mapping[str, Any]], *arguments: Any) -> Iterator[dict[str, Any]]:
    """What `ask(*arguments)` returns on every node of the cluster at `address`, joined from one of its nodes.

    Each node's answer has `host`, `head`, `gpus` (as Ray counts them) and `skew_seconds` (its clock less this one's,
    with `skew_within`, the most by which that may be wrong) beside what `ask` returned, or `trouble`: why it has none.

    Raises:
        InputError: nothing answers at the address, or it does not let us in.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    refuse_silence(address)
    join(ray, None, address)
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in alive]
        asked = ray.remote(num_cpus=0, max_retries=0)(ask)
        answers = [asked.options(scheduling_strategy=place).remote(*arguments) for place in places]
        clock = ray.remote(num_cpus=0, max_retries=0)(_seconds)
        for node, place, answer in zip(alive, places, answers, strict=True):
            resources = node["Resources"]
            row: dict[str, Any] = {
                "host": node["NodeManagerHostname"],
                "head": "node:__internal_head__" in resources,
                "gpus": resources.get("GPU", 0.0),
            }
            try:
                row |= ray.get(answer, timeout=NODES_SECONDS)
                before = time.time()
                there = ray.get(clock.options(scheduling_strategy=place).remote(), timeout=NODES_SECONDS)
                after = time.time()
                row |= {"skew_seconds": there - (before + after) / 2, "skew_within": (after - before) / 2}
            except ray.exceptions.GetTimeoutError:
                row["trouble"] = f"did not answer within {NODES_SECONDS:.0f} s"
            except ray.exceptions.RayError as error:
                row["trouble"] = _one_line(str(error))
            yield row
    finally:
        disconnect(ray)


def _seconds() -> float:
    return time.time()


async def _tail(client: Any, job: str, shown: int, show: Callable[[str], None]) -> tuple[int, bool]:
    """Show the job's log from character `shown` on; what was shown in all, and whether the log came to its end."""
    import aiohttp

    seen = 0
    try:
        async for chunk in client.tail_job_logs(job):
            show(chunk[max(0, shown - seen) :])
            seen += len(chunk)
            shown = max(shown, seen)
    except (RuntimeError, OSError, aiohttp.ClientError):
        return shown, False
    return shown, True


def _latest(client: Any, base: str) -> tuple[int, Any]:
    """The highest number of a job of this base, 0 for none, and the job that is alive."""
    number, live = 0, None
    with _blamed(client.get_address()):
        jobs = client.list_jobs()
    for job in jobs:
        match = re.fullmatch(rf"{re.escape(base)}-(\d+)", job.submission_id or "")
        if match:
            number = max(number, int(match[1]))
            live = job if str(job.status) in _LIVE else live
    return number, live


def _why(client: Any, job: str) -> OrchardistError:
    """What ended a job, by its last words."""
    info = client.get_job_info(job)
    lines = [line for line in client.get_job_logs(job).splitlines() if line.strip()]
    if info.driver_exit_code is None or not lines:
        return OrchardistError(f"the job {job} could not be started: {_one_line(info.message or 'no reason given')}")
    tail = next((n for n in (1, 2) if not lines[-n:][0].startswith(_SECOND)), 1)
    last = without_credentials(" ".join(line.strip() for line in lines[-tail:]))
    if info.driver_exit_code == 2:
        return InputError(f"on the cluster: {last}")
    return OrchardistError(f"the job {job} ended with exit code {info.driver_exit_code}: {last}")


def _version(address: str, headers: Mapping[str, str]) -> str | None:
    """The cluster's version of Ray; None where it does not let us in."""
    request = urllib.request.Request(f"{address}/api/version", headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as answer:
            return str(json.load(answer)["ray_version"])
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return None
        reason = f"HTTP status {error.code}"
    except urllib.error.URLError as error:
        reason = _one_line(getattr(error.reason, "strerror", None) or str(error.reason))
    except (KeyError, TypeError, ValueError, HTTPException):
        reason = "something else than Ray answers there"
    except OSError as error:
        reason = _one_line(error.strerror or str(error) or type(error).__name__)
    raise InputError(f"no Ray dashboard at {address}: {reason}; legal: http://HEAD:8265, the address of the head")


def _token() -> str:
    """The token that Ray itself would take; empty for none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return _sent_in_a_header("RAY_AUTH_TOKEN", os.environ["RAY_AUTH_TOKEN"])
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    where = f"RAY_AUTH_TOKEN_PATH: {path}" if named else str(path)
    try:
        return _sent_in_a_header(where, path.read_text(errors="surrogateescape"))
    except OSError as error:
        if named:
            raise InputError(f"RAY_AUTH_TOKEN_PATH: cannot read {path}: {error.strerror}") from error
        return ""


def _sent_in_a_header(where: str, text: str) -> str:
    """The token, without what stands around it."""
    token = text.strip()
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise InputError(f"{where}: a token is one line of plain ASCII without blanks; this one holds something else")
    return token


def _canonical(store: str) -> str:
    """One spelling of a store's URL for all that mean the same place."""
    found = read_url(store)
    if found.kind == "folder":
        return os.path.normpath(f"/{found.place.lstrip('/')}")  # it is absolute: `refuse_store`
    scheme, colon, place = found.place.partition("://")
    return f"{_SAME.get(scheme, scheme)}{colon}{place.rstrip('/')}"


@contextmanager
def _blamed(address: str) -> Iterator[None]:
    """What goes wrong between here and the cluster is one line."""
    from ray.exceptions import AuthenticationError
    from requests import RequestException

    try:
        yield
    except AuthenticationError as error:
        raise InputError(f"the cluster at {address} does not accept this token: {_TOKEN_HELP}") from error
    except (ConnectionError, RequestException) as error:
        raise Unreachable(f"the cluster at {address} does not answer any more: {_one_line(str(error))}") from error
    except RuntimeError as error:
        raise OrchardistError(f"the cluster at {address} refused: {_one_line(str(error))}") from error


def _one_line(text: str) -> str:
    """The first line of a text, or the last of one that holds a traceback."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()] or [""]
    return lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]
