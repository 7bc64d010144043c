"""The verdict of a benchmark: from intervals to words."""

import math
from typing import Any

import pytest

from persona.evaluation.benchmark_verdict import verdict
from persona.report.pages import comparison_page

Interval = tuple[float, float, float]


def interval(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def row(name: str, persona: str, above_reference: Interval | None, above_own: Interval | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "persona": persona,
        "evaluations": [f"{name}-0"],
        "seeds": [0],
        "trained_without_history": name.startswith("tuning"),
        "loss": interval(4.0, 3.9, 4.1),
        "loss_of_seeds": None,
        "above_reference": above_reference and interval(*above_reference),
        "above_own": above_own and interval(*above_own),
        "scores": {},
        "ranking": {},
    }


def found(against: str, *rows: dict[str, Any], users: int = 100) -> dict[str, Any]:
    return {
        "requests": 500,
        "users": users,
        "against": against,
        "warnings": [],
        "rows": list(rows),
        "evaluations": [],
        "differing": {"plug": {}, "tuning": {}},
    }


def judged(other: Interval, tuning: Interval, texts: Interval | None = None, **changes: Any) -> dict[str, Any]:
    """`other` above own; own above `tuning` and above tuning with texts, as `many_runs.compare` gives them."""
    rows = [row("plug", "own", tuning), row("plug", "other", (0, 0, 0), other), row("tuning", "none", None)]
    of_texts = None
    if texts is not None:
        of_texts = found("tuning-texts/none", row("plug", "own", texts), row("plug-texts", "own", texts))
    sizes = {"steps": 775, "soft_tokens": 17, "text_tokens": 256}
    return verdict(found("tuning/none", *rows), of_texts, **(sizes | changes))


def results(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["result"] for check in found["checks"]}


def test_below_the_control_is_ahead_and_needs_no_advice() -> None:
    one = judged((0.17, 0.14, 0.21), (-0.09, -0.12, -0.07), (-0.02, -0.03, -0.01))
    assert results(one) == {"other": "ahead", "tuning": "ahead", "texts": "ahead", "added": "ahead"}
    assert [check["advice"] for check in one["checks"]] == [""] * 4
    assert one["checks"][1]["sentence"] == "Yes: it saves +0.0900 nats a token [+0.0700, +0.1200]."
    assert one["conclusion"] == (
        "The persona is worth more than the same training without histories, can replace recent texts in the prompt "
        "and adds to recent texts in the prompt."
    )
    assert judged((0.17, 0.14, 0.21), (-0.09, -0.12, -0.07))["conclusion"].endswith("training without histories.")
    assert "A persona takes 17 positions of the prompt, the texts up to 256." in one["notes"]


def test_what_is_behind_or_not_shown_says_what_to_try() -> None:
    one = judged((0.17, 0.14, 0.21), (0.01, -0.02, 0.04), (0.08, 0.05, 0.11), steps=50)
    assert results(one) == {"other": "ahead", "tuning": "undecided", "texts": "behind", "added": "behind"}
    assert all(check["advice"] for check in one["checks"] if check["result"] != "ahead")
    # An interval of ±0.03 around 0.01 must become a third as wide: nine times the users.
    assert "about 900 held-out users" in one["checks"][1]["sentence"]
    assert "not shown to be worth more than prompt tuning" in one["conclusion"]
    assert any(note.startswith("The plugs were trained for 50 steps") for note in one["notes"])


def test_without_a_gain_over_others_nothing_else_counts() -> None:
    one = judged((0.0001, -0.02, 0.02), (-0.09, -0.12, -0.07))
    assert one["conclusion"] == "These requests do not show that a user's own history helps."
    assert "does not matter" in one["checks"][0]["sentence"]
    assert [check["name"] for check in one["checks"]] == ["other", "tuning"]


def test_one_user_gives_no_verdict() -> None:
    nothing = (0.1, math.nan, math.nan)
    assert set(results(judged(nothing, nothing, nothing)).values()) == {"unknown"}


@pytest.mark.parametrize("texts", [None, (0.08, 0.05, 0.11)])
def test_the_page_shows_it(texts: Interval | None) -> None:
    one = judged((0.17, 0.14, 0.21), (0.01, -0.02, 0.04), texts)
    rows = [row("plug", "own", (0.01, -0.02, 0.04)), row("tuning", "none", None)]
    page = comparison_page({**found("tuning/none", *rows), "verdict": one}).decode()
    assert "<h2>Verdict</h2>" in page
    assert one["conclusion"] in page
    assert "<h2>Verdict</h2>" not in comparison_page(found("tuning/none", *rows)).decode()
