"""Requests derived from histories: which behaviors become requests, and how the others are counted."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from persona.inputs import histories
from persona.inputs.derived_requests import REQUESTS, RequestRule, requests_of

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
    assert counts == {"untimed": 0, "early": 2, "short": 0, "older": 0, "requests": 2}


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
