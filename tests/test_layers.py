"""The arrows of the house: what may import what, what `--help` may load, and what no file may hold."""

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("persona/**/*.py"), *ROOT.glob("jobs/**/*.py")])
PERSONA = [path for path in SOURCES if path.is_relative_to(ROOT / "persona")]
JOBS = [path.stem for path in sorted(ROOT.glob("jobs/*.py")) if not path.stem.startswith("_")]
DRAWS_HELP = "import cyclopts.help, rich.console, rich.markdown, rich.table"
# What tasks of Ray Data import where no model is at work.
WITHOUT_A_MODEL = (
    "inputs.derived_requests",
    "inputs.histories",
    "inputs.reader",
    "inputs.requests",
    "plug.record",
    "retrieval.bm25",
    "retrieval.dense",
    "retrieval.lookup",
    "retrieval.recency",
    "store.join",
    "store.store",
    "store.writer",
    "training.order",
)
HEAVY = ("boto3", "deepspeed", "deltalake", "numpy", "pandas", "pyarrow", "ray", "torch", "transformers")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check():
    assert PERSONA
    assert JOBS


@pytest.mark.parametrize("path", PERSONA, ids=name)
def test_persona_names_neither_ray_nor_the_jobs(path: Path):
    assert not {module.split(".")[0] for module in imported(path)} & {"ray", "jobs"}


def test_persona_loads_neither_ray_nor_the_jobs():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PERSONA]
    code = (
        "import importlib, json, sys\n"
        f"for module in {modules}: importlib.import_module(module.removesuffix('.__init__'))\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "persona" in loaded
    assert not loaded & {"ray", "jobs"}


def test_tasks_without_a_model_load_no_torch():
    """Ray Data runs them in processes by the dozen, of which each would take seconds to begin."""
    modules = ", ".join(f"persona.{name}" for name in WITHOUT_A_MODEL)
    code = f"import {modules}, sys; print('loaded:', *({{'torch', 'transformers'}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "loaded:"


def timed(*words: str) -> tuple[float, str]:
    """Seconds of processor time that one run of Python takes, and what it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.mark.parametrize("job", JOBS)
def test_help_takes_little_more_than_what_draws_it(job: str):
    # Beside each other, as a ratio: what a second of a machine is worth changes with what else it does.
    ours = [timed("-m", f"jobs.{job}", "--help") for _ in range(3)]
    drawing = [timed("-c", DRAWS_HELP) for _ in range(3)]
    assert all(f"python -m jobs.{job}" in said for _, said in ours)
    assert min(ours)[0] < 2.5 * min(drawing)[0]


@pytest.mark.parametrize("job", JOBS)
def test_help_loads_nothing_heavy(job: str):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['job', '--help']\n"
        f"try: runpy.run_module('jobs.{job}', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_has_a_subject(path: Path):
    if path != ROOT / "persona/engines/base.py":  # the interface of an engine
        assert path.stem.strip("_") not in {"utils", "util", "helpers", "common", "base", "misc"}
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text())), "the first line says what the module is about"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_pickle_and_no_remote_code(path: Path):
    modules = {module.split(".")[0] for module in imported(path)}
    assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True"
