"""A task dies after a part of its output has been committed; its retry must yield all the rest.

Of the second attempt, Ray skips as many blocks as the first has passed on. An attempt that saw the commits made in the
meantime would yield fewer blocks, and the skipped ones would be lost silently.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
import ray

from jobs import embed, generate
from jobs.runtime import comparing, joining, personas
from persona.exchange.windows import Window
from persona.store.store import Store
from persona.store.writer import files_of
from tests.jobs.conftest import Job, behaviors, requests, stored, write

N_USERS = 40
TOGETHER = 2
BLOCK_BYTES = 300  # two or three rows
COMMITTED_WITHIN_S = 60
_compare, _join_bucket, _make = comparing.compare, joining.join_bucket, personas._make


def die_once(store: Store, is_committed: Callable[[Store], bool]) -> None:
    """Kill this process as soon as `is_committed`; a second attempt survives."""
    died, newest = Path(store.uri).parent / "died", Store.open(store.uri)
    give_up = time.monotonic() + COMMITTED_WITHIN_S
    while not died.exists():
        if is_committed(newest):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        assert time.monotonic() < give_up, "the first output was not committed"
        time.sleep(0.05)


def dying_compare(windows: Iterator[Window], *, store: Store, **settings: Any) -> Iterator[pa.Table]:
    compared: list[int] = []
    for rows in _compare(windows, store=store, **settings):
        if len(compared) == 4:
            die_once(store, lambda now: compared[0] in now.buckets())
        if rows["bucket"][0].is_valid:
            compared.append(rows["bucket"][0].as_py())
        yield rows


def dying_join(rows: pa.Table, *, store: Store, **settings: Any) -> Iterator[pa.Table]:
    yielded: list[str] = []
    with mock.patch.object(joining, "_JOINED_ROWS", TOGETHER):  # only here: later tasks reuse this process
        for part in _join_bucket(rows, store=store, **settings):
            if len(yielded) > TOGETHER:
                die_once(store, lambda now, one=yielded[0]: one in now.read_generations()["request_id"].to_pylist())
            yielded += part["request_id"].to_pylist()
            yield part


def dying_make(batch: pa.Table, *, store: Store, **settings: Any) -> Iterator[pa.Table]:
    yielded: list[str] = []
    with mock.patch.object(personas, "_USERS_TOGETHER", TOGETHER):
        for part in _make(batch, store=store, **settings):
            if len(yielded) > 1:
                die_once(
                    store, lambda now, one=yielded[0]: one in {file.path for file in now.table("personas").files()}
                )
            yielded += [file.path for file in files_of(part, "new")]
            yield part


@pytest.fixture(autouse=True)
def small_blocks(local_ray: None) -> Iterator[None]:
    """Tasks pass on their output after a few rows; by default they do after many megabytes."""
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    context.target_max_block_size = BLOCK_BYTES
    yield
    context.target_max_block_size = before


@pytest.fixture
def embedding(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    histories = write(str(tmp_path / "histories.jsonl"), behaviors(N_USERS, 1))
    flags = {"encoder": models["encoder"], "max_tokens": 32, "precision": "fp32", "actors": 1, "block_rows": 1}
    return {"histories": histories, "store": str(tmp_path / "store"), "buckets": 4, **flags}


def test_behaviors_are_compared_with_the_store_as_of_the_start(
    do: Job, embedding: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(comparing, "compare", dying_compare)
    done = do(embed, **{**embedding, "buckets": 32})  # eight per task
    assert (tmp_path / "died").exists()
    assert set(stored(embedding["store"], "behaviors")) == {(f"user-{n}", "b0") for n in range(N_USERS)}
    assert (done.code, done.result["new"], done.result["committed"], done.result["known"]) == (0, N_USERS, N_USERS, 0)


def test_requests_are_looked_up_in_the_store_as_of_the_start(
    do: Job, embedding: dict[str, Any], plug: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert do(embed, **embedding).code == 0
    rows = requests(N_USERS, 1)
    flags = {"requests": write(str(tmp_path / "requests.jsonl"), rows), "store": embedding["store"], "plug": plug}
    flags |= {"beams": 1, "max_new_tokens": 2, "precision": "fp32", "actors": 1, "block_rows": TOGETHER}
    monkeypatch.setattr(joining, "join_bucket", dying_join)
    done = do(generate, **flags)
    assert (tmp_path / "died").exists()
    assert set(stored(embedding["store"], "generations")) == {(row["request_id"], "own") for row in rows}
    assert (done.code, done.result["answered"], done.result["already_answered"]) == (0, N_USERS, 0)


def test_personas_are_looked_up_in_the_store_as_of_the_start(
    do: Job, embedding: dict[str, Any], plug: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(personas, "_make", dying_make)
    done = do(embed, **embedding, plug=plug)
    assert (tmp_path / "died").exists()
    made = {user for user, _ in stored(embedding["store"], "personas")}
    assert made == {f"user-{n}" for n in range(N_USERS)}
    assert (done.code, done.result["personas"]) == (0, N_USERS)
