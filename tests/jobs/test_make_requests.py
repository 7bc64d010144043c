"""`make_requests` on a real Ray: the requests are valid for train, and none sees its own future."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import make_requests
from persona.inputs import requests
from persona.inputs.reader import read_split
from persona.inputs.splits import plan_splits
from persona.storage import list_files
from tests.jobs.conftest import START, Job, behaviors, write


def read(out: str) -> list[dict[str, Any]]:
    splits = plan_splits(out, flag="--requests")
    requests.check_columns(splits, requests.Columns(), needs_target=True)
    tables = [requests.validate(records, 4, True)[0] for split in splits for records in read_split(split, job="")]
    return [row for table in tables for row in table.to_pylist()]


def test_each_behavior_becomes_the_target_of_a_request_that_sees_the_older_ones(do: Job, s3: str) -> None:
    written = behaviors(n_users=5, n_each=6)
    histories = write(f"{s3}/histories.jsonl", written)
    flags = {"histories": histories, "out": f"{s3}/requests", "min_history": 2, "max_a_user": 3, "buckets": 4}
    done = do(make_requests, **flags)
    assert done.code == 0
    assert "10 with fewer than 2 older texts" in done.table
    assert "5 beyond the latest 3 of a user" in done.table
    assert {name: done.result[name] for name in ("requests", "early", "older")} == {
        "requests": 15,
        "early": 10,
        "older": 5,
    }
    found = read(f"{s3}/requests")
    expected = {
        (row["user_id"], row["text"], row["timestamp"]) for row in written if (row["timestamp"] - START).days > 2
    }
    assert {(row["user_id"], row["target"], row["as_of"]) for row in found} == expected
    assert len({row["request_id"] for row in found}) == 15
    before = {entry.uri: entry.size_bytes for entry in list_files(f"{s3}/requests")}
    assert do(make_requests, **flags).result["requests"] == 15
    assert {entry.uri: entry.size_bytes for entry in list_files(f"{s3}/requests")} == before


@pytest.mark.parametrize("flags", [{"max_a_user": 0}, {"opening_words": -1}, {"ask": " "}])
def test_invalid_values_are_refused(refuse: Job, tmp_path: Path, flags: dict[str, Any]) -> None:
    histories = write(str(tmp_path / "h.jsonl"), behaviors())
    done = refuse(make_requests, histories=histories, out=str(tmp_path / "out"), **flags)
    name = next(iter(flags)).replace("_", "-")
    assert (done.code, f"--{name}" in done.said) == (2, True)


def test_a_folder_with_files_of_another_run_is_refused(refuse: Job, tmp_path: Path) -> None:
    histories = write(str(tmp_path / "h.parquet"), behaviors())
    (tmp_path / "out").mkdir()
    pq.write_table(pq.read_table(histories), tmp_path / "out" / "part-00000-of-00002.parquet")
    done = refuse(make_requests, histories=histories, out=str(tmp_path / "out"), buckets=4)
    assert (done.code, "this run would not replace" in done.said) == (2, True)
