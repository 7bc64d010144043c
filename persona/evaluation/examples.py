"""The single requests and users that a report shows: evenly spaced ones, the largest gains and losses, a map of users.

Shapes: R requests, in the order of their ids; U users; F values of a persona (all its soft tokens).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import numpy as np

from persona.evaluation.intervals import Floats
from persona.evaluation.losses import Columns, PersonaLosses, by_persona
from persona.evaluation.one_run import Answers

N_EVEN = 6
N_EXTREMES = 4
N_MAPPED = 200
N_BEHAVIORS = 5
N_CHARACTERS = 300  # of a past text


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Request ids to show. A gain is what the own persona saves a token, against another user's if that was measured.

    Without the own persona and another kind to compare it with, all but `even` are empty.
    """

    even: list[str]
    """Evenly spaced over all requests."""
    largest_gains: list[str]
    largest_losses: list[str]
    mapped: list[str]
    """One request of each user on the map."""

    @property
    def examples(self) -> list[str]:
        """The requests that are shown with their texts."""
        return [*self.even, *self.largest_gains, *self.largest_losses]


def choose(losses: Columns, personas: Sequence[str]) -> Chosen:
    """The requests to show, of `losses` with the columns of `losses.by_persona`."""
    of = by_persona(losses, personas)
    first = of[personas[0]]
    ids = first.request_ids
    even = _evenly_spaced(ids)
    reference = _reference(personas)
    if reference is None:
        return Chosen(even=even, largest_gains=[], largest_losses=[], mapped=[])
    saved_R = _saved(of["own"], of[reference])
    order = sorted(range(len(ids)), key=lambda i: (-saved_R[i], ids[i]))
    last_request = dict(zip(first.users, ids, strict=True))
    mapped = [last_request[user] for user in sorted(last_request)]
    return Chosen(
        even=even,
        largest_gains=[ids[i] for i in order[:N_EXTREMES] if saved_R[i] > 0],
        largest_losses=[ids[i] for i in reversed(order[-N_EXTREMES:]) if saved_R[i] < 0],
        mapped=mapped[:: max(1, len(mapped) // N_MAPPED)][:N_MAPPED],
    )


def example(losses: Columns, personas: Sequence[str], answers: Answers, request_id: str, text: str) -> dict[str, Any]:
    """One request for the report: its input `text`, the answers, the target, and nats a token under each persona."""
    rows = {persona: _row(losses, persona, request_id) for persona in personas}
    first = rows[personas[0]]
    return {
        "request_id": request_id,
        "user_id": first["user_id"],
        "input": text,
        **{variant: outputs[request_id] for variant, outputs in answers.items()},
        "target": first["target"],
        "n_behaviors": first["n_behaviors"],
        "nats_a_token": {persona: round(row["nats"] / row["tokens"], 5) for persona, row in rows.items()},
    }


def heaviest_behaviors(seen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The behaviors with the largest weights in a request, largest first.

    Args:
        seen: lists of equal length: `behavior_id`, `timestamp`, `weights`, and perhaps `texts`.
    """
    weights = seen["weights"]
    texts = seen.get("texts") or [None] * len(weights)
    return [
        {
            "behavior_id": seen["behavior_id"][i],
            "written": None if seen["timestamp"][i] is None else str(seen["timestamp"][i].date()),
            "weight": round(weights[i], 5),
            "text": None if texts[i] is None else shorten(texts[i], N_CHARACTERS),
        }
        for i in sorted(range(len(weights)), key=lambda i: -weights[i])[:N_BEHAVIORS]
    ]


def persona_map(
    personas_UF: Floats, users: Sequence[str], losses: Columns, personas: Sequence[str]
) -> list[dict[str, Any]]:
    """Each user's place on the first two principal components of the personas, and what the own persona saves there.

    Empty for fewer than three users, and where the own persona was not measured along with another kind.
    """
    reference = _reference(personas)
    if len(users) < 3 or reference is None:
        return []
    of = by_persona(losses, personas)
    own, saved_R = of["own"], _saved(of["own"], of[reference])
    saved: dict[str, list[float]] = {user: [] for user in users}
    n_behaviors = dict.fromkeys(users, 0)
    for user, gain, n in zip(own.users, saved_R.tolist(), own.n_behaviors, strict=True):
        if user in saved:
            saved[user].append(gain)
            n_behaviors[user] = max(n_behaviors[user], n)
    return [
        {
            "user_id": user,
            "x": round(float(x), 4),
            "y": round(float(y), 4),
            "saved": round(float(np.mean(saved[user])), 5),
            "n_behaviors": n_behaviors[user],
        }
        for user, (x, y) in zip(users, _principal_plane(personas_UF), strict=True)
    ]


def _principal_plane(personas_UF: Floats) -> Floats:
    """Coordinates (U, 2) on the first two principal components, scaled to at most 1; a missing second one is 0."""
    left_UC, strength_C, _ = np.linalg.svd(personas_UF - personas_UF.mean(0), full_matrices=False)
    scores_UC = (left_UC * strength_C)[:, :2]
    plane_U2 = np.zeros((len(personas_UF), 2))
    plane_U2[:, : scores_UC.shape[1]] = scores_UC / max(float(np.abs(scores_UC).max()), 1e-12)
    return plane_U2


def _evenly_spaced(ids: Sequence[str]) -> list[str]:
    n = min(N_EVEN, len(ids))
    gap = len(ids) // n
    # A shift of one more each time: with equally many requests a user, the same kind of request would come up again.
    return [ids[k * len(ids) // n + k % gap] for k in range(n)]


def _row(losses: Columns, persona: str, request_id: str) -> dict[str, Any]:
    pairs = zip(losses["persona"], losses["request_id"], strict=True)
    row = next(i for i, pair in enumerate(pairs) if pair == (persona, request_id))
    return {name: values[row] for name, values in losses.items()}


def _reference(personas: Sequence[str]) -> str | None:
    """What the own persona is compared with: another user's if measured, since that is made from a history as well."""
    if "own" not in personas:
        return None
    return next((persona for persona in ("other", "none", "mean") if persona in personas), None)


def _saved(own: PersonaLosses, reference: PersonaLosses) -> Floats:
    """Nats a token (R,) that the own persona saves."""
    saved_R: Floats = (reference.nats_R - own.nats_R) / own.tokens_R
    return saved_R
