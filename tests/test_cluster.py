"""What `cluster/` holds is what Ray, Kubernetes and bash accept, and promises what its README says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped,unused-ignore]
import pytest
import yaml  # type: ignore[import-untyped,unused-ignore]
from typer.main import get_command

from orchestrator.cli import app
from tests.test_project import FENCE, commands

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
UP = ["aws.yaml", "gcp.yaml", "on-premise.yaml"]
IMAGE = "YOUR_REGISTRY/orchardist:TAG"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return found


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as `ray up` completes it, once Ray has accepted it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole: dict[str, Any] = prepare_config(config)
    validate_config(whole)
    return whole


@pytest.mark.parametrize("name", UP)
def test_ray_up_accepts_the_file(name: str) -> None:
    whole = checked(read(name))
    assert whole["head_node_type"] in whole["available_node_types"]


@pytest.mark.parametrize("name", UP)
def test_canary_ray_up_refuses_a_misspelt_field(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        checked(read(name) | {"idle_timeout_minuts": 5})


@pytest.mark.parametrize("name", UP)
def test_the_head_runs_no_trials_and_every_node_wants_a_token(name: str) -> None:
    config = read(name)
    (head,) = (line for line in config["head_start_ray_commands"] if "ray start" in line)
    (worker,) = (line for line in config["worker_start_ray_commands"] if "ray start" in line)
    assert "--num-cpus=0" in head and "--dashboard-host=127.0.0.1" in head
    for line in (head, worker):
        assert line.startswith("RAY_AUTH_MODE=token ray start")
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_workers_in_the_cloud_start_from_none_on_spot_machines(name: str) -> None:
    types = read(name)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    spot = types["gpu_spot"]
    assert spot["min_workers"] == 0 and spot["resources"]["GPU"] == 1
    assert spot["labels"] == {"ray.io/market-type": "spot"}
    assert "spot" in json.dumps(spot["node_config"]) or "preemptible" in json.dumps(spot["node_config"])
    assert (
        "InstanceMarketOptions" not in types["head"]["node_config"] and "scheduling" not in types["head"]["node_config"]
    )


def test_what_only_aws_asks_for_is_there() -> None:
    """Ray's schema knows nothing of it: a missing image or role shows when the first machine is to start."""
    from ray.autoscaler._private.aws.config import DEFAULT_AMI

    config = read("aws.yaml")
    for node in config["available_node_types"].values():
        machine = node["node_config"]
        assert machine["InstanceType"] and machine["IamInstanceProfile"]["Name"] == "YOUR_INSTANCE_PROFILE"
        assert "ImageId" in machine or config["provider"]["region"] in DEFAULT_AMI
        assert machine["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 100, "an image with CUDA takes tens of GB"


def test_what_only_google_asks_for_is_there() -> None:
    config = read("gcp.yaml")
    provider = config["provider"]
    assert provider["project_id"] == "YOUR_PROJECT" and provider["availability_zone"].startswith(provider["region"])
    for node in config["available_node_types"].values():
        machine = node["node_config"]
        assert machine["machineType"] and machine["serviceAccounts"][0]["scopes"]
        (disk,) = machine["disks"]
        assert disk["boot"] and disk["initializeParams"]["sourceImage"].startswith("projects/")
        if "guestAccelerators" in machine:
            assert {"onHostMaintenance": "TERMINATE"} in machine["scheduling"], "a machine with a GPU cannot be moved"


def test_what_only_machines_of_one_s_own_ask_for_is_there() -> None:
    config = read("on-premise.yaml")
    provider = config["provider"]
    assert provider["head_ip"] and len(provider["worker_ips"]) == config["max_workers"]
    assert "available_node_types" not in config, "Ray makes its own of the addresses"
    assert "-v /shared:/shared" in config["docker"]["run_options"], "the store is a folder that all of them mount"


def cluster_of(name: str) -> dict[str, Any]:
    manifest = read(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    spec: dict[str, Any] = manifest["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return found


MANIFESTS = ["raycluster.yaml", "rayjob.yaml"]

# What the manifests use of KubeRay's ray.io/v1 (1.6) and of Kubernetes' core/v1, read off their definitions: Kubernetes
# drops a misspelt field with a warning at most. "name!" must be there; a set holds the legal words; a string names
# another kind; TEXTS and QUANTITIES are maps whose values must be text, however much like numbers they look.
TEXTS, QUANTITIES = "texts", "quantities"
KINDS: dict[str, dict[str, Any]] = {
    "RayCluster": {"apiVersion!": {"ray.io/v1"}, "kind!": {"RayCluster"}, "metadata!": "Meta", "spec!": "ClusterSpec"},
    "RayJob": {"apiVersion!": {"ray.io/v1"}, "kind!": {"RayJob"}, "metadata!": "Meta", "spec!": "JobSpec"},
    "Meta": {"name!": str, "namespace": str, "labels": TEXTS, "annotations": TEXTS},
    "JobSpec": {
        "entrypoint!": str,
        "rayClusterSpec!": "ClusterSpec",
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
        "runtimeEnvYAML": str,
        "suspend": bool,
    },
    "ClusterSpec": {
        "rayVersion!": str,
        "authOptions": "Auth",
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": "Autoscaler",
        "headGroupSpec!": "Head",
        "workerGroupSpecs!": ["Workers"],
        "suspend": bool,
    },
    "Auth": {"mode": {"disabled", "token"}, "secretName": str, "enableK8sTokenAuth": bool},
    "Autoscaler": {
        "version": {"v1", "v2"},
        "idleTimeoutSeconds": int,
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
        "resources": "Resources",
        "image": str,
    },
    "Head": {"rayStartParams": TEXTS, "labels": TEXTS, "template!": "Template", "serviceType": str},
    "Workers": {
        "groupName!": str,
        "replicas": int,
        "minReplicas!": int,
        "maxReplicas!": int,
        "idleTimeoutSeconds": int,
        "labels": TEXTS,
        "rayStartParams": TEXTS,
        "template!": "Template",
    },
    "Template": {"metadata": "Meta", "spec!": "Pod"},
    "Pod": {
        "restartPolicy": {"Always", "OnFailure", "Never"},
        "terminationGracePeriodSeconds": int,
        "serviceAccountName": str,
        "nodeSelector": TEXTS,
        "tolerations": ["Toleration"],
        "volumes": ["Volume"],
        "containers!": ["Container"],
    },
    "Toleration": {
        "key": str,
        "operator": {"Exists", "Equal"},
        "value": str,
        "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
        "tolerationSeconds": int,
    },
    "Volume": {"name!": str, "configMap": "Named", "persistentVolumeClaim": "Claim"},
    "Claim": {"claimName!": str, "readOnly": bool},
    "Named": {"name!": str, "optional": bool},
    "Container": {
        "name!": str,
        "image!": str,
        "ports": ["Port"],
        "env": ["Variable"],
        "envFrom": ["Variables"],
        "volumeMounts": ["Mount"],
        "resources!": "Resources",
    },
    "Port": {"containerPort!": int, "name": str, "protocol": str},
    "Variable": {"name!": str, "value": str},
    "Variables": {"secretRef": "Named", "configMapRef": "Named", "prefix": str},
    "Mount": {"name!": str, "mountPath!": str, "subPath": str, "readOnly": bool},
    "Resources": {"requests": QUANTITIES, "limits": QUANTITIES},
}
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?")


def wrong(kind: Any, found: Any, where: str = "") -> set[str]:
    """The places within `found` that its kind does not allow."""
    if isinstance(kind, list):
        items = found if isinstance(found, list) else []
        inner = {place for n, item in enumerate(items) for place in wrong(kind[0], item, f"{where}[{n}]")}
        return inner if items else {where}
    if isinstance(kind, set):
        return set() if found in kind else {where}
    if isinstance(kind, type):
        return set() if type(found) is kind else {where}
    if not isinstance(found, dict):
        return {where}
    if kind in (TEXTS, QUANTITIES):
        legal = re.compile(".*") if kind == TEXTS else QUANTITY
        return {f"{where}.{name}" for name, v in found.items() if not (isinstance(v, str) and legal.fullmatch(v))}
    fields = {name.rstrip("!"): value for name, value in KINDS[kind].items()}
    missing = {f"{where}.{name[:-1]}" for name in KINDS[kind] if name.endswith("!") and name[:-1] not in found}
    unknown = {f"{where}.{name}" for name in found.keys() - fields.keys()}
    inner = {place for n in found.keys() & fields.keys() for place in wrong(fields[n], found[n], f"{where}.{n}")}
    return missing | unknown | inner


def places(found: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every field within a manifest."""
    for name, inner in (
        found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    ):
        if isinstance(found, dict):
            yield (*place, name)
        yield from places(inner, (*place, name))


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_of_a_manifest_is_one_of_its_kind(name: str) -> None:
    manifest = read(name)
    assert not wrong(manifest["kind"], manifest)


@pytest.mark.parametrize("name", MANIFESTS)
def test_canary_any_misspelt_field_and_any_value_of_another_type_is_seen(name: str) -> None:
    free = {"rayStartParams", "labels", "nodeSelector", "requests", "limits"}
    sound = read(name)
    for place in places(sound):
        for planted in ("name", "value"):
            inner = manifest = deepcopy(sound)
            for step in place[:-1]:
                inner = inner[step]
            if planted == "value":
                inner[place[-1]] = 1.5
            elif free & set(place[:-1]):
                continue  # users choose these names
            else:
                inner[f"{place[-1]}s"] = inner.pop(place[-1])
            assert wrong(sound["kind"], manifest), (place, planted)


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_a_container_mounts_is_among_its_pod_s_volumes(name: str) -> None:
    spec = cluster_of(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        mounted = {mount["name"] for one in pod["containers"] for mount in one.get("volumeMounts", ())}
        assert mounted == volumes


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_cluster_on_kubernetes_scales_from_none_behind_a_token(name: str) -> None:
    spec = cluster_of(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    head, (workers,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert (workers["replicas"], workers["minReplicas"]) == (0, 0) and workers["maxReplicas"] > 0
    for group in (head, workers):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never", "the autoscaler counts pods: none may become another node"
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    pod = workers["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    keys = {toleration["key"] for toleration in pod["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= keys
    assert pod["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("name", MANIFESTS)
def test_both_manifests_describe_one_cluster(name: str) -> None:
    """What differs is only how the study gets there."""
    other, mine = cluster_of("raycluster.yaml"), cluster_of(name)
    assert mine["workerGroupSpecs"] == other["workerGroupSpecs"]
    assert mine["autoscalerOptions"] == other["autoscalerOptions"]
    assert mine["rayVersion"] == other["rayVersion"]
    assert f"\nray=={mine['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_a_job_that_loses_its_cluster_is_run_again_and_goes_on() -> None:
    spec = read("rayjob.yaml")["spec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] is True
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "-m", "orchestrator.jobs.entrypoint"]
    assert accepted("run", words[3:]), "the entrypoint takes what `orchardist run` takes"
    assert words[-2:] == ["--gpus-per-worker", "1"], "with no worker there yet, nobody sees that the cluster has GPUs"
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    mounted = {mount["mountPath"]: mount.get("subPath") for mount in head["volumeMounts"]}
    assert words[3] in mounted and all(mounted.values()), "a ConfigMap's links would be followed out of the folder"


def accepted(command: str, words: list[str]) -> bool:
    """Whether the command line takes the words, short of running the command."""
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    return found.make_context(command, list(words)) is not None


def test_the_slurm_script_is_a_script() -> None:
    path = CLUSTER / "slurm.sh"
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    done = subprocess.run(["bash", path, "only-one"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch cluster/slurm.sh STUDY STORE")
    assert path.stat().st_mode & 0o111


JOINED = 'while ! grep -q "^ray start --block" "$SAID"; do /bin/sleep 0.05; done'
SAYS = f'{JOINED}; echo "python $*" >> "$SAID"; exit 3'
SLEEPS = 'trap "echo stopped >> $SAID; exit 130" TERM; touch "$SAID.up"; while :; do sleep 0.05; done'


def slurm(folder: Path, driver: str, *arguments: str, ray: str = "true") -> subprocess.Popen[str]:
    """The script, with an srun that runs its command right here, and a ray and a python that say what they are told."""
    for name, text in {
        "scontrol": 'printf "node1\\nnode2\\n"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "ray": f'echo "ray $*" >> "$SAID"; echo "cores of a step: $SRUN_CPUS_PER_TASK" >> "$SAID"; {ray}',
        "sleep": "",
        "python": f'if [ "$1" = -c ]; then echo token; else {driver}; fi',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {"JOB_NODELIST": "node[1-2]", "JOB_ID": "7", "CPUS_PER_TASK": "16", "NNODES": "2", "GPUS_ON_NODE": "4"}
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SAID": str(folder / "said")}
    return subprocess.Popen(
        ["bash", CLUSTER / "slurm.sh", *arguments],
        env=environment | {f"SLURM_{name}": value for name, value in job.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_slurm_script_starts_ray_and_ends_as_the_study_does(tmp_path: Path) -> None:
    process = slurm(tmp_path, SAYS, "a study.toml", "/shared/orchard", "--workers", "8")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    lines = (tmp_path / "said").read_text().splitlines()
    driver = (
        "python -m orchestrator.jobs.entrypoint a study.toml --store /shared/orchard --address node1:20007 --workers 8"
    )
    assert driver in lines
    assert any(line.startswith("ray start --head --block --port=20007") and "--num-gpus=4" in line for line in lines)
    assert "ray start --block --address node1:20007 --num-cpus=16 --num-gpus=4" in lines
    assert lines.index("ray health-check --address node1:20007") < lines.index(driver), "there is a head to join"
    assert "cores of a step: 16" in lines, "Slurm gives a step one core if it is not told"


def test_the_slurm_script_says_when_ray_does_not_start(tmp_path: Path) -> None:
    process = slurm(tmp_path, SAYS, "study.toml", "/shared/orchard", ray='[ "$1" != health-check ]')
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Ray does not start on node1" in err
    assert "entrypoint" not in (tmp_path / "said").read_text()


def test_the_slurm_script_hands_the_end_of_its_time_to_the_driver(tmp_path: Path) -> None:
    process = slurm(tmp_path, SLEEPS, "study.toml", "/shared/orchard")
    deadline = time.monotonic() + 60
    while not (tmp_path / "said.up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in (tmp_path / "said").read_text()


def test_the_image_is_built_from_what_is_there() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert {"orchestrator", "search", "pyproject.toml", "constraints.txt"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    lines = [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines()]
    torch, house = (next(n for n, line in enumerate(lines) if part in line) for part in ("'^torch=='", '".[$EXTRAS]"'))
    code = lines.index("COPY orchestrator orchestrator")
    assert torch < code < house, "a change of the code leaves the layers with torch as they are"
    for line in (lines[torch], lines[house]):
        assert "-c constraints.txt" in line, "every node has the versions that were tested"
    assert lines[-3].startswith("USER ") and lines[-3] not in ("USER 0", "USER root")
    (base,) = (line for line in lines if line.startswith("FROM "))
    assert base.startswith("FROM python:3.11-"), "the Python of the pins"


@pytest.mark.parametrize("path", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_nothing_names_a_registry_or_a_secret(path: Path) -> None:
    text = path.read_text()
    images = re.findall(r"\bimage: *(\S+)", text)
    assert set(images) <= {IMAGE}
    assert not re.search(r"\b(ghcr|quay|gcr|docker)\.io|\.dkr\.ecr\.|AKIA[0-9A-Z]{16}", text)


def test_the_readme_names_every_file_and_commands_that_exist() -> None:
    text = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.iterdir():
        assert path.name == "README.md" or path.name in text, f"{path.name} is nowhere in the README"
    ours = [words for _, block in FENCE.findall(text) for words in commands(block) if words[0] == "orchardist"]
    assert {words[1] for words in ours} >= {"submit", "doctor", "run", "status"}
    for words in ours:
        assert accepted(words[1], words[2:]), words
