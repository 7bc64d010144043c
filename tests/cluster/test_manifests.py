"""Every file of `cluster/` matches its schema, and every command in it is one that a job accepts."""

import re
from pathlib import Path
from typing import Any

import boto3
import kubernetes_validate
import pytest
import ray
from ray.autoscaler._private.util import prepare_config, validate_config

from persona.errors import UsageError
from tests.cluster import kuberay_api
from tests.cluster.manifests import (
    CLUSTER,
    KUBERAY,
    RAY_KINDS,
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


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kubernetes_accepts_its_own_kinds_and_kuberay_the_others(path: Path) -> None:
    found = documents(path)
    assert found
    for document in found:
        if document["kind"] in RAY_KINDS:
            assert document["apiVersion"] == "ray.io/v1"
            assert not list(kuberay_api.problems(document, document["kind"], document["kind"]))
        else:
            kubernetes_validate.validate(document, kuberay_api.KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"entryPoint": "python"}, ".entryPoint: no such field of RayJobSpec"),
        ({"backoffLimit": "2"}, ".backoffLimit: integer, not '2'"),
        ({"submissionMode": "Http"}, ".submissionMode: one of"),
        ({"rayClusterSpec": {"workerGroupSpecs": []}}, ".headGroupSpec: is required"),
        ({"deletionStrategy": {}}, "not defined here"),
    ],
)
def test_a_field_that_kuberay_does_not_know_is_found(damage: dict[str, Any], message: str) -> None:
    spec = documents(CLUSTER / "kuberay" / "embed.yaml")[0]["spec"]
    assert not list(kuberay_api.problems(spec, "RayJobSpec"))
    assert any(message in problem for problem in kuberay_api.problems({**spec, **damage}, "RayJobSpec"))


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    head = documents(CLUSTER / "kuberay" / "cluster.yaml")[0]["spec"]["headGroupSpec"]
    head["template"]["spec"]["containers"][0]["securtyContext"] = {}
    assert any("securtyContext" in problem for problem in kuberay_api.problems(head, "HeadGroupSpec"))


@pytest.mark.parametrize(("file", "text"), entrypoints(), ids=lambda value: value[:60])
def test_the_jobs_accept_every_command(file: str, text: str) -> None:
    assert parse_job(text), file


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
    assert spec["rayVersion"] == ray.__version__
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
    for path in KUBERAY:
        for document in documents(path):
            for spec in [document.get("spec", {}), *every("jobTemplate", document)]:
                requested = re.search(r"PERSONA_GPUS=(\d+)", spec.get("entrypoint", ""))
                if requested:
                    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
                    assert 0 < int(requested[1]) <= next(g["maxReplicas"] for g in groups if g["groupName"] == "gpu")


def test_every_ray_job_cleans_up_and_retries() -> None:
    jobs = [one for path in KUBERAY for document in documents(path) for one in _ray_jobs(document)]
    assert {re.search(r"jobs\.(\w+)", job["entrypoint"])[1] for job in jobs} == {  # type: ignore[index]
        "embed",
        "train",
        "generate",
        "evaluate",
    }
    for job in jobs:
        assert job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] > 0
        assert job["backoffLimit"] >= 1 and job["activeDeadlineSeconds"] > 0


def _ray_jobs(document: dict[str, Any]) -> list[dict[str, Any]]:
    if document["kind"] == "RayCronJob":
        return [document["spec"]["jobTemplate"]]
    return [document["spec"]] if document["kind"] == "RayJob" else []


def test_no_pod_runs_as_root_or_may_become_root() -> None:
    uid = int(re.search(r"^USER (\d+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)[1])  # type: ignore[index]
    assert uid > 0
    for file, pod, container in containers():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["seccompProfile"] == {"type": "RuntimeDefault"}, file
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert context["runAsUser"] == uid or container["name"] == "redis", file


def test_secrets_are_referenced_and_not_written_out() -> None:
    for _, _, container in containers():
        for variable in container.get("env", []):
            if re.search("TOKEN|PASSWORD|SECRET|KEY", variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"]


def test_the_schedules_do_not_overlap_and_their_id_is_the_time_they_were_due() -> None:
    cron = documents(CLUSTER / "kuberay" / "refresh-cronjob.yaml")[0]["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    job = cron["jobTemplate"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    source = next(one for one in container["env"] if one["name"] == "SUBMISSION_ID")["valueFrom"]
    assert source == {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    assert container["command"][container["command"].index("--id") + 1] == "$(SUBMISSION_ID)"
    # podFailurePolicy requires Never; it tells the job's own exit codes from lost machines.
    assert pod["restartPolicy"] == "Never"
    final = next(rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    assert final["values"] == [1, 2, 3] and final["containerName"] == container["name"]
    by_kuberay = documents(CLUSTER / "kuberay" / "refresh-raycronjob.yaml")[0]["spec"]
    assert (by_kuberay["schedule"], by_kuberay["timeZone"]) == (cron["schedule"], cron["timeZone"])
    assert parse_job(by_kuberay["jobTemplate"]["entrypoint"]).sync


def test_only_ray_the_operator_and_prometheus_reach_the_pods() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in documents(CLUSTER / "kuberay" / "access.yaml")[1:]}
    ours = policies["persona-plug"]
    assert ours["policyTypes"] == ["Ingress", "Egress"]
    assert all(rule.get("from") for rule in ours["ingress"]), "a rule without `from` allows everyone"
    outside = next(peer["ipBlock"] for rule in ours["egress"] for peer in rule["to"] if "ipBlock" in peer)
    assert "169.254.169.254/32" in outside["except"]
    labels = {
        template["metadata"]["labels"]["app"]
        for path in KUBERAY
        for document in documents(path)
        for template in every("template", document)
    }
    assert labels == set(policies)


@pytest.fixture
def ray_up() -> dict[str, Any]:
    return documents(CLUSTER / "ray-up" / "aws.yaml")[0]


def test_ray_accepts_the_ray_up_file(ray_up: dict[str, Any]) -> None:
    validate_config(prepare_config(ray_up))


def test_a_key_that_ray_up_does_not_know_is_found(ray_up: dict[str, Any]) -> None:
    from jsonschema import ValidationError

    ray_up["available_node_types"]["gpu"]["max_worker"] = 1
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(ray_up))


def test_ray_up_has_gpus_on_spot_a_head_without_work_and_a_private_dashboard(ray_up: dict[str, Any]) -> None:
    types = ray_up["available_node_types"]
    head, cpu, gpu = types["head"], types["cpu"], types["gpu"]
    assert head["resources"] == {"CPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    for worker in (cpu, gpu):
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["min_workers"] == 0 and gpu["resources"]["CPU"] >= 2 and cpu["min_workers"] * cpu["resources"]["CPU"] > 1
    assert cpu["max_workers"] + gpu["max_workers"] <= ray_up["max_workers"]
    start = " ".join(ray_up["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "--num-cpus=0" in start
    assert "--env RAY_AUTH_MODE=token" in ray_up["docker"]["run_options"]
    assert not ray_up["provider"]["cache_stopped_nodes"]


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


def test_the_image_is_pinned_and_contains_what_the_package_needs() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    allowed = (CLUSTER / "Dockerfile.dockerignore").read_text().split("\n")
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]}
    assert copied and all((ROOT / name).exists() and f"!{name}" in allowed for name in copied)
    installs = re.findall(r"pip install [^\n&]*", text)
    assert installs and all("--constraint constraints.txt" in install for install in installs)
    assert "python:3.11" in text and "DS_BUILD_OPS=0" in text
    assert not re.search(r"^FROM \S+:latest|^FROM [^:\s$]+/[^:\s]+\s", text, re.MULTILINE)
