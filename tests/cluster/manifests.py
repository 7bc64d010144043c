"""The files of `cluster/` as they are applied: documents, pods, and the commands that call jobs."""

import functools
import importlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.runtime.configuration import read_config
from tests.pages import PAGES, ROOT, name, shell_lines

CLUSTER = ROOT / "cluster"
APPLIED = [*sorted(path.parent for path in (CLUSTER / "kuberay").glob("*/kustomization.yaml")), CLUSTER / "schedule"]
"""The folders with pods that `kubectl apply -k` is given; those below `base` are parts of them."""


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file, or those that `kubectl apply -k` makes of a folder. Raises for a duplicate key."""
    return list(yaml.load_all(_rendered(path) if path.is_dir() else path.read_text(), Loader=_Strict))


@functools.cache
def _rendered(folder: Path) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None and "CI" not in os.environ:
        pytest.skip("kubectl is not installed, which renders the kustomizations", allow_module_level=True)
    assert kubectl is not None, "CI needs kubectl, to render the kustomizations"
    return subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout


class _Strict(yaml.SafeLoader):
    """Refuses a duplicate key, of which YAML would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(names) == len(set(names)), f"line {node.start_mark.line + 1}: duplicate key in {names}"
        return super().construct_mapping(node, deep)


def every(name: str, value: Any) -> Iterator[Any]:
    """The values of all keys of that name, at any depth."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key == name:
                yield one
            yield from every(name, one)
    elif isinstance(value, list):
        for one in value:
            yield from every(name, one)


def ray_clusters() -> list[tuple[str, dict[str, Any]]]:
    """Every RayClusterSpec, with the name of its folder."""
    found = []
    for path in APPLIED:
        for document in documents(path):
            if document["kind"] == "RayCluster":
                found.append((path.name, document["spec"]))
            found += [(path.name, spec) for spec in every("rayClusterSpec", document)]
    return found


def containers() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every container, with the name of its folder and the spec of its pod."""
    return [
        (path.name, pod, container)
        for path in APPLIED
        for document in documents(path)
        for template in [*every("template", document)]
        for pod in [template["spec"]]
        if "containers" in pod
        for container in pod["containers"]
    ]


def entrypoints() -> list[tuple[str, str]]:
    """Every command that calls a job, in every file of cluster/ and in the pages, with the name of its folder."""
    found = []
    for path in APPLIED:
        for document in documents(path):
            found += [(path.name, one) for one in every("entrypoint", document)]
    found += [("sky", line) for line in documents(CLUSTER / "sky.yaml")[0]["run"].splitlines()]
    for page in PAGES:
        found += [(name(page), line) for line in shell_lines(page) if calls_job(shlex.split(line))]
    return found


def calls_job(words: list[str]) -> tuple[int, str, list[str]] | None:
    """Where a command calls a job, the job's module, and its flags: `python -m jobs.X …` or `persona-plug X …`."""
    n_before = 1 + sum("=" in word for word in words) if words[0] == "env" else 0
    if words[n_before : n_before + 1] == ["persona-plug"]:
        return n_before, f"jobs.{words[n_before + 1]}", words[n_before + 2 :]
    for at, word in enumerate(words):
        if word == "-m" and words[at + 1].startswith("jobs."):
            return at - 1, words[at + 1], words[at + 2 :]
    return None


def parse_job(text: str) -> Any:
    """The config that the job's own parser makes of a command; the entrypoint of `jobs.submit` is parsed, too."""
    call = calls_job(shlex.split(text))
    assert call is not None, text
    _, module, flags = call
    job = importlib.import_module(module)
    flags = ["id" if "$(" in word else word for word in flags]
    config = read_config(job.Config, flags)
    assert config is not None
    if module == "jobs.submit":
        parse_job(config.entrypoint)
    return config


def policy(name: str) -> dict[str, Any]:
    """A JSON file of cluster/aws."""
    found: dict[str, Any] = json.loads((CLUSTER / "aws" / name).read_text())
    return found
