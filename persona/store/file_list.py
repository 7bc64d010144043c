"""The data files of one version of a table, as a snapshot carries them: about 110 bytes a file, whatever its size."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from persona.store.data_files import DataFile
from persona.store.delta_calls import OpenTable
from persona.store.schema import Layout


class FileList:
    """The files of one version, in Arrow buffers, so that thousands are sent to another process at once."""

    def __init__(self, version: int, files: pa.Table) -> None:
        """Use `of`. `files` is sorted by partition and path."""
        self.version = version
        self._files = files

    @staticmethod
    def of(table: OpenTable, layout: Layout) -> "FileList":
        """The files of the version that `table` has read."""
        actions = table.add_actions()
        paths = actions["path"].cast(pa.string())
        if pc.any(pc.match_substring(paths, "%")).as_py():  # percent-encoded in the log
            paths = pa.array([unquote(path) for path in paths.to_pylist()], pa.string())
        columns = {
            "path": paths,
            "partition": actions[f"partition.{layout.partition}"].cast(pa.string()),
            "n_rows": actions["num_records"].cast(pa.int64()),
            "size_bytes": actions["size_bytes"].cast(pa.int64()),
        }
        for name in layout.stats_columns:
            for end in ("min", "max"):
                if f"{end}.{name}" in actions.column_names:
                    columns[f"{end}.{name}"] = actions[f"{end}.{name}"].cast(layout.schema.field(name).type)
        files = pa.table(columns).sort_by([("partition", "ascending"), ("path", "ascending")])
        return FileList(table.version(), files.combine_chunks())

    def __reduce__(self) -> tuple[type["FileList"], tuple[int, pa.Table]]:
        """Without the index of partitions."""
        return FileList, (self.version, self._files)

    def __len__(self) -> int:
        return int(self._files.num_rows)

    @cached_property
    def _ranges(self) -> Mapping[str, tuple[int, int]]:
        """First file and end of each partition."""
        if not len(self):
            return {}
        runs = pc.run_end_encode(self._files["partition"].combine_chunks())
        ends = runs.run_ends.to_pylist()
        return dict(zip(runs.values.to_pylist(), zip([0, *ends[:-1]], ends, strict=True), strict=True))

    def partitions(self) -> list[str]:
        """The partitions that have files."""
        return list(self._ranges)

    def paths(self) -> set[str]:
        """The paths of all files."""
        return set(self._files["path"].to_pylist())

    def rows_by_partition(self) -> dict[str, int]:
        """The number of rows of each partition, from the log."""
        rows_F = self._files["n_rows"].to_numpy()
        return {name: int(np.sum(rows_F[start:end])) for name, (start, end) in self._ranges.items()}

    def size_bytes(self) -> int:
        """The size of all files together."""
        sizes_F: np.ndarray = self._files["size_bytes"].to_numpy()
        return int(sizes_F.sum())

    def of_partitions(self, partitions: Sequence[Any] | None = None) -> list[DataFile]:
        """The files of some partitions, or of all."""
        if partitions is None:
            return _data_files(self._files)
        ranges = [self._ranges[name] for name in map(str, partitions) if name in self._ranges]
        return [file for start, end in ranges for file in _data_files(self._files.slice(start, end - start))]


def _data_files(files: pa.Table) -> list[DataFile]:
    named = [name.removeprefix("min.") for name in files.column_names if name.startswith("min.")]
    return [
        DataFile(
            path=row["path"],
            partition=row["partition"],
            n_rows=row["n_rows"],
            size_bytes=row["size_bytes"],
            stats={n: (row[f"min.{n}"], row[f"max.{n}"]) for n in named if row[f"min.{n}"] is not None},
        )
        for row in files.to_pylist()
    ]
