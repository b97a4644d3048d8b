"""Study files that are damaged in every way: each is good, or refused in a line or two; no traceback and no hang."""

from __future__ import annotations

import logging
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from orchestrator import Study
from orchestrator.errors import InputError
from orchestrator.spec import StudySpec
from tests.orchestrator.pools import small

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LONGEST_SECONDS = 20
MOST_LINES = 3

RICH = """
name = "rich"
task = "my_task.py"
trials = 12
seeds = [0, 1]
objectives = ["accuracy", "sparsity"]
sampler = "random"

[task_params]
spread = 1.5

[train]
epochs = 2
retrain_epochs = 1.5
optimizer = "sgd"
momentum = 0.9
weight_decay = 1e-4
lr = 0.05
lr_schedule = "cosine"
warmup_epochs = 0.5
batch_size = 16
evaluate_every = 1

[prune]
ignore = ["2"]
layer_factors = { "0" = 0.5 }

[space]
criterion = ["magnitude", "taylor", "random"]
scope = "layer"
rate = { low = 0.1, high = 0.5, step = 0.05 }
rounds = { low = 1, high = 3 }
retrain = ["finetune", "rewind", "lr-rewind"]
rewind_epoch = { choices = [0, 1], when = { retrain = ["rewind"] } }

[constraints]
accuracy = ">= dense - 0.1"
sparsity = "<= 0.95"

[[enqueue]]
criterion = "magnitude"
rate = 0.3
rounds = 2

[[enqueue]]
retrain = "rewind"
rewind_epoch = 1
"""

GRADUAL = """
name = "gradual"
task = "my_task.py"
sampler = "tpe"
sampler_seed = 7
keep = "front"
constraints = { worst_class_accuracy = ">= 0.2", nonzero_params = "<= 60" }
train = { epochs = 2, retrain_epochs = 1, batch_size = 32, lr = 1e-2, optimizer = "adamw" }

[space]
phase = ["before", "during", "after"]
sparsity = { low = 0.3, high = 0.9 }
rounds = { choices = [1, 2] }
schedule = ["linear", "cubic"]
structure = "weight"
allocation = ["uniform", "erk"]
lr = { low = 1e-3, high = 1e-1, log = true }
"""

TICKETS = """
name = "tickets"
task = "my_task.py"
seeds = [0, 1]
[train]
epochs = 2
batch_size = 16
[tickets]
controls = ["random", "shuffled"]
[space]
rate = [0.2, 0.5]
retrain = "rewind"
rewind_epoch = [0, 1]
rounds = 2
"""

LITERALS = (
    *("-1", "0", "1", "2", "0.5", "1.5", "-0.0", "1e308", "-1e308", "1e-320", "nan", "inf", "-inf", "true", "false"),
    *("9223372036854775807", "9223372036854775808", "1000000000", "1" * 400, "1" * 5000, "0x7f", "1_000", "10e2"),
    *('""', '"x"', '" "', "'''\na\n'''", '"' + "long" * 500 + '"', '"\\u0000"', '"☃"', '"../../x"', '"a/b"', '"a:b"'),
    *(
        '"my_task.py:task"',
        '"my_criteria.py:broken"',
        '"my_criteria.py:absent"',
        '"os.path"',
        '"nan"',
        '">= x"',
        '"=="',
    ),
    *(
        '">= dense"',
        '"<= dense * 1e400"',
        "[]",
        "[[]]",
        "[1]",
        "[0, 0]",
        '["a", 1, 2.5]',
        "[nan]",
        "{}",
        "{ value = [1] }",
    ),
    *("{ low = 1, high = 0 }", "{ low = 0, high = 1e300 }", "{ low = 0, high = 1, log = true }", "{ choices = [] }"),
    *("{ low = 1, high = 1000000000 }", "{ low = 0.1, high = 0.5, step = 1e-300 }", "{ low = nan, high = inf }"),
    *("{ choices = [1, 2], when = { rounds = [1] } }", "{ choices = [1], when = { absent = [1] } }", "{ when = {} }"),
    *("1979-05-27T07:32:00Z", "07:32:00", "[" * 80 + "]" * 80, "{ a = " * 80 + "1" + " }" * 80, "random", "="),
)

NAMES = (
    *("name", "task", "trials", "seeds", "objectives", "sampler", "sampler_seed", "keep", "epochs", "retrain_epochs"),
    *("optimizer", "momentum", "weight_decay", "lr", "lr_schedule", "warmup_epochs", "batch_size", "evaluate_every"),
    *("ignore", "layer_factors", "criterion", "scope", "allocation", "structure", "rate", "sparsity", "threshold"),
    *("rounds", "schedule", "phase", "retrain", "rewind_epoch", "rewind_step", "prune_begin", "prune_every", "layers"),
    *("criteria", "controls", "rule", "searches", "tasks", "ticket", "unit_sparsity", "flops", "low", "high", "step"),
    *("choices", "when", "value", "log", "constraints", "enqueue", "train", "prune", "space", "tickets", "ünï", "a.b"),
)


class Hangs(BaseException):
    """It took too long."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_task(tmp_path_factory.mktemp("studies"))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "orchardist")


GOOD = (RICH, GRADUAL, TICKETS, small.spec().to_toml())
OTHERS = (*GOOD, *(path.read_text() for path in sorted(EXAMPLES.glob("*.toml"))))
"""Whose lines are grafted in."""


def mutated(text: str, others: Sequence[str], draw: random.Random) -> bytes:
    for _ in range(draw.choice([1, 1, 1, 2, 3, 5])):
        lines = text.splitlines() or [""]
        at = draw.randrange(len(lines))
        values = [match.span(1) for match in re.finditer(r"=\s*([^,\n}]+)", text)] or [(0, 0)]
        names = [match.span(1) for match in re.finditer(r"([A-Za-z_][\w.-]*)\s*=", text)] or [(0, 0)]
        match draw.choice(
            ["value", "value", "value", "name", "cut line", "twice", "swap", "cut", "insert", "graft", "items"]
        ):
            case "value":
                start, end = draw.choice(values)
                text = text[:start] + draw.choice(LITERALS) + text[end:]
            case "name":
                start, end = draw.choice(names)
                text = text[:start] + draw.choice(NAMES) + text[end:]
            case "cut line":
                text = "\n".join(lines[:at] + lines[at + 1 :])
            case "twice":
                text = "\n".join([*lines[:at], lines[at], *lines[at:]])
            case "swap":
                draw.shuffle(lines)
                text = "\n".join(lines)
            case "cut":
                text = text[: draw.randrange(len(text) + 1)]
            case "insert":
                place = draw.randrange(len(text) + 1)
                text = (
                    text[:place]
                    + draw.choice(["\0", '"', "[", "]", "=", "\n", "#", "'", "{", ",", ".", "é", "\r", "[[a]]"])
                    + text[place:]
                )
            case "graft":
                text = "\n".join([*lines[:at], draw.choice(draw.choice(others).splitlines() or [""]), *lines[at:]])
            case "items":
                start, end = draw.choice(values)
                text = text[:start] + f"[{', '.join(draw.choices(LITERALS, k=draw.randrange(1, 4)))}]" + text[end:]
    data = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.1 and data:
        changed = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        data = bytes(changed)
    return data


def check(data: bytes, folder: Path) -> str:
    """Whether the study is good or refused; anything else is raised."""
    path = folder / "mutated.toml"
    path.write_bytes(data)
    try:
        with bounded(LONGEST_SECONDS):
            study = Study.load(path, "memory://mutated")
            study.check()
            study.warnings()
    except InputError as error:
        said = str(error)
        assert said and len(said.splitlines()) <= MOST_LINES and "Traceback" not in said, said
        return "refused"
    again = StudySpec.parse(study.spec.to_toml())
    assert again.digest() == study.spec.digest(), "written and read again it is another study"
    return "good"


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 10_150), marks=pytest.mark.slow)])
def test_mutated_study_files(seeds: range, folder: Path) -> None:
    found, wrong = Counter[str](), []
    for seed in seeds:
        draw = random.Random(seed)
        data = mutated(draw.choice(GOOD), OTHERS, draw)
        try:
            found[check(data, folder)] += 1
        except (Exception, Hangs) as error:
            wrong.append(f"seed {seed}: {type(error).__name__}: {str(error)[:200]}")
    assert wrong == []
    assert min(found["good"], found["refused"]) > len(seeds) / 20, found


def test_the_texts_are_good_before_they_are_damaged(folder: Path) -> None:
    assert {check(text.encode(), folder) for text in GOOD} == {"good"}


def test_canary_a_hang_is_seen() -> None:
    with pytest.raises(Hangs), bounded(0.05):
        while True:
            pass
