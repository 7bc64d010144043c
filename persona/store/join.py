"""Requests meet histories: each request gets the vectors of the behaviors that it may see, and no others.

Vectors are many and requests few, so vectors are not moved: whoever has the requests of a bucket reads that
bucket's behaviors of their users from the store. Shape suffixes: N behaviors, U users.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from persona.options import PersonaKind
from persona.store.store import Store

_NEVER = np.iinfo(np.int64).max  # stands for a missing timestamp, behind all others
_OTHER_BUCKETS = 16  # how many buckets are searched for another user before a request goes without
_EMPTY = memoryview(b"")
_Place = tuple[int, str]  # a bucket, and a user in it


def join_histories(
    requests: pa.Table,
    store: Store,
    bucket: int,
    *,
    persona: PersonaKind,
    max_behaviors: int,
    with_vectors: bool = True,
) -> pa.Table:
    """The requests of one bucket with the history that each may see, in the order they came.

    Adds `history` (large_binary: n·2·d bytes, float16 vectors, oldest first), `n_behaviors` and `n_untimed`
    (int32; behaviors not used because the request has an `as_of` and they have no timestamp), and
    `history_hash` (over the keys and text hashes of what is seen: when it is the same, so is the history).
    With an `as_of`, only strictly older behaviors are seen; of what is seen the last `max_behaviors`.

    `own` and `mean` see the user's own history (they differ in how the plug weighs it), `none` and `bare` an empty one
    (of which `bare` does not even tell the plug),
    `other` that of the user who is next by id, around the bucket and then in those behind it, and has
    anything to see at that time. Without vectors there is no `history`, and only keys are read.
    """
    users = requests["user_id"].to_pylist()
    as_of = requests["as_of"].cast(pa.int64()).to_pylist()
    places: list[_Place | None]
    if persona is PersonaKind.OTHER:
        places = _others(store, bucket, users, as_of)
    else:
        places = [None if persona.sees_no_history else (bucket, user) for user in users]

    seen = [_Seen() for _ in users]
    for source in sorted({place[0] for place in places if place is not None}):
        mine = [(i, place[1]) for i, place in enumerate(places) if place is not None and place[0] == source]
        of_users = sorted({user for _, user in mine})
        histories = _Histories.of(store.read_histories(source, of_users, with_vectors=with_vectors))
        for i, user in mine:
            seen[i] = histories.see(user, as_of[i], max_behaviors)
    if with_vectors:
        requests = requests.append_column("history", _concatenated([s.vectors for s in seen]))
    return (
        requests.append_column("n_behaviors", pa.array([s.n_behaviors for s in seen], pa.int32()))
        .append_column("n_untimed", pa.array([s.n_untimed for s in seen], pa.int32()))
        .append_column("history_hash", pa.array([_digest(s.keys) for s in seen], pa.string()))
    )


def seen_rows(
    requests: pa.Table, store: Store, bucket: int, *, max_behaviors: int, with_vectors: bool = False
) -> list[pa.Table]:
    """For each request the store's rows of the own history that `join_histories` lets it see, in the same order."""
    users = requests["user_id"].to_pylist()
    as_of = requests["as_of"].cast(pa.int64()).to_pylist()
    rows = store.read_histories(bucket, sorted(set(users)), with_vectors=with_vectors)
    histories = _Histories.of(rows)
    spans = [histories.span(user, limit, max_behaviors) for user, limit in zip(users, as_of, strict=True)]
    return [rows.slice(first, end - first) for first, end, _ in spans]


@dataclass(frozen=True)
class _Seen:
    """What one request sees: parts of buffers, nothing copied."""

    vectors: memoryview = _EMPTY
    keys: memoryview = _EMPTY
    n_behaviors: int = 0
    n_untimed: int = 0


@dataclass(frozen=True)
class _Histories:
    """Users' behaviors as `Store.read_histories` sorts them; rows `start_U[i]` to `start_U[i + 1]` are user i's."""

    number: Mapping[str, int]
    start_U: np.ndarray
    time_N: np.ndarray  # microseconds since 1970, or _NEVER
    vectors: Callable[[int, int], memoryview]
    keys: Callable[[int, int], memoryview]

    @staticmethod
    def of(rows: pa.Table) -> "_Histories":
        users, start_U = _runs(rows)
        parts = [rows[name].cast(pa.large_string()) for name in ("user_id", "behavior_id", "text_hash")]
        return _Histories(
            number={user: i for i, user in enumerate(users)},
            start_U=start_U,
            time_N=_times(rows),
            vectors=_spans(rows["vector"]) if "vector" in rows.column_names else lambda _first, _end: _EMPTY,
            keys=_spans(pc.binary_join_element_wise(*parts, pa.scalar("\0", pa.large_string()))),
        )

    def see(self, user: str, as_of: int | None, max_behaviors: int) -> _Seen:
        first, end, n_untimed = self.span(user, as_of, max_behaviors)
        return _Seen(self.vectors(first, end), self.keys(first, end), end - first, n_untimed)

    def span(self, user: str, as_of: int | None, max_behaviors: int) -> tuple[int, int, int]:
        """First row and end of what is seen, and how many rows are not seen for want of a timestamp."""
        if user not in self.number:
            return 0, 0, 0
        first, end = self.start_U[self.number[user] :][:2]
        n_untimed = 0
        if as_of is not None:
            time_N = self.time_N[first:end]
            n_untimed = int(np.count_nonzero(time_N == _NEVER))
            end = first + np.searchsorted(time_N, as_of, side="left")
        return int(max(first, end - max_behaviors)), int(end), n_untimed


def _others(store: Store, bucket: int, users: Sequence[str], as_of: Sequence[int | None]) -> list[_Place | None]:
    """For each request somebody else who has a behavior to see; None where nobody near has."""
    found: list[_Place | None] = [None] * len(users)
    filled = store.buckets()
    around = [b for b in filled if b >= bucket] + [b for b in filled if b < bucket]
    for source in around[:_OTHER_BUCKETS]:
        open_requests = [i for i, place in enumerate(found) if place is None]
        if not open_requests:
            break
        rows = store.read_histories(source, with_vectors=False)
        names, start_U = _runs(rows)
        earliest_U = _times(rows)[start_U[:-1]]
        for i in open_requests:
            limit = as_of[i]
            able = np.arange(len(names)) if limit is None else np.flatnonzero(earliest_U < limit)
            after = int(np.searchsorted(able, bisect_right(names, users[i])))
            # Around the ids, from the one behind the user's own, which comes last.
            nearest = names[able[after % len(able)]] if len(able) else users[i]
            if nearest != users[i]:
                found[i] = (source, nearest)
    return found


def _runs(rows: pa.Table) -> tuple[list[str], np.ndarray]:
    """The users of sorted rows, and where each begins (and the last ends)."""
    if not rows.num_rows:
        return [], np.zeros(1, np.int64)
    runs = pc.run_end_encode(rows["user_id"].combine_chunks())
    return runs.values.to_pylist(), np.concatenate([[0], runs.run_ends.to_numpy()]).astype(np.int64)


def _times(rows: pa.Table) -> np.ndarray:
    return np.asarray(rows["timestamp"].cast(pa.int64()).fill_null(_NEVER).to_numpy())


def _spans(column: pa.ChunkedArray) -> Callable[[int, int], memoryview]:
    """The bytes of rows `first` to `end` of a column of 64-bit offsets, as a view."""
    array = column.combine_chunks()
    _, offsets, data = array.buffers()
    place = np.frombuffer(offsets, np.int64)[array.offset :] if len(array) else np.zeros(1, np.int64)
    view = memoryview(data if data is not None else b"")
    return lambda first, end: view[place[first] : place[end]]


def _concatenated(pieces: Sequence[memoryview]) -> pa.Array:
    ends = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    data = pa.py_buffer(b"".join(pieces))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(pieces), [None, pa.py_buffer(ends), data])


def _digest(keys: memoryview) -> str:
    return hashlib.blake2b(keys, digest_size=16).hexdigest()
