"""The summary of one evaluation, on a few requests whose numbers can be worked out by hand."""

from typing import Any

import pytest

from persona.errors import InputError
from persona.evaluation.one_run import summarize
from persona.options import Metric

PERSONAS = ("own", "none", "other")
TEXT = Metric(kind="text")
# request, user, behaviors seen, tokens; nats under own, none and other.
REQUESTS = [
    ("d", "v", 2, 2, 4.0, 6.0, 3.0),
    ("a", "u", 0, 4, 8.0, 8.0, 12.0),
    ("c", "v", 1, 1, 1.0, 5.0, 3.0),
    ("b", "u", 7, 5, 10.0, 15.0, 20.0),
]


def losses() -> dict[str, list[Any]]:
    """Rows as actors send them: in any order."""
    rows = [
        {
            "request_id": one[0],
            "user_id": one[1],
            "persona": p,
            "target": "a b",
            "nats": one[4 + k],
            "tokens": one[3],
            "n_behaviors": one[2] if p != "none" else 0,
        }
        for k, p in enumerate(PERSONAS)
        for one in REQUESTS
    ]
    return {name: [row[name] for row in rows[5:] + rows[:5]] for name in rows[0]}


def answers(own: str = "a b", none: str = "a") -> dict[str, dict[str, str]]:
    return {name: {one[0]: answer for one in REQUESTS} for name, answer in (("own", own), ("none", none))}


def test_losses_are_nats_a_token_and_differences_are_paired() -> None:
    found = summarize(losses(), PERSONAS, answers(), TEXT, seed=0)
    assert (found["requests"], found["users"]) == (4, 2)
    assert found["loss"]["own"]["mean"] == pytest.approx(23 / 12, abs=1e-5)
    assert found["loss_saved_by_own"]["other"]["mean"] == pytest.approx((38 - 23) / 12, abs=1e-5)
    # User u saves 14 nats of nine tokens, user v one nat of three: a sample may be the same user twice.
    assert found["loss_saved_by_own"]["other"]["low"] == pytest.approx(1 / 3, abs=1e-5)
    assert found["loss_saved_by_own"]["other"]["high"] == pytest.approx(14 / 9, abs=1e-5)
    assert found["scores"]["own"]["rouge1"] == 1
    assert found["score_gained_by_own"]["rouge1"]["none"]["mean"] == pytest.approx(1 / 3, abs=1e-5)
    assert found["score_intervals"]["none"]["rouge1_mean"]["mean"] == pytest.approx(2 / 3, abs=1e-5)


def test_gains_are_grouped_by_the_length_of_the_history() -> None:
    groups = summarize(losses(), PERSONAS, {}, TEXT, seed=0)["gain_by_history_length"]
    assert [(one["from"], one["to"], one["requests"], one["users"]) for one in groups] == [
        (0, 0, 1, 1),
        (1, 2, 2, 1),
        (7, 7, 1, 1),
    ]
    assert groups[1]["saved_by_own"]["none"]["mean"] == pytest.approx((11 - 5) / 3, abs=1e-5)


def test_one_request_id_for_two_users_is_refused() -> None:
    rows = losses()
    rows["request_id"] = ["a" if one == "b" else one for one in rows["request_id"]]
    with pytest.raises(InputError, match="make the ids unique"):
        summarize(rows, PERSONAS, {}, TEXT, seed=0)


def with_rejected() -> dict[str, list[Any]]:
    """Nats of a rejected text by persona and request; a and b are requests of user u, c and d of user v."""
    rejected = {
        "own": {"a": 9.0, "b": 9.0, "c": 1.0, "d": 5.0},  # against 8, 10, 1 and 4: right, wrong, a tie, right
        "none": {"a": 9.0, "b": 12.0, "c": 5.0, "d": 7.5},  # against 8, 15, 5 and 6: right, wrong, a tie, right
        "other": {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0},
    }
    rows = losses()
    pairs = zip(rows["persona"], rows["request_id"], strict=True)
    return {**rows, "rejected_nats": [rejected[persona][request] for persona, request in pairs]}


def test_the_ranking_by_loss_is_the_share_of_likelier_targets_and_a_tie_counts_half() -> None:
    found = summarize(with_rejected(), PERSONAS, {}, TEXT, seed=0)["ranking"]
    # u has one of two, v one and a half: a sample of two users is only u, only v, or both.
    assert found["own"]["likelier"] == {"mean": 0.625, "low": 0.5, "high": 0.75}
    assert found["none"]["likelier"]["mean"] == 0.625
    assert found["other"]["likelier"]["mean"] == 0
    # Nats that the own history adds to the target and to the rejected text (the lower one wins):
    # a: 0 and 0, a tie; b: -5 and -3, right; c: -4 and -4, a tie; d: -2 and -2.5, wrong.
    assert found["own"]["calibrated"] == {"mean": 0.5, "low": 0.25, "high": 0.75}
    assert set(found["none"]) == {"likelier"}


def test_a_ranking_by_gain_over_none_needs_none_to_be_measured() -> None:
    found = summarize(with_rejected(), ("own", "other"), {}, TEXT, seed=0)["ranking"]
    assert {p: set(ways) for p, ways in found.items()} == {"own": {"likelier"}, "other": {"likelier"}}
    assert "ranking" not in summarize(losses(), PERSONAS, {}, TEXT, seed=0)
