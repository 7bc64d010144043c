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
    return places_of(key_hashes(rows, key), rows["bucket"].to_numpy(), n_buckets)


def key_hashes(rows: pa.Table, key: str | None = "behavior_id") -> np.ndarray:
    """The hash of each row's user (32 bits) and then of `key` (22 bits), uint64 (N,), for any number of buckets."""
    users = _bytes(rows["user_id"])
    checksums = list(map(zlib.crc32, users))
    users_N = np.array(checksums, np.uint64) << np.uint64(_BEHAVIOR_BITS)
    if key is None:
        return users_N
    of_keys = map(zlib.crc32, _bytes(rows[key]), checksums)
    hashes_N: np.ndarray = users_N + (np.fromiter(of_keys, np.uint64, len(users)) >> np.uint64(32 - _BEHAVIOR_BITS))
    return hashes_N


def places_of(hashes_N: np.ndarray, buckets_N: np.ndarray | int, n_buckets: int) -> np.ndarray:
    """The places of keys with these `key_hashes` in their buckets, uint64 (N,)."""
    checksums_N, behaviors_N = np.divmod(hashes_N, np.uint64(BEHAVIORS))
    # `bucket_of` has used the remainder of the checksum, so the quotient says nothing about the bucket. The quotient of
    # many buckets has few values, so it is spread over all 22 bits.
    n_quotients = np.uint64((1 << 32) // n_buckets + 1)
    users_N = checksums_N // np.uint64(n_buckets) * np.uint64(1 << _USER_BITS) // n_quotients
    firsts_N = np.asarray(buckets_N).astype(np.uint64) * np.uint64(PLACES)
    places_N: np.ndarray = firsts_N + users_N * np.uint64(BEHAVIORS) + behaviors_N
    return places_N


def digests(rows: pa.Table) -> pa.Array:
    """The key of each row as 16 bytes: BLAKE2b of the length of the user id, the user id and the behavior id."""
    pairs = zip(_bytes(rows["user_id"]), _bytes(rows["behavior_id"]), strict=True)
    return pa.array([_digest(user, behavior) for user, behavior in pairs], pa.binary(16))


def _digest(user: bytes, behavior: bytes) -> bytes:
    return hashlib.blake2b(len(user).to_bytes(8, "little") + user + behavior, digest_size=16).digest()


def _bytes(column: pa.ChunkedArray) -> list[bytes]:
    values: list[bytes] = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
    return values
