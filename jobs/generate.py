"""Answer requests with the user's persona in front of the LLM: requests become rows of the `generations` table.

Reads `--requests`, `<store>/behaviors` and the plug; writes `<store>/generations` and `<store>/rejects`. A request that
has been answered from the same history, by the same plug, LLM and decoding is left alone; an answer that is out of date
is replaced.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from jobs.runtime import cli, cost, joining, pools, profile, reading, retrieval as retrieve, session, staging
from jobs.runtime.cli import Summary
from jobs.runtime.commits import Committer
from jobs.runtime.job_options import FLAT, ActorPool, InputRows, PastTexts, PlugModels
from jobs.runtime.progress import progress
from jobs.runtime.tally import Counts, Tally
from persona.errors import UsageError
from persona.options import CostOptions, Decoding, PersonaKind, RetrievalOptions, check_at_least

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.splits import Split
    from persona.models.resolve import ModelFolder
    from persona.plug.answerer import Answerer
    from persona.plug.record import PlugRecord
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.generate."""

    requests: str
    """Requests, Parquet or JSONL, local or s3://."""
    store: str
    """Folder of the tables made by jobs.embed; answers are written there too."""
    plug: str
    """Folder of the plug made by jobs.train, local or s3://."""
    persona: tuple[PersonaKind, ...] = (PersonaKind.OWN,)
    """Histories to answer with: the own, none, another user's, the own weighted equally (mean); bare has no plug."""
    variant: str | None = None
    """Name of the answers in the table; default the persona, with --retrieve a name like own-bm25-4."""
    decoding: Annotated[Decoding, FLAT] = field(default_factory=Decoding)
    retrieval: Annotated[RetrievalOptions, FLAT] = field(default_factory=RetrievalOptions)
    past_texts: Annotated[PastTexts, FLAT] = field(default_factory=PastTexts)
    models: Annotated[PlugModels, FLAT] = field(default_factory=PlugModels)
    batch_size: int = 32
    """Requests answered together; lower it when a GPU runs out of memory."""
    keep_stale: bool = False
    """Write only missing answers; keep those whose history, request, plug, LLM or decoding has changed."""
    block_rows: int = 512
    """Answers committed together; a killed run loses at most two such blocks per actor."""
    pool: Annotated[ActorPool, FLAT] = field(default_factory=ActorPool)
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    cost: Annotated[CostOptions, FLAT] = field(default_factory=CostOptions)
    profile: bool = False
    """Show at the end where the time went, what the bottleneck was, and which flag would help."""
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "batch_size", "block_rows")
        self.past_texts.check_enough_for(self.retrieval)
        self.past_texts.check_used_by(self.retrieval)
        if not self.persona or len(set(self.persona)) < len(self.persona):
            given = " ".join(self.persona)
            raise UsageError(f"--persona {given}: give one or more of own, none, other, mean, bare, each at most once")
        if self.variant is not None and len(self.persona) > 1:
            raise UsageError("--variant names the answers of one persona; with several, each has the persona's name")


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.inputs import requests
    from persona.inputs.splits import plan_splits
    from persona.store.store import Store

    started = time.perf_counter()
    source = storage.check_uri(config.requests, flag="--requests")
    target = storage.check_uri(config.store, flag="--store")
    storage.check_reachable(source, flag="--requests")
    storage.check_reachable(target, flag="--store", write=True)
    splits = plan_splits(source, flag="--requests")
    requests.check_columns(splits, needs_target=False)
    store = Store.open(target)
    where = plug_sources(store, config.plug, llm=config.models.llm, encoder=config.models.encoder)
    histories = retrieve.plan(config.past_texts)
    if config.dry_run:
        return _plan(config, splits, where)

    with store.writer("generations", job="jobs.generate") as writer:
        machines = session.connect()
        tally = Tally.start()
        with progress(tally, _progress_line), Committer(writer, tally) as committer:
            for staged in _staged(config, splits, store, where, histories, machines, tally):
                committer.take(staged)
    counts, seconds = tally.totals(), time.perf_counter() - started
    n_models = machines.n_models(config.pool.actors, config.pool.cpus_per_actor)
    summary = _summary(config, store, counts, seconds)
    summary = cost.spent(summary, config.cost, machines, n_models=n_models, seconds=seconds)
    return _with_profile(summary, config, counts, machines, seconds) if config.profile else summary


def _plan(config: Config, splits: "list[Split]", where: Mapping[str, Any]) -> Summary:
    would = f"answer the requests of {len({split.uri for split in splits})} files for {', '.join(config.persona)}"
    if_all = "if none had an answer, inputs and answers of full length"
    sizes = {"times": len(config.persona), "outputs": config.decoding.max_new_tokens, "beams": config.decoding.beams}
    return cost.planned_requests(would, config.cost, splits, where, if_all=if_all, **sizes)


def _staged(
    config: Config,
    splits: "list[Split]",
    store: "Store",
    where: Mapping[str, Any],
    histories: retrieve.Histories | None,
    machines: session.Machines,
    tally: Tally,
) -> Iterator[Any]:
    """The job as one chain: read, join with what each request may see, answer, stage."""
    unanswered = joining.requests_with_histories(
        splits,
        store.snapshot("behaviors", "generations"),
        tally,
        joining.JoinPlan(
            job="generate",
            personas=config.persona,
            max_behaviors=where["record"].max_behaviors,
            needs_target=False,
            limit=config.rows.limit,
            selection=_Unanswered(config, where),
            texts=retrieve.best_of(histories, config.retrieval, where, tally),
        ),
    )
    pool = pools.ModelPool.plan(machines, actors=config.pool.actors, cpus_per_actor=config.pool.cpus_per_actor)
    of_actors = {"config": config, "where": where, "tally": tally}
    answered = pools.by_models(unanswered, Generate, block_rows=config.block_rows, pool=pool, **of_actors)
    return staging.staged(answered, store=store, table="generations", tally=tally)


def plug_sources(store: "Store", plug: str, *, llm: str | None, encoder: str | None) -> dict[str, Any]:
    """Where the plug, its LLM and its encoder lie, checked against each other and against the store.

    Keys: `plug` (URI), `record` (PlugRecord), `fingerprint` (of the plug), `llm` and `encoder` (names of models).
    """
    from persona import storage
    from persona.errors import PlugMismatch
    from persona.models import resolve as models
    from persona.plug import record as plug_record

    uri = storage.check_uri(plug, flag="--plug")
    storage.check_reachable(uri, flag="--plug")
    with storage.local_folder(uri) as folder:
        record = plug_record.read(folder)
        fingerprint = plug_record.fingerprint(folder)
    if record.encoder["fingerprint"] != store.identity.fingerprint:
        raise PlugMismatch(
            f"--plug {plug} was trained on vectors of {record.encoder['name']!r}, but the store holds those of "
            f"{store.identity.encoder!r}; give the store it was trained on, or train a plug on this one"
        )
    names = {"llm": llm or record.llm["name"], "encoder": encoder or record.encoder["name"]}
    found = {
        "llm": models.resolve(names["llm"], revision=record.llm["revision"], flag="--llm"),
        "encoder": models.resolve(names["encoder"], revision=record.encoder["revision"], flag="--encoder"),
    }
    plug_record.check_models(record, encoder=found["encoder"], llm=found["llm"])
    return {"plug": uri, "record": record, "fingerprint": fingerprint, **names}


def load_answerer(where: Mapping[str, Any], config: Config) -> "Answerer":
    """The plug in front of an engine with its LLM, in this process.

    Raises PlugMismatch when another plug lies there now than `where` says.
    """
    from persona.engines.base import new_engine
    from persona.plug import folder as plug_folder, record as plug_record

    encoder, llm = _plug_models(where)
    engine = new_engine(
        "local",
        llm,
        max_input_tokens=where["record"].max_input_tokens,
        precision=config.models.precision,
        batch_size=config.batch_size,
    )
    with plug_record.local_plug(where["plug"], where["fingerprint"]) as folder:
        return plug_folder.load_answerer(
            folder,
            encoder=encoder,
            engine=engine,
            batch_size=config.batch_size,
            prefix_tokens=config.retrieval.front_tokens,
        )


def load_personalized(where: Mapping[str, Any], config: Any) -> Any:
    """The plug in front of its LLM, in this process, to measure losses; raises as `load_answerer` does."""
    from persona.models.frozen_llm import FrozenLLM
    from persona.plug import folder as plug_folder, record as plug_record

    encoder, llm_folder = _plug_models(where)
    llm = FrozenLLM.load(
        llm_folder, max_input_tokens=where["record"].max_input_tokens, precision=config.models.precision
    )
    with plug_record.local_plug(where["plug"], where["fingerprint"]) as folder:
        return plug_folder.load(folder, encoder=encoder, llm=llm, prefix_tokens=config.retrieval.front_tokens)


def _plug_models(where: Mapping[str, Any]) -> "tuple[ModelFolder, ModelFolder]":
    """Encoder and LLM of the plug on this node. Raises PlugMismatch when they are not those of its training."""
    from persona.models import resolve as models
    from persona.plug import record as plug_record

    record: PlugRecord = where["record"]
    encoder = models.resolve(where["encoder"], revision=record.encoder["revision"], flag="--encoder")
    llm = models.resolve(where["llm"], revision=record.llm["revision"], flag="--llm")
    plug_record.check_models(record, encoder=encoder, llm=llm)
    return encoder, llm


def variant_of(config: Config, persona: str) -> str:
    """The name of a persona's answers in the table."""
    return config.variant or config.retrieval.answers_of(persona)


def answer_fingerprint(row: Mapping[str, Any], config: Config, where: Mapping[str, Any]) -> str:
    """What an answer depends on: request, visible history, kind of persona, plug, LLM, decoding.

    Not the precision: answers that were bought on one kind of machine are not bought again on another.
    """
    import hashlib
    import json

    content = {
        **{name: row[name] for name in ("input", "query", "history_hash", "persona")},
        "plug": where["fingerprint"],
        "llm": where["record"].llm["fingerprint"],
        "decoding": config.decoding.facts(),
    }
    if config.retrieval.retrieve:
        content |= {"retrieved": row["retrieved"], "retrieve_tokens": config.retrieval.retrieve_tokens}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


class _Unanswered:
    """Keeps the requests of a bucket that have no answer, or one with another fingerprint."""

    adds = ("fingerprint", "variant", "change")

    def __init__(self, config: Config, where: Mapping[str, Any]) -> None:
        self.config = config
        self.where = where

    def __call__(self, joined: "pa.Table", store: "Store", bucket: int, counts: dict[str, float]) -> "pa.Table":
        """Rows of one persona; adds the columns of `adds`, and counts what is `stale`."""
        import pyarrow as pa

        columns = [
            "input",
            "query",
            "history_hash",
            "persona",
            *(["retrieved"] if self.config.retrieval.retrieve else []),
        ]
        prints = [answer_fingerprint(row, self.config, self.where) for row in joined.select(columns).to_pylist()]
        variant = variant_of(self.config, joined["persona"][0].as_py())
        answered = store.answers(variant, bucket)
        known = dict(zip(answered["request_id"].to_pylist(), answered["fingerprint"].to_pylist(), strict=True))
        found = [known.get(request) for request in joined["request_id"].to_pylist()]
        changes = [
            "new" if old is None else None if old == now else "edited" for old, now in zip(found, prints, strict=True)
        ]
        counts["stale"] = counts.get("stale", 0) + changes.count("edited")
        if self.config.keep_stale:
            changes = [None if change == "edited" else change for change in changes]
        joined = joined.append_column("fingerprint", pa.array(prints, pa.string()))
        joined = joined.append_column("variant", pa.repeat(variant, joined.num_rows))
        joined = joined.append_column("change", pa.array(changes, pa.string()))
        return joined.filter(joined["change"].is_valid())


class Generate:
    """Plug and LLM in an actor: loaded once, then requests with histories in, answers out."""

    def __init__(self, config: Config, where: Mapping[str, Any], tally: Tally) -> None:
        session.quiet_models(config.pool.cpus_per_actor)
        self.answerer = load_answerer(where, config)
        self.decoding = config.decoding
        self.where = where
        self.tally = tally
        self.idle_since = time.perf_counter()

    def __call__(self, requests: "pa.Table") -> "pa.Table":
        """Rows of the generations table, in the order of the requests."""
        from persona.plug.request_tables import answer_all

        started = time.perf_counter()
        answers = answer_all(self.answerer, requests, self.decoding)
        if requests.num_rows:
            unit = f"{requests['request_id'][0]}/{requests['variant'][0]}"
            counts = {"answers": requests.num_rows, "tokens": sum(answers["n_tokens"].to_pylist())}
            counts["waiting"] = started - self.idle_since
            self.tally.note("generate", unit, {**counts, "seconds": time.perf_counter() - started})
        kept = ["request_id", "user_id", "variant", "n_behaviors", "fingerprint", "bucket", "change"]
        rows = requests.select(kept)
        for name in ("output", "n_tokens", "finish_reason"):
            rows = rows.append_column(name, answers[name])
        self.idle_since = time.perf_counter()
        return _with_models(rows, self.where)


def _with_models(rows: "pa.Table", where: Mapping[str, Any]) -> "pa.Table":
    import pyarrow as pa

    names = {"plug": where["fingerprint"], "llm": where["record"].llm["name"]}
    for name, value in names.items():
        rows = rows.append_column(name, pa.repeat(value, rows.num_rows))
    return rows


def _progress_line(counts: Counts, seconds: float) -> str:
    joined = counts.get("join", {})
    if not joined:
        return ""
    done = int(counts.get("commit", {}).get("rows", 0))
    return f"generate: {done:,} of {int(joined['kept']):,} answers committed, {done / seconds:,.1f}/s"


def _summary(config: Config, store: "Store", counts: Counts, seconds: float) -> Summary:
    joined, generated = counts.get("join", {}), counts.get("generate", {})
    n_asked = int(joined.get("asked", 0)) * len(config.persona)
    n_answers = int(counts.get("commit", {}).get("rows", 0))
    stale = _stale(config, int(joined.get("stale", 0)))
    result = {
        "job": "generate",
        "store": store.uri,
        "variants": [variant_of(config, persona) for persona in config.persona],
        "requests": int(joined.get("asked", 0)),
        "answered": n_answers,
        "already_answered": n_asked - int(joined.get("kept", 0)),
        "stale": int(joined.get("stale", 0)),
        "repeated_ids": int(joined.get("repeated", 0)),
        "without_history": int(joined.get("empty", 0)),
        "untimed_behaviors": int(joined.get("untimed", 0)),
        "rejects": int(counts.get("read", {}).get("rejects", 0)),
        "tokens": int(generated.get("tokens", 0)),
        "seconds": round(seconds, 1),
        "answers_per_s": round(n_answers / seconds, 2),
        "version": store.version("generations"),
        "decoding": {name: getattr(config.decoding, name) for name in ("beams", "sample", "max_new_tokens")},
    }
    table = [
        ("requests", f"{result['requests']:,} for {', '.join(config.persona)}"),
        *retrieve.summary_rows(counts),
        ("already answered", f"{result['already_answered']:,}{stale}"),
        ("answered", f"{n_answers:,} ({result['answers_per_s']:,} a second), {result['tokens']:,} tokens"),
        ("seconds", f"{seconds:,.1f}"),
        ("store", f"{store.uri}, generations version {result['version']}"),
        *reading.reject_rows(counts),
    ]
    return Summary(table=table, result=result, exit_code=reading.exit_code(counts, config.rows.max_reject_fraction))


def _with_profile(
    summary: Summary, config: Config, counts: Counts, machines: session.Machines, seconds: float
) -> Summary:
    n_actors = machines.n_models(config.pool.actors, config.pool.cpus_per_actor)
    cores = "more CPUs for Ray, on this machine or on others"
    faster = "more GPUs or cores (--actors), a larger --batch-size, fewer --beams, or a smaller --max-new-tokens"
    stages = [
        profile.stage(counts, "generate", n_actors, faster),
        profile.stage(counts, "read", machines.cores, f"{cores}; also requests in more files"),
        profile.stage(counts, "join", machines.cores, f"{cores}; also a store with more --buckets"),
        *profile.writing(counts, machines.cores),
    ]
    waited_s = counts.get("generate", {}).get("waiting", 0.0)
    starving = "more CPUs for Ray would feed it, or smaller blocks (--block-rows)"
    return profile.added(summary, stages, wall_s=seconds, waited_s=waited_s, starving=starving)


def _stale(config: Config, n: int) -> str:
    if not n:
        return ""
    return f", {n:,} of them out of date and left" if config.keep_stale else f"; {n:,} more were out of date"


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
