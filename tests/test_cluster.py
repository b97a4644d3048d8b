"""What `cluster/` holds is what Ray, Kubernetes and bash accept, and promises what its README says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
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


def cluster_of(name: str) -> dict[str, Any]:
    manifest = read(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    spec: dict[str, Any] = manifest["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return found


MANIFESTS = ["raycluster.yaml", "rayjob.yaml"]

# Fields of KubeRay 1.6's ray.io/v1, and of a pod what is used here: Kubernetes drops a misspelt one with a warning.
FIELDS: dict[str, str] = {
    "manifest": "apiVersion kind metadata spec",
    "RayJobSpec": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector "
    "submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources "
    "entrypointNumCpus entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend",
    "RayClusterSpec": "suspend managedBy autoscalerOptions headServiceAnnotations enableInTreeAutoscaling authOptions "
    "gcsFaultToleranceOptions headGroupSpec rayVersion workerGroupSpecs",
    "AuthOptions": "mode secretName enableK8sTokenAuth",
    "AutoscalerOptions": "resources image imagePullPolicy securityContext idleTimeoutSeconds upscalingMode version env "
    "envFrom volumeMounts",
    "HeadGroupSpec": "template headService enableIngress labels resources rayStartParams serviceType",
    "WorkerGroupSpec": "groupName replicas minReplicas maxReplicas numOfHosts idleTimeoutSeconds suspend labels "
    "resources rayStartParams template scaleStrategy",
    "PodTemplateSpec": "metadata spec",
    "PodSpec": "restartPolicy terminationGracePeriodSeconds nodeSelector tolerations volumes containers",
    "Toleration": "key operator value effect tolerationSeconds",
    "Container": "name image ports env envFrom volumeMounts resources",
    "VolumeMount": "name mountPath subPath readOnly",
    "ResourceRequirements": "requests limits",
}


def unknown_fields(kind: str, found: dict[str, Any]) -> set[str]:
    return {f"{kind}.{name}" for name in set(found) - set(FIELDS[kind].split())}


def misspelt(manifest: dict[str, Any]) -> set[str]:
    """Fields of a RayCluster or a RayJob that its kind does not have."""
    found = unknown_fields("manifest", manifest)
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        found |= unknown_fields("RayJobSpec", spec)
        spec = spec["rayClusterSpec"]
    found |= unknown_fields("RayClusterSpec", spec) | unknown_fields("AuthOptions", spec["authOptions"])
    found |= unknown_fields("AutoscalerOptions", spec["autoscalerOptions"])
    groups = [("HeadGroupSpec", spec["headGroupSpec"]), *(("WorkerGroupSpec", g) for g in spec["workerGroupSpecs"])]
    for kind, group in groups:
        pod = group["template"]["spec"]
        found |= unknown_fields(kind, group) | unknown_fields("PodTemplateSpec", group["template"])
        found |= unknown_fields("PodSpec", pod)
        for toleration in pod.get("tolerations", ()):
            found |= unknown_fields("Toleration", toleration)
        for container in pod["containers"]:
            found |= unknown_fields("Container", container)
            found |= unknown_fields("ResourceRequirements", container["resources"])
            for mount in container.get("volumeMounts", ()):
                found |= unknown_fields("VolumeMount", mount)
    return found


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_of_a_manifest_is_one_of_its_kind(name: str) -> None:
    assert not misspelt(read(name))


def test_canary_a_misspelt_field_is_seen() -> None:
    manifest = read("rayjob.yaml")
    manifest["spec"]["backOffLimit"] = 3
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["toleration"] = []
    assert misspelt(manifest) == {"RayJobSpec.backOffLimit", "PodSpec.toleration"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_numbers_that_kubernetes_wants_as_words_are_words(name: str) -> None:
    spec = cluster_of(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert all(isinstance(value, str) for value in group.get("labels", {}).values())


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


SAYS = 'echo "python $*" >> "$SAID"; exit 3'
SLEEPS = 'trap "echo stopped >> $SAID; exit 130" TERM; touch "$SAID.up"; while :; do sleep 0.05; done'


def slurm(folder: Path, driver: str, *arguments: str) -> subprocess.Popen[str]:
    """The script, with an srun that runs its command right here, and a ray and a python that say what they are told."""
    for name, text in {
        "scontrol": 'printf "node1\\nnode2\\n"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "ray": 'echo "ray $*" >> "$SAID"',
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
    _, err = process.communicate(timeout=20)
    assert process.returncode == 3, err
    lines = (tmp_path / "said").read_text().splitlines()
    driver = (
        "python -m orchestrator.jobs.entrypoint a study.toml --store /shared/orchard --address node1:20007 --workers 8"
    )
    assert driver in lines
    assert any(line.startswith("ray start --head --block --port=20007") and "--num-gpus=4" in line for line in lines)
    assert "ray start --block --address node1:20007 --num-cpus=16 --num-gpus=4" in lines


def test_the_slurm_script_hands_the_end_of_its_time_to_the_driver(tmp_path: Path) -> None:
    process = slurm(tmp_path, SLEEPS, "study.toml", "/shared/orchard")
    deadline = time.monotonic() + 20
    while not (tmp_path / "said.up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped" in (tmp_path / "said").read_text()


def test_the_image_is_built_from_what_is_there() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert {"orchestrator", "search", "pyproject.toml", "constraints.txt"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)


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
