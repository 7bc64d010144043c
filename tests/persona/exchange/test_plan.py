"""The plan of an exchange keeps driver, workers, requests and files within bounds for up to a billion rows."""

import itertools

import numpy as np
import pytest

from persona.exchange.plan import ExchangePlan, bytes_in_memory, grouped, plan_exchange
from persona.inputs.place import PLACES
from persona.inputs.splits import Split

MIB, GIB = 2**20, 2**30
ROW_BYTES = 650  # a text of 500 bytes, its key, hash and timestamp, in memory
ROWS = [10**6, 10**7, 10**8, 10**9]


@pytest.mark.parametrize("n_buckets", [64, 1000, 4000])
@pytest.mark.parametrize("n_rows", ROWS)
def test_memory_and_requests_are_bounded(n_rows: int, n_buckets: int) -> None:
    plan = plan_exchange(n_rows * ROW_BYTES, n_buckets)
    assert plan.driver_bytes < GIB / 4
    assert plan.worker_bytes <= GIB
    assert plan.n_store_requests < 15_000_000
    assert plan.n_partitions <= 2048
    largest = max(high - low for low, high in map(plan.range_of, range(plan.n_partitions))) / (n_buckets * PLACES)
    assert largest * plan.n_bytes < GIB, "a reduce task has too much to redo"


def test_ten_times_the_rows_need_the_same_memory() -> None:
    small, large = (plan_exchange(n_rows * 200, 1000) for n_rows in (10**7, 10**8))
    assert large.worker_bytes <= 1.15 * small.worker_bytes
    assert large.driver_bytes < small.driver_bytes + 16 * MIB


@pytest.mark.parametrize("on_gpus", [True, False])
@pytest.mark.parametrize("n_buckets", [64, 1000, 4000])
@pytest.mark.parametrize("width", [64, 384, 768, 1024, 2048, 4096])
def test_a_billion_rows_make_at_most_20_000_files_whatever_the_width(n_buckets: int, width: int, on_gpus: bool) -> None:
    plan = plan_exchange(10**9 * ROW_BYTES, n_buckets)
    n_files = plan.n_data_files(10**9, width, n_actors=16)
    assert n_files <= 20_000
    assert 10**9 * 2 * width / n_files >= 64 * MIB or width < 384
    # What an encoder, or the task that writes its file, has in memory.
    rows = plan.block_rows(10**9, width, 16, on_gpus=on_gpus)
    assert rows * (2 * width + ROW_BYTES) < GIB
    assert rows * 2 * width <= 128 * MIB or rows < 80_000, "larger than a file, and not for the number of files"


def test_a_hundred_million_rows_or_fewer_fill_files_of_128_mb() -> None:
    for width in (384, 1024, 4096):
        plan = plan_exchange(10**8 * ROW_BYTES, 1000)
        assert plan.block_rows(10**8, width, 16, on_gpus=True) * 2 * width <= 128 * MIB


@pytest.mark.parametrize(
    ("n_bytes", "n_buckets"), [(0, 1), (0, 64), (10**9, 4), (10**11, 64), (10**12, 1000), (0, 2**20)]
)
def test_the_partitions_cover_all_places_without_overlap(n_bytes: int, n_buckets: int) -> None:
    plan = plan_exchange(n_bytes, n_buckets)
    ranges = [plan.range_of(number) for number in range(plan.n_partitions)]
    assert ranges[0][0] == 0 and ranges[-1][1] == n_buckets * PLACES
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    assert all(low < high for low, high in ranges)
    np.testing.assert_array_equal(plan.lows(), np.array([low for low, _ in ranges], dtype=np.uint64))
    if plan.n_partitions > n_buckets:
        assert all(low // PLACES == (high - 1) // PLACES for low, high in ranges), "a range has parts of two buckets"


def test_small_inputs_have_several_buckets_a_partition_and_large_ones_several_partitions_a_bucket() -> None:
    assert plan_exchange(10 * MIB, 64).n_partitions < 64 < plan_exchange(10**10, 64).n_partitions


@pytest.mark.parametrize("n_buckets", [0, 2**20 + 1])
def test_more_buckets_than_places_can_tell_apart_are_refused(n_buckets: int) -> None:
    with pytest.raises(ValueError, match="n_buckets must be from 1 to"):
        plan_exchange(0, n_buckets)


def split(number: int, size: int) -> Split:
    return Split(uri=f"{number}.jsonl", start=0, end=size, format="jsonl", size_bytes=size)


def test_splits_are_grouped_in_order() -> None:
    splits = [split(number, size) for number, size in enumerate([5, 5, 5, 100, 1, 1])]
    groups = grouped(splits, task_bytes=15)
    assert [one for group in groups for one in group] == splits
    assert [len(group) for group in groups] == [3, 1, 2]
    assert bytes_in_memory(splits) >= 117


@pytest.mark.parametrize("on_gpus", [True, False])
def test_blocks_grow_with_the_input_until_they_fill_a_file(on_gpus: bool) -> None:
    def rows(n_rows: int, width: int = 768) -> int:
        return plan_exchange(n_rows * ROW_BYTES, 1000).block_rows(n_rows, width, 2, on_gpus=on_gpus)

    sizes = [rows(n_rows) for n_rows in ROWS]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert rows(100) <= 4096
    assert not on_gpus or sizes[-1] * 768 * 2 > 64 * MIB
    assert not on_gpus or rows(10**9, 384) == 2 * rows(10**9, 768)


def test_the_figures_add_up() -> None:
    plan: ExchangePlan = plan_exchange(10**9 * ROW_BYTES, 1000)
    assert plan.n_tasks < plan.n_runs < 2000
    assert plan.driver_bytes > 8 * plan.n_runs * plan.n_partitions
