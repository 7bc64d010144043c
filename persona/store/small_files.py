"""Which small data files to merge: all of them by hand, and after a run those of crowded partitions."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from persona.store.data_files import DataFile

_CROWD = 8
_FULL_BYTES = 128 * 2**20
_MAX_FULL_FILES = 8000  # a merged file has at least half of the target


def target_bytes(files: Iterable[DataFile]) -> int:
    """The size of a full data file of a table with these files: 128 MiB, or more from 1 TiB on.

    So what is merged becomes at most 16,000 files, however large the table.
    """
    return max(_FULL_BYTES, sum(file.size_bytes for file in files) // _MAX_FULL_FILES)


def groups(files: Iterable[DataFile], target_bytes: int) -> list[list[DataFile]]:
    """Groups of two or more small files, each of one partition, neighboring in key order, and of up to the target.

    A file is small if it has at most half of `target_bytes`.
    """
    found: list[list[DataFile]] = []
    for of_partition in _small(files, target_bytes).values():
        size_bytes = target_bytes + 1
        for file in sorted(of_partition, key=lambda file: (sorted(file.stats.items()), file.path)):
            size_bytes += file.size_bytes
            if size_bytes > target_bytes:
                found.append([])
                size_bytes = file.size_bytes
            found[-1].append(file)
    return [group for group in found if len(group) > 1]


def crowded_groups(files: Iterable[DataFile], target_bytes: int, max_bytes: int) -> list[list[DataFile]]:
    """The groups of partitions with eight small files or more, or with small files for one of the target.

    Such a rule copies a row a few times in its life, however often a partition gets a few new rows. Partitions with
    more small files come first, until `max_bytes` are reached; at least one group is returned if there is any.
    """
    crowded = {
        partition: small
        for partition, small in _small(files, target_bytes).items()
        if len(small) >= _CROWD or _size(small) >= target_bytes
    }
    chosen: list[list[DataFile]] = []
    left_bytes = max_bytes
    for small in sorted(crowded.values(), key=lambda small: (-len(small), small[0].partition)):
        for group in groups(small, target_bytes):
            left_bytes -= _size(group)
            if chosen and left_bytes < 0:
                return chosen
            chosen.append(group)
    return chosen


def _small(files: Iterable[DataFile], target_bytes: int) -> dict[str, list[DataFile]]:
    """The small files by partition."""
    found: dict[str, list[DataFile]] = defaultdict(list)
    for file in files:
        if 2 * file.size_bytes <= target_bytes:
            found[file.partition].append(file)
    return found


def _size(files: Sequence[DataFile]) -> int:
    return sum(file.size_bytes for file in files)
