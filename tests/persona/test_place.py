"""Places: the order in which rows travel."""

import numpy as np
import pyarrow as pa
import pytest

from persona.inputs.histories import bucket_of
from persona.inputs.place import BEHAVIORS, PLACES, digests, places


def behaviors(users: list[str], ids: list[str], n_buckets: int) -> pa.Table:
    return pa.table({"user_id": users, "behavior_id": ids, "bucket": bucket_of(users, n_buckets)})


@pytest.mark.parametrize("n_buckets", [1, 64, 1000, 1 << 20])
def test_a_bucket_and_a_user_are_ranges_of_places(n_buckets: int) -> None:
    users = [f"user {i // 10}" for i in range(5_000)]
    rows = behaviors(users, [f"b{i}" for i in range(5_000)], n_buckets)
    found_N = places(rows, n_buckets)
    users_N = places(rows, n_buckets, key=None)
    assert (found_N // np.uint64(PLACES) == rows["bucket"].to_numpy()).all()
    assert (users_N <= found_N).all()
    assert (found_N < users_N + np.uint64(BEHAVIORS)).all()
    for start in range(0, 5_000, 10):
        assert len(set(users_N[start : start + 10])) == 1


@pytest.mark.parametrize("n_buckets", [1, 64, 1000])
def test_places_are_spread_evenly_over_a_bucket(n_buckets: int) -> None:
    users = [f"user {i}" for i in range(40_000)]
    within_N = places(behaviors(users, users, n_buckets), n_buckets) % np.uint64(PLACES)
    shares_8 = np.histogram(within_N.astype(np.float64), bins=8, range=(0, PLACES))[0] / 40_000
    assert abs(shares_8 - 1 / 8).max() < 0.01


def test_the_behaviors_of_one_user_are_spread_evenly() -> None:
    rows = behaviors(["one"] * 8_000, [f"{i}" for i in range(8_000)], 64)
    within_N = places(rows, 64) % np.uint64(BEHAVIORS)
    shares_8 = np.histogram(within_N.astype(np.float64), bins=8, range=(0, BEHAVIORS))[0] / 8_000
    assert abs(shares_8 - 1 / 8).max() < 0.02


def test_different_keys_have_different_digests() -> None:
    rows = behaviors(["ab", "a", "", "é"], ["c", "bc", "abc", "c"], 4)
    assert len(set(digests(rows).to_pylist())) == 4
    assert digests(rows).to_pylist() == digests(rows).to_pylist()
