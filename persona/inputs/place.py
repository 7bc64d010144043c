"""The order in which rows travel and are compared: by bucket, then by user, then by behavior.

A *place* is a number of 64 bits: 20 for the bucket, 22 for a hash of the user, 22 for a hash of the behavior. Equal
keys have equal places. The places of a bucket are spread evenly, so before any row is read it is known how many fall
into a range of places.
"""

import hashlib
import zlib

import numpy as np
import pyarrow as pa

MAX_BUCKETS = 1 << 20
_USER_BITS = _BEHAVIOR_BITS = 22
BEHAVIORS = 1 << _BEHAVIOR_BITS
"""The places of a user are `BEHAVIORS` consecutive numbers."""
PLACES = 1 << _USER_BITS + _BEHAVIOR_BITS
"""The places of a bucket are `PLACES` consecutive numbers: bucket b has [b · PLACES, (b + 1) · PLACES)."""


def places(rows: pa.Table, n_buckets: int, key: str | None = "behavior_id") -> np.ndarray:
    """The place of each row, uint64 (N,). `rows` has `bucket`, `user_id` and the column `key`; None for user alone."""
    users = _bytes(rows["user_id"])
    checksums_N = np.fromiter((zlib.crc32(user) for user in users), dtype=np.uint64, count=len(users))
    # `bucket_of` has used the remainder of the checksum, so the quotient says nothing about the bucket. The quotient of
    # many buckets has few values, so it is spread over all 22 bits.
    n_quotients = np.uint64((1 << 32) // n_buckets + 1)
    buckets_N = rows["bucket"].to_numpy().astype(np.uint64)
    users_N = checksums_N // np.uint64(n_buckets) * np.uint64(1 << _USER_BITS) // n_quotients
    places_N: np.ndarray = ((buckets_N << np.uint64(_USER_BITS)) + users_N) << np.uint64(_BEHAVIOR_BITS)
    if key is None:
        return places_N
    pairs = zip(users, _bytes(rows[key]), strict=True)
    hashes_N = np.fromiter((_behavior_hash(*pair) for pair in pairs), dtype=np.uint64, count=len(users))
    with_behaviors_N: np.ndarray = places_N + hashes_N
    return with_behaviors_N


def digests(rows: pa.Table) -> pa.Array:
    """The key of each row as 16 bytes: BLAKE2b of the length of the user id, the user id and the behavior id."""
    pairs = zip(_bytes(rows["user_id"]), _bytes(rows["behavior_id"]), strict=True)
    return pa.array([_digest(user, behavior) for user, behavior in pairs], pa.binary(16))


def _digest(user: bytes, behavior: bytes) -> bytes:
    return hashlib.blake2b(len(user).to_bytes(8, "little") + user + behavior, digest_size=16).digest()


def _behavior_hash(user: bytes, behavior: bytes) -> int:
    return zlib.crc32(behavior, zlib.crc32(user)) >> 32 - _BEHAVIOR_BITS


def _bytes(column: pa.ChunkedArray) -> list[bytes]:
    values: list[bytes] = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
    return values
