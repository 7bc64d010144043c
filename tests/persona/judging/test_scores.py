"""Scores of judges: the swap gap decides whether there is a PersonaScore, and nothing unparsed is in a mean."""

import itertools

import numpy as np
import pytest
from scipy.stats import spearmanr

from persona.judging.rubrics import TASKS
from persona.judging.scores import _spearman, summarize

USERS = [f"user-{i}" for i in range(12)]


def rows(score, *, judge="j", variant="own", kinds=("own", "swapped"), users=USERS, tasks=TASKS):
    return [
        {
            "variant": variant,
            "judge": judge,
            "request_id": f"{user}/{task}",
            "user_id": user,
            "task": task,
            "persona": kind,
            "score": score(i, task, kind),
        }
        for (i, user), task, kind in itertools.product(enumerate(users), tasks, kinds)
    ]


def only(found):
    [row] = found["scores"]
    return row


def test_a_judge_that_tells_personas_apart_gives_a_score_with_its_gap():
    found = only(summarize(rows(lambda i, task, kind: (3 + i % 2) if kind == "own" else 2), seed=0))
    assert found["persona_score"]["mean"] == pytest.approx(3.5)
    assert found["swap_gap"]["mean"] == pytest.approx(1.5)
    assert found["swap_gap"]["low"] > 0
    assert found["no_score_because"] == ""


@pytest.mark.parametrize("swapped", [4, 5])
def test_a_judge_that_does_not_gives_none_however_high_it_scores(swapped):
    noise = np.random.default_rng(0).integers(0, 2, 1000).tolist()
    draws = iter(noise)
    found = only(summarize(rows(lambda i, task, kind: 4 + next(draws) if swapped == 4 else 5), seed=0))
    assert found["persona_score"] is None
    assert "is not above 0" in found["no_score_because"]


def test_one_persona_gives_no_score():
    found = only(summarize(rows(lambda i, task, kind: 5 if kind == "own" else 1, users=USERS[:1]), seed=0))
    assert found["no_score_because"] == "one persona gives no interval of the swap gap"


def test_the_score_is_the_mean_of_tasks_and_toxicity_is_also_shown_apart():
    def score(i, task, kind):
        return 5 if task == "toxicity" else (2 if kind == "own" else 1)

    given = rows(score) + rows(score, users=[f"more-{i}" for i in range(30)], tasks=["toxicity"])
    found = only(summarize(given, seed=0))
    assert found["persona_score"]["mean"] == pytest.approx((5 + 4 * 2) / 5)
    assert found["without_toxicity"]["mean"] == pytest.approx(2)
    assert found["tasks"]["toxicity"]["score"]["mean"] == 5
    assert found["tasks"]["toxicity"]["swap_gap"]["mean"] == 0


def test_unparsed_judgements_are_counted_and_in_no_mean():
    def score(i, task, kind):
        if i == 0:
            return None
        if i == 1 and kind == "swapped":
            return None
        return 4 if kind == "own" else 1

    found = only(summarize(rows(score), seed=0))
    assert found["unparsed"] == 3 * len(TASKS)
    assert found["judgements"] == 2 * len(USERS) * len(TASKS)
    assert found["persona_score"]["mean"] == 4
    assert found["swap_gap"]["mean"] == 3
    assert found["tasks"]["action"]["answers"] == len(USERS)


def test_the_interval_is_over_personas():
    """All answers of a person alike: as many tasks as one likes leave the interval as wide."""
    alike = only(summarize(rows(lambda i, task, kind: (5 if i % 2 else 2) if kind == "own" else 1), seed=0))
    width = alike["persona_score"]["high"] - alike["persona_score"]["low"]
    # The standard error of a mean of 12 coins between 2 and 5 is 3 / 2 / √12 = 0.43.
    assert width == pytest.approx(2 * 1.96 * 0.43, rel=0.2)


def test_judges_are_compared_on_the_answers_that_both_scored():
    a = rows(lambda i, task, kind: 1 + i % 5, judge="a")
    b = rows(lambda i, task, kind: None if i == 0 else min(5, 2 + i % 5), judge="b")
    [pair] = summarize(a + b, seed=0)["agreement"]
    assert pair["answers"] == (len(USERS) - 1) * len(TASKS)
    assert pair["mean_difference"] < 1
    assert pair["rank_correlation"] > 0.9
    assert summarize(a, seed=0)["agreement"] == []


def test_rank_correlation_is_that_of_scipy():
    draw = np.random.default_rng(1)
    a, b = draw.integers(1, 6, 50).astype(float), draw.integers(1, 6, 50).astype(float)
    assert _spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-4)
    assert _spearman(np.ones(5), np.arange(5.0)) is None
