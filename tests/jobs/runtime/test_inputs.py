"""What a job says about its input before it starts: files left out, and optional columns that are absent."""

from pathlib import Path
from typing import Any

import pytest

from jobs.runtime import reading
from jobs.runtime.inputs import find_histories, find_requests
from jobs.runtime.job_options import InputFormat, RequestFormat
from persona.errors import InputError, UsageError
from tests.jobs.conftest import write

FOUND = reading.Found(files={"r.jsonl": reading.FileFound(rows=2, timeless=1)}, reasons={})
REQUEST = {"request_id": "r", "user_id": "u", "input": "i", "target": "t"}
FOUND = reading.Found.of([reading.SplitFound(uri="r.jsonl", rows=2, timeless=1)])


def requests_in(folder: Path, form: RequestFormat | None = None) -> Any:
    return find_requests(str(folder), form or RequestFormat(), flag="--requests", needs_target=True)


def test_absent_optional_columns_are_said_with_what_follows(tmp_path: Path) -> None:
    write(str(tmp_path / "r.parquet"), [REQUEST])
    requests = requests_in(tmp_path)
    assert requests.facts() == {"excluded_files": 0, "absent_columns": ("query", "as_of", "system")}
    rows = dict(reading.request_rows(requests, FOUND))
    assert rows["no as_of"] == "every request sees the whole history, later behaviors and its own answer included"
    assert rows["no query"] == "the input weights the history" and "null as_of" not in rows

    write(str(tmp_path / "r.parquet"), [{"user_id": "u", "text": "t"}])
    histories = find_histories(str(tmp_path), "", InputFormat(), flag="--histories")
    assert dict(histories.rows())["no timestamp"] == "a request with as_of sees none of these behaviors"
    assert histories.absent == ("behavior_id", "timestamp")


def test_requests_without_a_value_are_counted_where_others_have_one(tmp_path: Path) -> None:
    write(str(tmp_path / "r.jsonl"), [{**REQUEST, "query": "q", "as_of": "2024-01-01"}, {**REQUEST, "query": "q"}])
    requests = requests_in(tmp_path)
    assert requests.needs_as_of and requests.rows() == []
    rows = reading.request_rows(requests, FOUND)
    assert rows[0] == ("null as_of", "1 requests see the whole history")


def test_excluded_files_are_counted_and_others_are_not_skipped(tmp_path: Path) -> None:
    write(str(tmp_path / "r.parquet"), [REQUEST])
    (tmp_path / "readme.txt").write_text("about these requests")
    with pytest.raises(InputError, match=r"--requests: a file .* 'readme.txt'.*--exclude '\*.txt'"):
        requests_in(tmp_path)
    requests = requests_in(tmp_path, RequestFormat(exclude=("*.txt",)))
    assert requests.rows()[0] == ("excluded", "1 files (--exclude)")
    assert requests.facts()["excluded_files"] == 1


def test_names_and_units_come_from_flags(tmp_path: Path) -> None:
    write(str(tmp_path / "r.parquet"), [{**REQUEST, "asked": 1404563400000}])
    form = RequestFormat(request_columns="as_of=asked", timestamp_unit="ms")
    columns = requests_in(tmp_path, form).columns
    assert (columns.as_of, columns.timestamp_unit) == ("asked", "ms")
    with pytest.raises(UsageError, match="--request-columns: 'asof=asked'"):
        requests_in(tmp_path, RequestFormat(request_columns="asof=asked"))
