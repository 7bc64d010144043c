"""The store: what is missing, what a commit contains, and what other tools read."""

import json
import os
import pickle
import subprocess
import sys
import time
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

from persona.errors import InputError, StorageError, StoreMismatch, UsageError
from persona.inputs.histories import bucket_of, text_hash
from persona.inputs.records import rejects
from persona.storage import delta_options, join
from persona.store.store import DEFAULT_BUCKETS, Store
from tests.stores import IDENTITY, NASTY, answers, behaviors, changed, everything, refresh, write_rows


def test_a_store_keeps_its_identity_and_buckets(store: Store) -> None:
    again = Store.open(store.uri)
    assert (again.identity, again.n_buckets) == (IDENTITY, 4)
    found = Store.find(store.uri, IDENTITY)
    assert found is not None and found.n_buckets == 4


def test_a_new_store_is_created_empty(root: str) -> None:
    store = Store.create(join(root, "new"), IDENTITY)
    assert store.n_buckets == DEFAULT_BUCKETS and store.buckets() == [] and store.users(0) == []
    assert store.read_histories(0, ["a"]).num_rows == store.answers("own", 0).num_rows == 0
    assert {name: store.version(name) for name in ("behaviors", "personas", "generations", "rejects")} == dict.fromkeys(
        ("behaviors", "personas", "generations", "rejects"), 0
    )


def test_no_store_is_an_input_error(root: str) -> None:
    with pytest.raises(InputError, match=r"no store at .*nowhere.*jobs\.embed"):
        Store.open(join(root, "nowhere"))


def test_a_foreign_delta_table_is_not_a_store(tmp_path: Path) -> None:
    DeltaTable.create(str(tmp_path / "behaviors"), pa.schema([("x", pa.int32())]))
    with pytest.raises(InputError, match="has no property persona.encoder: it was not created by persona-plug"):
        Store.open(str(tmp_path))


def test_another_encoder_or_number_of_buckets_is_refused_with_both_values(store: Store) -> None:
    with pytest.raises(StoreMismatch, match="width is 4 in the store and 8 here.*another --store"):
        Store.find(store.uri, replace(IDENTITY, width=8))
    with pytest.raises(StoreMismatch, match="buckets is 4 in the store and 5 here"):
        Store.create(store.uri, IDENTITY, 5)


def test_only_new_and_edited_behaviors_are_missing(store: Store) -> None:
    first = behaviors(("a", "1", "x", 1), ("a", "2", "xx", 2), ("b", "1", "xxx", None))
    assert refresh(store, first) == {"known": 0, "new": 3, "edited": 0, "gone": 0, "duplicates": 0}
    assert refresh(store, first) == {"known": 3, "new": 0, "edited": 0, "gone": 0, "duplicates": 0}
    second = behaviors(("a", "1", "y" * 9, 1), ("a", "3", "xx", 3), ("b", "1", "xxx", None), ("a", "2", "xx", 2))
    assert refresh(store, second) == {"known": 2, "new": 1, "edited": 1, "gone": 0, "duplicates": 0}
    assert sorted(everything(store)) == [("a", "1", 9), ("a", "2", 2), ("a", "3", 2), ("b", "1", 3)]


def test_a_corrected_timestamp_is_an_edit(store: Store) -> None:
    """Otherwise `as_of` would let a request see a behavior from its future."""
    refresh(store, behaviors(("a", "1", "x", 1), ("a", "2", "x", None)))
    assert refresh(store, behaviors(("a", "1", "x", 7), ("a", "2", "x", 8)))["edited"] == 2
    assert refresh(store, behaviors(("a", "1", "x", None), ("a", "2", "x", 8)))["edited"] == 1


def test_the_latest_of_duplicates_counts(store: Store) -> None:
    rows = behaviors(
        ("a", "1", "x", 1), ("a", "1", "xx", 2), ("a", "1", "xxx", None), ("a", "2", "p", 5), ("a", "2", "qq", 5)
    )
    wanted = max(["p", "qq"], key=lambda text: text_hash([text])[0].as_py())
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        to_encode, counts = store.missing(rows["bucket"][0].as_py(), rows.take(order))
        assert to_encode["text"].to_pylist() == ["xx", wanted]
        assert counts == {"known": 0, "new": 2, "edited": 0, "gone": 0, "duplicates": 3, "store_bytes": 0}


def test_each_write_is_one_commit(store: Store) -> None:
    rows = behaviors(*((f"u{n}", "1", "x", n) for n in range(20)))
    before = store.version("behaviors")
    for change in ("new", "edited"):
        write_rows(store, "behaviors", changed(rows, change))
        # One more commit per writer records the lease.
        assert store.version("behaviors") == before + 2
        before += 2
    assert len(everything(store)) == 20


def test_writing_nothing_commits_nothing(store: Store) -> None:
    write_rows(store, "behaviors", changed(behaviors(("a", "1", "x", 1)), "new").slice(0, 0))
    write_rows(store, "generations", answers("a").slice(0, 0))
    assert store.version("behaviors") == store.version("generations") == 0


@pytest.mark.parametrize("vector", [b"", b"12345678910", None])
def test_a_vector_of_another_width_is_refused(store: Store, vector: bytes | None) -> None:
    rows = behaviors(("a", "1", "x", 1), ("a", "2", "x", 1)).append_column("change", pa.array(["new"] * 2))
    rows = rows.append_column("vector", pa.array([bytes(8), vector]))
    with pytest.raises(StoreMismatch, match="width 4, 8 bytes each"):
        write_rows(store, "behaviors", rows)
    assert everything(store) == [] and store.table("behaviors").files() == []


def test_histories_are_read_by_user_in_order(store: Store) -> None:
    rows = behaviors(*((user, str(n), "x", t) for user in NASTY for n, t in enumerate((5, None, 3))), n_buckets=1)
    write_rows(store, "behaviors", changed(rows, "new"))
    assert store.users(0) == sorted(NASTY) and store.buckets() == [0]
    for some in (NASTY[:1], NASTY[1:5], NASTY):
        table = store.read_histories(0, some, with_vectors=False)
        found = list(zip(table["user_id"].to_pylist(), table["behavior_id"].to_pylist(), strict=True))
        assert found == [(user, name) for user in sorted(some) for name in ("2", "0", "1")]
    assert store.read_histories(0, []).num_rows == store.read_histories(0, ["zz' OR 1=1 --"]).num_rows == 0


def test_a_snapshot_does_not_change_and_can_be_pickled(store: Store) -> None:
    refresh(store, behaviors(("a", "1", "x", 1)))
    bucket = int(bucket_of(["a"], 4)[0])
    then = store.snapshot("behaviors")
    assert then.versions == {"behaviors": store.version("behaviors")} and store.versions == {}
    refresh(store, behaviors(("a", "1", "xx", 1), ("a", "2", "x", 2)))
    for one in (then, pickle.loads(pickle.dumps(then))):
        assert one.read_histories(bucket)["text_hash"].to_pylist() == text_hash(["x"]).to_pylist()
        assert one.version("behaviors") == then.versions["behaviors"] < store.version("behaviors")
    assert store.read_histories(bucket).num_rows == 2
    empty = then.at(behaviors=0)
    assert empty.users(bucket) == [] and empty.buckets() == []


def test_a_snapshot_of_one_table_reads_the_newest_version_of_the_others(store: Store) -> None:
    then = store.snapshot("behaviors")
    refresh(store, behaviors(("a", "1", "x", 1)))
    write_rows(store, "generations", answers("r"))
    assert then.buckets() == [] and then.variants() == ["own"]
    assert then.snapshot("generations").versions == {"behaviors": 0, "generations": store.version("generations")}


def test_a_version_is_readable_until_it_is_vacuumed_or_erased(store: Store) -> None:
    table = store.table("behaviors")
    refresh(store, behaviors(("a", "1", "text", 1)))
    first = store.version("behaviors")
    assert table.has(first)
    refresh(store, behaviors(("a", "1", "edited", 1)))
    second = store.version("behaviors")
    assert table.has(first) and table.has(second)
    with store.writer("behaviors", job="test") as writer:
        writer.vacuum(keep_hours=0)
        assert table.has(second) and not table.has(first)
        writer.erase_history()
    assert table.has(store.version("behaviors")) and not table.has(second)
    started = time.monotonic()
    assert not table.has(0)
    assert time.monotonic() - started < 5  # a missing version is not retried


def test_answers_are_found_and_replaced(store: Store) -> None:
    write_rows(store, "generations", answers("r1", "r2"))
    write_rows(store, "generations", answers("r1", variant="none / ü'"))
    write_rows(store, "generations", answers("r2", "r3", fingerprint="g", output="new", changes=["edited", "new"]))
    found = [row for bucket in range(4) for row in store.answers("own", bucket).to_pylist()]
    assert sorted((row["request_id"], row["fingerprint"]) for row in found) == [("r1", "f"), ("r2", "g"), ("r3", "g")]
    assert store.read_generations(["none / ü'"])["request_id"].to_pylist() == ["r1"]
    outputs = store.read_generations(columns=["request_id", "output"]).to_pylist()
    assert sorted(row["output"] for row in outputs) == ["new", "new", "o", "o"] and set(outputs[0]) == {
        "request_id",
        "output",
    }


def test_a_pickled_store_has_no_connections_or_secrets(store: Store) -> None:
    store.users(0)
    packed = pickle.dumps(store)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret here").encode() not in packed
    assert pickle.loads(packed).users(0) == [] and "tiny" in repr(store)


def test_other_tools_read_the_tables(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path), IDENTITY, 4)
    refresh(store, behaviors(("a", "1", "x", 1), ("b", "1", "xx", None)))
    refresh(store, behaviors(("a", "1", "xxx", 1)))
    write_rows(store, "generations", answers("r1"))
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
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}


def test_behaviors_missing_from_the_input_are_deleted_only_with_sync(store: Store) -> None:
    refresh(store, behaviors(("a", "1", "x", 1), ("a", "2", "xx", 2), ("a", "3", "xxx", 3)))
    left = behaviors(("a", "1", "x", 1), ("a", "2", "yyyy", 2))
    assert refresh(store, left, sync=False)["gone"] == 0
    assert refresh(store, left, sync=True) == {"known": 2, "new": 0, "edited": 0, "gone": 1, "duplicates": 0}
    assert sorted(everything(store)) == [("a", "1", 1), ("a", "2", 4)]


def test_a_known_reject_is_not_written_again(store: Store) -> None:
    for _ in range(2):
        store.write_rejects(rejects("embed", ["it's", "it's"], [3, 4], ["text is empty", "text is empty"]))
    store.write_rejects(rejects("embed", ["it's"], [3], ["text is missing"]))
    assert pl.read_delta(join(store.uri, "rejects")).height == 3 if not store.uri.startswith("s3") else True


def test_concurrent_creation_gives_one_store(root: str) -> None:
    code = (
        "import json, sys; from persona.store.identity import Identity; from persona.store.store import Store; "
        "Store.create(sys.argv[1], Identity(**json.loads(sys.argv[2])), 4)"
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


def test_an_unreachable_store_is_a_storage_error_without_secrets(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PERSONA_STORAGE_TIMEOUT_S", "2")
    assert delta_options(s3)["AWS_ENDPOINT_URL"].endswith(":9")
    with pytest.raises(StorageError, match="cannot open the table") as caught:
        Store.open(join(s3, "store"))
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


@pytest.mark.parametrize("name", ["a b", "a#b", "a?b", "100%", "a+b", "a[1]b", "é", "a:b", "'"])
def test_a_store_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    store = Store.create(str(tmp_path / name), IDENTITY, 4)
    write_rows(store, "generations", answers("r1"))
    assert Store.open(store.uri).read_generations().num_rows == 1
    assert [folder.name for folder in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a%20b", "a%2Fb", "a\\b", "a\tb", "a\udcffb"])
def test_a_store_in_a_folder_that_would_be_taken_for_another_is_refused(tmp_path: Path, name: str) -> None:
    for start in (Store.open, lambda uri: Store.create(uri, IDENTITY, 4)):
        with pytest.raises(UsageError, match="which means another path to the table library; rename the folder"):
            start(str(tmp_path / name))
    assert not [*tmp_path.iterdir()]
