"""Whole studies, each of a second: the same plan gives the same weights, and nothing is lost, counted or run twice."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from orchestrator import Study
from orchestrator.errors import InputError, PlanError, SpecError, StoreError, TaskError
from orchestrator.pools.local import LocalPool
from orchestrator.pools.protocol import Event, Pool, Reported
from orchestrator.progress import Silent, Standing
from orchestrator.store.store import Store
from orchestrator.study import _changes
from tests.orchestrator.pools import small

if TYPE_CHECKING:
    from orchestrator.pools.ray import RayPool

GROUPS: Sequence[Mapping[str, Any]] = (
    {"criterion": "magnitude", "rate": 0.3, "rounds": 2, "retrain": "finetune"},
    {"criterion": "magnitude", "rate": 0.3, "rounds": 1, "retrain": "finetune"},
    {"criterion": "magnitude", "rate": 0.3, "rounds": 2, "retrain": "rewind", "rewind_epoch": 1},
)


class Counting(LocalPool):
    """A local pool that remembers what it reported, and interrupts after so many reports."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        super().__init__()
        self.reported: list[Reported] = []
        self._after = interrupt_after

    def completed(self, timeout_seconds: float) -> Sequence[Event]:
        if self._after is not None and len(self.reported) >= self._after:
            raise KeyboardInterrupt
        events = super().completed(timeout_seconds)
        self.reported += [event for event in events if isinstance(event, Reported)]
        return events


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "orchardist")


def run(store: str | Path, root: Path, pool: Pool | None = None, **fields: Any) -> tuple[Study, Standing]:
    """The small study with `fields` over it, run in this process."""
    study = Study(small.spec(**fields), store, root=root)
    return study, study.run(pool or LocalPool())


def params_of(study: Study) -> list[dict[str, Any]]:
    """The parameters of every proposal, by trial."""
    rows = study.store.table(study.spec.name, "proposals", ["trial", "params"]).to_pylist()
    return [json.loads(row["params"]) for row in sorted(rows, key=lambda row: row["trial"])]


def assert_same_models(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert one, "nothing was compared"
    for key in one:
        assert small.same_bits(one[key], other[key]), key


# --- The same plan gives the same weights --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The random-sampler study as it comes out of a local pool, uninterrupted."""
    study, standing = run(tmp_path_factory.mktemp("reference"), root)
    assert (standing.done, standing.failed) == (6, 0)
    return study


def test_every_proposal_alone_in_a_store_of_its_own(reference: Study, root: Path) -> None:
    shared = small.models(reference.store)
    alone: dict[str, Any] = {}
    for params in params_of(reference):
        study, _ = run(f"memory://{uuid4().hex}", root, trials=1, enqueue=[params])
        found = small.models(study.store)
        for key in alone.keys() & found.keys():
            assert small.same_bits(alone[key], found[key])
        alone |= found
    assert_same_models(shared, alone)


@pytest.mark.parametrize("after", [0, 1, 3, 7])
def test_stopped_and_continued(after: int, reference: Study, root: Path, memory: str) -> None:
    first, second = Counting(interrupt_after=after), Counting()
    with pytest.raises(KeyboardInterrupt):
        run(memory, root, first)
    stopped = Study.open(memory, "small").status()
    assert stopped["state"] == "stopped" and stopped["trials"]["running"] == 0
    study, standing = run(memory, root, second)
    assert standing.done == 6
    assert_same_models(small.models(reference.store), small.models(study.store))
    assert params_of(study) == params_of(reference)
    keys = [report.key for report in first.reported + second.reported]
    assert len(keys) == len(set(keys)), "a stage was run twice"
    assert study.status()["epochs"] == reference.status()["epochs"]
    assert study.status()["stages"] == reference.status()["stages"]


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_workers(workers: int, reference: Study, root: Path, tmp_path: Path, ray_cluster: None) -> None:
    from orchestrator.pools.ray import RayPool

    pool: RayPool = RayPool(workers)
    try:
        study, standing = run(tmp_path, root, pool)
    finally:
        pool.close()
    assert standing.done == 6
    assert params_of(study) == params_of(reference)
    assert_same_models(small.models(reference.store), small.models(study.store))


def test_tpe_gives_the_same_weights_for_the_same_plan(root: Path, memory: str) -> None:
    learnt, _ = run(memory, root, sampler="tpe", trials=12)
    again, _ = run(f"memory://{uuid4().hex}", root, trials=12, enqueue=params_of(learnt))
    assert_same_models(small.models(learnt.store), small.models(again.store))


# --- Proposals after a restart -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_proposals_are_the_same_after_a_restart(sampler: str, root: Path, memory: str) -> None:
    enqueue = [dict(point) for point in GROUPS[:2]]
    uncut, _ = run(f"memory://{uuid4().hex}", root, sampler=sampler, trials=8, enqueue=enqueue)
    for trials in (1, 3, 8):
        study, _ = run(memory, root, sampler=sampler, trials=trials, enqueue=enqueue)
    assert params_of(study) == params_of(uncut)
    assert [params["rounds"] for params in params_of(study)[:2]] == [2, 1]


def test_more_trials_and_more_enqueued_ones_go_on(root: Path, memory: str) -> None:
    run(memory, root, trials=2)
    study, standing = run(memory, root, trials=4, enqueue=[dict(GROUPS[2])])
    assert standing.done == 4
    assert params_of(study)[2] == dict(GROUPS[2])


ROUNDS: Mapping[str, Any] = {"criterion": "magnitude", "rate": [0.2, 0.4], "retrain": ["finetune", "rewind"]}


def test_more_rounds_of_every_trial_go_on_from_the_last_one(root: Path, memory: str) -> None:
    run(memory, root, space={**ROUNDS, "rounds": 2}, trials=4)
    pool = Counting()
    study, standing = run(memory, root, pool, space={**ROUNDS, "rounds": 3}, trials=4)
    whole, _ = run(f"memory://{uuid4().hex}", root, space={**ROUNDS, "rounds": 3}, trials=4)
    assert_same_models(small.models(whole.store), small.models(study.store))
    assert standing.done == 4
    third = [row for row in study.table().to_pylist() if row["round"] == 3]
    assert len(pool.reported) == len(third) == 4, "nothing but the third rounds is run"
    assert study.status()["trials"] == whole.status()["trials"] and study.status()["epochs"] == whole.status()["epochs"]
    points = [{**point, "params": None} for point in study.front().points]
    assert points == [{**point, "params": None} for point in whole.front().points]
    again = Counting()
    _, standing = run(memory, root, again, space={**ROUNDS, "rounds": 3}, trials=4)
    assert not again.reported and standing.done == 4


def test_proposals_stay_where_a_range_of_rounds_grows(root: Path, memory: str) -> None:
    space: Mapping[str, Any] = {"criterion": "magnitude", "rate": 0.3}
    first, _ = run(memory, root, space={**space, "rounds": {"low": 1, "high": 2}}, trials=3)
    before = params_of(first)
    study, standing = run(memory, root, space={**space, "rounds": {"low": 1, "high": 5}}, trials=9)
    assert params_of(study)[:3] == before and standing.done == 9
    assert max(params["rounds"] for params in params_of(study)) > 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"rounds": 3}, {"rounds": 2}),
        ({"rounds": [1, 3]}, {"rounds": [1, 2]}),
        ({"rounds": {"low": 1, "high": 3}}, {"rounds": {"low": 2, "high": 4}}),
        ({"rounds": 2}, {"rounds": [2, 3]}),
        ({"rounds": 2, "scope": "layer"}, {"rounds": 3, "scope": "global"}),
        ({"rounds": 2, "sparsity": 0.5}, {"rounds": 3, "sparsity": 0.5}),
        ({"rounds": 2, "phase": "before"}, {"rounds": 3, "phase": "before"}),
    ],
)
def test_other_rounds_are_another_study(
    before: Mapping[str, Any], after: Mapping[str, Any], root: Path, memory: str
) -> None:
    amount = {} if "sparsity" in before else {"rate": 0.3}
    run(memory, root, space={**amount, **before}, trials=0)
    with pytest.raises(SpecError, match=r"space\.rounds(\.low)? was"):
        run(memory, root, space={**amount, **after}, trials=0)


def test_a_grid_that_is_exhausted_ends_the_study(root: Path, memory: str) -> None:
    space = {"criterion": "magnitude", "rate": [0.2, 0.3], "retrain": "none"}
    study, standing = run(memory, root, trials=10, sampler="grid", space=space)
    assert standing.done == 2
    assert study.status()["state"] == "done"


# --- Nothing is run twice or lost ----------------------------------------------------------------------------------


def test_a_finished_study_runs_nothing(root: Path, memory: str) -> None:
    study, first = run(memory, root)
    pool = Counting()
    _, again = run(memory, root, pool)
    assert pool.reported == []
    assert (again.done, again.epochs_run, again.epochs_asked) == (first.done, first.epochs_run, first.epochs_asked)
    assert again.best == first.best != {}
    assert study.status()["state"] == "done"


def test_another_study_of_the_same_store_shares_its_states(root: Path, memory: str) -> None:
    first, _ = run(memory, root)
    pool = Counting()
    second, standing = run(memory, root, pool, name="other")
    assert pool.reported == [] and standing.epochs_run == 0 and standing.done == 6
    assert_same_models(small.models(first.store), small.models(second.store, "other"))
    points = [study.front().points for study in (first, second)]
    assert [point["key"] for point in points[0]] == [point["key"] for point in points[1]]


def test_a_study_that_measures_more_measures_states_again_without_training(root: Path, memory: str) -> None:
    run(memory, root)
    pool = Counting()
    study, standing = run(memory, root, pool, name="timed", objectives=["accuracy", "latency_ms"])
    assert pool.reported and all(report.found for report in pool.reported)
    assert standing.epochs_run == 0 and standing.done == 6
    assert all(point["latency_ms"] > 0 for point in study.front().points)


@pytest.mark.parametrize("lost", ["outcomes", "events", "outcomes events"])
def test_what_the_ledger_lost_is_read_from_the_states_headers(lost: str, root: Path, tmp_path: Path) -> None:
    study, _ = run(tmp_path, root)
    before = small.models(study.store)
    folder = tmp_path / "studies" / "small"
    if "outcomes" in lost:
        (folder / "outcomes.parquet").unlink()
    for part in (folder / "ledger").iterdir():
        if any(kind in part.name for kind in lost.split()):
            part.unlink()
    pool = Counting()
    study, standing = run(tmp_path, root, pool)
    assert pool.reported == [] and standing.done == 6
    assert small.models(study.store).keys() == before.keys()


def test_a_driver_killed_before_its_first_flush_loses_no_state(root: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, root, Counting(interrupt_after=4))
    made = set(Store(tmp_path).states.keys())
    assert made
    shutil.rmtree(tmp_path / "studies")
    pool = Counting()
    study, standing = run(tmp_path, root, pool)
    assert standing.done == 6
    assert not made & {report.key for report in pool.reported}
    assert made <= set(small.models(study.store)) | set(study.store.states.keys())


# --- Points, seeds, constraints, prefixes --------------------------------------------------------------------------


def test_two_seeds(root: Path, memory: str) -> None:
    study, standing = run(memory, root, seeds=[0, 1], trials=3)
    assert standing.done == 3
    found = study.front()
    assert found.dense is not None and found.dense["n"] == 2 and len(set(found.dense["keys"])) == 2
    by_key = {row["key"]: row for row in study.table().to_pylist()}
    for point in found.points:
        rows = [by_key[key] for key in point["keys"]]
        assert point["n"] == len(rows) == 2 and {row["seed"] for row in rows} == {0, 1}
        assert {(row["trial"], row["round"]) for row in rows} == {(point["trial"], point["round"])}
        values = [row["accuracy"] for row in rows]
        assert point["accuracy"] == pytest.approx(sum(values) / 2)
        assert point["std"]["accuracy"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert point["key"] in point["keys"]


def test_a_proposal_with_a_failed_seed_counts_as_failed(root: Path, memory: str) -> None:
    class SecondSeedFails(LocalPool):
        """Out of memory whenever the second seed's model is pruned."""

        def completed(self, timeout_seconds: float) -> Sequence[Event]:
            from orchestrator.pools.protocol import Failed

            events = super().completed(timeout_seconds)
            return [
                Failed(segment=event.segment, key=event.key, kind="raised", message="planted")
                if isinstance(event, Reported) and event.key in doomed
                else event
                for event in events
            ]

    probe, _ = run(f"memory://{uuid4().hex}", root, seeds=[0, 1], trials=1, enqueue=[dict(GROUPS[0])])
    doomed = {row["key"] for row in probe.table().to_pylist() if (row["trial"], row["round"], row["seed"]) == (0, 2, 1)}
    study, standing = run(memory, root, SecondSeedFails(), seeds=[0, 1], trials=1, enqueue=[dict(GROUPS[0])])
    assert (standing.done, standing.failed) == (0, 1)
    assert all(point["round"] != 2 for point in study.front().points), "a mean over one seed of two"
    again, standing = run(memory, root, seeds=[0, 1], trials=1, enqueue=[dict(GROUPS[0])])
    assert (standing.done, standing.failed) == (1, 0)
    assert again.status()["trials"] == {"asked": 1, "done": 1, "running": 0, "failed": 0, "stopped": 0}


def test_constraints(root: Path, memory: str) -> None:
    bounds = {"sparsity": "<= 0.5", "accuracy": ">= dense - 0.9"}
    study, standing = run(memory, root, trials=8, constraints=bounds, sampler="tpe")
    assert standing.done == 8
    kept = study.front().points
    assert kept and all(point["sparsity"] <= 0.5 for point in kept)
    free, _ = run(memory, root, trials=8, name="free", enqueue=params_of(study))
    assert max(point["sparsity"] for point in free.front().points) > 0.5, "the bound has bound nothing"
    endings = [
        json.loads(row["detail"]) for row in study.store.table("small", "events").to_pylist() if row["event"] == "done"
    ]
    assert all(len(ending["constraints"]) == 2 for ending in endings)
    _, again = run(memory, root, trials=9, constraints=bounds, sampler="tpe")
    assert again.done == 9


def test_a_bound_relative_to_a_dense_model_that_failed(root: Path, memory: str) -> None:
    fields: dict[str, Any] = {
        "train": {**small.TRAIN, "lr": 1e30},
        "space": {"rate": 0.5, "phase": "before", "lr": 0.05},
        "constraints": {"accuracy": ">= dense - 0.5"},
        "trials": 1,
    }
    for _ in range(2):
        _, standing = run(memory, root, **fields)
        assert (standing.done, standing.failed) == (0, 1)
        assert "diverged" in standing.dense_failure and "dense" in standing.last_failure


def test_a_prefix_is_told_once_and_outside_the_count(root: Path, memory: str) -> None:
    point = dict(GROUPS[0]) | {"rounds": 3}
    study, standing = run(memory, root, sampler="tpe", trials=2, enqueue=[dict(GROUPS[1]), point])
    assert standing.done == 2
    events = study.store.table("small", "events").to_pylist()
    told = [json.loads(row["detail"])["params"]["rounds"] for row in events if row["event"] == "shorter"]
    assert told == [2], "one round was a proposal of its own"
    run(memory, root, sampler="tpe", trials=3, enqueue=[dict(GROUPS[1]), point])
    rounds = {(row["trial"], row["round"]) for row in study.table().to_pylist()}
    assert {(-1, 0), (0, 1), (1, 2), (1, 3)} <= rounds


def test_metrics_of_the_tasks_own_come_back_in_their_columns(root: Path, memory: str, tmp_path: Path) -> None:
    own = small.write_task(tmp_path)
    text = small.TASK.replace(
        'classes=["a", "b", "c"],', 'metrics={"right": lambda o, y: (o.argmax(1) == y).float().mean()},'
    )
    (own / "my_task.py").write_text(text)
    fields: dict[str, Any] = {"objectives": ["right", "sparsity"], "constraints": {"right": ">= 0"}}
    study, _ = run(memory, own, **fields)
    _, standing = run(memory, own, trials=7, **fields)
    assert standing.failed == 0
    values = {row["key"]: json.loads(row["metrics"])["right"] for row in study.table().to_pylist()}
    for point in study.front(where=["right > 0.3"]).points:
        assert point["right"] == values[point["key"]] > 0.3
    rows = [
        json.loads(row["detail"])["values"]
        for row in study.store.table("small", "events").to_pylist()
        if row["event"] == "done"
    ]
    assert {value for value, _ in rows} <= set(values.values())


# --- Failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [("", "diverged"), ("raises", "the loss is wrong"), ("exits", "that is all"), ("memory", "out of memory")],
)
def test_a_trial_that_goes_wrong_fails_and_the_study_finishes(
    trouble: str, reason: str, root: Path, memory: str
) -> None:
    space = {"rate": [0.3, 0.5], "lr": [0.05, 1e30]}
    study, standing = run(memory, root, trials=4, sampler="grid", space=space, task_params={"trouble": trouble})
    assert (standing.done, standing.failed) == (2, 2)
    assert reason in standing.last_failure
    status = study.status()
    assert status["state"] == "done" and status["trials"]["failed"] == 2
    assert all(reason in why for why in status["failures"].values())
    assert study.front().points
    again = Counting()
    _, standing = run(memory, root, again, trials=4, sampler="grid", space=space, task_params={"trouble": trouble})
    assert (standing.done, standing.failed) == (2, 2), "failures are tried again"
    assert again.reported == []


def test_a_criterion_that_raises(root: Path, memory: str) -> None:
    space = {"rate": 0.5, "criterion": ["magnitude", "my_criteria.py:broken", "my_criteria.py:halves"]}
    study, standing = run(memory, root, trials=3, sampler="grid", space=space)
    assert (standing.done, standing.failed) == (2, 1)
    assert "this criterion is broken" in standing.last_failure
    (failed,) = [row for row in study.store.table("small", "events").to_pylist() if row["event"] == "stage failed"]
    assert "my_criteria.py" in json.loads(failed["detail"])["traceback"]


def test_an_objective_that_is_no_number_fails_the_trial(root: Path, memory: str, tmp_path: Path) -> None:
    own = small.write_task(tmp_path)
    (own / "my_task.py").write_text(
        small.TASK.replace('classes=["a", "b", "c"],', 'metrics={"odd": lambda o, y: float("nan")},')
    )
    for _ in range(2):
        study, standing = run(memory, own, objectives=["odd", "sparsity"], trials=2, sampler="tpe")
        assert (standing.done, standing.failed) == (0, 2)
        assert "no number to search by" in standing.last_failure
    assert study.front().points == ()


# --- Wrong input ---------------------------------------------------------------------------------------------------


def test_a_changed_task_is_refused_unless_accepted(tmp_path: Path, memory: str) -> None:
    own = small.write_task(tmp_path)
    run(memory, own, trials=1)
    (own / "blobs.py").write_text(small.BLOBS.replace("3 * torch", "2 * torch"))
    study = Study(small.spec(trials=2), memory, root=own)
    with pytest.raises(SpecError, match="--accept-task-change"):
        study.run(LocalPool())
    assert study.run(LocalPool(), accept_task_change=True).done == 2
    assert len({row["task_digest"] for row in study.table().to_pylist()}) == 2
    assert study.run(LocalPool()).done == 2, "accepted once is accepted"


def test_another_study_of_the_same_name_is_refused(root: Path, memory: str) -> None:
    run(memory, root, trials=1)
    with pytest.raises(SpecError, match="was made from another study file"):
        run(memory, root, trials=1, objectives=["loss", "sparsity"])
    run(memory, root, trials=2, enqueue=[dict(GROUPS[0])])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"space": {**small.SPACE, "rate": {"low": 0.2, "high": 0.4, "step": 0.1}}}, "space.rate.high was 0.5 and is now 0.4"),
        ({"space": {**small.SPACE, "rate": 0.3}}, 'space.rate was {"low": 0.2, "high": 0.5, "step": 0.1} and is now 0.3'),
        ({"seeds": [0, 1]}, "seeds was [0] and is now [0, 1]"),
        ({"constraints": {"loss": "< 1"}}, 'constraints.loss was not set and is now "< 1"'),
        ({"sampler": "grid", "train": {}}, 'sampler was "random" and is now "grid"; train.epochs was 2.0 and is now 10.0; and 3 more'),
        ({"space": dict(reversed(list(small.SPACE.items())))}, "the order within [space]"),
    ],
)  # fmt: skip
def test_what_makes_it_another_study_is_said(change: Mapping[str, Any], says: str, root: Path, memory: str) -> None:
    run(memory, root, trials=1)
    with pytest.raises(SpecError) as caught:
        run(memory, root, trials=1, **change)
    first, second = str(caught.value).splitlines()
    assert f"from another study file: {says}" in first
    assert second == "legal: another name, or change only trials, [[enqueue]] and [stopping], or ask for more rounds"


def test_an_integer_and_a_float_make_different_ranges() -> None:
    assert list(_changes({"space": {"lr": {"high": 1}}}, {"space": {"lr": {"high": 1.0}}})) == [
        "space.lr.high was 1 and is now 1.0"
    ]
    (long,) = _changes({"seeds": []}, {"seeds": list(range(100))})
    assert long.endswith("15, 16, 1…") and len(long) < 100


def test_an_earlier_study_file_that_cannot_be_read_any_more(root: Path, memory: str) -> None:
    study, _ = run(memory, root, trials=1)
    study.store.files.write("studies/small/study.toml", b'name = "small"\ntask = "my_task.py"\nflavour = "sour"\n')
    with pytest.raises(SpecError, match="the stored one cannot be read any more .*'flavour'"):
        run(memory, root, trials=1, seeds=[1])


def test_a_name_that_reads_like_a_file_is_refused(root: Path, memory: str) -> None:
    with pytest.raises(SpecError, match=r"'small\.toml'"):
        run(memory, root, name="small.toml")
    assert Store(memory).studies() == []


def test_a_study_that_is_being_run_is_refused(root: Path, tmp_path: Path) -> None:
    from orchestrator.store.lease import acquire, this_process

    study, _ = run(tmp_path, root, trials=1)
    lease = acquire(study.store.files, "small", **this_process() | {"pid": os.getppid()})
    with pytest.raises(StoreError, match=f"is being run by process {os.getppid()}"):
        run(tmp_path, root, trials=1)
    assert study.status()["state"] == "running"
    lease.release()
    assert study.status()["state"] == "done"


def test_an_unwritable_store_is_refused_before_anything_runs(root: Path, tmp_path: Path) -> None:
    (tmp_path / "studies").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match="studies"):
        run(tmp_path, root)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        run(tmp_path / "file" / "store", root)


def test_no_worker_is_started_for_what_can_be_refused_without(root: Path, memory: str) -> None:
    def pool() -> Pool:
        raise AssertionError("a pool was made")

    with pytest.raises(TaskError, match="there is no file"):
        Study(small.spec(task="absent.py"), memory, root=root).run(pool)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("return spread", "return float('nan')"), "NaN"),
        (("96, 4", "96, 5"), "cannot be multiplied"),
        (("def points(spread):", "def points(spread):\n    raise OSError('no such data')"), "no such data"),
    ],
)
def test_data_that_are_wrong_are_refused(change: tuple[str, str], complaint: str, tmp_path: Path, memory: str) -> None:
    own = small.write_task(tmp_path)
    assert change[0] in small.BLOBS
    (own / "blobs.py").write_text(small.BLOBS.replace(*change).replace("+ 3 * torch.eye(3, 4)[y]", ""))
    with pytest.raises(TaskError, match=complaint) as caught:
        run(memory, own)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_task_file_without_task(tmp_path: Path, memory: str) -> None:
    (tmp_path / "my_task.py").write_text("tusk = None\n")
    with pytest.raises(TaskError, match="has no function `task`"):
        run(memory, tmp_path)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"objectives": ["accuracy", "beauty"]}, "unknown objective 'beauty'"),
        ({"constraints": {"beauty": ">= 1"}}, "unknown measure in .constraints. 'beauty'"),
        ({"constraints": {"unit_sparsity": ">= 0.5"}}, "legal.*'sparsity'"),
        ({"space": {"rate": 0.9, "rounds": 9}}, "leaves no weight"),
        ({"space": {"rate": 0.5, "criterion": "my_criteria.py:absent"}}, "has no function 'absent'"),
    ],
)
def test_what_only_the_task_can_tell_is_refused(
    fields: Mapping[str, Any], complaint: str, root: Path, memory: str
) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        run(memory, root, **fields)
    assert len(str(caught.value).splitlines()) <= 2


# --- Progress ------------------------------------------------------------------------------------------------------


def test_progress_counts_right_after_a_restart(root: Path, memory: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(memory, root, Counting(interrupt_after=5))
    before = Study.open(memory, "small").status()
    seen: list[tuple[int, float]] = []

    class Watching(Silent):
        """Notes the counts at each call."""

        def show(self, standing: Standing) -> None:
            seen.append((standing.done, standing.epochs_run))

    Study(small.spec(), memory, root=root).run(LocalPool(), progress=Watching())
    assert before["trials"]["done"] <= seen[0][0] <= before["trials"]["done"] + 1
    assert seen == sorted(seen)
    assert seen[-1][0] == 6


def test_the_best_is_that_of_every_round_before_and_after_a_restart(root: Path, memory: str) -> None:
    study, live = run(memory, root)
    _, again = run(memory, root)
    rounds = [row for row in study.table().to_pylist() if row["round"] > 0]
    best = {"accuracy": max(r["accuracy"] for r in rounds), "sparsity": max(r["sparsity"] for r in rounds)}
    assert live.best == again.best == study.status()["best"] == best


@pytest.fixture(autouse=True)
def _no_loose_threads() -> Iterator[None]:
    import threading

    yield
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name in ("lease", "proposer") or name.startswith("compaction")]


def test_plan_errors_are_input_errors() -> None:
    assert issubclass(PlanError, InputError)


# --- Training that differs from trial to trial ----------------------------------------------------------------------


def test_trials_with_dense_models_of_their_own(root: Path, memory: str) -> None:
    """Each has a dense model under its own learning rate: round 0 of the trial. One of the rates diverges."""
    pool = Counting()
    space = {"lr": [0.05, 0.1, 1e30], "rate": [0.2, 0.5], "rounds": [1, 2], "criterion": "magnitude"}
    study, standing = run(memory, root, pool, trials=12, sampler="grid", space=space)
    assert (standing.done, standing.failed) == (8, 4)
    keys = [report.key for report in pool.reported]
    assert len(keys) == len(set(keys)), "a state was reported twice"
    rows = study.store.table("small", "outcomes", ["key", "trial", "round", "sparsity"]).to_pylist()
    own = [row for row in rows if row["trial"] >= 0 and row["round"] == 0]
    assert own and all(row["sparsity"] == 0 for row in own)


def test_a_changed_criterion_is_a_changed_study(root: Path, memory: str) -> None:
    file = root / "halves.py"
    text = "def halves(weight):\n    return weight.abs() / {}\n"
    space = {"criterion": "halves.py:halves", "rate": 0.3, "rounds": 1}
    file.write_text(text.format(2))
    run(memory, root, trials=1, space=space)
    file.write_text(text.format(4))
    with pytest.raises(SpecError, match="the function 'halves.py:halves' is not what the study 'small' began with"):
        run(memory, root, trials=1, space=space)
    run_again = Study(small.spec(trials=1, space=space), memory, root=root)
    assert run_again.run(LocalPool(), accept_task_change=True).done == 1


def test_outcomes_come_as_a_data_frame(reference: Study) -> None:
    frame = reference.to_pandas()
    assert list(frame["key"]) == reference.table()["key"].to_pylist()
    assert {"trial", "round", "accuracy", "sparsity", "bytes", "params"} <= set(frame.columns)
