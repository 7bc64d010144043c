"""Which requests and users a report shows, on four requests with numbers computed by hand."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from persona.evaluation import examples
from tests.persona.evaluation.test_one_run import PERSONAS, answers, losses


def test_largest_gains_and_losses_are_against_another_user() -> None:
    chosen = examples.choose(losses(), PERSONAS)
    # Per token, a saves 1 nat, b and c save 2, and d loses half a nat.
    assert (chosen.largest_gains, chosen.largest_losses) == (["b", "c", "a"], ["d"])
    assert sorted(chosen.even) == ["a", "b", "c", "d"]
    assert len(chosen.mapped) == 2
    without = examples.choose(losses(), ("none", "other"))
    assert without.largest_gains == without.mapped == []


def test_an_example_has_answers_and_losses_side_by_side() -> None:
    one = examples.example(losses(), PERSONAS, answers(), "b", "Title?")
    assert (one["input"], one["own"], one["none"], one["target"]) == ("Title?", "a b", "a", "a b")
    assert (one["user_id"], one["n_behaviors"]) == ("u", 7)
    assert one["nats_a_token"] == {"own": 2.0, "none": 3.0, "other": 4.0}


def test_the_heaviest_behaviors_come_first_and_missing_texts_are_none() -> None:
    when = datetime(2024, 5, 6, tzinfo=UTC)
    seen = {"weights": [0.1, 0.7, 0.2], "behavior_id": ["x", "y", "z"], "timestamp": [when, None, when]}
    found = examples.heaviest_behaviors({**seen, "texts": ["one", None, "three " * 100]})
    assert [(one["behavior_id"], one["weight"], one["written"]) for one in found] == [
        ("y", 0.7, None),
        ("z", 0.2, "2024-05-06"),
        ("x", 0.1, "2024-05-06"),
    ]
    assert found[0]["text"] is None
    assert len(found[1]["text"]) <= examples.N_CHARACTERS
    assert {one["text"] for one in examples.heaviest_behaviors(seen)} == {None}


def test_the_map_keeps_the_distances_of_personas_in_a_plane() -> None:
    plane = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 1.0]])
    rotated_UF = plane @ np.linalg.qr(np.random.default_rng(0).normal(size=(9, 2)))[0].T + 5
    points = examples.persona_map(rotated_UF, ["u", "v", "w"], with_third_user(), PERSONAS)
    xy = np.array([[one["x"], one["y"]] for one in points])
    wide, high = np.linalg.norm(xy[1] - xy[0]), np.linalg.norm(xy[2] - xy[0])
    assert wide / high == pytest.approx(4, rel=1e-3)
    # The mean over the requests of u: (1 + 2) / 2.
    assert points[0]["saved"] == pytest.approx(1.5)
    assert points[0]["n_behaviors"] == 7
    assert examples.persona_map(rotated_UF[:2], ["u", "v"], losses(), PERSONAS) == []
    assert examples.persona_map(rotated_UF, ["u", "v", "w"], with_third_user(), ["none"]) == []


def with_third_user() -> dict[str, list[Any]]:
    found = losses()
    found["user_id"] = [
        "w" if request == "d" else user for request, user in zip(found["request_id"], found["user_id"], strict=True)
    ]
    return found
