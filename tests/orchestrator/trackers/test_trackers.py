"""A study read back from the tools that it was handed to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Study, StudySpec
from orchestrator.errors import InputError, QueryError
from orchestrator.pools.local import LocalPool
from orchestrator.trackers.optuna import export_optuna
from orchestrator.trackers.trials import trials
from tests.orchestrator.report.test_html import study as shown

SPEC: dict[str, Any] = {
    "name": "tracked",
    "task": "digits",
    "trials": 5,
    "seeds": (0, 1),
    "task_params": {"hidden": 16},
    "train": {"epochs": 1, "retrain_epochs": 0.5, "lr": 5e-3},
    "space": {
        "criterion": ["magnitude", "random"],
        "rate": {"low": 0.3, "high": 0.7, "step": 0.1},
        "rounds": {"low": 1, "high": 2},
        "lr": {"low": 1e-3, "high": 1e-2, "log": True},
        "retrain": "finetune",
    },
    "constraints": {"accuracy": ">= 0.5"},
    "sampler": "random",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    made = Study(StudySpec(**SPEC), tmp_path_factory.mktemp("store"))
    made.run(LocalPool())
    return made


def test_a_trial_has_the_measures_of_its_last_round(study: Study) -> None:
    found = trials(study)
    assert [trial.number for trial in found] == [0, 1, 2, 3, 4]
    rows = {row["key"]: row for row in study.table().to_pylist()}
    for trial in found:
        assert trial.state == "done" and trial.values is not None and len(trial.keys) == 2
        assert trial.values == pytest.approx([trial.measures["accuracy"], trial.measures["sparsity"]])
        assert {rows[key]["round"] for key in trial.keys} == {trial.params["rounds"]}
        assert trial.began is not None and trial.ended is not None and trial.began <= trial.ended


def test_optuna_reads_back_what_was_exported(study: Study, tmp_path: Path) -> None:
    import optuna

    url = f"sqlite:///{tmp_path}/study.db"
    assert export_optuna(study, url) == 5
    assert export_optuna(study, url) == 5, "a second export takes the place of the first"
    read = optuna.load_study(study_name="tracked", storage=url)
    assert [direction.name for direction in read.directions] == ["MAXIMIZE", "MAXIMIZE"]
    assert read.metric_names == ["accuracy", "sparsity"]
    assert read.user_attrs["fixed"] == {"retrain": "finetune"} and read.user_attrs["task"] == "digits"
    for trial, told in zip(read.trials, trials(study), strict=True):
        assert trial.number == told.number and trial.state is optuna.trial.TrialState.COMPLETE
        assert trial.values == pytest.approx(told.values)
        assert trial.params == {name: told.params[name] for name in ("criterion", "rate", "rounds", "lr")}
        assert trial.user_attrs["test_accuracy"] == told.measures["test_accuracy"]
        assert trial.user_attrs["keys"] == list(told.keys)
        assert trial.system_attrs["constraints:accuracy >= 0.5"] == told.constraints["accuracy >= 0.5"]
        assert (told.constraints["accuracy >= 0.5"] <= 0) == (told.measures["accuracy"] >= 0.5)
    distributions = read.trials[0].distributions
    assert distributions["criterion"] == optuna.distributions.CategoricalDistribution(("magnitude", "random"))
    assert distributions["rate"] == optuna.distributions.FloatDistribution(0.3, 0.7, step=0.1)
    assert distributions["rounds"] == optuna.distributions.IntDistribution(1, 2)
    assert distributions["lr"] == optuna.distributions.FloatDistribution(1e-3, 1e-2, log=True)
    assert read.best_trials, "the front, as Optuna sees it"


def test_a_failed_trial_is_exported_with_its_reason(tmp_path: Path) -> None:
    import optuna

    url = f"sqlite:///{tmp_path}/study.db"
    opened = shown(
        2, failed="diverged: the loss is nan", space={"criterion": ["magnitude", "random"], "sparsity": [0.5, 0.75]}
    )
    assert export_optuna(opened, url) == 3
    last = optuna.load_study(study_name="shown", storage=url).trials[-1]
    assert last.state is optuna.trial.TrialState.FAIL and last.user_attrs["reason"] == "diverged: the loss is nan"


def test_a_study_without_a_trial_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="'shown' has no trial yet"):
        export_optuna(shown(0), f"sqlite:///{tmp_path}/study.db")


def test_the_front_and_the_table_become_data_frames(study: Study) -> None:
    frame = study.front().to_pandas()
    assert {"key", "trial", "round", "accuracy", "test_accuracy", "sparsity", "params.rate", "knee"} <= set(
        frame.columns
    )
    assert frame["knee"].sum() == 1 and len(frame) == len(study.front().points)
    assert set(study.to_pandas()["trial"]) >= set(frame["trial"])


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # folders need no migrations, which take seconds
    return pytest.importorskip("mlflow", reason="MLflow is not installed: the extra `mlflow` brings it")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_mlflow_has_a_run_for_each_round(study: Study, mlflow: Any, tmp_path: Path) -> None:
    from orchestrator.trackers.mlflow import export_mlflow

    uri = (tmp_path / "runs").as_uri()
    points = {(row["trial"], row["round"]) for row in study.table().to_pylist()}
    assert export_mlflow(study, uri) == len(points)
    assert export_mlflow(study, uri) == 0, "what is there is not added again"
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("tracked").experiment_id])
    assert len(runs) == len(points) and {run.info.status for run in runs} == {"FINISHED"}
    assert sum(run.data.tags["orchardist.knee"] == "true" for run in runs) == 1
    (run,) = [run for run in runs if run.info.run_name == "trial-0-round-1"]
    assert run.data.params["criterion"] in ("magnitude", "random") and run.data.params["seeds"] == "2"
    rows = [row for row in study.table().to_pylist() if (row["trial"], row["round"]) == (0, 1)]
    assert run.data.metrics["accuracy"] == pytest.approx(sum(row["accuracy"] for row in rows) / 2)
    card = json.loads(Path(client.download_artifacts(run.info.run_id, "card.json", str(tmp_path))).read_text())
    assert card["key"] in {row["key"] for row in rows} and card["lineage"][0]["op"] == "Init"
    assert "certificate" not in card, "nothing was certified"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_uri_that_mlflow_refuses_is_one_line(study: Study, mlflow: Any) -> None:
    from orchestrator.trackers.mlflow import export_mlflow

    with pytest.raises(InputError, match="^--to: MLflow says: [^\n]+$"):
        export_mlflow(study, "nonsense://nowhere")
