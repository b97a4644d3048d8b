"""What earlier studies found is where a new one begins: proposed first, told to the sampler, and the same ever after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Study
from orchestrator.errors import SpecError
from orchestrator.pools.local import LocalPool
from orchestrator.spec import StudySpec
from orchestrator.warm_start import MOST_PROPOSED, WarmStart
from search.proposer import make
from tests.orchestrator.pools import small
from tests.orchestrator.test_cli import STUDY, Shell


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task and a store of three studies: "first" drew at random, "taught" learnt, "empty" has nothing."""
    root = small.write_task(tmp_path_factory.mktemp("root"))
    finished(root, name="first", trials=12)
    finished(root, name="taught", sampler="tpe")
    finished(root, name="empty", trials=0)
    return root


@pytest.fixture
def first(root: Path) -> Study:
    return Study.open(root / "store", "first")


@pytest.fixture
def taught(root: Path) -> Study:
    return Study.open(root / "store", "taught")


def finished(root: Path, **fields: Any) -> Study:
    """A small study, run in this process, in the one store of the test."""
    study = Study(small.spec(**fields), root / "store", root=root)
    study.run(LocalPool())
    return study


def proposals(study: Study) -> list[dict[str, Any]]:
    return [json.loads(row["params"]) for row in study.store.table(study.spec.name, "proposals").to_pylist()]


def warm(study: Study) -> WarmStart:
    return WarmStart.from_json(study.noted()["warm_start"])


def values(study: Study) -> dict[str, tuple[float, float]]:
    """(accuracy, sparsity) of every done trial by its parameters."""
    from orchestrator import history

    past = history.read(study.store, study.spec.name)
    return {
        json.dumps(past.proposals[number][0], sort_keys=True): tuple(ending.values or ())  # type: ignore[misc]
        for number, ending in past.endings.items()
    }


def test_the_best_configurations_of_an_earlier_study_come_first_and_cost_nothing(root: Path, first: Study) -> None:
    second = finished(root, name="second", warm_start=("first",), trials=4)
    found = values(first)
    ranked = [found[json.dumps(params, sort_keys=True)] for params in proposals(second)]
    assert proposals(second) == list(warm(second).points)[:4] and len(warm(second).points) <= MOST_PROPOSED
    for place, one in enumerate(ranked):
        others = ranked[place + 1 :]
        assert not any(o[0] >= one[0] and o[1] >= one[1] and o != one for o in others), "a worse one came first"
    assert second.status()["epochs"]["run"] == 0, "the states are those of the first study"
    assert second.noted()["warm_start"]["says"] == [
        f"warm start: {len(found)} configurations of the 12 finished trials of 'first' are legal here; the best "
        f"{len(warm(second).points)} in all come first, as far as the trials go; not told to the sampler: the sampler "
        "'random' looks at no result"
    ]


def test_a_sampler_that_learns_is_told_of_the_others(
    root: Path, taught: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.warm_start.MOST_PROPOSED", 2)
    told: list[Any] = []

    def spy(*given: Any, **named: Any) -> Any:
        told.extend(named["added"])
        return make(*given, **named)

    monkeypatch.setattr("orchestrator.driver.make", spy)
    begun = warm(finished(root, name="pupil", warm_start=("taught",), sampler="tpe", trials=3))
    assert len(begun.points) == 2 and len(begun.told) >= 4 and [*begun.told] == told
    found = values(taught)
    for params, reached, constraints in begun.told:
        name = json.dumps(params, sort_keys=True)
        assert params not in begun.points and constraints == {}
        assert name not in found or found[name] == reached
    told.clear()
    finished(root, name="untaught", sampler="tpe", trials=1)
    assert told == []


def test_a_restart_proposes_what_one_run_would_have_whatever_became_of_the_earlier_study(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "root")
    place = tmp_path / "root"
    whole = finished(place, name="whole", trials=14, warm_start=("first",))
    finished(place, name="parts", trials=3, warm_start=("first",))
    begun = finished(place, name="learns", trials=2, warm_start=("taught",), sampler="tpe")
    told = warm(begun)
    for gone in ("first", "taught"):
        shutil.rmtree(place / "store" / "studies" / gone)
    parts = finished(place, name="parts", trials=14, warm_start=("first",))
    assert warm(parts) == warm(whole)
    assert proposals(parts) == proposals(whole) and len(proposals(parts)) == 14
    again = finished(place, name="learns", trials=4, warm_start=("taught",), sampler="tpe")
    assert warm(again) == told and proposals(again)[:4] == [*told.points][:4]


def test_only_what_is_legal_in_the_new_space_is_proposed(root: Path, first: Study) -> None:
    space = dict(small.SPACE) | {"retrain": "finetune", "criterion": ["random", "taylor"]}
    del space["rewind_epoch"]
    fits = [p for p in proposals(first) if p["retrain"] == "finetune" and p["criterion"] == "random"]
    points = warm(finished(root, name="narrow", warm_start=("first",), space=space, trials=0)).points
    assert points and all(point in fits for point in points) and all(point in points for point in fits)

    wider = dict(space) | {"criterion": {"value": "random"}, "scope": ["layer", "global"]}
    points = warm(finished(root, name="wide", warm_start=("first",), space=wider, trials=0)).points
    assert {point["scope"] for point in points} == {"layer"}, "what the earlier study left at its default"


def test_enqueued_proposals_come_before_and_none_twice(root: Path, first: Study) -> None:
    best = proposals(first)[0]
    study = finished(root, name="queued", warm_start=("first",), enqueue=(best,), trials=7)
    asked = [json.dumps(params, sort_keys=True) for params in proposals(study)]
    assert proposals(study)[0] == best and len(set(asked)) == 7


def test_two_studies_take_turns(root: Path, first: Study, taught: Study) -> None:
    points = warm(finished(root, name="both", warm_start=("first", "taught"), trials=0)).points
    assert points[0] in proposals(first) and json.dumps(points[1], sort_keys=True) in values(taught)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"task_params": {"spread": 2.0}}, "its task, model or data are others"),
        ({"objectives": ("loss", "sparsity")}, "it has other objectives"),
        ({"constraints": {"accuracy": ">= 0.1"}}, "it has other constraints"),
        ({"train": {**small.TRAIN, "retrain_epochs": 2}}, "what this study holds constant was otherwise there"),
        ({"prune": {"recalibrate": 1}}, "what this study holds constant was otherwise there"),
    ],
)
def test_figures_that_do_not_compare_teach_nothing_and_the_study_says_so(
    root: Path, fields: dict[str, Any], reason: str
) -> None:
    name = f"other-{len(list((root / 'store' / 'studies').iterdir()))}"
    begun = warm(finished(root, name=name, warm_start=("taught",), sampler="tpe", trials=0, **fields))
    assert begun.points and not begun.told
    assert f"not told to the sampler: {reason}" in begun.says[0]


def test_refused(root: Path) -> None:
    for fields, said in (
        ({"warm_start": ("frist",)}, "warm_start: unknown study 'frist'; did you mean 'first'?"),
        ({"warm_start": ("empty",)}, "warm_start: the study 'empty' has no finished trial"),
        ({"warm_start": ("first",), "space": {"sparsity": [0.5]}}, "none of 12 finished trials of 'first' is legal"),
    ):
        with pytest.raises(SpecError) as caught:
            finished(root, **{"name": "refused", **fields})
        assert str(caught.value).startswith(said) or said in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert not (root / "store" / "studies" / "refused" / "study.json").exists()
    for names, said in (
        (("small",), "'small' is this study itself"),
        (("../first",), "is no name of a study"),
        (("first", "first"), "must not repeat a value"),
    ):
        with pytest.raises(SpecError, match=said):
            small.spec(warm_start=names)


def test_it_is_part_of_the_digest_and_none_is_as_ever() -> None:
    assert small.spec(warm_start=("first",)).digest() != small.spec().digest()
    assert small.spec(warm_start=()).digest() == small.spec().digest()
    again = StudySpec.parse(small.spec(warm_start=("first",)).to_toml())
    assert again.warm_start == ("first",)


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = small.write_task(tmp_path / "root")
    monkeypatch.chdir(root)
    shell = Shell(monkeypatch, capsys)
    (root / "first.toml").write_text(STUDY)
    (root / "second.toml").write_text('warm_start = ["small"]\n' + STUDY.replace('"small"', '"second"'))
    done = shell("run", "second.toml", "--local")
    assert done.code == 2 and "second.toml: warm_start: unknown study 'small'" in done.err
    assert len(done.err.splitlines()) == 1
    shell("run", "first.toml", "--local")
    done = shell("run", "second.toml", "--local")
    assert done.code == 0 and "warm start: 4 configurations of the 4 finished trials of 'small'" in done.err
