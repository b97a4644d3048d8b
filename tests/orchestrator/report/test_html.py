"""The report: one page that opens offline, says what there is and what is missing, and runs nothing of what it shows."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import Study, StudySpec
from orchestrator.errors import InputError
from orchestrator.objectives import OBJECTIVES
from orchestrator.outcome import DENSE_TRIAL
from orchestrator.pools.local import LocalPool
from orchestrator.report.charts import MOST_SPARSE, scale
from orchestrator.report.checklist import Facts, checklist
from orchestrator.report.html import report
from orchestrator.report.importance import LEAST_TRIALS, grouped, importances
from orchestrator.report.page import SCRIPT, element, heat, mixed, page, shown, table
from orchestrator.store.store import Store

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
SECTIONS = [
    "front",
    "chosen",
    "search",
    "importance",
    "layers",
    "classes",
    "sharing",
    "lineage",
    "checklist",
    "provenance",
]
VOID = {"meta", "link", "br", "img", "input", "hr"}
NUMBERS = count()

Row = dict[str, Any]


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its text by section, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.scripts: list[str] = []
        self._open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()
        assert self._open == [], "an element was not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif self._open and self._open[-1] != "style":
            self.text[self._section] = self.text.get(self._section, "") + data

    def having(self, attribute: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if attribute in attributes]

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [each for each in self.having("class") if name in (each["class"] or "").split()]

    def sections(self) -> list[str]:
        return [attributes["id"] or "" for tag, attributes in self.tags if tag == "section"]


def outcome(trial: int, seed: int, accuracy: float, sparsity: float, params: Mapping[str, Any]) -> Row:
    classes = [accuracy, accuracy - 0.1 * sparsity]
    return {
        "key": f"{trial + 1:04x}{seed:02x}" + "0" * 58,
        "trial": trial,
        "round": 0 if trial == DENSE_TRIAL else 1,
        "seed": seed,
        "params": params,
        "accuracy": accuracy,
        "test_accuracy": accuracy - 0.01,
        "sparsity": sparsity,
        "nonzero_params": round(1000 * (1 - sparsity)),
        "total_params": 1000,
        "compression_ratio": 1 / (1 - sparsity),
        "theoretical_speedup": 1 / (1 - sparsity),
        "class_accuracy": classes,
        "test_class_accuracy": classes,
        "layers": {"fc.weight": [round(1000 * (1 - sparsity)), 1000]},
        "task_digest": "ab" * 32,
        "device": "cpu",
        "seconds": 1.0,
        "finished_at": 1.79e9 + trial,
        "versions": {"torch": "2.13.0"},
    }


def study(
    trials: int,
    *,
    seeds: Sequence[int] = (0, 1),
    criteria: Sequence[str] = ("magnitude", "random"),
    failed: str = "",
    **spec: Any,
) -> Study:
    """A study in a fresh memory store of which nothing was ever run: the sparser, the worse."""
    url = f"memory://report-{next(NUMBERS)}"
    described = StudySpec(name="shown", task="nowhere.py", trials=trials, seeds=seeds, **spec)
    store = Store(url)
    store.write_study("shown", described.to_toml(), {"valid_examples": 100, "test_examples": 200})
    draws = np.random.default_rng(0)
    rows = [outcome(DENSE_TRIAL, seed, 0.96, 0.0, {}) for seed in seeds] if trials else []
    proposals, events = [], []
    for trial in range(trials):
        sparsity = 1 - 2.0 ** -(1 + trial % 5)
        params = {"criterion": criteria[trial % len(criteria)], "sparsity": sparsity}
        accuracy = 0.97 - 0.1 * sparsity**8 - 0.01 * draws.random()
        rows += [outcome(trial, seed, accuracy, sparsity, params) for seed in seeds]
        proposals.append({"trial": trial, "params": params, "attrs": {}, "proposed_at": 0.0})
        detail = {
            "values": [accuracy, sparsity][: len(described.objectives)],
            "constraints": {},
            "epochs": 10.0,
            "stages": 4,
        }
        events.append({"event": "done", "trial": trial, "at": 0.0, "detail": detail})
        events.append({"event": "work", "trial": trial, "at": 0.0, "detail": {"epochs": 4.0, "stages": 2}})
    if failed:
        proposals.append({"trial": trials, "params": {}, "attrs": {}, "proposed_at": 0.0})
        events.append({"event": "failed", "trial": trials, "at": 0.0, "detail": {"reason": failed}})
    ledger = store.ledger("shown", 1)
    for kind, each in (("outcomes", rows), ("proposals", proposals), ("events", events)):
        ledger.append(kind, each)
    ledger.flush()
    return Study.open(url, "shown")


@pytest.fixture(scope="module")
def whole() -> Page:
    return Page(report(study(20)))


def test_a_finished_study_has_every_section_in_order(whole: Page) -> None:
    assert whole.sections() == SECTIONS
    links = [attributes["href"] for attributes in whole.having("href")]
    assert links == [f"#{name}" for name in SECTIONS]


def test_the_page_fetches_nothing(whole: Page) -> None:
    assert not whole.having("src")
    assert not {tag for tag, _ in whole.tags} & {"link", "img", "iframe", "object", "embed"}
    policy = next(each["content"] for each in whole.having("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")


def test_the_front_shows_every_point_with_the_dense_model_and_the_knee(whole: Page) -> None:
    drawn = [tip for each in whole.having("data-tip") if (tip := each["data-tip"] or "").startswith("trial")]
    assert len({tip.split(" · ")[0] for tip in drawn if " · " in tip}) == 20
    assert any((each["data-tip"] or "").startswith("the unpruned model") for each in whole.having("data-tip"))
    assert "knee" in whole.text["front"] and "dense" in whole.text["front"]
    assert len(whole.of_class("knee")) == 1


def test_every_done_trial_is_a_line_of_the_search(whole: Page) -> None:
    lines = whole.of_class("trial")
    assert len(lines) == 20
    assert all(len((line["data-at"] or "").split()) == 4 for line in lines), "criterion, sparsity and two objectives"


def test_the_chosen_models_come_with_all_measures_and_their_change(whole: Page) -> None:
    for words in ("accuracy against dense", "compression ratio", "theoretical speedup", "points", "dense"):
        assert words in whole.text["chosen"]


def test_a_parameter_and_an_objective_of_one_name_are_told_apart(whole: Page) -> None:
    assert "reached sparsity" in whole.text["search"]


def test_sharing_and_provenance_say_what_the_ledger_says(whole: Page) -> None:
    assert "80 of 200" in whole.text["sharing"] and "120 (60%) were saved" in whole.text["sharing"]
    assert 'task = "nowhere.py"' in whole.text["provenance"] and "torch 2.13.0" in whole.text["provenance"]


def test_a_state_that_is_gone_is_said(whole: Page) -> None:
    assert "no longer in the store" in whole.text["lineage"]


def test_a_study_without_a_single_outcome_has_a_report() -> None:
    made = Page(report(study(0)))
    assert "Nothing is measured" in made.text[""]
    assert made.sections() == ["sharing", "checklist", "provenance"]


def test_a_study_of_one_trial_and_one_seed_has_a_report() -> None:
    made = Page(report(study(1, seeds=[0])))
    assert "One seed: no spread is known." in made.text["chosen"]
    assert "search" not in made.sections()


def test_bounds_that_nothing_keeps_are_said() -> None:
    made = Page(report(study(4, constraints={"accuracy": ">= 0.999"})))
    assert "No point keeps the study's constraints (accuracy >= 0.999)" in made.text[""]


def test_one_objective_is_drawn_over_sparsity() -> None:
    made = Page(report(study(6, objectives=["accuracy"], seeds=[0])))
    assert "sparsity" in made.text["front"]


def test_what_a_user_named_never_runs() -> None:
    opened = study(12, criteria=[HOSTILE, "magnitude"], failed=HOSTILE)
    made = Page(report(opened))
    assert made.scripts == [SCRIPT], "only the page's own script"
    assert not [tag for tag, _ in made.tags if tag == "img"]
    assert not [each for _, each in made.tags if any(name.startswith("on") for name in each)]
    assert HOSTILE in made.text["provenance"] and HOSTILE[:8] in made.text["chosen"], "it is shown as it is"


def test_the_policy_names_the_page_s_own_script() -> None:
    made = page("title", [])
    policy = re.search(r"script-src 'sha256-([^']+)'", made)
    found = re.search("<script>(.*)</script>", made, re.DOTALL)
    assert policy is not None and found is not None
    assert base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode() == policy[1]


def test_canary_text_that_is_not_escaped_would_be_seen() -> None:
    made = Page(page("title", [element("p", "HERE")]).replace("HERE", "<script>alert(1)</script>"))
    assert made.scripts != [SCRIPT]


def test_text_and_attributes_are_escaped() -> None:
    made = Page(page(HOSTILE, [element("p", HOSTILE, data_tip=HOSTILE), table([{HOSTILE: HOSTILE}])]))
    assert made.scripts == [SCRIPT] and made.having("data-tip")[0]["data-tip"] == HOSTILE


def test_the_command_writes_the_file(tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[3] / "examples" / "digits.toml"
    text = example.read_text().replace("trials = 12", "trials = 2").replace("epochs = 6", "epochs = 1")
    (tmp_path / "small.toml").write_text(text)
    opened = Study.load(tmp_path / "small.toml", tmp_path / "store")
    opened.run(LocalPool())
    command = ["report", "digits-sparsity", "-o", "out/report.html", "--store", str(tmp_path / "store")]
    code = "import sys; from orchestrator.cli import main; sys.argv[0] = 'orchardist'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "written: out/report.html\n"
    made = Page((tmp_path / "out" / "report.html").read_text())
    if made.of_class("knee"):
        assert "Prune" in made.text["lineage"] and "One initial state for each seed" in made.text["checklist"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the report .* cannot be written"):
        study(0).report(tmp_path / "file" / "report.html")


def test_a_thousand_trials_stay_below_five_megabytes() -> None:
    assert len(report(study(1000, seeds=[0])).encode()) < 5_000_000


# The parts


def test_a_parameter_that_decides_is_told_from_one_that_does_not() -> None:
    draws = np.random.default_rng(0)
    params = [{"decides": n % 2, "idle": int(draws.integers(2))} for n in range(40)]
    first, second = importances(params, [mix["decides"] + 0.1 * draws.random() for mix in params], maximise=True)
    assert first.parameter == "decides" and first.eta_squared is not None and first.eta_squared > 0.7
    assert first.p is not None and first.p < 1e-5 and first.best == "1"
    assert second.eta_squared is not None and second.eta_squared < 0.1 and second.p is not None and second.p > 0.05


def test_eta_squared_is_that_of_kruskal_and_wallis() -> None:
    from scipy.stats import kruskal

    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0, 5.0, 8.0]
    labels = list("aabbccabcabc")
    groups = [[v for v, other in zip(values, labels, strict=True) if other == label] for label in "abc"]
    h, p = kruskal(*groups)
    (found,) = importances([{"x": label} for label in labels], values, maximise=True)
    assert found.eta_squared == pytest.approx(max(0.0, (h - 3 + 1) / (12 - 3)))
    assert found.p == pytest.approx(p)


def test_the_best_group_follows_the_direction() -> None:
    params = [{"x": "low" if n < 6 else "high"} for n in range(12)]
    assert importances(params, list(range(12)), maximise=True)[0].best == "high"
    assert importances(params, list(range(12)), maximise=False)[0].best == "low"


def test_of_few_trials_nothing_is_said() -> None:
    few = LEAST_TRIALS - 1
    (found,) = importances([{"x": n % 2} for n in range(few)], list(range(few)), maximise=True)
    assert found.eta_squared is None and found.p is None


def test_a_parameter_with_one_value_or_of_failed_trials_is_left_out() -> None:
    assert importances([{"x": 1}] * 12, [float(n) for n in range(12)], maximise=True) == []
    assert importances([{"x": 1}, {"x": 2}], [1.0, float("nan")], maximise=True) == []


def test_many_numbers_are_cut_into_equal_groups() -> None:
    labels = grouped([n / 10 for n in range(20)])
    assert [labels.count(label) for label in dict.fromkeys(labels)] == [5, 5, 5, 5]
    assert grouped([1, 2, 1]) == ["1", "2", "1"] and grouped([True, False]) == ["True", "False"]


def facts(**more: Any) -> Facts:
    ratios = [2.0, 4.0, 8.0, 16.0, 32.0]
    point = {"accuracy": 0.9, "theoretical_speedup": 2.0}
    return Facts(
        **{
            "task": "digits",
            "builtin": "1,797 handwritten digits",
            "valid_examples": 100,
            "test_examples": 100,
            "seeds": 3,
            "objectives": [OBJECTIVES["accuracy"]],
            "dense": {"accuracy": 0.95, "total_params": 9, "layers": {"fc": [9, 9]}},
            "points": [point | {"compression_ratio": ratio} for ratio in ratios],
            "ratios": ratios,
            "mixes": [(criterion, scope) for criterion in ("magnitude", "random") for scope in ("global", "layer")],
            "starts": {0: frozenset({"a"})},
            "retraining": [],
            "versions": [{"torch": "2.13"}],
            **more,
        }
    )


def states(**more: Any) -> dict[str, str]:
    return {item.rule: item.state for item in checklist(facts(**more))}


def test_what_one_study_can_meet_is_met() -> None:
    unmet = {rule: state for rule, state in states().items() if state != "met"}
    assert len(unmet) == 3, "pairs of data and network, top-5 and the user's own code"


@pytest.mark.parametrize(
    ("more", "rule", "state"),
    [
        ({"seeds": 2}, "seeds", "in part"),
        ({"seeds": 1}, "seeds", "missing"),
        ({"mixes": [("magnitude", "global")]}, "Random pruning", "missing"),
        ({"mixes": [("magnitude", "global")]}, "Magnitude pruning", "in part"),
        ({"ratios": [2.0, 4.0]}, "whole curve", "in part"),
        ({"points": []}, "Compression ratio", "missing"),
        ({"dense": None}, "Raw accuracy", "missing"),
        ({"test_examples": None}, "test split", "in part"),
        ({"starts": {0: frozenset({"a", "b"})}}, "same initial weights", "missing"),
        ({"starts": {}}, "same initial weights", "yours to say"),
        ({"retraining": ["retrain"]}, "fine-tuning", "in part"),
        ({"versions": []}, "Versions", "missing"),
        ({"versions": [{"torch": "1"}, {"torch": "2"}]}, "Versions", "in part"),
        ({"builtin": ""}, "named exactly", "in part"),
    ],
)
def test_what_is_missing_is_said_as_missing(more: dict[str, Any], rule: str, state: str) -> None:
    assert [found for name, found in states(**more).items() if rule in name] == [state]


def test_top_five_is_found_under_any_spelling() -> None:
    assert states(dense={"top_5_accuracy": 0.99})["Top-1 and top-5 accuracy"] == "met"


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("accuracy", 0.1, 0.9), ("sparsity", 0.0, 1.0), ("bytes", 10.0, 1e7), ("loss", -2.0, 3.0), ("loss", 1.0, 1.0)],
)
def test_a_scale_keeps_order_and_holds_its_ends(name: str, low: float, high: float) -> None:
    found = scale(name, low, high)
    places = [
        found.place(value) for value in np.linspace(low, min(high, MOST_SPARSE) if name == "sparsity" else high, 9)
    ]
    assert places == sorted(places) and places[0] >= 0 and places[-1] <= 1
    assert found.ticks


def test_numbers_are_shown_as_people_read_them() -> None:
    assert shown("accuracy", 0.9123) == "91.23 %" and shown("bytes", 70976) == "70,976"
    assert shown("loss", None) == "–" and shown("loss", float("nan")) == "–" and shown("flag", True) == "True"


def test_numbers_on_colours_can_be_read() -> None:
    made = Page(page("t", [heat("m", ["a", "b"], [("x", [("1", "#f4f4f4", ""), ("2", "#0b4f86", "")])])]))
    looks = [each["style"] for each in made.having("style")]
    assert looks == ["background:#f4f4f4;color:#000000", "background:#0b4f86;color:#ffffff"]
    assert mixed("#000000", "#ffffff", 0.5) == "#808080"
