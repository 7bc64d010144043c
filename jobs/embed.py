"""Encode what the store lacks: histories (Parquet or JSONL) become rows of the `behaviors` table, a text a row.

Reads `--histories`, writes `<store>/behaviors` and `<store>/rejects`, and with `--plug` brings `<store>/personas` up to
date. Running it again encodes only what is new or edited, so the same command is the scheduled refresh; with `--sync`
it also takes out what the histories no longer have.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from jobs.runtime import cli, cost, exchange, personas, pools, profile, reading, session, staging
from jobs.runtime.cli import Summary
from jobs.runtime.commits import Committer
from jobs.runtime.job_options import FLAT, ActorPool, InputRows
from jobs.runtime.progress import progress
from jobs.runtime.tally import Counts, Tally
from persona.errors import InputError, UsageError
from persona.options import CostOptions, Precision, check_at_least

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.histories import Columns
    from persona.inputs.splits import Split
    from persona.models.resolve import ModelFolder
    from persona.options import Pooling
    from persona.store.identity import Identity
    from persona.store.store import Store

_TEXT_RULE = "text as given, cut to max_tokens"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.embed."""

    histories: str
    """Histories, Parquet or JSONL, a file or folder, local or s3://: one row per behavior, or per user with a list."""
    store: str
    """Folder of the tables, local or s3://; created if it does not exist."""
    columns: str = ""
    """Names of your columns where they differ: text=body,user_id=author."""
    encoder: str = "BAAI/bge-base-en-v1.5"
    """Hub id or folder (local, s3://) of a BERT-like encoder with safetensors weights."""
    revision: str = "main"
    """Revision of the encoder on the hub."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """How token vectors become one; auto follows the model's sentence-transformers file, or else takes cls."""
    max_tokens: int = 512
    """Cut each text after this many tokens."""
    precision: Precision = "auto"
    """Precision of the encoder; auto is bf16 where the hardware supports it."""
    token_budget: int | None = None
    """Padded tokens per forward pass, default 16,384 on a GPU and 2,048 on a CPU; lower it when memory runs out."""
    buckets: int | None = None
    """Buckets of a new store, fixed for its life (default 64); take one per 100,000 behaviors you expect."""
    block_rows: int | None = None
    """Behaviors per block, which are lost if an actor dies; default 4,096 on GPUs and 1,024 on CPUs."""
    sync: bool = False
    """Delete behaviors that --histories no longer has, unless lines are unreadable or too many rows are bad."""
    plug: str | None = None
    """Folder of a plug; the personas of users whose behaviors changed are recomputed with it."""
    pool: Annotated[ActorPool, FLAT] = field(default_factory=ActorPool)
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    cost: Annotated[CostOptions, FLAT] = field(default_factory=CostOptions)
    profile: bool = False
    """Show at the end where the time went, what the bottleneck was, and which flag would help."""
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "max_tokens", "token_budget", "block_rows", "buckets")
        if self.sync and self.rows.limit is not None:
            raise UsageError("--sync with --limit would delete every behavior beyond the limit; remove one of them")


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.inputs import histories
    from persona.inputs.splits import plan_splits
    from persona.models import resolve as models
    from persona.store.store import Store

    started = time.perf_counter()
    source = storage.check_uri(config.histories, flag="--histories")
    target = storage.check_uri(config.store, flag="--store")
    columns = histories.Columns.parse(config.columns, "--columns")
    storage.check_reachable(source, flag="--histories")
    storage.check_reachable(target, flag="--store", write=True)
    splits = plan_splits(source, flag="--histories")
    histories.check_columns(splits, columns)
    folder = models.resolve(config.encoder, revision=config.revision, flag="--encoder")
    identity = _identity(config, folder)
    plug = personas.check_plug(config.plug, identity) if config.plug else None
    if config.dry_run:
        return _plan(config, target, splits, identity, folder)
    store = Store.open_or_create(target, identity, config.buckets)

    with ExitStack() as leases:
        # Both before any work: who cannot have the second one should not learn it hours later.
        writer = leases.enter_context(store.writer("behaviors", job="jobs.embed"))
        of_personas = leases.enter_context(store.writer("personas", job="jobs.embed")) if plug else None
        machines = session.connect()
        tally = Tally.start()
        with progress(tally, _progress_line):
            with Committer(writer, tally) as committer:
                for staged in _staged(config, splits, columns, store, machines, tally):
                    committer.take(staged)
            if config.sync and not _doubt(config, tally.totals()):
                seen = set(tally.units("compare"))
                for bucket in sorted({str(bucket) for bucket in store.buckets()} - seen):
                    tally.note("compare", bucket, {"gone": writer.remove_partition(bucket)})
            if plug is not None and of_personas is not None:
                personas.update(store, of_personas, plug, tally)
    counts, seconds = tally.totals(), time.perf_counter() - started
    summary = _with_cost(_summary(config, store, counts, seconds), config, folder, counts, machines, seconds)
    return _with_profile(summary, config, counts, machines, seconds) if config.profile else summary


def _staged(
    config: Config,
    splits: "list[Split]",
    columns: "Columns",
    store: "Store",
    machines: session.Machines,
    tally: Tally,
) -> Iterator[Any]:
    """The job as one chain: read, find what is missing, encode, stage."""
    rows = reading.read(splits, _read, limit=config.rows.limit, columns=columns, store=store, tally=tally)
    comparing = {"store": store.snapshot("behaviors"), "tally": tally, "config": config}
    missing = exchange.by_bucket(rows, splits, store.n_buckets, _missing, **comparing)
    # On a CPU small blocks cost nothing, and of a small refresh each core gets its part.
    block_rows = config.block_rows or (4096 if machines.gpus else 1024)
    pool = pools.ModelPool.plan(machines, actors=config.pool.actors, cpus_per_actor=config.pool.cpus_per_actor)
    threads = machines.threads(config.pool.cpus_per_actor)
    of_actors = {"config": config, "identity": store.identity, "tally": tally, "threads": threads}
    encoded = pools.by_models(missing, Encode, block_rows=block_rows, pool=pool, **of_actors)
    return staging.staged(encoded, store=store, table="behaviors", tally=tally)


def _unread(counts: Counts) -> int:
    """Files and lines of the histories of which nobody knows what they hold."""
    return int(counts.get("read", {}).get("unreadable", 0))


def _doubt(config: Config, counts: Counts) -> str:
    """Why what seems to be gone may be there after all; empty where there is no doubt."""
    if unread := _unread(counts):
        return f"{unread:,} files or lines could not be read and may hold what seems gone"
    if reading.exit_code(counts, config.rows.max_reject_fraction):
        return "more rows than --max-reject-fraction allows were rejected, among them perhaps what seems gone"
    return ""


def _read(split: "Split", *, columns: "Columns", store: "Store", tally: Tally) -> Iterator["pa.Table"]:
    """Valid behaviors of a split; the others go to the table of rejects."""
    from persona.inputs import histories
    from persona.inputs.reader import read_split

    def validate(records: Any) -> Any:
        return histories.validate(records, columns, store.n_buckets, job="embed")

    yield from reading.keep_good(read_split(split, job="embed"), validate, split=split, store=store, tally=tally)


def _missing(rows: "pa.Table", *, store: "Store", tally: Tally, config: Config) -> "pa.Table":
    """Of one bucket's behaviors, those that the store lacks or holds with another text, and those that are gone."""
    bucket = rows["bucket"][0].as_py()
    # All input has been read before the first bucket comes here.
    sync = config.sync and not _doubt(config, tally.totals())
    started = time.perf_counter()
    missing, counts = store.missing(bucket, rows, sync=sync)
    tally.note("compare", str(bucket), {**counts, "seconds": time.perf_counter() - started})
    return missing


class Encode:
    """A frozen encoder in an actor: loaded once, then behaviors in, vectors out."""

    def __init__(self, config: Config, identity: "Identity", tally: Tally, threads: session.Threads) -> None:
        import ray

        from persona.models import resolve as models
        from persona.models.encoder import TextEncoder

        session.quiet_models(threads.model)
        session.tokenize_with(threads.tokenizing)
        folder = models.resolve(config.encoder, revision=config.revision, flag="--encoder")
        if folder.fingerprint != identity.fingerprint:
            raise InputError(
                f"--encoder {config.encoder!r} is another model on this node (fingerprint {folder.fingerprint[:12]}) "
                f"than where the job was started ({identity.fingerprint[:12]}); pin it with --revision, or give every "
                "node the same folder"
            )
        self.encoder = TextEncoder(
            folder,
            pooling=cast("Pooling", identity.pooling),
            max_tokens=identity.max_tokens,
            token_budget=config.token_budget,
            precision=config.precision,
        )
        self.tally = tally
        self.threads = threads
        self.may_be_alone = threads.alone > threads.model
        tally.note("encoders", ray.get_runtime_context().get_actor_id() or "", {})
        self.idle_since = time.perf_counter()

    def __call__(self, behaviors: "pa.Table") -> "pa.Table":
        """The column `text` becomes `vector`: 2·d bytes of little-endian float16, null for what is gone."""
        import pyarrow as pa
        import pyarrow.compute as pc

        from persona.store import vectors

        started = time.perf_counter()
        waited_s = started - self.idle_since
        if self.may_be_alone:
            import torch

            # A small refresh brings no second model, which would take longer to load than the first one to do it all.
            self.may_be_alone = len(self.tally.units("encoders")) == 1
            torch.set_num_threads(self.threads.alone if self.may_be_alone else self.threads.model)
        is_there = pc.not_equal(behaviors["change"], "gone")
        texts = behaviors["text"].filter(is_there).to_pylist()
        encoded = self.encoder.encode(texts)
        column = vectors.to_column(encoded.vectors)
        if len(texts) < behaviors.num_rows:
            place = pc.cumulative_sum(is_there.cast(pa.int64()))
            column = column.take(pc.if_else(is_there, pc.subtract(place, 1), None).combine_chunks())
        if behaviors.num_rows:
            unit = f"{behaviors['user_id'][0]}/{behaviors['behavior_id'][0]}"
            counts = {"rows": len(texts), "tokens": encoded.n_tokens, "padded": encoded.n_padded}
            times = {"seconds": time.perf_counter() - started, "tokenizing": encoded.tokenize_s, "waiting": waited_s}
            self.tally.note("encode", unit, {**counts, **times})
        self.idle_since = time.perf_counter()
        return behaviors.drop_columns(["text"]).append_column("vector", column)


def _identity(config: Config, folder: "ModelFolder") -> "Identity":
    """What the store will remember of the encoder."""
    from persona.models.resolve import sentence_pooling
    from persona.store.identity import Identity

    return Identity(
        encoder=folder.name,
        revision=folder.revision,
        fingerprint=folder.fingerprint,
        width=folder.config["hidden_size"],
        pooling=sentence_pooling(folder) if config.pooling == "auto" else config.pooling,
        max_tokens=config.max_tokens,
        text_rule=_TEXT_RULE,
    )


def _progress_line(counts: Counts, seconds: float) -> str:
    todo = counts.get("compare", {})
    total = int(todo.get("new", 0) + todo.get("edited", 0))
    done = int(counts.get("commit", {}).get("rows", 0))
    if not todo:
        return f"embed: read {int(counts.get('read', {}).get('rows', 0)):,} behaviors" if counts else ""
    return f"embed: {done:,} of {total:,} behaviors encoded and committed, {done / seconds:,.0f}/s"


def _plan(config: Config, target: str, splits: "list[Split]", identity: "Identity", folder: "ModelFolder") -> Summary:
    from persona.cost import encoder_flops, tokens_of_text
    from persona.store.store import Store

    n_bytes = sum(split.end - split.start for split in splits)
    would = "make the store"
    if Store.find(target, identity, config.buckets) is not None:
        would = f"add what is missing to the store{' and take out what the histories lack' if config.sync else ''}"
    n_files = len({split.uri for split in splits})
    table = [
        ("would", would),
        ("store", target),
        ("input", f"{n_files:,} files, {n_bytes:,} bytes, {len(splits):,} splits"),
    ]
    table += [("encoder", f"{identity.encoder} ({identity.width} wide, {identity.pooling} pooling)")]
    plan = Summary(table=table, result={"dry_run": True, "would": would, "files": n_files, "bytes": n_bytes})
    n_texts = tokens_of_text(n_bytes) / config.max_tokens
    flops = cost.known(lambda: encoder_flops(folder.config, n_texts=n_texts, tokens=config.max_tokens))
    return cost.planned(plan, config.cost, flops=flops, if_all="if the store had none of it")


def _summary(config: Config, store: "Store", counts: Counts, seconds: float) -> Summary:
    compare, encode = counts.get("compare", {}), counts.get("encode", {})
    committed = int(counts.get("commit", {}).get("rows", 0))
    result = {
        "job": "embed",
        "store": store.uri,
        "read": int(counts.get("read", {}).get("rows", 0)),
        **{name: int(compare.get(name, 0)) for name in ("known", "new", "edited", "gone", "duplicates")},
        "encoded": int(encode.get("rows", 0)),
        "committed": committed,
        "files_rewritten": int(counts.get("commit", {}).get("rewritten", 0)),
        "personas": int(counts.get("personas", {}).get("rows", 0)),
        "rejects": int(counts.get("read", {}).get("rejects", 0)),
        "unreadable": _unread(counts),
        "tokens": int(encode.get("tokens", 0)),
        "seconds": round(seconds, 1),
        "behaviors_per_s": round(committed / seconds, 1),
        "version": store.version("behaviors"),
    }
    padding = 1 - encode.get("tokens", 0) / encode["padded"] if encode.get("padded") else 0.0
    table = [
        ("behaviors read", f"{result['read']:,}"),
        ("already known", f"{result['known']:,}"),
        ("encoded", f"{committed:,} ({result['new']:,} new, {result['edited']:,} edited)"),
        *_sync_rows(config, result, _doubt(config, counts)),
        *([("personas made", f"{result['personas']:,}")] if config.plug else []),
        ("tokens", f"{result['tokens']:,} and {padding:.1%} padding"),
        ("seconds", f"{seconds:,.1f} ({result['behaviors_per_s']:,} behaviors/s)"),
        ("store", f"{store.uri}, version {result['version']}"),
        *reading.reject_rows(counts),
    ]
    return Summary(table=table, result=result, exit_code=reading.exit_code(counts, config.rows.max_reject_fraction))


def _with_cost(
    summary: Summary,
    config: Config,
    folder: "ModelFolder",
    counts: Counts,
    machines: session.Machines,
    seconds: float,
) -> Summary:
    from persona.cost import encoder_flops

    encoded = counts.get("encode", {})
    n_texts = encoded.get("rows", 0)
    mean_tokens = round(encoded["tokens"] / n_texts) if n_texts else 0
    flops = cost.known(lambda: encoder_flops(folder.config, n_texts=n_texts, tokens=mean_tokens))
    n_models = machines.n_models(config.pool.actors, config.pool.cpus_per_actor)
    model_s = encoded.get("seconds", 0.0)
    return cost.spent(summary, config.cost, machines, n_models=n_models, seconds=seconds, flops=flops, model_s=model_s)


def _with_profile(
    summary: Summary, config: Config, counts: Counts, machines: session.Machines, seconds: float
) -> Summary:
    n_actors = machines.n_models(config.pool.actors, config.pool.cpus_per_actor)
    cores = "more CPUs for Ray, on this machine or on others"
    stages = [
        profile.stage(counts, "encode", n_actors, "more GPUs or cores (--actors), or a smaller --encoder"),
        profile.stage(counts, "read", machines.cores, f"{cores}; also input in more files"),
        profile.stage(counts, "compare", machines.cores, f"{cores}; also a store with more --buckets"),
        profile.stage(
            counts, "encode", n_actors, "shorter texts (--max-tokens)", seconds="tokenizing", name="tokenize"
        ),
        *profile.writing(counts, machines.cores),
    ]
    waited_s = counts.get("encode", {}).get("waiting", 0.0)
    starving = "more CPUs for Ray would feed it, or fewer --actors would do"
    return profile.added(summary, stages, wall_s=seconds, waited_s=waited_s, starving=starving)


def _sync_rows(config: Config, result: dict[str, Any], doubt: str) -> list[tuple[str, str]]:
    if not config.sync:
        return []
    said = f"nothing, because {doubt}" if doubt else f"{result['gone']:,} that the histories no longer have"
    return [("taken out", said)]


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
