"""What is said about losses and answers, on a few requests whose numbers can be worked out by hand."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from persona.errors import InputError
from persona.evaluation import one_run as comparison
from persona.evaluation.scores import Metric

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
    """Rows as actors send them: in no order."""
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
    return {name: {one[0]: said for one in REQUESTS} for name, said in (("own", own), ("none", none))}


def test_losses_are_nats_a_token_and_differences_are_paired() -> None:
    found = comparison.compare(losses(), PERSONAS, answers(), TEXT, seed=0)
    assert (found["requests"], found["users"]) == (4, 2)
    assert found["loss"]["own"]["mean"] == pytest.approx(23 / 12, abs=1e-5)
    assert found["loss_saved_by_own"]["other"]["mean"] == pytest.approx((38 - 23) / 12, abs=1e-5)
    # One user of nine tokens saves 14 nats, the other of three saves one: either may be drawn twice.
    assert found["loss_saved_by_own"]["other"]["low"] == pytest.approx(1 / 3, abs=1e-5)
    assert found["loss_saved_by_own"]["other"]["high"] == pytest.approx(14 / 9, abs=1e-5)
    assert found["scores"]["own"]["rouge1"] == 1
    assert found["score_gained_by_own"]["rouge1"]["none"]["mean"] == pytest.approx(1 / 3, abs=1e-5)
    assert found["score_intervals"]["none"]["rouge1_mean"]["mean"] == pytest.approx(2 / 3, abs=1e-5)


def test_gains_are_grouped_by_what_the_own_persona_sees() -> None:
    groups = comparison.compare(losses(), PERSONAS, {}, TEXT, seed=0)["gain_by_history_length"]
    assert [(one["from"], one["to"], one["requests"], one["users"]) for one in groups] == [
        (0, 0, 1, 1),
        (1, 2, 2, 1),
        (7, 7, 1, 1),
    ]
    assert groups[1]["saved_by_own"]["none"]["mean"] == pytest.approx((11 - 5) / 3, abs=1e-5)


def test_largest_gains_and_losses_are_against_another_user() -> None:
    shown = comparison.shown(losses(), PERSONAS)
    # a saves 1 nat a token, b and c 2, d loses half a nat.
    assert (shown["largest_gains"], shown["largest_losses"]) == (["b", "c", "a"], ["d"])
    assert sorted(shown["even"]) == ["a", "b", "c", "d"]
    assert len(shown["map"]) == 2
    without = comparison.shown(losses(), ("none", "other"))
    assert without["largest_gains"] == without["map"] == []


def test_an_example_stands_side_by_side() -> None:
    one = comparison.example(losses(), PERSONAS, answers(), "b", "Title?")
    assert (one["input"], one["own"], one["none"], one["target"]) == ("Title?", "a b", "a", "a b")
    assert (one["user_id"], one["n_behaviors"]) == ("u", 7)
    assert one["nats_a_token"] == {"own": 2.0, "none": 3.0, "other": 4.0}


def test_the_heaviest_behaviors_are_named_first_and_missing_texts_stay_unknown() -> None:
    when = datetime(2024, 5, 6, tzinfo=UTC)
    seen = {"weights": [0.1, 0.7, 0.2], "behavior_id": ["x", "y", "z"], "timestamp": [when, None, when]}
    found = comparison.listened_to({**seen, "texts": ["one", None, "three " * 100]})
    assert [(one["behavior_id"], one["weight"], one["written"]) for one in found] == [
        ("y", 0.7, None),
        ("z", 0.2, "2024-05-06"),
        ("x", 0.1, "2024-05-06"),
    ]
    assert found[0]["text"] is None
    assert len(found[1]["text"]) <= comparison.N_CHARACTERS
    assert {one["text"] for one in comparison.listened_to(seen)} == {None}


def test_the_map_keeps_the_distances_of_personas_that_lie_in_a_plane() -> None:
    plane = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 1.0]])
    turned_UF = plane @ np.linalg.qr(np.random.default_rng(0).normal(size=(9, 2)))[0].T + 5
    places = comparison.persona_map(turned_UF, ["u", "v", "w"], with_third_user(), PERSONAS)
    xy = np.array([[one["x"], one["y"]] for one in places])
    wide, high = np.linalg.norm(xy[1] - xy[0]), np.linalg.norm(xy[2] - xy[0])
    assert wide / high == pytest.approx(4, rel=1e-3)
    # The mean over the requests of u: (1 + 2) / 2.
    assert places[0]["saved"] == pytest.approx(1.5)
    assert places[0]["n_behaviors"] == 7
    assert comparison.persona_map(turned_UF[:2], ["u", "v"], losses(), PERSONAS) == []
    assert comparison.persona_map(turned_UF, ["u", "v", "w"], with_third_user(), ["none"]) == []


def with_third_user() -> dict[str, list[Any]]:
    found = losses()
    found["user_id"] = [
        "w" if request == "d" else user for request, user in zip(found["request_id"], found["user_id"], strict=True)
    ]
    return found


def test_one_id_for_two_users_is_refused() -> None:
    rows = losses()
    rows["request_id"] = ["a" if one == "b" else one for one in rows["request_id"]]
    with pytest.raises(InputError, match="make the ids unique"):
        comparison.compare(rows, PERSONAS, {}, TEXT, seed=0)


def with_rejected() -> dict[str, list[Any]]:
    """Nats of a rejected text by persona and request; user u asks a and b, user v asks c and d."""
    rejected = {
        "own": {"a": 9.0, "b": 9.0, "c": 1.0, "d": 5.0},  # against 8, 10, 1 and 4: right, wrong, a tie, right
        "none": {"a": 9.0, "b": 12.0, "c": 5.0, "d": 7.5},  # against 8, 15, 5 and 6: right, wrong, a tie, right
        "other": {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0},
    }
    rows = losses()
    pairs = zip(rows["persona"], rows["request_id"], strict=True)
    return {**rows, "rejected_nats": [rejected[persona][request] for persona, request in pairs]}


def test_the_ranking_is_the_share_of_targets_that_are_likelier_and_ties_count_half() -> None:
    found = comparison.compare(with_rejected(), PERSONAS, {}, TEXT, seed=0)["ranking"]
    # Of u one of two, of v one and a half: users are drawn, so a sample is all u, all v, or half of each.
    assert found["own"]["likelier"] == {"mean": 0.625, "low": 0.5, "high": 0.75}
    assert found["none"]["likelier"]["mean"] == 0.625
    assert found["other"]["likelier"]["mean"] == 0
    # What the own history adds to the target and to the rejected text, in nats (less is likelier):
    # a: 0 and 0, a tie; b: -5 and -3, right; c: -4 and -4, a tie; d: -2 and -2.5, wrong.
    assert found["own"]["calibrated"] == {"mean": 0.5, "low": 0.25, "high": 0.75}
    assert set(found["none"]) == {"likelier"}


def test_a_ranking_is_calibrated_only_by_what_was_measured() -> None:
    found = comparison.compare(with_rejected(), ("own", "other"), {}, TEXT, seed=0)["ranking"]
    assert {p: set(ways) for p, ways in found.items()} == {"own": {"likelier"}, "other": {"likelier"}}
    assert "ranking" not in comparison.compare(losses(), PERSONAS, {}, TEXT, seed=0)
