"""Answer requests with the user's persona in front of the LLM: requests become rows of the `generations` table.

Reads `--requests`, `<store>/behaviors` and the plug; writes `<store>/generations` and `<store>/rejects`. A request that
already has an answer from the same history, plug, LLM and decoding is skipped; an answer that is out of date is
replaced.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from jobs.runtime import (
    cli,
    cost,
    engines,
    exchange,
    joining,
    plugs,
    pools,
    profile,
    reading,
    retrieval,
    session,
    staging,
    user_profiles,
)
from jobs.runtime.answers import AnswerSpec, Unanswered
from jobs.runtime.busy import BusyTime
from jobs.runtime.cli import Summary
from jobs.runtime.commits import Committer
from jobs.runtime.inputs import Histories, Requests, find_requests
from jobs.runtime.job_options import FLAT, InputRows, LLMPool, PastTexts, PlugModels, RequestFormat
from jobs.runtime.plugs import PlugRef
from jobs.runtime.pools import ModelPool
from jobs.runtime.progress import Stage, progress
from jobs.runtime.tally import Counts, Tally
from persona import strengths
from persona.engines.options import EngineOptions
from persona.errors import UsageError
from persona.front_texts import FrontTexts
from persona.option_checks import check_at_least
from persona.options import CostOptions, Decoding, PersonaKind

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.engines.base import EngineSettings
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.generate."""

    requests: str
    """Requests, Parquet or JSONL, local or s3://."""
    store: str
    """Folder of the tables made by jobs.embed; answers are written there too."""
    plug: str
    """Folder of the plug made by jobs.train, local or s3://; hf://OWNER/NAME; or `live` (see jobs.plugs)."""
    persona: tuple[PersonaKind, ...] = (PersonaKind.OWN,)
    """Histories to answer with: the own, none, another user's, the own weighted equally (mean); bare has no plug."""
    persona_strength: tuple[float, ...] = (1.0,)
    """Strengths of own, other and mean personas: 0 is no persona, 1 as trained, more than 1 exaggerates."""
    variant: str | None = None
    """Name of the answers in the table; default the persona, or a name like own-bm25-4 or own-sampled."""
    decoding: Annotated[Decoding, FLAT] = field(default_factory=Decoding)
    front: Annotated[FrontTexts, FLAT] = field(default_factory=FrontTexts)
    past_texts: Annotated[PastTexts, FLAT] = field(default_factory=PastTexts)
    models: Annotated[PlugModels, FLAT] = field(default_factory=PlugModels)
    engine: Annotated[EngineOptions, FLAT] = field(default_factory=EngineOptions)
    batch_size: int = 32
    """Requests answered together; lower it when a GPU runs out of memory. vllm answers as many as memory allows."""
    keep_stale: bool = False
    """Write only missing answers; keep those whose history, request, plug, LLM or decoding has changed."""
    block_rows: int = 512
    """Answers committed together; a killed run loses at most two such blocks per actor, with vllm three."""
    pool: Annotated[LLMPool, FLAT] = field(default_factory=LLMPool)
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    form: Annotated[RequestFormat, FLAT] = field(default_factory=RequestFormat)
    cost: Annotated[CostOptions, FLAT] = field(default_factory=CostOptions)
    profile: bool = False
    """Show at the end where the time went, what the bottleneck was, and which flag would help."""
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "batch_size", "block_rows")
        self.past_texts.check_enough_for(self.front)
        self.past_texts.check_used_by(self.front)
        if not self.persona or len(set(self.persona)) < len(self.persona):
            given = " ".join(self.persona)
            raise UsageError(f"--persona {given}: give one or more of own, none, other, mean, bare, each at most once")
        strengths.check(self.persona, self.persona_strength)
        if self.variant is not None and len(self.personas) > 1:
            raise UsageError("--variant names the answers of one persona; with several, each has the persona's name")
        if self.engine.engine == "vllm" and self.pool.gpus_per_actor > 1:
            raise UsageError(
                f"--gpus-per-actor {self.pool.gpus_per_actor} is for --engine local; with vllm give --tensor-parallel"
            )

    @property
    def personas(self) -> list[str]:
        """Names of the personas at each strength."""
        return strengths.names_at(self.persona, self.persona_strength)


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the job reads and where it writes, found and checked before Ray starts."""

    requests: Requests
    store: "Store"
    plug: PlugRef
    histories: Histories | None


def main(config: Config) -> Summary:
    """Runs the job."""
    started = time.perf_counter()
    inputs = _inputs(config)
    if config.dry_run:
        return _plan(config, inputs)

    with inputs.store.writer("generations", job="jobs.generate") as writer:
        machines = session.connect()
        pool = engines.plan_pool(machines, config.pool, config.engine)
        tally = Tally.start()
        with progress(tally, "generate", _stage_of), exchange.run_files(inputs.store.uri, "generations") as folder:
            requests = _requests(config, inputs, tally, folder)
            pool = pool.fit(requests.found.total.rows * len(config.personas), config.block_rows)
            with Committer(writer, tally) as committer:
                for staged in _staged(config, inputs, requests, pool, tally):
                    committer.take(staged)
    counts, seconds = tally.totals(), time.perf_counter() - started
    summary = _summary(config, inputs, requests.found, counts, seconds)
    summary = cost.spent(summary, config.cost, machines, n_gpus=pool.all_gpus, seconds=seconds)
    if config.profile:
        summary = _with_profile(summary, counts, n_actors=pool.max_size, cores=machines.cores, seconds=seconds)
    return summary


def _inputs(config: Config) -> _Inputs:
    from persona import storage
    from persona.store.store import Store

    target = storage.check_uri(config.store, flag="--store")
    storage.check_reachable(target, flag="--store", write=True)
    requests = find_requests(config.requests, config.form, flag="--requests", needs_target=False)
    store = Store.open(target)
    user_profiles.check(config.front, store)
    plug = plugs.find_plug(
        store,
        config.plug,
        config.models,
        requests,
        retrieved_tokens=config.front.front_tokens,
        max_new_tokens=config.decoding.max_new_tokens,
    )
    engines.check(plug, _engine_settings(config, plug), config.decoding)
    return _Inputs(requests=requests, store=store, plug=plug, histories=retrieval.plan(config.past_texts, config.form))


def _plan(config: Config, inputs: _Inputs) -> Summary:
    """The summary of a dry run."""
    n_files = len({split.uri for split in inputs.requests.splits})
    plan = cost.planned_requests(
        f"answer the requests of {n_files} files for {', '.join(config.personas)}",
        config.cost,
        inputs.requests,
        inputs.plug,
        needs_target=False,
        limit=config.rows.limit,
        passes=len(config.personas),
        outputs=config.decoding.max_new_tokens,
        beams=config.decoding.beams,
        if_all="if no request has an answer yet, with answers of full length",
    )
    example = plugs.prompt_example(inputs.plug, retrieved=bool(config.front.front_tokens))
    return cli.with_prompt_example(plan, example)


def _requests(config: Config, inputs: _Inputs, tally: Tally, folder: str) -> joining.Joined:
    """The requests that have no answer yet, joined with their visible histories."""
    store = inputs.store.snapshot("behaviors", "generations", *user_profiles.tables(config.front))
    spec = retrieval.RetrievalSpec.of_plug(inputs.plug, config.front, inputs.histories)
    plan = joining.JoinPlan(
        job="generate",
        personas=config.persona,
        strengths=config.persona_strength,
        max_behaviors=inputs.plug.record.max_behaviors,
        needs_target=False,
        limit=config.rows.limit,
        selection=Unanswered(_answer_spec(config, inputs.plug), keep_stale=config.keep_stale),
        texts=retrieval.best_of(spec, tally),
        front=user_profiles.of(config.front, tally),
    )
    return joining.requests_with_histories(inputs.requests, store, tally, plan, folder=folder)


def _staged(
    config: Config, inputs: _Inputs, requests: joining.Joined, pool: ModelPool, tally: Tally
) -> "Iterator[pa.Table]":
    """The rest of the job as one chain: generate, stage."""
    answered = pools.by_models(
        requests.rows, Generate, block_rows=config.block_rows, pool=pool, config=config, plug=inputs.plug, tally=tally
    )
    return staging.staged(answered, store=inputs.store, table="generations", tally=tally)


def _answer_spec(config: Config, plug: PlugRef) -> AnswerSpec:
    return AnswerSpec(
        plug=plug,
        decoding=config.decoding,
        front=config.front,
        variant=config.variant,
        engine=engines.identity(config.engine, config.decoding),
    )


def _engine_settings(config: Config, plug: PlugRef) -> "EngineSettings":
    return engines.settings_of(
        plug,
        config.engine,
        precision=config.models.precision,
        device=config.pool.device,
        batch_size=config.batch_size,
    )


class Generate:
    """An actor with plug and LLM, loaded once: requests with histories in, answers out."""

    def __init__(self, config: Config, plug: PlugRef, tally: Tally, n_threads: int) -> None:
        session.quiet_models(n_threads)
        self.answerer = engines.load_answerer(
            plug, _engine_settings(config, plug), retrieved_tokens=config.front.front_tokens
        )
        self.decoding = config.decoding
        self.plug = plug
        self.tally = tally
        self.busy = BusyTime()

    def __call__(self, requests: "pa.Table") -> "pa.Table":
        """Rows of the generations table, in the order of the requests."""
        import pyarrow as pa

        from persona.plug.request_tables import answer_all

        with self.busy.call() as times:
            answers = answer_all(self.answerer, requests, self.decoding)
        if requests.num_rows:
            unit = f"{requests['request_id'][0]}/{requests['variant'][0]}"
            counts = {"answers": requests.num_rows, "tokens": sum(answers["n_tokens"].to_pylist())}
            self.tally.note("generate", unit, {**counts, "waiting": times.waiting, "seconds": times.seconds})
        rows = requests.select(["request_id", "user_id", "variant", "n_behaviors", "fingerprint", "bucket", "change"])
        for name in ("output", "n_tokens", "finish_reason"):
            rows = rows.append_column(name, answers[name])
        for name, value in (("plug", self.plug.fingerprint), ("llm", self.plug.record.llm["name"])):
            rows = rows.append_column(name, pa.repeat(value, rows.num_rows))
        return rows


def _stage_of(counts: Counts) -> Stage | None:
    if not (joined := counts.get("join")):
        return None
    committed = f"{int(counts.get('commit', {}).get('rows', 0)):,} committed"
    n_answers = int(counts.get("generate", {}).get("answers", 0))
    return Stage(name="generate", done=n_answers, total=int(joined["kept"]), unit="answers", note=committed)


def _summary(config: Config, inputs: _Inputs, found: reading.Found, counts: Counts, seconds: float) -> Summary:
    joined, generated = counts.get("join", {}), counts.get("generate", {})
    n_wanted = int(joined.get("asked", 0)) * len(config.personas)
    n_answers = int(counts.get("commit", {}).get("rows", 0))
    spec, store = _answer_spec(config, inputs.plug), inputs.store
    result = {
        "job": "generate",
        "store": store.uri,
        "variants": [spec.variant_of(persona) for persona in config.personas],
        "requests": int(joined.get("asked", 0)),
        "answered": n_answers,
        "already_answered": n_wanted - int(joined.get("kept", 0)),
        "stale": int(joined.get("stale", 0)),
        "repeated_ids": int(joined.get("repeated", 0)),
        "without_history": int(joined.get("empty", 0)),
        "without_as_of": found.total.timeless,
        "untimed_behaviors": int(joined.get("untimed", 0)),
        **user_profiles.facts(counts),
        **inputs.requests.facts(),
        "rejects": found.total.rejects,
        "tokens": int(generated.get("tokens", 0)),
        "seconds": round(seconds, 1),
        "answers_per_s": round(n_answers / seconds, 2),
        "version": store.version("generations"),
        "decoding": {name: getattr(config.decoding, name) for name in ("beams", "sample", "max_new_tokens")},
    }
    stale = _stale_note(int(joined.get("stale", 0)), is_kept=config.keep_stale)
    table = [
        ("requests", f"{result['requests']:,} for {', '.join(config.personas)}"),
        *retrieval.summary_rows(counts),
        *user_profiles.summary_rows(counts),
        ("already answered", f"{result['already_answered']:,}{stale}"),
        ("answered", f"{n_answers:,} ({result['answers_per_s']:,} a second), {result['tokens']:,} tokens"),
        ("seconds", f"{seconds:,.1f}"),
        ("store", f"{store.label}, generations version {result['version']}"),
        *reading.request_rows(inputs.requests, found),
        *joining.repeated_rows(counts),
    ]
    return Summary(table=table, result=result, exit_code=found.exit_code(config.rows.max_reject_fraction))


def _stale_note(n: int, *, is_kept: bool) -> str:
    if not n:
        return ""
    return f", {n:,} of them out of date and kept" if is_kept else f"; {n:,} more were out of date"


def _with_profile(summary: Summary, counts: Counts, *, n_actors: int, cores: int, seconds: float) -> Summary:
    more_cpus = "more CPUs for Ray, on this machine or on others"
    faster = "more GPUs or cores (--actors), a larger --batch-size, fewer --beams, or a smaller --max-new-tokens"
    stages = [
        profile.stage(counts, "generate", n_actors, faster),
        profile.stage(counts, "read", cores, f"{more_cpus}; also requests in more files"),
        profile.stage(counts, "join", cores, f"{more_cpus}; also a store with more --buckets"),
        *profile.writing(counts, cores),
    ]
    waited_s = counts.get("generate", {}).get("waiting", 0.0)
    starving = "more CPUs for Ray, or smaller blocks (--block-rows)"
    return profile.added(summary, stages, wall_s=seconds, waited_s=waited_s, starving=starving)


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
