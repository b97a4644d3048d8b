"""What is wrong with a store or a cluster before a study finds out, and what to do about it."""

from __future__ import annotations

import getpass
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import InputError, OrchardistError, StoreError
from orchestrator.pools.shipped import own_copy
from orchestrator.store import paths
from orchestrator.store.address import address as read_url
from orchestrator.store.store import Store

HARMLESS_SKEW_SECONDS = 2.0
LARGEST_SKEW_SECONDS = 300.0
"""S3 refuses requests whose clock is a quarter of an hour off; a third of that is no accident any more."""

JOB_SECONDS = 120.0
"""How long the doctor's own job may take on a cluster that is reached over HTTP."""

_MUST_AGREE = ("orchardist", "python", "ray", "torch")
_SHORT = 12
_REACH = "start the cluster, or give its address and its token"
_FIRST = "[\n"
_WITHIN = "import sys; from orchestrator.jobs.doctor import main; sys.exit(main())"
_LOOK = "from orchestrator.jobs.doctor import report; report()"
_OF_THE_KERNEL = ("/proc", "/sys", "/dev")

# What a store's driver says, and what to do about it; the first that fits.
_ADVICE = (
    (
        ("is not installed", "No module named", "protocol not known", "pip install"),
        "install what the message names, on every node",
    ),
    (("bucket does not exist", "NoSuchBucket", "bucket not found"), "make the bucket, or correct its name in the URL"),
    (
        ("SignatureDoesNotMatch", "signature we calculated", "InvalidAccessKeyId", "access key", "Access Key"),
        "the credentials are wrong: correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in ~/.aws",
    ),
    (
        ("Unable to locate credentials", "NoCredentials", "Anonymous"),
        "there are no credentials here: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role",
    ),
    (
        ("Forbidden", "Access Denied", "AccessDenied", "check the credentials", "403"),
        "the credentials may not do this there: correct them, or let them read, write, list and delete below the URL",
    ),
    (
        (
            "Could not connect",
            "Cannot connect",
            "Connect timeout",
            "timed out",
            "Name or service not known",
            "(waited ",
        ),
        "nothing answers there: is the server up, AWS_ENDPOINT_URL right, and the network open from this machine?",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    where: str
    state: Literal["ok", "doubtful", "wrong"]
    found: str
    advice: str = ""

    def as_row(self) -> dict[str, str]:
        return asdict(self)


def examine(store: str | None, address: str | None) -> list[Finding]:
    """Look at this machine, the store and the cluster.

    Args:
        store: a folder or any fsspec URL; None leaves the store out.
        address: `auto` or HOST:PORT for a cluster that is joined from one of its nodes; http://HEAD:8265 to have a job
            look from within; None for no cluster.
    """
    if address is None:
        return [*_alone(look()), *(store_findings(store) if store else [])]
    if address.startswith(("http://", "https://")):
        return _from_outside(store, address)
    return _from_within(store, address)


def store_findings(url: str) -> list[Finding]:
    """Whether the store can be written, read and listed from here, and what it promises."""
    try:
        files = Store(url).files
        files.probe()
        token = paths.handshake(secrets.token_hex(8))
        files.write(token, b"")
        listed = token.rpartition("/")[2] in files.list(paths.HANDSHAKE)
        files.delete(token)
    except StoreError as error:
        advice = store_advice(url, error)
        return [Finding(what="store", where=platform.node(), state="wrong", found=str(error), advice=advice)]
    name = files.name
    if not listed:
        found, advice = f"{name} does not list what was just written", "turn off the caching in front of the store"
        return [Finding(what="store", where=platform.node(), state="wrong", found=found, advice=advice)]
    if files.creates_once:
        found = f"{name}: written, read and listed; one of several writers wins, so two drivers cannot both run a study"
        return [Finding(what="store", where=platform.node(), state="ok", found=found)]
    found = f"{name}: written, read and listed, but several writers can create the same file"
    advice = "start no two drivers of one study at the same instant, or update the store (it keeps to no If-None-Match)"
    return [Finding(what="store", where=platform.node(), state="doubtful", found=found, advice=advice)]


def store_advice(url: str, error: Exception) -> str:
    """What to do about a store that cannot be opened, written, read or listed from here."""
    try:
        found = read_url(url)
    except StoreError:
        return "correct the URL: the message says how"
    if found.kind == "folder":
        return _folder_advice(Path(found.place).expanduser().absolute(), str(error))
    said = next((advice for words, advice in _ADVICE if any(word in str(error) for word in words)), "")
    return said or "check the URL, the network and the credentials of this machine"


def look(store_url: str = "", nonce: str = "") -> dict[str, Any]:
    """What this process sees: versions, GPUs, and whether it reads and answers the nonce in the store."""
    import torch

    from orchestrator.code import code_digest

    seen: dict[str, Any] = {
        "host": platform.node(),
        "orchardist": code_digest()[:_SHORT],
        "python": platform.python_version(),
        "ray": version("ray"),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "token": os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
        "gpus_seen": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "gpu_trouble": _gpu_trouble(torch),
        "note": _note(),
    }
    if nonce:
        seen["store_trouble"] = _store_trouble(store_url, nonce)
    return seen


def node_findings(nodes: Sequence[Mapping[str, Any]], mine: Mapping[str, Any]) -> list[Finding]:
    """What is wrong on the nodes of a cluster.

    Args:
        nodes: an answer of each, as `submit.nodes` gives them, with what `look` returned.
        mine: what `look` returned in this process.
    """
    found: list[Finding] = []
    for node in nodes:
        where = f"{node['host']} (head)" if node["head"] else node["host"]
        if "trouble" in node:
            found.append(
                Finding(
                    what="node",
                    where=where,
                    state="wrong",
                    found=node["trouble"],
                    advice="install the same orchardist, ray and torch there; `submit` sends orchardist along",
                )
            )
            continue
        found += [_versions(where, node, mine), _clock(where, node), _gpus(where, node)]
        if "store_trouble" in node:
            trouble = node["store_trouble"]
            said = trouble or "reads what this machine wrote, and answers"
            advice = "every node must see the same store, with credentials of its own" if trouble else ""
            found.append(
                Finding(what="store", where=where, state="wrong" if trouble else "ok", found=said, advice=advice)
            )
    if not any(not node["head"] for node in nodes):
        advice = "start a worker: ray start --address HEAD:6379, or let the autoscaler do it"
        found.append(Finding(what="nodes", where="cluster", state="doubtful", found="only the head", advice=advice))
    return found


def _folder_advice(folder: Path, error: str) -> str:
    kernels = next(
        (top for top in _OF_THE_KERNEL if folder.is_relative_to(top) and not folder.is_relative_to("/dev/shm")), ""
    )
    if kernels:
        return f"{kernels} is the kernel's and holds no files of others: give a folder on a disk"
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        what = "a link that leads nowhere" if there.is_symlink() and not there.exists() else "no folder"
        return f"{there} is {what}: give another path, or move it away"
    if "No space left" in error or "quota" in error.lower():
        return f"free some room on the disk that holds {there}"
    if "Read-only file system" in error:
        return f"{there} is mounted for reading only: give another folder, or mount it for writing"
    if "Permission denied" in error or not os.access(there, os.W_OK | os.X_OK):
        return f"the user {_user()} may not write to {there}: have its owner allow it, or give another folder"
    return f"look at {there} on this machine: whether it is mounted, whether its disk is well, who may write to it"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


def _alone(seen: Mapping[str, Any]) -> list[Finding]:
    versions = ", ".join(f"{name} {seen[name]}" for name in _MUST_AGREE)
    return [
        Finding(what="versions", where=seen["host"], state="ok", found=versions),
        _gpus(seen["host"], {**seen, "gpus": None}),
    ]


def _from_within(store: str | None, address: str) -> list[Finding]:
    """Join the cluster from this node, and have every other one look and answer through the store."""
    from orchestrator.jobs.submit import nodes

    found = store_findings(store) if store else []
    nonce = ""
    files = None
    if store and found[0].state != "wrong":
        files = Store(store).files
        nonce = paths.handshake(secrets.token_hex(8))
        files.write(nonce, nonce.encode())
    try:
        answers = list(nodes(address, look, files.absolute_url if files else "", nonce))
        if files:
            listed = [paths.handshake(name) for name in files.list(paths.HANDSHAKE)]
            answered = [name for name in listed if name.startswith(f"{nonce}-")]
            answers = [_heard(answer, nonce, answered) for answer in answers]
    except InputError as error:
        return [*found, Finding(what="cluster", where=address, state="wrong", found=str(error), advice=_REACH)]
    finally:
        if files:
            with suppress(StoreError):
                for name in map(paths.handshake, files.list(paths.HANDSHAKE)):
                    if name.startswith(nonce):
                        files.delete(name)
    token = all(answer.get("token", True) for answer in answers)
    return [_auth(address, token), *found, *node_findings(answers, look())]


def _from_outside(store: str | None, address: str) -> list[Finding]:
    """Send a job that looks from within."""
    from orchestrator.jobs import submit
    from orchestrator.jobs.shipping import Shipment, house

    if store:
        submit.refuse_store(store)
    try:
        client, token = submit.connect(address), submit.wants_token(address)
    except InputError as error:
        return [Finding(what="cluster", where=address, state="wrong", found=str(error), advice=_REACH)]
    auth = _auth(address, token)
    job = f"orchardist-doctor-{secrets.token_hex(4)}"
    command = ["python", "-c", _WITHIN, "auto", *([store] if store else [])]
    shipped = Shipment(study="", house=house(), yours={}, left=())
    advice = f"read its log: {submit.by_hand(address, 'logs', job, token=token)}"
    try:
        submit.run_job(client, shipped, job=job, command=shlex.join(command), metadata={})
        log = submit.wait_for_end(client, job, seconds=JOB_SECONDS)
        rows = json.JSONDecoder().raw_decode(log[log.rindex(_FIRST) :])[0]
    except OrchardistError as error:
        return [auth, Finding(what="cluster", where=address, state="wrong", found=str(error), advice=advice)]
    except ValueError:
        return [auth, Finding(what="cluster", where=address, state="wrong", found="a job fails there", advice=advice)]
    return [auth, *(Finding(**row) for row in rows if row["what"] != "auth")]


def _auth(address: str, token: bool) -> Finding:
    if token:
        return Finding(what="auth", where=address, state="ok", found="the cluster asks for a token, and takes ours")
    host = address.removeprefix("http://").removeprefix("https://").rpartition(":")[0]
    here = host in ("127.0.0.1", "localhost", "[::1]")
    return Finding(
        what="auth",
        where=address,
        state="ok" if here else "doubtful",
        found="no token: whoever reaches the cluster's ports can run any code on it",
        advice="" if here else "start Ray with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN on every node",
    )


def _heard(answer: dict[str, Any], nonce: str, answered: Sequence[str]) -> dict[str, Any]:
    """The answer, with a complaint where the node's note in the store did not arrive here."""
    if answer.get("store_trouble") == "" and f"{nonce}-{answer['note']}" not in answered:
        return {**answer, "store_trouble": "what it writes to the store does not arrive here"}
    return answer


def _versions(where: str, node: Mapping[str, Any], mine: Mapping[str, Any]) -> Finding:
    versions = ", ".join(f"{name} {node[name]}" for name in _MUST_AGREE)
    other = [
        f"{name} {node[name]}, here {mine[name]}"
        for name in _MUST_AGREE
        if _essence(name, node[name]) != _essence(name, mine[name])
    ]
    if other:
        advice = "install the same versions on every node (constraints.txt pins them)"
        return Finding(what="versions", where=where, state="wrong", found="; ".join(other), advice=advice)
    if node["machine"] != mine["machine"]:
        found = f"{versions}; {node['machine']}, here {mine['machine']}"
        advice = "results are the same to the bit only among machines of one kind"
        return Finding(what="versions", where=where, state="doubtful", found=found, advice=advice)
    return Finding(what="versions", where=where, state="ok", found=versions)


def _essence(name: str, number: str) -> str:
    """What of a version must agree: of Python the first two numbers, of torch not the device that it is built for."""
    return ".".join(number.split(".")[:2]) if name == "python" else number.partition("+")[0]


def _clock(where: str, node: Mapping[str, Any]) -> Finding:
    skew, within = node["skew_seconds"], node["skew_within"]
    least = max(0.0, abs(skew) - within)
    state: Literal["ok", "doubtful", "wrong"] = "ok" if least <= HARMLESS_SKEW_SECONDS else "doubtful"
    if least > LARGEST_SKEW_SECONDS:
        state = "wrong"
    found = f"{skew:+.2f} s from this machine's, give or take {within:.2f} s"
    advice = "" if state == "ok" else "run chrony or ntpd there: object stores refuse requests from clocks that are off"
    return Finding(what="clock", where=where, state=state, found=found, advice=advice)


def _gpus(where: str, node: Mapping[str, Any]) -> Finding:
    counted, seen, trouble = node["gpus"], node["gpus_seen"], node["gpu_trouble"]
    said = f"torch sees {seen}" if counted is None else f"Ray counts {counted:g}, torch sees {seen}"
    if trouble:
        advice = "install a torch that fits the driver, and look at nvidia-smi"
        return Finding(what="gpu", where=where, state="wrong", found=f"{said}: {trouble}", advice=advice)
    if counted is not None and counted > seen:
        advice = "install a torch built for CUDA there and check the driver, or start Ray with the true --num-gpus"
        return Finding(what="gpu", where=where, state="wrong", found=said, advice=advice)
    if counted is not None and counted < seen:
        advice = f"ray start --num-gpus {seen} there, if trials may use them"
        return Finding(what="gpu", where=where, state="doubtful", found=said, advice=advice)
    return Finding(what="gpu", where=where, state="ok", found=said)


def _gpu_trouble(torch: Any) -> str:
    """Why a GPU that is there cannot be used; empty when nothing is wrong."""
    if not torch.cuda.is_available():
        return ""
    try:
        for device in range(torch.cuda.device_count()):
            torch.ones(2, device=f"cuda:{device}").sum().item()
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    return ""


def _store_trouble(url: str, nonce: str) -> str:
    """Why this process cannot work with the driver's store; empty when nothing is wrong. Leaves a note there."""
    try:
        files = Store(url).files
        if files.read(nonce) != nonce.encode():
            return f"reads something else than was written to {files.name}"
        files.write(f"{nonce}-{_note()}", b"")
    except FileNotFoundError:
        return f"does not see what was just written to {files.name}: another disk, or a cache"
    except StoreError as error:
        return str(error)
    return ""


def _note() -> str:
    return f"{platform.node()}-{os.getpid()}"


def main() -> int:
    """The doctor's job: have `report` print what it finds, working in a copy of what was shipped."""
    with own_copy() as place:
        command = [sys.executable, "-c", _LOOK, *sys.argv[1:]]
        return subprocess.run(command, cwd=place.folder, env=place.environment, check=False).returncode


def report() -> None:
    """Print every finding as one JSON document. ADDRESS [STORE] are the arguments."""
    address, *store = sys.argv[1:]
    rows = [finding.as_row() for finding in examine(store[0] if store else None, address)]
    print(json.dumps(rows, indent=2))
