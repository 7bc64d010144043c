"""`import_longlamp` on small Parquet files in the public layout, on disk and on an object store."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.import_longlamp import Config, main
from jobs.runtime.cli import run
from jobs.runtime.job_options import InputRows
from persona.errors import InputError
from persona.inputs.longlamp import TASKS
from persona.storage import join, list_files, open_filesystem, write_bytes
from tests.jobs.conftest import write

Row = dict[str, Any]
TEXT = pa.string()
# The columns of the dataset's Parquet files.
ITEMS = {
    "abstract_generation": pa.struct([("abstract", TEXT), ("id", TEXT), ("title", TEXT), ("year", pa.int64())]),
    "product_review": pa.struct([("description", TEXT), ("overall", TEXT), ("reviewText", TEXT), ("summary", TEXT)]),
    "topic_writing": pa.struct([("author", TEXT), ("content", TEXT), ("id", TEXT), ("summary", TEXT)]),
}


def paper(number: int, **fields: Any) -> Row:
    item = {"id": f"p{number}", "title": f"Title {number}", "abstract": f"Abstract {number}", "year": 2010 + number}
    return item | fields


def abstract_row(name: str, n_items: int = 3, **fields: Any) -> Row:
    return {
        "name": name,
        "input": f'Generate an abstract for the title "New by {name}" using the following items: 1. parsing',
        "output": f"We are {name}.",
        "profile": [paper(number) for number in range(n_items)],
    } | fields


def save(root: str, task: str, *files: tuple[str, list[Row]]) -> Config:
    """Writes the files of a task's folder; returns the config of the import of its split `val`."""
    schema = pa.schema(
        [
            (TASKS[task].user_column, TEXT),
            ("input", TEXT),
            ("output", TEXT),
            ("profile", pa.list_(ITEMS[task])),
        ]
    )
    folder = join(root, f"{task}_user")
    for name, rows in files:
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema), sink)
        write_bytes(join(folder, name), sink.getvalue())
    return Config(task=task, questions=folder, split="val", out=join(root, "out"))  # type: ignore[arg-type]


def rows(config: Config, name: str) -> list[Row]:
    filesystem, path = open_filesystem(join(config.out, name))
    found: list[Row] = pq.read_table(path, filesystem=filesystem).to_pylist()
    return found


def test_the_flag_knows_every_task() -> None:
    assert list(get_args(get_type_hints(Config)["task"])) == list(TASKS) == list(ITEMS)


def test_a_row_becomes_a_user_who_sees_its_profile_in_order(root: str) -> None:
    one = abstract_row("Ann", profile=[paper(2), paper(0), paper(1)])
    others = [abstract_row("Bo"), abstract_row("Ann")]
    files = [("val-00000-of-00002.parquet", [one]), ("val-00001-of-00002.parquet", others)]
    config = save(root, "abstract_generation", *files, ("train-00000-of-00001.parquet", [abstract_row("Cy")]))
    summary = main(config)
    assert summary.exit_code == 0
    assert {"questions": 3, "requests": 3, "behaviors": 9, "rejects": 0}.items() <= dict(summary.result).items()
    requests = rows(config, "requests.parquet")
    assert [one["request_id"] for one in requests] == ["val:Ann", "val:Bo", "val:Ann#2"]
    assert [one["user_id"] for one in requests] == ["val:Ann", "val:Bo", "val:Ann#2"]
    assert (requests[0]["query"], requests[0]["target"], requests[0]["as_of"]) == (
        '"New by Ann" using the following items: 1. parsing',
        "We are Ann.",
        None,
    )
    first = [one for one in rows(config, "histories.parquet") if one["user_id"] == "val:Ann"]
    assert [(one["behavior_id"], one["text"], one["timestamp"].year) for one in first] == [
        ("00000:p2", "Title 2 Abstract 2", 2012),
        ("00001:p0", "Title 0 Abstract 0", 2010),
        ("00002:p1", "Title 1 Abstract 1", 2011),
    ]
    assert [Path(file.uri).name for file in list_files(config.out)] == [
        "histories.parquet",
        "rejects.parquet",
        "requests.parquet",
    ]


def test_reviews_have_neither_ids_nor_dates_and_may_have_no_description(tmp_path: Path) -> None:
    item = {"description": None, "overall": "5.0", "reviewText": "Works well.", "summary": "Good"}
    asked = 'Generate the review text written by a reviewer who has a given an overall rating of "1.0" for a product'
    one = {"reviewerId": "A1", "input": asked, "output": "Broke.", "profile": [item, {**item, "reviewText": " "}]}
    config = save(str(tmp_path), "product_review", ("val-00000-of-00001.parquet", [one]))
    config = replace(config, rows=InputRows(max_reject_fraction=0.5))
    main(config)
    (behavior,) = rows(config, "histories.parquet")
    assert (behavior["behavior_id"], behavior["text"].split(), behavior["timestamp"]) == (
        "00000:0",
        ["Good", "Works", "well."],
        None,
    )
    assert rows(config, "requests.parquet")[0]["query"].startswith('a given an overall rating of "1.0"')
    assert "profile item 1" in rows(config, "rejects.parquet")[0]["reason"]
    main(replace(config, labels=True))
    assert rows(config, "histories.parquet")[0]["text"].split()[-1] == "5.0"


def test_the_answer_does_not_stay_in_the_history(tmp_path: Path) -> None:
    repost = {"author": "u", "content": "The  same\npost.", "id": "t1", "summary": "again"}
    other = {**repost, "content": "Another post.", "id": "t2"}
    one = {
        "author": "u",
        "input": "Generate the content for a reddit post about posts",
        "output": "The same post.",
        "profile": [repost, other],
    }
    config = save(str(tmp_path), "topic_writing", ("val-00000-of-00001.parquet", [one]))
    summary = main(replace(config, rows=InputRows(max_reject_fraction=0.5)))
    assert (summary.result["behaviors"], summary.result["rejects"]) == (1, 1)
    assert [one["text"] for one in rows(config, "histories.parquet")] == ["again Another post."]
    (reject,) = rows(config, "rejects.parquet")
    assert (reject["job"], reject["row"]) == ("import_longlamp", 0)
    assert reject["reason"] == "row 0 of 'u': profile item 0: is the row's own output"


def test_a_bad_row_and_a_broken_file_are_rejects_and_no_other_is_lost(tmp_path: Path) -> None:
    bad = [abstract_row("Bo", output=" "), abstract_row("Cy", profile=None), abstract_row("", input="x")]
    file = ("val-00000-of-00003.parquet", [*bad, abstract_row("Dee")])
    config = save(str(tmp_path), "abstract_generation", file)
    Path(config.questions, "val-00001-of-00003.parquet").write_bytes(b"PAR1 and nothing else")
    pq.write_table(pa.table({"reviewerId": ["A1"]}), Path(config.questions, "val-00002-of-00003.parquet"))
    summary = main(config)
    assert summary.exit_code == 3
    assert [one["request_id"] for one in rows(config, "requests.parquet")] == ["val:Dee"]
    rejects = rows(config, "rejects.parquet")
    assert len(rejects) == 5
    for one, part in zip(rejects, ["'output'", "'profile'", "'name'", "", "no column 'name'"], strict=True):
        assert part in one["reason"]


def test_jsonl_with_the_same_columns_and_mixed_items_is_read(tmp_path: Path) -> None:
    mixed = abstract_row("Ann", profile=[paper(0), {"id": 7, "title": "T", "abstract": "A", "year": "2001"}, "x"])
    questions = write(str(tmp_path / "val.jsonl"), [mixed])
    config = Config(task="abstract_generation", questions=questions, split="val", out=str(tmp_path / "out"))
    main(replace(config, rows=InputRows(max_reject_fraction=0.5)))
    assert [one["behavior_id"] for one in rows(config, "histories.parquet")] == ["00000:p0", "00001:7"]
    assert len(rows(config, "rejects.parquet")) == 1


def test_a_second_import_replaces_the_first_and_a_useless_one_leaves_it(root: str) -> None:
    config = save(root, "abstract_generation", ("val-00000-of-00001.parquet", [abstract_row("Ann")]))
    for _ in range(2):
        main(config)
        assert [one["request_id"] for one in rows(config, "requests.parquet")] == ["val:Ann"]
    with pytest.raises(InputError, match="can be used as topic_writing: .*no column 'author'"):
        main(replace(config, task="topic_writing"))
    assert len(rows(config, "histories.parquet")) == 3


def test_limit_and_dry_run(tmp_path: Path) -> None:
    file = ("val-00000-of-00001.parquet", [abstract_row(name) for name in "abc"])
    config = save(str(tmp_path), "abstract_generation", file)
    assert main(replace(config, dry_run=True)).result["questions"] == 3
    assert list_files(config.out) == []
    assert main(replace(config, rows=InputRows(limit=2))).result["questions"] == 2


def test_a_missing_file_and_an_unknown_task_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--questions", "no-such.parquet", "--split", "val", "--out", "out"]
    assert run(Config, main, ["--task", "topic_writing", *flags]) == 2
    assert "--questions" in capsys.readouterr().err
    assert run(Config, main, ["--task", "email_completion", *flags]) == 2
    assert "abstract_generation" in capsys.readouterr().err
