"""The chat model `http` against a scripted endpoint: what is sent, retried, refused, limited and kept secret."""

import json
import time

import pytest

from persona.chat.base import ChatPrompt, Message, check_chat, open_chat
from persona.chat.options import ChatOptions
from persona.errors import ChatError, UsageError
from tests.chat_server import ChatServer, Fault

KEY = "sk-not-for-anyone-else"
SCHEMA = json.dumps({"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]})


def prompt(text: str, **settings) -> ChatPrompt:
    return ChatPrompt((Message("system", "be brief"), Message("user", text)), **settings)


def echo(body: dict) -> str:
    return f"you said {body['messages'][-1]['content']}"


@pytest.fixture
def opened(monkeypatch):
    """Opens a model at a server, with quick pauses between retries."""
    monkeypatch.setattr("persona.chat.http._PAUSES_S", (0.01, 0.02))

    def opened(server: ChatServer, **options):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return open_chat(ChatOptions(chat_model="strong", **options))

    return opened


def test_replies_come_in_the_order_of_the_prompts_with_what_was_asked_and_counted(opened):
    with ChatServer(echo) as server:
        taken = []
        prompts = [prompt(f"number {i}", temperature=0.5, seed=i, max_tokens=20) for i in range(20)]
        replies = opened(server).complete(prompts, lambda number, reply: taken.append((number, reply.text)))
        assert [reply.text for reply in replies] == [f"you said number {i}" for i in range(20)]
        assert sorted(taken) == [(i, f"you said number {i}") for i in range(20)]
        assert (replies[0].model, replies[0].finish_reason, replies[0].problem) == ("strong-served", "stop", "")
        assert sum(reply.n_prompt_tokens for reply in replies) == server.prompt_tokens == 20 * 4
        assert sum(reply.n_answer_tokens for reply in replies) == server.answer_tokens == 20 * 4
        assert server.keys == {f"Bearer {KEY}"}
        sent = next(body for body in server.requests if body["seed"] == 7)
        assert sent["messages"] == [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "number 7"},
        ]
        assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("strong", 0.5, 20)
        assert "response_format" not in sent


def test_no_more_calls_are_open_than_allowed(opened):
    with ChatServer(echo, pause_s=0.02) as server:
        opened(server, chat_concurrency=3).complete([prompt(str(i)) for i in range(12)])
        assert server.most_at_once == 3


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_passing_failure_is_asked_again(opened, status):
    with ChatServer(echo, faults=[Fault(status=status)] * 3) as server:
        [reply] = opened(server).complete([prompt("hello")])
        assert reply.text == "you said hello"
        assert len(server.requests) == 4
        assert server.n_calls == 1


def test_a_retry_waits_as_long_as_the_server_asks(opened):
    with ChatServer(echo, faults=[Fault(status=429, headers={"Retry-After": "0.4"})]) as server:
        began = time.monotonic()
        opened(server).complete([prompt("hello")])
        assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize(
    "fault", [Fault(pause_s=1.0), Fault(cut=True), Fault(text="<html>"), Fault(text='{"choices": []}')]
)
def test_a_slow_or_broken_reply_is_given_up_and_asked_for_again(opened, fault):
    with ChatServer(echo, faults=[fault]) as server:
        [reply] = opened(server, chat_timeout_s=0.3).complete([prompt("hello")])
        assert reply.text == "you said hello"
        assert len(server.requests) == 2


def test_a_lasting_failure_ends_with_what_the_server_said_and_without_the_key(opened):
    fault = Fault(status=503, text=f"overloaded, said {KEY}")
    with ChatServer(echo, faults=[fault] * 1000) as server, pytest.raises(ChatError, match="overloaded") as found:
        opened(server, chat_retry_s=0.2).complete([prompt("hello")])
    assert KEY not in str(found.value)
    assert KEY not in repr(found.value.__cause__)


def test_replies_that_have_come_are_taken_although_another_prompt_fails(opened):
    with ChatServer(echo, faults=[Fault(status=401, pause_s=0.2)]) as server:
        taken = []
        with pytest.raises(UsageError, match="OPENAI_API_KEY"):
            opened(server, chat_concurrency=2).complete(
                [prompt(str(i)) for i in range(2)], lambda _, reply: taken.append(reply.text)
            )
        assert len(taken) == 1


@pytest.mark.parametrize(("status", "hint"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "--chat-model")])
def test_a_refusal_of_all_prompts_ends_at_once(opened, status, hint):
    with ChatServer(echo, faults=[Fault(status=status)]) as server:
        with pytest.raises(UsageError, match=hint):
            opened(server).complete([prompt("hello")])
        assert len(server.requests) == 1


def test_a_reasoning_model_is_asked_in_its_own_form_from_then_on(opened):
    def unsupported(name: str) -> Fault:
        return Fault(status=400, text=json.dumps({"error": {"message": "unsupported", "param": name}}))

    with ChatServer(echo, faults=[unsupported("max_tokens"), unsupported("temperature")]) as server:
        model = opened(server, chat_concurrency=1)
        for text in ("one", "two"):
            [reply] = model.complete([prompt(text, max_tokens=20)])
            assert (reply.text, reply.problem) == (f"you said {text}", "")
        assert len(server.requests) == 4
        for body in server.requests[2:]:
            assert body["max_completion_tokens"] == 20
            assert body.keys().isdisjoint({"max_tokens", "temperature"})


def test_a_parameter_that_is_still_refused_in_the_other_form_ends_as_a_refusal(opened):
    refused = Fault(status=400, text=json.dumps({"error": {"message": "unsupported", "param": "max_tokens"}}))
    with ChatServer(echo, faults=[refused] * 2) as server:
        [reply] = opened(server).complete([prompt("hello")])
        assert reply.finish_reason == "refused"
        assert len(server.requests) == 2


def test_a_refusal_of_one_prompt_is_its_problem(opened):
    with ChatServer(echo, faults=[Fault(status=400, text="too long")]) as server:
        first, second = opened(server, chat_concurrency=1).complete([prompt("a"), prompt("b")])
        assert (first.finish_reason, first.n_answer_tokens) == ("refused", 0)
        assert "too long" in first.problem
        assert second.text == "you said b"


@pytest.mark.parametrize(
    ("text", "value", "problem"),
    [
        ('{"score": 3}', {"score": 3}, ""),
        ('Here it is:\n```json\n{"score": 3}\n```', {"score": 3}, ""),
        ('{"score": "three"}', None, "not as the schema says: $.score"),
        ('{"points": 3}', None, "'score' is a required property"),
        ('{"score": 3', None, "not JSON"),
        ("three", None, "not JSON"),
        ("1 2 3 4 5 6 7 8 9", None, "cut after 8 tokens"),
    ],
)
def test_a_reply_is_checked_against_its_schema_whatever_the_server_does(opened, text, value, problem):
    with ChatServer(lambda _: text) as server:
        [reply] = opened(server).complete([prompt("score it", schema=SCHEMA, max_tokens=8)])
        assert reply.value == value
        assert problem in reply.problem
        assert bool(problem) == bool(reply.problem)
        sent = server.requests[0]["response_format"]
        assert (sent["type"], sent["json_schema"]["schema"]) == ("json_schema", json.loads(SCHEMA))


@pytest.mark.parametrize(
    "url", ["", "host:8000/v1", "ftp://host/v1", "http://me:secret@host/v1", "http://host/v1?key=secret"]
)
def test_an_address_that_cannot_work_is_refused_before_anything_is_sent(monkeypatch, url):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(UsageError, match="OPENAI_BASE_URL") as found:
        check_chat(ChatOptions(chat_model="strong"))
    assert "secret" not in str(found.value)


def test_an_address_where_nothing_answers_is_refused_before_work_begins(monkeypatch):
    monkeypatch.setattr("persona.chat.http._KNOCK_S", 0.0)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(UsageError, match="nothing answers at the address in OPENAI_BASE_URL"):
        check_chat(ChatOptions(chat_model="strong"))
    with ChatServer(echo) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        check_chat(ChatOptions(chat_model="strong"))
        assert not server.requests


def test_a_model_must_be_named(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(UsageError, match="--chat-model"):
        check_chat(ChatOptions())


def test_the_key_is_in_no_representation(opened):
    with ChatServer(echo) as server:
        chat = opened(server)
        assert KEY not in repr(chat)
        assert KEY not in chat.identity


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chat_price_in": 1.0}, "--chat-price-in"),
        ({"chat_price_in": -1.0, "chat_price_out": 1.0}, "--chat-price-in"),
        ({"chat_concurrency": 0}, "--chat-concurrency"),
        ({"chat_timeout_s": 0.0}, "--chat-timeout-s"),
        ({"chat": "local", "chat_concurrency": 3}, "--chat http"),
        ({"chat_gpus": 2}, "--chat vllm"),
    ],
)
def test_options_that_cannot_work_name_their_flag(given, message):
    with pytest.raises(UsageError, match=message):
        ChatOptions(**given)


def test_the_cost_is_that_of_both_kinds_of_tokens():
    assert ChatOptions(chat_price_in=2.0, chat_price_out=10.0).cost(1_000_000, 500_000) == pytest.approx(7.0)
    assert ChatOptions().cost(1, 1) is None
