"""Tests of `profile` on a real Ray: which profiles are made, by an LLM's likelihoods or by a scripted chat server."""

import json
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from jobs import evaluate, forget, generate, profile
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import resolve
from persona.profiling.likelihood import LikelihoodJudge, choose
from persona.profiling.options import ProfileOptions
from persona.profiling.pairs import Pair, Sizes, split
from persona.profiling.profile import texts_in_front
from persona.profiling.search import max_calls
from persona.storage import delta_options, join
from tests.chat_server import ChatServer, Fault
from tests.jobs.conftest import START, Job, Row, fill_store, stored, write

READS = {"precision": "fp32", "max_input_tokens": 32, "prompt_format": "plain", "user_profile_tokens": 64}
ANN, BOB, FEW = "user-0", "user-1", "user-2"


def pairs(user: str, n: int = 8, *, liked: str = "tea") -> list[Row]:
    """A choice a day; the preferred answer has the word that the user likes."""
    other = {"tea": "coffee", "coffee": "tea"}[liked]
    return [
        {
            "request_id": f"{user}/{number}",
            "user_id": user,
            "input": f"title of drink {number} for {user}",
            "target": f"paper {number} of {liked}",
            "rejected": f"paper {number} of {other}",
            "as_of": START + timedelta(days=number),
        }
        for number in range(n)
    ]


def profiles(store: Path | str) -> dict[str, Row]:
    """The rows of the table by user, each there once; read without this project."""
    uri = join(str(store), "profiles")
    rows = DeltaTable(uri, storage_options=delta_options(uri)).to_pyarrow_table().to_pylist()
    found = {row["user_id"]: row for row in rows}
    assert len(found) == len(rows), "a user is there twice"
    return found


def by_hand(llm: str, rows: list[Row], options: ProfileOptions) -> Row:
    """The profile of a user's pairs, without a job."""
    frozen = FrozenLLM.load(resolve(llm, flag="--llm"), precision="fp32", max_input_tokens=32)
    names = ("request_id", "input", "target", "rejected", "as_of")
    found = split([Pair(**{name: row[name] for name in names}) for row in rows], options)
    assert found is not None
    return choose(rows[0]["user_id"], found, LikelihoodJudge(frozen, front_tokens=64), options).row()


def test_profiles_by_likelihood_are_made_once_and_anew_when_pairs_change(
    do: Job, models: dict[str, str], s3: str
) -> None:
    store = fill_store(f"{s3}/store", models["encoder"], [])
    bad = [{**pairs(ANN)[0], "request_id": "bad", "rejected": ""}]
    untimed = [{**pairs(ANN)[0], "request_id": "untimed", "as_of": None}]
    equal = [{**pairs(ANN)[0], "request_id": "equal", "rejected": pairs(ANN)[0]["target"]}]
    again = [pairs(ANN)[3]]
    rows = [*pairs(ANN), *untimed, *equal, *again, *pairs(BOB, liked="coffee"), *pairs(FEW, 4), *bad]
    flags = {"requests": write(f"{s3}/pairs.jsonl", rows), "store": store, "llm": models["llama"], **READS}
    flags |= {"candidates": 3, "holdout": 0.25, "max_reject_fraction": 0.2, "actors": 1}
    done = do(profile, **flags)
    assert done.code == 0
    counted = ("users", "profiles", "unchanged", "too_few_pairs", "untimed_pairs", "equal_answers", "repeated_ids")
    assert [done.result[name] for name in counted] == [3, 2, 0, 1, 1, 1, 1]
    assert done.result["rejects"] == 1
    found, options = profiles(store), ProfileOptions(candidates=3, holdout=0.25)
    for user, of_user in ((ANN, pairs(ANN)), (BOB, pairs(BOB, liked="coffee"))):
        expected = by_hand(models["llama"], of_user, options)
        assert {name: found[user][name] for name in expected} == expected
        assert found[user]["recipe"] == "likelihood"
    held_out = [found[user]["held_out_score"] for user in (ANN, BOB)]
    assert done.result["held_out_score"] == sum(held_out) / 2

    assert [do(profile, **flags).result[name] for name in ("profiles", "unchanged")] == [0, 2]
    assert profiles(store) == found
    more = [*rows, {**pairs(BOB, 9, liked="tea")[8]}]
    edited = do(profile, **{**flags, "requests": write(f"{s3}/pairs.jsonl", more)})
    assert [edited.result[name] for name in ("profiles", "unchanged")] == [1, 1]
    now = profiles(store)
    assert now[ANN] == found[ANN]
    assert (now[BOB]["n_pairs"], found[BOB]["n_pairs"]) == (7, 6)


def test_a_profile_is_put_in_front_of_later_requests_only_and_can_be_forgotten(
    do: Job, models: dict[str, str], plug: str, store: Path, tmp_path: Path
) -> None:
    source = write(str(tmp_path / "pairs.parquet"), [*pairs(ANN), *pairs(BOB, liked="coffee")])
    reads = {"llm": models["llama"], **READS, "actors": 1, "recipe": "mine", "candidates": 2}
    assert do(profile, requests=source, store=store, **reads).result["profiles"] == 2
    last = START + timedelta(days=7)
    asked = [
        {**pairs(user)[0], "request_id": f"{user} {later}", "as_of": last + timedelta(seconds=later)}
        for user in (ANN, BOB, FEW)
        for later in (-1, 0, 1)
    ]
    flags = {"requests": write(str(tmp_path / "asked.jsonl"), asked), "store": store, "plug": plug, "actors": 1}
    flags |= {"user_profile": "mine", "user_profile_tokens": 64, "precision": "fp32"}
    done = do(generate, **flags, persona="bare", beams=1, max_new_tokens=4)
    seen = {"profiles_used": 2, "profiles_newer": 4, "profiles_without": 3}
    assert (done.code, {name: done.result[name] for name in seen}) == (0, seen)
    assert done.result["variants"] == ["bare-profile-mine"]
    assert "in front of 2 requests; 4 are not after it, 3 have none" in done.table
    done = do(evaluate, **flags, out=tmp_path / "out", persona="bare", rejected="rejected")
    assert (done.code, {name: done.result[name] for name in seen}) == (0, seen)
    frozen = FrozenLLM.load(resolve(models["llama"], flag="--llm"), precision="fp32", max_input_tokens=32)
    judge, found, right = LikelihoodJudge(frozen, front_tokens=64), profiles(store), []
    for row in asked:
        front = texts_in_front(found[row["user_id"]]) if row["user_id"] != FEW and row["as_of"] > last else []
        pair = Pair(**{name: row[name] for name in ("request_id", "input", "target", "rejected", "as_of")})
        right.append(float(judge.margins(front, [pair])[0] > 0))
    assert done.result["ranking"]["bare"]["likelier"]["mean"] == pytest.approx(sum(right) / len(right), abs=1e-4)

    done = do(forget, store=store, user=BOB)
    assert (done.code, done.result["rows_before"]["profiles"], done.result["rows_after"]["profiles"]) == (0, 1, 0)
    assert set(profiles(store)) == {ANN}
    texts = [path.read_bytes() for path in (store / "profiles").rglob("*.parquet")]
    assert not [data for data in texts if f"{BOB}/1".encode() in data]


def reasoner(body: dict[str, Any]) -> str:
    """Chooses what the description says, else what the earlier choices have in common, else tea."""
    text = body["messages"][-1]["content"]
    about, asks, question = text.rpartition("Which of these")
    blocks = re.findall(
        r"<first>.* of (\w+)</first>\n<second>.* of (\w+)</second>.*?<chosen>(\w+)</chosen>", about, re.S
    )
    words = [first if chosen == "first" else second for first, second, chosen in blocks]
    person = re.search(r"Always wants (\w+)", about)
    wanted = person[1] if person else max(("tea", "coffee"), key=words.count)
    if not asks:
        blocks = re.findall(r"<chosen>(\w+)</chosen>\n<reasoning>wants (\w+)", text)
        return json.dumps({"description": f"Always wants {blocks[0][1]}."})
    first = re.search(r"<first>.* of (\w+)</first>", question)
    assert first is not None
    choice = "first" if first[1] == wanted else "second"
    return json.dumps({"reasoning": f"wants {wanted}", "preference": choice})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    with ChatServer(reasoner) as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        yield running


def test_a_strong_llm_finds_hidden_rules_and_no_call_is_paid_twice(
    do: Job, server: ChatServer, store: Path, tmp_path: Path
) -> None:
    rows = [*pairs(ANN, 12), *pairs(BOB, 12, liked="coffee"), *pairs(FEW, 2)]
    flags = {"requests": write(str(tmp_path / "pairs.parquet"), rows), "store": store, "by": "chat"}
    flags |= {"chat_model": "big", "candidates": 2, "holdout": 0.25, "chat_concurrency": 4}
    flags |= {"chat_price_in": 2.0, "chat_price_out": 10.0}
    # The endpoint refuses the key in the middle of the run.
    server.faults = [*[Fault()] * 30, *[Fault(status=401)] * 100]
    broken = do(profile, **flags)
    assert broken.code == 2
    assert 30 <= server.n_calls <= 34
    assert not profiles(store)
    server.faults.clear()

    paid = server.n_calls, server.prompt_tokens, server.answer_tokens
    done = do(profile, **flags)
    assert (done.code, done.result["profiles"], done.result["too_few_pairs"]) == (0, 2, 1)
    assert set(server.calls.values()) == {1}, "a reply was paid for twice"
    now = server.n_calls, server.prompt_tokens, server.answer_tokens
    spent = [after - before for after, before in zip(now, paid, strict=True)]
    assert [done.result[name] for name in ("calls", "prompt_tokens", "answer_tokens")] == spent
    assert done.result["reused_replies"] >= paid[0]
    assert done.result["chat_cost"] == pytest.approx((2 * spent[1] + 10 * spent[2]) / 1e6, abs=1e-6)
    found = profiles(store)
    assert {user: row["text"] for user, row in found.items()} == {
        ANN: "Always wants tea.",
        BOB: "Always wants coffee.",
    }
    assert [found[BOB][name] for name in ("n_held_out", "held_out_score", "held_out_none")] == [3, 1.0, 0.0]
    assert {one["reasoning"] for one in found[BOB]["demonstrations"]} <= {"", "wants coffee"}

    again = do(profile, **flags)
    assert [again.result[name] for name in ("profiles", "unchanged", "calls")] == [0, 2, 0]


def test_a_dry_run_bounds_the_calls_and_their_price(
    refuse: Job, server: ChatServer, store: Path, tmp_path: Path
) -> None:
    rows = [*pairs(ANN, 10), *pairs(BOB, 10), *pairs(FEW, 2)]
    flags = {"requests": write(str(tmp_path / "pairs.parquet"), rows), "store": store, "by": "chat", "dry_run": True}
    done = refuse(profile, **flags, chat_model="big", chat_price_in=1.0, chat_price_out=0.0)
    assert (done.code, done.result["users"], done.result["calls"]) == (
        0,
        2,
        2 * max_calls(Sizes(7, 3, 0), ProfileOptions()),
    )
    assert done.result["chat_cost"] == pytest.approx(done.result["prompt_tokens"] / 1e6)
    limited = refuse(profile, **flags, chat_model="big", limit=10)
    assert (limited.result["users"], limited.result["share"]) == (1, 1)
    assert limited.result["calls"] == done.result["calls"] / 2
    assert server.n_calls == 0
    assert not (store / "profiles" / "recipe=chat").exists()


def test_a_dry_run_bounds_the_work_of_a_frozen_llm(
    refuse: Job, models: dict[str, str], store: Path, tmp_path: Path
) -> None:
    source = write(str(tmp_path / "pairs.parquet"), [*pairs(ANN, 10), *pairs(FEW, 2)])
    flags = {"requests": source, "store": store, "llm": models["llama"], **READS, "holdout": 0.2, "tflops": 1.0}
    done = refuse(profile, **flags, dry_run=True)
    assert (done.code, done.result["users"]) == (0, 1)
    assert done.result["answers_to_measure"] == 2 * (12 * 3 + 2 * 2)
    assert done.result["cost"]["gpu_hours"] >= 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, "--by likelihood needs --llm"),
        ({"by": "chat"}, "--chat-model"),
        ({"by": "chat", "chat_model": "big", "llm": "x"}, "--llm x has no effect without --by likelihood"),
        ({"llm": "x", "chat_model": "big"}, "--chat-model big has no effect without --by chat"),
        ({"llm": "{llama}", "rejected": "worse"}, "--rejected"),
        ({"llm": "{llama}", "user_profile_tokens": 0}, "--user-profile-tokens 0"),
        ({"llm": "{llama}", "user_profile_tokens": 4096}, "4096"),
        ({"llm": "{llama}", "prompt_format": "chat"}, "--prompt-format"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(
    refuse: Job, models: dict[str, str], store: Path, tmp_path: Path, flags: Row, named: str
) -> None:
    flags = {name: models["llama"] if value == "{llama}" else value for name, value in flags.items()}
    done = refuse(profile, requests=write(str(tmp_path / "p.jsonl"), pairs(ANN)), store=store, **flags)
    assert (done.code, named in done.said) == (2, True), done.said


def test_pairs_without_a_time_and_recipes_without_profiles_are_refused(
    refuse: Job, models: dict[str, str], plug: str, store: Path, tmp_path: Path
) -> None:
    untimed = [{name: value for name, value in row.items() if name != "as_of"} for row in pairs(ANN)]
    source = write(str(tmp_path / "p.jsonl"), untimed)
    done = refuse(profile, requests=source, store=store, llm=models["llama"])
    assert (done.code, "no column 'as_of'" in done.said) == (2, True)
    done = refuse(generate, requests=source, store=store, plug=plug, user_profile="chat")
    assert (done.code, "--user-profile chat: no profiles of this recipe" in done.said) == (2, True)
    assert not stored(store, "generations")
