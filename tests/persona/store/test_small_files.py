"""Which data files are merged, and which may hold the same keys, judging by sizes and statistics alone."""

import time
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from persona.store import small_files
from persona.store.data_files import DataFile
from persona.store.overlaps import KeyRanges

TARGET = 100


def data_file(name: str, size_bytes: int = 1, partition: str = "0", **stats: tuple[Any, Any]) -> DataFile:
    return DataFile(path=name, partition=partition, n_rows=1, size_bytes=size_bytes, stats=stats)


def named(groups: list[list[DataFile]]) -> list[str]:
    return ["".join(file.path for file in group) for group in groups]


def test_small_files_are_grouped_by_neighbors_up_to_the_target() -> None:
    sizes = [("a", 50), ("b", 51), ("c", 30), ("d", 30), ("e", 40), ("f", 41), ("g", 1)]
    files = [data_file(name, size, user_id=(name, name)) for name, size in sizes]
    assert named(small_files.groups(files[::-1], TARGET)) == ["ac", "de", "fg"]


def test_only_crowded_partitions_are_merged_after_a_run() -> None:
    few = [data_file(f"few{i}", 10, "few") for i in range(7)]
    many = [data_file(f"many{i}", 1, "many") for i in range(8)]
    enough = [data_file(f"enough{i}", 50, "enough") for i in range(2)]
    large = [data_file(f"large{i}", 51, "large") for i in range(9)]
    found = small_files.crowded_groups([*few, *large, *enough, *many], TARGET, max_bytes=10**6)
    assert found == [many, enough]


@pytest.mark.parametrize(("max_bytes", "n_merged"), [(0, 1), (15, 1), (16, 2), (24, 3)])
def test_a_run_merges_no_more_than_it_may(max_bytes: int, n_merged: int) -> None:
    files = [data_file(f"{partition}{i}", 1, str(partition)) for partition in range(3) for i in range(8)]
    found = small_files.crowded_groups(files, TARGET, max_bytes)
    assert [group[0].partition for group in found] == ["0", "1", "2"][:n_merged]


def test_merging_copies_a_row_a_few_times_however_many_refreshes_there_are() -> None:
    sizes: list[int] = []
    copied = 0
    for _ in range(1000):
        sizes.append(1)
        files = [data_file(str(i), size) for i, size in enumerate(sizes)]
        for group in small_files.crowded_groups(files, TARGET, max_bytes=10**6):
            merged = sum(file.size_bytes for file in group)
            copied += merged
            gone = {int(file.path) for file in group}
            sizes = [size for i, size in enumerate(sizes) if i not in gone] + [merged]
    assert sum(sizes) == 1000 and len(sizes) < 1000 / (TARGET / 2) + 8
    assert copied < 6 * 1000


def test_a_full_file_is_larger_in_a_store_of_many_terabytes() -> None:
    def target_bytes(n_files: int, size_bytes: int) -> int:
        return small_files.target_bytes([data_file(str(i), size_bytes) for i in range(n_files)])

    assert target_bytes(0, 0) == target_bytes(1000, 2**27) == 128 * 2**20
    # A billion vectors 4,096 wide: files of a build are not small, and those of refreshes become few.
    target = target_bytes(15_158, 540 * 10**6)
    assert target < 2 * 540 * 10**6 and 15_158 * 540 * 10**6 / (target / 2) <= 16_000


INTERVALS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), min_size=1, max_size=12)


@settings(max_examples=50)
@given(INTERVALS, INTERVALS, st.sampled_from([("user_id",), ("bucket", "request_id"), ()]))
def test_files_that_may_share_keys_are_those_whose_ranges_overlap(
    ones: list[tuple[int, int]], others: list[tuple[int, int]], columns: tuple[str, ...]
) -> None:
    def files(intervals: list[tuple[int, int]]) -> list[DataFile]:
        shifted = [(low * 7 % 20, size) for low, size in intervals]
        pairs = list(zip(intervals, shifted, strict=True))
        stats = [{name: (of[0], of[0] + of[1]) for name, of in zip(columns, pair, strict=False)} for pair in pairs]
        return [data_file(str(i), **one) for i, one in enumerate(stats)]

    def overlap(one: DataFile, other: DataFile) -> bool:
        return all(one.stats[n][0] <= other.stats[n][1] and other.stats[n][0] <= one.stats[n][1] for n in columns)

    ranges = KeyRanges(files(others))
    for one in files(ones):
        expected = {other.path for other in files(others) if overlap(one, other)}
        assert {other.path for other in ranges.near(one)} == expected


def test_of_twenty_thousand_files_those_that_five_thousand_touch_are_found_at_once() -> None:
    """All pairs would be a hundred million comparisons."""
    committed = [data_file(f"{i:06}", user_id=(f"{i:06}", f"{i:06}z")) for i in range(20_000)]
    staged = [data_file(f"{4 * i:06}", user_id=(f"{4 * i:06}", f"{4 * i:06}a")) for i in range(5_000)]
    started = time.process_time()
    ranges = KeyRanges(staged)
    assert sum(bool(ranges.near(file)) for file in committed) == 5_000
    assert time.process_time() - started < 1
