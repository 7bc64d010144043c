"""`persona-plug` and `python -m jobs`: which jobs there are, how one is run, and what is no job."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from jobs import __main__ as front_door
from jobs.runtime import catalog

ROOT = Path(__file__).parents[2]
WITH_A_COMMAND_LINE = {path.stem for path in ROOT.glob("jobs/*.py") if "cli.run(" in path.read_text()}


def python_m(*words: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Calls `persona-plug` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/persona-plug"])

    def call(*words: str) -> tuple[int, str, str]:
        code = front_door.main(words)
        return code, *capsys.readouterr()

    return call


def test_the_console_script_is_the_front_door() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"persona-plug": "jobs.__main__:main"}


def test_help_lists_every_job_with_the_first_line_of_its_module(door) -> None:
    code, out, _ = door("--help")
    assert code == 0
    assert out.startswith("Usage: persona-plug JOB [OPTIONS]")
    listed = dict(re.findall(r"^  (\w+) +(.+)$", out, re.MULTILINE))
    assert set(listed) == set(catalog.job_names())
    for name, summary in listed.items():
        assert (ROOT / "jobs" / f"{name}.py").read_text().startswith(f'"""{summary}\n')


def test_a_call_without_a_job_lists_them_and_is_wrong_use() -> None:
    code, out, err = python_m("jobs")
    assert (code, err) == (2, "")
    assert out.startswith("Usage: python -m jobs JOB [OPTIONS]")
    assert "  embed " in out


def test_version(door) -> None:
    assert door("--version") == (0, f"persona-plug {version('persona-plug')}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embd"], "unknown job embd; did you mean embed?"),
        (["runtime"], "unknown job runtime; see --help"),
        (["__main__"], "unknown job __main__; see --help"),
        (["--verson"], "unknown flag --verson; did you mean --version?"),
    ],
)
def test_what_is_no_job_is_refused(door, words: list[str], message: str) -> None:
    assert door(*words) == (2, "", f"error: {message}\n")


def test_a_job_is_run_with_its_flags_and_its_help_says_how_it_was_called(door) -> None:
    code, out, _ = door("embed", "--help")
    assert (code, out.split(" --")[0]) == (0, "Usage: persona-plug embed")
    assert door("embed", "--store", "s")[2].startswith("error: --histories is missing")


def test_the_action_of_store_needs_no_flag(door, tmp_path: Path) -> None:
    code, _, err = door("store", "show", "--store", str(tmp_path / "none"))
    assert (code, "--store" in err) == (2, True)
    misspelled = door("store", "shwo", "--store", "s")[2]
    assert misspelled == "error: --action 'shwo': must be show, verify, compact, vacuum or switch\n"
    assert door("store", "--store", "s")[2].endswith("; it must be show, verify, compact, vacuum or switch\n")


def test_both_ways_of_python_m_are_one_job() -> None:
    whole, dotted = python_m("jobs", "compare", "--help"), python_m("jobs.compare", "--help")
    assert whole[1].startswith("Usage: python -m jobs compare --")
    assert dotted[1].startswith("Usage: python -m jobs.compare --")
    assert whole[1].split("\n", 3)[-1] == dotted[1].split("\n", 3)[-1]


@pytest.mark.parametrize("module", ["jobs.runtime", "jobs.runtime.cli", "jobs.runtime.training.run"])
def test_what_jobs_share_is_no_job_and_does_not_end_silently(module: str) -> None:
    code, out, err = python_m(module)
    assert (code, out) == (2, "")
    assert err == "error: jobs.runtime is shared code, not a job; `python -m jobs` lists the jobs\n"


def test_every_module_with_a_command_line_is_a_job() -> None:
    assert set(catalog.job_names()) >= WITH_A_COMMAND_LINE
    assert set(catalog.job_names()) - WITH_A_COMMAND_LINE <= {"import_lamp"}  # calls `run` by its own name
