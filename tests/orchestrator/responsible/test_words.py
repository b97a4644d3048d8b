"""What a person reads: the mean beside the worst class first."""

from __future__ import annotations

from typing import Any

from orchestrator.responsible.words import disagreement_rows, leads, model_rows, table


def row(group: str, change: float, verdict: str, **given: Any) -> dict[str, Any]:
    return {
        "key": "k0",
        "group": group,
        "of": "class",
        "support": 50,
        "dense": 0.98,
        "pruned": 0.98 + change,
        "change": change,
        "low": change - 0.1,
        "high": change + 0.1,
        "p_holm": 0.002,
        "verdict": verdict,
    } | given


def document(*rows: dict[str, Any], **given: Any) -> dict[str, Any]:
    chosen = {"key": "k0", "keys": ["k0"], "sparsity": 0.8, "dense": 0.994, "pruned": 0.966}
    return {
        "study": "s",
        "split": "test",
        "examples": 500,
        "chosen": chosen,
        "rows": [*rows, row("6", -0.9, "not tested", key="another")],
        "across_seeds": [],
        "minority": None,
        "disagreements": [],
        "notes": [],
    } | given


NOTHING = row("0", 0.0, "no evidence")
WORST = row("6", -0.28, "lost by pruning")
FEW = row("9", -1.0, "too few", support=3)


def test_the_mean_and_the_worst_class_come_first() -> None:
    said = leads(document(NOTHING, WORST))
    assert said == [
        "At 80.0% sparse the mean accuracy falls by 2.8 points (99.4% to 96.6%), and class '6' falls by 28.0 points "
        "(98.0% to 70.0%). Test split, 500 examples.",
        "Lost by pruning: 6 -28.0 (-38.0 to -18.0, p = 0.002) (exact McNemar, Holm over 2).",
        "Dense and pruned answer differently on 0 of 500 examples.",
    ]


def test_nothing_is_called_lost_without_a_test() -> None:
    said = leads(document(NOTHING, row("1", -0.05, "no evidence")))
    assert said[1] == "Of no group is it shown that pruning lost it (exact McNemar, Holm over 2)."


def test_what_is_too_small_does_not_lead() -> None:
    said = leads(document(NOTHING, WORST, FEW, row("7", 0.0, "never learnt"), notes=["one thing"]))
    assert "class '6'" in said[0]
    assert "Too few examples to tell: 9 (3)." in said
    assert any(line.startswith("Never learnt, by the dense model neither: 7") for line in said)
    assert said[-1] == "Note: one thing."


def test_worst_class_first_in_the_table() -> None:
    rows = table(document(NOTHING, WORST, row("5", float("nan"), "too few", support=0)))
    assert [each["group"] for each in rows] == ["6", "0", "5"]
    assert rows[0] == {
        "group": "6",
        "support": 50,
        "dense %": "98.0",
        "pruned %": "70.0",
        "change": "-28.0",
        "95 % interval": "-38.0 to -18.0",
        "verdict": "lost by pruning",
    }
    assert rows[2]["95 % interval"] == "-"


def test_several_seeds_have_a_column_and_a_sentence() -> None:
    several = {"key": "k0", "keys": ["k0", "k1"], "sparsity": 0.8, "dense": 0.9, "pruned": 0.9}
    spread = {"group": "6", "mean": -0.25, "half_width": 0.04, "verdict": "lost by pruning"}
    minority = {
        "classes": ["8", "9"],
        "change": -0.66,
        "std": 0.03,
        "change_of_others": -0.02,
        "std_of_others": None,
        "difference": {"n": 5, "mean": -0.64, "half_width": 0.04},
        "claim": "the minority loses more",
    }
    found = document(NOTHING, WORST, chosen=several, across_seeds=[spread], minority=minority)
    said = leads(found)
    assert "mean accuracy stays as it is" in said[0]
    assert "Over 2 seeds these lose: 6 -25.0 ± 4.0 points." in said
    assert (
        "The minority loses more: the rare classes (8, 9) change by -66.0 (sd 3.0), the others by -2.0 points: a "
        "difference of -64.0 ± 4.0 over 5 seeds." in said
    )
    assert [each["over seeds"] for each in table(found)] == ["-25.0 ± 4.0", "-"]
    few = document(WORST, chosen=several, across_seeds=[spread | {"verdict": "too few seeds"}])
    assert "2 seeds are too few to say what holds over seeds." in leads(few)
    none = document(WORST, chosen=several, across_seeds=[spread | {"verdict": "no evidence"}])
    assert "Over 2 seeds no group is shown to lose." in leads(none)
    assert any(
        line.startswith("No evidence that rare classes pay more")
        for line in leads(document(WORST, minority=minority | {"claim": "no evidence"}))
    )
    assert any(
        line.startswith("5 seeds are too few to say whether rare classes pay")
        for line in leads(document(WORST, minority=minority | {"claim": "too few seeds"}))
    )


def test_long_lists_are_cut() -> None:
    said = leads(document(*[row(str(number), -0.2, "lost by pruning") for number in range(15)]))
    assert said[1].count("p = ") == 12 and "and 3 more" in said[1]


def test_examples_and_coefficients() -> None:
    one = {"index": 3, "target": "6", "dense": "6", "pruned": "5", "seeds": 1, "modal": True}
    shown = disagreement_rows(document(WORST, disagreements=[one] * 30))
    assert shown == [{"index": 3, "target": "6", "dense": "6", "pruned": "5"}] * 10
    sure = {"name": "sparsity", "coefficient": -0.3, "error": 0.1, "low": -0.5, "high": -0.1, "p": 0.01}
    unsure = sure | {"error": None, "low": None, "high": None, "p": None}
    assert [each["95 % interval"] for each in model_rows({"terms": [sure, unsure]})] == ["-0.5 to -0.1", "-"]
