"""Requests made from users' own histories: each behavior asked for from those before it, so that no label is needed.

A request is placed in time just at its behavior: it sees what is strictly older, so neither the behavior itself nor
anything later.
"""

import hashlib
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from persona.inputs.histories import latest
from persona.inputs.requests import SCHEMA

Row = dict[str, Any]

REQUESTS = pa.schema([field for field in SCHEMA if field.name != "bucket"])
_READ = ["user_id", "behavior_id", "text", "timestamp"]


@dataclass(frozen=True, kw_only=True)
class RequestRule:
    """How behaviors become requests; the job's flags of the same names say what is what."""

    ask: str
    opening_words: int
    min_history: int
    max_a_user: int


def requests_of(behaviors: pa.Table, rule: RequestRule) -> tuple[pa.Table, dict[str, int]]:
    """The requests (`REQUESTS`) of the behaviors of whole users (`histories.SCHEMA`), and counts.

    Of a user's behaviors that have enough older ones, the latest `max_a_user` become requests. Counted are behaviors
    `untimed` (they cannot be placed), with too few older ones (`early`), `short` (nothing is left behind the opening),
    and `older` than the latest that are taken.
    """
    rows = latest(behaviors).select(_READ).to_pylist()
    timed = [row for row in rows if row["timestamp"] is not None]
    counts = {"untimed": len(rows) - len(timed), "early": 0, "short": 0, "older": 0}
    of_users: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(timed, key=lambda row: (row["timestamp"], row["behavior_id"])):
        of_users[row["user_id"]].append(row)
    chosen: list[Row] = []
    for user in sorted(of_users):
        times = [row["timestamp"] for row in of_users[user]]
        made = []
        for row in of_users[user]:
            opening, target = _split(row["text"], rule.opening_words)
            if bisect_left(times, row["timestamp"]) < rule.min_history:
                counts["early"] += 1
            elif not target:
                counts["short"] += 1
            else:
                made.append(_request(row, opening, target, rule.ask))
        counts["older"] += max(len(made) - rule.max_a_user, 0)
        chosen += made[-rule.max_a_user :]
    return pa.Table.from_pylist(chosen, REQUESTS), {**counts, "requests": len(chosen)}


def _request(row: Row, opening: str, target: str, ask: str) -> Row:
    key = f"{row['user_id']}\0{row['behavior_id']}"
    asked = f"{ask}\n{opening}" if opening else ask
    return {
        "request_id": hashlib.blake2b(key.encode(), digest_size=16).hexdigest(),
        "user_id": row["user_id"],
        "input": asked,
        "query": opening or ask,
        "target": target,
        "as_of": row["timestamp"],
    }


def _split(text: str, n_words: int) -> tuple[str, str]:
    """The first words of a text, and the rest."""
    parts = text.split(maxsplit=n_words)
    if not n_words:
        return "", text.strip()
    return " ".join(parts[:n_words]), parts[n_words] if len(parts) > n_words else ""
