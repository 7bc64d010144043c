"""Snapshots: a task that is sent one reads data files, and neither the log nor a listing."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona.inputs.histories import bucket_of
from persona.store import data_files
from persona.store.data_files import DataFile
from persona.store.file_list import FileList
from persona.store.store import Store
from tests.recorded_s3 import RecordedS3
from tests.stores import IDENTITY, NASTY, answers, behaviors, places_of_bucket, refresh, write_rows


@pytest.fixture
def requests(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedS3]:
    with RecordedS3(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def personas(bucket: int) -> pa.Table:
    columns = {"user_id": ["a"], "plug": ["p"], "n_behaviors": pa.array([1], pa.int32()), "persona": [[1.0]]}
    return pa.table({"bucket": pa.array([bucket], pa.int32()), **columns, "change": ["new"]})


def test_a_task_with_a_snapshot_asks_for_data_files_only(s3: str, requests: RecordedS3) -> None:
    store = Store.create(f"{s3}/store", IDENTITY, 4)
    bucket = int(bucket_of(["a"], 4)[0])
    rows = behaviors(*((user, "1", "x", 1) for user in ("a", "b", "c", "d", "e")))
    refresh(store, rows)
    write_rows(store, "personas", personas(bucket))
    write_rows(store, "generations", answers("a", "b"))
    packed = pickle.dumps(Store.open(store.uri).snapshot("behaviors", "personas", "generations"))
    refresh(store, behaviors(("a", "1", "later", 2)))

    requests.asked.clear()
    task = pickle.loads(packed)
    mine = rows.filter(pa.compute.equal(rows["bucket"], bucket))
    assert task.missing(bucket, mine, absent=places_of_bucket(bucket))[1]["known"] == mine.num_rows
    assert task.missing(bucket, mine.slice(1), absent=places_of_bucket(bucket))[1]["gone"] == 1
    assert task.read_histories(bucket, ["a"]).num_rows == 1 and "a" in task.users(bucket)
    assert "a" not in task.personas_to_make(bucket, "p")["user_id"].to_pylist()
    assert bucket in task.buckets() and task.persona_buckets() == [bucket] and task.variants() == ["own"]
    assert task.answers("own", bucket).num_rows + task.read_generations(buckets=[0, 1, 2, 3]).num_rows >= 3
    assert task.version("behaviors") == task.versions["behaviors"]
    assert task.stage("generations", answers("c")).num_rows == 1
    asked = [one for one in requests.asked if "/store/" in one or "list-type" in one]
    assert len(asked) > 10
    assert [one for one in asked if "_delta_log" in one or "list-type" in one] == []


@pytest.mark.parametrize("n_files", [0, 20_000])
def test_a_list_of_files_is_small_and_comes_back_equal(n_files: int) -> None:
    table = pa.table(
        {
            "path": pa.array([f"bucket={i // 20}/part-{i:032}.parquet" for i in range(n_files)], pa.string()),
            "partition": pa.array([str(i // 20) for i in range(n_files)], pa.string()),
            "n_rows": pa.array([50_000] * n_files, pa.int64()),
            "size_bytes": pa.array([2**26] * n_files, pa.int64()),
            "min.user_id": pa.array([f"user-{i}" for i in range(n_files)], pa.string()),
            "max.user_id": pa.array([f"user-{i + 7}" for i in range(n_files)], pa.string()),
        }
    )
    packed = pickle.dumps(FileList(3, table))
    again = pickle.loads(packed)
    assert len(packed) < 200 * n_files + 5_000 and again.version == 3 and len(again) == n_files
    assert again.of_partitions() == FileList(3, table).of_partitions()
    assert len(again.of_partitions([7, "8", 999_999])) == (40 if n_files else 0)
    assert [file.stats["user_id"] for file in again.of_partitions([0])][:1] == [("user-0", "user-7")][:n_files]


def test_of_some_users_only_their_row_groups_are_read(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "_ROW_GROUP", 2)
    users = [user for user in (*NASTY, *map(str, range(200))) if bucket_of([user], 4)[0] == 0]
    refresh(local, behaviors(*((user, "1", "x", 1) for user in users)))
    table = local.table("behaviors")
    (file,) = table.files([0])
    n_all = data_files.read_counted(table.uri, table.layout, file)[1]
    for user in users[::7]:
        rows, n_bytes = data_files.read_counted(table.uri, table.layout, file, values={"user_id": [user, "nobody"]})
        assert rows["user_id"].to_pylist() == [user] and n_bytes < n_all / 5
        assert local.read_histories(0, [user])["user_id"].to_pylist() == [user]
    assert local.read_histories(0, [" ", "~"]).num_rows == 0


def test_a_column_that_another_program_left_out_is_null(local: Store) -> None:
    table = local.table("behaviors")
    path = Path(table.uri) / "bucket=0" / "part-0.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"user_id": ["a"], "behavior_id": ["1"]}), path)
    file = DataFile(path="bucket=0/part-0.parquet", partition="0", n_rows=1, size_bytes=path.stat().st_size, stats={})
    with local.writer("behaviors", job="test") as writer:
        writer.table.commit([file], lease=writer.lease.number)
    found = local.read_histories(0, ["a"])
    assert found.to_pylist() == [
        {"user_id": "a", "behavior_id": "1", "timestamp": None, "text_hash": None, "vector": None}
    ]
    assert local.table("behaviors").read(values={"text_hash": ["x"]}).num_rows == 0
