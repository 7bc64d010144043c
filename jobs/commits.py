"""What workers have staged is committed here, in the driver and nowhere else, while the stream goes on.

Ray hands the driver what each block has staged once, however often a task was tried; files of lost attempts are never
committed, and `jobs.store vacuum` deletes them. New rows are committed as they come. Rows that replace others wait
until there are many, because a file that holds replaced rows has to be written again: that is work for the cluster.
"""

import queue
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from jobs import flow

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.layouts import DataFile
    from persona.writer import Rewritten, Writer

# The log gets a version a second at most: each one costs every later reader a little.
_EVERY_S = 1.0
_REPLACED_TOGETHER = 50_000


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
        self._thread = threading.Thread(target=self._work, daemon=True, name="commits")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def take(self, staged: "pa.Table") -> None:
        """A block's staged files (`persona.writer.staged_files`)."""
        if self._error is not None:
            raise self._error
        if staged.num_rows:
            self._queue.put(staged)

    def _work(self) -> None:
        """Commits whatever has come since the last commit, until None comes."""
        import pyarrow as pa
        import pyarrow.compute as pc

        waiting: list[pa.Table] = []
        ended = False
        try:
            while not ended:
                came = [self._queue.get()]
                started = time.monotonic()
                while not self._queue.empty():
                    came.append(self._queue.get())
                ended = came[-1] is None
                if blocks := [block for block in came if block is not None]:
                    together = pa.concat_tables(blocks)
                    is_new = pc.equal(together["change"], "new")
                    self._add(together.filter(is_new))
                    waiting.append(together.filter(pc.invert(is_new)))
                if ended or sum(pc.sum(block["rows"]).as_py() or 0 for block in waiting) >= _REPLACED_TOGETHER:
                    self._replace(pa.concat_tables(waiting) if waiting else None)
                    waiting = []
                if not ended:
                    time.sleep(max(0.0, _EVERY_S - (time.monotonic() - started)))
        except BaseException as error:  # noqa: BLE001 - it goes on in the driver's own thread
            self._error = error
            while not ended:
                ended = self._queue.get() is None

    def _add(self, staged: "pa.Table") -> None:
        if staged.num_rows:
            self._writer.add(staged)
            self._note(staged)

    def _replace(self, staged: "pa.Table | None") -> None:
        import ray

        if staged is None or not staged.num_rows:
            return
        name, uri = self._writer.table.name, self._writer.table.uri
        touched = self._writer.touched(staged)
        rewriting = ray.remote(num_cpus=1, max_retries=3)(_rewrite)
        self._writer.replace(staged, ray.get([rewriting.remote(uri, name, file, news) for file, news in touched]))
        self._note(staged, rewritten=len(touched))

    def _note(self, staged: "pa.Table", **counts: float) -> None:
        import pyarrow.compute as pc

        self._n_commits += 1
        for change in ("new", "edited", "gone"):
            counts[change] = pc.sum(staged.filter(pc.equal(staged["change"], change))["rows"]).as_py() or 0
        counts["rows"] = counts["new"] + counts["edited"]
        flow.note(self._tally, self._stage, f"commit {self._n_commits}", counts)


def _rewrite(uri: str, name: str, file: "DataFile", replacing: "list[DataFile]") -> "Rewritten | None":
    from persona.tables import Table
    from persona.writer import rewrite

    return rewrite(Table(uri, name), file, replacing)
