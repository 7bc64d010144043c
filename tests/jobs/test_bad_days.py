"""Jobs with an object store that fails, delays or cuts requests: they succeed, or fail and leave a sound table."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.runtime.session import usable_cores
from persona.storage import join, list_files
from persona.store import maintenance as housekeeping
from persona.store.store import Store
from tests.faulty_s3 import FaultyS3
from tests.jobs.conftest import Row, Rows, arguments, behaviors, fill_store, requests, stored, write

ROOT = Path(__file__).parents[2]
ENDS_WITHIN_S = 120


@pytest.fixture
def bad(each_s3: str) -> Iterator[FaultyS3]:
    """A proxy in front of each server, without faults at first; this process does not use it."""
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"], seed=5) as proxy:
        proxy.delay_s = 0.1
        yield proxy


def start(job: str, bad: FaultyS3, **flags: Any) -> "subprocess.Popen[str]":
    """Start the job in a separate process with its own Ray; all its storage requests go through the proxy."""
    environment = {**os.environ, "AWS_ENDPOINT_URL": bad.url, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    environment |= {"PERSONA_STORAGE_TIMEOUT_S": "20"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", f"jobs.{job}", *arguments(**flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def embedding(models: dict[str, str], root: str, n_each: int) -> dict[str, Any]:
    """Flags that put each text into its own batch, so that vectors are equal to the last bit."""
    histories = write(join(root, "in/histories.jsonl"), behaviors(8, n_each))
    own_batches = {"token_budget": 1, "precision": "fp32", "max_tokens": 32, "actors": 1, "block_rows": 8, "buckets": 4}
    return {"histories": histories, "store": join(root, "store"), "encoder": models["encoder"], **own_batches}


def undisturbed(folder: Path, encoder: str, histories: Sequence[Row]) -> Store:
    """The expected store. The job's only model uses all cores, and the last bits of a vector depend on that."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        return Store.open(str(fill_store(folder, encoder, histories)))
    finally:
        torch.set_num_threads(before)


def rows(store: Store) -> Rows:
    return stored(store.uri, "behaviors", ["embedded_at"])


def problems(store: Store) -> list[str]:
    """What `jobs.store verify` finds."""
    names = ("behaviors", "generations")
    partitions = [(name, value) for name in names for value in housekeeping.facts(store, name)["rows_by_partition"]]
    return [problem for name, value in partitions for problem in housekeeping.verify(store, name, value)[1]]


@pytest.mark.soak
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_jobs_succeed_when_some_requests_fail(
    each_s3: str, bad: FaultyS3, share: float, models: dict[str, str], plug: str, tmp_path: Path
) -> None:
    flags = embedding(models, each_s3, 6)
    bad.share = share
    with start("embed", bad, **flags) as job:
        output = job.communicate(timeout=300)
    assert job.returncode == 0, output
    store = Store.open(flags["store"])
    same = undisturbed(tmp_path / "same", models["encoder"], behaviors(8, 6))
    assert rows(store) == rows(same)

    requests_file = write(join(each_s3, "in/requests.parquet"), requests(8, 2))
    decoding = {"beams": 1, "max_new_tokens": 4, "precision": "fp32", "block_rows": 4, "actors": 1}
    with start("generate", bad, requests=requests_file, store=flags["store"], plug=plug, **decoding) as job:
        output = job.communicate(timeout=300)
    assert job.returncode == 0, output
    answered = store.read_generations()["request_id"].to_pylist()
    assert sorted(answered) == sorted(row["request_id"] for row in requests(8, 2))
    assert problems(store) == []
    assert bad.faults > 0.5 * share * bad.done.total(), bad.done


@pytest.mark.soak
def test_a_permanent_outage_ends_the_job_in_time_and_the_next_run_finishes_the_work(
    each_s3: str, bad: FaultyS3, models: dict[str, str], tmp_path: Path
) -> None:
    flags = embedding(models, each_s3, 60)
    with start("embed", bad, **flags) as job:
        # Wait for some commits, which must survive.
        while len(list_files(join(flags["store"], "behaviors"), (".parquet",))) < 4 and job.poll() is None:
            time.sleep(0.05)
        bad.share, bad.kinds = 1.0, ("error",)
        began = time.monotonic()
        out, errors = job.communicate(timeout=300)
        took_s = time.monotonic() - began
    assert (job.returncode, out) == (1, ""), errors
    assert took_s < ENDS_WITHIN_S
    last = errors.strip().splitlines()[-1]
    assert "retried for" in last and "test-secret" not in errors, errors
    store = Store.open(flags["store"])
    before = rows(store)
    assert len(before) < 480 and problems(store) == []

    bad.share = 0.0
    with start("embed", bad, **flags) as job:
        output = job.communicate(timeout=300)
    assert job.returncode == 0, output
    same = undisturbed(tmp_path / "same", models["encoder"], behaviors(8, 60))
    assert rows(store) == rows(same) and problems(store) == []
