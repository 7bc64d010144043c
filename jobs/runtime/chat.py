"""A chat model in the actors of a job, and its replies in the table `completions` as soon as they have come.

Actors hand each new reply to a relay on the driver's node; a thread of the driver commits what is there about once a
second. So a run that is killed loses at most the replies of its last two seconds, and the next one asks for no other
again.
"""

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jobs.runtime import session
from jobs.runtime.commits import Committer
from jobs.runtime.job_options import LLMPool
from jobs.runtime.pools import ModelPool
from jobs.runtime.session import Machines
from jobs.runtime.tally import Counts, Tally
from persona.chat.options import ChatOptions

if TYPE_CHECKING:
    from persona.chat.base import ChatModel
    from persona.chat.cache import CachedChat, Completion, Record
    from persona.store.store import Store

TABLE = "completions"
_ENVIRONMENT = ("OPENAI_BASE_URL", "OPENAI_API_KEY")
_CALLS_AN_ACTOR = 64  # of --chat-concurrency; a process with more threads gains little
_TAKE_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class ChatRef:
    """Which chat model an actor opens, sent to it by the driver.

    Attributes:
        variables: the driver's own environment variables for the endpoint, which other machines may lack. Not shown by
            `repr`, and not part of Ray's runtime environment, which the dashboard shows: one of them is a key.
    """

    options: ChatOptions
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, options: ChatOptions, pool: ModelPool) -> "ChatRef":
        """For one actor of a pool: its share of the concurrency."""
        variables = {}
        if options.chat == "http":
            options = replace(options, chat_concurrency=max(1, options.chat_concurrency // pool.max_size))
            variables = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        return cls(options=options, variables=variables)


def plan_pool(machines: Machines, options: ChatOptions, pool: LLMPool) -> ModelPool:
    """The actors that hold the model. Those of an endpoint hold none, and wait most of the time.

    Raises UsageError as `ModelPool.plan` does.
    """
    if options.chat == "http":
        n = pool.actors or math.ceil(options.chat_concurrency / _CALLS_AN_ACTOR)
        n = min(n, options.chat_concurrency)
        # With two blocks in work, the last replies of one keep no slot idle.
        return ModelPool(min_size=n, max_size=n, num_cpus=0, num_gpus=0, n_calls=2)
    if options.chat == "vllm":
        return ModelPool.plan(machines, pool, n_processes=options.chat_gpus, n_calls=2)
    return ModelPool.plan(machines, pool)


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What is known of a chat model's replies, and where new ones go. It may be sent to workers.

    Attributes:
        store: with a snapshot of the completions.
        relay: Ray's handle to a `_Relay`.
    """

    store: "Store"
    relay: Any

    def open_chat(self, chat: ChatRef, *, n_threads: int | None = None) -> "CachedChat":
        """The model in this process, behind the replies that are known. `n_threads` are torch's on CPUs."""
        from persona.chat.base import open_chat

        os.environ.update(chat.variables)
        if chat.options.chat != "http":
            session.quiet_models(n_threads)
        return self.cached(open_chat(chat.options))

    def cached(self, model: "ChatModel", *, record: "Record | None" = None) -> "CachedChat":
        """A model behind the replies that are known; `record` in place of keeping them as they are."""
        from persona.chat.cache import CachedChat

        def known(keys: Sequence[str], user_ids: Sequence[str]) -> Mapping[str, "Completion"]:
            return self.known(model.identity, keys, user_ids)

        def take(completion: "Completion") -> None:
            self.record(model.identity, completion)

        return CachedChat(model, known, record or take)

    def known(self, identity: str, keys: Sequence[str], user_ids: Sequence[str]) -> "dict[str, Completion]":
        """The kept replies of a model with these keys, about these users."""
        from dataclasses import fields

        import numpy as np

        from persona.chat.cache import Completion
        from persona.inputs.histories import bucket_of

        buckets = np.unique(bucket_of(list(user_ids), self.store.n_buckets)).tolist()
        names = [one.name for one in fields(Completion)]
        found = self.store.table(TABLE).read(
            names, partitions=[identity], values={"bucket": buckets, "key": list(keys)}
        )
        return {row["key"]: Completion(**row) for row in found.to_pylist()}

    def record(self, identity: str, completion: "Completion") -> None:
        """Hand a new reply over, and wait until the relay has it."""
        import ray

        ray.get(self.relay.add.remote({"model": identity, **asdict(completion)}))


@contextmanager
def replies(store: "Store", tally: Tally, *, job: str) -> Iterator[Replies]:
    """The replies known of `store`, while new ones are committed to it; at the end, also after an error, all are.

    The driver calls it, after `session.connect`. Raises LeaseHeld while another job writes replies to this store.
    """
    import ray

    store.create_missing(TABLE)
    with store.writer(TABLE, job=job) as writer:
        driver_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        relay = ray.remote(num_cpus=0, label_selector=driver_node)(_Relay).remote()
        with Committer(writer, tally, stage="completions") as committer, _Taker(store, relay, committer):
            yield Replies(store=store.snapshot(TABLE), relay=relay)


class _Relay:
    """Rows on their way from the actors to the driver."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row until it is taken."""
        self._rows.append(row)

    def take(self) -> list[dict[str, Any]]:
        """The rows since the last call."""
        taken, self._rows = self._rows, []
        return taken


class _Taker:
    """A context in which a thread takes rows from the relay and has them committed."""

    def __init__(self, store: "Store", relay: Any, committer: Committer) -> None:
        self._store = store
        self._relay = relay
        self._committer = committer
        self._seen: set[int] = set()  # two actors may ask the same at the same time
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="completions")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._ending.set()
        self._thread.join()
        if self._error is not None:
            raise self._error from error

    def _run(self) -> None:
        try:
            while not self._ending.wait(_TAKE_EVERY_S):
                self._take()
            self._take()
        except BaseException as error:  # noqa: BLE001 - raised again in the driver's main thread
            import ray

            self._error = error
            ray.kill(self._relay)  # no actor may go on paying for replies that nobody keeps

    def _take(self) -> None:
        import pyarrow as pa
        import ray

        from persona.inputs.histories import bucket_of
        from persona.store.schema import LAYOUTS

        rows = []
        for row in ray.get(self._relay.take.remote()):
            if (key := int(row["key"], 16)) not in self._seen:
                self._seen.add(key)
                rows.append(row)
        if not rows:
            return
        buckets = bucket_of([row["user_id"] for row in rows], self._store.n_buckets)
        schema = LAYOUTS[TABLE].schema
        columns = [name for name in schema.names if name not in ("bucket", "created_at")]
        table = pa.Table.from_pylist(rows, pa.schema([schema.field(name) for name in columns]))
        table = table.append_column("bucket", pa.array(buckets, pa.int32()))
        table = table.append_column("change", pa.repeat("new", table.num_rows))
        self._committer.take(self._store.stage(TABLE, table))


def note_usage(tally: Tally, chat: "CachedChat", unit: str) -> None:
    """Report all that a model of this process has been asked so far; `unit` names the process."""
    tally.note("chat", unit, asdict(chat.usage))


def usage_facts(counts: Counts, options: ChatOptions) -> dict[str, Any]:
    """What a run asked the model, for programs; with prices, also its cost."""
    found = {name: int(n) for name, n in counts.get("chat", {}).items()}
    usage = {
        "calls": found.get("calls", 0),
        "reused_replies": found.get("reused", 0),
        "unusable_replies": found.get("failed", 0),
        "prompt_tokens": found.get("prompt_tokens", 0),
        "answer_tokens": found.get("answer_tokens", 0),
    }
    cost = options.cost(usage["prompt_tokens"], usage["answer_tokens"])
    return {"chat_model": options.model, **usage, **({} if cost is None else {"chat_cost": round(cost, 6)})}


def usage_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same for people."""
    cost = f", {facts['chat_cost']:,.4f} at your prices" if "chat_cost" in facts else ""
    unusable = f", {facts['unusable_replies']:,} not usable" if facts["unusable_replies"] else ""
    return [
        ("asked", f"{facts['chat_model']}: {facts['calls']:,} calls, {facts['reused_replies']:,} known{unusable}"),
        ("tokens", f"{facts['prompt_tokens']:,} of prompts, {facts['answer_tokens']:,} of replies{cost}"),
    ]


def planned_facts(options: ChatOptions, *, calls: int, prompt_bytes: int, max_tokens: int) -> dict[str, Any]:
    """What a run may ask at most: a token has at least one byte, and replies end at `max_tokens` each."""
    answer_tokens = calls * max_tokens
    facts = {"calls": calls, "prompt_tokens": prompt_bytes, "answer_tokens": answer_tokens}
    cost = options.cost(prompt_bytes, answer_tokens)
    return {**facts, **({} if cost is None else {"chat_cost": round(cost, 6)})}


def planned_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same for people."""
    cost = f", {facts['chat_cost']:,.4f} at your prices" if "chat_cost" in facts else ""
    text = f"at most {facts['calls']:,} calls, {facts['prompt_tokens']:,} tokens of prompts"
    return [("asks", f"{text} and {facts['answer_tokens']:,} of replies{cost}")]
