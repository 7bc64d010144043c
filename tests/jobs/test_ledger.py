"""`sources` is committed after the rows of its files, or not at all, wherever a run of `embed` ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs import embed
from persona.storage import join
from persona.store import sources
from persona.store.store import Store
from tests.faulty_s3 import FaultyS3
from tests.jobs.conftest import BUCKETS, START, Job, Row, arguments, behaviors, stored, write

ROOT = Path(__file__).parents[2]
Key = tuple[str, ...]


def recorded(store: str) -> set[str]:
    """The names of the files in the ledger."""
    return {Path(one.uri).name for one in sources.read(Store.open(store)).sources}


def keys(rows: Sequence[Row]) -> set[Key]:
    return {(row["user_id"], row["behavior_id"]) for row in rows}


def test_a_refused_commit_leaves_no_file_recorded_without_its_rows(
    do: Job, s3: str, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First that of the rows, then that of the ledger."""
    store, histories = join(s3, "store"), join(s3, "in")
    flags = {"histories": histories, "store": store, "encoder": models["encoder"], "actors": 1}
    flags |= {"max_tokens": 32, "buckets": BUCKETS}
    write(join(histories, "1.jsonl"), behaviors())
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    with FaultyS3(endpoint, seed=0, share=1.0, kinds=("denied",)) as bad:
        # The versions before are the new table and one lease a run.
        for table, version, rows in (("behaviors", 2, []), ("sources", 3, behaviors())):
            bad.pattern = rf"PUT .*/{table}/_delta_log/0*{version}\.json"
            monkeypatch.setenv("AWS_ENDPOINT_URL", bad.url)
            done = do(embed, **flags)
            assert (done.code, bad.done.pop("denied")) == (1, 1), done.said
            assert f"cannot write to the table {join(store, table)}" in done.said
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            assert recorded(store) == set()
            assert set(stored(store, "behaviors")) == keys(rows)
    last = do(embed, **flags)
    assert (last.code, last.result["known"], last.result["committed"]) == (0, 30, 0)
    assert recorded(store) == {"1.jsonl"} and set(stored(store, "behaviors")) == keys(behaviors())


# Before and after the commit of the ledger, and milliseconds after the last rows have reached the driver.
MOMENTS = ["before-sources:1", "after-sources:1", *(f"ending:{ms}" for ms in (0, 30, 100, 200, 400, 700, 1000, 1500))]


def day(number: int) -> list[Row]:
    """The behaviors of a day: of each user one more."""
    return [
        {
            **row,
            "behavior_id": f"day-{number}",
            "text": f"{row['text']} {number}",
            "timestamp": START + timedelta(number),
        }
        for row in behaviors(12, 1)
    ]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_runs_that_are_killed_around_the_commit_of_the_ledger_lose_and_repeat_nothing(
    local_ray: None, do: Job, models: dict[str, str], tmp_path: Path
) -> None:
    """Each day has a new file and a run that is killed; the last run has nothing to encode that is stored."""
    import ray

    store, histories = str(tmp_path / "store"), tmp_path / "in"
    flags: dict[str, Any] = {"histories": histories, "store": store, "encoder": models["encoder"], "actors": 1}
    flags |= {"max_tokens": 32, "buckets": BUCKETS, "block_rows": 4}
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    written: dict[str, list[Row]] = {}
    n_killed = 0
    for number, moment in enumerate(MOMENTS):
        name = f"{number}.jsonl"
        written[name] = day(number)
        write(str(histories / name), written[name])
        command = [sys.executable, "-m", "tests.killable", moment, "embed", *arguments(**flags)]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300, check=False)
        assert run.returncode in (0, -signal.SIGKILL), run.stderr[-4000:]
        n_killed += run.returncode != 0
        found = set(stored(store, "behaviors"))
        print(f"{moment}: exit code {run.returncode}, {len(found)} rows, recorded {sorted(recorded(store))}")
        for one in recorded(store):
            assert keys(written[one]) <= found, f"{moment}: {one} is recorded without all its rows"
    assert n_killed >= len(MOMENTS) / 2
    rows = [row for of_day in written.values() for row in of_day]
    n_missing = len(keys(rows) - set(stored(store, "behaviors")))
    last = do(embed, **flags)
    assert (last.code, last.result["committed"]) == (0, n_missing)
    assert set(stored(store, "behaviors")) == keys(rows) and recorded(store) == set(written)
