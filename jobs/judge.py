"""Have a chat model judge how well stored answers fit the persona that should have given them.

Reads `--requests` (of jobs.import_gym) and `<store>/generations`; writes `<store>/judgements`, `<store>/completions`,
`<store>/rejects`, `<out>/judged.json` and `<out>/judged.html`. Each answer is judged under its persona and under
another one, and nothing that the judge reads tells the variant. To add a judge, run it again with another --chat-model:
the page shows all judges of the table. An answer that has been judged is not judged again.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from jobs.runtime import chat, cli, exchange, judging, pools, session, staging
from jobs.runtime.chat import ChatRef
from jobs.runtime.cli import Summary
from jobs.runtime.commits import Committer
from jobs.runtime.inputs import find_files
from jobs.runtime.job_options import FLAT, InputFormat, InputRows, LLMPool, flat_settings
from jobs.runtime.judging import JudgePlan
from jobs.runtime.progress import Stage, progress
from jobs.runtime.reading import Found
from jobs.runtime.tally import Counts, Tally
from persona.chat.options import ChatOptions
from persona.errors import InputError, UsageError
from persona.option_checks import check_at_least

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.splits import Split
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.judge."""

    requests: str
    """Requests with the columns task, persona and other_persona, as jobs.import_gym writes them."""
    store: str
    """Folder of the tables with the answers of jobs.generate; judgements are written there too."""
    out: str
    """Folder for judged.json and judged.html, local or s3://."""
    variant: tuple[str, ...] = ()
    """Names of the answers to judge; default all that the store has."""
    swap: bool = True
    """Judge each answer under another persona too; without it there is no swap gap, and so no PersonaScore."""
    chat: Annotated[ChatOptions, FLAT] = field(default_factory=ChatOptions)
    block_rows: int = 64
    """Judgements committed together; replies are committed as they come."""
    seed: int = 0
    """Seed of the bootstrap behind the intervals."""
    pool: Annotated[LLMPool, FLAT] = field(default_factory=LLMPool)
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    form: Annotated[InputFormat, FLAT] = field(default_factory=InputFormat)
    dry_run: bool = False
    """Show what would be asked at most, and what it would cost; change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "block_rows")
        if len(set(self.variant)) < len(self.variant):
            raise UsageError(f"--variant {' '.join(self.variant)}: give each at most once")


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the job reads and where it writes, found and checked before Ray starts."""

    splits: "Sequence[Split]"
    store: "Store"
    out: str
    plan: JudgePlan


def main(config: Config) -> Summary:
    """Runs the job."""
    started = time.perf_counter()
    inputs = _inputs(config)
    if config.dry_run:
        return _dry_run(config, inputs)

    store = inputs.store
    machines = session.connect()
    pool = chat.plan_pool(machines, config.chat, config.pool)
    tally = Tally.start()
    store.create_missing(judging.TABLE)
    with (
        store.writer(judging.TABLE, job="jobs.judge") as writer,
        chat.replies(store, tally, job="jobs.judge") as replies,
        progress(tally, "judge", _stage_of),
        exchange.run_files(store.uri, judging.TABLE) as folder,
    ):
        requests = _requests(config, inputs, tally, folder)
        with Committer(writer, tally) as committer:
            for staged in _staged(config, inputs, requests, pool, replies, tally):
                committer.take(staged)
        rows = _current(inputs, requests)
    found = requests.found[0]
    judged = _judged(config, inputs, rows, found)
    judged |= {**chat.usage_facts(tally.totals(), config.chat), "seconds": round(time.perf_counter() - started, 1)}
    _write(inputs.out, judged)
    return _summary(config, inputs, judged, found, tally.totals())


def _inputs(config: Config) -> _Inputs:
    from persona import storage
    from persona.chat.base import chat_module
    from persona.inputs.splits import cut
    from persona.judging import requests
    from persona.store.store import Store

    target = storage.check_uri(config.store, flag="--store")
    out = storage.check_uri(config.out, flag="--out")
    storage.check_reachable(target, flag="--store", write=True)
    storage.check_reachable(out, flag="--out", write=True)
    files = find_files(config.requests, config.form, flag="--requests")
    splits = cut(files, files.formats)
    _check_columns(splits, requests.problem)
    store = Store.open(target)
    known = store.variants()
    variants = config.variant or tuple(known)
    if absent := [variant for variant in variants if variant not in known]:
        raise InputError(f"--variant {absent[0]}: the store has no such answers; it has {', '.join(known) or 'none'}")
    if not variants:
        raise InputError(f"the store {store.label} has no answers to judge; make some with jobs.generate")
    module = chat_module(config.chat.chat)
    module.check(config.chat)
    plan = JudgePlan(variants=variants, judge=module.identity(config.chat), swap=config.swap)
    return _Inputs(splits=splits, store=store, out=out, plan=plan)


def _check_columns(splits: "Sequence[Split]", problem: Any) -> None:
    """Raises InputError when the first file cannot be judged; the others are checked when they are read."""
    from persona.inputs.reader import schema_of

    if why := problem(schema_of([split for split in splits if split.uri == splits[0].uri])):
        raise InputError(f"--requests: {splits[0].uri}: {why}")


def _dry_run(config: Config, inputs: _Inputs) -> Summary:
    from persona.judging.prompts import MAX_TOKENS

    calls, n_bytes = judging.planned(
        inputs.splits, inputs.store, inputs.plan.variants, swap=config.swap, limit=config.rows.limit
    )
    facts = chat.planned_facts(config.chat, calls=calls, prompt_bytes=n_bytes, max_tokens=MAX_TOKENS)
    would = f"judge the answers of {', '.join(inputs.plan.variants)} by {inputs.plan.judge}"
    return Summary(
        table=[("would", would), *chat.planned_rows(facts)], result={"dry_run": True, "would": would, **facts}
    )


def _requests(config: Config, inputs: _Inputs, tally: Tally, folder: str) -> exchange.Exchanged:
    """The valid requests, brought together by user."""
    from persona.judging.requests import SCHEMA

    read = judging.JudgeRequests(store=inputs.store, tally=tally)
    source = exchange.Source(splits=inputs.splits, read=read, limit=config.rows.limit)
    return exchange.exchange([source], inputs.store.n_buckets, SCHEMA, key=None, folder=folder)


def _staged(
    config: Config,
    inputs: _Inputs,
    requests: exchange.Exchanged,
    pool: pools.ModelPool,
    replies: chat.Replies,
    tally: Tally,
) -> "Iterator[pa.Table]":
    """The job as one chain: pair, judge, stage."""
    store = inputs.store.snapshot("generations", judging.TABLE)
    # Each variant's answer is judged under its own persona and a wrong one.
    pool = pool.fit(requests.found[0].total.rows * len(inputs.plan.variants) * 2, config.block_rows)
    pairs = exchange.by_window(requests, judging.unjudged, store=store, plan=inputs.plan, tally=tally)
    judged = pools.by_models(
        pairs,
        judging.Judge,
        block_rows=config.block_rows,
        pool=pool,
        ref=ChatRef.of(config.chat, pool),
        replies=replies,
        tally=tally,
    )
    return staging.staged(judged, store=inputs.store, table=judging.TABLE, tally=tally)


def _current(inputs: _Inputs, requests: exchange.Exchanged) -> list[dict[str, Any]]:
    """What all judges of the table say of these answers."""
    store = inputs.store.snapshot("generations", judging.TABLE)
    rows = exchange.by_window(requests, judging.current, store=store, plan=replace(inputs.plan, swap=True))
    batches: Iterator[pa.Table] = rows.iter_batches(batch_size=None, batch_format="pyarrow")  # type: ignore[assignment]
    return [row for batch in batches for row in batch.to_pylist()]


def _judged(config: Config, inputs: _Inputs, rows: list[dict[str, Any]], found: Found) -> dict[str, Any]:
    """The content of `judged.json`, except for what the run asked."""
    from persona.judging.scores import summarize
    from persona.versions import installed_versions

    if not rows:
        raise InputError(
            f"--requests {config.requests}: the variants {', '.join(inputs.plan.variants)} have no answers to these "
            "requests; answer them with jobs.generate"
        )
    compared, n_left_out = judging.comparable(rows, inputs.plan.variants)
    return {
        **summarize(compared or rows, seed=config.seed),
        "left_out": n_left_out if compared else 0,
        "limited": config.rows.limit is not None,
        "without_other_persona": found.total.timeless,
        "rejects": found.total.rejects,
        "settings": {**flat_settings(config), "judge": inputs.plan.judge, "variants": inputs.plan.variants},
        "versions": installed_versions(),
    }


def _write(out: str, judged: Mapping[str, Any]) -> None:
    from persona import storage
    from persona.report.pages import judged_page

    content = json.dumps(cli.plain(judged), indent=2, allow_nan=False) + "\n"
    storage.write_bytes(storage.join(out, "judged.json"), content.encode())
    storage.write_bytes(storage.join(out, "judged.html"), judged_page(cli.plain(judged)))


def _summary(config: Config, inputs: _Inputs, judged: Mapping[str, Any], found: Found, counts: Counts) -> Summary:
    from persona import storage
    from persona.report.judged_wording import lines

    paired = {name: int(n) for name, n in counts.get("pairs", {}).items()}
    n_judged = int(counts.get("commit", {}).get("rows", 0))
    result = {
        "job": "judge",
        "store": inputs.store.uri,
        "out": inputs.out,
        **{name: value for name, value in judged.items() if name not in ("settings", "versions")},
        "judged": n_judged,
        "already_judged": paired.get("pairs", 0) - paired.get("left", 0),
        "stale": paired.get("stale", 0),
        "version": inputs.store.version(judging.TABLE),
    }
    table = [
        ("judged", f"{n_judged:,} now, {result['already_judged']:,} before, by {inputs.plan.judge}"),
        *chat.usage_rows(judged),
        *lines(judged),
        ("page", storage.join(inputs.out, "judged.html")),
        ("seconds", f"{judged['seconds']:,}"),
        *found.reject_rows(),
    ]
    return Summary(table=table, result=result, exit_code=found.exit_code(config.rows.max_reject_fraction))


def _stage_of(counts: Counts) -> Stage | None:
    if not (paired := counts.get("pairs")):
        return None
    done = int(counts.get("judge", {}).get("judged", 0))
    replies = f"{int(counts.get('completions', {}).get('rows', 0)):,} replies committed"
    return Stage(name="judge", done=done, total=int(paired["left"]), unit="judgements", note=replies)


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
