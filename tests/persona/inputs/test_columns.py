"""Optional columns: a misspelled one is found, an absent one is reported, and a flag gives their names."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona.errors import InputError, UsageError
from persona.inputs import histories, requests
from persona.inputs.reader import read_split
from persona.inputs.splits import Split, plan_splits

BEHAVIOR = {"user_id": "u", "behavior_id": "b", "text": "t", "timestamp": 1}
REQUEST = {"request_id": "r", "user_id": "u", "input": "i", "query": "q", "as_of": 1}


def jsonl(path: Path, *rows: dict[str, Any]) -> None:
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))


def parquet(path: Path, *rows: dict[str, Any]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


FORMATS = pytest.mark.parametrize(("write", "end"), [(jsonl, "jsonl"), (parquet, "parquet")], ids=["jsonl", "parquet"])


def renamed(row: dict[str, Any], field: str, name: str) -> dict[str, Any]:
    return {(name if key == field else key): value for key, value in row.items()}


def check(splits: list[Split], kind: Any, spec: str = "") -> frozenset[str]:
    columns = kind.Columns.parse(spec, "--columns")
    if kind is histories:
        return histories.check_columns(splits, columns)
    return requests.check_columns(splits, columns, needs_target=False, flag="--columns")


def read_requests(splits: list[Split], **options: Any) -> tuple[list[str], list[str]]:
    """The ids of valid requests, and the reasons of rejects."""
    good: list[str] = []
    bad: list[str] = []
    for split in splits:
        for records in read_split(split, max_rows=2):
            rows, rejects = requests.validate(records, 4, needs_target=False, **options)
            good += rows["request_id"].to_pylist()
            bad += rejects["reason"].to_pylist()
    return good, bad


@pytest.mark.parametrize(
    ("kind", "row", "field", "name"),
    [(requests, REQUEST, "as_of", name) for name in ("asof", "As_Of", "as-of", "as of", "as_off", "as_of_date")]
    + [(histories, BEHAVIOR, "timestamp", name) for name in ("timestmap", "time_stamp", "Timestamp", "timestamp_ms")]
    + [(requests, REQUEST, "query", "querry"), (histories, BEHAVIOR, "behavior_id", "behaviour_id")],
)
@FORMATS
def test_a_misspelled_optional_column_is_refused_with_a_way_out(
    tmp_path: Path, write: Callable[..., None], end: str, kind: Any, row: dict[str, Any], field: str, name: str
) -> None:
    write(tmp_path / f"a.{end}", renamed(row, field, name))
    splits = plan_splits(str(tmp_path), flag="--in")
    with pytest.raises(InputError, match=f"has no column '{field}', but '{name}'.*--columns {field}={name}"):
        check(splits, kind)
    assert field in check(splits, kind, f"{field}={name}")
    assert field not in check(splits, kind, f"{field}=")


@pytest.mark.parametrize("name", ["time", "question", "queries", "behavior", "asked", "timeout", "stamp"])
def test_another_word_is_no_misspelled_column(tmp_path: Path, name: str) -> None:
    jsonl(tmp_path / "a.jsonl", {"request_id": "r", "user_id": "u", "input": "i", "text": "t", name: 1})
    splits = plan_splits(str(tmp_path), flag="--in")
    assert check(splits, requests) == check(splits, histories) == frozenset()


def test_a_misspelled_field_of_a_list_is_refused(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", {"user_id": "u", "behaviors": [{"text": "t", "time_stamp": 1}]})
    with pytest.raises(InputError, match="'timestamp', but 'time_stamp'"):
        check(plan_splits(str(tmp_path), flag="--in"), histories)
    items = [{"text": "t", "timestamp": 1}, {"text": "t", "timestamp": "2024-01-01"}]  # no common type
    jsonl(tmp_path / "a.jsonl", {"user_id": "u", "behaviors": items})
    assert "timestamp" in check(plan_splits(str(tmp_path), flag="--in"), histories)


@FORMATS
def test_a_file_without_as_of_is_rejected_where_others_have_it(
    tmp_path: Path, write: Callable[..., None], end: str
) -> None:
    """Its requests would see the whole history, each its own answer too."""
    without = {key: value for key, value in REQUEST.items() if key != "as_of"}
    write(tmp_path / f"a.{end}", REQUEST | {"request_id": "1"}, REQUEST | {"request_id": "null", "as_of": None})
    write(tmp_path / f"b.{end}", *(without | {"request_id": str(n)} for n in range(2, 5)))
    splits = plan_splits(str(tmp_path), flag="--in")
    assert "as_of" in check(splits, requests)
    assert read_requests(splits, needs_as_of=True) == (
        ["1", "null"],
        ["the file has no column as_of, but other files do"] * 3,
    )
    assert len(read_requests(splits)[0]) == 5


@FORMATS
def test_a_column_misspelled_in_one_file_of_many_is_refused_or_rejects_its_rows(
    tmp_path: Path, write: Callable[..., None], end: str
) -> None:
    for n in range(20):
        write(tmp_path / f"{n:02}.{end}", REQUEST | {"request_id": str(n)})
    write(tmp_path / f"01.{end}", renamed(REQUEST, "as_of", "asof"), renamed(REQUEST, "as_of", "asof"))
    splits = plan_splits(str(tmp_path), flag="--in")
    assert "as_of" in check(splits, requests)  # of 20 files it looks at 7
    good, bad = read_requests(splits)
    assert len(good) == 19 and bad == ["there is no column as_of, but 'asof', which may be it"] * 2
    with pytest.raises(InputError, match=f"01.{end} has no column 'as_of'"):
        check(splits[1:3], requests)


def test_columns_of_requests_can_have_other_names(tmp_path: Path) -> None:
    names = {"request_id": "id", "user_id": "who", "input": "prompt", "query": "about", "target": "gold", "as_of": "at"}
    row = {"id": 7, "who": "u", "prompt": "p", "about": "q", "gold": "g", "at": "2024-01-01"}
    jsonl(tmp_path / "a.jsonl", row, row | {"prompt": ""}, row | {"at": "soon"})
    columns = requests.Columns.parse(",".join(map("=".join, names.items())), "--request-columns")
    splits = plan_splits(str(tmp_path), flag="--in")
    assert requests.check_columns(splits, columns, needs_target=True) == {"query", "as_of"}
    (records,) = read_split(splits[0])
    good, bad = requests.validate(records, 4, needs_target=True, columns=columns)
    found = {name: good[name][0].as_py() for name in ("request_id", "user_id", "input", "query", "target")}
    assert found == {"request_id": "7", "user_id": "u", "input": "p", "query": "q", "target": "g"}
    assert [reason.split(" ")[0] for reason in bad["reason"].to_pylist()] == ["prompt", "at"]
    with pytest.raises(InputError, match="--request-columns as_of=asked: there is no such column. There are:.* at, "):
        requests.check_columns(splits, replace(columns, as_of="asked"), needs_target=True)
    with pytest.raises(InputError, match=r"no column 'user_id'.*--request-columns user_id=COLUMN"):
        requests.check_columns(splits, requests.Columns(request_id="id"), needs_target=True)


@pytest.mark.parametrize("spec", ["input=", "as_of", "timestamp_unit=ms", "as_of=a,as_of=b", "system_=x"])
def test_an_impossible_name_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="--request-columns: .*COLUMN may be empty only for query, as_of"):
        requests.Columns.parse(spec, "--request-columns")
