"""What lies in `cluster/`, read once for all tests: documents, pods, and commands that call jobs."""

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jobs.runtime.configuration import read_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
READMES = [ROOT / "README.md", CLUSTER / "README.md"]
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAY_KINDS = ("RayCluster", "RayJob", "RayCronJob")


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file. Raises for a key that stands there twice."""
    return list(yaml.load_all(path.read_text(), Loader=_Strict))


class _Strict(yaml.SafeLoader):
    """Refuses a mapping with a key twice, of which YAML would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(names) == len(set(names)), f"line {node.start_mark.line + 1}: a key stands there twice: {names}"
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
    """Every RayClusterSpec with the file it stands in."""
    found = []
    for path in KUBERAY:
        for document in documents(path):
            if document["kind"] == "RayCluster":
                found.append((path.stem, document["spec"]))
            found += [(path.stem, spec) for spec in every("rayClusterSpec", document)]
    return found


def containers() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every container, with the file it stands in and its pod's spec."""
    return [
        (path.stem, pod, container)
        for path in KUBERAY
        for document in documents(path)
        for template in [*every("template", document)]
        for pod in [template["spec"]]
        if "containers" in pod
        for container in pod["containers"]
    ]


def entrypoints() -> list[tuple[str, str]]:
    """Every command that calls a job, in every file of cluster/ and in the READMEs, with the place it stands at."""
    found = []
    for path in KUBERAY:
        for document in documents(path):
            found += [(path.stem, one) for one in every("entrypoint", document)]
            found += [(path.stem, shlex.join(one)) for one in every("command", document) if "jobs.submit" in one]
    found += [("crontab", line) for line in crontab_commands()]
    for readme in READMES:
        name = str(readme.relative_to(ROOT))
        found += [(name, line) for line in shell_lines(readme) if "-m jobs." in line]
    return found


def crontab_commands() -> list[str]:
    """What cron would give to the shell, its variables filled in."""
    commands, variables = [], {}
    for line in (CLUSTER / "ray-up" / "crontab").read_text().splitlines():
        if setting := re.fullmatch(r"([A-Z_]+)=(.*)", line):
            variables[setting[1]] = setting[2]
        elif line and not line.startswith("#"):
            schedule = re.fullmatch(r"(?:\S+ ){5}(.*)", line)
            assert schedule is not None, line
            # An unescaped % ends the command.
            assert not re.search(r"(?<!\\)%", schedule[1]), line
            text = re.sub(r"\$\(.*?\)", "2026-11-21T02", schedule[1].replace("\\%", "%"))
            commands.append(re.sub(r"\$([A-Z_]+)", lambda name: variables[name[1]], text))
    return commands


def shell_lines(readme: Path) -> list[str]:
    """The commands of a README's shell blocks, a command a line; comments, output and prompts left out."""
    lines = []
    for kind, block in re.findall(r"```(bash|console)\n(.*?)```", readme.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if kind == "console" and not line.startswith("$ "):
                continue
            if text := shlex.join(shlex.split(line.removeprefix("$ "), comments=True)):
                lines.append(text)
    return lines


def parse_job(text: str) -> Any:
    """The config that a command makes of its flags, by the parser of the job itself; of `jobs.submit`, both."""
    words = shlex.split(text)
    module = words[words.index("-m") + 1]
    job = importlib.import_module(module)
    flags = ["id" if "$(" in word else word for word in words[words.index("-m") + 2 :]]
    # `jobs.store` takes its action without a flag, too.
    config = read_config(job.Config, flags)
    assert config is not None
    if module == "jobs.submit":
        parse_job(config.entrypoint)
    return config


def policy(name: str) -> dict[str, Any]:
    """A JSON file of cluster/aws."""
    found: dict[str, Any] = json.loads((CLUSTER / "aws" / name).read_text())
    return found
