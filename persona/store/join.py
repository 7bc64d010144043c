"""Join requests with histories: each request gets the vectors of the behaviors it may see.

Vectors are large and requests small, so vectors are not moved: the worker that has the requests of a bucket reads the
behaviors of their users from the store, those of one user once for all requests and kinds of persona. Shape suffixes:
N behaviors, U users.
"""

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from persona.options import PersonaKind
from persona.store.store import Store

_NO_TIME = np.iinfo(np.int64).max  # replaces a null timestamp; sorts last
_MAX_BUCKETS_SEARCHED = 16  # for another user, before a request gets an empty history
_EMPTY = memoryview(b"")
Source = tuple[int, str]
"""Bucket and user whose history a request sees."""


def join_histories(
    requests: pa.Table,
    store: Store,
    bucket: int,
    *,
    persona: PersonaKind,
    max_behaviors: int,
    with_vectors: bool = True,
) -> pa.Table:
    """The requests of one bucket, in their order, each with the history that it may see; see `with_histories`.

    `own` and `mean` see the user's own history (the plug weighs it differently), `none` and `bare` an empty one (`bare`
    runs without the plug), and `other` that of the next user by id who has a behavior to see at that time, wrapping
    around within the bucket and then searching the following buckets.

    Without `with_vectors`, only keys are read and the column `history` is absent.
    """
    found = sources(requests, store, bucket, persona)
    histories = Histories.read(store, found, with_vectors=with_vectors)
    return with_histories(requests, found, histories, max_behaviors=max_behaviors)


def sources(requests: pa.Table, store: Store, bucket: int, persona: PersonaKind) -> list[Source | None]:
    """For each request of a bucket, whose history it sees under a kind of persona; None for an empty history."""
    users = requests["user_id"].to_pylist()
    if persona is PersonaKind.OTHER:
        return _other_users(store, bucket, users, _microseconds(requests))
    return [None if persona.sees_no_history else (bucket, user) for user in users]


class Histories:
    """The stored behaviors of some users, in memory."""

    def __init__(self, of_bucket: "Mapping[int, _BucketHistories]", *, with_vectors: bool) -> None:
        """Use `read`."""
        self._of_bucket = of_bucket
        self.with_vectors = with_vectors

    @staticmethod
    def read(store: Store, wanted: Iterable[Source | None], *, with_vectors: bool) -> "Histories":
        """Reads the behaviors of the users of `wanted`, bucket by bucket, each user's once."""
        users: defaultdict[int, set[str]] = defaultdict(set)
        for source in wanted:
            if source is not None:
                users[source[0]].add(source[1])
        return Histories(
            {
                bucket: _BucketHistories(store.read_histories(bucket, sorted(names), with_vectors=with_vectors))
                for bucket, names in sorted(users.items())
            },
            with_vectors=with_vectors,
        )

    def visible(self, source: Source | None, as_of: int | None, max_behaviors: int) -> "_Visible":
        """What a request with that source and `as_of` (microseconds since 1970) sees."""
        return _Visible() if source is None else self._of_bucket[source[0]].visible(source[1], as_of, max_behaviors)


def with_histories(
    requests: pa.Table, found: Sequence[Source | None], histories: Histories, *, max_behaviors: int
) -> pa.Table:
    """The requests, each with the history of its source, as `sources` gives them, that it may see.

    With an `as_of`, a request sees only strictly older behaviors; of these, the last `max_behaviors`.

    Adds these columns:
    - `history` (large_binary): n·2·d bytes, float16 vectors, oldest first. Absent if `histories` has only keys.
    - `n_behaviors` (int32).
    - `n_untimed` (int32): behaviors skipped because the request has an `as_of` and they have no timestamp.
    - `history_hash` (string): over the keys and text hashes of the visible behaviors, so equal for equal histories.
    """
    visible = _visible(requests, found, histories, max_behaviors)
    if histories.with_vectors:
        requests = requests.append_column("history", _concatenated([v.vectors for v in visible]))
    return (
        requests.append_column("n_behaviors", pa.array([v.n_behaviors for v in visible], pa.int32()))
        .append_column("n_untimed", pa.array([v.n_untimed for v in visible], pa.int32()))
        .append_column("history_hash", pa.array([_digest(v.keys()) for v in visible], pa.string()))
    )


def with_vectors(
    requests: pa.Table, found: Sequence[Source | None], histories: Histories, *, max_behaviors: int
) -> pa.Table:
    """The column `history` of `with_histories` for requests that have been joined without vectors."""
    visible = _visible(requests, found, histories, max_behaviors)
    return requests.append_column("history", _concatenated([v.vectors for v in visible]))


def _visible(
    requests: pa.Table, found: Sequence[Source | None], histories: Histories, max_behaviors: int
) -> "list[_Visible]":
    pairs = zip(found, _microseconds(requests), strict=True)
    return [histories.visible(source, as_of, max_behaviors) for source, as_of in pairs]


def seen_rows(
    requests: pa.Table, store: Store, bucket: int, *, max_behaviors: int, with_vectors: bool = False
) -> list[pa.Table]:
    """For each request, the stored rows of the user's own history that `join_histories` shows it, in the same order."""
    users = requests["user_id"].to_pylist()
    as_of = _microseconds(requests)
    rows = store.read_histories(bucket, sorted(set(users)), with_vectors=with_vectors)
    histories = _BucketHistories(rows)
    ranges = [histories.visible_rows(user, limit, max_behaviors) for user, limit in zip(users, as_of, strict=True)]
    return [rows.slice(start, end - start) for start, end, _ in ranges]


@dataclass(frozen=True)
class _Visible:
    """What one request sees; views of shared buffers."""

    vectors: memoryview = _EMPTY
    n_behaviors: int = 0
    n_untimed: int = 0
    keys: Callable[[], memoryview] = lambda: _EMPTY


class _BucketHistories:
    """Behaviors as `Store.read_histories` sorts them; user i has rows `start_U[i]` to `start_U[i + 1]`."""

    def __init__(self, rows: pa.Table) -> None:
        users, self._start_U = _runs(rows)
        self._index = {user: i for i, user in enumerate(users)}
        self._time_N = _times(rows)
        has_vectors = "vector" in rows.column_names
        self._vectors = _byte_ranges(rows["vector"]) if has_vectors else lambda _start, _end: _EMPTY
        self._key_columns = [rows[name] for name in ("user_id", "behavior_id", "text_hash")]

    @cached_property
    def _keys(self) -> Callable[[int, int], memoryview]:
        parts = [column.cast(pa.large_string()) for column in self._key_columns]
        return _byte_ranges(pc.binary_join_element_wise(*parts, pa.scalar("\0", pa.large_string())))

    def visible(self, user: str, as_of: int | None, max_behaviors: int) -> _Visible:
        start, end, n_untimed = self.visible_rows(user, as_of, max_behaviors)
        return _Visible(self._vectors(start, end), end - start, n_untimed, lambda: self._keys(start, end))

    def visible_rows(self, user: str, as_of: int | None, max_behaviors: int) -> tuple[int, int, int]:
        """Start and end of the visible rows, and the number of rows skipped for a missing timestamp."""
        if user not in self._index:
            return 0, 0, 0
        start, end = self._start_U[self._index[user] :][:2]
        n_untimed = 0
        if as_of is not None:
            time_N = self._time_N[start:end]
            n_untimed = int(np.count_nonzero(time_N == _NO_TIME))
            end = start + np.searchsorted(time_N, as_of, side="left")
        return int(max(start, end - max_behaviors)), int(end), n_untimed


def _other_users(store: Store, bucket: int, users: Sequence[str], as_of: Sequence[int | None]) -> list[Source | None]:
    """For each request another user with a behavior to see; None when the searched buckets have none."""
    found: list[Source | None] = [None] * len(users)
    filled = store.buckets()
    in_search_order = [b for b in filled if b >= bucket] + [b for b in filled if b < bucket]
    for source_bucket in in_search_order[:_MAX_BUCKETS_SEARCHED]:
        open_requests = [i for i, source in enumerate(found) if source is None]
        if not open_requests:
            break
        names, earliest_U = _users_of(store, source_bucket)
        for i in open_requests:
            limit = as_of[i]
            candidates = np.arange(len(names)) if limit is None else np.flatnonzero(earliest_U < limit)
            after = int(np.searchsorted(candidates, bisect_right(names, users[i])))
            # Wrap around from the id after the user's own; the user itself comes last.
            nearest = names[candidates[after % len(candidates)]] if len(candidates) else users[i]
            if nearest != users[i]:
                found[i] = (source_bucket, nearest)
    return found


@dataclass(frozen=True)
class _FixedBucket:
    """A bucket of one version of the behaviors, which never changes."""

    uri: str
    version: int
    bucket: int
    store: Store = field(compare=False)


def _users_of(store: Store, bucket: int) -> tuple[list[str], np.ndarray]:
    """The users of a bucket, sorted, and the time of each one's earliest behavior; read once a process if fixed."""
    version = store.versions.get("behaviors")
    fixed = _FixedBucket(store.uri, -1 if version is None else version, bucket, store)
    return (_read_users.__wrapped__ if version is None else _read_users)(fixed)


@lru_cache(maxsize=2 * _MAX_BUCKETS_SEARCHED)
def _read_users(of: _FixedBucket) -> tuple[list[str], np.ndarray]:
    rows = of.store.read_histories(of.bucket, with_vectors=False)
    names, start_U = _runs(rows)
    return names, _times(rows)[start_U[:-1]]


def _microseconds(requests: pa.Table) -> list[int | None]:
    """`as_of` in microseconds since 1970."""
    times: list[int | None] = requests["as_of"].cast(pa.int64()).to_pylist()
    return times


def _runs(rows: pa.Table) -> tuple[list[str], np.ndarray]:
    """The users of sorted rows, and the first row of each, followed by the number of rows."""
    if not rows.num_rows:
        return [], np.zeros(1, np.int64)
    runs = pc.run_end_encode(rows["user_id"].combine_chunks())
    return runs.values.to_pylist(), np.concatenate([[0], runs.run_ends.to_numpy()]).astype(np.int64)


def _times(rows: pa.Table) -> np.ndarray:
    return np.asarray(rows["timestamp"].cast(pa.int64()).fill_null(_NO_TIME).to_numpy())


def _byte_ranges(column: pa.ChunkedArray) -> Callable[[int, int], memoryview]:
    """A function that returns the bytes of rows `start` to `end` of a column with 64-bit offsets, as a view."""
    array = column.combine_chunks()
    _, offset_buffer, data = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset :] if len(array) else np.zeros(1, np.int64)
    view = memoryview(data if data is not None else b"")
    return lambda start, end: view[offsets[start] : offsets[end]]


def _concatenated(pieces: Sequence[memoryview]) -> pa.Array:
    ends = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    data = pa.py_buffer(b"".join(pieces))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(pieces), [None, pa.py_buffer(ends), data])


def _digest(keys: memoryview) -> str:
    return hashlib.blake2b(keys, digest_size=16).hexdigest()
