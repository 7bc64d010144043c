"""The store: what is missing, what is written whole, and who else can read it."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from persona import histories
from persona.errors import InputError, StorageError, StoreMismatch
from persona.histories import bucket_of, text_hash
from persona.inputs import rejects
from persona.storage import delta_options, join
from persona.store import DEFAULT_BUCKETS, Identity, Store

IDENTITY = Identity(
    encoder="tiny", revision="abc", fingerprint="f00d", width=4, pooling="mean", max_tokens=16, text_rule="text"
)
NASTY = ["it's", 'a "b"', "x/y", "{}", "é", "👍", " lead", "\\", "a\nb", "%20", "--", ";"]


@pytest.fixture
def store(root: str) -> Store:
    return Store.create(join(root, "store"), IDENTITY, 4)


def behaviors(*rows: tuple[str, str, str, int | None], n_buckets: int = 4) -> pa.Table:
    """(user_id, behavior_id, text, timestamp in microseconds) as `histories.validate` gives them."""
    users, names, texts, times = zip(*rows, strict=True)
    columns = {
        "user_id": users,
        "behavior_id": names,
        "text": texts,
        "timestamp": pa.array(times, pa.timestamp("us", "UTC")),
        "bucket": bucket_of(users, n_buckets),
        "text_hash": text_hash(texts),
    }
    return pa.table(columns, schema=histories.SCHEMA)


def encode(rows: pa.Table) -> pa.Table:
    """A vector that tells its text: the text's length, four times."""
    vectors = [np.full(4, len(text), "<f2").tobytes() for text in rows["text"].to_pylist()]
    return rows.append_column("vector", pa.array(vectors, pa.binary()))


def refresh(store: Store, rows: pa.Table) -> dict[str, int]:
    """What `embed` does, without Ray and without an encoder."""
    total: dict[str, int] = {}
    for bucket in set(rows["bucket"].to_pylist()):
        mine = rows.filter(pa.compute.equal(rows["bucket"], bucket))
        to_encode, counts = store.missing(bucket, mine)
        store.write_behaviors(encode(to_encode))
        total = {name: total.get(name, 0) + n for name, n in counts.items()}
    return total


def everything(store: Store) -> list[tuple[str, str, float]]:
    tables = [store.read_histories(bucket) for bucket in range(store.n_buckets)]
    return [
        (row["user_id"], row["behavior_id"], float(np.frombuffer(row["vector"], "<f2")[0]))
        for table in tables
        for row in table.to_pylist()
    ]


def answers(*ids: str, variant: str = "own", fingerprint: str = "f", output: str = "o") -> pa.Table:
    n = len(ids)
    return pa.table(
        {
            "request_id": ids,
            "user_id": ids,
            "output": [output] * n,
            "variant": [variant] * n,
            "plug": ["p"] * n,
            "llm": ["l"] * n,
            "n_behaviors": pa.array([1] * n, pa.int32()),
            "n_tokens": pa.array([2] * n, pa.int32()),
            "finish_reason": ["stop"] * n,
            "fingerprint": [fingerprint] * n,
            "bucket": bucket_of(ids, 4),
        }
    )


def test_a_store_remembers_who_may_write_to_it(store: Store) -> None:
    again = Store.open(store.uri)
    assert (again.identity, again.n_buckets) == (IDENTITY, 4)
    assert Store.open_or_create(store.uri, IDENTITY).n_buckets == 4


def test_a_new_store_is_created_empty(root: str) -> None:
    store = Store.open_or_create(join(root, "new"), IDENTITY)
    assert store.n_buckets == DEFAULT_BUCKETS and store.buckets() == [] and store.users(0) == []
    assert store.read_histories(0, ["a"]).num_rows == store.answers("own", 0).num_rows == 0
    assert {name: store.version(name) for name in ("behaviors", "personas", "generations", "rejects")} == dict.fromkeys(
        ("behaviors", "personas", "generations", "rejects"), 0
    )


def test_no_store_is_an_input_error(root: str) -> None:
    with pytest.raises(InputError, match=r"no store at .*nowhere.*jobs\.embed"):
        Store.open(join(root, "nowhere"))


def test_a_delta_table_of_others_is_no_store(tmp_path: Path) -> None:
    DeltaTable.create(str(tmp_path / "behaviors"), pa.schema([("x", pa.int32())]))
    with pytest.raises(InputError, match="does not say 'encoder'"):
        Store.open(str(tmp_path))


def test_another_encoder_is_refused_with_both_named(store: Store) -> None:
    with pytest.raises(StoreMismatch, match="width is 4 in the store and 8 here.*another --store"):
        Store.open_or_create(store.uri, replace(IDENTITY, width=8))
    with pytest.raises(StoreMismatch, match="buckets is 4 in the store and 5 here"):
        Store.create(store.uri, IDENTITY, 5)


def test_only_what_is_new_or_edited_is_missing(store: Store) -> None:
    first = behaviors(("a", "1", "x", 1), ("a", "2", "xx", 2), ("b", "1", "xxx", None))
    assert refresh(store, first) == {"known": 0, "new": 3, "edited": 0, "duplicates": 0}
    assert refresh(store, first) == {"known": 3, "new": 0, "edited": 0, "duplicates": 0}
    second = behaviors(("a", "1", "y" * 9, 1), ("a", "3", "xx", 3), ("b", "1", "xxx", None), ("a", "2", "xx", 2))
    assert refresh(store, second) == {"known": 2, "new": 1, "edited": 1, "duplicates": 0}
    assert sorted(everything(store)) == [("a", "1", 9), ("a", "2", 2), ("a", "3", 2), ("b", "1", 3)]


def test_a_corrected_timestamp_is_an_edit(store: Store) -> None:
    """Or `as_of` would go on letting a request see what was written after it."""
    refresh(store, behaviors(("a", "1", "x", 1), ("a", "2", "x", None)))
    assert refresh(store, behaviors(("a", "1", "x", 7), ("a", "2", "x", 8)))["edited"] == 2
    assert refresh(store, behaviors(("a", "1", "x", None), ("a", "2", "x", 8)))["edited"] == 1


def test_of_duplicates_the_latest_counts(store: Store) -> None:
    rows = behaviors(
        ("a", "1", "x", 1), ("a", "1", "xx", 2), ("a", "1", "xxx", None), ("a", "2", "p", 5), ("a", "2", "qq", 5)
    )
    wanted = max(["p", "qq"], key=lambda text: text_hash([text])[0].as_py())
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        to_encode, counts = store.missing(rows["bucket"][0].as_py(), rows.take(order))
        assert to_encode["text"].to_pylist() == ["xx", wanted]
        assert counts == {"known": 0, "new": 2, "edited": 0, "duplicates": 3}


def test_each_block_is_one_commit(store: Store) -> None:
    rows = behaviors(*((f"u{n}", "1", "x", n) for n in range(20)))
    for n, edited in ((1, False), (2, True)):
        block = encode(rows).append_column("edited", pa.array([edited] * 20))
        store.write_behaviors(block)
        assert store.version("behaviors") == n
    assert len(everything(store)) == 20


def test_writing_nothing_commits_nothing(store: Store) -> None:
    store.write_behaviors(encode(behaviors(("a", "1", "x", 1))).append_column("edited", pa.array([False])).slice(0, 0))
    store.write_generations(answers("a").slice(0, 0))
    assert store.version("behaviors") == store.version("generations") == 0


@pytest.mark.parametrize("vector", [b"", b"12345678910", None])
def test_a_vector_of_another_width_is_refused(store: Store, vector: bytes | None) -> None:
    rows = behaviors(("a", "1", "x", 1), ("a", "2", "x", 1)).append_column("edited", pa.array([False] * 2))
    rows = rows.append_column("vector", pa.array([bytes(8), vector]))
    with pytest.raises(StoreMismatch, match="width 4, 8 bytes each"):
        store.write_behaviors(rows)
    assert store.version("behaviors") == 0


def test_histories_are_read_by_user_and_in_order(store: Store) -> None:
    rows = behaviors(*((user, str(n), "x", t) for user in NASTY for n, t in enumerate((5, None, 3))), n_buckets=1)
    store.write_behaviors(encode(rows).append_column("edited", pa.array([False] * rows.num_rows)))
    assert store.users(0) == sorted(NASTY) and store.buckets() == [0]
    for some in (NASTY[:1], NASTY[1:5], NASTY):
        table = store.read_histories(0, some, with_vectors=False)
        found = list(zip(table["user_id"].to_pylist(), table["behavior_id"].to_pylist(), strict=True))
        assert found == [(user, name) for user in sorted(some) for name in ("2", "0", "1")]
    assert store.read_histories(0, []).num_rows == store.read_histories(0, ["zz' OR 1=1 --"]).num_rows == 0


def test_a_pinned_version_stays_as_it_was(store: Store) -> None:
    refresh(store, behaviors(("a", "1", "x", 1)))
    version, bucket = store.version("behaviors"), int(bucket_of(["a"], 4)[0])
    refresh(store, behaviors(("a", "1", "xx", 1), ("a", "2", "x", 2)))
    assert store.read_histories(bucket, version=version)["text_hash"].to_pylist() == text_hash(["x"]).to_pylist()
    assert store.read_histories(bucket).num_rows == 2
    assert store.users(bucket, version=0) == [] and store.buckets(version=0) == []


def test_answers_are_found_and_replaced(store: Store) -> None:
    store.write_generations(answers("r1", "r2"))
    store.write_generations(answers("r1", variant="none / ü'"))
    store.write_generations(answers("r2", "r3", fingerprint="g", output="new"))
    assert store.version("generations") == 3
    found = [row for bucket in range(4) for row in store.answers("own", bucket).to_pylist()]
    assert sorted((row["request_id"], row["fingerprint"]) for row in found) == [("r1", "f"), ("r2", "g"), ("r3", "g")]
    assert store.read_generations(["none / ü'"])["request_id"].to_pylist() == ["r1"]
    outputs = store.read_generations(columns=["request_id", "output"]).to_pylist()
    assert sorted(row["output"] for row in outputs) == ["new", "new", "o", "o"] and set(outputs[0]) == {
        "request_id",
        "output",
    }


def test_a_store_travels_without_its_connections_and_secrets(store: Store) -> None:
    store.users(0)
    packed = pickle.dumps(store)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret here").encode() not in packed
    assert pickle.loads(packed).users(0) == [] and "tiny" in repr(store)


def test_other_tools_read_the_tables(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path), IDENTITY, 4)
    refresh(store, behaviors(("a", "1", "x", 1), ("b", "1", "xx", None)))
    refresh(store, behaviors(("a", "1", "xxx", 1)))
    store.write_generations(answers("r1"))
    store.write_rejects(rejects("embed", ["file"], [3], ["text is empty"]))
    uri = join(store.uri, "behaviors")
    frame = DeltaTable(uri).to_pandas()
    assert isinstance(frame, pd.DataFrame) and sorted(frame["user_id"]) == ["a", "b"]
    assert sorted(np.frombuffer(b"".join(frame["vector"]), "<f2").reshape(-1, 4)[:, 0]) == [2, 3]
    assert pl.read_delta(uri).height == 2
    generations = duckdb.arrow(DeltaTable(join(store.uri, "generations")).to_pyarrow_dataset())
    assert generations.aggregate("count(*)").fetchall() == [(1,)]
    assert pl.read_delta(join(store.uri, "rejects"))["reason"].to_list() == ["text is empty"]
    assert pl.read_delta(join(store.uri, "personas")).height == 0


def python_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


WRITER = """
import sys
import pyarrow as pa
from persona.histories import bucket_of, text_hash
from persona.store import Store
uri, me = sys.argv[1:]
store = Store.open(uri)
for n in range(3):
    users = [f"user-{me}-{n}-{i}" for i in range(20)] + [f"again-{me}"]
    store.write_behaviors(pa.table({
        "user_id": users, "behavior_id": ["1"] * 21, "timestamp": pa.nulls(21), "text_hash": text_hash([str(n)] * 21),
        "bucket": bucket_of(users, 4), "vector": [bytes(8)] * 21, "edited": [False] * 20 + [n > 0],
    }))
"""


def test_writers_in_several_processes_all_succeed_and_leave_no_key_twice(store: Store) -> None:
    """Appends beside replacements in the same buckets, while somebody reads."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, store.uri, str(n)], env=python_environment()) for n in range(4)
    ]
    while any(writer.poll() is None for writer in writers):
        version = store.version("behaviors")
        tables = [
            store.read_histories(bucket, with_vectors=False, version=version) for bucket in store.buckets(version)
        ]
        users = [user for table in tables for user in table["user_id"].to_pylist()]
        assert len(set(users)) == len(users)
        assert sum(user.startswith("user-") for user in users) % 20 == 0  # half a commit would show here
    assert [writer.wait() for writer in writers] == [0, 0, 0, 0]
    keys = [key[:2] for key in everything(store)]
    assert len(keys) == len(set(keys)) == 4 * 3 * 20 + 4
    expected = text_hash(["2"])[0].as_py()
    tables = [store.read_histories(bucket, [f"again-{n}" for n in range(4)]) for bucket in range(4)]
    assert [h for table in tables for h in table["text_hash"].to_pylist()] == [expected] * 4


def test_creating_the_same_store_in_several_processes_gives_one(root: str) -> None:
    code = (
        "import json, sys; from persona.store import Identity, Store; "
        "Store.open_or_create(sys.argv[1], Identity(**json.loads(sys.argv[2])), 4)"
    )
    arguments = [sys.executable, "-c", code, join(root, "store"), json.dumps(IDENTITY.__dict__)]
    creators = [subprocess.Popen(arguments, env=python_environment()) for _ in range(3)]
    assert [creator.wait() for creator in creators] == [0, 0, 0]
    assert Store.open(join(root, "store")).identity == IDENTITY


def test_statistics_in_the_log_let_readers_skip_files(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path), IDENTITY, 4)
    refresh(store, behaviors(("a", "1", "x", 1)))
    actions: Any = pa.table(DeltaTable(join(store.uri, "behaviors")).get_add_actions(flatten=True)).to_pylist()
    assert [(a["min.user_id"], a["max.user_id"], a["num_records"]) for a in actions] == [("a", "a", 1)]
    assert not any("vector" in name for name in actions[0])


def test_a_store_that_is_gone_is_a_storage_error_without_secrets(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert delta_options(s3)["AWS_ENDPOINT_URL"].endswith(":9")
    with pytest.raises(StorageError, match="cannot open the table") as caught:
        Store.open(join(s3, "store"))
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
