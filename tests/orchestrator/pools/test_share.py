from __future__ import annotations

import math

import pytest

from orchestrator.errors import InputError
from orchestrator.pools.share import Share, fits, share


def test_what_a_worker_takes_is_read_from_the_command_line() -> None:
    found = share(0.25, ["trials=1", "licence=0.5"], ["ray.io/market-type=spot", "zone=in(a,b)"])
    assert found.gpus == 0.25
    assert found.resources == {"trials": 1, "licence": 0.5}
    assert found.labels == {"ray.io/market-type": "spot", "zone": "in(a,b)"}
    assert found.says() == ("{CPU: 1, GPU: 0.25, trials: 1, licence: 0.5} where ray.io/market-type=spot, zone=in(a,b)")
    assert share(None, [], []) == Share() and Share(gpus=0).says() == "{CPU: 1}"


@pytest.mark.parametrize("gpus", [1.5, 1e-9, math.nan, math.inf])
def test_a_share_that_no_gpu_can_give_is_refused(gpus: float) -> None:
    with pytest.raises(InputError, match="--gpus-per-worker .*: legal: a fraction of one GPU"):
        share(gpus, [], [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trials", "legal: NAME=AMOUNT"),
        ("=1", "legal: NAME=AMOUNT"),
        ("trials=", "legal amounts"),
        ("trials=many", "legal amounts"),
        ("trials=0", "legal amounts"),
        ("trials=-1", "legal amounts"),
        ("trials=nan", "legal amounts"),
        ("trials=1.5", "legal amounts"),
        ("GPU=1", "legal: --gpus-per-worker"),
        ("CPU=2", "every worker has one core"),
    ],
)
def test_a_resource_that_makes_no_sense_is_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=f"--resource {text}: .*{says}"):
        share(None, [text], [])


@pytest.mark.parametrize(
    "text", ["spot", "=spot", "a b=c", "key=", "key=a b", "key=in()", "key=in(a", "key=!!a", "/=a"]
)
def test_a_label_selector_that_ray_would_refuse_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--label-selector .*: legal"):
        share(None, [], [text])


def test_what_is_named_twice_is_refused() -> None:
    with pytest.raises(InputError, match="--resource names trials twice"):
        share(None, ["trials=1", "trials=2"], [])
    with pytest.raises(InputError, match="--label-selector names zone twice"):
        share(None, [], ["zone=a", "zone=b"])


def test_selectors_are_those_that_ray_takes() -> None:
    from ray._private.label_utils import validate_label_selector

    for text in ("zone=a", "zone=!a", "zone=in(a,b)", "zone=!in(a,b)", "ray.io/market-type=on-demand"):
        assert validate_label_selector(dict(share(None, [], [text]).labels)) is None


@pytest.mark.parametrize(
    ("wanted", "label", "answer"),
    [
        ("spot", "spot", True),
        ("spot", None, False),
        ("!spot", "on-demand", True),
        ("!spot", None, True),
        ("in(a,b)", "b", True),
        ("in(a,b)", "c", False),
        ("!in(a,b)", "a", False),
        ("!in(a,b)", "c", True),
    ],
)
def test_a_node_fits_a_selector(wanted: str, label: str | None, answer: bool) -> None:
    assert fits(wanted, label) is answer


@pytest.mark.parametrize(
    ("found", "there", "room"),
    [
        (Share(gpus=0), {"CPU": 4}, 4),
        (Share(gpus=0), {}, 0),
        (Share(gpus=1), {"CPU": 8, "GPU": 2}, 2),
        (Share(gpus=2), {"CPU": 8, "GPU": 3}, 1),
        (Share(gpus=0.25), {"CPU": 3, "GPU": 1}, 3),
        (Share(gpus=0.1), {"CPU": 99, "GPU": 1}, 10),
        (Share(gpus=0.4), {"CPU": 8, "GPU": 2}, 4),  # two on each: what is left over of both makes no fifth
        (Share(gpus=0, resources={"trials": 2}), {"CPU": 8, "trials": 5}, 2),
        (Share(gpus=0, resources={"trials": 1}), {"CPU": 8}, 0),
        (Share(gpus=0, labels={"kind": "spot"}), {"CPU": 8}, 0),
    ],
)
def test_the_room_on_a_node(found: Share, there: dict[str, float], room: int) -> None:
    assert found.room(there, {"kind": "on-demand"}) == room
