"""Every file of `cluster/` matches its schema, and every command in it is one that a job accepts."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import kubernetes_validate
import pytest

from persona.errors import UsageError
from tests.cluster import custom_resources
from tests.cluster.manifests import (
    APPLIED,
    CLUSTER,
    containers,
    documents,
    entrypoints,
    every,
    parse_job,
    policy,
    ray_clusters,
)
from tests.pages import PAGES, ROOT

AWS = sorted((CLUSTER / "aws").glob("*.json"))
NOT_IN_A_NAMESPACE = {"Namespace", "PriorityClass"}


@pytest.mark.parametrize("path", [*APPLIED, CLUSTER / "monitoring"], ids=lambda path: path.name)
def test_kubernetes_accepts_its_own_kinds_and_the_operators_theirs(path: Path) -> None:
    found = documents(path)
    assert found
    for document in found:
        kind = document["kind"]
        if kind in custom_resources.API_VERSIONS:
            assert document["apiVersion"] == custom_resources.API_VERSIONS[kind]
            assert not list(custom_resources.problems(document, kind, kind))
        else:
            kubernetes_validate.validate(document, custom_resources.KUBERNETES, strict=True)
        assert document["metadata"].get("namespace") == (None if kind in NOT_IN_A_NAMESPACE else "persona-plug")


def test_every_file_is_strict_yaml_and_part_of_a_kustomization() -> None:
    files = sorted((CLUSTER / "kuberay").rglob("*.yaml"))
    named = {
        (path.parent / word).resolve() for path in files for word in re.findall(r"[\w./-]+\.yaml", path.read_text())
    }
    for path in files:
        assert documents(path)
        assert path.name == "kustomization.yaml" or path in named


def test_every_image_is_named_once_and_placed_everywhere() -> None:
    (file,) = documents(CLUSTER / "kuberay" / "base" / "images" / "kustomization.yaml")
    images = {f"{one['newName']}:{one['newTag']}" for one in file["images"]}
    assert {one["name"] for one in file["images"]} == {"persona-plug", "persona-plug-cpu"}
    assert {container["image"] for _, _, container in containers()} - {"redis:7.4-alpine"} == images


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"entryPoint": "python"}, ".entryPoint: no such field of RayJobSpec"),
        ({"backoffLimit": "2"}, ".backoffLimit: integer, not '2'"),
        ({"submissionMode": "Http"}, ".submissionMode: one of"),
        ({"rayClusterSpec": {"workerGroupSpecs": []}}, ".headGroupSpec: is required"),
        ({"submitterPodTemplate": {}, "deletionStrategy": {"onSuccess": {}}}, ".onSuccess: no such field"),
    ],
)
def test_a_field_that_kuberay_does_not_know_is_found(damage: dict[str, Any], message: str) -> None:
    spec = documents(CLUSTER / "kuberay" / "embed")[0]["spec"]
    assert not list(custom_resources.problems(spec, "RayJobSpec"))
    assert any(message in problem for problem in custom_resources.problems({**spec, **damage}, "RayJobSpec"))


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    _, spec = ray_clusters()[0]
    head = spec["headGroupSpec"]
    head["template"]["spec"]["containers"][0]["securtyContext"] = {}
    assert any("securtyContext" in problem for problem in custom_resources.problems(head, "HeadGroupSpec"))


@pytest.mark.parametrize(("file", "text"), entrypoints(), ids=lambda value: value[:60])
def test_the_jobs_accept_every_command(file: str, text: str) -> None:
    assert parse_job(text), file


def test_skypilot_knows_every_field_of_its_file() -> None:
    (task,) = documents(CLUSTER / "sky.yaml")
    # Of SkyPilot's schema of a task (`sky/utils/schemas.py`).
    assert task.keys() <= {
        "name",
        "workdir",
        "num_nodes",
        "resources",
        "file_mounts",
        "setup",
        "run",
        "envs",
        "secrets",
    }
    resources = {"infra", "accelerators", "cpus", "memory", "disk_size", "use_spot", "image_id", "job_recovery"}
    assert task["resources"].keys() <= resources
    assert all(isinstance(value, str) for value in task["envs"].values())
    # Without `job_recovery`, SkyPilot does not run a failed job again; it does so when a machine is lost.
    assert "job_recovery" not in task["resources"]


def test_a_renamed_flag_is_found() -> None:
    with pytest.raises(UsageError, match="--history"):
        parse_job("python -m jobs.embed --history a --store b")
    with pytest.raises(UsageError, match="--history"):
        parse_job("python -m jobs.submit --id a --entrypoint 'python -m jobs.embed --history a --store b'")


def test_the_code_reads_every_environment_variable_of_ours() -> None:
    code = "".join(path.read_text() for folder in ("jobs", "persona") for path in (ROOT / folder).rglob("*.py"))
    files = [*PAGES, *(path for path in CLUSTER.rglob("*") if path.is_file())]
    named = {name for path in files for name in re.findall(r"\bPERSONA_[A-Z_]+", path.read_text())}
    assert "PERSONA_GPUS" in named
    assert not {name for name in named if f'"{name}"' not in code}


@pytest.mark.parametrize(("file", "spec"), ray_clusters(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_cluster_needs_a_token_has_an_idle_head_and_cpus_for_reads(file: str, spec: dict[str, Any]) -> None:
    assert spec["rayVersion"] == version("ray")
    assert spec["authOptions"] == {"mode": "token", "secretName": "persona-plug-token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    n_cpus = {name: int(_limits(group)["cpu"]) for name, group in groups.items()}
    # Actors on GPUs take no CPU, so all of these CPUs serve reads, joins and commits.
    assert groups["cpu"]["minReplicas"] * n_cpus["cpu"] >= 2
    assert n_cpus["gpu"] >= 2 * int(_limits(groups["gpu"])["nvidia.com/gpu"])
    assert {one["key"] for one in groups["gpu"]["template"]["spec"]["tolerations"]} == {"spot", "nvidia.com/gpu"}
    for group in groups.values():
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def _limits(group: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return found


def test_a_job_requests_no_more_gpus_than_its_cluster_may_have() -> None:
    for path in APPLIED:
        for document in documents(path):
            spec = document.get("spec", {})
            if requested := re.search(r"PERSONA_GPUS=(\d+)", spec.get("entrypoint", "")):
                assert 0 < int(requested[1]) <= _most_gpus(spec["rayClusterSpec"])
    (cluster,) = [spec for name, spec in ray_clusters() if name == "long-lived"]
    for scheduled in _scheduled().values():
        (gpus,) = [one["value"] for one in every("env", scheduled) for one in one if one["name"] == "GPUS"]
        assert 0 < int(gpus) <= _most_gpus(cluster)


def _most_gpus(cluster: dict[str, Any]) -> int:
    return next(int(group["maxReplicas"]) for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu")


def test_every_ray_job_cleans_up_and_a_verdict_is_final() -> None:
    found = [document for path in APPLIED for document in documents(path)]
    jobs = [document["spec"] for document in found if document["kind"] == "RayJob"]
    assert {re.search(r"jobs\.(\w+)", job["entrypoint"])[1] for job in jobs} == {  # type: ignore[index]
        "embed",
        "train",
        "generate",
        "evaluate",
    }
    for job in jobs:
        # KubeRay retries every exit code, final ones included, each time with another GPU cluster.
        assert job["backoffLimit"] == 0 and job["submissionMode"] == "HTTPMode" and job["activeDeadlineSeconds"] > 0
        assert job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] > 0


def test_secrets_are_referenced_and_not_written_out() -> None:
    for _, _, container in containers():
        for variable in container.get("env", []):
            if re.search("TOKEN|PASSWORD|SECRET|KEY", variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"]


def _scheduled() -> dict[str, dict[str, Any]]:
    """The specs of the CronJobs, by name."""
    found = documents(CLUSTER / "schedule")
    return {one["metadata"]["name"]: one["spec"] for one in found if one["kind"] == "CronJob"}


def test_the_cron_jobs_run_every_day_once_and_a_verdict_is_final() -> None:
    scheduled = _scheduled()
    assert {name: cron["schedule"] for name, cron in scheduled.items()} == {
        "nightly": "0 2 * * 1-6",
        "weekly": "0 2 * * 0",
    }
    for name, cron in scheduled.items():
        job = cron["jobTemplate"]["spec"]
        assert cron["concurrencyPolicy"] == "Forbid" and job["activeDeadlineSeconds"] < 86400
        pod = job["template"]["spec"]
        (container,) = pod["containers"]
        assert container["args"] == [name, "$(JOB)"]
        source = next(one for one in container["env"] if one["name"] == "JOB")["valueFrom"]
        assert source == {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
        # podFailurePolicy requires Never; it tells the steps' exit codes from lost machines.
        assert pod["restartPolicy"] == "Never"
        lost, final = job["podFailurePolicy"]["rules"]
        assert (lost["action"], lost["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
        codes = final["onExitCodes"]
        assert (final["action"], codes["operator"], codes["containerName"]) == ("FailJob", "In", container["name"])
        # Failed, wrong usage, bad rows, a refused plug (docs/operations.md).
        assert codes["values"] == [1, 2, 3, 4]


def test_the_pods_of_the_schedule_find_the_steps_and_the_cluster() -> None:
    (steps,) = [one for one in documents(CLUSTER / "schedule") if one["kind"] == "ConfigMap"]
    assert steps["data"] == {"steps.sh": (CLUSTER / "schedule" / "steps.sh").read_text()}
    (cluster,) = [one for one in documents(CLUSTER / "kuberay" / "long-lived") if one["kind"] == "RayCluster"]
    for cron in _scheduled().values():
        pod = cron["jobTemplate"]["spec"]["template"]["spec"]
        (container,), (volume,) = pod["containers"], pod["volumes"]
        assert volume["configMap"]["name"] == steps["metadata"]["name"]
        (mount,) = container["volumeMounts"]
        assert container["command"] == ["bash", f"{mount['mountPath']}/steps.sh"] and mount["name"] == volume["name"]
        address = next(one["value"] for one in container["env"] if one["name"] == "RAY_API_SERVER_ADDRESS")
        assert address == f"http://{cluster['metadata']['name']}-head-svc:8265"


@pytest.mark.parametrize("path", AWS, ids=lambda path: path.stem)
def test_aws_accepts_every_file(path: Path, s3: str) -> None:
    import json

    text, bucket = path.read_text(), s3.removeprefix("s3://")
    if "policy" in path.stem and path.stem != "bucket-policy":
        made = boto3.client("iam").create_policy(PolicyName=f"{path.stem}-{bucket}", PolicyDocument=text)
        assert made["Policy"]["Arn"]
    elif "trust" in path.stem:
        assert boto3.client("iam").create_role(RoleName=f"{path.stem}-{bucket}", AssumeRolePolicyDocument=text)
    elif path.stem == "bucket-policy":
        boto3.client("s3").put_bucket_policy(Bucket=bucket, Policy=text.replace(":::corp", f":::{bucket}"))
    else:
        boto3.client("s3").put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=json.loads(text))


def test_no_bucket_rule_deletes_files_of_a_table() -> None:
    for rule in policy("lifecycle.json")["Rules"]:
        assert rule.get("Expiration", {}).keys() <= {"ExpiredObjectDeleteMarker"}
        assert "Transitions" not in rule
