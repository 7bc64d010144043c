"""Plugs over time: the loss of each version of a plug on the same held-out requests, for the report.

The requests are those that the evaluations share. A version whose evaluation has fewer than half of the newest one's
requests, or another LLM, is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from persona.errors import InputError
from persona.evaluation.gate import OWN, SharedRows, shared_rows
from persona.evaluation.intervals import bootstrap, paired_bootstrap
from persona.evaluation.saved_run import Evaluation

_LEAST_SHARED = 0.5  # of the requests of the newest evaluation


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a plug: its number (None if it was not proposed yet), stage, day of that stage, and evaluation."""

    number: int | None
    stage: str
    since: str
    fingerprint: str
    evaluation: Evaluation


def over_time(versions: Sequence[Version], newest: Version, *, seed: int = 0) -> dict[str, Any] | None:
    """Losses under the own persona, and what `newest` saves against each; plain values for JSON.

    None if there is nothing to compare `newest` with.
    """
    if OWN not in newest.evaluation.losses:
        return None
    kept, rows = [newest], None
    for version in sorted(versions, key=lambda one: one.number or 0, reverse=True):
        found = _shared([*(one.evaluation for one in kept), version.evaluation])
        if found is not None:
            kept, rows = [*kept, version], found
    if rows is None:
        return None
    losses = list(zip(kept, rows.nats, strict=True))
    mine_R = rows.nats[0]
    return {
        "requests": len(rows.users),
        "users": len(set(rows.users)),
        "left_out": sorted(one.number for one in versions if one not in kept and one.number is not None),
        "rows": [
            {
                "version": version.number,
                "stage": version.stage,
                "since": version.since,
                "fingerprint": version.fingerprint,
                "loss": bootstrap(nats_R, rows.users, weights=rows.tokens, seed=seed).rounded(),
                "saved_by_newest": None
                if version is newest
                else paired_bootstrap(nats_R, mine_R, rows.users, weights=rows.tokens, seed=seed).rounded(),
            }
            for version, nats_R in sorted(losses, key=lambda pair: (pair[0] is newest, pair[0].number or 0))
        ],
    }


def _shared(evaluations: Sequence[Evaluation]) -> SharedRows | None:
    """The rows that all have, if they are enough."""
    if not all(OWN in one.losses for one in evaluations):
        return None
    try:
        found = shared_rows(evaluations)
    except InputError:
        return None
    n_newest = evaluations[0].losses[OWN].num_rows
    return found if len(found.users) >= _LEAST_SHARED * n_newest else None
