"""Plan an exchange before any row is read: how many map tasks, partitions and run files, and how much memory each uses.

Rows move like in an external sort. Map tasks write sorted *run files*; a run file holds one *segment* for each
*partition*, a fixed range of places (`persona.inputs.place`). A reduce task merges the segments of its partition.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from persona.inputs.place import MAX_BUCKETS, PLACES
from persona.inputs.splits import Split

WINDOW_BYTES = 64 * 2**20
"""A reduce task hands on at most this many bytes of rows at a time, unless one key or user has more."""
_MIN_RUN_BYTES, _MAX_RUN_BYTES = 128 * 2**20, 512 * 2**20
_RUNS = 1024  # aim: few enough that a reduce task can hold a batch of each, many enough that a run fits memory
_MIN_BATCH_BYTES, _MAX_BATCH_BYTES = 64 * 2**10, 2**20
_RUNS_PER_TASK = 4  # the last run of a task is smaller than the others
_MIN_TASK_BYTES, _SMALL_TASKS = 4 * 2**20, 64
_PARTITION_BYTES, _MAX_PARTITIONS = 64 * 2**20, 2048
_SMALL_PARTITION_BYTES, _MIN_PARTITIONS, _SMALL_PARTITIONS = 4 * 2**20, 4, 64
# Bytes of rows in memory for a byte of input, at most for usual texts.
_EXPANSION = {"parquet": 4.0, "jsonl": 1.5, "jsonl.gz": 8.0, "jsonl.bz2": 10.0, "jsonl.zst": 8.0}
# What the driver keeps for a run file besides its offsets, and for a reduce task (Ray 2.60: 2.8 to 3.1 KB an object).
_NAME_BYTES, _TASK_BYTES = 300, 3200
_FILE_BYTES = 128 * 2**20  # the vectors of a full block, unless there would be too many files
_MAX_FILES = 20_000  # each takes 340 bytes of the log, which every reader loads
_BLOCKS_PER_ACTOR = 32  # at least, or actors would end at different times
_LEAST_ROWS, _LEAST_ROWS_CPU, _MOST_ROWS_CPU = 4096, 1024, 16_384
_TEXTS_PER_BLOCK = 128 * 2**20  # Ray's target for an output block, which ends a data file


@dataclass(frozen=True, kw_only=True)
class ExchangePlan:
    """The sizes of an exchange.

    Attributes:
        n_bytes: estimated size of all rows in memory.
        n_buckets: buckets of the rows.
        n_partitions: ranges of places, which are merged one by one.
        task_bytes: size of the rows that a map task reads.
        run_bytes: a map task sorts and writes this many bytes of rows at a time.
        batch_bytes: of each segment, a reduce task holds one batch of this size.
        window_bytes: a reduce task hands on windows of this size.
    """

    n_bytes: int
    n_buckets: int
    n_partitions: int
    task_bytes: int
    run_bytes: int
    batch_bytes: int
    window_bytes: int

    @property
    def n_tasks(self) -> int:
        """Map tasks, at most."""
        return math.ceil(self.n_bytes / self.task_bytes) + 1

    @property
    def n_runs(self) -> int:
        """Run files, at most."""
        return math.ceil(self.n_bytes / self.run_bytes) + self.n_tasks

    @property
    def driver_bytes(self) -> int:
        """Memory of the driver: the offsets and names of all run files, and the reduce tasks."""
        offsets = 8 * self.n_runs * (self.n_partitions + 1)
        return offsets + self.n_runs * _NAME_BYTES + self.n_partitions * _TASK_BYTES

    @property
    def worker_bytes(self) -> int:
        """Rows in the memory of a task, at most: a run and its sorted partition, or batches of all runs and windows."""
        return max(2 * self.run_bytes, self.n_runs * self.batch_bytes + 3 * self.window_bytes)

    @property
    def n_store_requests(self) -> int:
        """Requests to the object store, at most: to write run files, read their segments and delete them."""
        segments = self.n_runs * self.n_partitions
        return 3 * self.n_runs + segments + self.n_bytes // self.batch_bytes

    def lows(self) -> np.ndarray:
        """The first place of each partition, uint64 (P,); a partition ends where the next one begins."""
        return np.array([self._low(number) for number in range(self.n_partitions)], dtype=np.uint64)

    def range_of(self, partition: int) -> tuple[int, int]:
        """The places [low, high) of a partition: some whole buckets, or a part of one bucket."""
        return self._low(partition), self._low(partition + 1)

    def _low(self, partition: int) -> int:
        if self.n_partitions <= self.n_buckets:
            return partition * self.n_buckets // self.n_partitions * PLACES
        per_bucket = self.n_partitions // self.n_buckets
        return partition // per_bucket * PLACES + partition % per_bucket * PLACES // per_bucket

    def block_rows(self, n_rows: int, width: int, n_actors: int, *, on_gpus: bool) -> int:
        """Behaviors that an encoder takes at a time, of `n_rows`, and so the size of a data file.

        A block is lost if its actor dies, so blocks of small inputs are small. Those of large inputs fill a data file
        of vectors of `width` float16, and are larger only where there would be more than 20,000 files: then a block
        has the same number of rows whatever the width. A CPU encodes a hundredth of what a GPU does in the same time,
        so its blocks stay smaller.
        """
        least, most = (_LEAST_ROWS, _FILE_BYTES // (2 * width)) if on_gpus else (_LEAST_ROWS_CPU, _MOST_ROWS_CPU)
        # With buckets for more than half of the files, their number is a matter of `--buckets`.
        n_whole_files = max(_MAX_FILES - self._n_pieces, _MAX_FILES // 2)
        return max(least, min(n_rows // (_BLOCKS_PER_ACTOR * n_actors), most), math.ceil(n_rows / n_whole_files))

    def n_data_files(self, n_rows: int, width: int, n_actors: int) -> int:
        """Data files that a run without older rows writes, at most, if its actors are on GPUs."""
        return math.ceil(n_rows / self.block_rows(n_rows, width, n_actors, on_gpus=True)) + self._n_pieces

    @property
    def _n_pieces(self) -> int:
        """Files beyond one a block: a block becomes a file for each bucket that it has rows of.

        That is one more for each output block of a reduce task that ends in it.
        """
        return max(math.ceil(self.n_bytes / _TEXTS_PER_BLOCK), self.n_partitions, self.n_buckets)


def plan_exchange(
    n_bytes: int, n_buckets: int, *, whole_buckets: bool = False, window_bytes: int = WINDOW_BYTES
) -> ExchangePlan:
    """The plan for `n_bytes` of rows in memory.

    Run files become larger with the input, so that their number hardly grows; partitions become more, up to a limit.
    Small inputs have partitions of several buckets, and large ones several partitions of one bucket, unless
    `whole_buckets`.
    """
    if not 1 <= n_buckets <= MAX_BUCKETS:
        raise ValueError(f"n_buckets must be from 1 to {MAX_BUCKETS:,}, got {n_buckets:,}")
    run_bytes = min(max(n_bytes // _RUNS, _MIN_RUN_BYTES), _MAX_RUN_BYTES)
    task_bytes = min(max(n_bytes // _SMALL_TASKS, _MIN_TASK_BYTES), _RUNS_PER_TASK * run_bytes)
    few = min(max(n_bytes // _SMALL_PARTITION_BYTES, _MIN_PARTITIONS), _SMALL_PARTITIONS, n_buckets)
    n_partitions = max(few, min(n_bytes // _PARTITION_BYTES, _MAX_PARTITIONS))
    if n_partitions > n_buckets:
        n_partitions = n_buckets if whole_buckets else n_partitions // n_buckets * n_buckets
    n_runs = n_bytes // run_bytes + n_bytes // task_bytes + 2
    return ExchangePlan(
        n_bytes=n_bytes,
        n_buckets=n_buckets,
        n_partitions=n_partitions,
        task_bytes=task_bytes,
        run_bytes=run_bytes,
        batch_bytes=min(max(window_bytes // n_runs, _MIN_BATCH_BYTES), _MAX_BATCH_BYTES),
        window_bytes=window_bytes,
    )


def bytes_in_memory(splits: Sequence[Split]) -> int:
    """An estimate of the size of the rows of some splits once they are read."""
    return int(sum((split.end - split.start) * _EXPANSION[split.format] for split in splits))


def grouped(splits: Sequence[Split], task_bytes: int) -> list[list[Split]]:
    """Splits in their order, in groups of about `task_bytes` of rows."""
    groups: list[list[Split]] = []
    size = task_bytes
    for split in splits:
        if size >= task_bytes:
            groups.append([])
            size = 0
        groups[-1].append(split)
        size += bytes_in_memory([split])
    return groups
