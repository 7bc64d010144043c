"""Derive requests from users' own histories: ask for each text from the user's older ones, without any labels.

The `as_of` of a request is the time of its text, so the request sees only strictly older behaviors of its user: neither
the target itself nor anything later.
"""

import hashlib
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from persona.inputs.histories import latest
from persona.inputs.requests import REJECTED, SCHEMA

Row = dict[str, Any]
Task = Literal["next_text", "opening", "titled", "which"]

REQUESTS = pa.schema([*(field for field in SCHEMA if field.name not in ("bucket", "system")), REJECTED])
_READ = ["user_id", "behavior_id", "text", "timestamp"]
# A sentence ends before a space, a line or the text does; in Chinese and Japanese without a space.
_SENTENCE = re.compile(r".+?(?:[.!?…](?=\s)|[。！？]|(?=\n)|\Z)", re.DOTALL)
_LOOKED_AT = 1024  # texts around one in time, in search of other users' texts


@dataclass(frozen=True, kw_only=True)
class RequestRule:
    """How texts become requests; the fields are the flags of jobs.make_requests.

    Attributes:
        task: what is asked for. `next_text`: the text, or its rest behind `opening_words` words. `opening`: its first
            `opening_words` words, or its first sentence. `titled`: what follows the first line, which is given.
            `which`: the text among `candidates`, of which all but one are by other users, of about the same time.
    """

    ask: str
    task: Task = "next_text"
    opening_words: int
    min_history: int
    max_a_user: int
    candidates: int = 2


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A behavior in time: its row, what a request shows of it, and what it asks for (empty if there is nothing)."""

    row: Row
    shown: str
    target: str


def requests_of(behaviors: pa.Table, rule: RequestRule) -> tuple[pa.Table, dict[str, int]]:
    """Requests (`REQUESTS`) derived from all behaviors of some users (`histories.SCHEMA`), and counts.

    The latest `max_a_user` eligible texts of each user become requests. The counts say how many `requests` there are,
    and why other behaviors became none: without a timestamp (`untimed`), too few older behaviors (`early`), nothing to
    ask for (`short`), older than the latest ones (`older`), no text of another user to choose from (`alone`).

    The column `rejected` holds what the rule makes of a text by another user, of about the same time; null for
    `titled`, where it would belong to another title, and if there is no such text.
    """
    rows = latest(behaviors).select(_READ).to_pylist()
    timed = [_text(row, rule) for row in rows if row["timestamp"] is not None]
    timed.sort(key=lambda text: (text.row["timestamp"], text.row["user_id"], text.row["behavior_id"]))
    by_user: dict[str, list[_Text]] = defaultdict(list)
    for text in timed:
        by_user[text.row["user_id"]].append(text)
    counts = Counter({"untimed": len(rows) - len(timed), "early": 0, "short": 0, "older": 0, "alone": 0})
    others = None if rule.task == "titled" else _Others(timed)
    requests = [
        request
        for user in sorted(by_user)
        for text in _eligible(by_user[user], rule, counts)
        if (request := _request(text, rule, others, by_user[user], counts)) is not None
    ]
    return pa.Table.from_pylist(requests, REQUESTS), {**counts, "requests": len(requests)}


def are_held_out(user_ids: pa.ChunkedArray, share: float) -> pa.Array:
    """Whether each user is one of the held-out ones, about this share of all: always the same, by a hash of the id."""
    distinct = pc.unique(user_ids)
    digests = [
        hashlib.blake2b(user.encode(), digest_size=8, person=b"held out").digest() for user in distinct.to_pylist()
    ]
    held_out = np.array([int.from_bytes(digest, "big") < share * 2**64 for digest in digests], dtype=bool)
    return pc.is_in(user_ids, distinct.filter(pa.array(held_out)))


def _text(row: Row, rule: RequestRule) -> _Text:
    text, n_words = row["text"].strip(), rule.opening_words
    shown, target = "", text
    match rule.task:
        case "next_text" if n_words:
            words = text.split(maxsplit=n_words)
            shown, target = " ".join(words[:n_words]), words[n_words] if len(words) > n_words else ""
        case "opening":
            sentence = _SENTENCE.match(text)
            target = " ".join(text.split()[:n_words]) if n_words else sentence[0].strip() if sentence else ""
        case "titled":
            # Not of the stripped text: its first line is empty if there is no title.
            title, _, body = row["text"].partition("\n")
            shown, target = title.strip(), body.strip() if title.strip() else ""
        case "which":
            target = " ".join(text.split()[: n_words or None])
    return _Text(row=row, shown=shown, target=target)


def _eligible(texts: Sequence[_Text], rule: RequestRule, counts: Counter[str]) -> Sequence[_Text]:
    """The texts of one user, in order of time, that become requests; the others are counted."""
    times = [text.row["timestamp"] for text in texts]
    found = []
    for text in texts:
        if bisect_left(times, text.row["timestamp"]) < rule.min_history:
            counts["early"] += 1
        elif not text.target:
            counts["short"] += 1
        else:
            found.append(text)
    counts["older"] += max(len(found) - rule.max_a_user, 0)
    return found[-rule.max_a_user :]


def _request(
    text: _Text, rule: RequestRule, others: "_Others | None", own: Sequence[_Text], counts: Counter[str]
) -> Row | None:
    """The request for a text; None, which is counted, if there are not enough candidates."""
    row, shown, target = text.row, text.shown, text.target
    request_id = _request_id(row, rule.task)
    n_others = rule.candidates - 1 if rule.task == "which" else 1
    near = others.near(text, {one.target for one in own}, n_others) if others else []
    rejected = near[0] if near else None
    if rule.task == "which":
        if len(near) < n_others:
            counts["alone"] += 1
            return None
        place = int(request_id[:8], 16) % rule.candidates
        candidates = [*near[:place], target, *near[place:]]
        target, rejected = f"[{place + 1}]", f"[{candidates.index(near[0]) + 1}]"
        shown = "\n".join(f"[{number}]: {candidate}" for number, candidate in enumerate(candidates, start=1))
    return {
        "request_id": request_id,
        "user_id": row["user_id"],
        "input": f"{rule.ask}\n{shown}" if shown else rule.ask,
        "query": shown or rule.ask,
        "target": target,
        "as_of": row["timestamp"],
        "rejected": rejected,
    }


def _request_id(row: Row, task: Task) -> str:
    # The answers to two tasks must not replace each other in a store.
    key = f"{row['user_id']}\0{row['behavior_id']}" + (f"\0{task}" if task != "next_text" else "")
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


class _Others:
    """The texts of all users in order of time, to find some near another one."""

    def __init__(self, timed: Sequence[_Text]) -> None:
        self._timed = timed
        self._times = [text.row["timestamp"] for text in timed]

    def near(self, text: _Text, own: set[str], n: int) -> list[str]:
        """The targets of `n` other users' texts, nearest in time first, each of another user and none in `own`."""
        users = {text.row["user_id"]}
        found: list[str] = []
        for other in self._outwards(text.row["timestamp"]):
            if len(found) == n:
                break
            if other.row["user_id"] not in users and other.target and other.target not in own | {*found}:
                users.add(other.row["user_id"])
                found.append(other.target)
        return found

    def _outwards(self, time: Any) -> Iterator[_Text]:
        """The texts around a time, by distance; of two at the same distance the earlier one first."""
        after = bisect_left(self._times, time)
        before = after - 1
        for _ in range(_LOOKED_AT):
            has_before, has_after = before >= 0, after < len(self._times)
            if has_before and (not has_after or time - self._times[before] <= self._times[after] - time):
                yield self._timed[before]
                before -= 1
            elif has_after:
                yield self._timed[after]
                after += 1
            else:
                return
