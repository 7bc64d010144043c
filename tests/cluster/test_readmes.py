"""Both READMEs and docs/: every command parses, links lead somewhere, tables and columns are those of the code."""

import ast
import importlib
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
from ray.scripts.scripts import cli

from jobs.runtime.configuration import read_config
from jobs.runtime.inputs import find_histories
from jobs.runtime.job_options import InputFormat
from persona import cost
from persona.exchange.plan import plan_exchange
from persona.models import packaged
from persona.store.schema import LAYOUTS
from tests import pages
from tests.benchmarks.size_plan import buckets
from tests.cluster.manifests import CLUSTER, calls_job, parse_job
from tests.pages import DATA, DOCS, PAGES, README, RESULTS, ROOT, shell_lines

LINES = [(page, line) for page in PAGES for line in shell_lines(page)]
WITH_LINKS = [*PAGES, RESULTS, ROOT / "CHANGELOG.md"]
# Other programs have parsers of their own; here only the subcommand is checked, and that the files exist.
KNOWN = {
    "aws": {"ec2", "iam", "s3"},
    "cluster/aws/bucket.sh": None,
    "cluster/local.sh": None,
    "cluster/schedule/steps.sh": {"nightly", "weekly", "promote"},
    "docker": {"build"},
    "export": None,
    "helm": {"install"},
    "kubectl": {"apply", "config", "create", "delete", "get", "patch", "port-forward"},
    "source": None,
}
# In the text of a page, of the front door or of another program.
OTHER_FLAGS = {"--help", "--version"}


def check_ray(words: list[str]) -> None:
    """Raises when Ray's own parser of that command refuses the flags."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None and name is not None
        command = found
    command.make_context(command.name, list(words))


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda value: value[:50] if isinstance(value, str) else "")
def test_every_command_parses(page: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[0] == "persona-plug" and words[1] in OTHER_FLAGS:
        return
    if call := calls_job(words):
        assert parse_job(line)
        before = words[: call[0]]
        words = [*before, "true"] if before else []
    if not words:
        return
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "ray":
        check_ray(rest)
    elif program == "python" and rest[0] == "-m" and rest[1].startswith("tests.benchmarks."):
        check_benchmark(rest[1], rest[2:])
    elif setting := re.fullmatch(r"[A-Z]+=\$\(python", program):
        assert setting and rest[0] == "-c"
        check_model(rest[1].removesuffix(")"))
    else:
        assert program in KNOWN, f"{page.name}: no check for {program}"
        known = KNOWN[program]
        assert known is None or rest[0] in known
        files = [
            re.sub(r"^(file://|--from-file=)", "", word)
            for word in words
            if "cluster/" in word and "://corp" not in word
        ]
        assert all((ROOT / file).exists() for file in files), files


def check_benchmark(module: str, words: list[str]) -> None:
    """A benchmark that exists, with flags that it defines."""
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert all(f'"{word}"' in source for word in words if word.startswith("--")), words


def check_model(code: str) -> None:
    """A line that prints the folder of a packaged model; the model itself is not unpacked."""
    ast.parse(code)
    called = re.fullmatch(r"from persona\.models import packaged; print\(packaged\.(\w+)\(\)\)", code)
    assert called and callable(getattr(packaged, called[1]))


def test_a_flag_that_ray_does_not_have_is_found() -> None:
    with pytest.raises(click.UsageError, match="--yess"):
        check_ray(["up", "cluster/ray-up/aws.yaml", "--yess"])


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("env PERSONA_GPUS=4 python -m jobs.embed --histories a --store b", "jobs.embed"),
        ("persona-plug embed --histories a --store b", "jobs.embed"),
        ("env PERSONA_GPUS=4 persona-plug embed --histories a --store b", "jobs.embed"),
        ("ray job submit -- python -m jobs.embed --histories a --store b", "jobs.embed"),
    ],
)
def test_both_spellings_of_a_job_are_recognized(text: str, module: str) -> None:
    call = calls_job(shlex.split(text))
    assert call is not None
    assert (call[1], call[2]) == (module, ["--histories", "a", "--store", "b"])
    assert parse_job(text).store == "b"


def flags_of_jobs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every flag in the `--help` of any job."""
    monkeypatch.setenv("COLUMNS", "400")
    capsys.readouterr()
    for path in (ROOT / "jobs").glob("[a-z]*.py"):
        assert read_config(importlib.import_module(f"jobs.{path.stem}").Config, ["--help"]) is None
    return set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))


def test_every_flag_in_the_text_of_a_page_exists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = flags_of_jobs(capsys, monkeypatch) | OTHER_FLAGS
    assert "--persona-tokens" in known
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", pages.prose(page)))
        assert not named - known, page


def test_every_file_of_the_folder_is_in_its_readme() -> None:
    text = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.name not in ("README.md", "Dockerfile.dockerignore"):
            folders = path.relative_to(CLUSTER).parents
            assert path.name in text or any(f"`{folder}/`" in text for folder in folders), path


@pytest.mark.parametrize("page", WITH_LINKS, ids=pages.name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target, anchor in pages.links(page):
        assert target.exists(), target
        assert not anchor or anchor in pages.anchors(target), f"{target.name}#{anchor}"


def test_the_readme_links_every_page_and_has_at_most_150_lines() -> None:
    linked = {target for target, _ in pages.links(README)}
    assert {page.resolve() for page in DOCS} <= linked
    assert (CLUSTER / "README.md").resolve() in linked and RESULTS.resolve() in linked
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [*PAGES, RESULTS], ids=pages.name)
def test_tables_have_at_most_five_columns_and_one_interval_a_cell(page: Path) -> None:
    for table in pages.tables(page):
        heads = table[0]
        assert len(heads) <= 5, heads
        for row in table:
            assert len(row) == len(heads), row
            assert all(len(re.findall(r"\[[^\]a-z]*, [^\]]*\]", cell)) <= 1 for cell in row), row


def test_the_benchmarks_can_find_their_place_in_the_results() -> None:
    text = RESULTS.read_text()
    assert text.count("<!-- make bench: begin -->") == text.count("<!-- make bench: end -->") == 1


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_python_blocks_compile(page: Path) -> None:
    for block in pages.blocks(page, "python"):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("table", list(LAYOUTS))
def test_the_columns_of_a_table_are_those_of_the_store(table: str) -> None:
    text = DATA.read_text().split(f"\n`{table}`, one row per ")[1]
    rows = re.search(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert rows is not None
    assert re.findall(r"^\| `(\w+)` \|", rows[0], re.MULTILINE) == LAYOUTS[table].schema.names


def test_the_examples_of_histories_are_read(tmp_path: Path) -> None:
    examples = pages.blocks(DATA, "json")
    assert len(examples) == 2
    for number, example in enumerate(examples):
        (tmp_path / f"{number}.jsonl").write_text(example)
        check_histories(tmp_path / f"{number}.jsonl")


def check_histories(file: Path) -> None:
    """Raises when a job would refuse the file's columns."""
    assert find_histories(str(file), "", InputFormat(), flag="--histories").splits


def test_the_example_splits_histories_by_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"user_id": f"u{i // 3}", "text": f"text {i}", "timestamp": f"2026-11-{1 + i % 3:02}"} for i in range(300)]
    Path("posts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (block,) = (one for one in pages.blocks(DATA, "python") if "posts.jsonl" in one)
    exec(block, {})
    users: dict[str, set[str]] = {}
    n_rows = 0
    for part in ("train", "test"):
        file = Path("posts") / f"{part}.parquet"
        check_histories(file)
        users[part] = set(pq.read_table(file)["user_id"].to_pylist())
        n_rows += pq.read_metadata(file).num_rows
    assert n_rows == len(rows)
    assert 0 < len(users["test"]) < len(users["train"]) and not users["test"] & users["train"]


def sizes(number: int) -> list[list[str]]:
    """The rows of a table about sizes, without its heading and the line below it."""
    tables = [table for table in pages.tables(CLUSTER / "README.md") if table[0][0] == "users"]
    return tables[number][2:]


def numbers(row: list[str]) -> list[float]:
    return [float(re.sub(r"[^\d.]", "", cell)) for cell in row]


# BAAI/bge-base-en-v1.5: as BERT base.
ENCODER: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
KEY_BYTES = 60  # of a row without its vector, about
ROW_BYTES, GPUS = 650, 16  # as in `tests.benchmarks.size_plan`


@pytest.mark.parametrize("row", sizes(0), ids=lambda row: row[0])
def test_the_table_of_sizes_is_what_the_code_computes(row: list[str]) -> None:
    users, n_buckets, store_gb, n_files, task_mib = numbers(row)
    behaviors = int(100 * users)
    assert n_buckets == buckets(behaviors)
    assert store_gb == round(behaviors * (2 * ENCODER["hidden_size"] + KEY_BYTES) / 1e9)
    plan = plan_exchange(behaviors * ROW_BYTES, int(n_buckets))
    assert n_files == plan.n_data_files(behaviors, ENCODER["hidden_size"], GPUS)
    assert task_mib == round(plan.worker_bytes / 2**20)


@pytest.mark.parametrize("row", sizes(1), ids=lambda row: row[0])
def test_the_table_of_hours_is_what_the_code_computes(row: list[str]) -> None:
    users, hours, gpus, nightly = numbers(row)
    expected = cost.gpu_hours(cost.encoder_flops(ENCODER, n_texts=100 * users, tokens=100), tflops=30)
    assert hours == pytest.approx(expected, rel=0.05, abs=0.05)
    assert gpus == math.ceil(expected / 8)
    assert nightly == pytest.approx(expected / 100, rel=0.05, abs=0.0005)
