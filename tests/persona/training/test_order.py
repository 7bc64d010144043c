"""The order of an epoch: it depends on each row alone, batches hold rows of similar length, and one is prefetched."""

import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, strategies as st

from persona.training.order import epoch_order, one_ahead, shuffle_windows


def requests(n: int) -> pa.Table:
    texts = ["x" * 100 * ((7 * number) % 50 + 1) for number in range(n)]
    return pa.table(
        {
            "request_id": [f"r{number}" for number in range(n)],
            "input": pa.array(texts, pa.large_string()),
            "target": pa.array(["y"] * n, pa.large_string()),
        }
    )


def ordered(table: pa.Table, *, epoch: int = 0, seed: int = 0, global_batch: int = 4) -> list[str]:
    keys = epoch_order(table, epoch=epoch, seed=seed, n_requests=1000, global_batch=global_batch)
    return table.append_column("order", keys).sort_by("order")["request_id"].to_pylist()


def test_the_order_depends_only_on_each_row():
    table = requests(1000)
    whole = ordered(table)
    assert sorted(whole) == sorted(table["request_id"].to_pylist())
    # Any split of the rows gives the same keys.
    keys = {}
    for start in (700, 0, 300):
        piece = table.slice(start, {700: 300, 0: 300, 300: 400}[start])
        found = epoch_order(piece, epoch=0, seed=0, n_requests=1000, global_batch=4)
        keys |= dict(zip(piece["request_id"].to_pylist(), found.to_pylist(), strict=True))
    assert sorted(keys, key=keys.__getitem__) == whole
    assert len(set(keys.values())) == 1000


def test_the_order_changes_with_epoch_and_seed():
    table = requests(1000)
    assert ordered(table) == ordered(table)
    assert ordered(table) != ordered(table, epoch=1)
    assert ordered(table) != ordered(table, seed=1)


def test_a_batch_holds_rows_of_similar_length():
    table = requests(1000)
    length = dict(zip(table["request_id"].to_pylist(), map(len, table["input"].to_pylist()), strict=True))
    batches = np.array([length[name] for name in ordered(table)]).reshape(-1, 4)
    spread = (batches.max(1) - batches.min(1)).mean()
    shuffled = np.random.default_rng(0).permutation(list(length.values())).reshape(-1, 4)
    assert spread < (shuffled.max(1) - shuffled.min(1)).mean() / 3


def test_short_rows_of_different_lengths_share_a_batch():
    """With few distinct questions, batches of one length would repeat one question."""
    length = [12 + 5 * (i % 4) for i in range(400)]
    table = pa.table(
        {"request_id": [f"r{i}" for i in range(400)], "input": ["x" * n for n in length], "target": ["y"] * 400}
    )
    batches = [ordered(table)[i : i + 8] for i in range(0, 400, 8)]
    assert sum(len({int(name[1:]) % 4 for name in batch}) > 1 for batch in batches) >= 49


def test_the_incomplete_last_batch_does_not_depend_on_length():
    table = requests(1000)
    length = dict(zip(table["request_id"].to_pylist(), map(len, table["input"].to_pylist()), strict=True))
    last = [length[name] for epoch in range(50) for name in ordered(table, epoch=epoch, global_batch=60)[-40:]]
    # Lengths are uniform on 100, 200, … 5,000; five standard errors of the mean of 2,000 draws.
    assert abs(np.mean(last) / 100 - 25.5) < 5 * np.sqrt((50**2 - 1) / 12 / len(last))


def test_texts_of_any_length_have_an_order():
    table = pa.table({"request_id": ["a", "b"], "input": ["x" * 3_000_000, ""], "target": ["", "y"]})
    assert sorted(ordered(table)) == ["a", "b"]


@given(st.integers(0, 150), st.integers(0, 3), st.integers(0, 3))
def test_shuffle_windows_is_a_permutation_that_is_the_same_on_every_worker(n, epoch, seed):
    mine = list(shuffle_windows(iter(range(n)), epoch=epoch, seed=seed))
    assert sorted(mine) == list(range(n))
    theirs = list(shuffle_windows(iter(range(1000, 1000 + n)), epoch=epoch, seed=seed))
    assert theirs == [1000 + number for number in mine]


def test_shuffling_changes_with_the_epoch_and_moves_no_batch_far():
    orders = [list(shuffle_windows(range(320), epoch=epoch, seed=0)) for epoch in range(2)]
    assert orders[0] != orders[1]
    assert orders[0] != list(range(320))
    assert max(abs(position - batch) for position, batch in enumerate(orders[0])) < 32


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
