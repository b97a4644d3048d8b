"""An Optuna study that is written and read back, and databases that cannot be."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from search.optuna_study import ExportError, Past, write
from search.space import parse

SPACE = parse(
    {
        "kind": ["a", None, [1, 2]],
        "step": {"low": 0.1, "high": 0.55, "step": 0.1},
        "twos": {"low": 2, "high": 9, "step": 2},
        "only": {"choices": [0, 1], "when": {"kind": ["a"]}},
        "fixed": 3,
    }
)


def test_lists_are_text_and_ranges_end_on_their_grid(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    done = Past(number=0, params={"kind": [1, 2], "step": 0.5, "twos": 8, "fixed": 3}, state="done", values=(1.0,))
    running = Past(
        number=1, params={"kind": "a", "step": 0.1, "twos": 2, "only": 1, "fixed": 3}, state="running", began=0.0
    )
    assert write(url, "s", SPACE, {"loss": "minimise"}, [done, running], {"seeds": [0]}) == 2
    read = optuna.load_study(study_name="s", storage=url)
    first, second = read.trials
    assert first.params == {"kind": "[1, 2]", "step": 0.5, "twos": 8} and first.value == 1.0
    assert second.state is optuna.trial.TrialState.RUNNING and second.params["only"] == 1
    assert first.distributions["kind"] == optuna.distributions.CategoricalDistribution(("a", None, "[1, 2]"))
    assert first.distributions["step"] == optuna.distributions.FloatDistribution(0.1, 0.5, step=0.1)
    assert first.distributions["twos"] == optuna.distributions.IntDistribution(2, 8, step=2)
    assert read.user_attrs["fixed"] == {"fixed": 3} and read.user_attrs["seeds"] == [0]


def test_somebody_else_s_study_is_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(storage=url, study_name="s")
    with pytest.raises(ExportError, match="Orchardist did not write"):
        write(url, "s", SPACE, {"loss": "minimise"}, [], {})


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("study.db", "'study.db' is no database URL; legal: one such as sqlite:///study.db"),
        ("sqlite:////nowhere/at/all/study.db", "unable to open database file"),
        ("nonsense://user:secret@host/db", "nonsense://user:[*][*][*]@host/db cannot be written"),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_line(url: str, said: str) -> None:
    with pytest.raises(ExportError, match=said) as caught:
        write(url, "s", SPACE, {"loss": "minimise"}, [], {})
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
