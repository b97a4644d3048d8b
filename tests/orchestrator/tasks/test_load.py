"""A user's task file: loaded once, and each mistake in it told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import TaskError
from orchestrator.tasks.load import LoadedTask, load
from orchestrator.tasks.source import collect

HEAD = """\
import torch
from torch import nn
from orchestrator.tasks import Metric, Task

X, Y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
"""
GOOD = """
def task(hidden: int = 3, scale: float = 1.0) -> Task:
    return Task(
        model=lambda: nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 2)),
        train=(X * scale, Y), valid=(X, Y),
    )
"""


def loaded(folder: Path, text: str, head: str = HEAD, name: str = "my_task.py", **params: Any) -> LoadedTask:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(head + text)
    return load(collect(name, folder), params, folder)


def test_a_users_task(tmp_path: Path) -> None:
    task = loaded(tmp_path, GOOD, hidden=5)
    assert [layer.shape for layer in task.info.layers] == [(5, 2), (2, 5)]
    assert task.test is None
    assert loaded(tmp_path, GOOD, hidden=5) is task
    assert loaded(tmp_path, GOOD) is not task


def test_defaults_said_aloud_change_nothing(tmp_path: Path) -> None:
    task = loaded(tmp_path, GOOD)
    assert loaded(tmp_path, GOOD, hidden=3) is task
    assert loaded(tmp_path, GOOD, scale=2.0).info.digest != task.info.digest


def test_the_digest_follows_code_data_and_parameters_but_not_the_folder(tmp_path: Path) -> None:
    digests = [
        loaded(tmp_path / "a", GOOD).info.digest,
        loaded(tmp_path / "a", GOOD, hidden=4).info.digest,
        loaded(tmp_path / "a", GOOD + "# more\n").info.digest,
    ]
    assert len(set(digests)) == 3
    assert loaded(tmp_path / "b", GOOD).info.digest == digests[0]


def test_changed_data_beside_the_task_change_the_digest(tmp_path: Path) -> None:
    text = GOOD + "from pathlib import Path\nX = X + float((Path(__file__).parent / 'data.txt').read_text())\n"
    digests = []
    for folder, number in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data.txt").write_text(number)
        digests.append(loaded(tmp_path / folder, text).info.digest)
    assert digests[0] == digests[2] != digests[1]


def test_data_drawn_without_a_seed_are_the_same_everywhere(tmp_path: Path) -> None:
    text = GOOD.replace("(X * scale, Y)", "(torch.randn(6, 2), Y)")
    before = torch.get_rng_state()
    first = loaded(tmp_path / "a", text)
    torch.rand(3)
    assert loaded(tmp_path / "b", text).info.digest == first.info.digest
    torch.set_rng_state(before)


def test_a_model_that_comes_trained(tmp_path: Path) -> None:
    text = """
from pathlib import Path

def trained():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].load_state_dict(torch.load(Path(__file__).parent / "weights.pt", weights_only=True))
    return model

def task():
    return Task(model=trained, fresh=lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)),
                train=(X, Y), valid=(X, Y))
"""
    digests = []
    for folder, value in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        (tmp_path / folder).mkdir()
        weights = {"weight": torch.full((3, 2), value), "bias": torch.zeros(3)}
        torch.save(weights, tmp_path / folder / "weights.pt")
        task = loaded(tmp_path / folder, text)
        assert task.info.comes_trained
        assert task.model().get_parameter("0.weight").tolist() == [[value, value]] * 3
        assert task.model(fresh=True).get_parameter("0.weight").tolist() != [[value, value]] * 3
        digests.append(task.info.digest)
    assert digests[0] == digests[2] != digests[1]


def test_fresh_is_the_model_itself_where_it_does_not_come_trained(tmp_path: Path) -> None:
    assert isinstance(loaded(tmp_path, GOOD).model(fresh=True), torch.nn.Sequential)


@pytest.mark.parametrize(
    ("text", "params", "said"),
    [
        ("x = 1\n", {}, "task 'my_task.py' has no function `task`: def task() -> orchestrator.tasks.Task"),
        ("def task():\n    return 3\n", {}, "task 'my_task.py': task() returned int, not an orchestrator.tasks.Task"),
        ("def task():\n    pass\n", {}, "task 'my_task.py': task() returned nothing, not an orchestrator.tasks.Task"),
        (
            "def task():\n    return [][3]\n",
            {},
            "task 'my_task.py' failed in my_task.py:7: IndexError: list index out of range",
        ),
        (
            "import nowhere\n",
            {},
            "task 'my_task.py' failed in my_task.py:6: ModuleNotFoundError: No module named 'nowhere'",
        ),
        ("raise SystemExit\n", {}, "task 'my_task.py' failed in my_task.py:6: SystemExit"),
        (
            "class Own(BaseException):\n    pass\n\ndef task():\n    raise Own('no more\\nat all')\n",
            {},
            "task 'my_task.py' failed in my_task.py:10: Own: no more",
        ),
        (
            "class Rows(torch.utils.data.Dataset):\n    def __len__(self):\n        return {}['x']\n"
            + GOOD.replace("(X * scale, Y)", "Rows()"),
            {},
            "task 'my_task.py' failed in my_task.py:8: KeyError: 'x'",
        ),
        (
            GOOD,
            {"hiden": 3},
            "task 'my_task.py' has no parameter 'hiden', did you mean 'hidden'? its parameters are: hidden, scale",
        ),
        ("def task():\n    pass\n", {"hidden": 3}, "task 'my_task.py' has no parameter 'hidden'; it has no parameters"),
        (
            "def task(a, *, b=1):\n    pass\n",
            {},
            "task 'my_task.py' needs the parameter 'a'; its parameters are: a, b",
        ),
        (
            "def task(a):\n    pass\n",
            {"a": {1, 2}},
            "task 'my_task.py': parameters must be plain values: Object of type set is not JSON serializable",
        ),
        (
            GOOD.replace("X * scale", "X / 0"),
            {},
            "task 'my_task.py': train inputs hold 1 NaN value, first at row 0",
        ),
        (
            GOOD.replace("valid=(X, Y),", "valid=(X, Y), metrics={'flops': 'accuracy'},"),
            {},
            "task 'my_task.py': a metric cannot be called 'flops': that name is taken by a measure of Orchardist's own",
        ),
        (
            GOOD.replace("valid=(X, Y),", "valid=(X, Y), metrics={'accuracy': 'acuracy'},"),
            {},
            "task 'my_task.py': unknown metric 'acuracy'; did you mean 'accuracy'? Known: accuracy, balanced_accuracy, ",
        ),
        (
            GOOD.replace("valid=(X, Y),", "valid=(X, Y), classes=['a'],"),
            {},
            "task 'my_task.py': classes must name at least two classes, not 1",
        ),
    ],
)
def test_mistakes_in_one_line(tmp_path: Path, text: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError) as caught:
        loaded(tmp_path, text, **params)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_an_interrupt_is_no_mistake_of_the_task(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        loaded(tmp_path, "raise KeyboardInterrupt\n")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("[][3]", "task 'my_task.py': model() failed in my_task.py:9: IndexError: list index out of range"),
        ("3", "task 'my_task.py': model() returned int, not a torch.nn.Module"),
        ("nn.LazyLinear(2)", "task 'my_task.py': the size of weight is unknown: use no lazy layers"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_models_that_cannot_be_built(tmp_path: Path, model: str, said: str) -> None:
    good = "nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 2))"
    with pytest.raises(TaskError) as caught:
        loaded(tmp_path, GOOD.replace(good, model)).model()
    assert str(caught.value) == said


def test_the_line_is_that_of_the_helper_which_raised(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def f():\n    return 1 / 0\n")
    with pytest.raises(
        TaskError, match="^task 'my_task.py' failed in helper.py:2: ZeroDivisionError: division by zero$"
    ):
        loaded(tmp_path, "from helper import f\ndef task():\n    f()\n")
