"""Every command of both READMEs is one that its program takes, and the table of sizes is what the code says."""

import math
import re
import shlex
from pathlib import Path

import click
import pytest
from ray.scripts.scripts import cli

from persona import cost
from tests.cluster.manifests import CLUSTER, READMES, ROOT, parse_job, shell_lines

LINES = [(readme, line) for readme in READMES for line in shell_lines(readme)]
# What these programs can be told is theirs; we see that the word is one of theirs and that the files are there.
KNOWN = {
    "aws": {"iam", "s3"},
    "cluster/aws/bucket.sh": None,
    "cluster/local.sh": None,
    "docker": {"build"},
    "export": None,
    "kubectl": {"apply", "config", "create", "get", "patch", "port-forward"},
}


def check_ray(words: list[str]) -> None:
    """Raises when Ray's own parser of that command does not take the flags."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None and name is not None
        command = found
    command.make_context(command.name, list(words))


@pytest.mark.parametrize(("readme", "line"), LINES, ids=lambda value: value[:50] if isinstance(value, str) else "")
def test_every_command_is_taken(readme: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if "-m" in words and words[words.index("-m") + 1].startswith("jobs."):
        assert parse_job(line)
        words = words[: words.index("-m") - 1]  # what stands before `python`
        words += ["true"] if words else []
    if not words:
        return
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "ray":
        check_ray(rest)
    else:
        assert program in KNOWN, f"{readme.name}: nobody checks {program}"
        known = KNOWN[program]
        assert known is None or rest[0] in known
        files = [word.removeprefix("file://") for word in words if "cluster/" in word and "://corp" not in word]
        assert all((ROOT / file).exists() for file in files), files


def test_ray_would_refuse_a_flag_that_it_does_not_have() -> None:
    with pytest.raises(click.UsageError, match="--yess"):
        check_ray(["up", "cluster/ray-up/aws.yaml", "--yess"])


def test_every_file_of_the_folder_is_in_its_readme() -> None:
    text = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.name not in ("README.md", "Dockerfile.dockerignore"):
            folder = path.parent.relative_to(CLUSTER)
            named = path.name in text or f"`{folder}/`" in text
            assert named, path


def sizes() -> list[list[str]]:
    table = (CLUSTER / "README.md").read_text().split("## Sizes")[1].split("\n## ")[0]
    return [re.findall(r"[^|]+", line) for line in table.splitlines() if re.match(r"\| [\d,]+ \|", line)]


# BAAI/bge-base-en-v1.5: as BERT base.
ENCODER = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}


@pytest.mark.parametrize("row", sizes(), ids=lambda row: row[0].strip())
def test_the_table_of_sizes_is_what_the_code_says(row: list[str]) -> None:
    users, behaviors, buckets, store_gb, hours, gpus, nightly = (float(re.sub(r"[^\d.]", "", cell)) for cell in row)
    assert behaviors == 100 * users
    assert buckets == max(64, math.ceil(behaviors / 100_000))  # one per 100,000 behaviors, at least the default
    assert store_gb == round(behaviors * (2 * 768 + 60) / 1e9)  # a float16 vector and about 60 bytes of keys per row
    expected = cost.gpu_hours(cost.encoder_flops(ENCODER, n_texts=behaviors, tokens=100), tflops=30)
    assert hours == pytest.approx(expected, rel=0.05, abs=0.05)
    assert gpus == math.ceil(expected / 8)
    assert nightly == pytest.approx(expected / 100, rel=0.05, abs=0.0005)
