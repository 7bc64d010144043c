"""How a job reads its configuration, which errors it reports, and its exit codes."""

import json
import math
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from jobs import forget
from jobs.runtime.cli import Summary, run
from jobs.runtime.configuration import read_config
from jobs.runtime.job_options import FLAT, InputRows, flat_settings
from jobs.runtime.remote_errors import find_persona_error
from persona.errors import InputError, PersonaError, StorageError, UsageError

REQUIRED = ["--histories", "h", "--store", "s"]
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class Config:
    histories: str
    """The texts."""
    store: str
    """Root of the tables."""
    pooling: Literal["cls", "mean"] = "cls"
    """How token vectors become one."""
    personas: tuple[Literal["own", "none", "other"], ...] = ("own",)
    """Histories to use."""
    actors: Literal["auto"] | int = "auto"
    """Number of encoders."""
    learning_rate: float = 1e-3
    """Step size."""
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    dry_run: bool = False
    """Show it, do not do it."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UsageError(f"--learning-rate {self.learning_rate}: must be above 0")


def echo(config: Config) -> Summary:
    return Summary(table=[("store", config.store)], result=flat_settings(config))


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]):
    """Run a job in this process: (exit code, the JSON of the last line or None, stderr)."""

    def call(*argv: str) -> tuple[int, dict[str, Any] | None, str]:
        code = run(Config, echo, argv)
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err

    return call


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_win_over_the_file_and_the_file_over_defaults(answer, file):
    path = file("histories: from file\nstore: from file\nlearning_rate: 1e-4\npersonas: [none, other]\n")
    code, result, _ = answer("--config", path, "--store", "from flag", "--limit", "7", "--dry-run")
    assert code == 0
    assert result == {
        "histories": "from file",
        "store": "from flag",
        "pooling": "cls",
        "personas": ["none", "other"],
        "actors": "auto",
        "learning_rate": 1e-4,
        "max_reject_fraction": 0.01,
        "limit": 7,
        "dry_run": True,
    }


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--limit", "none"], "limit", None),
        (["--limit", "1_000"], "limit", 1000),
        (["--no-dry-run"], "dry_run", False),
        (["--dry_run"], "dry_run", True),
        (["--learning_rate=2e-5"], "learning_rate", 2e-5),
        (["--personas", "other", "own", "--pooling", "mean"], "personas", ["other", "own"]),
        (["--personas", "other", "--personas", "own"], "personas", ["other", "own"]),
        (["--actors", "auto"], "actors", "auto"),
        (["--actors", "3"], "actors", 3),
    ],
)
def test_a_flag_takes(answer, argv: Sequence[str], field: str, value: Any):
    code, result, err = answer(*REQUIRED, *argv)
    assert (code, err) == (0, "")
    assert result is not None
    assert result[field] == value


@dataclass(frozen=True, kw_only=True)
class Trial:
    out: str = "here"
    """Where to."""
    limit: int | None = None
    """How many."""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [([], Trial()), (["--limit", "2"], Trial(limit=2)), (["--config"], Trial(out="there"))],
)
def test_a_job_may_have_no_required_flag(argv: Sequence[str], expected: Trial, file):
    seen: list[Trial] = []

    def main(config: Trial) -> Summary:
        seen.append(config)
        return Summary(table=[], result={})

    path = [file("out: there")] if "--config" in argv else []
    assert run(Trial, main, [*argv, *path]) == 0
    assert seen == [expected]


def test_json_is_a_configuration_file_too(answer, file):
    path = file(json.dumps({"histories": "h", "store": "s", "limit": None, "dry_run": True}))
    assert answer("--config", path)[1]["dry_run"] is True


def test_a_text_in_a_file_is_taken_as_it_is_written(file):
    """To YAML these are the numbers 7, 1000 and 15, a boolean and a date: `forget` would have deleted other users."""
    given = "store: run/store\nuser: [007, 1_000, 0xf, yes, 2024-01-01, '8', a]\n"
    found = read_config(forget.Config, ["--config", file(given)])
    assert found is not None and found.user == ("007", "1_000", "0xf", "yes", "2024-01-01", "8", "a")
    found = read_config(forget.Config, ["--config", file("store: 2024\nuser: 010\nusers: null\n")])
    assert found is not None and (found.store, found.user, found.users) == ("2024", ("010",), None)


def test_a_configuration_file_may_be_on_s3(answer, s3: str):
    from persona.storage import write_bytes

    write_bytes(f"{s3}/recipes/embed.yaml", b"histories: h\nstore: s\nlimit: 3\n")
    assert answer("--config", f"{s3}/recipes/embed.yaml")[1]["limit"] == 3
    code, _, err = answer("--config", f"{s3}/recipes/other.yaml")
    assert code in (1, 2)
    assert "other.yaml" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--histories", "h", "--sotre", "s"], "unknown flag --sotre; did you mean --store?"),
        ([*REQUIRED, "--learning-rat=1"], "unknown flag --learning-rat; did you mean --learning-rate?"),
        ([*REQUIRED, "--no-limit"], "unknown flag --no-limit; did you mean --limit?"),
        ([*REQUIRED, "--zzz"], "unknown flag --zzz; see --help"),
        (["--store", "s"], "--histories is missing: give it as a flag, or as a key of the --config file"),
        (
            ["h", "--store", "s"],
            "--histories is missing: give it as a flag, or as a key of the --config file; 'h' has no flag before it",
        ),
        ([*REQUIRED, "--limit"], "--limit needs a value: a whole number or none"),
        ([*REQUIRED, "--limit", "many"], "--limit 'many': must be a whole number or none"),
        ([*REQUIRED, "--limit", "3.5"], "--limit '3.5': must be a whole number or none"),
        ([*REQUIRED, "--limit", ""], "--limit '': must be a whole number or none"),
        ([*REQUIRED, "--limit", "0"], "--limit 0: must be 1 or more; leave it out for everything"),
        ([*REQUIRED, "--limit", "1", "--limit", "2"], "--limit is given twice"),
        ([*REQUIRED, "--learning-rate", "nan"], "--learning-rate 'nan': must be a finite number"),
        ([*REQUIRED, "--learning-rate", "-1"], "--learning-rate -1.0: must be above 0"),
        ([*REQUIRED, "--pooling", "max"], "--pooling 'max': must be cls or mean"),
        ([*REQUIRED, "--personas", "own", "x"], "--personas 'x': must be a list, each own, none or other"),
        (
            [*REQUIRED, "--dry-run", "false"],
            "unexpected 'false'; a switch takes no value: write --flag or --no-flag",
        ),
        ([*REQUIRED, "stray"], "unexpected 'stray'"),
    ],
)
def test_wrong_usage_is_one_line_with_the_rule(answer, argv: Sequence[str], message: str):
    assert answer(*argv) == (2, None, f"error: {message}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sotre: s", "unknown key sotre; did you mean store?"),
        ("dry-run: true", "unknown key dry-run; did you mean dry_run?"),
        ("config: other.yaml", "unknown key config; see --help"),
        ("limit: 1\nlimit: 2", "duplicate key limit"),
        ("limit: 2.5", "limit '2.5': must be a whole number or none"),
        ("limit: {at: 3}", "limit: a mapping does not fit here; see --help"),
        ("limit: [3]", "limit '[3]': must be a whole number or none"),
        ("learning_rate: .inf", "learning_rate 'inf': must be a finite number"),
        ("learning_rate: null", "learning_rate 'null': must be a finite number"),
        ("dry_run: maybe", "dry_run 'maybe': must be true or false"),
        ("- limit", "must be a mapping of keys to values, not a list"),
        ("limit: [", "is neither YAML nor JSON"),
    ],
)
def test_an_error_in_a_file_names_file_and_key(answer, file, text: str, message: str):
    path = file(text)
    code, result, err = answer(*REQUIRED, "--config", path)
    assert (code, result) == (2, None)
    assert err.startswith(f"error: --config {path}: {message}")


def test_a_missing_or_binary_file_is_refused(answer, tmp_path: Path):
    code, _, err = answer(*REQUIRED, "--config", str(tmp_path / "none.yaml"))
    assert (code, "No such file" in err) == (2, True)
    (tmp_path / "binary.yaml").write_bytes(b"store: \xff")
    code, _, err = answer(*REQUIRED, "--config", str(tmp_path / "binary.yaml"))
    assert (code, "is not UTF-8 text (byte 7)" in err) == (2, True)


def test_help_shows_the_fields_with_their_docstrings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "160")
    assert run(Config, echo, ["--help"]) == 0
    out = capsys.readouterr().out
    for text in (
        "How a job reads its configuration, which errors it reports",
        "--learning-rate",
        "Step size.",
        "[choices: cls, mean]",
        "--config",
    ):
        assert text in out


def test_the_table_is_aligned_and_the_last_line_is_json_without_nan(capsys: pytest.CaptureFixture[str]):
    result = {
        "loss": math.nan,
        "scores": {"own": np.float32(0.5), "n": np.int64(3)},
        "list": (math.inf, Path("a")),
    }
    table = [("", "own", "none"), ("loss", "4.30", "4.41"), ("accuracy", "0.5", "")]
    run(Config, lambda _: Summary(table=table, result=result), REQUIRED)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ["          own   none", "loss      4.30  4.41", "accuracy  0.5"]
    assert json.loads(last) == {"loss": None, "scores": {"own": 0.5, "n": 3}, "list": [None, "a"]}
    assert list(json.loads(last)) == list(result)


def test_the_exit_code_of_the_summary_is_returned(capsys: pytest.CaptureFixture[str]):
    assert run(Config, lambda _: Summary(table=[], result={"rejects": 9}, exit_code=3), REQUIRED) == 3
    assert capsys.readouterr().out == '{"rejects": 9}\n'


def raises(error: BaseException):
    def main(_: Config) -> Summary:
        raise error

    return main


def test_our_error_becomes_a_message_and_its_exit_code(capsys: pytest.CaptureFixture[str]):
    assert run(Config, raises(StorageError("the bucket is away")), REQUIRED) == 1
    assert capsys.readouterr().err == "error: the bucket is away\n"
    assert run(Config, raises(InputError("no column text")), REQUIRED) == 2


def test_verbose_adds_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    run(Config, raises(InputError("no column text")), [*REQUIRED, "--verbose"])
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("error: no column text\n")
    monkeypatch.setenv("PERSONA_VERBOSE", "1")
    run(Config, raises(InputError("no column text")), REQUIRED)
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(Config, raises(ZeroDivisionError("bug")), REQUIRED)


def test_a_bug_while_handling_our_error_is_a_bug():
    error = KeyError("bug")
    error.__context__ = InputError("bad input")
    assert find_persona_error(error) is None
    error.__cause__ = InputError("bad input")
    assert find_persona_error(error) is error.__cause__


class _LimitReached(InputError):
    """An error of ours that some other module defines."""


@pytest.mark.parametrize("kind", [PersonaError, *PersonaError.__subclasses__(), _LimitReached])
def test_an_error_that_ray_keeps_as_text_alone_is_found_by_its_class(kind: type[PersonaError]):
    """By the name that a traceback prints for the class, wherever the class is defined."""
    wrapper = type("RaySystemError", (Exception,), {"__module__": "ray.exceptions"})
    found = find_persona_error(wrapper("".join(traceback.format_exception(kind("two\nlines")))))
    assert (type(found), str(found)) == (kind, "two\nlines")


def test_an_error_of_ours_that_is_only_quoted_is_none():
    wrapper = type("RaySystemError", (Exception,), {"__module__": "ray.exceptions"})
    assert find_persona_error(wrapper("ValueError: not a persona.errors.InputError: x")) is None


def test_ctrl_c_ends_with_130_and_one_line(tmp_path: Path):
    script = tmp_path / "job.py"
    script.write_text(
        "import signal, sys\n"
        "from dataclasses import dataclass\n"
        "from jobs.runtime.cli import run\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Config:\n"
        "    limit: int | None = None\n"
        "def main(config):\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it\n"
        "    print('ready', flush=True)\n"
        "    signal.pause()\n"
        "sys.exit(run(Config, main))\n"
    )
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    said = "interrupted; what is committed stays, and the same command continues from there\n"
    assert (process.returncode, out, err) == (130, "", said)


RAY_JOB = '''
"""Let workers fail in every way that Ray knows, and report what is found in the errors that arrive here."""
import sys
from dataclasses import dataclass
from jobs.runtime.cli import Summary, run
from jobs.runtime.remote_errors import find_persona_error
from persona.errors import InputError, StorageError

@dataclass(frozen=True, kw_only=True)
class Config:
    storage: str

def main(config):
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    ray.init("local", num_cpus=2, include_dashboard=False)

    def fail(*_):
        print("a worker speaks")
        try:
            open("/there/is/no/such/file")
        except OSError as error:
            raise InputError("two\\nlines") from error

    def bug(*_):
        raise ValueError("a bug")

    class Encoder:
        def __init__(self):
            raise StorageError("no weights")
        def __call__(self, batch):
            return batch

    def chain(task):
        return ray.get(ray.remote(lambda: ray.get(ray.remote(task).remote())).remote())

    calls = {
        "task": lambda: ray.get(ray.remote(fail).remote()),
        "task in a task": lambda: chain(fail),
        "actor": lambda: ray.get(ray.remote(Encoder).remote().__call__.remote({})),
        "data": lambda: ray.data.range(2).map_batches(fail).materialize(),
        "data actor": lambda: ray.data.range(2).map_batches(Encoder, concurrency=1).materialize(),
        "train": TorchTrainer(
            fail,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(storage_path=config.storage),
        ).fit,
        "bug": lambda: ray.get(ray.remote(bug).remote()),
        "bug in data": lambda: ray.data.range(2).map_batches(bug).materialize(),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            one = find_persona_error(error)
            found[name] = one and [type(one).__name__, str(one), one.exit_code]
    for worker in [ray.remote(print).remote("last words") for _ in range(3)]:
        ray.get(worker)
    return Summary(table=[("failed", str(len(found)))], result=found)

sys.exit(run(Config, main))
'''


def test_our_error_in_a_worker_keeps_its_message_and_exit_code_through_ray(tmp_path: Path):
    script = tmp_path / "job.py"
    script.write_text(RAY_JOB)
    done = subprocess.run(
        [sys.executable, script, "--storage", tmp_path / "runs"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "task": ["InputError", "two\nlines", 2],
        "task in a task": ["InputError", "two\nlines", 2],
        "actor": ["StorageError", "no weights", 1],
        "data": ["InputError", "two\nlines", 2],
        "data actor": ["StorageError", "no weights", 1],
        "train": ["InputError", "two\nlines", 2],
        "bug": None,
        "bug in data": None,
    }
