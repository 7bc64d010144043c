"""`make_requests` on a real Ray: the requests are valid for train, and none sees its own future."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow.parquet as pq
import pytest

from jobs import make_requests
from persona.inputs import derived_requests, requests
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
    assert "words" not in done.table and "timestamp" not in done.table  # reasons that left nothing out
    assert {name: done.result[name] for name in ("requests", "early", "older")} == {
        "requests": 15,
        "early": 10,
        "older": 5,
    }
    assert "30 behaviors" in done.said  # of "read 30 behaviors" or "make 6 of 30 behaviors", whichever came first
    found = read(f"{s3}/requests")
    expected = {
        (row["user_id"], row["text"], row["timestamp"]) for row in written if (row["timestamp"] - START).days > 2
    }
    assert {(row["user_id"], row["target"], row["as_of"]) for row in found} == expected
    assert len({row["request_id"] for row in found}) == 15
    before = {entry.uri: entry.size_bytes for entry in list_files(f"{s3}/requests")}
    assert do(make_requests, **flags).result["requests"] == 15
    assert {entry.uri: entry.size_bytes for entry in list_files(f"{s3}/requests")} == before


def test_bad_rows_are_counted_with_their_reasons(do: Job, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = behaviors(n_users=5, n_each=4)
    rows[0]["timestamp"] = "05/07/2014"
    rows[1]["user_id"] = " "
    histories = write(str(tmp_path / "h.jsonl"), rows)
    flags = {"histories": histories, "min_history": 1, "buckets": 1}
    done = do(make_requests, **flags, out=str(tmp_path / "a"))
    assert (done.code, done.result["requests"], done.result["rejects"]) == (3, 1 + 4 * 3, 2)
    assert "timestamp is ambiguous" in done.table and "user_id is empty" in done.table
    assert do(make_requests, **flags, out=str(tmp_path / "b"), max_reject_fraction=0.1).code == 0

    write(histories, [{**row, "timestamp": "05/07/2014"} for row in rows])
    done = do(make_requests, **flags, out=str(tmp_path / "c"))
    assert (done.code, done.result["requests"], done.result["rejects"]) == (3, 0, 20)


def test_held_out_users_get_a_folder_of_their_own_and_share_no_text_with_the_others(do: Job, tmp_path: Path) -> None:
    rows = [{**row, "headline": f"About {row['behavior_id']}\nof many"} for row in behaviors(n_users=20, n_each=4)]
    histories = write(str(tmp_path / "h.jsonl"), rows)
    out = str(tmp_path / "requests")
    done = do(make_requests, histories=histories, out=out, task="which", held_out=0.3, min_history=1, buckets=1)
    assert done.code == 0
    parts = {part: pq.read_table(f"{out}/{part}").to_pylist() for part in ("train", "held_out")}
    assert {name: done.result[f"{name}_requests"] for name in parts} == {
        name: len(rows) for name, rows in parts.items()
    }
    users = {part: {row["user_id"] for row in rows} for part, rows in parts.items()}
    assert users["train"] and users["held_out"] and not users["train"] & users["held_out"]
    author = {" ".join(row["text"].split()): row["user_id"] for row in rows}
    for part, found in parts.items():
        for row in found:
            assert {author[line.split(": ", 1)[1]] for line in row["query"].splitlines()} <= users[part]
    titled = do(make_requests, histories=histories, out=f"{out}-titled", task="titled", title="headline", min_history=1)
    (one, *_) = read(f"{out}-titled")
    assert (titled.code, one["query"].endswith(" of many"), one["target"] in author) == (0, True, True)


def test_a_title_column_that_is_not_there_is_refused(refuse: Job, tmp_path: Path) -> None:
    histories = write(str(tmp_path / "h.jsonl"), behaviors())
    done = refuse(make_requests, histories=histories, out=str(tmp_path / "out"), task="titled", title="headline")
    assert (done.code, "--title headline" in done.said, "behavior_id (" in done.said) == (2, True, True)


def test_histories_without_timestamps_are_refused(refuse: Job, tmp_path: Path) -> None:
    rows = [{"user_id": row["user_id"], "text": row["text"], "date": str(row["timestamp"])} for row in behaviors()]
    flags = {"histories": write(str(tmp_path / "h.jsonl"), rows), "out": str(tmp_path / "out"), "dry_run": True}
    done = refuse(make_requests, **flags)
    assert (done.code, "--columns timestamp=COLUMN" in done.said) == (2, True)
    assert refuse(make_requests, **flags, columns="timestamp=date").code == 0


def test_the_flag_has_every_task() -> None:
    assert get_args(get_type_hints(make_requests.Config)["task"]) == get_args(derived_requests.Task)


WRONG: list[dict[str, Any]] = [
    {"max_a_user": 0},
    {"opening_words": -1},
    {"ask": " "},
    {"held_out": 1.0},
    {"title": "headline"},
    {"candidates": 3},
    {"max_reject_fraction": 2},
]


@pytest.mark.parametrize("flags", WRONG)
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
