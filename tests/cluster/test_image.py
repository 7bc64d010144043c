"""`cluster/Dockerfile` and its workflow: what an image is made of, what it refuses, and when it gets a name."""

import re
import shlex
import subprocess
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cluster.manifests import CLUSTER, ROOT, documents
from tests.pages import PAGES, shell_lines


def test_the_image_is_pinned_and_contains_what_the_package_needs() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    allowed = (CLUSTER / "Dockerfile.dockerignore").read_text().split("\n")
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]}
    assert copied and all((ROOT / name).exists() and f"!{name}" in allowed for name in copied)
    installs = re.findall(r"pip install [^\n&]*", text)
    assert installs and all("--constraint constraints${EXTRA:+-$EXTRA}.txt" in install for install in installs)
    assert "python:3.11" in text and "DS_BUILD_OPS=0" in text
    assert not re.search(r"^FROM \S+:latest|^FROM [^:\s$]+/[^:\s]+\s", text, re.MULTILINE)


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-vllm.txt"])
def test_the_image_reads_iceberg_tables_with_pinned_packages(constraints: str) -> None:
    assert '".[iceberg${EXTRA:+,$EXTRA}]"' in (CLUSTER / "Dockerfile").read_text()
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / constraints).read_text(), re.MULTILINE)
    needed = {
        one.name
        for one in map(Requirement, ["pyiceberg", *(requires("pyiceberg") or [])])
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }
    assert {canonicalize_name(name) for name in needed} <= {canonicalize_name(name) for name in pinned}


@pytest.mark.parametrize(
    ("variant", "index", "code"), [("cuda", "", 0), ("cpu", "https://torch.example.com/cpu", 0), ("cpu", "", 1)]
)
def test_an_image_for_cpus_needs_torchs_cpu_builds(variant: str, index: str, code: int) -> None:
    text = (CLUSTER / "Dockerfile").read_text().split(" AS packages\n")[1]
    (check,) = re.findall(r"^RUN (if (?:.*\\\n)*.*; fi)$", text, re.MULTILINE)
    assert text.index(check) < text.index("pip install")
    environment = {"PATH": "/usr/bin:/bin", "VARIANT": variant, "TORCH_INDEX": index}
    done = subprocess.run(["sh", "-c", check], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code and ("TORCH_INDEX" in done.stderr) == bool(code)


def test_the_pages_build_the_image_for_cpus_with_that_index() -> None:
    builds = [shlex.split(line) for page in PAGES for line in shell_lines(page) if line.startswith("docker build")]
    assert len(builds) == 3
    for words in builds:
        arguments = {word.partition("=")[0] for word in words if "=" in word}
        wanted = {"VARIANT", "TORCH_INDEX"} if "VARIANT=cpu" in words else {"EXTRA"} if "EXTRA=vllm" in words else set()
        assert arguments == wanted


def test_the_workflow_names_an_image_only_after_its_scan_and_pins_every_action() -> None:
    workflow = documents(ROOT / ".github" / "workflows" / "image.yml")[0]
    assert workflow["permissions"] == {}
    job = workflow["jobs"]["build"]
    assert job["permissions"] == {"contents": "read"}
    steps = job["steps"]
    for step in steps:
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step
    names = [step.get("uses", step.get("run", "")).split("@")[0].split("\n")[0] for step in steps]
    build, scan = names.index("docker/build-push-action"), names.index("anchore/scan-action")
    name = next(at for at, one in enumerate(names) if one.startswith("docker buildx imagetools create"))
    assert build < scan < name
    given = steps[build]["with"]
    assert given["sbom"] is True and given["provenance"] == "mode=max" and "push-by-digest=true" in given["outputs"]
    assert steps[scan]["with"]["fail-build"] is True and "outputs.digest" in steps[scan]["with"]["image"]
    suffixes = {(one["variant"], one["extra"]): one["suffix"] for one in job["strategy"]["matrix"]["include"]}
    assert suffixes == {("cuda", ""): "", ("cuda", "vllm"): "-vllm", ("cpu", ""): "-cpu"}
    arguments = re.findall(r"^(\w+)=", given["build-args"], re.MULTILINE)
    assert set(arguments) == set(re.findall(r"^ARG (\w+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE))
