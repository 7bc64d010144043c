"""The summary of one evaluation: losses, scores, rankings, and what the user's own persona gains.

The result is plain values that fit into JSON, so that the report can be drawn from `metrics.json` alone. Shapes: R
requests, in the order of their ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from persona.errors import InputError
from persona.evaluation.intervals import Floats, Interval, bootstrap, paired_bootstrap
from persona.evaluation.losses import Columns, PersonaLosses, by_persona
from persona.evaluation.ranking import outcomes
from persona.evaluation.scores import score, score_intervals, score_requests
from persona.options import Metric

# The shortest history of each group of requests; empty groups are left out.
_LENGTHS = (0, 1, 3, 6, 11, 21, 51, 101, 201)
_LOWER_IS_BETTER = ("mae", "rmse")

Answers = Mapping[str, Mapping[str, str]]


def summarize(
    losses: Columns, personas: Sequence[str], answers: Answers, metric: Metric, *, seed: int
) -> dict[str, Any]:
    """Losses, scores and what the own persona gains, each with its interval over users.

    Args:
        losses: a row for each request and kind of persona, with the columns of `by_persona`.
        personas: the kinds of persona in `losses`.
        answers: texts by variant and request id.
        metric: how to score the answers.
        seed: of the bootstrap.

    Raises:
        InputError: request ids are not unique, or the answers cannot be scored (see `scores.score`).
    """
    of = by_persona(losses, personas)
    first = of[personas[0]]
    golds = dict(zip(first.request_ids, first.targets, strict=True))
    if len(golds) < len(first.request_ids):
        raise InputError("--requests: the same request_id is used for several users; make the ids unique")
    found = summarize_losses(of, seed=seed)
    return {
        **found,
        **_scores(answers, metric, golds, first.users, seed=seed),
        "gain_by_history_length": _by_history_length(of, seed=seed) if found["loss_saved_by_own"] else [],
        **({"ranking": _ranking(of, seed=seed)} if "rejected_nats" in losses else {}),
    }


def summarize_losses(of: Mapping[str, PersonaLosses], *, seed: int) -> dict[str, Any]:
    """The numbers of requests and users, the loss under each kind of persona, and what the own persona saves."""
    first = next(iter(of.values()))
    return {
        "requests": len(first.users),
        "users": len(set(first.users)),
        "loss": {
            persona: bootstrap(one.nats_R, one.users, weights=one.tokens_R, seed=seed).rounded()
            for persona, one in of.items()
        },
        "loss_saved_by_own": _saved_by_own(of, seed=seed),
    }


def _saved_by_own(
    of: Mapping[str, PersonaLosses], rows: Sequence[int] | None = None, *, seed: int
) -> dict[str, dict[str, float]]:
    """Nats a token that the own persona saves against each other kind, on all requests or on some rows."""
    if "own" not in of:
        return {}
    own = of["own"]
    chosen = list(range(len(own.users))) if rows is None else list(rows)
    users = [own.users[i] for i in chosen]
    return {
        persona: paired_bootstrap(
            other.nats_R[chosen], own.nats_R[chosen], users, weights=own.tokens_R[chosen], seed=seed
        ).rounded()
        for persona, other in of.items()
        if persona != "own"
    }


def _scores(
    answers: Answers, metric: Metric, golds: Mapping[str, str], users: Sequence[str], *, seed: int
) -> dict[str, Any]:
    requests = {variant: score_requests(metric, outputs, golds) for variant, outputs in answers.items()}
    intervals = {
        variant: score_intervals(metric, outputs, golds, users, seed=seed) for variant, outputs in answers.items()
    }
    own = requests.get("own", {})
    gained = {
        name: {
            variant: _gain(name, own_R, found[name], users, seed=seed).rounded()
            for variant, found in requests.items()
            if variant != "own"
        }
        for name, own_R in own.items()
    }
    return {
        "scores": {variant: score(metric, outputs, golds, seed=seed) for variant, outputs in answers.items()},
        "score_intervals": {
            variant: {name: interval.rounded() for name, interval in found.items()}
            for variant, found in intervals.items()
        },
        "score_gained_by_own": gained,
    }


def _gain(name: str, own_R: Floats, other_R: Floats, users: Sequence[str], *, seed: int) -> Interval:
    """How much better `own` scores; positive is better, also for scores of which lower is better."""
    better, worse = (other_R, own_R) if name in _LOWER_IS_BETTER else (own_R, other_R)
    return paired_bootstrap(better, worse, users, seed=seed)


def _by_history_length(of: Mapping[str, PersonaLosses], *, seed: int) -> list[dict[str, Any]]:
    """What the own persona saves, for groups of requests that see histories of similar length."""
    own = of["own"]
    lengths_R = np.array(own.n_behaviors)
    group_R = np.searchsorted(_LENGTHS, lengths_R, side="right") - 1
    groups = [np.flatnonzero(group_R == group).tolist() for group in np.unique(group_R)]
    return [
        {
            "from": int(lengths_R[rows].min()),
            "to": int(lengths_R[rows].max()),
            "requests": len(rows),
            "users": len({own.users[i] for i in rows}),
            "saved_by_own": _saved_by_own(of, rows, seed=seed),
        }
        for rows in groups
    ]


def _ranking(of: Mapping[str, PersonaLosses], *, seed: int) -> dict[str, Any]:
    """Shares of the requests whose target is ranked above the rejected text."""
    nats = {persona: (one.nats_R, one.rejected_nats_R) for persona, one in of.items()}
    users = next(iter(of.values())).users
    measured = {persona: (target, rejected) for persona, (target, rejected) in nats.items() if rejected is not None}
    return {
        persona: {way: bootstrap(wins_R, users, seed=seed).rounded() for way, wins_R in ways.items()}
        for persona, ways in outcomes(measured).items()
    }
