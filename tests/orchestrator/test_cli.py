from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Study
from orchestrator.cli import main
from orchestrator.interrupts import STOPS
from orchestrator.pools.local import LocalPool
from tests.orchestrator.pools import small
from tests.orchestrator.test_retrieve import ODD

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
name = "small"
task = "my_task.py"
trials = 4
sampler = "random"
[train]
epochs = 2
retrain_epochs = 1
batch_size = 16
lr = 0.05
[space]
rate = { low = 0.2, high = 0.5, step = 0.1 }
rounds = { low = 1, high = 3 }
"""


@dataclass
class Done:
    code: int
    out: str
    err: str


class Shell:
    """Calls the command in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> Done:
        self._monkeypatch.setattr(sys, "argv", ["orchardist", *arguments])
        self._capsys.readouterr()
        before = {number: signal.getsignal(number) for number in STOPS}
        try:
            with pytest.raises(SystemExit) as end:
                main()
        finally:
            for number, handler in before.items():  # after an interrupt they are off, for the process is about to end
                signal.signal(number, handler)
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err, err
        return Done(end.value.code if isinstance(end.value.code, int) else 0, out, err)

    def json(self, *arguments: str) -> Any:
        done = self(*arguments, "--format", "json")
        assert done.code == 0, done.err
        return json.loads(done.out)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the study and its task, which is the current one."""
    small.write_task(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `place` in which the study has run."""
    folder = small.write_task(tmp_path_factory.mktemp("finished"))
    (folder / "study.toml").write_text(STUDY)
    Study.load(folder / "study.toml", folder / "orchard").run(LocalPool())
    return folder


def test_from_a_study_file_to_a_model(place: Path, shell: Shell) -> None:
    done = shell("run", "study.toml", "--local")
    assert done.code == 0
    assert "4/4 trials" in done.err and "epochs" in done.err
    assert "unpruned model" in done.out
    (command,) = [line.strip() for line in done.out.splitlines() if line.startswith("  orchardist fetch")]

    status = shell.json("status", "small")
    assert (status["study"], status["state"]) == ("small", "done")
    assert status["trials"] == {"asked": 4, "done": 4, "running": 0, "failed": 0, "stopped": 0}
    assert status["epochs"]["run"] <= status["epochs"]["asked"] and status["stages"]["run"] <= status["stages"]["asked"]

    front = shell.json("front", "study.toml")
    assert set(front) == {"study", "objectives", "dense", "hypervolume", "front"}
    assert front["objectives"] == ["accuracy", "sparsity"] and front["dense"]["sparsity"] == 0
    for point in front["front"]:
        assert point["key"] in point["keys"] and point["n"] == 1 and point["round"] >= 1
        assert set(point["params"]) == {"rate", "rounds"}
        assert {"accuracy", "test_accuracy", "sparsity", "bytes", "flops_effective", "nonzero_params"} <= set(point)
    accuracies = [point["accuracy"] for point in front["front"]]
    assert accuracies == sorted(accuracies, reverse=True)

    assert shell(*command.split()[1:]).code == 0
    card = json.loads((place / "small-pruned" / "card.json").read_text())
    assert card["key"] in {point["key"] for point in front["front"]}
    assert shell.json("fetch", "small", card["key"][:8], "-o", "again")["key"] == card["key"]


def test_tables_and_csv(place: Path, shell: Shell) -> None:
    shell("run", "study.toml", "--local")
    assert "trials done" in shell("status", "small").out
    lines = shell("front", "small", "--format", "csv").out.splitlines()
    header, last = lines[0].split(","), lines[-1].split(",")
    assert header[:4] == ["key", "trial", "round", "n"]
    assert len(last[0]) == 64 and last[1] == "dense"


def test_json_before_anything_is_there(place: Path, shell: Shell) -> None:
    (place / "study.toml").write_text(STUDY.replace("trials = 4", "trials = 0"))
    assert shell("run", "study.toml", "--local").code == 0
    assert shell.json("front", "small")["front"] == []
    assert shell.json("status", "small")["trials"]["asked"] == 0
    done = shell("fetch", "small", "-o", "out")
    assert done.code == 2 and "no finished trial yet" in done.err


def test_where_and_minimise(place: Path, shell: Shell) -> None:
    shell("run", "study.toml", "--local")
    (least,) = shell.json("front", "small", "--where", "sparsity >= 0.2", "--minimise", "bytes")["front"]
    every = shell.json("front", "small")["front"]
    assert least["bytes"] <= min(point["bytes"] for point in every)
    card = shell.json("fetch", "small", "--where", "sparsity >= 0.2", "--minimise", "bytes", "-o", "out")
    assert card["key"] == least["key"]
    (thin,) = shell.json("front", "small", "--minimise", "sparsity")["front"]
    assert thin["sparsity"] <= min(point["sparsity"] for point in every)


def test_a_table_has_intervals_over_seeds_what_was_asked_for_and_the_hypervolume(place: Path, shell: Shell) -> None:
    (place / "study.toml").write_text(STUDY.replace("trials = 4", "trials = 4\nseeds = [0, 1, 2]"))
    shell("run", "study.toml", "--local")
    done = shell("front", "small", "--where", "loss <= 100", "--where", "worst_class_accuracy >= 0")
    header = done.out.splitlines()[0].split()
    assert {"loss", "worst_class_accuracy", "test_worst_class_accuracy"} <= set(header) and " ± " in done.out
    assert done.out.splitlines()[-1].startswith("hypervolume ") and "from accuracy 0.0000" in done.out
    assert "±" not in shell("front", "small", "--format", "csv").out
    assert "bytes" in shell("front", "small", "--minimise", "bytes").out.splitlines()[0]


def test_one_front_over_two_studies(place: Path, shell: Shell) -> None:
    (place / "other.toml").write_text(STUDY.replace('name = "small"', 'name = "other"'))
    for file in ("study.toml", "other.toml"):
        shell("run", file, "--local")
    one, two, both = (shell.json("front", *names) for names in (["small"], ["other"], ["small", "other"]))
    assert both["study"] == "small, other" and {point["study"] for point in both["front"]} == {"small", "other"}
    assert {point["key"] for point in both["front"]} <= {point["key"] for point in one["front"] + two["front"]}
    assert shell("front", "small", "other", "--where", "sparsity >= 0.2").out.startswith("study")
    for arguments, complaint in (
        (["--where", "accuracy > 2"], "the nearest"),
        (["--plot", "front.png"], "--plot draws one study"),
    ):
        done = shell("front", "small", "other", *arguments)
        assert done.code == 2 and complaint in done.err and len(done.err.strip().splitlines()) == 1
    (place / "my_task.py").write_text((place / "my_task.py").read_text().replace("nn.ReLU()", "nn.Tanh()"))
    (place / "third.toml").write_text(STUDY.replace('name = "small"', 'name = "third"'))
    shell("run", "third.toml", "--local")
    done = shell("front", "small", "third")
    assert done.code == 2 and "the studies small, third are of different tasks" in done.err


def test_a_model_is_fetched_as_a_graph_and_measured_again(place: Path, shell: Shell) -> None:
    shell("run", "study.toml", "--local")
    done = shell("fetch", "small", "-o", "out", "--format", "safetensors,pt2")
    assert done.code == 0 and "model.pt2" in done.out and "No speed-up on this device" in done.out
    assert done.out.splitlines()[-1] == "In Python: orchestrator.load('out')"
    card = json.loads((place / "out" / "card.json").read_text())
    again = shell.json("measure", "out", "--task", "my_task.py", "--device", "cpu", "--threads", "2")
    assert {entry["threads"] for entry in again["latency"]} == {2} and again["pt2"] <= 1e-5
    after = json.loads((place / "out" / "card.json").read_text())
    assert after["latency"] == card["latency"] + again["latency"]
    done = shell("measure", "out", "--task", "my_task.py", "--device", "cpu")
    assert done.code == 0 and "dense / pruned" in done.out and "1 thread" in done.out
    done = shell("measure", "out", "--device", "cpu")
    assert done.code == 2 and "a model of your own task" in done.err
    (place / "out" / "model.pt2").write_bytes(b"else")
    done = shell("measure", "out", "--task", "my_task.py", "--device", "cpu")
    assert done.code == 2 and "its hash differs from the card's" in done.err


def test_a_format_that_cannot_be_written_is_named_and_the_others_are_there(place: Path, shell: Shell) -> None:
    odd = small.TASK.replace("return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))", "return Odd()") + ODD
    (place / "my_task.py").write_text(odd)
    shell("run", "study.toml", "--local")
    done = shell("fetch", "small", "-o", "out", "--format", "safetensors,pt2,onnx")
    assert done.code == 0 and (place / "out" / "model.pt2").exists() and not (place / "out" / "model.onnx").exists()
    (line,) = [line for line in done.err.splitlines() if line.startswith("not written as onnx: ")]
    assert "linalg_eig" in line


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["front", "smell"], "unknown study 'smell'; did you mean 'small'?"),
        (["front", "small", "--where", "accuracy >> 1"], "cannot read"),
        (["front", "small", "--where", "beauty > 1"], "unknown measure 'beauty'"),
        (["front", "small", "--where", "accuracy > 1"], "no point keeps accuracy > 1.0; the nearest"),
        (["front", "small", "--minimise", "latency_ms"], "was not measured"),
        (["front", "small", "--where", "test_accuracy > 0"], "'test_accuracy' cannot choose a model"),
        (["fetch", "small", "--where", "test_loss < 1", "-o", "out"], "legal: 'loss'"),
        (["fetch", "small", "--minimise", "test_loss", "-o", "out"], "only ever reported"),
        (["fetch", "small", "0123456789", "-o", "out"], "no state '0123456789'"),
        (["fetch", "small", "--format", "jax", "-o", "out"], "legal: safetensors, pt2, onnx, json"),
        (["measure", "nowhere"], "nowhere holds no fetched model"),
        (["measure", "nowhere", "--device", "tpu"], "device 'tpu' is unknown; legal: cpu, cuda"),
        (["front", "small", "--where", "latency_ms < 2"], "'latency_ms' was not measured in the study 'small'"),
        (["fetch", "small", "0", "--where", "accuracy > 0", "-o", "out"], "a KEY names one model"),
        (["status", "../small"], "1 to 100 of the characters"),
        (["run", "absent.toml", "--local"], "cannot read the study file 'absent.toml'"),
        (["run", "study.toml", "--local", "--workers", "2"], "--local runs in this process"),
        (["run", "study.toml", "--store", "memory://x"], "memory lives in one process"),
        (["check"], "check wants a STUDY file"),
        (["responsible", "small", "0123456789"], "no pruned state '0123456789'"),
        (["responsible", "small", "--where", "beauty > 1"], "unknown measure 'beauty'"),
        (["responsible", "small", "0", "--where", "accuracy > 0"], "a KEY names one model"),
        (["fetch", "small", "--where", "accuracy > 1", "-o", "out"], "the nearest"),
        (["fetch", "small", "--where", "latency_ms < 2", "-o", "out"], "'latency_ms' was not measured"),
        (["fetch", "small", "0123456789", "--ticket", "-o", "out"], "no state '0123456789'"),
        (["techniques", "smell"], "unknown study 'smell'; did you mean 'small'?"),
        (["report", "smell", "-o", "out.html"], "unknown study 'smell'"),
        (["list", "beauties"], "beauties"),
    ],
)
def test_wrong_arguments(
    arguments: Sequence[str], complaint: str, finished: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    done = shell(*arguments)
    assert done.code == 2 and done.out == ""
    assert complaint in done.err and len(done.err.splitlines()) <= 2


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("trials = 4", "trails = 4", "did you mean 'trials'?"),
        ("trials = 4", "trials = = 4", "line 4"),
        ('task = "my_task.py"', 'task = "mnits"', "did you mean 'mnist'?"),
        ('task = "my_task.py"', 'task = "absent.py"', "there is no file"),
        ("rounds =", 'criterion = "mangitude"\nrounds =', "did you mean 'magnitude'?"),
        ("high = 0.5", "high = 1.5", "rate"),
        ("low = 1, high = 3", "low = 30, high = 30", "leaves no weight"),
        ("[train]", 'objectives = ["beauty"]\n[train]', "unknown objective 'beauty'"),
        ("[train]", "[[enqueue]]\nrate = 0.7\n[train]", "0.7"),
        ("[train]", '[constraints]\nbeauty = "> 1"\n[train]', "unknown measure in [constraints] 'beauty'"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_wrong_studies(command: str, old: str, new: str, complaint: str, place: Path, shell: Shell) -> None:
    assert old in STUDY
    (place / "study.toml").write_text(STUDY.replace(old, new))
    done = shell(command, "study.toml", *(["--local"] if command == "run" else []))
    assert done.code == 2 and done.out == ""
    assert complaint in done.err and len(done.err.splitlines()) <= 2
    assert done.err.startswith(("study.toml: ", "task '")), "it says which file, or which task"
    assert not list((place / "orchard").glob("studies/*/study.*"))


def test_another_study_a_changed_task_and_a_store_that_is_a_file(place: Path, shell: Shell) -> None:
    assert shell("run", "study.toml", "--local").code == 0
    (place / "study.toml").write_text(STUDY.replace("lr = 0.05", "lr = 0.01"))
    done = shell("run", "study.toml", "--local")
    assert done.code == 2 and done.err == (
        "study.toml: the study 'small' in the store ./orchard was made from another study file: "
        "train.lr was 0.05 and is now 0.01\nlegal: another name, or change only trials, [[enqueue]] and "
        "[stopping], or ask for more rounds\n"
    )
    (place / "study.toml").write_text(STUDY)
    (place / "blobs.py").write_text(small.BLOBS + "\n\nmore = 1\n")
    done = shell("run", "study.toml", "--local")
    assert done.code == 2 and "--accept-task-change" in done.err and len(done.err.splitlines()) <= 2
    assert shell("run", "study.toml", "--local", "--accept-task-change").code == 0
    (place / "file").write_text("")
    done = shell("run", "study.toml", "--local", "--store", "file")
    assert done.code == 2 and "file" in done.err and len(done.err.splitlines()) <= 2


def test_every_trial_failing_is_exit_code_1(place: Path, shell: Shell) -> None:
    (place / "study.toml").write_text(STUDY.replace("lr = 0.05", "lr = 1e30"))
    done = shell("run", "study.toml", "--local")
    assert done.code == 1
    assert "4 trials failed" in done.err
    assert shell.json("status", "small")["trials"]["failed"] == 4


def test_an_interrupt_ends_with_the_command_that_goes_on(
    place: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.pools.local import LocalPool

    def interrupt(pool: LocalPool, timeout_seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LocalPool, "completed", interrupt)
        done = shell("run", "study.toml", "--local", "--store", "a store")
    assert done.code == 130
    assert done.err.endswith("  orchardist run study.toml --local --store 'a store'\n")
    assert shell("run", "study.toml", "--local", "--store", "a store").code == 0


def test_check(place: Path, shell: Shell) -> None:
    done = shell("check", "study.toml")
    assert done.code == 0 and "a good study. 4 trials x 1 seed of" in done.out
    assert sorted(path.name for path in place.iterdir() if path.name != "__pycache__") == [
        "blobs.py",
        "my_criteria.py",
        "my_task.py",
        "study.toml",
    ]
    schema = json.loads(shell("check", "--schema").out)
    assert {"name", "task", "trials", "space"} <= set(schema["properties"])


def test_list(shell: Shell) -> None:
    names = [row["name"] for row in shell.json("list", "criteria")]
    assert {"magnitude", "random", "taylor"} <= set(names)


def test_a_real_interrupt_loses_nothing(place: Path) -> None:
    (place / "study.toml").write_text(STUDY.replace("trials = 4", "trials = 4000"))
    command = [sys.executable, "-c", "from orchestrator.cli import main; main()", "run", "study.toml", "--local"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        states = place / "orchard" / "states"
        while process.poll() is None and len(list(states.glob("*/*"))) < 5:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "nothing finished is lost" in err and "Traceback" not in err
    from orchestrator.store.store import Store

    kept = set(small.models(Store(place / "orchard")))
    assert len(kept) >= 4


def test_an_interrupt_within_an_import_comes_after_it(place: Path, shell: Shell) -> None:
    text = (place / "blobs.py").read_text()
    (place / "blobs.py").write_text(
        "import os, signal, time\nfrom pathlib import Path\n"
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\nPath('imported').touch()\n" + text
    )
    done = shell("run", "study.toml", "--local")
    assert done.code == 130 and (place / "imported").exists()


@pytest.mark.ray
def test_an_interrupt_while_ray_starts(place: Path) -> None:
    command = [sys.executable, "-c", "from orchestrator.cli import main; main()", "run", "study.toml", "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    code = "import ray, orchestrator.pools.connection as r, os, signal, threading\n"
    command[2] = (
        code
        + "start = r._start\n"
        + "def slow(*given):\n"
        + "    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        + "    start(*given)\n"
        + "r._start = slow\n"
        + command[2]
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 130, done.stderr
    assert "nothing finished is lost" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["status", "front"])
def test_looking_imports_neither_torch_nor_the_users_code(command: str, place: Path, shell: Shell) -> None:
    shell("run", "study.toml", "--local")
    for name in ("my_task.py", "blobs.py", "my_criteria.py"):
        (place / name).write_text("raise SystemExit('imported')\n")
    code = (
        "import sys\n"
        "from orchestrator.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'optuna', 'my_task', 'blobs'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    arguments = [sys.executable, "-c", code, command, "small", "--format", "json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["study"] == "small"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from orchestrator.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'optuna', 'pydantic', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout and "fetch" in done.stdout
