"""Find the data files of a partition that may hold the same keys, by the ranges of keys in their statistics."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from persona.store.data_files import DataFile


class KeyRanges:
    """Files of one partition, sorted by their first key column, so that a look-up passes over most of them."""

    def __init__(self, files: Sequence[DataFile]) -> None:
        """`files` have statistics of the same columns."""
        self._column = next(iter(files[0].stats), "")
        first = self._column
        self._files = sorted(files, key=lambda file: file.stats[first]) if first else list(files)
        self._lows = [file.stats[first][0] for file in self._files if first]
        # The highest value up to each file: where it is below a range, so are all files until there.
        self._highs = list(accumulate((file.stats[first][1] for file in self._files if first), max))

    def near(self, file: DataFile) -> list[DataFile]:
        """Those that may hold a key of `file`, which is of the same partition."""
        if self._column not in file.stats:
            return self._files
        low, high = file.stats[self._column]
        some = self._files[bisect_left(self._highs, low) : bisect_right(self._lows, high)]
        return [other for other in some if _may_overlap(file, other)]


def _may_overlap(one: DataFile, other: DataFile) -> bool:
    both = one.stats.keys() & other.stats.keys()
    return not any(one.stats[n][1] < other.stats[n][0] or other.stats[n][1] < one.stats[n][0] for n in both)
