"""What workers have staged is committed here, in the driver and nowhere else, while the stream goes on.

Ray hands the driver what each block has staged once, however often a task was tried; files of lost attempts are never
committed, and `jobs.store vacuum` deletes them. New rows are committed as they come. Rows that replace others wait
until there are many, or for a minute, because a file that holds replaced rows has to be written again: that is work for
the cluster, one wave at a time, and meanwhile new rows are committed as before.
"""

import math
import queue
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from jobs.runtime.tally import note

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.store.data_files import DataFile
    from persona.store.writer import Rewritten, Writer

# The log gets a version a second at most: each one costs every later reader a little.
_EVERY_S = 1.0
_REPLACED_TOGETHER = 50_000
_REPLACED_AFTER_S = 60.0


@dataclass(frozen=True, kw_only=True)
class _Wave:
    """Staged rows that replace others, and Ray's promises of the files without those."""

    staged: "pa.Table"
    files: list[Any]


class Committer:
    """Takes staged blocks from the driver's loop and commits them from a thread; a context that ends with all of it in.

    An error of a commit is raised by the next `take`, or at the end. When the body fails, what has come is committed
    all the same: it need not be made again.
    """

    def __init__(self, writer: "Writer", tally: Any, *, stage: str = "commit") -> None:
        self._writer = writer
        self._tally = tally
        self._stage = stage
        self._queue: queue.Queue[pa.Table | None] = queue.Queue(maxsize=1024)
        self._error: BaseException | None = None
        self._n_commits = 0
        self._wave: _Wave | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="commits")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._ending.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def take(self, staged: "pa.Table") -> None:
        """A block's staged files (`persona.store.writer.staged_files`)."""
        if self._error is not None:
            raise self._error
        if staged.num_rows:
            self._queue.put(staged)

    def _work(self) -> None:
        """Commits whatever has come since the last commit, until None comes."""
        import pyarrow as pa
        import pyarrow.compute as pc

        waiting: list[pa.Table] = []
        wait_until = math.inf
        ended = False
        try:
            while not ended or waiting or self._wave is not None:
                came = [] if ended else self._arrived(time.monotonic() + _EVERY_S if self._wave else wait_until)
                started = time.monotonic()
                ended = ended or (bool(came) and came[-1] is None)
                if blocks := [block for block in came if block is not None]:
                    together = pa.concat_tables(blocks)
                    is_new = pc.equal(together["change"], "new")
                    self._add(together.filter(is_new))
                    replacing = together.filter(pc.invert(is_new))
                    if replacing.num_rows:
                        waiting.append(replacing)
                        wait_until = min(wait_until, started + _REPLACED_AFTER_S)
                self._end_wave(wait=ended)
                n_waiting = sum(pc.sum(block["rows"]).as_py() for block in waiting)
                due = ended or n_waiting >= _REPLACED_TOGETHER or started >= wait_until
                if self._wave is None and waiting and due:
                    self._begin_wave(pa.concat_tables(waiting))
                    waiting, wait_until = [], math.inf
                if not ended:
                    self._ending.wait(max(0.0, _EVERY_S - (time.monotonic() - started)))
        except BaseException as error:  # noqa: BLE001 - it goes on in the driver's own thread
            self._error = error
            while not ended:
                ended = self._queue.get() is None

    def _arrived(self, until: float) -> "list[pa.Table | None]":
        """All that has come; waits for it, at most until then."""
        try:
            left_s = until - time.monotonic()
            came = [self._queue.get(timeout=max(0.0, left_s) if math.isfinite(left_s) else None)]
        except queue.Empty:
            return []
        while not self._queue.empty():
            came.append(self._queue.get())
        return came

    def _add(self, staged: "pa.Table") -> None:
        if staged.num_rows:
            started = time.perf_counter()
            self._writer.add(staged)
            self._note(staged, seconds=time.perf_counter() - started)

    def _begin_wave(self, staged: "pa.Table") -> None:
        import ray

        name, uri = self._writer.table.name, self._writer.table.uri
        rewriting = ray.remote(num_cpus=1, max_retries=3)(_rewrite)
        # What is committed meanwhile are new rows, in files of their own: none of these files changes.
        files = [rewriting.remote(uri, name, file, news) for file, news in self._writer.touched(staged)]
        self._wave = _Wave(staged=staged, files=files)

    def _end_wave(self, *, wait: bool) -> None:
        """Commits the wave if there is one and its files are written, or else waits for them."""
        import ray

        wave = self._wave
        if wave is None:
            return
        if not wait and wave.files and ray.wait(wave.files, num_returns=len(wave.files), timeout=0)[1]:
            return
        self._note(wave.staged, rewritten=self._writer.replace(wave.staged, ray.get(wave.files)))
        self._wave = None

    def _note(self, staged: "pa.Table", **counts: float) -> None:
        import pyarrow.compute as pc

        self._n_commits += 1
        for change in ("new", "edited", "gone"):
            counts[change] = pc.sum(staged.filter(pc.equal(staged["change"], change))["rows"]).as_py() or 0
        counts["rows"] = counts["new"] + counts["edited"]
        note(self._tally, self._stage, f"commit {self._n_commits}", counts)


def _rewrite(uri: str, name: str, file: "DataFile", replacing: "list[DataFile]") -> "Rewritten | None":
    from persona.store.table import Table
    from persona.store.writer import rewrite

    return rewrite(Table(uri, name), file, replacing)
