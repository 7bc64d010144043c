"""The pieces of Ray Data that every job's chain is made of: reading splits, working by bucket, counting, progress."""

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobs import log
from jobs.metrics import RunMetrics
from persona.errors import RunLost

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from jobs.texts import Texts
    from persona.inputs import Split
    from persona.join import Persona
    from persona.store import Store

Counts = dict[str, dict[str, float]]
# Of input, packed: some ten thousand rows, which a worker holds in memory all at once.
_PARTITION_BYTES = 2**19
# Ray deals buckets to partitions by hash: in as many partitions as buckets, one would hold four of them.
_PARTITIONS_A_BUCKET = 4
_JOINED_ROWS = 512
_QUIET_S = 10.0


class Tally:
    """Counts of a run, kept by an actor. A unit of work that is done twice after a failure is counted once."""

    def __init__(self) -> None:
        self._units: dict[tuple[str, str], Mapping[str, float]] = {}
        self._sums: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._metrics = RunMetrics()

    def add(self, stage: str, unit: str, counts: Mapping[str, float]) -> None:
        """Notes what a unit of a stage did; the last word on a unit counts."""
        before = self._units.get((stage, unit), {})
        self._metrics.note(stage, before, counts)
        self._units[stage, unit] = dict(counts)
        sums = self._sums[stage]
        for name in {**before, **counts}:
            sums[name] += counts.get(name, 0.0) - before.get(name, 0.0)

    def units(self, stage: str) -> list[str]:
        """The units of a stage that have been noted."""
        return [unit for at, unit in self._units if at == stage]

    def totals(self) -> Counts:
        """Sums over units, by stage and name."""
        return {stage: dict(sums) for stage, sums in self._sums.items()}


def new_tally() -> Any:
    """A handle to a Tally actor that lives as long as this run: on the driver's node, so as not to die before it."""
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(Tally).remote()


def note(tally: Any, stage: str, unit: str, counts: Mapping[str, float]) -> None:
    """Adds to the tally and waits until it is in: a worker may end as soon as its work is done."""
    _answer(tally.add.remote(stage, unit, counts))


def totals(tally: Any) -> Counts:
    """What the tally knows now."""
    sums: Counts = _answer(tally.totals.remote())
    return sums


def units(tally: Any, stage: str) -> list[str]:
    """The units of a stage that the tally knows now."""
    found: list[str] = _answer(tally.units.remote(stage))
    return found


def _answer(promise: Any) -> Any:
    """What the tally answers. Counts that began anew would be wrong, and `--sync` acts on them: so it has one life."""
    import ray

    try:
        return ray.get(promise)
    except ray.exceptions.RayActorError as error:
        raise RunLost(
            "the process that counts the work of this run has died (killed, or out of memory on the driver's machine); "
            "what is committed stays: run the same command again"
        ) from error


@contextmanager
def progress(tally: Any, line: Callable[[Counts, float], str]) -> Iterator[None]:
    """Prints `line(totals, seconds)` on stderr while the body runs: in place on a terminal, now and then in a log."""
    done = threading.Event()
    started = time.perf_counter()
    on_terminal = sys.stderr.isatty() and not log.in_json()

    def show() -> None:
        last, last_at = "", 0.0
        while not done.wait(1.0):
            try:
                text = line(totals(tally), time.perf_counter() - started)
            except RunLost:
                return  # the run itself will say so
            due = on_terminal or time.perf_counter() - last_at > _QUIET_S
            if text and text != last and due:
                if on_terminal:
                    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
                else:
                    log.say(text)
                last, last_at = text, time.perf_counter()
        if on_terminal and last:
            print(file=sys.stderr)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def read(splits: Sequence["Split"], reader: Callable[..., Any], *, limit: int | None, **settings: Any) -> "Dataset":
    """The rows of all splits; `reader(split, **settings)` yields tables and runs where there is a CPU."""
    from dataclasses import asdict

    import ray

    sources = ray.data.from_items([asdict(split) for split in splits], override_num_blocks=len(splits))
    if limit is not None:
        # Every job that is given a limit must take the same rows.
        sources.context.execution_options.preserve_order = True
    rows = sources.map_batches(
        _read_one,  # type: ignore[arg-type]  # Ray's types know nothing of fn_kwargs
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"reader": reader, "settings": settings},
    )
    return rows if limit is None else rows.limit(limit)


def _read_one(batch: "pa.Table", *, reader: Callable[..., Any], settings: dict[str, Any]) -> Iterator["pa.Table"]:
    from persona.inputs import Split

    for fields in batch.to_pylist():
        yield from reader(Split(**fields), **settings)


def by_bucket(
    rows: "Dataset", splits: Sequence["Split"], n_buckets: int, work: Callable[..., Any], **settings: Any
) -> "Dataset":
    """`work(rows_of_one_bucket, **settings)` for each bucket; the only place where rows change machines.

    `work` has to give the same whenever it is called: of a task that is tried again, Ray leaves out as many blocks as
    have gone on already, and what came of those may have been committed meanwhile. So the tables that the job writes to
    are read from a snapshot of the store at the job's beginning.
    """
    n_bytes = sum(split.end - split.start for split in splits)
    n_partitions = min(max(n_bytes // _PARTITION_BYTES, 4), _PARTITIONS_A_BUCKET * n_buckets)
    return rows.groupby("bucket", num_partitions=n_partitions).map_groups(
        work, batch_format="pyarrow", fn_kwargs=settings
    )


def requests_with_histories(
    splits: Sequence["Split"],
    store: "Store",
    tally: Any,
    *,
    job: str,
    personas: Sequence["Persona"],
    max_behaviors: int,
    needs_target: bool,
    stage: str = "join",
    limit: int | None = None,
    keep: Any = None,
    texts: "Texts | None" = None,
    rejected: str | None = None,
) -> "Dataset":
    """Requests, each once for each of `personas` with the history that it may see (`persona.join`), bucket by bucket.

    `store` is a snapshot of the tables that are read; `keep(joined, store, bucket, counts)` may take rows out before
    their vectors are read, and adds the columns that `keep.adds` names; `stage` is where the tally counts; `texts`
    brings the texts of histories to the requests; `rejected` is the column of a text that was not the right answer
    (`requests.REJECTED`).
    """
    reading = {"store": store, "tally": tally, "job": job, "needs_target": needs_target, "rejected": rejected}
    rows = read(splits, read_requests, limit=limit, **reading)
    joining = {"personas": personas, "max_behaviors": max_behaviors}
    joining |= {"store": store, "tally": tally, "stage": stage, "keep": keep, "texts": texts}
    if texts is not None:
        rows, splits = texts.beside(rows, store.n_buckets), [*splits, *texts.splits]
    return by_bucket(rows, splits, store.n_buckets, join_bucket, **joining)


def read_requests(
    split: "Split", *, store: "Store", tally: Any, job: str, needs_target: bool, rejected: str | None
) -> Iterator["pa.Table"]:
    """Valid requests of a split; the others go to the table of rejects."""
    from persona import requests
    from persona.inputs import read_split

    def validate(records: Any) -> Any:
        return requests.validate(records, store.n_buckets, needs_target, job=job, rejected=rejected)

    yield from keep_good(read_split(split, job=job), validate, split=split, store=store, tally=tally)


def keep_good(
    batches: Iterator[Any], validate: Callable[..., Any], *, split: "Split", store: "Store", tally: Any
) -> Iterator["pa.Table"]:
    """The good rows of a split as they are read; its rejects in one commit at the end."""
    import pyarrow as pa

    rejects = []
    n_good = n_unreadable = 0
    good = None
    seconds, since = 0.0, time.perf_counter()
    for records in batches:
        good, bad = validate(records)
        n_good += good.num_rows
        n_unreadable += records.rejects.num_rows
        if bad.num_rows:
            rejects.append(bad)
        if good.num_rows:
            seconds += time.perf_counter() - since
            yield good
            since = time.perf_counter()
    if good is not None and not n_good:
        yield good  # no rows, but columns, which the steps to come look for
    # What could not even be read as a row: nobody knows whose it was.
    counts: dict[str, float] = {"rows": n_good, "rejects": 0, "unreadable": n_unreadable}
    if rejects:
        table = pa.concat_tables(rejects)
        store.write_rejects(table)
        counts["rejects"] = table.num_rows
        for reason in table["reason"].to_pylist():
            counts[f"rejected: {reason}"] = counts.get(f"rejected: {reason}", 0) + 1
    counts["seconds"] = seconds + time.perf_counter() - since
    note(tally, "read", f"{split.uri}:{split.start}", counts)


def join_bucket(
    requests: "pa.Table",
    *,
    store: "Store",
    tally: Any,
    stage: str,
    personas: Sequence["Persona"],
    max_behaviors: int,
    keep: Any,
    texts: "Texts | None" = None,
) -> Iterator["pa.Table"]:
    """The requests of one bucket with their histories, a few hundred at a time; of a repeated id the first counts."""
    import numpy as np
    import pyarrow as pa

    from persona.join import join_histories

    since = time.perf_counter()
    bucket = requests["bucket"][0].as_py()
    if texts is not None:
        requests = texts.joined(requests, store)
    _, first = np.unique(requests["request_id"].to_numpy(), return_index=True)
    counts: dict[str, float] = {"asked": len(first), "repeated": requests.num_rows - len(first)}
    counts |= {"kept": 0, "untimed": 0, "empty": 0, "seconds": 0.0}
    requests = requests.take(pa.array(np.sort(first)))
    sees_own = next((persona for persona in personas if persona in {"own", "mean"}), None)
    for persona in personas:
        for start in range(0, requests.num_rows, _JOINED_ROWS):
            part = requests.slice(start, _JOINED_ROWS)
            part = part.append_column("persona", pa.repeat(persona, part.num_rows))
            how: dict[str, Any] = {"persona": persona, "max_behaviors": max_behaviors}
            joined = join_histories(part, store, bucket, with_vectors=keep is None, **how)
            if persona == sees_own:
                counts["untimed"] += sum(joined["n_untimed"].to_pylist())
                counts["empty"] += joined["n_behaviors"].to_pylist().count(0)
            if keep is not None:
                kept = keep(joined, store, bucket, counts).select([*part.column_names, *keep.adds])
                joined = join_histories(kept, store, bucket, **how)
            counts["kept"] += joined.num_rows
            counts["seconds"] += time.perf_counter() - since
            yield joined
            since = time.perf_counter()
    note(tally, stage, str(bucket), counts)


def each(items: Sequence[Mapping[str, Any]], work: Callable[..., Any], **settings: Any) -> Iterator["pa.Table"]:
    """What `work(table_of_one_item, **settings)`, of which the same holds as in `by_bucket`, yields, side by side."""
    import ray

    if items:
        rows = ray.data.from_items(list(items), override_num_blocks=len(items))
        done = rows.map_batches(work, batch_size=1, batch_format="pyarrow", fn_kwargs=settings)
        yield from done.iter_batches(batch_size=None, batch_format="pyarrow")


def each_row(items: Sequence[Mapping[str, Any]], work: Callable[..., Any], **settings: Any) -> Iterator[dict[str, Any]]:
    """The rows of what `each` yields."""
    for table in each(items, work, **settings):
        yield from table.to_pylist()


def by_models(
    rows: "Dataset", work: type[Any], *, block_rows: int, pool: Mapping[str, Any], **settings: Any
) -> "Dataset":
    """The rows as actors of a class `work(**settings)` give them back, block by block, each as many as it was given."""
    return rows.repartition(target_num_rows_per_block=block_rows).map_batches(
        work,
        fn_constructor_kwargs=settings,
        batch_size=block_rows,
        batch_format="pyarrow",
        udf_modifying_row_count=False,
        **pool,
    )


def staged(rows: "Dataset", *, store: "Store", table: str, tally: Any) -> Iterator[Any]:
    """The files that the rows are staged in, for the driver to commit."""
    files = rows.map_batches(
        stage,  # type: ignore[arg-type]  # Ray's types know nothing of fn_kwargs
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"store": store, "table": table, "tally": tally},
    )
    yield from files.iter_batches(batch_size=None, batch_format="pyarrow")


def stage(rows: "pa.Table", *, store: "Store", table: str, tally: Any) -> "pa.Table":
    """Writes a block to files that nobody sees until the driver commits them (`jobs.commits`)."""
    started = time.perf_counter()
    staged = store.stage(table, rows)
    if staged.num_rows:
        note(tally, "write", staged["file"][0].as_py(), {"seconds": time.perf_counter() - started})
    return staged


def reject_rows(counts: Counts) -> list[tuple[str, str]]:
    """The lines of a summary that tell of rejects."""
    found = counts.get("read", {})
    rows = [("rejects", f"{int(found.get('rejects', 0)):,}")]
    reasons = {name.removeprefix("rejected: "): n for name, n in found.items() if name.startswith("rejected: ")}
    rows += [(f"  {int(n):,}", reason) for reason, n in sorted(reasons.items(), key=lambda item: -item[1])[:5]]
    return rows


def exit_code(counts: Counts, max_reject_fraction: float) -> int:
    """3 when more of the rows were rejected than allowed, else 0."""
    found = counts.get("read", {})
    rejects, rows = found.get("rejects", 0), found.get("rows", 0)
    return 3 if rejects > max_reject_fraction * (rows + rejects) else 0
