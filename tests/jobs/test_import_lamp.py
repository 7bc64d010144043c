"""`import_lamp` on small generated files, on disk and on an object store."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.import_lamp import Config, main
from jobs.runtime import importing
from jobs.runtime.cli import run
from jobs.runtime.job_options import InputRows
from persona.errors import InputError, UsageError
from persona.inputs.lamp import TASKS
from persona.storage import join, list_files, open_filesystem, write_bytes

NAMES = ["histories.parquet", "rejects.parquet", "requests.parquet"]


def question(number: int, n_items: int = 3, **fields: Any) -> dict[str, Any]:
    profile = [
        {
            "id": f"{number}-{item}",
            "title": f"Title {item}",
            "abstract": f"Abstract {item} of {number}",
            "date": 2010 + item,
        }
        for item in range(n_items)
    ]
    return {
        "id": str(number),
        "input": f"an abstract of a paper: Abstract {number}",
        "profile": profile,
    } | fields


def files(root: str, questions: Any, golds: dict[str, str] | None = None, *, gz: bool = False) -> Config:
    """Writes the questions, and the outputs if there are golds; returns the config of their import into `root`/out."""
    suffix, pack = (".json.gz", gzip.compress) if gz else (".json", bytes)
    config = Config(task="LaMP_5", questions=join(root, f"questions{suffix}"), out=join(root, "out"))
    write_bytes(config.questions, pack(questions if isinstance(questions, bytes) else json.dumps(questions).encode()))
    if golds is None:
        return config
    outputs = {"task": "LaMP_5", "golds": [{"id": key, "output": gold} for key, gold in golds.items()]}
    config = replace(config, outputs=join(root, f"outputs{suffix}"))
    write_bytes(str(config.outputs), pack(json.dumps(outputs).encode()))
    return config


def table(config: Config, name: str) -> pa.Table:
    filesystem, path = open_filesystem(join(config.out, name))
    return pq.read_table(path, filesystem=filesystem)


def rows(config: Config, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table(config, name).to_pylist()
    return found


def test_the_flag_knows_every_task() -> None:
    assert list(get_args(get_type_hints(Config)["task"])) == list(TASKS)


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
def test_questions_and_outputs_become_histories_and_requests(root: str, gz: bool) -> None:
    config = files(root, [question(1), question(2, n_items=0)], {"2": "Two", "1": "One"}, gz=gz)
    summary = main(config)
    assert summary.exit_code == 0
    counts = {
        "questions": 2,
        "requests": 2,
        "requests_with_as_of": 0,
        "behaviors": 3,
        "rejects": 0,
        "reject_fraction": 0.0,
    }
    assert counts.items() <= dict(summary.result).items()
    assert [(one["user_id"], one["behavior_id"], one["text"]) for one in rows(config, "histories.parquet")] == [
        ("1", f"0000{item}:1-{item}", f"Title {item} Abstract {item} of 1") for item in range(3)
    ]
    assert [(one["request_id"], one["query"], one["target"]) for one in rows(config, "requests.parquet")] == [
        ("1", "Abstract 1", "One"),
        ("2", "Abstract 2", "Two"),
    ]
    assert rows(config, "rejects.parquet") == []
    assert [Path(file.uri).name for file in list_files(config.out)] == NAMES


def test_without_outputs_there_are_no_targets(tmp_path: Path) -> None:
    config = files(str(tmp_path), [question(1)])
    main(config)
    assert [one["target"] for one in rows(config, "requests.parquet")] == [None]


def test_the_files_are_what_embed_and_train_read(tmp_path: Path) -> None:
    from persona.inputs import histories, requests
    from persona.inputs.reader import read_split
    from persona.inputs.splits import plan_splits

    config = files(str(tmp_path), [question(1, user_id="ann", date=2012), question(2)], {"1": "One", "2": "Two"})
    main(config)
    splits = plan_splits(join(config.out, "histories.parquet"), flag="--histories")
    histories.check_columns(splits, histories.Columns())
    good, bad = histories.validate(next(read_split(splits[0])), histories.Columns(), 4)
    assert (good.num_rows, bad.num_rows) == (6, 0)
    splits = plan_splits(join(config.out, "requests.parquet"), flag="--requests")
    requests.check_columns(splits, requests.Columns(), needs_target=True)
    good, bad = requests.validate(next(read_split(splits[0])), 4, needs_target=True)
    assert (good.num_rows, bad.num_rows) == (2, 0)


def test_a_bad_question_is_rejected_and_no_other_is_lost(tmp_path: Path) -> None:
    item = {"id": "x", "title": "No abstract"}
    bad = [["not a question"], question(1, profile="none"), question(9), {"input": "no id"}, question(2)]
    questions = [question(1), *bad, question(2), question(3, profile=[item, *question(3)["profile"]])]
    config = files(str(tmp_path), questions, {"1": "One", "2": "Two", "3": "Three", "lost with its id": "?"})
    summary = main(replace(config, rows=InputRows(max_reject_fraction=1.0)))
    assert summary.exit_code == 0
    assert [one["request_id"] for one in rows(config, "requests.parquet")] == ["1", "2", "3"]
    assert len(rows(config, "histories.parquet")) == 9
    rejects = rows(config, "rejects.parquet")
    assert [one["row"] for one in rejects] == [1, 2, 3, 4, 6, 7]
    assert {(one["job"], one["source"]) for one in rejects} == {("import_lamp", config.questions)}
    for one, part in zip(
        rejects,
        [
            "must be an object",
            "duplicate id",
            "no gold",
            "'id'",
            "duplicate id",
            "profile item 0",
        ],
        strict=True,
    ):
        assert part in one["reason"]


@pytest.mark.parametrize(("allowed", "exit_code"), [(0.25, 0), (0.24, 3)])
def test_too_many_rejected_questions_give_exit_code_3_and_the_others_are_written(
    tmp_path: Path, allowed: float, exit_code: int
) -> None:
    config = files(str(tmp_path), [*map(question, range(3)), question(3, input="of another task")])
    summary = main(replace(config, rows=InputRows(max_reject_fraction=allowed)))
    assert (summary.exit_code, summary.result["reject_fraction"]) == (exit_code, 0.25)
    assert len(rows(config, "requests.parquet")) == 3


def test_half_a_character_and_an_unreadable_date_cost_no_row(tmp_path: Path) -> None:
    odd = question(1, date="some day", input="an abstract of a paper: half of \udc00 and \ud83d")
    odd["profile"][1] |= {"date": "the day before", "title": "also \ud83d", "id": "\udc01"}
    config = files(str(tmp_path), [odd, question(2)], {"1": "a gold \udfff", "2": "Two"})
    summary = main(config)
    assert (summary.exit_code, summary.result["rejects"], summary.result["unreadable_dates"]) == (0, 0, 2)
    assert dict(summary.table)["unreadable dates"] == "2, which count as absent"
    assert next(one["query"] for one in rows(config, "requests.parquet")) == "half of \ufffd and \ufffd"
    assert next(one["target"] for one in rows(config, "requests.parquet")) == "a gold \ufffd"
    behavior = rows(config, "histories.parquet")[1]
    assert (behavior["behavior_id"], behavior["timestamp"]) == ("00001:\ufffd", None)
    assert behavior["text"].startswith("also \ufffd ")


def test_too_many_rejected_profile_items_give_exit_code_3(tmp_path: Path) -> None:
    broken = question(1, n_items=4)
    del broken["profile"][0]["title"]
    summary = main(files(str(tmp_path), [broken]))
    assert (summary.exit_code, summary.result["reject_fraction"]) == (3, 0.25)


def test_limit_takes_the_first_questions_and_ignores_the_golds_of_the_others(tmp_path: Path) -> None:
    config = files(str(tmp_path), [question(n) for n in range(5)], {str(n): "Gold" for n in range(5)})
    summary = main(replace(config, rows=InputRows(limit=2)))
    assert summary.result["questions"] == 2
    assert [one["request_id"] for one in rows(config, "requests.parquet")] == ["0", "1"]


def test_a_dry_run_reads_everything_and_writes_nothing(root: str) -> None:
    config = replace(files(root, [question(1), question(2, profile=0)]), dry_run=True)
    summary = main(config)
    assert (summary.result["behaviors"], summary.result["rejects"], summary.exit_code) == (3, 1, 3)
    assert list_files(config.out) == []


def test_a_second_import_replaces_the_first(root: str) -> None:
    main(files(root, [question(1), question(2, profile=0)]))
    config = files(root, [question(3)])
    main(config)
    assert [one["request_id"] for one in rows(config, "requests.parquet")] == ["3"]
    assert rows(config, "rejects.parquet") == []


@pytest.mark.parametrize(
    ("questions", "golds", "message"),
    [
        (b'{"task": "LaMP_5", "golds": []}', None, "not a LaMP questions file"),
        (b"[]", None, "is empty"),
        (
            json.dumps([question(1), question(2)]).encode()[:-9],
            None,
            "cannot be read after 1 questions; is it complete",
        ),
        (
            [question(1, input="Generate a headline for the following article: x")],
            None,
            "can be used as LaMP_5",
        ),
        ([question(1)], {"1": "One", "7": "Seven"}, "1 golds without a question, the first for '7'"),
    ],
    ids=["outputs as questions", "empty", "truncated", "another task", "outputs of other questions"],
)
def test_an_unusable_file_leaves_the_previous_import_in_place(
    root: str, questions: Any, golds: dict[str, str] | None, message: str
) -> None:
    previous = files(root, [question(5)])
    main(previous)
    with pytest.raises(InputError, match=message):
        main(files(root, questions, golds))
    assert [one["request_id"] for one in rows(previous, "requests.parquet")] == ["5"]
    filesystem, path = open_filesystem(previous.out)
    assert sorted(info.base_name for info in filesystem.get_file_info(pa.fs.FileSelector(path))) == NAMES


def test_a_truncated_gz_is_an_error(tmp_path: Path) -> None:
    config = files(str(tmp_path), [question(n, n_items=50) for n in range(50)], gz=True)
    whole = Path(config.questions).read_bytes()
    Path(config.questions).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is it complete"):
        main(config)


def test_outputs_of_another_task_are_refused(tmp_path: Path) -> None:
    config = replace(files(str(tmp_path), [question(1)], {"1": "One"}), task="LaMP_4")
    with pytest.raises(InputError, match="has the task 'LaMP_5', not 'LaMP_4'"):
        main(config)


@pytest.mark.parametrize("flag", ["questions", "outputs"])
def test_a_missing_file_names_its_flag(tmp_path: Path, flag: str) -> None:
    missing: dict[str, Any] = {flag: str(tmp_path / "missing.json")}
    config = replace(files(str(tmp_path), [question(1)]), **missing)
    with pytest.raises(UsageError, match=f"--{flag}"):
        main(config)


def test_row_groups_are_written_as_they_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "ROW_GROUP_ROWS", 10)
    config = files(str(tmp_path), [question(n) for n in range(20)])
    main(config)
    written = pq.ParquetFile(join(config.out, "histories.parquet")).metadata
    assert written.num_rows == 60
    assert max(written.row_group(group).num_rows for group in range(written.num_row_groups)) == 12


def run_with(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = run(Config, main, flags)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_last_line_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = files(str(tmp_path), [question(1)], {"1": "One"})
    flags = [
        "--task",
        "LaMP_5",
        "--questions",
        config.questions,
        "--outputs",
        str(config.outputs),
        "--out",
        config.out,
    ]
    code, out, _ = run_with(capsys, *flags)
    assert code == 0
    assert json.loads(out.splitlines()[-1])["behaviors"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "LaMP_6"], "LaMP_1, LaMP_2"),
        (
            ["--task", "LaMP_5", "--max-reject-fraction", "1.5"],
            "--max-reject-fraction 1.5: must be from 0 to 1",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    code, _, err = run_with(capsys, *flags, "--questions", "q.json", "--out", "out")
    assert code == 2
    assert message in err


def test_labels_are_added_to_the_texts_with_the_flag(tmp_path: Path) -> None:
    item = {"id": "1", "text": "Broke at once.", "score": "2", "date": "2020-01-01"}
    one = {"id": "q", "input": "What is the score of the following review? review: Works.", "profile": [item]}
    config = replace(files(str(tmp_path), [one]), task="LaMP_3")
    main(config)
    assert [row["text"] for row in rows(config, "histories.parquet")] == ["Broke at once."]
    main(replace(config, labels=True))
    assert [row["text"] for row in rows(config, "histories.parquet")] == ["Broke at once. 2"]
