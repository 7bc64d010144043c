"""`cluster/local.sh`: three nodes, every job by `jobs.submit`, a repeated schedule, and no processes left behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from persona.storage import copy_folder
from tests.cluster.manifests import CLUSTER, ROOT
from tests.jobs.conftest import arguments, behaviors, requests, write
from tests.jobs.test_schedule import FLAGS, texts
from tests.models import tiny_encoder, tiny_llama

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
UP_WITHIN_S = 400


@dataclass(frozen=True, kw_only=True)
class Local:
    """The running script, and the environment that it gave to its command."""

    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    def submit(self, name: str, entrypoint: str, **environment: str) -> tuple[int, dict[str, Any], str]:
        """Exit code, result and stderr of `jobs.submit`."""
        command = [sys.executable, "-m", "jobs.submit", "--id", name, "--entrypoint", entrypoint, "--patience-s", "20"]
        env = {**self.environment, **environment}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr

    def job(self, submission: str, job: str, **flags: object) -> dict[str, Any]:
        """The result of one of our jobs, which must succeed."""
        words = ["python", "-m", f"jobs.{job}", *arguments(**flags)]
        code, result, stderr = self.submit(submission, " ".join(words))
        assert code == 0, stderr[-4000:]
        found: dict[str, Any] = result["result"]
        return found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    ready = tmp_path_factory.mktemp("local") / "environment"
    command = ["bash", "-c", f"env -0 > {ready}.part && mv {ready}.part {ready} && cat"]
    environment = {**os.environ, "PYTHON": sys.executable, "CPUS": "3", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [str(CLUSTER / "local.sh"), *command], env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        until = time.monotonic() + UP_WITHIN_S
        while not ready.exists():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < until
            time.sleep(0.2)
        pairs = [(line.partition("=")[0], line.partition("=")[2]) for line in ready.read_text().split("\0") if line]
        local = Local(process=process, environment=dict(pairs))
        yield local
        process.stdin.close()
        assert process.wait(60) == 0
    left = [one for one in psutil.process_iter(["cmdline"]) if _folder(local) in " ".join(one.info["cmdline"] or [])]
    assert not left and not Path(_folder(local)).exists()


def _folder(local: Local) -> str:
    return str(Path(local.environment["RAY_AUTH_TOKEN_PATH"]).parent)


@pytest.fixture
def corp(local: Local, monkeypatch: pytest.MonkeyPatch) -> str:
    """The bucket of the script's S3 server; this process gets the same environment."""
    for name, value in local.environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    return "s3://corp"


def test_a_wrong_token_is_refused(local: Local, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("b" * 64)
    code, result, stderr = local.submit("wrong", "true", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert (code, result) == (2, {}) and "requires a token" in stderr
    code, result, stderr = local.submit("none", "true", RAY_AUTH_MODE="disabled")
    assert (code, result) == (2, {}) and "requires a token" in stderr


def test_the_exit_code_is_the_jobs_own_and_an_id_starts_once(local: Local, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code, result, _ = local.submit("seven", f"sh -c 'echo ran >> {log}; exit 7'")
    assert (code, result["status"], result["started"]) == (7, "FAILED", True)
    code, result, stderr = local.submit("seven", f"sh -c 'echo ran >> {log}; exit 7'")
    assert (code, result["status"], result["started"]) == (7, "FAILED", False)
    assert "not started again" in stderr and log.read_text() == "ran\n"


def test_a_stopped_job_did_not_succeed(local: Local) -> None:
    command = [sys.executable, "-m", "jobs.submit", "--id", "stopped", "--entrypoint", "sleep 600"]
    with subprocess.Popen(command, env=local.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=-3) as waiting:
        stop = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", "stopped"]
        until = time.monotonic() + 120
        while subprocess.run(stop, env=local.environment, capture_output=True, check=False).returncode:
            assert time.monotonic() < until
        assert waiting.wait(120) == 1


def test_all_jobs_and_a_repeated_schedule(local: Local, corp: str, tmp_path: Path) -> None:
    for name, make in (("encoder", tiny_encoder), ("llama", tiny_llama)):
        copy_folder(str(make(tmp_path / name)), f"{corp}/models/{name}")
    store, plug, encoder = f"{corp}/persona/store", f"{corp}/persona/plug", f"{corp}/models/encoder"
    write(f"{corp}/histories/a.parquet", behaviors())
    train_file = write(f"{corp}/requests/train.jsonl", requests())
    held_out = write(f"{corp}/requests/test.jsonl", requests(2, 6))
    refresh = {"histories": f"{corp}/histories/", "store": store, "encoder": encoder, "sync": True}
    first = local.job("refresh-1", "embed", **refresh, max_tokens=32, buckets=4, block_rows=16)
    assert first["committed"] == len(behaviors())
    training = {"epochs": 1, "global_batch": 8, "micro_batch": 4, "workers": 2, "validate_every": 2}
    training["warm_start"] = "none"  # the tiny tokenizers share no words
    outputs = {"store": store, "plug": plug}
    trained = local.job(
        "train",
        "train",
        requests=train_file,
        validation=held_out,
        run="r",
        runs=f"{corp}/persona/runs",
        llm=f"{corp}/models/llama",
        **outputs,
        **training,
    )
    assert trained["steps"] == len(requests()) // 8
    kinds = ("own", "none", "other")
    answered = local.job(
        "generate", "generate", requests=held_out, persona=kinds, beams=1, max_new_tokens=4, actors=2, **outputs
    )
    assert answered["answered"] == 3 * len(requests(2, 6))
    judged = local.job("evaluate", "evaluate", requests=held_out, out=f"{corp}/persona/report", **outputs)
    assert set(judged["scores"]) == set(kinds)

    # The next night, the same command under another id knows the only file, and opens none.
    second = local.job("refresh-2", "embed", **refresh, max_tokens=32, block_rows=16)
    assert (second["encoded"], second["committed"], second["gone"]) == (0, 0, 0)
    assert (second["read"], second["input_files"]["known"]["files"]) == (0, 1)


def test_the_weekly_schedule_promotes_refuses_and_rolls_back(local: Local, corp: str, tmp_path: Path) -> None:
    """Every step by `jobs.submit`: twice the same, a worse plug, a better one, and back."""
    for name, make in (("encoder", tiny_encoder), ("llama", tiny_llama)):
        copy_folder(str(make(tmp_path / name)), f"{corp}/models/{name}")
    write(f"{corp}/histories/train/a.parquet", texts(range(24)))
    write(f"{corp}/histories/held-out/a.parquet", texts(range(24, 40)))
    asked = [{"request_id": f"q{user}", "user_id": f"user-{user}", "input": "What next?"} for user in range(4)]
    write(f"{corp}/requests/today.jsonl", asked)
    settings = {"CORP": corp, "ENCODER": f"{corp}/models/encoder", "LLM": f"{corp}/models/llama", **FLAGS}
    store = f"{corp}/persona/store"

    def week(day: str, rate: str) -> tuple[int, str, str]:
        """Exit code, what was said, and the live plug."""
        flags = settings["TRAIN_FLAGS"].replace("--learning-rate 0.03", f"--learning-rate {rate}")
        environment = {**local.environment, **settings, "TRAIN_FLAGS": flags}
        command = ["bash", str(CLUSTER / "schedule" / "steps.sh"), "weekly", day]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        live = local.job(f"list-{day}", "plugs", action="list", store=store)["plugs"]
        print(day, done.returncode, [(one["version"], one["stage"], one["uri"]) for one in live])
        return done.returncode, done.stdout + done.stderr, next(one["uri"] for one in live if one["stage"] == "live")

    first, third, fourth = (f"{corp}/persona/plugs/2026-12-{day:02}" for day in (6, 20, 27))
    code, said, live = week("2026-12-06", "0.01")
    assert (code, live) == (0, first), said[-4000:]
    code, said, live = week("2026-12-13", "0.01")  # nothing is new: the same plug, or one that is not ahead of it
    assert (code in (0, 4), live) == (True, first), said[-4000:]
    assert '"answered": 0' in said and '"committed": 0' in said
    code, said, live = week("2026-12-20", "1e-6")
    assert (code, live) == (4, first), said[-4000:]
    assert "not promoted: " + third in said
    code, said, live = week("2026-12-27", "0.03")
    assert (code, live) == (0, fourth), said[-4000:]
    back = local.job("back", "plugs", action="rollback", store=store)
    assert (back["live"]["uri"], back["rolled_back"]["uri"]) == (first, fourth)
