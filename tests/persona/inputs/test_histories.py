"""Behaviors from raw records: both layouts, every type of column, and a reason for each bad row."""

import hashlib
import zlib
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from persona.errors import InputError, UsageError
from persona.inputs.histories import SCHEMA, Columns, bucket_of, check_columns, text_hash, validate
from persona.inputs.json_columns import json_array
from persona.inputs.reader import read_split
from persona.inputs.records import Records, rejects
from persona.inputs.splits import plan_splits
from persona.options import TimeUnit

PLAIN = Columns()


def records(**columns: Any) -> Records:
    """Raw rows as `read_split` yields them."""
    table = pa.table(columns)
    n = table.num_rows
    table = table.append_column("_row", pa.array(range(n), pa.int64())).append_column("_source", pa.array(["file"] * n))
    return Records(table=table, rejects=rejects("", [], [], []), first_schema=table.schema)


def check(raw: Records, columns: Columns = PLAIN) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    good, bad = validate(raw, columns, 16, job="embed")
    assert good.schema == SCHEMA
    assert set(bad["job"].to_pylist()) <= {"embed"}
    return good.to_pylist(), list(zip(bad["row"].to_pylist(), bad["reason"].to_pylist(), strict=True))


def file_of(folder: Path, *lines: Any) -> list[Any]:
    (folder / "in.jsonl").write_bytes(b"\n".join(x if isinstance(x, bytes) else orjson.dumps(x) for x in lines))
    return plan_splits(str(folder), flag="--histories")


def test_a_behavior_gets_a_bucket_a_hash_and_if_needed_an_id() -> None:
    good, bad = check(
        records(user_id=["ann", "ann"], behavior_id=["1", " "], text=["Hello", " Hello "], timestamp=[0, None])
    )
    assert bad == []
    assert good[0] == {
        "user_id": "ann",
        "behavior_id": "1",
        "text": "Hello",
        "timestamp": datetime(1970, 1, 1, tzinfo=UTC),
        "bucket": zlib.crc32(b"ann") % 16,
        "text_hash": hashlib.blake2b(b"Hello", digest_size=16).hexdigest(),
    }
    assert good[1]["text"] == " Hello " and good[1]["behavior_id"] == good[1]["text_hash"] != good[0]["text_hash"]


def test_both_layouts_give_the_same_behaviors() -> None:
    flat = records(user_id=["a", "a", "b"], text=["x", "y", "z"], timestamp=[1, None, 3])
    lists = [[{"text": "x", "timestamp": 1}, {"text": "y"}], None, [], [{"text": "z", "timestamp": 3}]]
    nested = records(user_id=["a", "c", "d", "b"], behaviors=lists)
    assert validate(nested, PLAIN, 16)[0].equals(validate(flat, PLAIN, 16)[0])


def test_any_list_of_structs_with_the_text_column_is_found() -> None:
    raw = records(author=["a"], tags=[["t"]], papers=[[{"id": 7, "title": "T"}]])
    good, bad = check(raw, Columns.parse("user_id=author, text=title,behavior_id=id", "--columns"))
    assert (good[0]["user_id"], good[0]["behavior_id"], good[0]["text"], bad) == ("a", "7", "T", [])


def test_the_column_of_another_field_is_no_list_of_behaviors(tmp_path: Path) -> None:
    splits = file_of(tmp_path, {"user_id": "a", "timestamp": [{"text": "x"}, {"text": "y"}]})
    (raw,) = read_split(splits[0])
    assert check(raw) == ([], [(0, "there is neither 'text' nor a list of behaviors")])


@pytest.mark.parametrize("user_id", [None, "", " \t"])
def test_a_row_without_a_user_is_a_reject(user_id: str | None) -> None:
    good, bad = check(records(user_id=["a", user_id], text=["x", "y"]))
    assert [row["user_id"] for row in good] == ["a"]
    assert [row for row, _ in bad] == [1] and "user_id" in bad[0][1]


@pytest.mark.parametrize("text", [None, "", "  \n\u3000"])
def test_a_row_without_text_is_a_reject(text: str | None) -> None:
    good, bad = check(records(user_id=["a", "b"], text=["x", text]))
    assert len(good) == 1 and [row for row, _ in bad] == [1] and bad[0][1].startswith("text is")


def test_mixed_types_are_checked_row_by_row(tmp_path: Path) -> None:
    splits = file_of(
        tmp_path,
        {"user_id": 7, "text": "a", "timestamp": "2024-01-01T01:00:00+01:00"},
        {"user_id": "u", "text": 5},
        {"user_id": True, "text": "b"},
        {"user_id": "u", "text": "c", "timestamp": 1704067200},
        {"user_id": "u", "text": "d", "timestamp": [1]},
        {"user_id": "u", "text": "e", "timestamp": 1704067200000},
        {"user_id": "u", "text": {"f": 1}},
    )
    (raw,) = read_split(splits[0])
    good, bad = check(raw)
    assert [(row["user_id"], row["text"]) for row in good] == [("7", "a"), ("u", "c")]
    assert {row["timestamp"] for row in good} == {datetime(2024, 1, 1, tzinfo=UTC)}
    expected = [
        "text is a number",
        "user_id is a boolean",
        "timestamp is a list",
        "timestamp is out of range",
        "text is an object",
    ]
    assert all(s in reason for s, (_, reason) in zip(expected, bad, strict=True))


def test_a_bad_list_item_does_not_affect_the_others(tmp_path: Path) -> None:
    splits = file_of(
        tmp_path,
        {"user_id": "u", "behaviors": [{"text": "a"}, {"text": 5}, 7, {"text": "b"}]},
        {"user_id": "v", "behaviors": {"text": "x"}},
        {"user_id": "w", "behaviors": []},
        {"user_id": "x", "behaviors": [{"text": "c"}]},
    )
    check_columns(splits, PLAIN)
    (raw,) = read_split(splits[0])
    good, bad = check(raw)
    assert [(row["user_id"], row["text"]) for row in good] == [("u", "a"), ("u", "b"), ("x", "c")]
    assert sorted(reason for _, reason in bad) == [
        "an item of behaviors is a number, not an object",
        "behaviors is an object, not a list",
        "text is a number, not a string",
    ]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["2024-02-29", None]),
        pa.array(["2024-02-29T01:30:00+01:30", " "]),
        pa.array([date(2024, 2, 29), None]),
        pa.array([date(2024, 2, 29), None], pa.date64()),
        pa.array([1709164800, None]),
        pa.array([1709164800.0, None]),
        pa.array([1709164800, None], pa.timestamp("s")),
        pa.array([1709164800 * 10**9 + 999, None], pa.timestamp("ns", "Asia/Tokyo")),
        pa.array(["2024-02-29T00:00Z", None]).dictionary_encode(),
        pa.array(["2024-02-29 00:00:00", None], pa.string_view()),
    ],
    ids=lambda column: str(column.type),
)
def test_timestamps_of_all_supported_types(column: pa.Array) -> None:
    good, bad = check(records(user_id=["a", "b"], text=["x", "y"], timestamp=column))
    assert bad == []
    assert [row["timestamp"] for row in good] == [datetime(2024, 2, 29, tzinfo=UTC), None]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["2024-01-01", "2023-02-29"]),
        pa.array(["2024-01-01", "yesterday"]),
        pa.array(["2024-01-01", "0001-01-01T00:00:00+14:00"]),
        pa.array([0, 10**12]),
        pa.array([0.0, float("nan")]),
        pa.array([0.0, float("inf")]),
        pa.array([0, 2**64 - 1], pa.uint64()),
        pa.array([0, 2**62], pa.timestamp("s")),
        pa.array([0, -(2**62)], pa.timestamp("us")),
    ],
    ids=str,
)
def test_an_unreadable_timestamp_rejects_its_row_only(column: pa.Array) -> None:
    good, bad = check(records(user_id=["a", "b"], text=["x", "y"], timestamp=column))
    assert [row["user_id"] for row in good] == ["a"]
    assert [row for row, _ in bad] == [1] and bad[0][1].startswith("timestamp is")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.json_()], ids=str)
def test_numbers_are_counted_in_the_given_unit(unit: TimeUnit, kind: pa.DataType) -> None:
    time = datetime(2014, 7, 5, 12, 30, tzinfo=UTC)
    number = int(time.timestamp()) * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    cells = pa.array([str(number)], pa.json_()) if kind == pa.json_() else pa.array([number]).cast(kind, safe=False)
    good, bad = check(records(user_id=["a"], text=["x"], timestamp=cells), Columns(timestamp_unit=unit))
    assert (good[0]["timestamp"], bad) == (time, [])
    if unit != "s":
        _, bad = check(records(user_id=["a"], text=["x"], timestamp=cells))
        assert "out of range" in bad[0][1] and "--timestamp-unit" in bad[0][1]


def test_milliseconds_keep_their_fraction() -> None:
    cells = pa.array([1404563400123.456])
    (row,), _ = check(records(user_id=["a"], text=["x"], timestamp=cells), Columns(timestamp_unit="ms"))
    assert row["timestamp"] == datetime(2014, 7, 5, 12, 30, 0, 123456, tzinfo=UTC)


INT96 = [datetime(2024, 1, 1), datetime(9999, 12, 31, 23, 59, 59, 999999), datetime(1000, 1, 1), datetime(1, 1, 1)]  # noqa: DTZ001


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("unit", ["us", "ns"])
def test_int96_timestamps_as_spark_writes_them_do_not_wrap(tmp_path: Path, nested: bool, unit: str) -> None:
    """As nanoseconds, the last day would be in 1816, before every `as_of`."""
    times = INT96 if unit == "us" else INT96[:1]
    column = pa.array(times, pa.timestamp(unit))
    n = len(column)
    table = pa.table({"user_id": ["ann"] * n, "text": ["x"] * n, "timestamp": column})
    if nested:
        items = pa.StructArray.from_arrays([table["text"].combine_chunks(), column], ["text", "timestamp"])
        table = pa.table({"user_id": ["ann"] * n, "behaviors": pa.ListArray.from_arrays(range(n + 1), items)})
    pq.write_table(table, tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
    (raw,) = read_split(plan_splits(str(tmp_path), flag="--histories")[0])
    good, bad = check(raw)
    assert [row["timestamp"].replace(tzinfo=None) for row in good] == times and bad == []


def test_invalid_utf8_rejects_its_row_only() -> None:
    good, bad = check(records(user_id=pa.array([b"a", b"\xff", b"b"]), text=pa.array([b"x", b"y", b"\xc3("])))
    assert [row["user_id"] for row in good] == ["a"]
    assert bad == [(1, "user_id is not valid UTF-8"), (2, "text is not valid UTF-8")]


def test_rejects_from_reading_are_kept() -> None:
    raw = records(user_id=["a"], text=["x"])
    raw = replace(raw, rejects=rejects("embed", ["file"], [-1], ["cut"]))
    assert check(raw)[1] == [(-1, "cut")]


def test_no_rows_give_no_behaviors() -> None:
    assert check(records(user_id=pa.array([], pa.string()), text=pa.array([], pa.string()))) == ([], [])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_buckets_are_crc32_of_utf8(user_ids: list[str]) -> None:
    found = bucket_of(user_ids, 7)
    assert found.dtype == np.int32
    assert found.tolist() == [zlib.crc32(user.encode()) % 7 for user in user_ids]


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "timestamp", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.lists(
        st.fixed_dictionaries({}, optional=dict.fromkeys(["user_id", "text", "timestamp", "behaviors"], _JSON)),
        max_size=6,
    )
)
def test_each_row_of_any_json_is_good_or_a_reject(objects: list[dict[str, Any]]) -> None:
    names = sorted({name for o in objects for name in o} - {"behaviors"} | {"text"})
    raw = records(**{name: json_array([o.get(name) for o in objects]) for name in names})
    good, bad = check(raw)
    assert len(good) + len(bad) == len(objects)
    nested = records(**{name: json_array([o.get(name) for o in objects]) for name in ["user_id", "behaviors"]})
    check(nested)


def test_the_column_mapping_is_parsed() -> None:
    assert Columns.parse("text = body,user_id=author", "--columns") == Columns(text="body", user_id="author")
    assert Columns.parse("", "--columns") == PLAIN


@pytest.mark.parametrize("spec", ["body", "text=", "txt=body", "text=a,text=b"])
def test_an_invalid_column_mapping_names_flag_and_fields(spec: str) -> None:
    with pytest.raises(UsageError, match=r"--columns: .*behavior_id"):
        Columns.parse(spec, "--columns")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"user_id": "a", "body": "x"},
            r"no column 'text'.*user_id \(string\), body \(string\).*--columns text=COLUMN",
        ),
        ({"author": "a", "text": "x"}, r"no column 'user_id'.*author \(string\).*--columns user_id=COLUMN"),
        ({"user_id": "a", "papers": [{"title": "x"}]}, r"no column 'text' \(nor a list.*papers"),
        ({"user_id": 1.5, "text": "x"}, r"'user_id'.*is double; it must be a string or an integer"),
        ({"user_id": "a", "text": 5}, r"'text'.*is int64; it must be a string"),
        ({"user_id": "a", "text": "x", "timestamp": [1]}, r"'timestamp'.*it must be a timestamp, an ISO 8601"),
        ({"user_id": "a", "behaviors": [{"text": 5}]}, r"'text'.*is int64"),
    ],
)
def test_unusable_columns_are_refused(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        check_columns(file_of(tmp_path, row), PLAIN)


def test_the_first_readable_file_decides(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"cut")
    pq.write_table(pa.table({"user_id": ["a"], "text": ["x"]}), tmp_path / "b.parquet")
    check_columns(plan_splits(str(tmp_path), flag="--histories"), PLAIN)


def test_hashes_of_equal_texts_are_equal() -> None:
    assert len(set(text_hash(["a", "a", "á"]).to_pylist())) == 2
