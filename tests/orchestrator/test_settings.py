"""One trial's settings: the sampler's choices over the study's constants, and what goes together."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import settings
from orchestrator.errors import InputError, PlanError
from orchestrator.mixes import resolve
from orchestrator.settings import (
    IN_SPACE,
    Choices,
    PruneSettings,
    Settings,
    TrainSettings,
    check_value,
    during,
)


def chosen(train: dict[str, Any] | None = None, prune: dict[str, Any] | None = None, **params: Any) -> Settings:
    """The settings of a trial; by default one round at rate 0.2, fine-tuned."""
    much = {"rate", "sparsity", "threshold"} & params.keys()
    said = ({} if much else {"rate": 0.2}) | params
    return resolve(TrainSettings(**train or {}), PruneSettings(**prune or {}), said)


def test_the_samplers_choices_lie_over_the_studys_constants() -> None:
    found = chosen({"lr": 0.1, "batch_size": 10}, {"ignore": ["out"]}, lr=0.2, rounds=3, criterion="taylor")
    assert (found.train.lr, found.train.batch_size, found.choices.rounds) == (0.2, 10, 3)
    assert found.choices.criterion == "taylor" and found.prune.ignore == ("out",)
    assert found.choices.model_fields_set == {"rate", "rounds", "criterion"}


def test_parameters_of_other_criteria_and_defaults_are_left_out() -> None:
    name = "criteria.taylor.examples"
    assert chosen(criterion="taylor", **{name: 64}).criterion_parameters == {"examples": 64}
    assert chosen(criterion="taylor", **{name: 1024}).criterion_parameters == {}
    assert chosen(criterion="magnitude", **{name: 64}).criterion_parameters == {}


def test_targets_of_layers_by_pattern() -> None:
    found = chosen(**{"layers.conv*.rate": 0.5, "layers.block.0.fc.rate": 0})
    assert found.layer_targets == {"conv*": 0.5, "block.0.fc": 0.0}


@given(epochs=st.floats(0.5, 100))
def test_during_is_the_middle_half_unless_said(epochs: float) -> None:
    assert during(chosen({"epochs": epochs}, phase="during")) == (epochs / 4, epochs * 3 / 4)
    said = during(chosen({"epochs": epochs}, phase="during", prune_begin=epochs / 8, prune_end=epochs / 2))
    assert said == (epochs / 8, epochs / 2)


@pytest.mark.parametrize(
    ("train", "prune", "params", "message"),
    [
        ({}, {}, {"rate": 1.0}, "rate: must be less than 1 (got 1.0)"),
        ({}, {}, {"rate": 0.0}, "rate: must be greater than 0 (got 0.0)"),
        ({}, {}, {"sparsity": 1.5}, "sparsity: must be less than 1 (got 1.5)"),
        ({}, {}, {"rounds": 0}, "rounds: must be greater than or equal to 1 (got 0)"),
        ({}, {}, {"rounds": 2.0}, "rounds: must be a whole number (got 2.0)"),
        ({}, {}, {"rate": "0.5"}, "rate: must be a number (got '0.5')"),
        *[
            ({}, {}, {name: 1e308}, f"{name}: must be less than or equal to 1000000 (got 1e+308)")
            for name in ("epochs", "retrain_epochs", "warmup_epochs", "rewind_epoch", "prune_begin", "prune_end")
        ],
        *[
            ({}, {}, {name: 10**10}, f"{name}: must be less than or equal to 1000000000 (got 10000000000)")
            for name in ("batch_size", "rewind_step")
        ],
        ({}, {}, {"lr": -1}, "lr: must be greater than 0 (got -1)"),
        ({}, {}, {"evaluate_every": 1}, "evaluate_every: extra inputs are not permitted"),
        ({}, {}, {"criterion": "magnitud"}, "unknown criterion 'magnitud'; did you mean 'magnitude'? Known: "),
        ({}, {}, {"scope": "rows"}, "unknown scope 'rows'"),
        ({}, {}, {"schedule": "cubical"}, "unknown schedule 'cubical'; did you mean 'cubic'?"),
        ({}, {}, {"allocation": "erg"}, "unknown allocation 'erg'; did you mean 'erk'?"),
        (
            {},
            {},
            {"rate": 0.1, "sparsity": 0.1},
            "given: rate and sparsity",
        ),
        ({}, {}, {"rate": None}, "given: none"),
        (
            {},
            {},
            {"threshold": 0.1, "criterion": "taylor"},
            "legal: magnitude, or prune.threshold_any_criterion = true",
        ),
        ({}, {}, {"retrain": "lr-rewind"}, "legal with it: lr_schedule step, linear or cosine"),
        ({"lr_schedule": "step", "epochs": 3}, {}, {"retrain": "lr-rewind"}, "goes back 4 of only 3 epochs"),
        ({}, {}, {"retrain": "rewind", "rewind_epoch": 10}, "legal: below epochs = 10"),
        ({}, {}, {"retrain": "rewind", "rewind_epoch": 1, "rewind_step": 9}, "legal: one of them"),
        ({"epochs": 0}, {}, {"retrain": "reinit"}, "legal: more epochs, or 'none' or 'finetune'"),
        ({"retrain_epochs": 0}, {}, {}, "with retrain_epochs = 0 trains nothing"),
        ({"lr_schedule": "linear", "lr_final_fraction": 0}, {}, {}, "legal: lr_final_fraction > 0"),
        ({}, {}, {"phase": "before", "retrain": "rewind"}, "legal in 'before': none"),
        ({"epochs": 0}, {}, {"phase": "before"}, "but epochs = 0"),
        ({}, {}, {"phase": "during", "prune_begin": 8, "prune_end": 2}, "must lie inside training (0 to 10)"),
        ({}, {}, {"phase": "during", "prune_end": 10}, "must lie inside training (0 to 10)"),
        ({}, {}, {"allocation": "erk"}, "legal with it: sparsity"),
        ({}, {}, {"sparsity": 0.5, "scope": "global", "allocation": "erk"}, "for scope 'layer'"),
        ({}, {}, {"sparsity": 0.5, "allocation": "given"}, "go together"),
        ({}, {}, {"sparsity": 0.5, "layers.a.sparsity": 0.5}, "go together"),
        (
            {},
            {},
            {"threshold": 0.5, "layers.a.rate": 0.5},
            "layers.a.rate: per-layer targets go with rate or a final sparsity",
        ),
        ({}, {}, {"layers.a.sparsity": 0.5}, "the study prunes by rate; legal here: layers.a.rate"),
        ({}, {}, {"layers.a.rate": 1}, "layers.a.rate = 1 must be a number from 0 to below 1"),
        ({}, {}, {"layers.a.rate": "half"}, "layers.a.rate = 'half' must be a number"),
        ({}, {}, {"layers.a.rate": -0.5}, "layers.a.rate = -0.5 must be a number"),
        ({}, {}, {"layers.rate": 0.5}, "reads layers.PATTERN.rate"),
        ({}, {}, {"criteria.magnitude.examples": 3}, "criterion 'magnitude' has no parameter 'examples'; legal: none"),
        (
            {},
            {},
            {"criterion": "taylor", "criteria.taylor.examples": 0},
            "criteria.taylor.examples = 0 must be 1 or more",
        ),
        ({}, {}, {"criterion": "taylor", "criteria.taylor.examples": 1.5}, "must be like its default, 1024"),
    ],
)
def test_refused_with_the_reason(
    train: dict[str, Any], prune: dict[str, Any], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        chosen(train, prune, **params)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_threshold_on_other_scores_can_be_allowed() -> None:
    found = chosen(prune={"threshold_any_criterion": True}, threshold=0.1, criterion="taylor")
    assert found.choices.threshold == 0.1


def test_whole_numbers_and_lists_are_numbers_too() -> None:
    found = chosen({"lr": 1, "lr_step_epochs": [1, 2.5]}, {"layer_factors": {"out": 1}}, momentum=0)
    assert (found.train.lr, found.train.lr_step_epochs, found.prune.layer_factors) == (1.0, (1.0, 2.5), {"out": 1.0})
    assert isinstance(found.train.lr, float) and isinstance(found.train.momentum, float)


@pytest.mark.parametrize("section", [TrainSettings, PruneSettings, Choices])
def test_every_default_is_legal(section: type[settings.Section]) -> None:
    section.model_validate(section().model_dump())


@pytest.mark.parametrize("name", IN_SPACE)
def test_every_name_of_the_space_is_checked_by_its_section(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}"):
        check_value(name, {"no": "value"})


def test_the_names_of_the_space() -> None:
    assert set(IN_SPACE) == {*Choices.model_fields, *TrainSettings.model_fields} - {"evaluate_every"}
    assert set(Choices.model_fields).isdisjoint(TrainSettings.model_fields)
    assert set(get_args(settings.Retrain)) == {"none", "finetune", "rewind", "lr-rewind", "reinit"}
    assert set(get_args(settings.Phase)) == {"before", "during", "after", "ticket"}


def test_defaults_are_what_they_were() -> None:
    """They are left out of digests, so that changing one changes what old studies mean."""
    assert TrainSettings().model_dump() == {
        "epochs": 10,
        "retrain_epochs": 4,
        "optimizer": "adam",
        "lr": 1e-3,
        "lr_schedule": "constant",
        "lr_final_fraction": 0.1,
        "lr_step_epochs": (),
        "lr_step_factor": 0.1,
        "batch_size": 64,
        "momentum": 0,
        "weight_decay": 0,
        "warmup_epochs": 0,
        "evaluate_every": 0,
        "penalty": "none",
        "penalty_strength": 0,
        "shrunk": False,
    }
    assert PruneSettings().model_dump() == {
        "ignore": (),
        "layer_factors": {},
        "threshold_any_criterion": False,
        "floor": 1,
        "round_to": 1,
        "recalibrate": 0,
    }
    assert {name: value for name, value in Choices().model_dump().items() if value is not None} == {
        "criterion": "magnitude",
        "scope": "layer",
        "allocation": "uniform",
        "structure": "weight",
        "threshold_unit": "absolute",
        "rounds": 1,
        "schedule": "exponential",
        "phase": "after",
        "retrain": "finetune",
        "rewind_epoch": 0,
        "fold": False,
        "norm": "",
        "regrow": "none",
        "regrow_fraction": 0.3,
        "regrow_every": 1,
        "searches": 1,
        "vary": "order",
        "data_share": 0.5,
        "rule": "intersection",
    }
