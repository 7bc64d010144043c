"""The gate on numbers computed by hand: better than another user's persona, and than the live plug."""

from typing import Any

import numpy as np
import pytest

from persona.errors import InputError
from persona.evaluation.gate import judge
from persona.evaluation.saved_run import Evaluation
from tests.persona.evaluation.test_many_runs import files

USERS = 40


def evaluation(name: str, own: float, other: float = 3.0, *, users: range = range(USERS), **more: Any) -> Evaluation:
    """One request of 2 tokens a user; `own` and `other` are nats a token, give or take a tenth that users differ by."""
    spread = [0.1 * np.sin(user) for user in users]
    nats = {kind: [2 * (loss + by) for by in spread] for kind, loss in (("own", own), ("other", other))}
    tokens = {f"r{user}": 2 for user in users}
    named = {f"r{user}": f"u{user}" for user in users}
    return Evaluation.read(name, *files(nats, tokens=tokens, users=named, **more), source=name)


def test_a_plug_passes_that_is_ahead_of_others_and_of_the_live_plug() -> None:
    verdict = judge(evaluation("new", 2.0), evaluation("old", 2.5))
    assert verdict.failed == []
    assert verdict.loss.mean == pytest.approx(2.0, abs=0.02)
    assert verdict.other.saved.mean == pytest.approx(1.0)
    assert verdict.live is not None
    assert (verdict.live.saved.mean, verdict.live.requests, verdict.live.users) == (pytest.approx(0.5), USERS, USERS)
    assert verdict.facts()["passed"]


@pytest.mark.parametrize(
    ("own", "other", "live", "failed"),
    [
        (2.0, 1.9, 2.5, ["another user's persona"]),
        (2.0, 3.0, 1.5, ["the live plug"]),
        (2.0, 2.0, 2.0, ["another user's persona", "the live plug"]),
    ],
)
def test_a_plug_that_is_not_ahead_fails_by_name(own: float, other: float, live: float, failed: list[str]) -> None:
    verdict = judge(evaluation("new", own, other), evaluation("old", live))
    assert [check.against for check in verdict.failed] == failed


def test_a_gain_within_the_interval_does_not_pass() -> None:
    rng = np.random.default_rng(0)
    new, old = evaluation("new", 2.0), evaluation("old", 2.0)
    noise = rng.normal(0.02, 1.0, USERS)  # better on average, and by chance
    own = new.losses["own"]
    shifted = own.set_column(own.column_names.index("nats"), "nats", [own["nats"].to_numpy() - noise])
    losses = {**new.losses, "own": shifted}
    verdict = judge(Evaluation(name="new", metrics=new.metrics, losses=losses), old)
    assert verdict.live is not None
    assert verdict.live.saved.low < 0 < verdict.live.saved.high
    assert [check.against for check in verdict.failed] == ["the live plug"]


def test_without_a_live_plug_only_the_own_history_counts() -> None:
    assert judge(evaluation("new", 2.0), None).live is None


def test_plugs_are_compared_on_the_requests_that_both_evaluations_have() -> None:
    verdict = judge(evaluation("new", 2.0, users=range(10, 60)), evaluation("old", 2.5))
    assert verdict.live is not None
    assert (verdict.other.requests, verdict.live.requests) == (50, 30)


def test_what_cannot_be_compared_is_refused() -> None:
    new = evaluation("new", 2.0)
    with pytest.raises(InputError, match="share no request"):
        judge(new, evaluation("old", 2.5, users=range(100, 110)))
    with pytest.raises(InputError, match="different LLMs"):
        judge(new, evaluation("old", 2.5, settings={"llm": {"fingerprint": "another"}}))
    with pytest.raises(InputError, match="with --limit, so it decides nothing"):
        judge(evaluation("new", 2.0, limited=True), None)
    one = files({"own": [1.0, 1.0, 1.0, 1.0]})
    with pytest.raises(InputError, match="without the persona 'other'"):
        judge(Evaluation.read("new", *one, source="new"), None)


def test_a_single_user_gives_no_interval_and_so_no_promotion() -> None:
    assert judge(evaluation("new", 2.0, users=range(1)), None).failed
