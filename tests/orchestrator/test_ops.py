"""Keys: equal for equal ops and never else, and the same tomorrow."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.canonical import canonical
from orchestrator.ops import (
    SHRUNK,
    Gather,
    Init,
    Op,
    Prune,
    Recalibrate,
    Recipe,
    Regrow,
    Rewind,
    Train,
    key,
    to_plain,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "keys.json"
RECIPE = Recipe(optimizer="adam", lr=1.2e-3, batch_size=60)

# Small domains, so that two draws are often equal or differ in one thing only.
RECIPES = st.builds(
    Recipe,
    optimizer=st.sampled_from(["adam", "sgd"]),
    lr=st.sampled_from([0.1, 1.0]),
    batch_size=st.sampled_from([1, 60]),
    horizon=st.sampled_from([0, 1]),
    milestones=st.sampled_from([(), (1,), (1, 2)]),
    momentum=st.sampled_from([0.0, 0.9]),
)
WHOLE = st.integers(0, 1)
OPS: st.SearchStrategy[Op] = st.one_of(
    st.builds(Init, seed=st.integers(0, 2), fresh=st.booleans()),
    st.builds(Train, recipe=RECIPES, order_seed=st.integers(0, 1), to=st.integers(0, 2), fresh_optimizer=st.booleans()),
    st.builds(
        Prune,
        criterion=st.sampled_from(["magnitude", "random"]),
        scope=st.sampled_from(["layer", "global"]),
        rate=st.sampled_from([None, 0.1, 0.2]),
        sparsity=st.sampled_from([None, 0.1, 0.2]),
        threshold=st.sampled_from([None, 0.1]),
        factors=st.sampled_from([(), (("a", 0.1),)]),
        targets=st.sampled_from([(), (("a", 0.1),)]),
        seed=st.sampled_from([None, 0, 1]),
        round=st.sampled_from([None, 0, 1]),
    ),
    st.builds(Gather, what=st.sampled_from([("gradient",), ("input_norm",)]), examples=WHOLE, seed=WHOLE, round=WHOLE),
    st.builds(Regrow, by=st.sampled_from(["set", "all"]), fraction=st.sampled_from([0.1, 0.2]), seed=st.none() | WHOLE),
    st.builds(Recalibrate, examples=WHOLE, seed=WHOLE),
    st.builds(Rewind, what=st.sampled_from(["weights", "lr"]), to=st.sampled_from([None, 0, 1])),
)
PARENTS = st.lists(st.sampled_from(["a" * 64, "b" * 64]), max_size=3)


@given(OPS, OPS, PARENTS, PARENTS, st.sampled_from(["t", "u"]), st.sampled_from(["t", "u"]))
def test_keys_are_equal_when_everything_is(
    one: Op, other: Op, parents: list[str], others: list[str], task: str, another: str
) -> None:
    equal = (type(one), one, parents, task) == (type(other), other, others, another)
    assert (key(one, parents, task) == key(other, others, another)) == equal
    assert (key(one, parents, task) == key(other, parents, task)) == (one == other)
    assert (canonical(one) == canonical(other) and type(one) is type(other)) == (one == other)


@pytest.mark.parametrize("op", get_args(Op), ids=lambda op: str(op.__name__))
def test_every_field_is_in_the_key(op: type[Op]) -> None:
    values: dict[str, Any] = {"recipe": RECIPE, "what": "weights", "criterion": "magnitude", "scope": "layer"}
    one: Any = op(**{f.name: values.get(f.name, 1) for f in fields(op)})
    for f in fields(op):
        changed = replace(one, **{f.name: replace(RECIPE, lr=1.0) if f.name == "recipe" else "changed"})
        assert key(changed, [], "t") != key(one, [], "t"), f.name


def test_a_new_field_at_its_default_keeps_old_keys() -> None:
    @dataclass(frozen=True, kw_only=True)
    class NewTrain(Train):
        lanes: int = 1

    NewTrain.__name__ = "Train"
    said: dict[str, Any] = {"recipe": RECIPE, "order_seed": 0, "to": 5}
    assert key(NewTrain(**said), ["a"], "t") == key(Train(**said), ["a"], "t")
    assert key(NewTrain(**said, lanes=2), ["a"], "t") != key(Train(**said), ["a"], "t")


def test_the_version_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(Init(seed=0), [], "t")
    monkeypatch.setattr(Init, "version", 2)
    assert key(Init(seed=0), [], "t") != before


def test_plain_form() -> None:
    assert to_plain(Train(recipe=RECIPE, order_seed=0, to=5)) == {
        "op": "Train",
        "recipe": {"optimizer": "adam", "lr": 1.2e-3, "batch_size": 60},
        "order_seed": 0,
        "to": 5,
    }


EXAMPLES: dict[str, tuple[Op, list[str]]] = {
    "init": (Init(seed=0), []),
    "train": (Train(recipe=RECIPE, order_seed=0, to=670), ["a"]),
    "train with everything": (
        Train(
            recipe=Recipe(
                optimizer="sgd",
                lr=0.1,
                batch_size=32,
                lr_schedule="cosine",
                horizon=1000,
                warmup=10,
                lr_final_fraction=0.1,
                momentum=0.9,
                weight_decay=5e-4,
                arithmetic="cuda float32",
            ),
            order_seed=7,
            to=1000,
            fresh_optimizer=True,
        ),
        ["a"],
    ),
    "prune by rate": (Prune(criterion="magnitude", scope="layer", rate=0.2, factors=(("out.weight", 0.5),)), ["a"]),
    "prune to a sparsity": (Prune(criterion="taylor", scope="global", sparsity=0.9, seed=0, round=1), ["a"]),
    "prune units": (
        Prune(
            criterion="taylor", scope="global", structure="channel", norm="l1", unit_sparsity=0.5, floor=1, round_to=8
        ),
        ["a", "b"],
    ),
    "prune to a budget": (Prune(criterion="magnitude", scope="layer", structure="2x2", flops_budget=0.4), ["a"]),
    "prune two of four": (Prune(criterion="sparsegpt", scope="layer", structure="2:4"), ["a", "b"]),
    "gather": (
        Gather(what=("hessian_blocks",), examples=256, seed=0, round=1, parameters=(("block", 64), ("exact_up_to", 9))),
        ["a"],
    ),
    "regrow": (Regrow(by="set", fraction=0.3, factors=(("out.weight", 0.0),), seed=0, round=1), ["a"]),
    "recalibrate": (Recalibrate(examples=512, seed=0), ["a"]),
    "train with a penalty, shrunk": (
        Train(
            recipe=Recipe(
                optimizer="adam",
                lr=1e-3,
                batch_size=60,
                arithmetic="cpu float32" + SHRUNK,
                penalty="group-lasso",
                penalty_strength=1e-4,
                gather=("movement",),
            ),
            order_seed=0,
            to=10,
        ),
        ["a"],
    ),
    "rewind": (Rewind(what="weights"), ["a", "b"]),
    "rewind lr": (Rewind(what="lr", to=402), ["a"]),
}


def test_keys_are_what_they_were() -> None:
    """A store is full of them: change an op's version rather than this file."""
    assert {name: key(op, parents, "t") for name, (op, parents) in EXAMPLES.items()} == json.loads(GOLDEN.read_text())
