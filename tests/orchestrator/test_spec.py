"""The study file: every name of it, every way to get it wrong, and a digest that says what decides its results."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from orchestrator.errors import SpecError
from orchestrator.spec import MOST_MIXES, StudySpec
from orchestrator.tasks.info import Layer, TaskInfo

HERE = Path(__file__).parents[1]
GOLDEN = HERE / "golden" / "spec_digests.json"
EXAMPLES = sorted((HERE.parent / "examples").glob("*.toml"))
SMALL = 'name = "a"\ntask = "digits"\n'

WHOLE = """
name = "mnist-lenet"
task = "mnist"
trials = 40
seeds = [0]
objectives = ["accuracy", "sparsity"]
sampler = "tpe"

[task_params]
hidden = 300

[train]
epochs = 10
retrain_epochs = 4
optimizer = "adam"
lr = 1.2e-3
lr_schedule = "cosine"
batch_size = 60

[prune]
ignore = []
layer_factors = { "*.out" = 0.5 }

[space]
criterion = ["magnitude", "taylor", "random"]
scope = "layer"
rate = { low = 0.1, high = 0.5, step = 0.05 }
rounds = { low = 1, high = 5 }
retrain = ["finetune", "rewind", "lr-rewind"]
rewind_epoch = { choices = [0, 1, 2], when = { retrain = ["rewind"] } }

[constraints]
worst_class_accuracy = ">= 0.8"
"""
"""The example of the design, word for word."""

EVERYTHING = """
name = "every.thing_1-x"
task = "my task.py"
trials = 0
seeds = [3, 1]
objectives = ["loss", "flops", "bytes"]
sampler = "nsga2"
sampler_seed = 7
[task_params]
"quoted key" = 'tab \\ "quote" \\u007f ünï'
nested = { list = [1, 2.5, true, "x", [], [{ a = 1 }, {}]], empty = {} }
[train]
epochs = 2.5
optimizer = "sgd"
lr_schedule = "step"
lr_step_epochs = [1, 2]
lr_step_factor = 0.5
momentum = 0.9
weight_decay = 5e-4
warmup_epochs = 0.5
evaluate_every = 1
[prune]
ignore = ["conv1", "*.out"]
threshold_any_criterion = true
[space]
lr = { low = 1e-05, high = 1e-1, log = true }
sparsity = 0.9
allocation = "given"
structure = "weight"
schedule = ["linear", "cubic"]
phase = "after"
rounds = { value = 3 }
lr_step_epochs = { value = [1.0, 2.0] }
criterion = ["taylor", "my.module:function"]
[space.layers."conv*"]
sparsity = { low = 0.1, high = 0.3 }
[space.criteria.taylor]
examples = { choices = [64, 256], when = { criterion = "taylor" } }
[space.criteria."my.module:function"]
strength = [1, 2]
[constraints]
loss = "<= dense * 1.5"
[[enqueue]]
lr = 0.01
schedule = "cubic"
[enqueue.layers."conv*"]
sparsity = 0.2
[[enqueue]]
criterion = "taylor"
criteria.taylor.examples = 64
[[enqueue]]
"""


def spec(text: str = "", **data: Any) -> StudySpec:
    return StudySpec.parse(SMALL + text, "study.toml") if text else StudySpec(name="a", task="digits", **data)


# Reading.


def test_the_example_of_the_design() -> None:
    study = StudySpec.parse(WHOLE)
    assert (study.name, study.task, study.trials, study.seeds, study.sampler) == (
        "mnist-lenet",
        "mnist",
        40,
        (0,),
        "tpe",
    )
    assert study.task_params == {"hidden": 300} and study.train.lr == 1.2e-3
    assert study.prune.layer_factors == {"*.out": 0.5} and study.constraints == {"worst_class_accuracy": ">= 0.8"}
    assert study.search_space().names == ("criterion", "scope", "rate", "rounds", "retrain", "rewind_epoch")
    assert len(study.check_mixes()) == 3 * 2 * 2 * (1 + 3 + 1)


def test_everything_that_a_study_file_can_say() -> None:
    study = StudySpec.parse(EVERYTHING)
    assert study.train.lr_step_epochs == (1, 2) and study.train.momentum == 0.9
    assert study.functions() == ["my.module:function"]
    assert study.points() == [
        {"lr": 0.01, "schedule": "cubic", "layers.conv*.sparsity": 0.2},
        {"criterion": "taylor", "criteria.taylor.examples": 64},
        {},
    ]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.name))
def test_the_examples(path: Path) -> None:
    StudySpec.load(path).check_mixes()


def test_python_can_do_all_that_toml_can() -> None:
    for text in (WHOLE, EVERYTHING):
        assert StudySpec(**tomllib.loads(text)) == StudySpec.parse(text)
    made = spec(space={"rate": ("x", "y")[:0] or (0.1, 0.2)}, enqueue=[{"rate": 0.2}], train={"lr": 1})
    assert made == spec("[train]\nlr = 1.0\n[space]\nrate = [0.1, 0.2]\n[[enqueue]]\nrate = 0.2\n")


def test_the_callers_tables_are_not_kept() -> None:
    space = {"rate": {"low": 0.1, "high": 0.2}}
    made = spec(space=space)
    space["rate"]["low"] = 0.15
    assert made.space == {"rate": {"low": 0.1, "high": 0.2}}


def test_the_schema_names_every_field() -> None:
    schema = StudySpec.model_json_schema()
    assert set(schema["properties"]) == set(StudySpec.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["TrainSettings"]["properties"]["lr"]["exclusiveMinimum"] == 0
    json.dumps(schema)


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot read the study file '.*': No such file"):
        StudySpec.load(tmp_path / "missing.toml")
    with pytest.raises(SpecError, match="cannot read the study file '.*': Is a directory"):
        StudySpec.load(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="not a text file in UTF-8"):
        StudySpec.load(tmp_path / "binary.toml")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(SMALL, encoding="utf-8-sig")
    assert StudySpec.load(tmp_path / "study.toml") == spec()


# Wrong input: one or two lines that name the place and what would be legal.

RATE = "[space]\nrate = 0.2\n"
NO_WHOLE = [("true", "True"), ('"4"', "'4'"), ("4.0", "4.0")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trails = 3", "unknown key at the top level: 'trails'; did you mean 'trials'? Known: checkpoint, "),
        ("self = 3", "unknown key at the top level: 'self'. Known: "),
        ("[train]\nepoch = 3", "unknown key in [train]: 'epoch'; did you mean 'epochs'? Known: batch_size, "),
        ("[prune]\nignored = []", "unknown key in [prune]: 'ignored'; did you mean 'ignore'? Known: "),
        ("[train\nlr = 1", "not valid TOML: Expected ']' at the end of a table declaration (at line 3, column 7)"),
        ("[train]\nlr =", "not valid TOML: Invalid value (at line 4, the end of the file)"),
        ('name = "b"\ntrials = 1', "not valid TOML: Cannot overwrite a value (at line 3, column 11)"),
        ('sampler = "tep"', "sampler: unknown sampler 'tep'; did you mean 'tpe'? Known: gp, grid, "),
        ("seeds = []", "seeds: must not be empty"),
        ("seeds = [-1]", "seeds.0: must be greater than or equal to 0 (got -1)"),
        ("seeds = [1, 1]", "seeds: must not repeat a value"),
        ('objectives = ["loss", "loss"]', "objectives: must not repeat a value"),
        *[(f"trials = {value}", f"trials: must be a whole number (got {shown})") for value, shown in NO_WHOLE],
        ("seeds = [0, true]", "seeds.1: must be a whole number (got True)"),
        ('[train]\nlr = "0.1"', "train.lr: must be a number (got '0.1')"),
        ("[train]\nlr = true", "train.lr: must be a number (got True)"),
        ('[train]\nlr_step_epochs = [1, "2"]', "train.lr_step_epochs.1: must be a number (got '2')"),
        ("[prune]\nlayer_factors = { out = true }", "prune.layer_factors.out: must be a number (got True)"),
        ("[train]\nepochs = 1e308", "train.epochs: must be less than or equal to 1000000 (got 1e+308)"),
        ("[train]\nbatch_size = 10_000_000_000", "train.batch_size: must be less than or equal to 1000000000 (got "),
        ('[space]\nrate = "0.5"', "space.rate: must be a number (got '0.5')"),
        ("[space]\nrate = [0.5, true]", "space.rate: must be a number (got True)"),
        (RATE + "rounds = [true, 2]", "space.rounds: must be a whole number (got True)"),
        (RATE + "rounds = { low = 1, high = 3, step = 0.5 }", "space.rounds: must be a whole number (got 1.0)"),
        (RATE + "rounds = { low = 1, high = 1.0 }", "space.rounds: must be a whole number (got 1.0)"),
        (RATE + "batch_size = { low = 8.0, high = 32.0 }", "space.batch_size: must be a whole number (got 8.0)"),
        (RATE + "batch_size = [8, 16.0]", "space.batch_size: must be a whole number (got 16.0)"),
        (f"trials = {'9' * 5000}", "a number is too long: Exceeds the limit (4300 digits)"),
        (f"[task_params]\nx = {'[' * 3000}{']' * 3000}", "tables and lists lie too deep within each other"),
        (
            f"[task_params]\n{'x.' * 3000}x = 1",
            "task_params: tables and lists lie too deep within each other; legal: 64",
        ),
        ("trials = -1", "trials: must be greater than or equal to 0 (got -1)"),
        ("[train]\nlr = 0", "train.lr: must be greater than 0 (got 0)"),
        ("[train]\nlr = nan", "train.lr: must be a finite number (got nan)"),
        ('[train]\noptimizer = "adan"', "train.optimizer: must be 'adam', 'adamw' or 'sgd' (got 'adan')"),
        ("[prune]\nlayer_factors = { out = -1 }", "prune.layer_factors: the factor of 'out' is -1; legal: 0 or more"),
        ("[task_params]\nday = 1979-05-27", "task_params: day = datetime.date(1979, 5, 27) must be text, a finite"),
        ("[task_params]\nx = [inf]", "task_params: x = inf must be text, a finite number"),
        ("[space]\nrates = 0.2", "unknown parameter in [space] 'rates'; did you mean 'rate'? Known: allocation, "),
        (RATE + "evaluate_every = 1", "unknown parameter in [space] 'evaluate_every'; did you mean"),
        ("[space]\nrate = 1.5", "space.rate: must be less than 1 (got 1.5)"),
        ("[space]\nrate = 0", "space.rate: must be greater than 0 (got 0)"),
        ("[space]\nrate = { low = 0.1, high = 1.0 }", "space.rate: must be less than 1 (got 1.0)"),
        ("[space]\nrate = { low = 0.1, high = 0.5, setp = 1 }", "space.rate: has the unknown key 'setp'. Known: "),
        (RATE + "rounds = { low = 0, high = 5 }", "space.rounds: must be greater than or equal to 1 (got 0)"),
        (
            RATE + 'criterion = ["magnitude", "taylr"]',
            "space.criterion: unknown criterion 'taylr'; did you mean 'taylor'",
        ),
        (RATE + 'scope = "globel"', "space.scope: unknown scope 'globel'; did you mean 'global'? Known: global, layer"),
        (RATE + 'retrain = ["rewnd"]', "space.retrain: must be 'none', 'finetune', 'rewind', 'lr-rewind' or 'reinit'"),
        (RATE + "rewind_epoch = { choices = [1], when = { retrain = 1 } }", "space.rewind_epoch: when names 'retrain'"),
        (RATE + "[space.layer.conv]\nrate = 0.1", "unknown table [space.layer]; legal: [space.criteria.NAME], "),
        (
            RATE + "[space.layers.conv]\nrate = [0.1, 1.0]",
            "space.layers.conv.rate = 1.0 must be a number from 0 to below 1",
        ),
        (
            RATE + "[space.criteria.taylor]\nexample = 3",
            "criterion 'taylor' has no parameter 'example'; legal: examples",
        ),
        (RATE + "[space.criteria.tylor]\nexamples = 3", "unknown criterion 'tylor'; did you mean 'taylor'? Known: "),
        (
            "[space]\nrate = [0.1, 0.2]\n[[enqueue]]\nrate = 0.1\n[[enqueue]]\nrate = 0.9",
            "enqueue 2: rate = 0.9 is not legal",
        ),
        (RATE + "[[enqueue]]\nrates = 0.1", "enqueue 1: 'rates' is no parameter of the space. Known: rate"),
        ('sampler = "grid"\n[space]\nrate = { low = 0.1, high = 0.5 }', "a grid needs a step, integers or choices"),
        ('[constraints]\naccuracy = "0.9"', "constraints: cannot read the bound '0.9'"),
        (
            '[constraints]\ntest_accuracy = ">= 0.9"',
            "constraints: 'test_accuracy': the test split is only ever reported",
        ),
    ],
)
def test_wrong_input(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(text)
    lines = str(caught.value).splitlines()
    assert message in lines[0]
    assert len(lines) <= 2 and all(line.startswith("study.toml: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'a/b'\ntask = 'x'", "name: must be letters, digits, '.', '_' and '-'"),
        ("task = 'x'", "name: field required"),
        ("name = 'x'", "task: field required"),
    ],
)
def test_a_study_has_a_name_and_a_task(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        StudySpec.parse(text)


@pytest.mark.parametrize("value", [None, {1: 2}, object(), [{"x": None}], b"x", float("nan")])
def test_what_toml_cannot_hold_is_refused_in_python_too(value: object) -> None:
    with pytest.raises(SpecError, match="task_params"):
        spec(task_params={"x": value})


# Mixes of choices.


@pytest.mark.parametrize(
    ("text", "message", "mix"),
    [
        ('scope = "layer"', "given: none", "scope = 'layer'"),
        ("", "given: none", "an empty space"),
        ("rate = 0.2\nsparsity = [0.5]", "given: rate and sparsity", "rate = 0.2, sparsity = 0.5"),
        (
            'rate = 0.2\nretrain = ["finetune", "lr-rewind"]',
            "under a constant learning rate is the same as 'finetune'",
            "rate = 0.2, retrain = 'lr-rewind'",
        ),
        (
            'rate = 0.2\nretrain = "rewind"\nrewind_epoch = { low = 0, high = 12 }',
            "legal: below epochs = 10",
            "rewind_epoch = 12",
        ),
    ],
)
def test_a_mix_without_sense_is_refused_before_anything_runs(text: str, message: str, mix: str) -> None:
    study = spec("[space]\n" + text)
    with pytest.raises(SpecError) as caught:
        study.check_mixes()
    reason, where = str(caught.value).splitlines()
    assert reason.startswith("space: ") and message in reason
    assert mix in where and "a `when` can keep choices apart" in where


def test_a_when_keeps_choices_apart() -> None:
    text = 'retrain = ["finetune", "lr-rewind"]\nlr_schedule = { value = "cosine", when = { retrain = "lr-rewind" } }'
    assert len(spec(RATE + text).check_mixes()) == 2


def test_large_spaces_are_sampled_all_over() -> None:
    space = {name: {"low": 0.1, "high": 0.2} for name in ("lr", "rate", "weight_decay", "momentum", "lr_step_factor")}
    space |= {"retrain": ["finetune", "lr-rewind"], "rounds": [*range(1, 100)], "batch_size": [*range(1, 100)]}
    study = spec(space=dict(reversed(space.items())))
    mixes = study.mixes()
    assert len(mixes) == MOST_MIXES and mixes == study.mixes()
    assert {mix["rounds"] for mix in mixes} == set(range(1, 100))
    with pytest.raises(SpecError, match="lr-rewind"):
        study.check_mixes()


def test_mixes_take_ranges_at_their_ends() -> None:
    study = spec("[space]\nrate = { low = 0.1, high = 0.5, step = 0.15 }\nrounds = { low = 1, high = 5 }")
    assert [tuple(mix.values()) for mix in study.mixes()] == [(0.1, 1), (0.1, 5), (0.4, 1), (0.4, 5)]


# The digest and the way back to TOML.


def test_the_digest_leaves_out_how_far_a_study_is_run() -> None:
    study = StudySpec.parse(EVERYTHING)
    assert study.model_copy(update={"trials": 99, "enqueue": ()}).digest() == study.digest()
    plain = study.model_dump(exclude_defaults=True) | {"stopping": {"rule": "halving", "bracket": 9}}
    assert StudySpec(**plain).digest() == study.digest()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("name", "b"), ("task", "mnist"), ("seeds", [1]), ("objectives", ["loss"]), ("sampler", "random")],
        *[("sampler_seed", 1), ("task_params", {"size": 28}), ("train", {"lr": 0.1}), ("prune", {"ignore": ["a"]})],
        *[("space", {"rate": 0.2}), ("constraints", {"loss": "<= 1"}), ("checkpoint", "w.pt")],
        *[("tickets", {"draws": 2}), ("warm_start", ["before"])],
    ],
)
def test_everything_else_is_in_the_digest(name: str, value: object) -> None:
    said = {"name": "a", "task": "digits"}
    assert StudySpec(**said | {name: value}).digest() != StudySpec(**said).digest()


def test_the_order_of_the_space_is_in_the_digest() -> None:
    """It decides what proposal n is, on a grid above all."""
    one, other = spec(space={"rate": [0.1, 0.2], "rounds": [1, 2]}), spec(space={"rounds": [1, 2], "rate": [0.1, 0.2]})
    assert one.digest() != other.digest()


def test_those_are_all_the_fields() -> None:
    marks = getattr(test_everything_else_is_in_the_digest, "pytestmark")  # noqa: B009 - unknown to type checkers
    assert {name for name, _ in marks[0].args[1]} | {
        "trials",
        "enqueue",
        "keep",
        "max_store_gb",
        "stopping",
        "checkpoint_minutes",
        "timeout_seconds",
    } == set(StudySpec.model_fields)


def test_what_is_said_at_its_default_changes_nothing() -> None:
    assert (
        spec("trials = 20\nseeds = [0]\n[train]\nepochs = 10\nlr = 1e-3\n[prune]\nignore = []").digest()
        == spec().digest()
    )


def test_a_new_field_at_its_default_keeps_old_digests() -> None:
    class NewSpec(StudySpec):
        budget_epochs: float = Field(default=0)

    for text in (WHOLE, EVERYTHING):
        assert NewSpec.parse(text).digest() == StudySpec.parse(text).digest()
    assert NewSpec(name="a", task="digits", budget_epochs=1.0).digest() != spec().digest()


def test_digests_are_what_they_were() -> None:
    """Studies in a store are found by them."""
    found = {
        "small": spec().digest(),
        "design": StudySpec.parse(WHOLE).digest(),
        "all": StudySpec.parse(EVERYTHING).digest(),
    }
    assert found == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("text", [SMALL, WHOLE, EVERYTHING, *(path.read_text() for path in EXAMPLES)])
def test_back_to_toml(text: str) -> None:
    study = StudySpec.parse(text)
    again = StudySpec.parse(study.to_toml())
    assert again == study and again.digest() == study.digest()
    assert again.to_toml() == study.to_toml()
    assert again.search_space() == study.search_space()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@given(task_params=st.dictionaries(TEXT, PLAIN, max_size=4), patterns=st.lists(TEXT, max_size=3), task=TEXT)
def test_any_plain_data_come_back_from_toml(task_params: dict[str, Any], patterns: list[str], task: str) -> None:
    study = StudySpec(
        name="a",
        task=task,
        task_params=task_params,
        prune={"ignore": patterns, "layer_factors": dict.fromkeys(patterns, 0.5)},
    )
    again = StudySpec.parse(study.to_toml())
    assert again == study and again.digest() == study.digest()


@given(
    lr=st.floats(1e-12, 1e3),
    rates=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4, unique=True),
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3, unique=True),
    data=st.data(),
)
def test_any_study_comes_back_from_toml(lr: float, rates: list[float], seeds: list[int], data: st.DataObject) -> None:
    enqueue = [{"rate": data.draw(st.sampled_from(rates))} for _ in range(data.draw(st.integers(0, 3)))]
    study = spec(seeds=seeds, train={"lr": lr}, space={"rate": rates, "rounds": {"low": 1, "high": 3}}, enqueue=enqueue)
    again = StudySpec.parse(study.to_toml())
    assert again == study and again.digest() == study.digest() and again.points() == enqueue


def test_the_layers_of_a_task_are_not_the_specs_business() -> None:
    info = TaskInfo(digest="t", layers=(Layer(name="a.weight", shape=(4,)),), train_examples=1)
    assert info.layers[0].label == "a"
    assert spec('[prune]\nignore = ["no such layer"]\n' + RATE).check_mixes()
