"""Encode what the store lacks: histories (Parquet or JSONL) become rows of the `behaviors` table, a text a row.

Reads `--histories`, writes `<store>/behaviors` and `<store>/rejects`. Running it again encodes only what is new or
edited, so the same command is the scheduled refresh.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from jobs import command, flow, session
from jobs.command import Summary
from persona.errors import InputError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.histories import Columns
    from persona.inputs import Split
    from persona.models import ModelFolder
    from persona.options import Pooling
    from persona.store import Identity, Store

_TEXT_RULE = "text as given, cut to max_tokens"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `jobs.embed` can be told."""

    histories: str
    """Parquet or JSONL, a file or a folder, local or s3://: a row a behavior, or a row a user with a list of them."""
    store: str
    """Folder of the tables, local or s3://; made when it is not there."""
    columns: str = ""
    """Names of your columns where they differ: text=body,user_id=author."""
    encoder: str = "BAAI/bge-base-en-v1.5"
    """Hub id or folder (local, s3://) of a BERT-like encoder with safetensors."""
    revision: str = "main"
    """Revision of the encoder on the hub."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """How token vectors become one; auto is what the model's own sentence-transformers file says, else cls."""
    max_tokens: int = 512
    """Tokens of a text that are read."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the encoder's arithmetic; auto is bf16 where the hardware multiplies it natively."""
    token_budget: int | None = None
    """Padded tokens of one forward pass, default 16,384 on a GPU and 2,048 on a CPU; lower it when memory runs out."""
    buckets: int | None = None
    """Buckets of a new store, fixed for its life; about one for each 100,000 behaviors to come (default 64)."""
    block_rows: int = 4096
    """Behaviors of one commit; what a killed run loses is at most this for each actor."""
    actors: int | None = None
    """Encoder actors; default one a GPU, or one a core."""
    cpus_per_actor: int = 1
    """Cores of an actor where there is no GPU."""
    max_reject_fraction: float = 0.01
    """More bad rows than this end the job with exit code 3, after all good ones are in."""
    limit: int | None = None
    """Take only this many behaviors of the input."""
    dry_run: bool = False
    """Say what would be done, and start nothing."""

    def check(self) -> None:
        """Refuses what can be refused without looking at any data."""
        for name in ("max_tokens", "token_budget", "block_rows", "cpus_per_actor"):
            command.at_least(self, name, 1)
        for name in ("buckets", "actors"):
            command.at_least(self, name, 1)
        if not 0 <= self.max_reject_fraction <= 1:
            raise UsageError(f"--max-reject-fraction {self.max_reject_fraction}: must be between 0 and 1")


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import histories, inputs, models, storage
    from persona.store import Store

    started = time.perf_counter()
    source = storage.check_uri(config.histories, flag="--histories")
    target = storage.check_uri(config.store, flag="--store")
    columns = histories.Columns.parse(config.columns, "--columns")
    storage.check_reachable(source, flag="--histories")
    storage.check_reachable(target, flag="--store", write=True)
    splits = inputs.plan_splits(source, flag="--histories")
    histories.check_columns(splits, columns)
    folder = models.resolve(config.encoder, revision=config.revision, flag="--encoder")
    identity = _identity(config, folder)
    if config.dry_run:
        return _plan(target, splits, identity)
    store = Store.open_or_create(target, identity, config.buckets)

    machines = session.connect()
    tally = flow.new_tally()
    with flow.progress(tally, _progress_line):
        for _ in _commits(config, splits, columns, store, machines, tally):
            pass
    counts = flow.totals(tally)
    return _summary(config, store, counts, time.perf_counter() - started)


def _commits(
    config: Config,
    splits: "list[Split]",
    columns: "Columns",
    store: "Store",
    machines: Any,
    tally: Any,
) -> Iterator[Any]:
    """The job as one chain: read, find what is missing, encode, commit."""
    rows = flow.read(splits, _read, limit=config.limit, columns=columns, store=store, tally=tally)
    missing = flow.by_bucket(rows, splits, store.n_buckets, _missing, store=store, tally=tally)
    yield from (
        missing.repartition(target_num_rows_per_block=config.block_rows)
        .map_batches(
            Encode,
            fn_constructor_kwargs={"config": config, "identity": store.identity, "tally": tally},
            batch_size=config.block_rows,
            batch_format="pyarrow",
            udf_modifying_row_count=False,
            **machines.pool(config.actors, config.cpus_per_actor),
        )
        .map_batches(
            _commit,  # type: ignore[arg-type]  # Ray's types know nothing of fn_kwargs
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"store": store, "tally": tally},
        )
        .iter_batches(batch_size=None, batch_format="pyarrow")
    )


def _read(split: "Split", *, columns: "Columns", store: "Store", tally: Any) -> Iterator["pa.Table"]:
    """Valid behaviors of a split; the others go to the table of rejects."""
    from persona import histories
    from persona.inputs import read_split

    def validate(records: Any) -> Any:
        return histories.validate(records, columns, store.n_buckets, job="embed")

    yield from flow.keep_good(read_split(split, job="embed"), validate, split=split, store=store, tally=tally)


def _missing(rows: "pa.Table", *, store: "Store", tally: Any) -> "pa.Table":
    """Of one bucket's behaviors, those that the store lacks or holds with another text."""
    bucket = rows["bucket"][0].as_py()
    missing, counts = store.missing(bucket, rows)
    flow.note(tally, "compare", str(bucket), counts)
    return missing


class Encode:
    """A frozen encoder in an actor: loaded once, then behaviors in, vectors out."""

    def __init__(self, config: Config, identity: "Identity", tally: Any) -> None:
        from persona import models
        from persona.encoder import TextEncoder

        session.quiet_models(config.cpus_per_actor)
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

    def __call__(self, behaviors: "pa.Table") -> "pa.Table":
        """The column `text` becomes `vector`: 2·d bytes of little-endian float16."""
        import pyarrow as pa

        started = time.perf_counter()
        encoded = self.encoder.encode(behaviors["text"].to_pylist())
        width = encoded.vectors.shape[1]
        vectors = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(2 * width), len(encoded.vectors), [None, pa.py_buffer(encoded.vectors.astype("<f2").tobytes())]
        )
        counts = {"rows": behaviors.num_rows, "tokens": encoded.n_tokens, "padded": encoded.n_padded}
        unit = f"{behaviors['user_id'][0]}/{behaviors['behavior_id'][0]}"
        flow.note(self.tally, "encode", unit, {**counts, "seconds": time.perf_counter() - started})
        return behaviors.drop_columns(["text"]).append_column("vector", vectors.cast(pa.binary()))


def _commit(rows: "pa.Table", *, store: "Store", tally: Any) -> "pa.Table":
    """One block, one commit."""
    import pyarrow as pa

    store.write_behaviors(rows)
    if rows.num_rows:
        flow.note(tally, "commit", f"{rows['user_id'][0]}/{rows['behavior_id'][0]}", {"rows": rows.num_rows})
    return pa.table({"rows": [rows.num_rows]})


def _identity(config: Config, folder: "ModelFolder") -> "Identity":
    """What the store will remember of the encoder."""
    from persona.models import sentence_pooling
    from persona.store import Identity

    return Identity(
        encoder=folder.name,
        revision=folder.revision,
        fingerprint=folder.fingerprint,
        width=folder.config["hidden_size"],
        pooling=sentence_pooling(folder) if config.pooling == "auto" else config.pooling,
        max_tokens=config.max_tokens,
        text_rule=_TEXT_RULE,
    )


def _progress_line(counts: flow.Counts, seconds: float) -> str:
    todo = counts.get("compare", {})
    total = int(todo.get("new", 0) + todo.get("edited", 0))
    done = int(counts.get("commit", {}).get("rows", 0))
    if not todo:
        return f"embed: read {int(counts.get('read', {}).get('rows', 0)):,} behaviors" if counts else ""
    return f"embed: {done:,} of {total:,} behaviors encoded and committed, {done / seconds:,.0f}/s"


def _plan(target: str, splits: "list[Split]", identity: "Identity") -> Summary:
    from persona.store import Store

    n_bytes = sum(split.end - split.start for split in splits)
    try:
        store = Store.open(target)
        would = (
            "add what is missing to the store"
            if store.identity == identity
            else "refuse: the store belongs to another encoder"
        )
    except InputError:
        would = "make the store"
    n_files = len({split.uri for split in splits})
    table = [
        ("would", would),
        ("store", target),
        ("input", f"{n_files:,} files, {n_bytes:,} bytes, {len(splits):,} splits"),
    ]
    table += [("encoder", f"{identity.encoder} ({identity.width} wide, {identity.pooling} pooling)")]
    return Summary(table=table, result={"dry_run": True, "would": would, "files": n_files, "bytes": n_bytes})


def _summary(config: Config, store: "Store", counts: flow.Counts, seconds: float) -> Summary:
    compare, encode = counts.get("compare", {}), counts.get("encode", {})
    committed = int(counts.get("commit", {}).get("rows", 0))
    result = {
        "job": "embed",
        "store": store.uri,
        "read": int(counts.get("read", {}).get("rows", 0)),
        **{name: int(compare.get(name, 0)) for name in ("known", "new", "edited", "duplicates")},
        "committed": committed,
        "rejects": int(counts.get("read", {}).get("rejects", 0)),
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
        ("tokens", f"{result['tokens']:,} and {padding:.1%} padding"),
        ("seconds", f"{seconds:,.1f} ({result['behaviors_per_s']:,} behaviors/s)"),
        ("store", f"{store.uri}, version {result['version']}"),
        *flow.reject_rows(counts),
    ]
    return Summary(table=table, result=result, exit_code=flow.exit_code(counts, config.max_reject_fraction))


if __name__ == "__main__":
    sys.exit(command.run(Config, main))
