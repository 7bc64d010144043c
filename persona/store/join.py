"""Join requests with histories: each request gets the vectors of the behaviors it may see.

Vectors are large and requests small, so vectors are not moved: the worker that has the requests of a bucket reads the
behaviors of their users from the store. Shape suffixes: N behaviors, U users.
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

_NO_TIME = np.iinfo(np.int64).max  # replaces a null timestamp; sorts last
_MAX_BUCKETS_SEARCHED = 16  # for another user, before a request gets an empty history
_EMPTY = memoryview(b"")
_Source = tuple[int, str]  # bucket and user whose history a request sees


def join_histories(
    requests: pa.Table,
    store: Store,
    bucket: int,
    *,
    persona: PersonaKind,
    max_behaviors: int,
    with_vectors: bool = True,
) -> pa.Table:
    """The requests of one bucket, in their order, each with the history that it may see.

    With an `as_of`, a request sees only strictly older behaviors; of these, the last `max_behaviors`. `own` and `mean`
    see the user's own history (the plug weighs it differently), `none` and `bare` an empty one (`bare` runs without the
    plug), and `other` that of the next user by id who has a behavior to see at that time, wrapping around within the
    bucket and then searching the following buckets.

    Adds these columns:
    - `history` (large_binary): n·2·d bytes, float16 vectors, oldest first. Absent without `with_vectors`, which reads
      keys only.
    - `n_behaviors` (int32).
    - `n_untimed` (int32): behaviors skipped because the request has an `as_of` and they have no timestamp.
    - `history_hash` (string): over the keys and text hashes of the visible behaviors, so equal for equal histories.
    """
    users = requests["user_id"].to_pylist()
    as_of = requests["as_of"].cast(pa.int64()).to_pylist()
    sources: list[_Source | None]
    if persona is PersonaKind.OTHER:
        sources = _other_users(store, bucket, users, as_of)
    else:
        sources = [None if persona.sees_no_history else (bucket, user) for user in users]

    visible = [_Visible() for _ in users]
    for source_bucket in sorted({source[0] for source in sources if source is not None}):
        in_bucket = [(i, source[1]) for i, source in enumerate(sources) if source and source[0] == source_bucket]
        source_users = sorted({user for _, user in in_bucket})
        histories = _Histories.of(store.read_histories(source_bucket, source_users, with_vectors=with_vectors))
        for i, user in in_bucket:
            visible[i] = histories.visible(user, as_of[i], max_behaviors)
    if with_vectors:
        requests = requests.append_column("history", _concatenated([v.vectors for v in visible]))
    return (
        requests.append_column("n_behaviors", pa.array([v.n_behaviors for v in visible], pa.int32()))
        .append_column("n_untimed", pa.array([v.n_untimed for v in visible], pa.int32()))
        .append_column("history_hash", pa.array([_digest(v.keys) for v in visible], pa.string()))
    )


def seen_rows(
    requests: pa.Table, store: Store, bucket: int, *, max_behaviors: int, with_vectors: bool = False
) -> list[pa.Table]:
    """For each request, the stored rows of the user's own history that `join_histories` shows it, in the same order."""
    users = requests["user_id"].to_pylist()
    as_of = requests["as_of"].cast(pa.int64()).to_pylist()
    rows = store.read_histories(bucket, sorted(set(users)), with_vectors=with_vectors)
    histories = _Histories.of(rows)
    ranges = [histories.visible_rows(user, limit, max_behaviors) for user, limit in zip(users, as_of, strict=True)]
    return [rows.slice(start, end - start) for start, end, _ in ranges]


@dataclass(frozen=True)
class _Visible:
    """What one request sees; views of shared buffers."""

    vectors: memoryview = _EMPTY
    keys: memoryview = _EMPTY
    n_behaviors: int = 0
    n_untimed: int = 0


@dataclass(frozen=True)
class _Histories:
    """Behaviors as `Store.read_histories` sorts them; user i has rows `start_U[i]` to `start_U[i + 1]`."""

    user_index: Mapping[str, int]
    start_U: np.ndarray
    time_N: np.ndarray  # microseconds since 1970, or _NO_TIME
    vectors: Callable[[int, int], memoryview]
    keys: Callable[[int, int], memoryview]

    @staticmethod
    def of(rows: pa.Table) -> "_Histories":
        users, start_U = _runs(rows)
        parts = [rows[name].cast(pa.large_string()) for name in ("user_id", "behavior_id", "text_hash")]
        return _Histories(
            user_index={user: i for i, user in enumerate(users)},
            start_U=start_U,
            time_N=_times(rows),
            vectors=_byte_ranges(rows["vector"]) if "vector" in rows.column_names else lambda _start, _end: _EMPTY,
            keys=_byte_ranges(pc.binary_join_element_wise(*parts, pa.scalar("\0", pa.large_string()))),
        )

    def visible(self, user: str, as_of: int | None, max_behaviors: int) -> _Visible:
        start, end, n_untimed = self.visible_rows(user, as_of, max_behaviors)
        return _Visible(self.vectors(start, end), self.keys(start, end), end - start, n_untimed)

    def visible_rows(self, user: str, as_of: int | None, max_behaviors: int) -> tuple[int, int, int]:
        """Start and end of the visible rows, and the number of rows skipped for a missing timestamp."""
        if user not in self.user_index:
            return 0, 0, 0
        start, end = self.start_U[self.user_index[user] :][:2]
        n_untimed = 0
        if as_of is not None:
            time_N = self.time_N[start:end]
            n_untimed = int(np.count_nonzero(time_N == _NO_TIME))
            end = start + np.searchsorted(time_N, as_of, side="left")
        return int(max(start, end - max_behaviors)), int(end), n_untimed


def _other_users(store: Store, bucket: int, users: Sequence[str], as_of: Sequence[int | None]) -> list[_Source | None]:
    """For each request another user with a behavior to see; None when the searched buckets have none."""
    found: list[_Source | None] = [None] * len(users)
    filled = store.buckets()
    in_search_order = [b for b in filled if b >= bucket] + [b for b in filled if b < bucket]
    for source_bucket in in_search_order[:_MAX_BUCKETS_SEARCHED]:
        open_requests = [i for i, source in enumerate(found) if source is None]
        if not open_requests:
            break
        rows = store.read_histories(source_bucket, with_vectors=False)
        names, start_U = _runs(rows)
        earliest_U = _times(rows)[start_U[:-1]]
        for i in open_requests:
            limit = as_of[i]
            candidates = np.arange(len(names)) if limit is None else np.flatnonzero(earliest_U < limit)
            after = int(np.searchsorted(candidates, bisect_right(names, users[i])))
            # Wrap around from the id after the user's own; the user itself comes last.
            nearest = names[candidates[after % len(candidates)]] if len(candidates) else users[i]
            if nearest != users[i]:
                found[i] = (source_bucket, nearest)
    return found


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
