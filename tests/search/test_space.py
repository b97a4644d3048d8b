"""The search space: parsing, what is legal, what applies, grids."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.space import Choice, Fixed, Range, Space, SpaceError, flatten, parse

STUDY = """
criterion = ["magnitude", "taylor", "random"]
scope = "layer"
rewind_epoch = { choices = [0, 1, 2], when = { retrain = ["rewind"] } }
rate = { low = 0.1, high = 0.5, step = 0.05 }
rounds = { low = 1, high = 5 }
retrain = ["finetune", "rewind"]
lr = { low = 1e-4, high = 0.1, log = true }
ignored = { value = ["conv1", "fc"] }
[criteria.taylor]
examples = { choices = [64, 256], when = { criterion = "taylor" } }
[layers."conv*"]
rate = { low = 0.1, high = 0.3, step = 0.1 }
"""


@pytest.fixture
def space() -> Space:
    return parse(tomllib.loads(STUDY))


def test_a_table_becomes_parameters(space: Space) -> None:
    assert space.parameter("criterion") == Choice(name="criterion", values=("magnitude", "taylor", "random"))
    assert space.parameter("scope") == Fixed(name="scope", value="layer")
    assert space.parameter("ignored") == Fixed(name="ignored", value=["conv1", "fc"])
    assert space.parameter("rounds") == Range(name="rounds", low=1, high=5, integer=True)
    assert space.parameter("layers.conv*.rate") == Range(
        name="layers.conv*.rate", low=0.1, high=0.3, step=0.1, integer=False
    )
    assert space.parameter("criteria.taylor.examples").when == {"criterion": ("taylor",)}


def test_parents_come_before_what_depends_on_them(space: Space) -> None:
    assert space.names.index("retrain") < space.names.index("rewind_epoch")
    assert space.names[:2] == ("criterion", "scope")


def test_what_a_parameter_can_be(space: Space) -> None:
    assert space.possible("rate") == (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
    assert space.possible("rounds") == (1, 2, 3, 4, 5)
    assert space.possible("scope") == ("layer",)
    assert space.possible("lr") is None
    assert space.possible("absent") == ()
    assert parse({"a": {"low": 0.0, "high": 1.0, "step": 0.3}}).possible("a") == (0.0, 0.3, 0.6, 0.9)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": {"low": 0.5, "high": 0.1}}, r"space\.a: low 0\.5 is above high 0\.1"),
        ({"a": {"low": 0.5}}, "has no high"),
        ({"a": {"low": 0, "high": 1, "log": True}}, "low must be above 0 on a log scale, not 0"),
        ({"a": {"low": 1, "high": 8, "log": True, "step": 1}}, "a step or a log scale, not both"),
        ({"a": {"low": 1, "high": 8, "step": 0}}, "step must be above 0, not 0"),
        ({"a": {"low": 1, "high": 8, "log": "yes"}}, "log must be true or false"),
        ({"a": {"low": "1", "high": 8}}, "low must be a finite number, not '1'"),
        ({"a": {"low": True, "high": 8}}, "low must be a finite number, not True"),
        ({"a": {"low": 1.0, "high": float("inf")}}, "high must be a finite number, not inf"),
        ({"a": {"low": 1, "high": 10**400}}, r"space\.a: high must be a finite number, not an integer above 1\.8e308$"),
        ({"a": {"low": -(10**5000), "high": 1.0}}, r"low must be a finite number, not an integer below -1\.8e308$"),
        ({"a": {"low": 1, "high": 8, "step": 10**400}}, "step must be a finite number, not an integer above"),
        (
            {"a": {"choices": [1], "when": {"b": [10**400]}}, "b": {"low": 1, "high": 5}},
            "b = an integer above .* is not",
        ),
        ({"a": {"low": 1, "hihg": 8}}, "unknown key 'hihg'. Known: high, log, low, step, when"),
        ({"a": {"choices": [1], "low": 2}}, "unknown key 'low'. Known: choices, when"),
        ({"a": {"choices": []}}, "has no choices"),
        ({"a": []}, "has no choices"),
        ({"a": {"choices": "xy"}}, "choices must be a list, not 'xy'"),
        ({"a": ["x", "y", "x"]}, "lists 'x' twice"),
        ({"a": {"choices": [1], "when": {"b": [1]}}}, "names 'b', which is unknown. Known: a"),
        ({"a": {"choices": [1], "when": 3}}, "when must be a table"),
        ({"a": {"choices": [1], "when": {"b": []}}, "b": 1}, "when gives no value for 'b'"),
        ({"a": {"choices": [1], "when": {"b": [3]}}, "b": [1, 2]}, "a: when: b = 3 is not legal; it is 1 or 2"),
        ({"a": {"choices": [1], "when": {"b": [9]}}, "b": {"low": 1, "high": 5}}, "b = 9 .* an integer from 1 to 5"),
        ({"a": {"choices": [1], "when": {"a": [1]}}}, "circle: a"),
        (
            {"a": {"choices": [1], "when": {"b": [1]}}, "b": {"choices": [1], "when": {"a": [1]}}},
            "circle: a, b",
        ),
        ({"a": {"b": 1}, "a.b": 2}, r"space\.a\.b: is given twice"),
        ({"a": {"b": 1, "when": {"c": [1]}}, "c": 1}, "stands in a namespace"),
    ],
)
def test_a_wrong_table_is_refused_with_its_place(table: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        parse(table)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rote": 0.1}, r"enqueue\[0\]: 'rote' is no parameter of the space. Known: criterion, scope"),
        ({"rate": 0.12}, r"enqueue\[0\]: rate = 0.12 is not legal; it is a number from 0.1 to 0.5 in steps of 0.05"),
        ({"rate": 0.55}, "rate = 0.55 is not legal"),
        ({"rounds": 1.5}, "rounds = 1.5 is not legal; it is an integer from 1 to 5"),
        ({"rounds": True}, "rounds = True is not legal"),
        ({"lr": float("nan")}, "lr = nan is not legal"),
        (
            {"rounds": 10**400},
            r"enqueue\[0\]: rounds = an integer above 1\.8e308 is not legal; it is an integer from 1",
        ),
        ({"rate": -(10**400)}, r"rate = an integer below -1\.8e308 is not legal; it is a number from 0\.1"),
        ({"lr": 10**5000}, r"lr = an integer above 1\.8e308 is not legal"),
        ({"rewind_epoch": 10**5000}, r"rewind_epoch = an integer above 1\.8e308 is not legal; it is 0, 1 or 2"),
        ({"criterion": "best"}, "criterion = 'best' is not legal; it is 'magnitude', 'taylor' or 'random'"),
        ({"scope": "row"}, "scope = 'row' is not legal; it is 'layer'"),
        (
            {"retrain": "finetune", "rewind_epoch": 1},
            "rewind_epoch = 1 does not apply here, only when retrain is 'rewind'",
        ),
    ],
)
def test_a_value_that_is_not_legal_is_refused_with_its_place(
    space: Space, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpaceError, match=message):
        space.validate(params, "enqueue[0]")


def test_legal_values_come_back_as_the_space_has_them(space: Space) -> None:
    given_values = {"rate": 0.1 + 3 * 0.05, "rounds": 3.0, "lr": 0.01, "rewind_epoch": 2, "ignored": ("conv1", "fc")}
    legal = space.validate(given_values, "enqueue[0]")
    assert legal == {"rate": 0.25, "rounds": 3, "lr": 0.01, "rewind_epoch": 2, "ignored": ["conv1", "fc"]}
    assert isinstance(legal["rounds"], int)


def test_true_is_not_one() -> None:
    space = parse({"a": [True, 1, "1"]})
    chosen = space.parameter("a")
    assert isinstance(chosen, Choice)
    assert [chosen.index(value) for value in (True, 1, "1")] == [0, 1, 2]
    with pytest.raises(SpaceError, match="False is not legal; it is True, 1 or '1'"):
        chosen.index(False)


def test_complete_needs_what_applies_and_nothing_else() -> None:
    space = parse({"s": "x", "r": ["a", "b"], "e": {"choices": [0, 1], "when": {"r": ["b"]}}})
    assert space.complete({"r": "a"})
    assert space.complete({"r": "b", "e": 0, "s": "x"})
    assert not space.complete({"r": "b"})
    assert not space.complete({"r": "a", "e": 0})
    assert not space.complete({"e": 0})


def test_a_given_value_implies_its_condition() -> None:
    space = parse(
        {
            "a": ["x", "y"],
            "b": {"choices": [1, 2], "when": {"a": ["y"]}},
            "c": {"low": 0.0, "high": 1.0, "when": {"b": [2]}},
        }
    )
    assert space.imply({"c": 0.5}) == {"c": 0.5, "b": 2, "a": "y"}
    assert space.imply({"a": "x"}) == {"a": "x"}


def test_a_condition_needs_its_parameter_to_apply() -> None:
    space = parse(
        {
            "a": ["x", "y"],
            "b": {"value": 1, "when": {"a": ["y"]}},
            "c": {"choices": [5, 6], "when": {"b": [1]}},
        }
    )
    assert list(space.grid()) == [{"a": "x"}, {"a": "y", "b": 1, "c": 5}, {"a": "y", "b": 1, "c": 6}]
    with pytest.raises(SpaceError, match="c = 5 does not apply"):
        space.validate({"a": "x", "c": 5}, "here")


def test_a_grid_turns_the_last_parameter_fastest() -> None:
    space = parse({"r": ["a", "b"], "n": {"low": 1, "high": 2}, "e": {"choices": [0], "when": {"r": ["b"]}}})
    assert list(space.grid()) == [
        {"r": "a", "n": 1},
        {"r": "a", "n": 2},
        {"r": "b", "n": 1, "e": 0},
        {"r": "b", "n": 2, "e": 0},
    ]


def test_a_continuous_parameter_has_no_grid(space: Space) -> None:
    assert space.size() is None
    with pytest.raises(SpaceError, match=r"space\.lr: is continuous"):
        space.grid()


def test_a_vast_grid_is_counted_without_walking_it() -> None:
    many = {f"p{i}": {"low": 1, "high": 1000} for i in range(20)}
    assert parse(many).size() == 1000**20


def test_an_empty_space_has_one_point() -> None:
    assert (parse({}).size(), list(parse({}).grid())) == (1, [{}])


def test_nested_tables_flatten_to_dotted_names() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}
    with pytest.raises(SpaceError, match=r"a\.b: is given twice"):
        flatten({"a": {"b": 1}, "a.b": 2})


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Countable spaces of up to four parameters, each possibly depending on one before it."""
    table: dict[str, Any] = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        kind = draw(st.sampled_from(["choice", "integers", "stepped", "fixed"]))
        if kind == "choice":
            entry: dict[str, Any] = {"choices": draw(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True))}
        elif kind == "integers":
            least = draw(st.integers(-3, 3))
            entry = {"low": least, "high": least + draw(st.integers(0, 2))}
        elif kind == "stepped":
            low, step = draw(st.integers(-30, 30)) / 100, draw(st.integers(1, 9)) / 100
            entry = {"low": low, "high": low + 2.5 * step, "step": step}
        else:
            entry = {"value": ("x", 1, True)[draw(st.integers(0, 2))]}
        if draw(st.booleans()) and table:
            parent = draw(st.sampled_from(sorted(table)))
            values = parse(table).possible(parent) or ()
            entry["when"] = {parent: [values[draw(st.integers(0, len(values) - 1))]]}
        table[name] = entry
    return parse(table)


@given(spaces())
def test_grid_points_are_legal_complete_distinct_and_counted(space: Space) -> None:
    points = list(space.grid())
    assert len(points) == space.size()
    assert len({repr(point) for point in points}) == len(points)
    for point in points:
        assert space.validate(point, "grid") == point
        assert space.complete(point)


@given(spaces(), st.randoms(use_true_random=False))
def test_sampled_points_are_points_of_the_grid(space: Space, random: Any) -> None:
    point = space.resolve(lambda parameter: random.choice(space.possible(parameter.name)))
    assert point in list(space.grid())


@given(st.integers(-1000, 1000), st.integers(1, 300), st.integers(0, 40))
def test_a_step_lands_on_the_number_one_would_write(low: int, step: int, index: int) -> None:
    number = Range(name="a", low=low / 1000, high=low / 1000 + 41 * step / 1000, step=step / 1000, integer=False)
    assert number.at(index) == (low + index * step) / 1000
    space = Space(parameters=(number,))
    assert space.validate({"a": low / 1000 + index * (step / 1000)}, "here") == {"a": number.at(index)}
