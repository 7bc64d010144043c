"""Requests derived from histories: which behaviors become requests, and how the others are counted."""

from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pyarrow as pa
import pytest

from persona.inputs import histories
from persona.inputs.derived_requests import REQUESTS, RequestRule, Task, are_held_out, requests_of

START = datetime(2024, 1, 1, tzinfo=UTC)
RULE = RequestRule(ask="Go on.", opening_words=0, min_history=1, max_a_user=10)


def behaviors(*rows: tuple[str, str, str, int | None]) -> pa.Table:
    records = [
        {
            "user_id": user,
            "behavior_id": name,
            "text": text,
            "timestamp": None if day is None else START + timedelta(days=day),
            "bucket": 0,
            "text_hash": text,
        }
        for user, name, text, day in rows
    ]
    return pa.Table.from_pylist(records, histories.SCHEMA)


def derived(*rows: tuple[str, str, str, int | None], **changes: Any) -> tuple[list[tuple[Any, ...]], dict[str, int]]:
    found, counts = requests_of(behaviors(*rows), RequestRule(**{**vars(RULE), **changes}))
    assert found.schema == REQUESTS
    return [(row["user_id"], row["target"], (row["as_of"] - START).days) for row in found.to_pylist()], counts


def test_the_as_of_of_a_request_is_the_time_of_its_behavior() -> None:
    found, counts = derived(("u", "a", "one", 3), ("v", "x", "solo", 1), ("u", "b", "two", 5), ("u", "c", "three", 4))
    assert found == [("u", "three", 4), ("u", "two", 5)]
    assert counts == {"untimed": 0, "early": 2, "short": 0, "older": 0, "alone": 0, "requests": 2}


def test_behaviors_of_the_same_time_are_not_older() -> None:
    rows = [("u", "a", "one", 1), ("u", "b", "two", 2), ("u", "c", "three", 2)]
    assert derived(*rows, min_history=2)[0] == []
    assert [one[1] for one in derived(*rows, min_history=1)[0]] == ["two", "three"]
    assert len(derived(*rows, min_history=0)[0]) == 3


def test_the_latest_behaviors_of_a_user_become_requests() -> None:
    found, counts = derived(*(("u", str(n), f"text {n}", n) for n in range(6)), max_a_user=2)
    assert [one[1] for one in found] == ["text 4", "text 5"]
    assert counts["older"] == 3


def test_untimed_behaviors_are_left_out_and_the_latest_edit_wins() -> None:
    rows = [("u", "a", "old", 1), ("u", "n", "when?", None), ("u", "b", "x", 2), ("u", "a", "new", 3)]
    for order in (rows, rows[::-1]):
        found, counts = derived(*order)
        assert (found, counts["untimed"]) == ([("u", "new", 3)], 1)


def test_the_opening_is_in_the_request_and_the_rest_is_the_target() -> None:
    rule = RequestRule(ask="Go on.", opening_words=2, min_history=0, max_a_user=9)
    rows = behaviors(("u", "a", "We present  a new\nparser", 1), ("u", "b", "Two words", 2), ("u", "c", "", 3))
    found, counts = requests_of(rows, rule)
    (row,) = found.to_pylist()
    assert (row["input"], row["query"], row["target"]) == ("Go on.\nWe present", "We present", "a new\nparser")
    assert counts["short"] == 2


def test_request_ids_depend_only_on_the_behavior() -> None:
    first = requests_of(behaviors(("u", "a", "one", 1), ("u", "b", "two", 2)), RULE)[0]["request_id"].to_pylist()
    rows = behaviors(("u", "b", "two", 2), ("t", "b", "x", 1), ("u", "a", "one", 1), ("t", "c", "y", 3))
    second = requests_of(rows, RULE)[0].to_pylist()
    assert first == [row["request_id"] for row in second if row["user_id"] == "u"]
    assert len({row["request_id"] for row in second}) == len(second) == 2


@pytest.mark.parametrize("rows", [[], [("u", "a", "one", None)]])
def test_no_timed_behaviors_give_no_requests(rows: list[Any]) -> None:
    assert derived(*rows)[0] == []


def rule(**changes: Any) -> RequestRule:
    return RequestRule(**{**vars(RULE), "min_history": 0, **changes})


def asked(*rows: tuple[str, str, str, int | None], **changes: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = requests_of(behaviors(*rows), rule(**changes))[0].to_pylist()
    return found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Made bread today. It rose well.", "Made bread today."),
        ("v1.5 is out! Get it", "v1.5 is out!"),
        ("A heading\nand a body.", "A heading"),
        ("no end", "no end"),
        ("今日はパンを焼いた。よく膨らんだ。", "今日はパンを焼いた。"),
    ],
)
def test_the_opening_of_a_text_is_its_first_sentence(text: str, sentence: str) -> None:
    (row,) = asked(("u", "a", text, 1), task="opening")
    assert (row["input"], row["query"], row["target"]) == ("Go on.", "Go on.", sentence)


def test_the_opening_may_be_some_words() -> None:
    assert [row["target"] for row in asked(("u", "a", "one two\nthree", 1), task="opening", opening_words=2)] == [
        "one two"
    ]


def test_a_titled_text_is_asked_for_by_its_first_line() -> None:
    rows = [("u", "a", "Rye\n\nA slow bread.\nBaked.", 1), ("u", "b", "no body", 2), ("u", "c", "\nno title", 3)]
    found, counts = requests_of(behaviors(*rows), rule(task="titled"))
    (row,) = found.to_pylist()
    assert (row["input"], row["query"], row["target"]) == ("Go on.\nRye", "Rye", "A slow bread.\nBaked.")
    assert (row["rejected"], counts["short"]) == (None, 2)


PEOPLE = [
    ("u", "a", "mine", 10),
    ("v", "far", "far", 1),
    ("v", "near", "near", 11),
    ("w", "w", "later", 13),
    ("x", "x", "mine", 10),  # the same text as the user's
]


def test_the_rejected_text_is_by_another_user_and_near_in_time() -> None:
    found = {row["target"]: row["rejected"] for row in asked(*PEOPLE) if row["user_id"] in "uvw"}
    assert found == {"mine": "near", "far": "mine", "near": "mine", "later": "near"}
    assert asked(("u", "a", "one", 1), ("u", "b", "two", 2))[0]["rejected"] is None


def test_candidates_are_the_users_text_and_one_of_each_other_user() -> None:
    found = {row["user_id"]: row for row in asked(*PEOPLE, task="which", candidates=3, max_a_user=1)}
    lines = found["u"]["query"].splitlines()
    assert found["u"]["input"] == "Go on.\n" + found["u"]["query"]
    assert sorted(line.split(": ")[1] for line in lines) == ["later", "mine", "near"]
    assert f"{found['u']['target']}: mine" in lines
    assert f"{found['u']['rejected']}: near" in lines
    few, counts = requests_of(behaviors(*PEOPLE[:2]), rule(task="which", candidates=3))
    assert (few.num_rows, counts["alone"]) == (0, 2)


def test_the_right_candidate_is_in_each_place_about_equally_often() -> None:
    rows = [(f"user-{n}", "b", f"text {n}", n) for n in range(400)]
    places = [row["target"] for row in asked(*rows, task="which")]
    assert 0.4 < places.count("[1]") / len(places) < 0.6
    assert places == [row["target"] for row in asked(*rows[::-1], task="which")]


@pytest.mark.parametrize("task", get_args(Task))
def test_no_task_shows_the_target_or_anything_later_in_the_visible_history(task: Task) -> None:
    rows = [
        (user, str(day), f"Title {day} of {user}\nBody {day} of {user}.", day) for user in "uvw" for day in range(9)
    ]
    found, counts = requests_of(behaviors(*rows), rule(task=task, min_history=3))
    assert counts["early"] == 9
    by_key = {(user, START + timedelta(days=int(day or 0))): text for user, _, text, day in rows}
    ids = set()
    for row in found.to_pylist():
        ids.add(row["request_id"])
        seen = [text for (user, time), text in by_key.items() if user == row["user_id"] and time < row["as_of"]]
        assert len(seen) >= 3
        text = by_key[row["user_id"], row["as_of"]]
        if task == "which":
            lines = dict(line.split(": ", 1) for line in row["query"].splitlines())
            assert lines[row["target"]] == " ".join(text.split())
            assert all(" ".join(one.split()) not in lines.values() for one in seen)
        else:
            assert row["target"] in text
            assert all(row["target"] not in one for one in seen)
    assert len(ids) == found.num_rows == 18


def test_requests_of_different_tasks_have_different_ids() -> None:
    rows = [("u", "a", "Title\nBody.", 1), ("v", "a", "Other\nBody, too.", 1)]
    ids = {row["request_id"] for task in get_args(Task) for row in asked(*rows, task=task)}
    assert len(ids) == 2 * len(get_args(Task))


def test_held_out_users_are_the_same_ones_whatever_else_is_there() -> None:
    users = [f"user-{n}" for n in range(2000)]
    held_out = are_held_out(pa.chunked_array([users]), 0.2).to_pylist()
    assert 0.17 < sum(held_out) / len(users) < 0.23
    assert are_held_out(pa.chunked_array([users[:10], users[:10]]), 0.2).to_pylist() == held_out[:10] * 2
    more = are_held_out(pa.chunked_array([users]), 0.3).to_pylist()
    assert all(was <= now for was, now in zip(held_out, more, strict=True))
    assert are_held_out(pa.chunked_array([], pa.string()), 0.2).to_pylist() == []
