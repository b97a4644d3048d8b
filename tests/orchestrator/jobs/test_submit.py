from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command

from orchestrator.cli import app
from orchestrator.errors import InputError, OrchardistError
from orchestrator.jobs.entrypoint import BEGUN, STARTED
from orchestrator.jobs.shipping import FOLDER, Shipment
from orchestrator.jobs.submit import MOST_LOST, connect, entrypoint, follow, refuse_store, submit, wait_until_begun
from orchestrator.pools.shipped import AGAIN
from tests.cluster import TOKEN, head, nodes, until
from tests.orchestrator.pools import small
from tests.orchestrator.pools.test_nodes import write_study
from tests.orchestrator.test_cli import STUDY, Shell, shell

__all__ = ["shell"]

SENT = Shipment(
    study=f"{FOLDER}/study.toml",
    house={"orchestrator/__init__.py": b""},
    yours={f"{FOLDER}/study.toml": b"name = 'small'"},
    left=(),
)
STORE = "s3://bucket/orchard"
SENSIBLE = ("--address", "http://127.0.0.1:1", "--store", "/shared/a")


@dataclass
class FakeClient:
    """A cluster's jobs, in the order in which they came."""

    jobs: list[SimpleNamespace] = field(default_factory=list)
    logs: str = ""
    breaks: list[int] = field(default_factory=list)
    """After how many characters each of the next looks at a log loses its connection."""
    files: set[str] = field(default_factory=set)
    away: int = 0
    """How many of the next questions about a job find no connection."""
    taken: str = ""
    """The id that somebody else takes just before the next job is submitted."""

    def get_address(self) -> str:
        return "http://head:8265"

    def list_jobs(self) -> list[SimpleNamespace]:
        return list(self.jobs)

    def submit_job(
        self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> str:
        if self.taken:
            self.add(self.taken, "RUNNING", metadata=metadata, entrypoint=entrypoint)
            self.taken = ""
        if any(job.submission_id == submission_id for job in self.jobs):
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        folder = Path(runtime_env["working_dir"])
        self.files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        self.add(submission_id, "PENDING", metadata=metadata, entrypoint=entrypoint, runtime_env=runtime_env)
        return submission_id

    def add(self, job: str | None, status: str, **more: Any) -> None:
        told = {"driver_exit_code": None, "message": None, "metadata": None} | more
        self.jobs.append(SimpleNamespace(submission_id=job, status=status, **told))

    def get_job_info(self, job: str) -> SimpleNamespace:
        if self.away:
            self.away -= 1
            raise ConnectionError("Failed to connect to Ray at address: http://head:8265.")
        return next(found for found in self.jobs if found.submission_id == job)

    def get_job_status(self, job: str) -> str:
        return str(self.get_job_info(job).status)

    def get_job_logs(self, job: str) -> str:
        return self.logs

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        length = self.breaks.pop(0) if self.breaks else len(self.logs)
        for start in range(0, length, 7):
            yield self.logs[start : min(start + 7, length)]
        if length < len(self.logs):
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


def reached(monkeypatch: pytest.MonkeyPatch, client: FakeClient, *, token: bool = False) -> None:
    """Whatever the address, there is this cluster."""
    monkeypatch.setattr("orchestrator.jobs.submit.connect", lambda address: client)
    monkeypatch.setattr("orchestrator.jobs.submit.wants_token", lambda address: token)


def sent(client: FakeClient, store: str = STORE, shipped: Shipment = SENT) -> Any:
    return submit(client, shipped, name="small", store=store, command="true")


def test_the_job_s_folder_is_all_that_it_is_given() -> None:
    client = FakeClient()
    assert not sent(client).joined
    assert client.files == {*SENT.house, *SENT.yours}
    assert set(client.jobs[0].runtime_env) == {"working_dir"}


def test_ids_count_the_attempts_at_one_study_in_one_store() -> None:
    client = FakeClient()
    first = sent(client).id
    client.jobs[0].status = "FAILED"
    second = sent(client).id
    assert first.startswith("small-") and first.endswith("-1") and second == f"{first[:-1]}2"
    elsewhere = sent(client, "s3://bucket/other").id
    assert elsewhere.endswith("-1") and elsewhere != first


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (STORE, f"{STORE}/"),
        (STORE, "S3A://bucket/orchard"),
        ("gs://bucket/a", "gcs://bucket/a/"),
        ("/shared/orchard", "file:///shared/orchard/"),
        ("/shared/orchard", "/shared//old/../orchard"),
        ("/shared/orchard", "local:///shared/./orchard"),
    ],
)
def test_spellings_of_one_store_make_one_job(one: str, other: str) -> None:
    assert sent(FakeClient(), one).id == sent(FakeClient(), other).id
    assert sent(FakeClient(), one).id != sent(FakeClient(), f"{other}/more").id


def test_the_user_s_own_command_travels_without_credentials() -> None:
    client = FakeClient()
    again = "orchardist submit study.toml --store s3://name:hunter2hunter2@bucket/a"
    submit(client, SENT, name="small", store=STORE, command="true", again=again)
    assert client.jobs[0].metadata[AGAIN] == "orchardist submit study.toml --store s3://bucket/a"


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_live_job_is_joined(status: str) -> None:
    client = FakeClient()
    first = sent(client).id
    client.jobs[0].status = status
    again = sent(client)
    assert (again.id, again.joined, again.differs) == (first, True, ())
    assert len(client.jobs) == 1


def test_joining_says_what_is_not_as_it_was_to_be_sent() -> None:
    client = FakeClient()
    sent(client)
    other = Shipment(study=SENT.study, house={}, yours={SENT.study: b"name = 'other'"}, left=())
    assert sent(client, shipped=other).differs == ("files",)
    assert submit(client, SENT, name="small", store=STORE, command="false").differs == ("options",)


def test_of_two_who_submit_at_once_the_second_joins() -> None:
    client = FakeClient()
    client.add(None, "RUNNING")  # a driver that is no job
    probe = FakeClient()
    job = sent(probe).id
    client.taken = job
    found = sent(client)
    assert (found.id, found.joined) == (job, True)


def test_the_command_holds_the_options_of_run() -> None:
    command = entrypoint(SENT, ["--store", "/a b", "--workers", "2"])
    assert command == (
        f"python -m orchestrator.jobs.entrypoint {FOLDER}/study.toml --address auto --store '/a b' --workers 2"
    )


@pytest.mark.parametrize("url", ["/shared/orchard", "s3://bucket/a", "gs://bucket/a", "file:///shared/a"])
def test_stores_that_every_node_can_find_pass(url: str) -> None:
    refuse_store(url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("./orchard", "relative path"),
        ("orchard", "relative path"),
        ("~/orchard", "relative path"),
        ("file://orchard", "relative path"),
        ("memory://a", "memory lives in one process"),
        ("s3://name:hunter2hunter2@bucket/a", "holds credentials"),
        ("az://box/a?sig=hunter2hunter2", "holds credentials"),
    ],
)
def test_other_stores_are_refused_without_their_secrets(url: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        refuse_store(url)
    assert "hunter2" not in str(error.value)


def test_waiting_ends_when_the_study_has_begun() -> None:
    client = FakeClient()
    job = sent(client).id
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        client.logs += {2: f"{STARTED} node\n", 3: f"{BEGUN}\n"}.get(len(naps), "\n")

    assert wait_until_begun(client, job, sleep=sleep)
    assert len(naps) == 3


def test_a_job_that_does_not_start_is_not_waited_for_for_ever() -> None:
    client = FakeClient()
    now = [0.0]
    job = sent(client).id
    assert not wait_until_begun(
        client, job, seconds=10, clock=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )


@pytest.mark.parametrize(
    ("code", "message", "kind", "says"),
    [
        (2, None, InputError, "^on the cluster: cannot write the store s3://bucket/a: no such bucket$"),
        (1, None, OrchardistError, "ended with exit code 1: cannot write the store"),
        (None, "runtime_env setup failed: no space", OrchardistError, "could not be started: runtime_env setup failed"),
    ],
)
def test_a_job_that_ends_early_says_why(
    code: int | None, message: str | None, kind: type[Exception], says: str
) -> None:
    client = FakeClient()
    job = sent(client).id
    client.jobs[0].status, client.jobs[0].driver_exit_code, client.jobs[0].message = "FAILED", code, message
    client.logs = "Running entrypoint\ncannot write the store s3://key:secret@bucket/a: no such bucket\n\n"
    with pytest.raises(kind, match=says):
        wait_until_begun(client, job)


@pytest.mark.parametrize(
    ("status", "code", "ends"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 1, 1),
        ("FAILED", -9, 1),
        ("FAILED", None, 1),
        ("STOPPED", 143, 1),
    ],
)
def test_following_ends_with_the_exit_code_of_the_run(status: str, code: int | None, ends: int) -> None:
    client = FakeClient()
    job = sent(client).id
    client.jobs[0].status, client.jobs[0].driver_exit_code = status, code
    told: list[str] = []
    assert follow(client, job, lambda _: None, told.append) == ends
    assert bool(told) == bool(ends)


def test_who_follows_hears_why_it_ended() -> None:
    client = FakeClient(logs="epoch 3\nstudy small was made from another file: lr\nlegal: another name\n")
    job = sent(client).id
    client.jobs[0].status, client.jobs[0].driver_exit_code = "FAILED", 2
    told: list[str] = []
    assert follow(client, job, lambda _: None, told.append) == 2
    assert told == ["on the cluster: study small was made from another file: lr legal: another name"]


def test_what_is_followed_is_shown_once_across_lost_connections() -> None:
    client = FakeClient(logs="".join(f"line {number}\n" for number in range(50)), breaks=[3, 100, 99, 250])
    job = sent(client).id
    client.jobs[0].status = "SUCCEEDED"
    shown: list[str] = []
    assert follow(client, job, shown.append, shown.append, sleep=lambda _: None) == 0
    assert "".join(shown) == client.logs


def test_a_cluster_out_of_reach_is_waited_for_but_not_for_ever() -> None:
    client = FakeClient(away=MOST_LOST - 1)
    job = sent(client).id
    client.jobs[0].status = "SUCCEEDED"
    assert follow(client, job, lambda _: None, lambda _: None, sleep=lambda _: None) == 0
    client.away = MOST_LOST
    with pytest.raises(OrchardistError, match="http://head:8265 does not answer any more"):
        follow(client, job, lambda _: None, lambda _: None, sleep=lambda _: None)


# --- The command ---


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--address", "http://127.0.0.1:1"), "--store ./orchard: a relative path"),
        (("--address", "http://127.0.0.1:1", "--store", "/shared/a"), "no Ray dashboard at http://127.0.0.1:1"),
        (("--address", "auto", "--store", "/shared/a"), "a job is submitted over HTTP"),
        (("--address", "http://127.0.0.1:1", "--store", "/a", "--include", ".env"), "there is no such file"),
        (("--store", "/shared/a"), "Missing option '--address'"),
        ((*SENSIBLE, "--gpus-per-worker", "1.5"), "--gpus-per-worker 1.5: legal: a fraction of one GPU"),
        ((*SENSIBLE, "--resource", "trials"), "--resource trials: legal: NAME=AMOUNT"),
        ((*SENSIBLE, "--label-selector", "spot"), "--label-selector spot: legal: KEY=VALUE"),
        ((*SENSIBLE, "--log", "study.jsonl"), "--log study.jsonl: a relative path is gone with the job; legal: -"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    small.write_task(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    done = shell("submit", "study.toml", *words)
    assert done.code == 2
    assert says in done.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpus-per-worker", "2.5"), "--gpus-per-worker 2.5: legal: a fraction of one GPU"),
        (("--resource", "GPU=1"), "--resource GPU=1: legal: --gpus-per-worker"),
        (("--label-selector", "zone=a=b"), "--label-selector zone=a=b: legal values"),
        (("--local", "--resource", "trials=1"), "--local runs in this process"),
    ],
)
def test_run_refuses_what_workers_cannot_take(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    small.write_task(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    done = shell("run", "study.toml", *words)
    assert done.code == 2 and says in done.err and len(done.err.splitlines()) == 1


def test_what_workers_take_travels_in_the_job_s_command(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient(logs=BEGUN)
    reached(monkeypatch, client)
    monkeypatch.chdir(tmp_path)
    small.write_task(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    words = ("--workers", "1000000", "--gpus-per-worker", "0.25", "--resource", "trials=1")
    labels = ("--label-selector", "ray.io/market-type=spot", "--label-selector", "zone=in(a,b)")
    assert shell("submit", "study.toml", *SENSIBLE, *words, *labels).code == 0
    command = shlex.split(client.jobs[0].entrypoint)
    assert command[command.index("--address") :] == ["--address", "auto", "--store", "/shared/a", *words, *labels]


ONLY_HERE = {"study", "address", "local"}
"""What of `run` means nothing within a job, or something else."""
GIVEN = {
    "store": ["--store", "/shared/a b"],
    "workers": ["--workers", "3"],
    "gpus_per_worker": ["--gpus-per-worker", "0.0"],
    "resource": ["--resource", "trials=1", "--resource", "rooms=2"],
    "label_selector": ["--label-selector", "zone=!a"],
    "cache_gb": ["--cache-gb", "0.5"],
    "log": ["--log", "-"],
    "accept_task_change": ["--accept-task-change"],
}
"""For each option of `run` that a job can have, words that are not its default."""


def parameters(command: str) -> dict[str, Any]:
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    return {parameter.name: parameter for parameter in found.params}


def understood(command: str, words: Sequence[str]) -> dict[str, Any]:
    """What the command line makes of the words, short of running the command."""
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    return dict(found.make_context(command, list(words)).params)


def test_submit_has_every_option_of_run_that_a_job_can_have() -> None:
    run, submit = parameters("run"), parameters("submit")
    shared = run.keys() - ONLY_HERE
    assert shared <= submit.keys(), "an option of `run` that `submit` does not take"
    assert shared == GIVEN.keys(), "an option without words to try it with"
    for name in shared:
        one, other = run[name], submit[name]
        assert (one.opts, one.multiple, one.is_flag, one.default) == (
            other.opts,
            other.multiple,
            other.is_flag,
            other.default,
        ), name


def test_the_driver_understands_what_submit_was_told(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient(logs=BEGUN)
    reached(monkeypatch, client)
    monkeypatch.chdir(tmp_path)
    small.write_task(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    words = [word for given in GIVEN.values() for word in given]
    assert shell("submit", "study.toml", "--address", "http://head:8265", *words).code == 0
    command = shlex.split(client.jobs[0].entrypoint)
    assert command[:4] == ["python", "-m", "orchestrator.jobs.entrypoint", f"{FOLDER}/study.toml"]
    told, wanted = understood("run", command[3:]), understood("run", ["study.toml", *words])
    assert told["address"] == "auto" and not told["local"]
    assert {name: told[name] for name in GIVEN} == {name: wanted[name] for name in GIVEN}
    nothing = understood("run", ["study.toml"])
    assert all(told[name] != nothing[name] for name in GIVEN), "the words say something"


@pytest.mark.parametrize(
    ("status", "logs", "code", "says"),
    [
        ("RUNNING", BEGUN, 0, "to look at it: "),
        ("RUNNING", "", 0, "to look at it once it has: "),
        ("FAILED", "task 'my_task.py': no file data.csv\n", 2, "on the cluster: task 'my_task.py': no file data.csv"),
    ],
)
def test_submit_ends_with_what_is_known_of_the_study(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, logs: str, code: int, says: str
) -> None:
    client = FakeClient(logs=logs)
    submit_job = client.submit_job

    def submitted(**words: Any) -> str:
        job = submit_job(**words)
        client.jobs[0].status, client.jobs[0].driver_exit_code = status, code
        return job

    monkeypatch.setattr(client, "submit_job", submitted)
    monkeypatch.setitem(wait_until_begun.__kwdefaults__ or {}, "seconds", 0.0)
    reached(monkeypatch, client)
    monkeypatch.chdir(tmp_path)
    small.write_task(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    done = shell("submit", "study.toml", *SENSIBLE)
    assert done.code == code
    assert done.err.splitlines()[-1].startswith(says)


@pytest.mark.parametrize(("token", "stop"), [(False, "ray job stop"), (True, "RAY_AUTH_MODE=token ray job stop")])
def test_leaving_a_job_that_is_followed_leaves_it_running(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: bool, stop: str
) -> None:
    client = FakeClient()

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    reached(monkeypatch, client, token=token)
    monkeypatch.setattr("orchestrator.jobs.submit.follow", interrupted)
    monkeypatch.chdir(tmp_path)
    small.write_task(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    done = shell("submit", "study.toml", "--address", "http://head:8265", "--store", "/shared/a", "--follow")
    assert done.code == 130
    job = client.jobs[0].submission_id
    assert done.err.splitlines()[-1] == (
        f"the job {job} goes on; the same command joins it again. To stop it: {stop} --address http://head:8265 {job}"
    )


def test_joining_with_other_words_says_that_they_are_not_heard(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient(logs=BEGUN)
    reached(monkeypatch, client)
    monkeypatch.chdir(tmp_path)
    small.write_task(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    words = ("submit", "study.toml", "--address", "http://head:8265", "--store", "/shared/a")
    assert "other" not in shell(*words).err
    assert "other" not in shell(*words).err
    (tmp_path / "study.toml").write_text(STUDY + "# anew\n")
    assert (
        "it was started with other files and options than these; for these: ray job stop"
        in shell(*words, "--workers", "2").err
    )


# --- An address, and who may come in ---


@pytest.fixture
def server() -> Iterator[Any]:
    """An HTTP server that answers every GET as told."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = self.server.answers(self.headers)  # type: ignore[attr-defined]
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def address_of(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.mark.parametrize("address", ["auto", "head:6379", "ray://head:10001", "http://user:word@head:8265"])
def test_an_address_that_speaks_no_http_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="legal: http://HEAD:8265"):
        connect(address)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((200, b"hello"), "something else than Ray answers there"),
        ((200, b"[]"), "something else than Ray answers there"),
        ((404, b""), "HTTP status 404"),
    ],
)
def test_another_server_is_no_dashboard(server: Any, answer: tuple[int, bytes], says: str) -> None:
    server.answers = lambda headers: answer
    with pytest.raises(InputError, match=says):
        connect(address_of(server))


def test_an_address_at_which_nothing_answers_is_one_line() -> None:
    with pytest.raises(InputError, match=r"no Ray dashboard at http://127.0.0.1:1: Connection refused") as error:
        connect("http://127.0.0.1:1")
    assert "\n" not in str(error.value)


def guarded(headers: Mapping[str, str]) -> tuple[int, bytes]:
    given = headers.get("Authorization")
    if given is None:
        return 401, b"Unauthorized"
    return (200, b'{"ray_version": "2.60.0"}') if given == f"Bearer {TOKEN}" else (403, b"Forbidden")


def test_a_missing_token_and_a_wrong_one_are_told_apart(
    server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.answers = guarded
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="wants a token, and there is none here: set RAY_AUTH_TOKEN"):
        connect(address_of(server))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2hunter2")
    with pytest.raises(InputError, match="does not accept this token") as error:
        connect(address_of(server))
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("text", ["two\nlines", "ein-schlüssel", "with a blank", "bell\a", "\udcff"])
@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_what_no_token_can_be_is_said_by_the_name_of_its_variable(
    server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, text: str
) -> None:
    server.answers = guarded
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    (tmp_path / "token").write_text(text, errors="surrogateescape")
    monkeypatch.setenv(place, text if place == "RAY_AUTH_TOKEN" else str(tmp_path / "token"))
    with pytest.raises(InputError, match=f"^{place}.*one line of plain ASCII") as error:
        connect(address_of(server))
    assert "\n" not in str(error.value) and text not in str(error.value)


@pytest.mark.parametrize("place", ["environment", "path", "home"])
def test_the_token_is_found_where_ray_finds_it(
    server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    server.answers = guarded
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / (".ray/auth_token" if place == "home" else "token")
    file.parent.mkdir(exist_ok=True)
    file.write_text(TOKEN + "\n")
    if place == "environment":
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    elif place == "path":
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert connect(address_of(server)).get_address() == address_of(server)


def test_a_token_is_shown_to_no_server_that_does_not_ask(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def answers(headers: Mapping[str, str]) -> tuple[int, bytes]:
        seen.append(headers.get("Authorization"))
        return 200, b'{"ray_version": "2.60.0"}'

    server.answers = answers
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    connect(address_of(server))
    assert set(seen) == {None}


# --- The real thing ---


def started(cwd: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """How the command is started in a process of its own, without what this one has of tokens."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH", "ORCHARDIST_"))}
    root = str(Path(__file__).resolve().parents[3])
    return {
        "args": [sys.executable, "-c", "from orchestrator.cli import main; main()", *arguments],
        "cwd": cwd,
        "env": {**bare, "PYTHONPATH": root, "HOME": str(cwd), **environment},
        "text": True,
    }


def orchardist(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**started(cwd, arguments, environment), capture_output=True, check=False, timeout=180)


@contextmanager
def background(*arguments: str, cwd: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Path, Path]]:
    """The command beside this process, and the files with what it says on stdout and on stderr."""
    out, err = cwd.parent / "out", cwd.parent / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(**started(cwd, arguments, environment), stdout=stdout, stderr=stderr)
        try:
            yield process, out, err
        finally:
            process.kill()
            process.wait()


def kill_driver(store: Path) -> None:
    """SIGKILL for the driver's own process on the head, as the kernel does when memory runs out."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if str(store).encode() in words and any(b"import drive; drive()" in word for word in words):
                os.kill(int(path.parent.name), signal.SIGKILL)
                return
    raise AssertionError("there is no driver")


@pytest.mark.ray
def test_a_study_is_submitted_with_a_token_and_refused_without(tmp_path: Path) -> None:
    place = tmp_path / "two words"
    place.mkdir()
    write_study(place)
    (place / ".env").write_text("AWS_SECRET_ACCESS_KEY=hunter2hunter2")
    store = tmp_path / "store"
    with head(tmp_path) as (dashboard, gcs):
        log = tmp_path / "study.jsonl"
        options = ("--workers", "1", "--log", str(log))
        words = ("submit", "study.toml", "--address", dashboard, "--store", str(store), *options)
        for token, says in (({}, "wants a token"), ({"RAY_AUTH_TOKEN": "f" * 32}, "does not accept this token")):
            refused = orchardist(*words, "--follow", cwd=place, **token)
            assert refused.returncode == 2
            assert says in refused.stderr and len(refused.stderr.splitlines()) == 1

        first = orchardist(*words, cwd=place, RAY_AUTH_TOKEN=TOKEN)
        assert first.returncode == 0, first.stdout + first.stderr
        assert "sent slow_task.py" in first.stderr and ".env" not in first.stderr
        (job,) = re.findall(r"submitted as the job (small-[0-9a-f]{8}-1)$", first.stderr, re.MULTILINE)
        until(lambda: any((store / "states").rglob("*.safetensors")), 180, "the study is under way")
        kill_driver(store)
        with background(*words, "--follow", cwd=place, RAY_AUTH_TOKEN=TOKEN) as (process, out, err):
            until(lambda: "runs already" in err.read_text(), 180, "the live job is joined")
            (place / "fast").touch()  # not before: the study may take no longer than a command takes to start
            process.wait(180)
        followed = subprocess.CompletedProcess((), process.returncode, out.read_text(), err.read_text())
        assert followed.returncode == 0, followed.stdout + followed.stderr
        assert f"small runs already, as the job {job}; this command joins it" in followed.stderr
        assert STARTED in followed.stdout and "was killed by signal 9; start 2 of 10 in 2 s" in followed.stdout
        assert "The knee of the front" in followed.stdout
        events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
        assert events.count("started") == 2 and events.count("done") == 10 and events[-1] == "ended"
        assert not any(word in followed.stdout + followed.stderr for word in ("hunter2", TOKEN))

        again = orchardist(*words, cwd=place, RAY_AUTH_TOKEN=TOKEN)
        assert f"submitted as the job {job[:-1]}2" in again.stderr, "the id of a job that has ended is not taken again"
        sent = jobs_of(dashboard)
        assert {info["submission_id"] for info in sent} == {job, f"{job[:-1]}2"}
        assert all(set(info["runtime_env"]) == {"working_dir"} for info in sent), "nothing of this environment"
        assert not any(word in json.dumps(sent) for word in ("hunter2", TOKEN))

        nowhere = (*words[:4], "--store", str(place / "study.toml"))
        refused = orchardist(*nowhere, cwd=place, RAY_AUTH_TOKEN=TOKEN)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith("on the cluster: cannot open the store")

        within = {"RAY_AUTH_TOKEN": "f" * 32, "RAY_AUTH_MODE": "token"}
        refused = orchardist("run", "study.toml", "--address", gcs, "--store", str(place / "mine"), cwd=place, **within)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith(
            f"the Ray cluster at '{gcs}' does not let us in: set RAY_AUTH"
        )
        assert refused.stderr.count("InvalidAuthToken") <= 1, "Ray tries a token that is wrong again and again"

        examined = orchardist(
            *("doctor", "--address", gcs, "--store", str(store), "--format", "json"),
            cwd=place,
            RAY_AUTH_TOKEN=TOKEN,
            RAY_AUTH_MODE="token",
        )
        assert examined.returncode == 0, examined.stdout + examined.stderr
        found = {(row["what"], row["state"]) for row in json.loads(examined.stdout)}
        assert {("auth", "ok"), ("store", "ok"), ("versions", "ok"), ("clock", "ok"), ("gpu", "ok")} <= found
    stood = json.loads(orchardist("status", "small", "--store", str(store), "--format", "json", cwd=place).stdout)
    assert stood["trials"]["done"] == 10


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_outlives_raylets_that_join_on_its_machine_and_lay_its_files_anew(tmp_path: Path) -> None:
    place, store = tmp_path / "place", tmp_path / "store"
    place.mkdir()
    write_study(place)
    # At each batch the task looks for a file beside it, and for the folder that it works in.
    looks = "assert Path.cwd().exists() and Path(__file__).with_name('data.csv').exists()"
    slow = (place / "slow_task.py").read_text().replace("0.05", "0.3")
    (place / "slow_task.py").write_text(slow.replace("        if not", f"        {looks}\n        if not"))
    (place / "data.csv").write_text("1\n")
    with nodes(tmp_path, dashboard=True) as cluster:
        cluster.head()
        cluster.worker("first")
        until(lambda: "Ray runtime started" in (tmp_path / "node-1.log").read_text(), 90, "there is a worker")
        words = ("submit", "study.toml", "--address", cluster.dashboard, "--store", str(store), "--include", "data.csv")
        sent = orchardist(*words, cwd=place, RAY_AUTH_TOKEN=TOKEN)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        until(lambda: any((store / "states").rglob("*.safetensors")), 180, "the study is under way")
        cluster.worker("late")
        until(lambda: "Ray runtime started" in (tmp_path / "node-2.log").read_text(), 90, "there is another")
        until(lambda: workers_of(store) == 2, 180, "both work")
        kill_driver(store)
        (place / "fast").touch()
        done = orchardist(*words, "--follow", cwd=place, RAY_AUTH_TOKEN=TOKEN)
        assert done.returncode == 0, done.stdout + done.stderr
        examined = orchardist(
            *("doctor", "--address", cluster.dashboard, "--store", str(store), "--format", "json"),
            cwd=place,
            RAY_AUTH_TOKEN=TOKEN,
        )
        assert examined.returncode == 0, examined.stdout + examined.stderr
        found = [row["what"] for row in json.loads(examined.stdout) if row["state"] == "ok"]
        assert found.count("versions") == 3
    status = json.loads(orchardist("status", "small", "--store", str(store), "--format", "json", cwd=place).stdout)
    assert (status["trials"]["done"], status["trials"]["failed"], status["retries"]["worker died"]) == (10, 0, 0)


def workers_of(store: Path) -> int:
    """How many workers of this driver left a note in the store."""
    return sum("." in path.name for path in (store / "handshake").iterdir()) if (store / "handshake").exists() else 0


def jobs_of(dashboard: str) -> list[dict[str, Any]]:
    """What the cluster tells of its jobs."""
    request = urllib.request.Request(f"{dashboard}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: list[dict[str, Any]] = [job for job in json.load(answer) if job["submission_id"]]
    return found
