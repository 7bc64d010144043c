"""One local Ray for all tests of the jobs, tiny models, and what a few users have written and asked."""

import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from jobs.runtime.cli import run
from persona.inputs import histories
from persona.inputs.records import Records, rejects
from persona.models.encoder import TextEncoder
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import resolve
from persona.plug import folder as plug_folder
from persona.storage import delta_options, join, write_bytes
from persona.store.identity import Identity
from persona.store.store import Store
from tests.models import ENCODER_WIDTH, tiny_chat_llama, tiny_encoder, tiny_llama, tiny_t5
from tests.plugs import new_model, record_of
from tests.stores import write_rows
from tests.warm_workers import warm_workers

Row = dict[str, Any]
START = datetime(2024, 1, 1, tzinfo=UTC)
BUCKETS = 4
# `train` at the size of a test: steps of 4 requests, a checkpoint after each. The plug is the paper's.
TRAINING: Row = {
    "run": "r",
    "weights": "attention",
    "temperature": 1.0,
    "persona_tokens": 1,
    "persona_gain": 1.0,
    "warm_start": "none",
    "alignment": 0.0,
    "persona_warmup": 0,
    "history_dropout": 0.5,
    "epochs": 2,
    "global_batch": 4,
    "micro_batch": 2,
    "validate_every": 1,
    "learning_rate": 3e-3,
    "query_learning_rate": 1e-3,
    "max_input_tokens": 32,
    "max_query_tokens": 32,
    "precision": "fp32",
}


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a job ended: exit code, the JSON of its last line (None after an error), the lines before, and stderr."""

    code: int
    result: Any
    table: str
    said: str


Job = Callable[..., Done]
StoreUri = TypeVar("StoreUri", Path, str)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models by name."""
    folder = tmp_path_factory.mktemp("models")
    makers = {"encoder": tiny_encoder, "llama": tiny_llama, "chat": tiny_chat_llama, "t5": tiny_t5}
    return {name: str(make(folder / name)) for name, make in makers.items()}


@pytest.fixture(scope="session")
def local_ray(s3_server: str) -> Iterator[None]:
    """A Ray of our own on this machine, in which jobs find the S3 server; they leave it running."""
    import ray

    from jobs.runtime import session

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("HF_HUB_OFFLINE", "1")
        # How often Ray Train looks what its workers have reported; they wait for that.
        environment.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        # The next job finds the processes that the last one has left, and need not start its own.
        environment.setenv("RAY_idle_worker_killing_time_threshold_ms", "120000")
        with warm_workers():
            session.connect()
            yield
            ray.shutdown()


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Job:
    """Runs a job in this process, without a Ray to run on: `refuse(jobs.embed, store=uri, ...)`."""

    def call(job: ModuleType, **flags: object) -> Done:
        capsys.readouterr()
        code = run(job.Config, job.main, arguments(**flags))
        out, said = capsys.readouterr()
        # Of a process that has died Ray speaks up in between, or afterwards.
        table = [line for line in out.splitlines() if "(raylet)" not in line]
        # A job that fails has no result, but may have said what it was doing.
        result = json.loads(table.pop()) if table and table[-1].startswith("{") else None
        return Done(code=code, result=result, table="\n".join(table), said=said)

    return call


@pytest.fixture
def do(local_ray: None, refuse: Job) -> Job:
    """Runs a job in this process on the local Ray, with one actor."""

    def call(job: ModuleType, **flags: object) -> Done:
        done = refuse(job, **flags)
        if done.result is None:
            print(done.said)
        return done

    return call


@pytest.fixture
def while_it_waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Has something happen while a job waits for its machines."""
    from jobs.runtime import session

    connect = session.connect

    def plan(happens: Callable[[], object]) -> None:
        monkeypatch.setattr(session, "connect", lambda: (happens(), connect())[1])

    return plan


def arguments(**flags: object) -> list[str]:
    """Flags as a command line has them; a tuple is several values, True a switch, None nothing."""
    given: list[str] = []
    for name, value in flags.items():
        if value is None:
            continue
        given.append(f"--{name.replace('_', '-')}")
        if value is not True:
            given += map(str, value) if isinstance(value, tuple) else [str(value)]
    return given


def write(uri: str, rows: Sequence[Row]) -> str:
    """Rows as a file of the kind that the name says, local or on S3."""
    if uri.endswith(".parquet"):
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(list(rows)), sink)
        data = sink.getvalue()
    else:
        data = b"".join(json.dumps(row, default=datetime.isoformat).encode() + b"\n" for row in rows)
    write_bytes(uri, data)
    return uri


def behaviors(n_users: int = 6, n_each: int = 5) -> list[Row]:
    """A text a day of each user."""
    return [
        {
            "user_id": f"user-{user}",
            "behavior_id": f"b{number}",
            "text": f"user {user} likes the paper of {'abcdefghij'[(user * 3 + number) % 10] * (number + 2)}",
            "timestamp": START + timedelta(days=number),
        }
        for user in range(n_users)
        for number in range(n_each)
    ]


def requests(n_users: int = 6, n_each: int = 4, first_user: int = 0) -> list[Row]:
    """A few requests of each user, asked after the first behaviors and before the last ones."""
    return [
        {
            "request_id": f"r{user}-{number}",
            "user_id": f"user-{user}",
            "input": f"title of {'paper' if number % 2 else 'review'} {number}",
            "target": f"{'abcdefghij'[(user * 3 + number) % 10] * 3} of {user}",
            "as_of": START + timedelta(days=number + 1),
        }
        for user in range(first_user, first_user + n_users)
        for number in range(n_each)
    ]


@pytest.fixture(scope="session")
def filled_store(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with `behaviors()`; it is read-only, by convention."""
    return fill_store(tmp_path_factory.mktemp("filled") / "store", models["encoder"], behaviors())


@pytest.fixture
def store(filled_store: Path, tmp_path: Path) -> Path:
    """A copy of that store, to write to."""
    return Path(shutil.copytree(filled_store, tmp_path / "store"))


def fill_store(uri: StoreUri, encoder: str, rows: Sequence[Row]) -> StoreUri:
    """What `embed` would make of these behaviors, without Ray."""
    folder = resolve(encoder, flag="--encoder")
    identity = Identity(
        encoder=folder.name,
        revision=folder.revision,
        fingerprint=folder.fingerprint,
        width=ENCODER_WIDTH,
        pooling="cls",
        max_tokens=32,
        text_rule="text as given, cut to max_tokens",
    )
    store = Store.create(str(uri), identity, BUCKETS)
    write_rows(store, "behaviors", encoded(encoder, rows))
    return uri


def encoded(encoder: str, rows: Sequence[Row], change: str = "new") -> pa.Table:
    """Behaviors with their vectors, as a store takes them: all `new`, or all `edited`."""
    table = pa.Table.from_pylist([*rows])
    places = {"_row": pa.array(range(len(rows))), "_source": pa.repeat("test", len(rows))}
    for name, values in places.items():
        table = table.append_column(name, values)
    good, bad = histories.validate(
        Records(table=table, rejects=rejects("", [], [], []), first_schema=table.schema), histories.Columns(), BUCKETS
    )
    assert bad.num_rows == 0
    # Each text in a batch of its own: no vector depends, in its last bits, on what the others have written.
    folder = resolve(encoder, flag="--encoder")
    encoder_alone = TextEncoder(folder, pooling="cls", max_tokens=32, token_budget=1, precision="fp32")
    vectors = encoder_alone.encode(good["text"].to_pylist()).vectors
    good = good.append_column("vector", pa.array([vector.tobytes() for vector in vectors], pa.binary()))
    return good.append_column("change", pa.repeat(change, good.num_rows))


@pytest.fixture(scope="session")
def plug(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a plug for the Llama, as its training would begin."""
    return new_plug(tmp_path_factory.mktemp("plug") / "plug", models["encoder"], models["llama"])


def new_plug(path: Path, encoder: str, llm: str, seed: int = 0) -> str:
    """A plug folder with random weights."""
    frozen, llm_folder = resolve(encoder, flag="--encoder"), resolve(llm, flag="--llm")
    model = new_model(frozen, FrozenLLM.load(llm_folder, precision="fp32"), seed=seed)
    cut = {"encoder_max_tokens": 32, "max_query_tokens": 32, "max_input_tokens": 32, "max_behaviors": 3}
    training = {"validation_curve": []}
    record = replace(record_of(model, frozen, llm_folder), query_prompt="", training=training, **cut)
    plug_folder.save(path, model.plug.state_dict(), record, "a plug for tests")
    return str(path)


Rows = dict[tuple[str, ...], Row]


def end_groups(started: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Ends processes that lead groups of their own, with all in them, and nothing else; the last one first."""
    for process in reversed(started):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in started:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def stored(store: Path | str, table: str, without: Sequence[str] = ()) -> Rows:
    """The rows of a table by what tells them apart, each there once; read without this project."""
    uri = join(str(store), table)
    rows = DeltaTable(uri, storage_options=delta_options(uri)).to_pyarrow_table().to_pylist()
    names = {
        "behaviors": ("user_id", "behavior_id"),
        "personas": ("user_id", "plug"),
        "generations": ("request_id", "variant"),
    }[table]
    by_key = {tuple(row[name] for name in names): {k: v for k, v in row.items() if k not in without} for row in rows}
    assert len(by_key) == len(rows), "a key is there twice"
    return by_key


def changed(before: Rows, after: Rows) -> set[tuple[str, ...]]:
    """Keys of which any column differs, or that are on one side only."""
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def seen(uri: str, row: Row, most: int) -> list[bytes]:
    """The vectors that a request may see, by a loop over the whole store."""
    store = Store.open(uri)
    rows = [one for bucket in range(BUCKETS) for one in store.read_histories(bucket).to_pylist()]
    mine = [one for one in rows if one["user_id"] == row["user_id"] and one["timestamp"] < row["as_of"]]
    return [one["vector"] for one in sorted(mine, key=lambda one: one["timestamp"])][-most:]


def n_reports(runs: Path) -> int:
    """Checkpoints of the run `r` that Ray Train has heard of; it resumes at no other, though more may lie there."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        return int(json.loads((runs / "r" / "checkpoint_manager_snapshot.json").read_text())["current_report_index"])
    return 0
