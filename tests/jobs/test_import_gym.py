"""`import_gym` on small files of every form, on disk and on an object store."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import import_gym
from persona.judging.rubrics import TASKS
from persona.storage import join, open_filesystem, write_bytes
from persona.store.store import Store
from tests.chat_server import ChatServer
from tests.jobs.conftest import Job, Row
from tests.stores import IDENTITY

NURSE = {"persona": "A nurse from Glasgow", "persona_id": "nurse", "texts": ["Night shift again.", "Feet like lead."]}
CAPTAIN = {"persona": "A captain from Bergen"}
CHEF = {
    "persona": "A chef from Lima",
    "questions": [
        {"task": "Expected Action", "question": "What do you cook?", "environment": "A camp fire"},
        {"task": "toxicity", "question": "Whom do you despise?"},
    ],
}


def rows(out: str, name: str) -> list[Row]:
    filesystem, path = open_filesystem(join(out, name))
    return pq.read_table(path, filesystem=filesystem).to_pylist()


def write(uri: str, content: Any) -> str:
    if uri.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        names = list(dict.fromkeys(name for row in content for name in row))
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in content]), sink)
        write_bytes(uri, sink.getvalue().to_pybytes())
    elif uri.endswith(".jsonl"):
        write_bytes(uri, b"\n".join(json.dumps(row).encode() for row in content))
    else:
        write_bytes(uri, json.dumps(content).encode())
    return uri


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_personas_become_requests_told_requests_and_histories(refuse: Job, root: str, suffix: str) -> None:
    source = write(join(root, f"personas.{suffix}"), [NURSE, CAPTAIN, CHEF])
    out = join(root, "out")
    done = refuse(import_gym, personas=source, out=out, questions=3)
    assert done.code == 0, done.said
    assert (done.result["personas"], done.result["requests"], done.result["rejects"]) == (3, 2 * 15 + 2, 0)
    requests, told = rows(out, "requests.parquet"), rows(out, "told.parquet")
    assert [row["request_id"] for row in requests] == [row["request_id"] for row in told]
    assert len({row["request_id"] for row in requests}) == len(requests)
    assert {row["task"] for row in requests if row["user_id"] == "nurse"} == set(TASKS)
    for plain, with_persona in zip(requests, told, strict=True):
        assert plain["persona"] not in plain["input"]
        assert plain["persona"] in with_persona["input"]
        assert with_persona["input"].endswith(plain["input"])
        assert with_persona["query"] == plain["input"]
        assert plain["other_persona"] not in (None, plain["persona"])
    # Nobody is the wrong persona of two others.
    others = {(row["user_id"], row["other_user_id"]) for row in requests}
    assert len(others) == len({other for _, other in others}) == 3
    cooked = next(row for row in requests if "cook" in row["input"])
    assert (cooked["input"], cooked["task"]) == ("A camp fire. What do you cook?", "action")
    histories = rows(out, "histories.parquet")
    assert [row["text"] for row in histories if row["user_id"] == "nurse"] == NURSE["texts"]
    assert [row["text"] for row in histories if "captain" in row["text"]] == [CAPTAIN["persona"]]
    assert rows(out, "rejects.parquet") == []


def test_the_question_files_of_the_benchmark_are_read_as_they_are(refuse: Job, root: str) -> None:
    content = {
        "Expected Action": ["a?", "b?"],
        "Linguistic Habits": ["c?"],
        "Persona Consistency": ["d?"],
        "Toxicity": ["e?"],
        "Action Justification": ["f?"],
    }
    for name in ("A baker from Rome", "A spy, retired"):
        write(join(root, f"questions/{name}.json"), content)
    done = refuse(import_gym, personas=join(root, "questions"), out=join(root, "out"))
    assert done.code == 0, done.said
    assert done.result["requests_by_task"] == {
        "action": 4,
        "consistency": 2,
        "justification": 2,
        "language": 2,
        "toxicity": 2,
    }
    assert {row["persona"] for row in rows(join(root, "out"), "requests.parquet")} == {
        "A baker from Rome",
        "A spy, retired",
    }


def test_a_bad_row_is_a_reject_with_its_reason_and_the_others_are_kept(refuse: Job, tmp_path) -> None:
    source = tmp_path / "personas.jsonl"
    bad = [
        '{"persona": " "}',
        "{",
        '"text"',
        '{"persona": "A", "questions": [{"task": "singing", "question": "?"}]}',
        '{"persona": "B", "texts": "one"}',
        json.dumps(NURSE),
    ]
    source.write_text("\n".join([json.dumps(NURSE), *bad, json.dumps(CAPTAIN)]))
    done = refuse(import_gym, personas=source, out=tmp_path / "out")
    assert (done.code, done.result["personas"], done.result["rejects"]) == (3, 2, 6)
    reasons = [row["reason"] for row in rows(str(tmp_path / "out"), "rejects.parquet")]
    for part in (
        "persona must be a text",
        "is not JSON",
        "not an object",
        "singing",
        "texts must be a list",
        "repeated",
    ):
        assert any(part in reason for reason in reasons), part


@pytest.mark.parametrize("name", ["personas.jsonl", "personas.json"])
def test_a_byte_order_mark_and_line_separators_in_a_text_lose_no_persona(
    refuse: Job, tmp_path: Path, name: str
) -> None:
    of_two_lines = {**NURSE, "persona": "A nurse\u2028from\x85Glasgow"}
    given = [json.dumps(one, ensure_ascii=False) for one in (of_two_lines, CAPTAIN)]
    text = "\r\n".join(given) if name.endswith("l") else f"[{','.join(given)}]"
    (tmp_path / name).write_text(f"\ufeff{text}", encoding="utf-8", newline="")
    done = refuse(import_gym, personas=tmp_path / name, out=tmp_path / "out")
    assert (done.code, done.result["personas"], done.result["rejects"]) == (0, 2, 0), done.table
    personas = {row["persona"] for row in rows(str(tmp_path / "out"), "requests.parquet")}
    assert personas == {of_two_lines["persona"], CAPTAIN["persona"]}


def test_a_single_persona_has_no_other(refuse: Job, tmp_path) -> None:
    source = write(str(tmp_path / "personas.json"), [NURSE])
    assert refuse(import_gym, personas=source, out=tmp_path / "out").code == 0
    assert {row["other_persona"] for row in rows(str(tmp_path / "out"), "requests.parquet")} == {None}


def test_what_cannot_work_is_refused_and_a_dry_run_writes_nothing(refuse: Job, tmp_path) -> None:
    source = write(str(tmp_path / "personas.json"), [NURSE, CAPTAIN])
    out = tmp_path / "out"
    plan = refuse(import_gym, personas=source, out=out, dry_run=True)
    assert (plan.code, plan.result["requests"]) == (0, 20)
    assert refuse(import_gym, personas=source, out=out, questions=4).code == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "personas.csv").write_text("persona")
    assert "has no file that ends in" in refuse(import_gym, personas=tmp_path / "other", out=out).said
    assert refuse(import_gym, personas=tmp_path / "none", out=out).code == 2
    empty = write(str(tmp_path / "empty.json"), [])
    assert "has no usable persona" in refuse(import_gym, personas=empty, out=out).said
    assert not out.exists()


def test_without_a_file_there_are_ten_personas_of_our_own(refuse: Job, tmp_path) -> None:
    done = refuse(import_gym, out=tmp_path / "out")
    assert (done.code, done.result["personas"], done.result["requests"], done.result["rejects"]) == (0, 10, 100, 0)
    assert all(row["text"] for row in rows(str(tmp_path / "out"), "histories.parquet"))


def test_a_chat_model_writes_questions_once_and_only_where_there_are_none(do: Job, tmp_path, monkeypatch) -> None:
    store = Store.create(str(tmp_path / "store"), IDENTITY, 4)
    source = write(str(tmp_path / "personas.json"), [NURSE, CAPTAIN, CHEF])

    def rule(body: Row) -> str:
        if "insult" in body["messages"][-1]["content"]:
            return "I would rather not"
        return json.dumps({"questions": ["What now?", "And then?"]})

    flags = {"personas": source, "out": tmp_path / "out", "write_questions": True, "chat_model": "strong"}
    with ChatServer(rule) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        plan = do(import_gym, **flags, store=store.uri, dry_run=True)
        assert (plan.result["calls"], server.n_calls) == (10, 0)
        first = do(import_gym, **flags, store=store.uri).result
        again = do(import_gym, **flags, store=store.uri).result
        assert (first["calls"], first["unusable_replies"], server.n_calls) == (10, 2, 10)
        assert (again["calls"], again["reused_replies"]) == (0, 10)
    assert first["requests_by_task"] == {
        "action": 5,
        "consistency": 4,
        "justification": 4,
        "language": 4,
        "toxicity": 1,
    }
    asked = [row["input"] for row in rows(str(tmp_path / "out"), "requests.parquet") if row["user_id"] == "nurse"]
    assert asked == ["What now?", "And then?"] * 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"write_questions": True}, "--write-questions needs --store"),
        ({"store": "run/store"}, "has no effect without --write-questions"),
        ({"chat_model": "strong"}, "has no effect without --write-questions"),
    ],
)
def test_questions_are_written_by_a_model_into_a_store_or_not_at_all(
    refuse: Job, tmp_path, flags: Row, said: str
) -> None:
    done = refuse(import_gym, out=tmp_path / "out", **flags)
    assert (done.code, said in done.said) == (2, True)
