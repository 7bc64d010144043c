"""Learn what users prefer from their choices: preference pairs become a profile per user, in words and demonstrations.

Reads `--requests` with a preferred answer (`target`), a worse one (`--rejected`) and the time of the choice (`as_of`);
writes `<store>/profiles` and `<store>/rejects`. A profile whose pairs, options and LLM are unchanged is kept; one that
is out of date is replaced. The method is SynthesizeMe (arXiv 2506.05598); `--by likelihood` is its search without a
strong LLM. `generate --user-profile` and `evaluate --user-profile` put profiles in front of requests.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any

from jobs.runtime import (
    chat as chats,
    cli,
    cost,
    exchange,
    pools,
    preferences,
    profile_plan,
    profilers,
    reading,
    session,
    staging,
)
from jobs.runtime.chat import ChatRef
from jobs.runtime.cli import Summary
from jobs.runtime.commits import Committer
from jobs.runtime.inputs import Requests, find_requests
from jobs.runtime.job_options import FLAT, InputRows, LLMPool, RequestFormat
from jobs.runtime.pools import ModelPool
from jobs.runtime.preferences import Wanted
from jobs.runtime.profilers import JudgeOptions, LLMSpec
from jobs.runtime.progress import Stage, progress
from jobs.runtime.session import Machines
from jobs.runtime.tally import Counts, Tally
from persona.chat.base import chat_module, check_chat
from persona.chat.options import ChatOptions
from persona.errors import UsageError
from persona.option_checks import check_at_least, check_default
from persona.options import CostOptions
from persona.profiling.options import ProfileOptions

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.profile."""

    requests: str
    """Requests with preferred answers in `target`, Parquet or JSONL, local or s3://."""
    store: str
    """Folder of the tables made by jobs.embed; profiles are written there too."""
    rejected: str = "rejected"
    """Column of --requests with the answer that the user did not prefer."""
    options: Annotated[ProfileOptions, FLAT] = field(default_factory=ProfileOptions)
    judge: Annotated[JudgeOptions, FLAT] = field(default_factory=JudgeOptions)
    chat: Annotated[ChatOptions, FLAT] = field(default_factory=ChatOptions)
    block_rows: int = 64
    """Profiles committed together; a killed run loses at most two such blocks per actor."""
    pool: Annotated[LLMPool, FLAT] = field(default_factory=LLMPool)
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    form: Annotated[RequestFormat, FLAT] = field(default_factory=RequestFormat)
    cost: Annotated[CostOptions, FLAT] = field(default_factory=CostOptions)
    dry_run: bool = False
    """Show what would be done and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "block_rows")
        if self.options.by == "chat":
            self.judge.check_unused()
        else:
            check_default(self.chat, *(one.name for one in fields(self.chat)), needs="--by chat")


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the job reads and where it writes, found and checked before Ray starts."""

    requests: Requests
    store: "Store"
    llm: LLMSpec | None
    """The LLM that judges; None if a chat model is asked."""
    model: str
    """Identifies either."""


@dataclass(frozen=True, kw_only=True)
class _Making:
    """The actors that make profiles, and what they are made with."""

    actor: type[pools.Model]
    pool: ModelPool
    settings: Mapping[str, object]


def main(config: Config) -> Summary:
    """Runs the job."""
    started = time.perf_counter()
    inputs = _inputs(config)
    if config.dry_run:
        return _plan(config, inputs)
    inputs.store.create_missing("profiles")
    with inputs.store.writer("profiles", job="jobs.profile") as writer:
        machines = session.connect()
        tally = Tally.start()
        with (
            progress(tally, "profile", _stage_of),
            exchange.run_files(inputs.store.uri, "profiles") as folder,
            _making(config, inputs, machines, tally) as making,
        ):
            exchanged = _exchanged(config, inputs, tally, folder)
            with Committer(writer, tally) as committer:
                for staged in _staged(config, inputs, exchanged, making, tally):
                    committer.take(staged)
    found, counts, seconds = exchanged.found[0], tally.totals(), time.perf_counter() - started
    summary = _summary(config, inputs, found, counts, seconds)
    return cost.spent(summary, config.cost, machines, n_gpus=making.pool.all_gpus, seconds=seconds)


def _plan(config: Config, inputs: _Inputs) -> Summary:
    """The summary of a dry run."""
    options = config.options
    first = profile_plan.look(
        inputs.requests, rejected=config.rejected, n_buckets=inputs.store.n_buckets, limit=config.rows.limit
    )
    plan = first.summary(f"make profiles by {options.by}, as recipe {options.name}", options, inputs.requests)
    if inputs.llm is not None:
        return profile_plan.of_likelihood(first, options, inputs.llm, config.cost, plan)
    return profile_plan.of_chat(first, options, config.chat, plan)


def _inputs(config: Config) -> _Inputs:
    from persona import storage
    from persona.store.store import Store

    target = storage.check_uri(config.store, flag="--store")
    storage.check_reachable(target, flag="--store", write=True)
    requests = find_requests(
        config.requests, config.form, flag="--requests", needs_target=True, rejected=config.rejected
    )
    if not requests.needs_as_of:
        raise UsageError(
            f"--requests {config.requests}: no column {requests.columns.as_of!r}; profiles need the time of each "
            "choice, so that no later choice is used for an earlier request; if it has another name: --request-columns "
            "as_of=COLUMN"
        )
    store = Store.open(target)
    if config.options.by == "likelihood":
        llm = profilers.find_llm(config.judge, config.pool)
        return _Inputs(requests=requests, store=store, llm=llm, model=llm.identity)
    check_chat(config.chat)
    model = chat_module(config.chat.chat).identity(config.chat)
    return _Inputs(requests=requests, store=store, llm=None, model=model)


@contextmanager
def _making(config: Config, inputs: _Inputs, machines: Machines, tally: Tally) -> Iterator[_Making]:
    """The actors; while they work, the replies of a chat model are committed as they come."""
    if inputs.llm is not None:
        pool = ModelPool.plan(machines, config.pool)
        yield _Making(actor=profilers.ByLikelihood, pool=pool, settings={"spec": inputs.llm})
        return
    pool = chats.plan_pool(machines, config.chat, config.pool)
    with chats.replies(inputs.store, tally, job="jobs.profile") as replies:
        settings = {"chat": ChatRef.of(config.chat, pool), "replies": replies}
        yield _Making(actor=profilers.ByChat, pool=pool, settings=settings)


def _exchanged(config: Config, inputs: _Inputs, tally: Tally, folder: str) -> exchange.Exchanged:
    """The pairs, brought together by user."""
    import pyarrow as pa

    from persona.inputs.requests import REJECTED, SCHEMA

    requests = inputs.requests
    read = reading.Requests(
        columns=requests.columns,
        needs_as_of=requests.needs_as_of,
        needs_target=True,
        blank_targets=False,
        rejected=config.rejected,
        job="profile",
        store=inputs.store,
        tally=tally,
    )
    source = exchange.Source(splits=requests.splits, read=read, limit=config.rows.limit)
    return exchange.exchange([source], inputs.store.n_buckets, pa.schema([*SCHEMA, REJECTED]), key=None, folder=folder)


def _staged(
    config: Config, inputs: _Inputs, exchanged: exchange.Exchanged, making: _Making, tally: Tally
) -> "Iterator[pa.Table]":
    """The rest of the job as one chain: find users whose profile is missing, make it, stage."""
    store = inputs.store.snapshot("profiles")
    wanted = Wanted(options=config.options, model=inputs.model)
    users = exchange.by_window(exchanged, preferences.users_to_profile, store=store, tally=tally, wanted=wanted)
    made = pools.by_models(
        users,
        making.actor,
        block_rows=config.block_rows,
        pool=making.pool.fit(exchanged.found[0].total.rows, config.block_rows),
        **making.settings,
        options=config.options,
        tally=tally,
    )
    return staging.staged(made, store=inputs.store, table="profiles", tally=tally)


def _stage_of(counts: Counts) -> Stage | None:
    if not (joined := counts.get("join")):
        return None
    committed = f"{int(counts.get('commit', {}).get('rows', 0)):,} committed"
    done = int(counts.get("profile", {}).get("users", 0))
    return Stage(name="profile", done=done, total=int(joined["asked"]), unit="users", note=committed)


def _summary(config: Config, inputs: _Inputs, found: reading.Found, counts: Counts, seconds: float) -> Summary:
    joined, made = counts.get("join", {}), counts.get("profile", {})
    n_made = int(counts.get("commit", {}).get("rows", 0))
    usage = chats.usage_facts(counts, config.chat) if inputs.llm is None else {}
    result = {
        "job": "profile",
        "store": inputs.store.uri,
        "recipe": config.options.name,
        "pairs": int(joined.get("pairs", 0)),
        "users": int(joined.get("users", 0)),
        "profiles": n_made,
        "unchanged": int(joined.get("known", 0)),
        "too_few_pairs": int(joined.get("few", 0)),
        "untimed_pairs": int(joined.get("untimed", 0)),
        "equal_answers": int(joined.get("equal", 0)),
        "repeated_ids": int(joined.get("repeated", 0)),
        "empty_profiles": int(made.get("empty", 0)),
        **profilers.scores(made),
        **usage,
        **inputs.requests.facts(),
        "rejects": found.total.rejects,
        "seconds": round(seconds, 1),
        "version": inputs.store.version("profiles"),
    }
    left_out = (
        f"{result['untimed_pairs']:,} pairs without as_of, {result['equal_answers']:,} with equal answers, "
        f"{result['repeated_ids']:,} with a repeated id"
    )
    few = f"{result['too_few_pairs']:,} with fewer than {config.options.min_pairs:,} pairs"
    table = [
        ("pairs", f"{result['pairs']:,} of {result['users']:,} users"),
        ("left out", left_out),
        ("users without", few),
        ("unchanged", f"{result['unchanged']:,}"),
        ("profiles", f"{n_made:,}, {result['empty_profiles']:,} of them empty"),
        *_score_rows(result),
        *(chats.usage_rows(usage) if usage else ()),
        ("seconds", f"{seconds:,.1f}"),
        ("store", f"{inputs.store.label}, profiles version {result['version']}"),
        *reading.request_rows(inputs.requests, found),
    ]
    return Summary(table=table, result=result, exit_code=found.exit_code(config.rows.max_reject_fraction))


def _score_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """How often the preferred answer is predicted, on average over users."""
    rows = []
    if result["validation_score"] is not None:
        rows.append(("right, validation", f"{result['validation_score']:.1%}, on pairs that chose the profile"))
    if result["held_out_score"] is not None:
        without = f"{result['held_out_none']:.1%} without a profile"
        rows.append(("right, held out", f"{result['held_out_score']:.1%}, and {without}"))
    return rows


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
