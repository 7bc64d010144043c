"""The pods of `cluster/kuberay`: who may reach them, what they may do, what keeps a head alive, where they fit."""

import re
from typing import Any

import pytest

from tests.cluster.manifests import APPLIED, CLUSTER, containers, documents, every, policy, ray_clusters

CLUSTERS = pytest.mark.parametrize(("name", "spec"), ray_clusters(), ids=lambda value: str(value)[:10])
SETUP = CLUSTER / "kuberay" / "setup"
GIB = 2**30
# AWS: virtual CPUs, memory in GiB, and pods at most with one address each, which size what EKS reserves.
MACHINES = {"m7i.xlarge": (4, 16, 58), "m7i.2xlarge": (8, 32, 58), "g6.4xlarge": (16, 64, 234)}


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [one for one in documents(SETUP) if one["kind"] == kind]


def head(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec["headGroupSpec"]["template"]
    return found


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi)?", text).groups()  # type: ignore[union-attr]
    return float(number) * {None: 1, "m": 1e-3, "Mi": 2**20, "Gi": GIB}[unit]


def test_no_pod_runs_as_root_or_may_become_root() -> None:
    uid = int(re.search(r"^USER (\d+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)[1])  # type: ignore[index]
    assert uid > 0
    for file, pod, container in containers():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["seccompProfile"] == {"type": "RuntimeDefault"}, file
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert context["runAsUser"] == uid or container["name"] == "redis", file


@CLUSTERS
def test_the_autoscaler_passes_the_namespaces_pod_security(name: str, spec: dict[str, Any]) -> None:
    (namespace,) = of_kind("Namespace")
    labels = namespace["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "warn", "audit")} == {"restricted"}
    # KubeRay adds this container to the head's pod, and by itself gives it no security context.
    context = spec["autoscalerOptions"]["securityContext"]
    assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_only_ray_the_operator_and_prometheus_reach_the_pods() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind("NetworkPolicy")}
    ours = policies["persona-plug"]
    assert ours["policyTypes"] == ["Ingress", "Egress"]
    assert all(rule.get("from") for rule in ours["ingress"]), "a rule without `from` allows everyone"
    outside = next(peer["ipBlock"] for rule in ours["egress"] for peer in rule["to"] if "ipBlock" in peer)
    assert "169.254.169.254/32" in outside["except"]
    labels = {
        template["metadata"]["labels"]["app"]
        for path in APPLIED
        for document in documents(path)
        for template in every("template", document)
    }
    assert labels == set(policies)


def test_the_operator_is_admitted_by_its_label_wherever_it_is_installed() -> None:
    ours = next(one["spec"] for one in of_kind("NetworkPolicy") if one["metadata"]["name"] == "persona-plug")
    (rule,) = [one for one in ours["ingress"] if {"protocol": "TCP", "port": 8265} in one.get("ports", [])]
    # The label that the operator's chart gives its pods, under any release name.
    assert rule["from"] == [
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}}
    ]
    assert "helm install kuberay-operator" in (CLUSTER / "README.md").read_text()


@CLUSTERS
def test_workers_have_an_account_of_their_own_without_a_token_for_kubernetes(name: str, spec: dict[str, Any]) -> None:
    accounts = {one["metadata"]["name"]: one for one in of_kind("ServiceAccount")}
    assert head(spec)["spec"]["serviceAccountName"] == "persona-plug-head"
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("persona-plug-worker", False)
    condition = policy("trust-pods.json")["Statement"][0]["Condition"]["StringEquals"]
    trusted = next(value for key, value in condition.items() if key.endswith(":sub"))
    assert {f"system:serviceaccount:persona-plug:{account}" for account in accounts} == set(trusted)


@CLUSTERS
def test_nothing_evicts_a_head(name: str, spec: dict[str, Any]) -> None:
    template = head(spec)
    assert template["metadata"]["annotations"] == {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }
    (priority,), (budget,) = of_kind("PriorityClass"), of_kind("PodDisruptionBudget")
    assert template["spec"]["priorityClassName"] == priority["metadata"]["name"] and priority["value"] > 0
    # KubeRay gives this label to heads.
    selected = {**template["metadata"]["labels"], "ray.io/node-type": "head"}
    assert budget["spec"]["selector"]["matchLabels"].items() <= selected.items()
    assert budget["spec"]["maxUnavailable"] == 0


def places(pod: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether the pod's node affinity admits a node with these labels."""
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]

    def matches(expression: dict[str, Any]) -> bool:
        has = labels.get(expression["key"]) in expression["values"]
        return {"In": has, "NotIn": not has}[expression["operator"]]

    return any(all(matches(one) for one in term["matchExpressions"]) for term in terms)


@CLUSTERS
@pytest.mark.parametrize(
    ("labels", "is_on_demand"),
    [
        ({"eks.amazonaws.com/capacityType": "ON_DEMAND"}, True),
        ({"karpenter.sh/capacity-type": "on-demand"}, True),
        ({"eks.amazonaws.com/capacityType": "SPOT"}, False),
        ({"karpenter.sh/capacity-type": "spot"}, False),
        ({}, False),
    ],
)
def test_a_head_needs_a_machine_that_says_it_is_on_demand(
    name: str, spec: dict[str, Any], labels: dict[str, str], is_on_demand: bool
) -> None:
    assert places(head(spec)["spec"], labels) == is_on_demand


def allocatable(machine: str) -> tuple[float, float]:
    """CPUs and bytes that EKS leaves for pods.

    EKS reserves 6 % of the first CPU, 1 % of the second, 0.5 % of the next two and 0.25 % of the others, 255 MiB and
    11 MiB a pod, and evicts at 100 MiB (https://docs.aws.amazon.com/eks/latest/best-practices/scalability.html;
    `bootstrap.sh` of the EKS AMI). The hypervisor takes up to 7.5 % of the memory, as Karpenter assumes by default.
    """
    cpus, memory_gib, pods = MACHINES[machine]
    shares = [0.06, 0.01, 0.005, 0.005, *[0.0025] * (cpus - 4)]
    return cpus - sum(shares), memory_gib * GIB * 0.925 - (255 + 11 * pods + 100) * 2**20


@CLUSTERS
def test_every_pod_fits_its_machine_of_ray_up(name: str, spec: dict[str, Any]) -> None:
    types = documents(CLUSTER / "ray-up" / "aws.yaml")[0]["available_node_types"]
    autoscaler = spec["autoscalerOptions"]["resources"]["requests"]
    pods = {"head": [head(spec)["spec"]["containers"][0]["resources"]["requests"], autoscaler]}
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        pods[group["groupName"]] = [container["resources"]["requests"]]
    assert set(pods) == set(types)
    for group, requests in pods.items():
        cpus, memory = allocatable(types[group]["node_config"]["InstanceType"])
        assert sum(quantity(one["cpu"]) for one in requests) <= cpus - 0.25, group
        # What is left is for the cluster's own DaemonSets.
        assert sum(quantity(one["memory"]) for one in requests) <= memory - GIB, group
