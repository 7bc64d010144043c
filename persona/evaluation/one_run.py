"""What losses and answers under several kinds of persona say: scores, differences, and which requests to show.

Everything here is plain values that fit into JSON, so that the report can be drawn from `metrics.json` alone. Shapes: R
requests, in the order of their ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import shorten
from typing import Any

import numpy as np

from persona.errors import InputError
from persona.evaluation.scores import (
    Interval,
    Metric,
    bootstrap,
    paired_bootstrap,
    score,
    score_intervals,
    score_requests,
)

N_EXAMPLES = 6
N_EXTREMES = 4
N_MAPPED = 200
N_LISTENED = 5
N_CHARACTERS = 300  # of a past text that is shown
# First history length of each group of requests; groups nobody is in are left out.
_LENGTHS = (0, 1, 3, 6, 11, 21, 51, 101, 201)
_BY_HISTORY = ("own", "other", "mean")  # kinds of persona that are made of somebody's history
_SMALLER_IS_BETTER = ("mae", "rmse")

Columns = Mapping[str, Sequence[Any]]
Answers = Mapping[str, Mapping[str, str]]


def compare(losses: Columns, personas: Sequence[str], answers: Answers, metric: Metric, *, seed: int) -> dict[str, Any]:
    """Losses, scores and what the own persona gains, each with its interval over users.

    `losses` has a row a request and kind of persona (request_id, user_id, persona, target, nats, tokens, n_behaviors,
    and perhaps rejected_nats, for the `ranking`), `answers` the outputs by variant and request. Raises `InputError`
    for ids that are not unique, and as `metrics.score` does.
    """
    of = {p: _of(losses, p) for p in personas}
    first = of[personas[0]]
    users, tokens = first["user_id"], np.array(first["tokens"])
    golds = dict(zip(first["request_id"], first["target"], strict=True))
    if len(golds) < len(users):
        raise InputError("--requests: a request_id stands for several users; make the ids unique")
    nats = {p: np.array(of[p]["nats"]) for p in personas}
    saved = {
        p: paired_bootstrap(nats[p], nats["own"], users, weights=tokens, seed=seed)
        for p in personas
        if p != "own" and "own" in nats
    }
    of_each = {variant: score_requests(metric, outputs, golds) for variant, outputs in answers.items()}
    own = of_each.get("own", {})
    gained = {
        name: {
            variant: _plain(paired_bootstrap(*_better_first(name, own, values), users, seed=seed))
            for variant, values in of_each.items()
            if variant != "own"
        }
        for name in own
    }
    intervals = {
        variant: score_intervals(metric, outputs, golds, users, seed=seed) for variant, outputs in answers.items()
    }
    return {
        "requests": len(users),
        "users": len(set(users)),
        "loss": {p: _plain(bootstrap(nats[p], users, weights=tokens, seed=seed)) for p in personas},
        "loss_saved_by_own": {p: _plain(interval) for p, interval in saved.items()},
        "scores": {variant: score(metric, outputs, golds, seed=seed) for variant, outputs in answers.items()},
        "score_intervals": {
            variant: {name: _plain(interval) for name, interval in found.items()}
            for variant, found in intervals.items()
        },
        "score_gained_by_own": gained,
        "gain_by_history_length": _by_length(of, seed=seed) if saved else [],
        **({"ranking": _ranking(of, users, seed=seed)} if "rejected_nats" in losses else {}),
    }


def ranked(nats_R: np.ndarray, rejected_R: np.ndarray) -> np.ndarray:
    """Whether each target is likelier than its rejected text (R,): 1, or 0, or 0.5 where neither is."""
    outcomes_R: np.ndarray = (np.sign(rejected_R - nats_R) + 1) / 2
    return outcomes_R


def outcomes(of: Mapping[str, Columns]) -> dict[str, dict[str, np.ndarray]]:
    """By kind of persona, `ranked` in two ways, from columns `nats` and `rejected_nats` in one order of requests.

    `likelier` compares the nats of the two texts, which also tells a text that is likely whoever wrote it; `calibrated`
    what each text owes to the history: its nats less those without any, where `none` was measured.
    """
    nats = {p: (np.array(rows["nats"]), np.array(rows["rejected_nats"])) for p, rows in of.items()}
    found = {p: {"likelier": ranked(*pair)} for p, pair in nats.items()}
    for p in (p for p in _BY_HISTORY if p in nats and "none" in nats):
        found[p]["calibrated"] = ranked(nats[p][0] - nats["none"][0], nats[p][1] - nats["none"][1])
    return found


def shown(losses: Columns, personas: Sequence[str]) -> dict[str, list[str]]:
    """Ids of requests to be looked at: `even` ones, `largest_gains`, `largest_losses`, and one a user to `map`.

    A gain is what the own persona saves a token, against another user's where that was measured; without the own
    persona beside another kind there are only `even` ones.
    """
    of = {p: _of(losses, p) for p in personas}
    first = of[personas[0]]
    ids = list(first["request_id"])
    n_shown = min(N_EXAMPLES, len(ids))
    gap = len(ids) // n_shown
    # One further each time, since users may ask alike in order.
    found = {
        "even": [ids[k * len(ids) // n_shown + k % gap] for k in range(n_shown)],
        "largest_gains": [],
        "largest_losses": [],
        "map": [],
    }
    against = _against(personas)
    if against is not None:
        saved = _saved(of, against)
        order = sorted(range(len(ids)), key=lambda i: (-saved[i], ids[i]))
        found["largest_gains"] = [ids[i] for i in order[:N_EXTREMES] if saved[i] > 0]
        found["largest_losses"] = [ids[i] for i in reversed(order[-N_EXTREMES:]) if saved[i] < 0]
        of_users = {user: request for request, user in zip(ids, first["user_id"], strict=True)}
        mapped = [of_users[user] for user in sorted(of_users)]
        found["map"] = mapped[:: max(1, len(mapped) // N_MAPPED)][:N_MAPPED]
    return found


def example(losses: Columns, personas: Sequence[str], answers: Answers, request_id: str, text: str) -> dict[str, Any]:
    """One request side by side: its input, the answers, the target, and nats a token under each kind of persona."""
    rows = {p: _row(losses, p, request_id) for p in personas}
    one = rows[personas[0]]
    return {
        "request_id": request_id,
        "user_id": one["user_id"],
        "input": text,
        **{variant: outputs[request_id] for variant, outputs in answers.items()},
        "target": one["target"],
        "n_behaviors": one["n_behaviors"],
        "nats_a_token": {p: round(row["nats"] / row["tokens"], 5) for p, row in rows.items()},
    }


def listened_to(seen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The behaviors that weigh most in a request (`behavior_id`, `timestamp`, `weights`, perhaps `texts`: n each)."""
    texts = seen.get("texts") or [None] * len(seen["weights"])
    order = sorted(range(len(seen["weights"])), key=lambda i: -seen["weights"][i])[:N_LISTENED]
    return [
        {
            "behavior_id": seen["behavior_id"][i],
            "written": None if seen["timestamp"][i] is None else str(seen["timestamp"][i].date()),
            "weight": round(seen["weights"][i], 5),
            "text": None if texts[i] is None else shorten(texts[i], N_CHARACTERS),
        }
        for i in order
    ]


def persona_map(
    personas_UF: np.ndarray, users: Sequence[str], losses: Columns, personas: Sequence[str]
) -> list[dict[str, Any]]:
    """Each user's place on the two directions in which personas differ most, and what the own persona saves there.

    Empty for fewer than three users, and where the own persona was not measured beside another kind.
    """
    against = _against(personas)
    if len(users) < 3 or against is None:
        return []
    centred_UF = personas_UF - personas_UF.mean(0)
    left_U, strength, _ = np.linalg.svd(centred_UF, full_matrices=False)
    places_U2 = (left_U * strength)[:, :2]
    places_U2 = places_U2 / max(float(np.abs(places_U2).max()), 1e-12)
    of = {p: _of(losses, p) for p in personas}
    own, saved = of["own"], _saved(of, against)
    number = {user: i for i, user in enumerate(users)}
    of_user: list[list[float]] = [[] for _ in users]
    n_behaviors = [0] * len(users)
    for user, gain, n in zip(own["user_id"], saved, own["n_behaviors"], strict=True):
        if user in number:
            of_user[number[user]].append(float(gain))
            n_behaviors[number[user]] = max(n_behaviors[number[user]], n)
    return [
        {
            "user_id": user,
            "x": round(float(places_U2[i, 0]), 4),
            "y": round(float(places_U2[i, 1]), 4) if places_U2.shape[1] > 1 else 0.0,
            "saved": round(float(np.mean(of_user[i])), 5),
            "n_behaviors": n_behaviors[i],
        }
        for i, user in enumerate(users)
    ]


def _ranking(of: Mapping[str, Columns], users: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Shares of the requests whose target is likelier than the rejected text, with intervals over users."""
    return {
        p: {name: _plain(bootstrap(values_R, users, seed=seed)) for name, values_R in ways.items()}
        for p, ways in outcomes(of).items()
    }


def _by_length(of: Mapping[str, Columns], *, seed: int) -> list[dict[str, Any]]:
    """What the own persona saves against each other kind, for requests whose visible history is about as long."""
    own = of["own"]
    groups = np.searchsorted(_LENGTHS, own["n_behaviors"], side="right") - 1
    rows = []
    for group in sorted(set(groups.tolist())):
        mine = np.flatnonzero(groups == group).tolist()
        users = [own["user_id"][i] for i in mine]
        tokens = np.array(own["tokens"])[mine]
        lengths = np.array(own["n_behaviors"])[mine]
        saved = {
            p: _plain(
                paired_bootstrap(
                    np.array(rest["nats"])[mine], np.array(own["nats"])[mine], users, weights=tokens, seed=seed
                )
            )
            for p, rest in of.items()
            if p != "own"
        }
        rows.append(
            {
                "from": int(lengths.min()),
                "to": int(lengths.max()),
                "requests": len(mine),
                "users": len(set(users)),
                "saved_by_own": saved,
            }
        )
    return rows


def _of(losses: Columns, persona: str) -> dict[str, list[Any]]:
    """The rows of one kind of persona, in the order of the request ids."""
    mine = [i for i, one in enumerate(losses["persona"]) if one == persona]
    mine.sort(key=lambda i: losses["request_id"][i])
    return {name: [values[i] for i in mine] for name, values in losses.items()}


def _row(losses: Columns, persona: str, request_id: str) -> dict[str, Any]:
    pairs = zip(losses["persona"], losses["request_id"], strict=True)
    place = next(i for i, pair in enumerate(pairs) if pair == (persona, request_id))
    return {name: values[place] for name, values in losses.items()}


def _against(personas: Sequence[str]) -> str | None:
    """Whom the own persona is measured against: another user's if it can be, who has a history, too."""
    if "own" not in personas:
        return None
    return next((p for p in ("other", "none", "mean") if p in personas), None)


def _saved(of: Mapping[str, Columns], against: str) -> np.ndarray:
    """Nats a token (R,) that the own persona saves."""
    tokens = np.array(of["own"]["tokens"])
    saved: np.ndarray = (np.array(of[against]["nats"]) - np.array(of["own"]["nats"])) / tokens
    return saved


def _better_first(name: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Any, Any]:
    """Two scores in the order in which a positive difference speaks for `own`."""
    return (other[name], own[name]) if name in _SMALLER_IS_BETTER else (own[name], other[name])


def _plain(interval: Interval) -> dict[str, float]:
    return {name: round(value, 5) for name, value in asdict(interval).items()}
