"""Encode the behaviors that are not in the store yet: each text becomes a row with a vector in the `behaviors` table.

Reads `--histories` (Parquet, JSONL, or a Delta or Iceberg table), writes `<store>/behaviors` and `<store>/rejects`, and
with `--plug` updates `<store>/personas`. A second run reads only files that are new, and encodes only behaviors that
are new or edited, so the scheduled refresh is the same command; with `--sync` it also deletes behaviors that are no
longer in the histories. Which files have been read is in `<store>/sources`.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from jobs.runtime import (
    cli,
    comparing,
    cost,
    embed_summary,
    encoding,
    exchange,
    first_look,
    personas,
    pools,
    session,
    sources,
    staging,
    sync,
)
from jobs.runtime.cli import Summary
from jobs.runtime.commits import Committer
from jobs.runtime.embed_summary import Done
from jobs.runtime.inputs import Histories, find_files, histories_in, history_columns
from jobs.runtime.job_options import FLAT, ActorPool, InputFormat, InputRows, check_buckets
from jobs.runtime.plugs import PlugRef
from jobs.runtime.pools import ModelPool
from jobs.runtime.progress import progress
from jobs.runtime.tally import Counts, Tally
from persona.errors import UsageError
from persona.option_checks import check_at_least
from persona.options import CostOptions, Precision, VectorOptions

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from persona.inputs.histories import Columns
    from persona.models.resolve import ModelFolder
    from persona.store.identity import Identity
    from persona.store.store import Store
    from persona.store.writer import Writer


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.embed."""

    histories: str
    """Parquet or JSONL files, a Delta table (its folder, or delta+URI) or iceberg+CATALOG://NAMESPACE.TABLE."""
    store: str
    """Folder of the tables, local or s3://; created if it does not exist."""
    columns: str = ""
    """Names of your columns where they differ: text=body,user_id=author."""
    form: Annotated[InputFormat, FLAT] = field(default_factory=InputFormat)
    encoder: str = "BAAI/bge-base-en-v1.5"
    """Hub id or folder (local, s3://) of a text encoder with safetensors weights."""
    revision: str = "main"
    """Revision of the encoder on the hub."""
    vectors: Annotated[VectorOptions, FLAT] = field(default_factory=VectorOptions)
    max_tokens: int = 512
    """Cut each text after this many tokens, or earlier if the encoder's folder says so."""
    precision: Precision = "auto"
    """Precision of the encoder; auto is bf16 where the hardware supports it."""
    token_budget: int | None = None
    """Tokens per forward pass, default 16,384 on a GPU and 2,048 on a CPU; lower it when memory runs out."""
    buckets: int | None = None
    """Buckets of a new store, fixed for its life (default 64): one per 100,000 behaviors to come, up to 1,000."""
    block_rows: int | None = None
    """Behaviors per block, which are lost if an actor dies; by default it grows with the input, to fill data files."""
    sync: bool = False
    """Delete behaviors that --histories no longer has, unless lines are unreadable or too many rows are bad."""
    reread: bool = False
    """Read all files, also those that have been read before and not changed since."""
    plug: str | None = None
    """Folder of a plug, or `live`; the personas of users whose behaviors changed are recomputed with it."""
    pool: Annotated[ActorPool, FLAT] = field(default_factory=ActorPool)
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    cost: Annotated[CostOptions, FLAT] = field(default_factory=CostOptions)
    profile: bool = False
    """Show at the end where the time went, what the bottleneck was, and which flag would help."""
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "max_tokens", "token_budget", "block_rows")
        check_buckets(self.buckets)
        if self.sync and self.rows.limit is not None:
            raise UsageError("--sync with --limit would delete every behavior beyond the limit; remove one of them")


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the job reads and where it writes, found and checked before Ray starts; `store` is None if it is new."""

    planned: sources.Planned
    histories: Histories
    store_uri: str
    store: "Store | None"
    encoder: "ModelFolder"
    identity: "Identity"
    plug: PlugRef | None

    @property
    def has_work(self) -> bool:
        """Whether there are files to read."""
        return bool(self.planned.refresh.to_read)

    def again(self, store: "Store") -> "_Inputs":
        """The same by the ledger as of now, for the holder of the lease."""
        planned = self.planned.again(store)
        if planned.refresh == self.planned.refresh:
            return replace(self, planned=planned)
        return replace(self, planned=planned, histories=_to_read(planned, self.histories.columns))


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona.store import sources as ledger
    from persona.store.store import DEFAULT_BUCKETS, Store

    started = time.perf_counter()
    inputs = _inputs(config)
    if config.dry_run:
        return _plan(config, inputs)
    store = inputs.store or Store.create(inputs.store_uri, inputs.identity, config.buckets or DEFAULT_BUCKETS)
    if not inputs.has_work and inputs.plug is None:
        return _summary(config, inputs, store, Done(), {}, time.perf_counter() - started)

    with ExitStack() as leases:
        # Take all leases before any work: a conflict over the last one should not end a run after hours.
        if inputs.has_work:
            ledger.create(store)
        tables = [*(("behaviors", ledger.NAME) if inputs.has_work else ()), *(("personas",) if inputs.plug else ())]
        writers = {name: leases.enter_context(store.writer(name, job="jobs.embed")) for name in tables}
        inputs = inputs.again(store)
        machines = session.connect()
        pool = ModelPool.plan(machines, config.pool)
        tally, done = Tally.start(), Done()
        with progress(tally, "embed", embed_summary.stage_of):
            if inputs.has_work:
                pool = _update(config, inputs, store, writers, machines, pool, tally, done)
            if inputs.plug is not None:
                personas.update(store, writers["personas"], inputs.plug, tally)
    counts, seconds = tally.totals(), time.perf_counter() - started
    summary = _summary(config, inputs, store, done, counts, seconds)
    summary = embed_summary.with_cost(
        summary, config.cost, inputs.encoder, counts, machines, n_gpus=pool.all_gpus, seconds=seconds
    )
    if config.profile:
        summary = embed_summary.with_profile(
            summary, counts, n_actors=pool.max_size, cores=machines.cores, seconds=seconds
        )
    return summary


def _update(
    config: Config,
    inputs: _Inputs,
    store: "Store",
    writers: "Mapping[str, Writer]",
    machines: session.Machines,
    pool: ModelPool,
    tally: Tally,
    done: Done,
) -> ModelPool:
    """Bring `behaviors` up to date, and then `sources`. Returns the actors that were used."""
    from persona.store import sources as ledger

    planned, max_reject_fraction = inputs.planned, config.rows.max_reject_fraction
    with exchange.run_files(store.uri, "behaviors") as folder:
        read = comparing.read(inputs.histories, store, tally, limit=config.rows.limit, folder=folder)
        done.found = read.found[0]
        done.blocker = sync.blocker(done.found, max_reject_fraction) if planned.refresh.deletes else ""
        deletes = planned.refresh.deletes and not done.blocker
        if deletes:
            planned = planned.before_deleting(writers[ledger.NAME])
        block_rows = _block_rows(config, read, store, machines, pool)
        pool = pool.fit(done.found.total.rows, block_rows)
        keeps_later, snapshot = planned.refresh.keeps_later, store.snapshot("behaviors")
        missing = comparing.missing(read, snapshot, tally, deletes=deletes, keeps_later=keeps_later)
        with Committer(writers["behaviors"], tally) as committer:
            for staged in _staged(config, missing, store, machines, pool, block_rows, tally):
                committer.take(done.receipts.taken_from(staged))
    done.receipts.counts["duplicates"] += read.n_folded
    planned.record(
        writers[ledger.NAME],
        done.found,
        run=folder.rpartition("-")[2],
        version=store.version("behaviors"),
        has_deleted=deletes,
        max_reject_fraction=max_reject_fraction,
    )
    return pool


def _inputs(config: Config) -> _Inputs:
    from persona import storage
    from persona.models import resolve as models
    from persona.store.store import Store

    store_uri = storage.check_uri(config.store, flag="--store")
    storage.check_reachable(store_uri, flag="--store", write=True)
    columns = history_columns(config.columns, config.form)
    files = find_files(config.histories, config.form, flag="--histories")
    encoder = models.resolve(config.encoder, revision=config.revision, flag="--encoder")
    identity = encoding.identity_of(encoder, config.vectors, max_tokens=config.max_tokens, precision=config.precision)
    store = Store.find(store_uri, identity, config.buckets)
    plug = personas.find_plug(config.plug, identity, store) if config.plug else None
    options = sources.Options(sync=config.sync, reread=config.reread, limited=config.rows.limit is not None)
    planned = sources.plan(files, columns, config.form, store, options)
    return _Inputs(
        planned=planned,
        histories=_to_read(planned, columns),
        store_uri=store_uri,
        store=store,
        encoder=encoder,
        identity=identity,
        plug=plug,
    )


def _to_read(planned: sources.Planned, columns: "Columns") -> Histories:
    refresh = planned.refresh
    return histories_in(planned.files, refresh.to_read, columns, lenient=bool(refresh.known))


def _block_rows(
    config: Config, read: exchange.Exchanged, store: "Store", machines: session.Machines, pool: ModelPool
) -> int:
    n_rows, width = read.found[0].total.rows, store.identity.width
    return config.block_rows or read.plan.block_rows(n_rows, width, pool.max_size, on_gpus=bool(machines.gpus))


def _staged(
    config: Config,
    missing: "Dataset",
    store: "Store",
    machines: session.Machines,
    pool: ModelPool,
    block_rows: int,
    tally: Tally,
) -> "Iterator[pa.Table]":
    """Encode what is missing, and stage it. Receipts say what was found."""
    encoded = pools.by_models(
        missing,
        Encode,
        block_rows=block_rows,
        pool=pool,
        config=config,
        identity=store.identity,
        tally=tally,
        n_tokenizing=machines.tokenizing_threads,
    )
    return staging.staged(encoded, store=store, table="behaviors", tally=tally)


class Encode:
    """An actor with a frozen encoder, loaded once: behaviors in, vectors out."""

    def __init__(self, config: Config, identity: "Identity", tally: Tally, n_threads: int, n_tokenizing: int) -> None:
        session.quiet_models(n_threads)
        session.tokenize_with(n_tokenizing)
        self.encoder = encoding.load_encoder(
            config.encoder,
            config.revision,
            identity,
            token_budget=config.token_budget,
            precision=config.precision,
        )
        self.tally = tally
        self.idle_since = time.perf_counter()

    def __call__(self, behaviors: "pa.Table") -> "pa.Table":
        """The column `text` becomes `vector`, see `encoding.encode`."""
        started = time.perf_counter()
        waited_s = started - self.idle_since
        first = behaviors.filter(behaviors["text"].is_valid()).slice(0, 1)
        unit = f"{first['user_id'][0]}/{first['behavior_id'][0]}" if first.num_rows else ""
        column, encoded = encoding.encode(
            self.encoder, behaviors, tell=lambda n_done: self.tally.note_soon("encoding", unit, {"rows": n_done})
        )
        if unit:
            counts = {"rows": len(encoded.vectors), "tokens": encoded.n_tokens, "padded": encoded.n_padded}
            times = {"seconds": time.perf_counter() - started, "tokenizing": encoded.tokenize_s, "waiting": waited_s}
            self.tally.note("encode", unit, {**counts, **times})
        self.idle_since = time.perf_counter()
        return behaviors.drop_columns(["text"]).append_column("vector", column)


def _plan(config: Config, inputs: _Inputs) -> Summary:
    """The summary of a dry run."""
    from persona.cost import encoder_flops

    splits = inputs.histories.splits
    n_bytes = sum(split.end - split.start for split in splits)
    would = "create the store"
    if inputs.store is not None:
        deleting = " and delete those that are not in --histories" if inputs.planned.refresh.deletes else ""
        would = f"add missing behaviors to the store{deleting}" if splits else "read nothing, as no file is new"
    identity = inputs.identity
    behaviors = first_look.look_at_behaviors(inputs.histories, inputs.store, limit=config.rows.limit)
    table = [
        ("would", would),
        ("store", inputs.store_uri if inputs.store is None else inputs.store.label),
        ("reads", f"{len(inputs.planned.refresh.to_read):,} files, {n_bytes:,} bytes, {len(splits):,} splits"),
        *behaviors.rows(),
        *inputs.planned.rows(),
        *inputs.histories.rows(),
        ("encoder", f"{identity.encoder} ({identity.describe()})"),
    ]
    result = {"dry_run": True, "would": would, **behaviors.facts()}
    plan = Summary(table=table, result={**result, **inputs.planned.facts(), **inputs.histories.facts()})
    n_texts, n_tokens = behaviors.all.n, round(min(config.max_tokens, behaviors.all.mean_tokens))
    flops = cost.known(lambda: encoder_flops(inputs.encoder.config, n_texts=n_texts, tokens=n_tokens))
    return cost.planned(plan, config.cost, flops=flops, if_all="if the store lacks all of them")


def _summary(config: Config, inputs: _Inputs, store: "Store", done: Done, counts: Counts, seconds: float) -> Summary:
    return embed_summary.summary(
        done,
        inputs.planned,
        inputs.histories,
        store,
        counts,
        seconds,
        sync=config.sync,
        with_personas=config.plug is not None,
        max_reject_fraction=config.rows.max_reject_fraction,
    )


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
