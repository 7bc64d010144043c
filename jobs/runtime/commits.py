"""Commit staged files from a thread of the driver, while the stream of blocks goes on.

Only the driver commits. Ray hands it the staged files of each block once, however often the task was retried; files of
failed attempts are never committed, and `jobs.store vacuum` deletes them.

New rows are committed as they arrive. Rows that replace others wait until there are many of them, or for a minute,
because every data file that holds a replaced row must be rewritten. Workers rewrite the files, in one wave at a time;
new rows are committed meanwhile. At the end, the small files of crowded partitions are merged.
"""

import math
import queue
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from jobs.runtime import compaction
from jobs.runtime.tally import Tally

if TYPE_CHECKING:
    import pyarrow as pa
    from ray import ObjectRef

    from persona.store.data_files import DataFile
    from persona.store.writer import Rewritten, Writer

_COMMIT_EVERY_S = 1.0  # each version of the log makes every later read a little slower
_REPLACED_TOGETHER = 50_000
_REPLACED_AFTER_S = 60.0
_QUEUED_BLOCKS = 1024


@dataclass(frozen=True, kw_only=True)
class _Wave:
    """Staged rows that replace others, and the files that are being rewritten without the replaced rows."""

    staged: "pa.Table"
    files: "list[ObjectRef[list[Rewritten]]]"


class Committer:
    """A context that commits the staged blocks it is given; when it ends, all of them are committed, and files merged.

    An error of a commit is raised by the next `take`, or when the context ends. If the body fails, the blocks that were
    taken are committed nevertheless, so that the next run need not redo them, and nothing is merged.
    """

    def __init__(self, writer: "Writer", tally: Tally, *, stage: str = "commit") -> None:
        self._writer = writer
        self._tally = tally
        self._stage = stage
        self._queue: queue.Queue[pa.Table | None] = queue.Queue(maxsize=_QUEUED_BLOCKS)
        self._error: BaseException | None = None
        self._n_commits = 0
        self._waiting: list[pa.Table] = []  # blocks whose rows replace others
        self._wait_until = math.inf  # when the next wave must start
        self._wave: _Wave | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="commits")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._ending.set()
        self._thread.join()
        if error is not None:
            return
        if self._error is not None:
            raise self._error
        compaction.after_run(self._writer)

    def take(self, staged: "pa.Table") -> None:
        """Queue the staged files of a block (`persona.store.writer.staged_files`) for a commit."""
        if self._error is not None:
            raise self._error
        if staged.num_rows:
            self._queue.put(staged)

    def _run(self) -> None:
        """Commit what has arrived, about once a second, until None arrives and nothing is left."""
        ended = False
        try:
            while not ended or self._waiting or self._wave is not None:
                arrived = [] if ended else self._arrived()
                started = time.monotonic()
                ended = ended or (bool(arrived) and arrived[-1] is None)
                self._sort([block for block in arrived if block is not None], started)
                self._end_wave(wait=ended)
                if self._wave is None and self._is_wave_due(started, ended=ended):
                    self._begin_wave()
                if not ended:
                    self._ending.wait(max(0.0, _COMMIT_EVERY_S - (time.monotonic() - started)))
        except BaseException as error:  # noqa: BLE001 - raised again in the driver's main thread
            self._error = error
            while not ended:  # `take` must not block on a full queue
                ended = self._queue.get() is None

    def _arrived(self) -> "list[pa.Table | None]":
        """All that is queued. Waits for it if nothing is, but not beyond the moment when a wave is to start or end."""
        until = time.monotonic() + _COMMIT_EVERY_S if self._wave else self._wait_until
        left_s = until - time.monotonic()
        try:
            arrived = [self._queue.get(timeout=max(0.0, left_s) if math.isfinite(left_s) else None)]
        except queue.Empty:
            return []
        while not self._queue.empty():
            arrived.append(self._queue.get())
        return arrived

    def _sort(self, blocks: "list[pa.Table]", now: float) -> None:
        """Commit the new rows of the blocks; the others wait for a wave."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not blocks:
            return
        together = pa.concat_tables(blocks)
        is_new = pc.equal(together["change"], "new")
        self._add(together.filter(is_new))
        replacing = together.filter(pc.invert(is_new))
        if replacing.num_rows:
            self._waiting.append(replacing)
            self._wait_until = min(self._wait_until, now + _REPLACED_AFTER_S)

    def _add(self, staged: "pa.Table") -> None:
        if staged.num_rows:
            started = time.perf_counter()
            self._writer.add(staged)
            self._count(staged, seconds=time.perf_counter() - started)

    def _is_wave_due(self, now: float, *, ended: bool) -> bool:
        import pyarrow.compute as pc

        if not self._waiting:
            return False
        n_waiting = sum(pc.sum(block["rows"]).as_py() for block in self._waiting)
        return ended or n_waiting >= _REPLACED_TOGETHER or now >= self._wait_until

    def _begin_wave(self) -> None:
        """Have the workers rewrite the data files that hold replaced rows."""
        import pyarrow as pa
        import ray

        staged = pa.concat_tables(self._waiting)
        self._waiting, self._wait_until = [], math.inf
        name, uri = self._writer.table.name, self._writer.table.uri
        rewriting = ray.remote(num_cpus=1, max_retries=3)(_rewrite)
        # Until the wave ends, only new rows are committed, in files of their own: the touched files do not change.
        files = [rewriting.remote(uri, name, files, replacing) for files, replacing in self._writer.touched(staged)]
        self._wave = _Wave(staged=staged, files=files)

    def _end_wave(self, *, wait: bool) -> None:
        """Commit the wave, if there is one and its files are written; with `wait`, wait for them."""
        import ray

        wave = self._wave
        if wave is None:
            return
        if not wait and wave.files and ray.wait(wave.files, num_returns=len(wave.files), timeout=0)[1]:
            return
        rewritten = [pair for pairs in ray.get(wave.files) for pair in pairs]
        self._count(wave.staged, rewritten=self._writer.replace(wave.staged, rewritten))
        self._wave = None

    def _count(self, staged: "pa.Table", **counts: float) -> None:
        import pyarrow.compute as pc

        self._n_commits += 1
        for change in ("new", "edited", "gone"):
            counts[change] = pc.sum(staged.filter(pc.equal(staged["change"], change))["rows"]).as_py() or 0
        counts["rows"] = counts["new"] + counts["edited"]
        self._tally.note(self._stage, f"commit {self._n_commits}", counts)


def _rewrite(uri: str, name: str, files: "list[DataFile]", replacing: "list[DataFile]") -> "list[Rewritten]":
    from persona.store.table import Table
    from persona.store.writer import rewrite

    return rewrite(Table(uri, name), files, replacing)
