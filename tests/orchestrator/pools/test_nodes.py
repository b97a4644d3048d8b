"""Workers on a cluster whose nodes come late, are drained, leave and die: a real one, of `ray start` processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.pools.local import LocalPool
from orchestrator.store.store import Store
from orchestrator.study import Study
from tests.cluster import ROOT, TOKEN, explained, nodes, until
from tests.orchestrator.pools import small

pytestmark = pytest.mark.ray

SLOW_TASK = """
import dataclasses
import time
from pathlib import Path

from my_task import task as quick


def task():
    found = quick()

    def loss(outputs, targets):
        if not Path({fast!r}).exists():
            time.sleep(0.05)
        return found.loss(outputs, targets)

    return dataclasses.replace(found, loss=loss)
"""
STUDY = """
name = "small"
task = "slow_task.py"
trials = 10
sampler = "random"
[train]
epochs = 12
retrain_epochs = 12
batch_size = 16
lr = 0.05
[space]
rate = { low = 0.1, high = 0.6, step = 0.01 }
rounds = 2
"""


DRIVER = """
import sys
from orchestrator import cli
sys.argv[0] = "orchardist"
try:
    cli.main()
finally:
    print("torch" if "torch" in sys.modules else "no torch")
"""


@contextmanager
def driver(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`orchardist run` in a process of its own, and the file with what it says."""
    said = folder / "said"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, "run", *words],
            cwd=folder,
            # A token for another cluster lies about: this one has none, and must not be asked for it.
            env=os.environ | {"PYTHONPATH": ROOT, "RAY_AUTH_TOKEN": TOKEN},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process, said
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def write_study(folder: Path, text: str = STUDY) -> None:
    """The study in `folder`, whose every batch takes its time until there is a file `fast`."""
    small.write_task(folder)
    (folder / "slow_task.py").write_text(SLOW_TASK.format(fast=str(folder / "fast")))
    (folder / "study.toml").write_text(text)


def states(folder: Path) -> int:
    """How many states the store in `folder` has."""
    return sum(1 for _ in (folder / "store" / "states").rglob("*.safetensors"))


def events(folder: Path, what: str) -> list[dict[str, Any]]:
    """The details of one kind of event in the ledger of the study in `folder`."""
    rows = Store(folder / "store").table("small", "events", ["event", "detail"]).to_pylist()
    return [json.loads(row["detail"]) for row in rows if row["event"] == what]


def as_on_one_worker(folder: Path) -> None:
    """The study in `folder` has the keys and, to the bit, the weights that one worker in this process gives it."""
    local = Study.load(folder / "study.toml", folder / "local")
    local.run(LocalPool())
    found, expected = small.models(Store(folder / "store")), small.models(local.store)
    assert found.keys() == expected.keys()
    assert all(small.same_bits(found[key], state) for key, state in expected.items())


def test_a_study_starts_without_workers_and_goes_on_when_a_node_is_drained_and_leaves(tmp_path: Path) -> None:
    write_study(tmp_path)
    with nodes(tmp_path) as cluster:
        cluster.head()
        until(cluster.answers, 60, "the head is there")
        words = ("study.toml", "--address", cluster.address, "--store", "store", "--workers", "2")
        with driver(tmp_path, *words) as (process, said):
            until(lambda: "waiting for workers: asked" in said.read_text(), 60, "it is said that there are no workers")
            assert "asked the autoscaler for 1 x {CPU: 1}; free in the cluster: 0 CPU" in said.read_text()
            first = cluster.worker("first")
            cluster.worker("second")
            until(lambda: states(tmp_path) > 1 and len(cluster.alive()) == 2, 90, "the late nodes work")
            cluster.drain("first", 60)
            until(lambda: "tried again: preempted" in said.read_text(), 30, "the notice is heard")
            os.killpg(first.pid, signal.SIGTERM)
            until(lambda: cluster.alive().keys() == {"second"}, 60, "it is gone")
            (tmp_path / "fast").touch()
            assert process.wait(120) == 0, said.read_text()
        told = said.read_text()
    assert " failed" not in told and "worker died" not in told, told
    assert told.endswith("no torch\n"), "the driver does not import it"
    went_on = [event["checkpoint"] for event in events(tmp_path, "work") if "checkpoint" in event]
    assert went_on and all(went_on), "what was begun on the drained node went on from where it stood"
    as_on_one_worker(tmp_path)


@pytest.mark.slow
def test_a_study_goes_on_when_a_machine_is_switched_off(tmp_path: Path) -> None:
    write_study(tmp_path)
    with nodes(tmp_path) as cluster:
        cluster.head()
        first = cluster.worker("first")
        cluster.worker("second")
        with driver(tmp_path, "study.toml", "--address", cluster.address, "--store", "store") as (process, said):
            until(lambda: states(tmp_path) > 2, 90, "both work")
            cluster.kill_raylet(first)
            until(lambda: "tried again: worker died" in said.read_text(), 60, "the loss is seen")
            (tmp_path / "fast").touch()
            assert process.wait(120) == 0, said.read_text()
    assert " failed" not in said.read_text()
    as_on_one_worker(tmp_path)


HEAD_ID = "f" * 51 + "00000"


def scaling(address: str) -> str:
    """Ray's own autoscaler over machines that are processes here, none of them in the beginning and two at most."""
    empty = "initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands "
    empty += "worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter"
    config = {
        "cluster_name": "here",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": address,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "spot": {
                "resources": {"CPU": 1, "trials": 2},
                "labels": {"name": "spot"},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "file_mounts_sync_continuously": False,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in empty.split()},
    }
    return json.dumps(config)


@pytest.mark.slow
def test_an_autoscaler_brings_nodes_from_none_and_takes_them_away(tmp_path: Path) -> None:
    write_study(tmp_path)
    with nodes(tmp_path) as cluster:
        (tmp_path / "scaling.json").write_text(scaling(cluster.address))
        cluster.head(
            f"--autoscaling-config={tmp_path / 'scaling.json'}",
            AUTOSCALER_UPDATE_INTERVAL_S="1",
            RAY_FAKE_CLUSTER="1",
            RAY_enable_autoscaler_v2="1",
            RAY_CLOUD_INSTANCE_ID=HEAD_ID,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_ID,
        )
        until(cluster.answers, 60, "the head is there")
        words = ("study.toml", "--address", cluster.address, "--store", "store", "--workers", "2")
        share = ("--resource", "trials=2", "--label-selector", "name=spot")
        with driver(tmp_path, *words, *share) as (process, said), explained(said, cluster.scaled):
            until(lambda: "waiting for workers" in said.read_text(), 180, "it is said that there are no workers")
            until(lambda: len(cluster.ids("spot")) == 2, 180, "a node for each worker")
            (tmp_path / "fast").touch()
            assert process.wait(180) == 0
        assert "asked the autoscaler for 1 x {CPU: 1, trials: 2} where name=spot" in said.read_text()
        with explained(cluster.scaled):
            until(lambda: not cluster.ids("spot"), 180, "the nodes are given back")
