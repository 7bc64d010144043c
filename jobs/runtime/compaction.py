"""Merge small data files: the workers write the merged ones, and the driver commits them.

A refresh leaves a small file in each bucket that it adds to. The run that makes a partition crowded also merges its
small files. A killed run loses at most the merged files that are not committed yet; `jobs.store vacuum` deletes them,
and the small ones once no version that has to stay readable uses them.
"""

from typing import TYPE_CHECKING

from jobs.runtime import exchange

if TYPE_CHECKING:
    from persona.store.data_files import DataFile
    from persona.store.writer import Merged, Writer

# What a run may merge: in the long run, merging copies each row about three times.
_TIMES_ADDED, _MIN_BYTES = 4, 2**30
_TASK_BYTES, _TASK_FILES = 128 * 2**20, 64
_TASKS_PER_COMMIT = 128


def after_run(writer: "Writer") -> int:
    """Merge the small files of crowded partitions, within what this run has added; returns how many were merged."""
    max_bytes = max(_TIMES_ADDED * writer.added_bytes, _MIN_BYTES)
    return merge(writer, writer.crowded_files(max_bytes))


def merge(writer: "Writer", groups: "list[list[DataFile]]") -> int:
    """Replace each group of files by one, some groups in one commit; returns how many files were replaced."""
    tasks = _tasks(groups)
    for start in range(0, len(tasks), _TASKS_PER_COMMIT):
        some = tasks[start : start + _TASKS_PER_COMMIT]
        merged = exchange.results(some, _merge, uri=writer.table.uri, table=writer.table.name)
        writer.exchange_merged([one for of_task in merged for one in of_task])
    return sum(map(len, groups))


def _tasks(groups: "list[list[DataFile]]") -> "list[list[list[DataFile]]]":
    """The groups of each task: one large one, or many small ones."""
    tasks: list[list[list[DataFile]]] = []
    left_bytes = left_files = 0
    for group in groups:
        left_bytes -= sum(file.size_bytes for file in group)
        left_files -= len(group)
        if min(left_bytes, left_files) < 0:
            tasks.append([])
            left_bytes, left_files = _TASK_BYTES, _TASK_FILES
            left_bytes -= sum(file.size_bytes for file in group)
            left_files -= len(group)
        tasks[-1].append(group)
    return tasks


def _merge(groups: "list[list[DataFile]]", *, uri: str, table: str) -> "list[Merged]":
    from persona.store import writer
    from persona.store.table import Table

    opened = Table(uri, table)
    return [writer.merge(opened, files) for files in groups]
