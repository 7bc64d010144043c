"""The fields of KubeRay's resources (v1.7) and the Prometheus operator's (v0.86), and a check of a file against them.

A type is a name defined below, a plain type, `k8s:` and a type of Kubernetes itself, `map` (of text to text), a tuple
of allowed words, or a list of one of these. Types that no file uses are named but not defined; define one from the
reference before you use it.
"""

from collections.abc import Iterator
from typing import Any

import kubernetes_validate

KUBERNETES = "1.31"
_PLAIN = {"string": str, "integer": int, "boolean": bool, "float": (int, float)}
_OBJECT = {"apiVersion": "string", "kind": "string", "metadata": "k8s:ObjectMeta"}

TYPES: dict[str, dict[str, Any]] = {
    "RayCluster": {**_OBJECT, "spec": "RayClusterSpec"},
    "RayJob": {**_OBJECT, "spec": "RayJobSpec"},
    "RayJobSpec": {
        "activeDeadlineSeconds": "integer",
        "backoffLimit": "integer",
        "rayClusterSpec": "RayClusterSpec",
        "submitterPodTemplate": "k8s:PodTemplateSpec",
        "metadata": "map",
        "clusterSelector": "map",
        "submitterConfig": "SubmitterConfig",
        "managedBy": "string",
        "deletionStrategy": "DeletionStrategy",
        "entrypoint": "string",
        "runtimeEnvYAML": "string",
        "jobId": "string",
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "entrypointResources": "string",
        "entrypointNumCpus": "float",
        "entrypointNumGpus": "float",
        "ttlSecondsAfterFinished": "integer",
        "preRunningDeadlineSeconds": "integer",
        "shutdownAfterJobFinishes": "boolean",
        "suspend": "boolean",
    },
    "SubmitterConfig": {"backoffLimit": "integer"},
    "DeletionStrategy": {"deletionRules": ["DeletionRule"]},
    "DeletionRule": {
        "policy": ("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"),
        "condition": "DeletionCondition",
    },
    "DeletionCondition": {
        "jobStatus": ("SUCCEEDED", "FAILED"),
        "jobDeploymentStatus": ("Failed",),
        "ttlSeconds": "integer",
    },
    "RayClusterSpec": {
        "upgradeStrategy": "RayClusterUpgradeStrategy",
        "authOptions": "AuthOptions",
        "suspend": "boolean",
        "managedBy": "string",
        "autoscalerOptions": "AutoscalerOptions",
        "headServiceAnnotations": "map",
        "enableInTreeAutoscaling": "boolean",
        "gcsFaultToleranceOptions": "GcsFaultToleranceOptions",
        "historyServerOptions": "HistoryServerOptions",
        "networkPolicy": "NetworkPolicyConfig",
        "tlsOptions": "TLSOptions",
        "headGroupSpec": "HeadGroupSpec",
        "rayVersion": "string",
        "workerGroupSpecs": ["WorkerGroupSpec"],
    },
    "AuthOptions": {"enableK8sTokenAuth": "boolean", "secretName": "string", "mode": ("disabled", "token")},
    "AutoscalerOptions": {
        "resources": "k8s:ResourceRequirements",
        "image": "string",
        "imagePullPolicy": "string",
        "securityContext": "k8s:SecurityContext",
        "idleTimeoutSeconds": "integer",
        "upscalingMode": ("Default", "Aggressive", "Conservative"),
        "version": ("v1", "v2"),
        "env": ["k8s:EnvVar"],
        "envFrom": ["k8s:EnvFromSource"],
        "volumeMounts": ["k8s:VolumeMount"],
        "command": ["string"],
        "args": ["string"],
    },
    "GcsFaultToleranceOptions": {
        "backend": ("redis", "rocksdb"),
        "redisUsername": "RedisCredential",
        "redisPassword": "RedisCredential",
        "externalStorageNamespace": "string",
        "redisAddress": "string",
        "storage": "GcsEmbeddedStorage",
    },
    "RedisCredential": {"valueFrom": "k8s:EnvVarSource", "value": "string"},
    "HeadGroupSpec": {
        "template": "k8s:PodTemplateSpec",
        "headService": "k8s:Service",
        "enableIngress": "boolean",
        "ingressOptions": "IngressOptions",
        "resources": "map",
        "labels": "map",
        "rayStartParams": "map",
        "serviceType": "string",
    },
    "WorkerGroupSpec": {
        "suspend": "boolean",
        "groupName": "string",
        "replicas": "integer",
        "minReplicas": "integer",
        "maxReplicas": "integer",
        "idleTimeoutSeconds": "integer",
        "priority": "integer",
        "resources": "map",
        "labels": "map",
        "rayStartParams": "map",
        "template": "k8s:PodTemplateSpec",
        "scaleStrategy": "ScaleStrategy",
        "numOfHosts": "integer",
    },
    "PodMonitor": {**_OBJECT, "spec": "PodMonitorSpec"},
    "PodMonitorSpec": {
        "selector": "k8s:LabelSelector",
        "namespaceSelector": "NamespaceSelector",
        "podMetricsEndpoints": ["PodMetricsEndpoint"],
        "podTargetLabels": ["string"],
        "jobLabel": "string",
    },
    "PodMetricsEndpoint": {"port": "string", "path": "string", "interval": "string", "scrapeTimeout": "string"},
    "PrometheusRule": {**_OBJECT, "spec": "PrometheusRuleSpec"},
    "PrometheusRuleSpec": {"groups": ["RuleGroup"]},
    "RuleGroup": {"name": "string", "interval": "string", "labels": "map", "limit": "integer", "rules": ["Rule"]},
    "Rule": {
        "alert": "string",
        "expr": "string",
        "for": "string",
        "keep_firing_for": "string",
        "labels": "map",
        "annotations": "map",
    },
}
API_VERSIONS = {
    **dict.fromkeys(("RayCluster", "RayJob"), "ray.io/v1"),
    **dict.fromkeys(("PodMonitor", "PrometheusRule"), "monitoring.coreos.com/v1"),
}
REQUIRED = {
    "RayCluster": {"spec"},
    "RayJob": {"spec"},
    "RayClusterSpec": {"headGroupSpec"},
    "HeadGroupSpec": {"template", "rayStartParams"},
    "WorkerGroupSpec": {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"},
    "DeletionRule": {"policy", "condition"},
    "PodMonitorSpec": {"selector"},
    "RuleGroup": {"name"},
    "Rule": {"alert", "expr"},
}


def problems(value: Any, kind: Any, path: str = "") -> Iterator[str]:
    """Everything in `value` that is not a valid `kind`, each with its path."""
    if isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{path}: a list, not {value!r}"
            return
        for index, one in enumerate(value):
            yield from problems(one, kind[0], f"{path}[{index}]")
    elif isinstance(kind, tuple):
        if value not in kind:
            yield f"{path}: one of {kind}, not {value!r}"
    elif kind == "map":
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            yield f"{path}: a mapping of text to text (quote the numbers), not {value!r}"
    elif kind in _PLAIN:
        if not isinstance(value, _PLAIN[kind]) or (kind != "boolean" and isinstance(value, bool)):
            yield f"{path}: {kind}, not {value!r}"
    elif kind.startswith("k8s:"):
        yield from _kubernetes_problems(value, kind.removeprefix("k8s:"), path)
    elif kind not in TYPES:
        yield f"{path}: {kind} is not defined here yet"
    elif not isinstance(value, dict):
        yield f"{path}: a {kind}, not {value!r}"
    else:
        for name in REQUIRED.get(kind, set()) - value.keys():
            yield f"{path}.{name}: is required"
        for name, one in value.items():
            if name in TYPES[kind]:
                yield from problems(one, TYPES[kind][name], f"{path}.{name}")
            else:
                yield f"{path}.{name}: no such field of {kind}"


def _kubernetes_problems(value: Any, kind: str, path: str) -> Iterator[str]:
    """The same for a type of Kubernetes itself, checked inside the smallest object that contains it."""
    box: dict[str, Any] = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}
    container: dict[str, Any] = {"name": "a", "image": "a"}
    if kind == "ObjectMeta":
        box = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": value}
    elif kind == "PodTemplateSpec":
        box = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": value}
    elif kind == "ResourceRequirements":
        box["spec"] = {"containers": [{**container, "resources": value}]}
    elif kind == "SecurityContext":
        box["spec"] = {"containers": [{**container, "securityContext": value}]}
    elif kind == "LabelSelector":
        box = {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "a"}}
        box["spec"] = {"selector": value}
    elif kind == "EnvVarSource":
        box["spec"] = {"containers": [{**container, "env": [{"name": "A", "valueFrom": value}]}]}
    else:
        yield f"{path}: {kind} is not checked yet"
        return
    try:
        kubernetes_validate.validate(box, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{path}: {error}"
