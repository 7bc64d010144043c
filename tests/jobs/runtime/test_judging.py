"""The steps of `judge` without Ray: what is paired, what is asked, what is stored, and what counts as current."""

import itertools
import json
import re
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from jobs.runtime.chat import ChatRef, Replies
from jobs.runtime.judging import Judge, JudgePlan, comparable, current, pairs, planned, unjudged
from persona.chat.cache import Completion
from persona.chat.options import ChatOptions
from persona.inputs.histories import bucket_of
from persona.inputs.splits import plan_splits
from persona.judging.requests import SCHEMA
from persona.store.store import Store
from tests.chat_server import ChatServer
from tests.jobs.test_judge import answer, asked, fair
from tests.stores import IDENTITY, write_rows

PLAN = JudgePlan(variants=["bare", "own"], judge="http/strong")


class KeptReplies(Replies):
    """Replies that are written to the store by the test."""

    def record(self, identity: str, completion: Completion) -> None:
        self.relay.append((identity, completion))


class Notes:
    """In place of a tally."""

    def note(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def store(tmp_path: Any) -> Store:
    store = Store.create(str(tmp_path / "store"), IDENTITY, 4)
    answer(store, "own", lambda row: f"as a {row['user_id']} I say {row['task']}")
    answer(store, "bare", lambda row: f"well, {row['request_id']}")
    return store


def windows(rows: Any = None) -> list[pa.Table]:
    """The requests, a table a bucket."""
    rows = asked() if rows is None else rows
    buckets = bucket_of([row["user_id"] for row in rows], 4).tolist()
    placed = [{**row, "bucket": bucket} for row, bucket in zip(rows, buckets, strict=True)]
    return [
        pa.Table.from_pylist([row for row in placed if row["bucket"] == bucket], SCHEMA)
        for bucket in sorted(set(buckets))
    ]


def left(store: Store, plan: JudgePlan = PLAN, rows: Any = None) -> pa.Table:
    return pa.concat_tables(
        [one for rows in windows(rows) for one in unjudged(rows, store=store, plan=plan, tally=Notes())]
    )


def shown(store: Store) -> list[dict[str, Any]]:
    return [row for rows in windows() for one in current(rows, store=store, plan=PLAN) for row in one.to_pylist()]


def judge(store: Store, server: ChatServer, monkeypatch: pytest.MonkeyPatch, rows: pa.Table) -> list[Any]:
    """What an actor makes of the pairs, written to the store; returns the new replies."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    kept: list[Any] = []
    ref = ChatRef(options=ChatOptions(chat_model="strong"), variables={"OPENAI_API_KEY": "sk-hidden"})
    assert "sk-hidden" not in repr(ref)
    actor = Judge(ref, KeptReplies(store=store, relay=kept), Notes(), 1)
    judged = actor(rows)
    assert judged["request_id"].to_pylist() == rows["request_id"].to_pylist()
    for change in ("new", "edited"):
        write_rows(store, "judgements", judged.filter(pa.compute.equal(judged["change"], change)))
    return kept


def test_each_answer_is_paired_with_its_persona_and_with_another(store: Store) -> None:
    table = windows()[0]
    found = pairs(table, store, PLAN)
    assert len(found) == 4 * table.num_rows
    assert {pair.kind for pair in found} == {"own", "swapped"}
    assert all((pair.kind == "own") == (pair.request["user_id"] == pair.about) for pair in found)
    assert all(pair.request["user_id"] in pair.shown for pair in found if pair.kind == "own")
    assert len(pairs(table, store, replace(PLAN, swap=False))) == 2 * table.num_rows
    # An id that belongs to another user's answer is no answer to this request.
    stolen = table.set_column(1, "user_id", pa.array(["nobody"] * table.num_rows))
    assert pairs(stolen, store, PLAN) == []


def test_neither_variant_nor_kind_can_be_told_from_prompt_or_order(store: Store) -> None:
    rows = left(store)
    assert rows.num_rows == 4 * len(asked())
    names = [f"{row['variant']}{row['persona']}" for row in rows.to_pylist()]
    changes = sum(one != other for one, other in itertools.pairwise(names))
    assert changes > len(names) / 2  # sorted by either, they would change three times a bucket
    for pair in pairs(windows()[0], store, PLAN):
        text = " ".join(message.content for message in pair.prompt.messages)
        assert not re.search(r"\b(bare|swapped|variant)\b", text)


def test_judged_pairs_are_left_out_until_they_change(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatServer(fair) as server:
        kept = judge(store, server, monkeypatch, left(store))
        assert len(kept) == server.n_calls == 4 * len(asked())
        assert left(store).num_rows == 0
        answer(store, "own", lambda row: "silence", "edited", asked()[:1])
        again = left(store)
        assert again["change"].to_pylist() == ["edited"] * 2
        assert len(shown(store)) == 4 * len(asked()) - 2  # what was said of the old answer no longer counts
        judge(store, server, monkeypatch, again)
    rows = shown(store)
    assert len(rows) == 4 * len(asked())
    assert {row["score"] for row in rows if row["variant"] == "own" and row["persona"] == "own"} == {5, 2}
    # Another judge has judged nothing yet.
    assert left(store, replace(PLAN, judge="http/other")).num_rows == 4 * len(asked())


def test_a_reply_about_a_swapped_persona_is_kept_as_a_score_under_its_owner(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChatServer(fair) as server:
        kept = judge(store, server, monkeypatch, left(store, replace(PLAN, variants=["own"])))
    texts = [json.loads(completion.text) for _, completion in kept]
    assert {identity for identity, _ in kept} == {"http/strong"}
    assert sum(text["reason"] == "" for text in texts) == len(asked())
    assert {text["score"] for text in texts} == {2, 5}
    assert all(
        completion.user_id in text["reason"]
        for (_, completion), text in zip(kept, texts, strict=True)
        if text["reason"]
    )
    stored = store.table("judgements").read(["persona", "reason"]).to_pylist()
    assert all((row["reason"] is None) == (row["persona"] == "swapped") for row in stored)


def test_scores_are_compared_on_the_requests_that_all_variants_have(store: Store) -> None:
    rows = [{"request_id": name, "variant": variant} for name, variant in [("a", "own"), ("a", "bare"), ("b", "own")]]
    kept, n_left_out = comparable(rows, ["own", "bare"])
    assert ([row["request_id"] for row in kept], n_left_out) == (["a", "a"], 1)


def test_a_plan_is_an_upper_bound(store: Store, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "asked.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in asked()))
    splits = plan_splits(str(source), flag="--requests")
    calls, n_bytes = planned(splits, store, PLAN.variants, swap=True, limit=None)
    with ChatServer(fair) as server:
        judge(store, server, monkeypatch, left(store))
        sent = sum(len(m["content"].encode()) for body in server.requests for m in body["messages"])
    assert (calls, n_bytes >= sent) == (server.n_calls, True)
    assert n_bytes < 1.2 * sent
    assert planned(splits, store, PLAN.variants, swap=False, limit=None)[0] == calls / 2
    assert planned(splits, store, PLAN.variants, swap=True, limit=1)[0] < calls
