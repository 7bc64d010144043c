"""Requests from raw records: defaults, rejects and refused inputs."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona.errors import InputError
from persona.inputs.reader import read_split
from persona.inputs.requests import REJECTED, SCHEMA, Columns, check_columns, validate
from persona.inputs.splits import plan_splits

GOOD = {"request_id": "r", "user_id": "u", "input": "Write."}


def good_and_bad(folder: Path, *objects: Any, needs_target: bool = False) -> tuple[pa.Table, pa.Table]:
    (folder / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, objects)))
    (raw,) = read_split(plan_splits(str(folder), flag="--requests")[0])
    return validate(raw, 16, needs_target, job="generate")


def test_a_query_defaults_to_the_input(tmp_path: Path) -> None:
    good, bad = good_and_bad(tmp_path, GOOD, GOOD | {"query": "q"}, GOOD | {"query": " "})
    assert good.schema == SCHEMA and bad.num_rows == 0
    assert good["query"].to_pylist() == ["Write.", "q", "Write."]
    assert good["target"].null_count == good["as_of"].null_count == 3


def test_an_unreadable_as_of_is_a_reject(tmp_path: Path) -> None:
    good, bad = good_and_bad(tmp_path, GOOD | {"as_of": "2024-01-01"}, GOOD | {"as_of": "soon"})
    assert good["as_of"].to_pylist() == [datetime(2024, 1, 1, tzinfo=UTC)]
    assert bad["reason"].to_pylist() == ["as_of is not an ISO 8601 date or time, nor in another form that can be read"]
    assert bad["job"].to_pylist() == ["generate"]


@pytest.mark.parametrize("name", ["request_id", "user_id", "input"])
def test_a_row_without_a_required_field_is_a_reject(tmp_path: Path, name: str) -> None:
    good, bad = good_and_bad(tmp_path, GOOD, GOOD | {name: ""}, GOOD | {name: None})
    assert good.num_rows == 1
    assert bad["reason"].to_pylist() == [f"{name} is empty", f"{name} is missing"]


def test_a_target_is_required_only_if_needed(tmp_path: Path) -> None:
    objects = [GOOD | {"target": "t"}, GOOD]
    assert good_and_bad(tmp_path, *objects)[0].num_rows == 2
    good, bad = good_and_bad(tmp_path, *objects, needs_target=True)
    assert good.num_rows == 1 and bad["reason"].to_pylist() == ["target is missing"]


def test_a_blank_target_is_one_where_it_is_scored_and_a_null_is_not(tmp_path: Path) -> None:
    good_and_bad(tmp_path, GOOD | {"target": ""}, GOOD | {"target": " \n"}, GOOD | {"target": None}, GOOD)
    (raw,) = read_split(plan_splits(str(tmp_path), flag="--requests")[0])
    good, bad = validate(raw, 16, needs_target=True, blank_targets=True)
    assert good["target"].to_pylist() == ["", " \n"]
    assert bad["reason"].to_pylist() == ["target is missing"] * 2
    assert validate(raw, 16, needs_target=True)[0].num_rows == 0


def test_a_rejected_text_is_read_only_if_named_and_then_required(tmp_path: Path) -> None:
    objects = [GOOD | {"worse": "w"}, GOOD | {"worse": " "}, GOOD]
    assert good_and_bad(tmp_path, *objects)[0].schema == SCHEMA
    (raw,) = read_split(plan_splits(str(tmp_path), flag="--requests")[0])
    good, bad = validate(raw, 16, False, rejected="worse")
    assert good.schema == SCHEMA.append(REJECTED) and good["rejected"].to_pylist() == ["w"]
    assert bad["reason"].to_pylist() == ["worse is empty", "worse is missing"]
    check_columns(plan_splits(str(tmp_path), flag="--requests"), Columns(), needs_target=False, rejected="worse")
    with pytest.raises(InputError, match="no column 'wrong'; --rejected names it"):
        check_columns(plan_splits(str(tmp_path), flag="--requests"), Columns(), needs_target=False, rejected="wrong")


@pytest.mark.parametrize(
    ("row", "needs_target", "expected"),
    [
        ({"request_id": "r", "user_id": "u", "prompt": "x"}, False, r"no column 'input'.*prompt \(string\)"),
        (GOOD, True, r"no column 'target'; training and scoring need it"),
        (GOOD | {"as_of": True}, False, r"'as_of'.*is bool; it must be a timestamp"),
        (GOOD | {"input": ["x"]}, False, r"'input'.*must be a string"),
    ],
)
def test_unusable_requests_are_refused(tmp_path: Path, row: dict[str, Any], needs_target: bool, expected: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(orjson.dumps(row))
    with pytest.raises(InputError, match=expected):
        check_columns(plan_splits(str(tmp_path), flag="--requests"), Columns(), needs_target=needs_target)


def test_an_open_end_in_int96_is_not_a_time_before_all_behaviors(tmp_path: Path) -> None:
    end = datetime(9999, 12, 31)  # noqa: DTZ001
    pq.write_table(
        pa.table({**{name: [value] for name, value in GOOD.items()}, "as_of": pa.array([end], pa.timestamp("us"))}),
        tmp_path / "in.parquet",
        use_deprecated_int96_timestamps=True,
    )
    (raw,) = read_split(plan_splits(str(tmp_path), flag="--requests")[0])
    assert validate(raw, 16, False)[0]["as_of"].to_pylist() == [end.replace(tzinfo=UTC)]


def test_usable_requests_pass(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(orjson.dumps(GOOD | {"target": "t"}))
    check_columns(plan_splits(str(tmp_path), flag="--requests"), Columns(), needs_target=True)


def test_system_texts_are_optional(tmp_path: Path) -> None:
    good, bad = good_and_bad(tmp_path, GOOD, GOOD | {"system": "Be brief."}, GOOD | {"system": None})
    assert (good["system"].to_pylist(), bad.num_rows) == ([None, "Be brief.", None], 0)
