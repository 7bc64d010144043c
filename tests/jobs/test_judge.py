"""`judge` on a real Ray with a scripted judge: blind, exactly once, paid once, counted, and honest about its gap."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from jobs import forget, judge
from persona.inputs.histories import bucket_of
from persona.judging.rubrics import RUBRICS, TASKS
from persona.storage import delta_options, join, read_bytes
from persona.store.store import Store
from tests.chat_server import ChatServer, Fault
from tests.jobs.conftest import Job, Row, write
from tests.stores import IDENTITY, write_rows

KEY = "sk-for-the-judge-only"
PEOPLE = ("sailor", "baker", "nurse", "farmer", "singer", "judge-hater")
N_ANSWERS = len(PEOPLE) * len(TASKS)


def asked() -> list[Row]:
    """A question of each task to each person; the next person is the wrong one."""
    return [
        {
            "request_id": f"{person}/{task}",
            "user_id": person,
            "input": f"What about {task}?",
            "task": task,
            "persona": f"An old {person} from the hills",
            "other_persona": f"An old {PEOPLE[(i + 1) % len(PEOPLE)]} from the hills",
            "other_user_id": PEOPLE[(i + 1) % len(PEOPLE)],
        }
        for i, person in enumerate(PEOPLE)
        for task in TASKS
    ]


def answer(store: Store, variant: str, text: Any, change: str = "new", rows: Sequence[Row] | None = None) -> None:
    rows = asked() if rows is None else rows
    n, users = len(rows), [row["user_id"] for row in rows]
    columns: dict[str, Any] = {
        "request_id": [row["request_id"] for row in rows],
        "user_id": users,
        "output": [text(row) for row in rows],
        "bucket": pa.array(bucket_of(users, 4), pa.int32()),
        "n_behaviors": pa.array([1] * n, pa.int32()),
        "n_tokens": pa.array([2] * n, pa.int32()),
    }
    fixed = {"variant": variant, "plug": "p", "llm": "l", "finish_reason": "stop", "fingerprint": "f", "change": change}
    write_rows(store, "generations", pa.table({**columns, **{name: [value] * n for name, value in fixed.items()}}))


def read(body: Row) -> tuple[str, str]:
    """The person and the answer that a judge was shown."""
    text = body["messages"][-1]["content"]
    person, given = (re.search(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.DOTALL)[1] for tag in ("person", "answer"))
    return person.split()[2], given


def fair(body: Row) -> str:
    """Scores an answer by whether it sounds like the person that is shown."""
    person, given = read(body)
    return json.dumps({"reason": f"as a {person} would", "score": 5 if f"as a {person}" in given else 2})


@pytest.fixture
def made(root: str) -> dict[str, Any]:
    """Flags for a store with two variants of answers: one in character, one that fits anybody."""
    return flags_for(root)


@pytest.fixture
def local(tmp_path: Path) -> dict[str, Any]:
    """The same, on disk only."""
    return flags_for(str(tmp_path))


def flags_for(root: str) -> dict[str, Any]:
    store = Store.create(join(root, "store"), IDENTITY, 4)
    answer(store, "own", lambda row: f"as a {row['user_id']} I say {row['task']}")
    answer(store, "bare", lambda row: f"well, {row['request_id']}")
    return {
        "requests": write(join(root, "asked.jsonl"), asked()),
        "store": store.uri,
        "out": join(root, "out"),
        "chat_model": "strong",
        "chat_price_in": 1000.0,
        "chat_price_out": 2000.0,
    }


def point_to(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def table(uri: str, name: str) -> list[Row]:
    place = join(uri, name)
    return DeltaTable(place, storage_options=delta_options(place)).to_pyarrow_table().to_pylist()


def of(result: Row, variant: str) -> Row:
    return next(row for row in result["scores"] if row["variant"] == variant)


def test_answers_are_judged_once_blind_and_at_the_cost_that_the_server_counted(
    do: Job, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChatServer(fair, faults=[Fault(status=500), Fault(status=429), Fault(cut=True)]) as server:
        point_to(server, monkeypatch)
        plan = do(judge, **made, dry_run=True)
        assert not server.requests
        done = do(judge, **made, chat_concurrency=4, block_rows=16)
        assert done.code == 0, done.said
        found = done.result
        assert server.n_calls == found["calls"] == found["judged"] == 2 * 2 * N_ANSWERS
        assert max(server.calls.values()) == 1
        assert server.most_at_once <= 4
        assert (found["prompt_tokens"], found["answer_tokens"]) == (server.prompt_tokens, server.answer_tokens)
        cost = (1000 * server.prompt_tokens + 2000 * server.answer_tokens) / 1e6
        assert found["chat_cost"] == pytest.approx(cost, abs=1e-6)
        for name in ("calls", "prompt_tokens", "answer_tokens", "chat_cost"):
            assert plan.result[name] >= found[name]

        own, bare = of(found, "own"), of(found, "bare")
        assert own["persona_score"]["mean"] == 5
        assert own["swap_gap"]["mean"] == 3
        assert own["tasks"]["toxicity"]["swap_gap"]["mean"] == 3
        assert bare["persona_score"] is None
        assert "is not above 0" in bare["no_score_because"]
        assert bare["tasks"]["toxicity"]["score"]["mean"] == 2
        assert "no PersonaScore: the swap gap +0.000" in done.table

        for body in server.requests:  # nothing tells the judge whose answer it is, or under which name it is stored
            assert not re.search(
                r"\b(own|bare|swapped|variant)\b", body["messages"][-1]["content"].split("<person>")[1]
            )
        again = do(judge, **made)
        assert (again.result["judged"], again.result["calls"], again.result["already_judged"]) == (0, 0, 4 * N_ANSWERS)
        assert again.result["scores"] == found["scores"]
        assert server.n_calls == 4 * N_ANSWERS

    rows = table(made["store"], "judgements")
    keys = {(row["variant"], row["request_id"], row["judge"], row["persona"]) for row in rows}
    assert len(keys) == len(rows) == 4 * N_ANSWERS
    assert all(row["bucket"] == bucket_of([row["user_id"]], 4)[0] for row in rows)
    # A reason under a wrong persona would quote two users.
    assert all((row["reason"] is None) == (row["persona"] == "swapped") for row in rows)
    replies = table(made["store"], "completions")
    assert len({row["key"] for row in replies}) == len(replies) == 4 * N_ANSWERS
    page = read_bytes(join(made["out"], "judged.html")).decode()
    assert "PersonaScore" in page
    assert "swap gap" in page
    for text in (page, done.said, done.table, json.dumps(found), repr(rows), repr(replies)):
        assert KEY not in text


def test_replies_that_cannot_be_read_are_counted_and_neither_dropped_nor_zero(
    do: Job, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def moody(body: Row) -> str:
        person, _ = read(body)
        text = body["messages"][-1]["content"]
        if person == "baker":
            return "I would rather not say"
        return '{"reason": "?", "score": 9}' if RUBRICS["action"].aim in text else fair(body)

    with ChatServer(moody) as server:
        point_to(server, monkeypatch)
        found = do(judge, **local, variant="own").result
        again = do(judge, **local, variant="own").result
        assert server.n_calls == 2 * N_ANSWERS  # also what cannot be read was paid for
    own = of(found, "own")
    # The baker's own answers, the sailor's under the baker, and both kinds of everybody's answers to one task.
    unreadable = 2 * (len(TASKS) - 1) + 2 * len(PEOPLE)
    assert own["unparsed"] == found["unusable_replies"] == unreadable
    assert own["judgements"] == 2 * N_ANSWERS
    assert own["tasks"]["action"]["score"] is None
    assert own["tasks"]["language"]["score"]["mean"] == 5
    assert own["persona_score"] is None
    assert own["no_score_because"] == "no usable judgement of action"
    assert of(again, "own")["unparsed"] == unreadable
    problems = [row["problem"] for row in table(local["store"], "judgements") if row["score"] is None]
    assert len(problems) == unreadable
    assert all(problems)


def test_a_changed_answer_is_judged_again_and_a_second_judge_is_added(
    do: Job, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChatServer(fair) as server:
        point_to(server, monkeypatch)
        do(judge, **local)
        answer(Store.open(local["store"]), "own", lambda row: "silence", "edited", asked()[:1])
        found = do(judge, **local).result
        assert (found["judged"], found["stale"], found["calls"]) == (2, 2, 2)
        other = do(judge, **{**local, "chat_model": "weak"}, no_swap=True).result
    assert len(table(local["store"], "judgements")) == 4 * N_ANSWERS + 2 * N_ANSWERS
    assert other["judges"] == ["http/strong", "http/weak"]
    weak = next(row for row in other["scores"] if (row["judge"], row["variant"]) == ("http/weak", "own"))
    assert weak["no_score_because"] == "no answer was judged under another persona"
    assert other["agreement"] == [
        {
            "judges": ["http/strong", "http/weak"],
            "answers": 2 * N_ANSWERS,
            "same_score": 1.0,
            "mean_difference": 0.0,
            "rank_correlation": 1.0,
        }
    ]


def test_a_killed_run_repeats_no_call(do: Job, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in local.items()]
    command = [sys.executable, "-m", "jobs.judge", *flags, "--chat-concurrency", "4"]
    with ChatServer(fair) as server:
        environment = {
            **os.environ,
            "OPENAI_BASE_URL": server.url,
            "OPENAI_API_KEY": KEY,
            "PYTHONPATH": str(Path.cwd()),
        }
        environment.pop("RAY_ADDRESS", None)

        def stop_after(n: int) -> Any:
            def rule(body: Row) -> str:
                if server.n_calls >= n:
                    server.hold.clear()
                return fair(body)

            return rule

        server.rule = stop_after(40)
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as first:
            until = time.monotonic() + 120
            while time.monotonic() < until and first.poll() is None:
                if not server.hold.is_set() and _n_replies(local["store"]) == server.n_calls:
                    break
                time.sleep(0.2)
            assert first.poll() is None
            n_before = server.n_calls
            # The whole machine dies: an actor that outlived the driver would go on asking.
            processes = psutil.Process(first.pid).children(recursive=True)
            os.killpg(first.pid, signal.SIGKILL)
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=30)
        server.rule = fair
        server.faults = []
        server.hold.set()
        point_to(server, monkeypatch)
        result = do(judge, **local).result
        assert result["reused_replies"] == n_before
        assert result["calls"] == 4 * N_ANSWERS - n_before
        # The few that waited for a reply at the kill came twice, and were answered to nobody the first time.
        assert len(server.requests) <= 4 * N_ANSWERS + 4
    assert len(table(local["store"], "judgements")) == 4 * N_ANSWERS


def _n_replies(store: str) -> int:
    try:
        return len(table(store, "completions"))
    except Exception:  # noqa: BLE001 - not there yet
        return -1


@pytest.mark.parametrize(("status", "code", "said"), [(401, 2, "check OPENAI_API_KEY"), (503, 1, "does not reply")])
def test_an_endpoint_that_denies_or_fails_ends_the_job_and_what_was_paid_is_kept(
    do: Job, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch, status: int, code: int, said: str
) -> None:
    with ChatServer(fair) as server:
        point_to(server, monkeypatch)

        def failing(body: Row) -> str:
            if server.n_calls >= 20:
                server.faults = [Fault(status=status, text=f"no, {KEY}")] * 10_000
            return fair(body)

        server.rule = failing
        done = do(judge, **local, chat_concurrency=2, chat_retry_s=0.1)
        assert (done.code, said in done.said) == (code, True)
        assert KEY not in done.said
        n_paid = server.n_calls
        assert len(table(local["store"], "completions")) == n_paid
        server.rule, server.faults = fair, []
        assert do(judge, **local).result["calls"] == 4 * N_ANSWERS - n_paid


def test_forget_removes_a_user_from_judgements_and_replies(
    do: Job, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChatServer(fair) as server:
        point_to(server, monkeypatch)
        do(judge, **local)
    found = do(forget, store=local["store"], user="nurse").result
    assert found["rows_before"]["judgements"] == 4 * len(TASKS)
    assert found["rows_before"]["completions"] == 4 * len(TASKS)
    assert set(found["rows_after"].values()) == {0}
    assert not [file for file in Path(local["store"]).rglob("*.parquet") if b"nurse" in _plain(file)]


def _plain(file: Path) -> bytes:
    import pyarrow.parquet as pq

    return repr(pq.read_table(file, partitioning=None).to_pylist()).encode()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chat_model": None}, "--chat-model"),
        ({"variant": "nobody"}, "has no such answers; it has bare, own"),
        ({"chat": "local", "chat_model": "/none"}, "--chat-model: there is no folder"),
        ({"chat_price_out": None}, "--chat-price-in and --chat-price-out go together"),
    ],
)
def test_what_cannot_work_is_refused(
    refuse: Job, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: Row, said: str
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    done = refuse(judge, **{**local, **changes})
    assert (done.code, done.result) == (2, None)
    assert said in done.said


def test_without_an_endpoint_it_says_what_to_do(
    refuse: Job, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    done = refuse(judge, **local)
    assert done.code == 2
    assert "set OPENAI_BASE_URL, like http://host:8000/v1" in done.said
    plain = write(local["requests"], [{"request_id": "a", "user_id": "b", "input": "c"}])
    done = refuse(judge, **{**local, "requests": plain})
    assert "no column 'task'" in done.said
