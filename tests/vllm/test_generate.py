"""`generate --engine vllm` as users run it: the answers of `local`, each once, whatever dies on the way."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from deltalake import DeltaTable

from tests.jobs.conftest import arguments, behaviors, fill_store, new_plug, requests, stored, write
from tests.models import tiny_encoder
from tests.vllm.models import tiny

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240
OWN_COLUMNS = ("created_at",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a filled store, a plug for a tiny Llama, and requests of several users."""
    folder = tmp_path_factory.mktemp("vllm")
    encoder, llm = tiny_encoder(folder / "encoder"), tiny("Llama 3", folder / "llm")
    fill_store(folder / "store", str(encoder), behaviors(8, 5))
    new_plug(folder / "plug", str(encoder), str(llm))
    write(str(folder / "requests.parquet"), requests(8, 4))
    return folder


@pytest.fixture
def flags(made: Path, tmp_path: Path) -> dict[str, Any]:
    """Flags of a job on a store of its own."""
    return {
        "requests": made / "requests.parquet",
        "store": shutil.copytree(made / "store", tmp_path / "store"),
        "plug": made / "plug",
        "persona": ("own", "bare"),
        "beams": 1,
        "max_new_tokens": 40,
        "precision": "fp32",
        "actors": 1,
    }


@pytest.fixture(scope="module")
def expected(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Any]:
    """The answers of `local`."""
    store = shutil.copytree(made / "store", tmp_path_factory.mktemp("local") / "store")
    files = {"requests": made / "requests.parquet", "store": store, "plug": made / "plug"}
    options = {"persona": ("own", "bare"), "beams": 1, "max_new_tokens": 40, "precision": "fp32", "actors": 1}
    assert finish(start(**files, **options))["answered"] == 64
    return stored(store, "generations", without=OWN_COLUMNS)


def start(**flags: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", "-m", "jobs.generate", *arguments(**flags)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def finish(job: "subprocess.Popen[str]") -> dict[str, Any]:
    """What the job says in its last line."""
    out, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def processes(job: "subprocess.Popen[str]", name: str) -> Iterator[psutil.Process]:
    """Processes below the job whose title begins with this name."""
    for process in psutil.Process(job.pid).children(recursive=True):
        try:
            if (process.cmdline() or [""])[0].startswith(name):
                yield process
        except psutil.Error:
            continue


def wait_for_answers(store: Path, job: "subprocess.Popen[str]") -> None:
    """Until the first block has been committed."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and job.poll() is None:
        table = DeltaTable(str(store / "generations"))
        if table.to_pyarrow_table(columns=["request_id"]).num_rows:
            return
        time.sleep(0.05)
    pytest.fail("no answer was committed while the job ran")


def test_answers_equal_those_of_local_which_then_has_nothing_to_do(flags: dict[str, Any], expected: Any) -> None:
    done = finish(start(**flags, engine="vllm", max_model_len=256, profile=True))
    assert (done["answered"], done["rejects"]) == (64, 0)
    assert stored(flags["store"], "generations", without=OWN_COLUMNS) == expected
    assert done["profile"]["seconds"]["generate"] > 0
    again = finish(start(**flags))
    assert (again["answered"], again["already_answered"], again["stale"]) == (0, 64, 0)


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "ray::MapWorker(MapBatches(Generate))"])
def test_every_request_is_answered_once_when_a_process_is_killed(
    victim: str, flags: dict[str, Any], expected: Any
) -> None:
    job = start(**flags, engine="vllm", max_model_len=256, block_rows=4)
    wait_for_answers(flags["store"], job)
    cores = list(processes(job, "VLLM::EngineCore"))
    killed = list(processes(job, victim))
    assert cores
    assert killed
    for process in killed:
        process.kill()
    assert finish(job)["answered"] == 64
    assert stored(flags["store"], "generations", without=OWN_COLUMNS) == expected
    _, alive = psutil.wait_procs(cores, timeout=30)
    assert not alive, "what an actor has started ends with it"
