"""The losses of an evaluation by kind of persona: one value a request, in the same order for every kind.

Shapes: R requests, in the order of their ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona.evaluation.intervals import Floats

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class PersonaLosses:
    """All requests under one kind of persona; losses are nats summed over the tokens of the target."""

    request_ids: list[str]
    users: list[str]
    targets: list[str]
    n_behaviors: list[int]
    nats_R: Floats
    tokens_R: Floats
    rejected_nats_R: Floats | None = None
    """Nats of the rejected texts, where they were measured."""


def by_persona(losses: Columns, personas: Sequence[str]) -> dict[str, PersonaLosses]:
    """Sorts out `losses`, whose rows are in any order.

    Args:
        losses: columns with a row for each request and kind of persona: request_id, user_id, persona, target, nats,
            tokens, n_behaviors and perhaps rejected_nats.
        personas: the kinds of persona, in the order of the result.
    """
    return {persona: _of(losses, persona) for persona in personas}


def _of(losses: Columns, persona: str) -> PersonaLosses:
    rows = [i for i, kind in enumerate(losses["persona"]) if kind == persona]
    rows.sort(key=lambda i: losses["request_id"][i])

    def column(name: str) -> list[Any]:
        return [losses[name][i] for i in rows]

    return PersonaLosses(
        request_ids=column("request_id"),
        users=column("user_id"),
        targets=column("target"),
        n_behaviors=column("n_behaviors"),
        nats_R=np.array(column("nats"), dtype=np.float64),
        tokens_R=np.array(column("tokens"), dtype=np.float64),
        rejected_nats_R=np.array(column("rejected_nats"), dtype=np.float64) if "rejected_nats" in losses else None,
    )
