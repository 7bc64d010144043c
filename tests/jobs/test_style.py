"""`style` on a real Ray: each request once in each style, again after a kill, and what cannot be crossed is refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import style
from persona.inputs import requests as of_requests
from persona.inputs.reader import read_split
from persona.inputs.splits import plan_splits
from persona.inputs.styles import read_styles
from persona.storage import list_files, local_folder
from tests.jobs.conftest import Job, requests, write

STYLES = [{"id": "short", "instruction": "Use at most six words."}, {"id": "ask", "instruction": "Write a question.\n"}]


def read(out: str) -> list[dict[str, Any]]:
    splits = plan_splits(out, flag="--requests")
    of_requests.check_columns(splits, of_requests.Columns(), needs_target=True)
    tables = [of_requests.validate(one, 4, True)[0] for split in splits for one in read_split(split, job="")]
    return [row for table in tables for row in table.to_pylist()]


def test_each_request_is_asked_once_in_each_style(do: Job, s3: str) -> None:
    asked = [{**row, "query": f"about {row['request_id']}"} for row in requests()]
    asked[3]["input"] = " "  # a bad row
    write(f"{s3}/asked/a.parquet", asked[:10])
    write(f"{s3}/asked/b.jsonl", asked[10:])
    flags = {"requests": f"{s3}/asked", "styles": write(f"{s3}/styles.jsonl", STYLES), "out": f"{s3}/styled"}
    done = do(style, **flags, max_reject_fraction=0.1)
    n = len(asked) - 1
    assert done.code == 0
    counts = {"plain_requests": n, "requests": 2 * n, "rejects": 1, "styles": 2}
    assert {name: done.result[name] for name in counts} == counts
    expected = {
        f"{row['request_id']}/{one['id']}": (
            f"{one['instruction'].strip()}\n{row['input']}",
            row["query"],
            row["target"],
            row["user_id"],
            row["as_of"],
        )
        for row in asked
        for one in STYLES
        if row["input"].strip()
    }
    found = read(f"{s3}/styled")
    assert len(found) == len(expected)
    fields = ("input", "query", "target", "user_id", "as_of")
    assert {row["request_id"]: tuple(row[name] for name in fields) for row in found} == expected

    # A run that was killed leaves some of the files; the same command completes them.
    before = {entry.uri: entry.tag for entry in list_files(f"{s3}/styled")}
    with local_folder(f"{s3}/styled") as folder:
        columns = pq.read_schema(next(folder.glob("*.parquet"))).names
    assert columns == ["request_id", "user_id", "input", "query", "target", "as_of", "style"]
    assert do(style, **flags).code == 3, "one bad row in 24 is more than one in a hundred"
    assert {entry.uri: entry.tag for entry in list_files(f"{s3}/styled")}.keys() == before.keys()
    assert len(read(f"{s3}/styled")) == len(expected)


def test_the_instruction_may_come_after_the_input_and_a_dry_run_writes_nothing(
    do: Job, refuse: Job, tmp_path: Path
) -> None:
    flags = {"requests": write(str(tmp_path / "r.jsonl"), requests(1)), "out": str(tmp_path / "out")}
    flags["styles"] = write(str(tmp_path / "styles.parquet"), STYLES[:1])
    planned = refuse(style, **flags, dry_run=True)
    assert (planned.code, planned.result["styles"]) == (0, 1)
    assert "in the styles short" in planned.table
    assert not (tmp_path / "out").exists()
    assert do(style, **flags, place="after").code == 0
    assert {row["input"] for row in read(flags["out"])} == {
        f"{row['input']}\nUse at most six words." for row in requests(1)
    }


def test_ids_of_different_types_are_read_as_they_are(tmp_path: Path) -> None:
    given = write(str(tmp_path / "s.jsonl"), [STYLES[0], {"id": 2, "instruction": "Write a question."}])
    assert [style.id for style in read_styles(given, flag="--styles")] == ["short", "2"]


@pytest.mark.parametrize(
    ("styles", "says"),
    [
        ([{"id": "a/b", "instruction": "x"}], "has a slash"),
        ([{"id": "a", "instruction": " "}], "instruction is empty"),
        ([{"id": "a", "instruction": "x"}] * 2, "has the id 'a' 2 times"),
        ([{"name": "a"}], "id is missing"),
    ],
)
def test_styles_that_cannot_be_told_apart_are_refused(
    refuse: Job, tmp_path: Path, styles: list[dict[str, Any]], says: str
) -> None:
    asked = write(str(tmp_path / "r.jsonl"), requests(1))
    given = write(str(tmp_path / "styles.jsonl"), styles)
    done = refuse(style, requests=asked, styles=given, out=str(tmp_path / "out"))
    assert done.code == 2
    assert says in done.said
    assert "--styles" in done.said


def test_a_folder_with_other_files_is_refused(refuse: Job, tmp_path: Path) -> None:
    asked, given = write(str(tmp_path / "r.jsonl"), requests(1)), write(str(tmp_path / "s.jsonl"), STYLES)
    (tmp_path / "out").mkdir()
    pq.write_table(pa.table({"at": [1]}), tmp_path / "out" / "other.parquet")
    done = refuse(style, requests=asked, styles=given, out=str(tmp_path / "out"))
    assert (done.code, "this run would not replace" in done.said) == (2, True)
