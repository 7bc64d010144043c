"""The structure of the code: which package may import which, what `--help` may load, and what no file may contain."""

import ast
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import find_cycle, import_graph, imported, module_name

ROOT = Path(__file__).parents[1]
PATHS = sorted([*ROOT.glob("persona/**/*.py"), *ROOT.glob("jobs/**/*.py")])
SOURCES = {module_name(path, ROOT): path.read_text() for path in PATHS}
GRAPH = import_graph(SOURCES)
PACKAGES = {module_name(path, ROOT) for path in PATHS if path.name == "__init__.py"}
PERSONA = [module for module in SOURCES if module.split(".")[0] == "persona"]
JOBS = [path.stem for path in sorted(ROOT.glob("jobs/*.py")) if not path.stem.startswith("_")]
# What each package of persona may import of the others; those further up know nothing of those further down.
ARROWS = {
    "errors": set(),
    "cost": set(),
    "versions": set(),
    "field_types": set(),
    "extensions": {"errors"},
    "option_checks": {"errors"},
    "options": {"errors", "option_checks"},
    "front_texts": {"errors", "option_checks", "options"},
    "strengths": {"errors", "options"},
    "storage": {"errors"},
    "report": set(),  # its pages are made from JSON alone
    "evaluation": {"errors", "options", "front_texts"},
    "retrieval": {"extensions", "options"},
    "tracking": {"errors", "extensions"},
    "inputs": {"errors", "options", "storage"},
    "exchange": {"inputs", "storage"},
    "store": {"errors", "field_types", "options", "inputs", "storage"},
    "models": {"errors", "options", "storage"},
    "engines": {"errors", "extensions", "option_checks", "options", "models"},
    "chat": {"errors", "extensions", "option_checks", "options", "storage", "models", "engines"},
    "judging": {"errors", "inputs", "evaluation", "chat"},
    "profiling": {"errors", "option_checks", "models", "chat"},
    "plug": {"errors", "field_types", "options", "storage", "store", "models", "engines", "strengths"},
    "training": {"errors", "options", "store", "models", "plug"},
    "locating": {"errors", "options", "inputs", "storage", "models", "plug"},
    "demo": {"inputs"},
    "api": {"errors", "options", "storage", "inputs", "store", "models", "engines", "plug"},
    "persona": {"options", "store", "engines", "api"},  # `persona/__init__.py`, which exports the Python API
}
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "base", "misc"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60
DRAWS_HELP = "import cyclopts.help, rich.console, rich.markdown, rich.table"
# Imported by tasks of Ray Data that use no model.
WITHOUT_A_MODEL = (
    "exchange.windows",
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


def package(module: str) -> str:
    """`store` of `persona.store.table`, `options` of `persona.options`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def test_there_is_something_to_check():
    assert PERSONA
    assert JOBS
    assert "persona.errors" in GRAPH["persona.options"]
    assert "persona.storage" in GRAPH["persona.api"]


def test_a_cycle_is_found_in_imports_of_every_kind():
    sources = {
        "house": "",
        "house.a": "from house import b",
        "house.b": "from house.c import something",
        "house.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house import d",
        "house.d": "def later():\n    import house.a",
        "house.e": "import house.a, os",
    }
    graph = import_graph(sources)
    assert graph["house.e"] == {"house.a"}
    cycle = find_cycle(graph)
    assert cycle is not None
    assert cycle[0] == cycle[-1]
    assert set(cycle) == {"house.a", "house.b", "house.c", "house.d"}
    assert find_cycle(import_graph({**sources, "house.d": "import os"})) is None


def test_no_modules_import_each_other_in_a_circle():
    assert find_cycle(GRAPH) is None


@pytest.mark.parametrize("module", PERSONA)
def test_a_package_imports_only_packages_below_it(module: str):
    here = package(module)
    assert here in ARROWS, "a new package of persona needs its line in ARROWS"
    others = {package(name) for name in GRAPH[module] if name.split(".")[0] == "persona"}
    assert others - {here} <= ARROWS[here]


def test_the_arrows_between_packages_form_no_circle():
    assert find_cycle(ARROWS) is None
    assert set(ARROWS) == {package(module) for module in PERSONA}


@pytest.mark.parametrize("module", PERSONA)
def test_persona_imports_neither_ray_nor_the_jobs(module: str):
    assert not {name.split(".")[0] for name in imported(SOURCES[module])} & {"ray", "jobs"}


@pytest.mark.parametrize("module", [module for module in SOURCES if module.startswith("jobs.runtime")])
def test_the_runtime_imports_no_job(module: str):
    # The empty package `jobs` is allowed: its files tell which jobs exist.
    assert not [name for name in GRAPH[module] if name.startswith("jobs.") and not name.startswith("jobs.runtime")]


def test_persona_loads_neither_ray_nor_the_jobs():
    code = (
        "import importlib, json, sys\n"
        f"for module in {PERSONA}:\n"
        "    try: importlib.import_module(module)\n"
        "    except ModuleNotFoundError as error: assert error.name == 'vllm', error  # a separate environment\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "persona" in loaded
    assert not loaded & {"ray", "jobs"}


def test_tasks_without_a_model_load_no_torch():
    """Ray Data starts many processes for such tasks; importing torch would add seconds to each."""
    modules = ", ".join(f"persona.{name}" for name in WITHOUT_A_MODEL)
    code = f"import {modules}, sys; print('loaded:', *({{'torch', 'transformers'}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "loaded:"


def timed(*words: str) -> tuple[float, str]:
    """Seconds of processor time of one run of Python, and its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.fixture(scope="module")
def drawing_s() -> float:
    """The least time that it takes to load the libraries that draw a page of help."""
    return min(timed("-c", DRAWS_HELP)[0] for _ in range(3))


@pytest.mark.parametrize("job", JOBS)
def test_help_loads_nothing_heavy_and_takes_little_more_time_than_drawing_it(job: str, drawing_s: float):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['job', '--help']\n"
        f"try: runpy.run_module('jobs.{job}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    )
    # As a ratio, because absolute times depend on what else the machine does; so may a single one, then measure again.
    for drawing in (drawing_s, None, None):
        seconds, text = timed("-c", code)
        assert f"python -m jobs.{job}" in text
        assert text.splitlines()[-1].strip() == "loaded:"
        if seconds < 3.5 * (drawing or timed("-c", DRAWS_HELP)[0]):  # more flags take longer to draw
            return
    pytest.fail(f"the help of {job} took {seconds:.2f} s, loading what draws it {drawing_s:.2f} s")


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_is_named_and_described_by_its_subject(module: str):
    if module not in ("persona.engines.base", "persona.chat.base"):  # interfaces of engines and of chat models
        assert module.rpartition(".")[2].strip("_") not in NAMES_THAT_SAY_NOTHING
    if module not in PACKAGES:
        assert ast.get_docstring(ast.parse(SOURCES[module])), "the first line says what the module is about"


@pytest.mark.parametrize("module", SOURCES)
def test_files_and_functions_can_be_read_in_one_sitting(module: str):
    assert len(SOURCES[module].splitlines()) <= MAX_FILE_LINES
    functions = (node for node in ast.walk(ast.parse(SOURCES[module])) if isinstance(node, ast.FunctionDef))
    long = [one.name for one in functions if one.end_lineno - one.lineno + 1 > MAX_FUNCTION_LINES]
    assert not long


@pytest.mark.parametrize("module", SOURCES)
def test_no_pickle_and_no_remote_code(module: str):
    libraries = {name.split(".")[0] for name in imported(SOURCES[module])}
    assert not libraries & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(ast.parse(SOURCES[module])):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True"
