"""The order of a run: it depends on the requests alone, windows are bounded, and batches are well mixed within them."""

import threading
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from persona.store import vectors
from persona.training.order import RunOrder, Window, cut, one_ahead, order_in_window

WIDTH = 4
VECTOR_BYTES = vectors.n_bytes(WIDTH)
LARGEST = 50 * 100 + 1 + 9 * VECTOR_BYTES  # of the requests below
GOLDEN = [
    "r0",
    "r15",
    "r8",
    "r1",
    "r7",
    "r4",
    "r12",
    "r10",
    "r5",
    "r13",
    "r6",
    "r14",
    "r16",
    "r9",
    "r2",
    "r17",
    "r3",
    "r18",
    "r11",
    "r19",
]


def requests(n: int, *, per_user: int = 5, n_buckets: int = 7, lengths: Sequence[int] = ()) -> pa.Table:
    """Requests of some users, sorted as those of a run; each sees as many behaviors as its number's last digit."""
    numbers = range(n)
    texts = ["x" * (lengths[i] if lengths else 100 * ((7 * i) % 50 + 1)) for i in numbers]
    table = pa.table(
        {
            "request_id": [f"r{i}" for i in numbers],
            "user_id": [f"u{i // per_user}" for i in numbers],
            "bucket": [(i // per_user) % n_buckets for i in numbers],
            "n_behaviors": [i % 10 for i in numbers],
            "input": pa.array(texts, pa.large_string()),
            "target": pa.array(["y"] * n, pa.large_string()),
        }
    )
    return table.sort_by([(name, "ascending") for name in ("bucket", "user_id", "request_id")])


def n_bytes(table: pa.Table) -> int:
    """Of the texts, and of the vectors that the requests see."""
    texts = [*table["input"].to_pylist(), *table["target"].to_pylist()]
    return sum(map(len, texts)) + sum(table["n_behaviors"].to_pylist()) * VECTOR_BYTES


def run_order(table: pa.Table, *, seed: int = 0, global_batch: int = 4, window_bytes: int = 10**9) -> RunOrder:
    pieces = cut([table], WIDTH, window_bytes // 8)
    return RunOrder(pieces=pieces, n_epochs=3, seed=seed, global_batch=global_batch, window_bytes=window_bytes)


def rows_of(table: pa.Table, window: Window) -> pa.Table:
    return pa.concat_tables([table.slice(start, end - start) for start, end in window.ranges])


def ordered(table: pa.Table, order: RunOrder, epoch: int = 0) -> pa.Table:
    """The requests of an epoch in the order of its steps."""
    parts = []
    for window in order.epoch(epoch):
        rows = rows_of(table, window)
        parts.append(rows.take(order_in_window(rows, window, seed=order.seed, global_batch=order.global_batch)))
    return pa.concat_tables(parts)


def ids(table: pa.Table, **how: int) -> list[str]:
    epoch = how.pop("epoch", 0)
    names: list[str] = ordered(table, run_order(table, **how), epoch)["request_id"].to_pylist()
    return names


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 9)), max_size=60),
    st.integers(1, 20),
    st.integers(1, 60),
)
def test_pieces_are_bounded_and_divide_only_users_who_have_too_much(
    rows: list[tuple[int, int, int]], n_rows: int, piece_behaviors: int
) -> None:
    rows = sorted(rows, key=lambda row: row[:2])
    buckets, users, behaviors = zip(*rows, strict=True) if rows else ([], [], [])
    table = pa.table(
        {
            "bucket": pa.array(buckets, pa.int32()),
            "user_id": pa.array([f"u{user}" for user in users], pa.string()),
            "n_behaviors": pa.array(behaviors, pa.int32()),
            "input": pa.array(["abc"] * len(rows), pa.large_string()),
        }
    )
    size = piece_behaviors * VECTOR_BYTES
    pieces = cut((table.slice(start, n_rows) for start in range(0, len(rows), n_rows)), WIDTH, size)
    assert pieces == cut([table], WIDTH, size), "the pieces depend on how the rows arrive"
    assert [row for piece in pieces for row in range(piece.start, piece.end)] == list(range(len(rows)))
    for piece in pieces:
        of_texts = 3 * (piece.end - piece.start)
        assert piece.n_bytes == sum(behaviors[piece.start : piece.end]) * VECTOR_BYTES + of_texts
        assert piece.n_bytes <= 2 * size + 9 * VECTOR_BYTES + 3
        assert len(set(buckets[piece.start : piece.end])) == 1
        if piece.end < len(rows) and rows[piece.end][:2] == rows[piece.end - 1][:2]:
            assert piece.n_bytes >= 2 * size


@given(st.integers(4, 300), st.integers(1, 200_000), st.integers(1, 4), st.integers(0, 2))
@settings(deadline=None, max_examples=25)
def test_an_epoch_has_each_request_once_in_windows_of_a_bounded_size(
    n: int, window_bytes: int, global_batch: int, seed: int
) -> None:
    table = requests(n)
    order = run_order(table, seed=seed, global_batch=global_batch, window_bytes=window_bytes)
    for epoch in range(2):
        windows = order.epoch(epoch)
        assert [window.number for window in windows] == list(range(len(windows)))
        ends = np.cumsum([0, *(window.n_steps for window in windows)]) + epoch * order.steps_per_epoch
        assert [window.first_step for window in windows] == ends[:-1].tolist()
        assert sum(window.n_steps for window in windows) == order.steps_per_epoch == n // global_batch
        for window in windows:
            rows = rows_of(table, window)
            # A window may hold the rest of the one before it, and must hold one batch.
            assert n_bytes(rows) <= window_bytes + LARGEST * 2 * global_batch
            assert window is windows[-1] or len(rows) == window.n_steps * global_batch
        found = ordered(table, order, epoch)["request_id"].to_pylist()
        assert len(set(found)) == len(found) == n - n % global_batch


def test_a_resumed_run_starts_at_the_window_of_its_step() -> None:
    order = run_order(requests(1000), window_bytes=300_000)
    whole = list(order.from_step(0))
    assert [window for epoch in range(3) for window in order.epoch(epoch)] == whole
    for step in (0, 1, 249, 250, 251, 749):
        resumed = list(order.from_step(step))
        assert resumed[0].first_step <= step < resumed[0].first_step + resumed[0].n_steps
        assert resumed == whole[-len(resumed) :]
    assert list(order.from_step(750)) == []


def test_the_order_changes_with_epoch_and_seed() -> None:
    table = requests(1000)
    for window_bytes in (10**9, 300_000):
        same = {"window_bytes": window_bytes}
        assert ids(table, **same) == ids(table, **same)
        assert ids(table, **same) != ids(table, **same, epoch=1)
        assert ids(table, **same) != ids(table, **same, seed=1)


def test_what_fits_one_window_is_ordered_as_it_always_was() -> None:
    """A run keeps its order, and so its losses, from one version of this module to the next."""
    table = requests(20)
    assert ids(table) == GOLDEN
    assert len(run_order(table).epoch(0)) == 1


def test_a_batch_holds_rows_of_similar_length() -> None:
    table = requests(1000)
    length = dict(zip(table["request_id"].to_pylist(), map(len, table["input"].to_pylist()), strict=True))
    batches = np.array([length[name] for name in ids(table)]).reshape(-1, 4)
    spread = (batches.max(1) - batches.min(1)).mean()
    shuffled = np.random.default_rng(0).permutation(list(length.values())).reshape(-1, 4)
    assert spread < (shuffled.max(1) - shuffled.min(1)).mean() / 3


def test_short_rows_of_different_lengths_share_a_batch() -> None:
    """With few distinct questions, batches of one length would repeat one question."""
    table = requests(400, lengths=[12 + 5 * (i % 4) for i in range(400)])
    found = ids(table, global_batch=8)
    batches = [found[i : i + 8] for i in range(0, 400, 8)]
    assert sum(len({int(name[1:]) % 4 for name in batch}) > 1 for batch in batches) >= 49


def test_the_incomplete_last_batch_does_not_depend_on_length() -> None:
    table = requests(1000)
    length = dict(zip(table["request_id"].to_pylist(), map(len, table["input"].to_pylist()), strict=True))
    left_out = []
    for seed in range(50):
        left_out += [length[name] for name in length.keys() - set(ids(table, seed=seed, global_batch=60))]
    assert len(left_out) == 50 * 40
    # Lengths are uniform on 100, 200, … 5,000; five standard errors of the mean of 2,000 draws.
    assert abs(np.mean(left_out) / 100 - 25.5) < 5 * np.sqrt((50**2 - 1) / 12 / len(left_out))


def test_batches_of_a_group_are_not_sorted_by_length() -> None:
    table = requests(1000)
    length = np.array([len(text) for text in ordered(table, run_order(table))["input"].to_pylist()])
    per_batch = length.reshape(-1, 4).mean(1)[:32]
    assert abs(np.corrcoef(per_batch, np.arange(32))[0, 1]) < 0.6


def test_texts_of_any_length_have_an_order() -> None:
    table = requests(2, lengths=[3_000_000, 0])
    assert sorted(ids(table, global_batch=1)) == ["r0", "r1"]


N_USERS, PER_USER, N_BUCKETS, BATCH = 2000, 5, 100, 50


@lru_cache
def batches_of(window_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Buckets and users (batches, BATCH) of three epochs, when a window holds this share of all bytes."""
    n = N_USERS * PER_USER
    table = requests(n, per_user=PER_USER, n_buckets=N_BUCKETS, lengths=[100] * n)
    table = table.set_column(table.column_names.index("n_behaviors"), "n_behaviors", pa.array([1] * n))
    order = run_order(table, global_batch=BATCH, window_bytes=int(n_bytes(table) * window_share))
    whole = pa.concat_tables([ordered(table, order, epoch) for epoch in range(3)])
    buckets = np.array(whole["bucket"].to_pylist()).reshape(-1, BATCH)
    users = np.array([int(user[1:]) for user in whole["user_id"].to_pylist()]).reshape(-1, BATCH)
    return buckets, users


def test_a_batch_has_the_buckets_and_users_of_a_sample_of_its_window() -> None:
    """A window of a tenth has ten buckets and 1,000 requests; a full shuffle is one window."""

    def distinct(batches: np.ndarray) -> float:
        return float(np.mean([len(set(batch)) for batch in batches.tolist()]))

    def expected(n_groups: int, size: int) -> float:
        """Distinct groups in BATCH draws without replacement from `n_groups` groups of `size` each."""
        n = n_groups * size
        missed = np.prod([(n - size - i) / (n - i) for i in range(BATCH)])
        return float(n_groups * (1 - missed))

    for share in (1.0, 0.1):
        buckets, users = batches_of(share)
        n_users = int(N_USERS * share)
        # The ends of windows, and pieces of unequal size, add a few per cent.
        assert distinct(buckets) == pytest.approx(expected(int(N_BUCKETS * share), 100), rel=0.06)
        assert distinct(users) == pytest.approx(expected(n_users, PER_USER), rel=0.01)


def test_windows_mix_other_buckets_in_each_epoch() -> None:
    buckets, _ = batches_of(0.1)
    of_epoch = np.split(buckets, 3)
    pairs = [{(a, b) for batch in epoch.tolist() for a in batch for b in batch if a < b} for epoch in of_epoch]
    together = len(pairs[0] & pairs[1]) / len(pairs[0])
    # Of all pairs of buckets, one epoch brings about a tenth together, independently of the last one.
    assert together < 0.25
    counts = Counter(buckets.ravel().tolist())
    assert max(counts.values()) <= 3 * 100


def test_the_next_item_is_made_while_the_current_one_is_used():
    began = {number: threading.Event() for number in range(4)}

    def source():
        for number, event in began.items():
            event.set()
            yield number

    seen = []
    for number in one_ahead(source()):
        # The next item is started without being requested, or this wait would time out.
        if number + 1 in began:
            assert began[number + 1].wait(timeout=30)
        assert number + 2 not in began or not began[number + 2].is_set()
        seen.append(number)
    assert seen == list(began)


def test_an_error_in_the_source_reaches_the_caller():
    def source():
        yield 1
        raise ValueError("broken")

    items = one_ahead(source())
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)
