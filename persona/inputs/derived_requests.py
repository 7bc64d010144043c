"""Derive requests from users' own histories: predict each behavior from the earlier ones, without any labels.

The `as_of` of a request is the time of its behavior, so the request sees only strictly older behaviors: neither the
target itself nor anything later.
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

REQUESTS = pa.schema([field for field in SCHEMA if field.name not in ("bucket", "system")])
_READ = ["user_id", "behavior_id", "text", "timestamp"]


@dataclass(frozen=True, kw_only=True)
class RequestRule:
    """How behaviors become requests; the fields are the flags of jobs.make_requests."""

    ask: str
    opening_words: int
    min_history: int
    max_a_user: int


def requests_of(behaviors: pa.Table, rule: RequestRule) -> tuple[pa.Table, dict[str, int]]:
    """Requests (`REQUESTS`) derived from all behaviors of some users (`histories.SCHEMA`), and counts.

    The latest `max_a_user` eligible behaviors of each user become requests. The counts say how many `requests` there
    are, and why other behaviors became none: without a timestamp (`untimed`), too few older behaviors (`early`), no
    text left after the opening (`short`), older than the latest ones (`older`).
    """
    rows = latest(behaviors).select(_READ).to_pylist()
    timed = [row for row in rows if row["timestamp"] is not None]
    counts = {"untimed": len(rows) - len(timed), "early": 0, "short": 0, "older": 0}
    by_user: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(timed, key=lambda row: (row["timestamp"], row["behavior_id"])):
        by_user[row["user_id"]].append(row)
    chosen: list[Row] = []
    for user in sorted(by_user):
        times = [row["timestamp"] for row in by_user[user]]
        eligible = []
        for row in by_user[user]:
            opening, target = _split(row["text"], rule.opening_words)
            if bisect_left(times, row["timestamp"]) < rule.min_history:
                counts["early"] += 1
            elif not target:
                counts["short"] += 1
            else:
                eligible.append(_request(row, opening, target, rule.ask))
        counts["older"] += max(len(eligible) - rule.max_a_user, 0)
        chosen += eligible[-rule.max_a_user :]
    return pa.Table.from_pylist(chosen, REQUESTS), {**counts, "requests": len(chosen)}


def _request(row: Row, opening: str, target: str, ask: str) -> Row:
    key = f"{row['user_id']}\0{row['behavior_id']}"
    return {
        "request_id": hashlib.blake2b(key.encode(), digest_size=16).hexdigest(),
        "user_id": row["user_id"],
        "input": f"{ask}\n{opening}" if opening else ask,
        "query": opening or ask,
        "target": target,
        "as_of": row["timestamp"],
    }


def _split(text: str, n_words: int) -> tuple[str, str]:
    """The first `n_words` words of a text, and the rest."""
    parts = text.split(maxsplit=n_words)
    if not n_words:
        return "", text.strip()
    return " ".join(parts[:n_words]), parts[n_words] if len(parts) > n_words else ""
