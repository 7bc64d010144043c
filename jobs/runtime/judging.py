"""Judge stored answers: pair each with its question and a persona, ask the judge, and collect what all judges said."""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.runtime import chat, reading
from jobs.runtime.busy import BusyTime
from jobs.runtime.chat import ChatRef, Replies
from jobs.runtime.reading import SplitFound
from jobs.runtime.tally import Tally

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.chat.base import ChatPrompt
    from persona.inputs.splits import Split
    from persona.store.store import Store

TABLE = "judgements"
_SHOWN = ("variant", "request_id", "user_id", "task", "judge", "persona", "score", "problem")
_STORED = ("request_id", "judge", "persona", "fingerprint", "score", "problem", "variant")


@dataclass(frozen=True, kw_only=True)
class JudgeRequests:
    """Reads the valid requests of splits (`persona.judging.requests`); the others go to the `rejects` table."""

    store: "Store"
    tally: Tally

    def __call__(self, split: "Split", found: SplitFound, limit: int | None) -> "Iterator[pa.Table]":
        """The first `limit` of them, or all."""
        from persona.inputs.reader import read_split
        from persona.judging import requests

        validate = partial(requests.validate, n_buckets=self.store.n_buckets, job="judge")
        batches = read_split(split, job="judge", problem=requests.problem)
        # Counts the requests without another persona, which have no swap gap.
        good = reading.keep_good(batches, validate, found, limit, time_column="other_persona", store=self.store)
        yield from reading.counted(good, split, found, self.tally)


@dataclass(frozen=True, kw_only=True)
class JudgePlan:
    """What is judged. Attributes: names of the answers, the judge's identity, and whether to judge under a swap too."""

    variants: Sequence[str]
    judge: str
    swap: bool = True


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An answer with a persona to judge it under. `about` is the user whose persona that is."""

    request: dict[str, Any]
    variant: str
    kind: str
    shown: str
    about: str
    answer: str

    @property
    def prompt(self) -> "ChatPrompt":
        """What the judge reads."""
        from persona.judging.prompts import judge_prompt

        return judge_prompt(
            task=self.request["task"], persona=self.shown, question=self.request["input"], answer=self.answer
        )


def pairs(requests: "pa.Table", store: "Store", plan: JudgePlan) -> "list[Pair]":
    """All pairs of some requests of one bucket; of a repeated request id, the first counts."""
    from persona.judging.scores import OWN, SWAPPED

    of_id: dict[str, dict[str, Any]] = {}
    for row in requests.to_pylist():
        of_id.setdefault(row["request_id"], row)
    bucket = requests["bucket"][0].as_py()
    answers = store.read_generations(plan.variants, ["request_id", "user_id", "variant", "output"], buckets=[bucket])
    found = []
    for answer in answers.to_pylist():
        request = of_id.get(answer["request_id"])
        if request is None or request["user_id"] != answer["user_id"]:
            continue
        shown = [(OWN, request["persona"], request["user_id"])]
        if plan.swap and request["other_persona"]:
            shown.append((SWAPPED, request["other_persona"], request["other_user_id"]))
        found += [
            Pair(
                request=request, variant=answer["variant"], kind=kind, shown=text, about=about, answer=answer["output"]
            )
            for kind, text, about in shown
        ]
    return found


def unjudged(requests: "pa.Table", *, store: "Store", plan: JudgePlan, tally: Tally) -> "Iterator[pa.Table]":
    """The pairs of a window that this judge has not judged, or that have changed since; in an order by hash.

    `store` must be a snapshot, so that a retried task finds the same pairs.
    """
    import pyarrow as pa

    from persona.judging.prompts import fingerprint

    bucket = requests["bucket"][0].as_py()
    found = pairs(requests, store, plan)
    stored = {
        (row["variant"], row["request_id"], row["persona"]): row["fingerprint"]
        for row in _stored(store, plan.variants, bucket).to_pylist()
        if row["judge"] == plan.judge
    }
    rows = []
    for pair in found:
        now = fingerprint(plan.judge, pair.prompt)
        before = stored.get((pair.variant, pair.request["request_id"], pair.kind))
        if before != now:
            rows.append(_row(pair, plan, now, "new" if before is None else "edited"))
    counts = {
        "requests": requests.num_rows,
        "answers": len({(pair.variant, pair.request["request_id"]) for pair in found}),
        "pairs": len(found),
        "left": len(rows),
        "stale": sum(row["change"] == "edited" for row in rows),
    }
    tally.note("pairs", f"{bucket}/{requests['user_id'][0]}", counts)
    # Neither variant nor kind can be told from the order.
    yield pa.Table.from_pylist(sorted(rows, key=lambda row: row["fingerprint"]), _pair_schema())


class Judge:
    """An actor that asks the judge: pairs in, rows of the table `judgements` out."""

    def __init__(self, ref: ChatRef, replies: Replies, tally: Tally, n_threads: int) -> None:
        self.own = replies.open_chat(ref, n_threads=n_threads)

        def without_reason(completion: Any) -> None:
            replies.record(self.own.identity, _without_reason(completion))

        # A reason given under a wrong persona quotes two users; only its score is kept.
        self.swapped = replies.cached(self.own.model, record=without_reason)
        self.tally = tally
        self.name = uuid.uuid4().hex
        self.busy = BusyTime()

    def __call__(self, rows: "pa.Table") -> "pa.Table":
        """Rows with the judge's score, reason and problem, in the order of the pairs."""
        import pyarrow as pa

        from persona.judging.prompts import judge_prompt
        from persona.judging.scores import OWN

        found: dict[int, Any] = {}
        given = rows.to_pylist()
        with self.busy.call() as times:
            for is_own, asked in ((True, self.own), (False, self.swapped)):
                numbers = [i for i, row in enumerate(given) if (row["persona"] == OWN) == is_own]
                prompts = [
                    judge_prompt(task=row["task"], persona=row["shown"], question=row["input"], answer=row["answer"])
                    for row in (given[i] for i in numbers)
                ]
                found |= zip(numbers, asked.complete(prompts, [given[i]["about"] for i in numbers]), strict=True)
                chat.note_usage(self.tally, asked, f"{self.name}/{is_own}")
        judged = rows.drop_columns(["shown", "about", "input", "answer"])
        values = [found[i].value or {} for i in range(len(given))]
        reasons = [
            value.get("reason") if row["persona"] == OWN else None for row, value in zip(given, values, strict=True)
        ]
        if given:
            counts = {"judged": len(given), "unparsed": sum(not value for value in values)}
            unit = f"{given[0]['fingerprint']}/{given[0]['variant']}"
            self.tally.note("judge", unit, {**counts, "waiting": times.waiting, "seconds": times.seconds})
        columns = {
            "score": pa.array([value.get("score") for value in values], pa.int32()),
            "reason": pa.array(reasons, pa.string()),
            "problem": pa.array([found[i].problem or None for i in range(len(given))], pa.string()),
        }
        for name, column in columns.items():
            judged = judged.append_column(name, column)
        return judged


def current(requests: "pa.Table", *, store: "Store", plan: JudgePlan) -> "Iterator[pa.Table]":
    """What all judges say of a window's answers, as far as it is of the answers, questions and personas of now."""
    import pyarrow as pa

    from persona.judging.prompts import fingerprint

    bucket = requests["bucket"][0].as_py()
    of_pair: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in _stored(store, plan.variants, bucket).to_pylist():
        of_pair.setdefault((row["variant"], row["request_id"], row["persona"]), []).append(row)
    rows = [
        {**row, "user_id": pair.request["user_id"], "task": pair.request["task"]}
        for pair in pairs(requests, store, plan)
        for row in of_pair.get((pair.variant, pair.request["request_id"], pair.kind), ())
        if row["fingerprint"] == fingerprint(row["judge"], pair.prompt)
    ]
    yield pa.Table.from_pylist(rows, _schema(_SHOWN))


def planned(
    splits: "Iterable[Split]", store: "Store", variants: Sequence[str], *, swap: bool, limit: int | None
) -> tuple[int, int]:
    """The calls that judging the first `limit` requests takes at most, and the bytes of their prompts."""
    import pyarrow.compute as pc

    from persona.inputs.reader import read_split
    from persona.judging import requests
    from persona.judging.prompts import judge_prompt
    from persona.judging.rubrics import TASKS

    fixed = max(
        sum(len(m.content.encode()) for m in judge_prompt(task=task, persona="", question="", answer="").messages)
        for task in TASKS
    )
    of_request: dict[str, int] = {}
    n_requests = 0
    for split in splits:
        for records in read_split(split, job="judge", problem=requests.problem):
            good, _ = requests.validate(records, store.n_buckets, job="judge")
            good = good.slice(0, None if limit is None else limit - n_requests)
            n_requests += good.num_rows
            for row in good.select(["request_id", "input", "persona", "other_persona"]).to_pylist():
                shown = max(len((row[name] or "").encode()) for name in ("persona", "other_persona"))
                of_request[row["request_id"]] = fixed + shown + len(row["input"].encode())
    n_calls = n_bytes = 0
    for variant in variants:
        answers = store.read_generations([variant], ["request_id", "output"])
        lengths = pc.binary_length(answers["output"]).to_pylist()
        for request_id, length in zip(answers["request_id"].to_pylist(), lengths, strict=True):
            if request_id in of_request:
                n_calls += 1 + swap
                n_bytes += (1 + swap) * (of_request[request_id] + length)
    return n_calls, n_bytes


def comparable(rows: Iterable[dict[str, Any]], variants: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """The judgements of requests that each variant has an answer to, and the number of other requests."""
    given = list(rows)
    having: dict[str, set[str]] = {}
    for row in given:
        having.setdefault(row["request_id"], set()).add(row["variant"])
    whole = {request for request, some in having.items() if len(some) == len(variants)}
    return [row for row in given if row["request_id"] in whole], len(having) - len(whole)


def _stored(store: "Store", variants: Sequence[str], bucket: int) -> "pa.Table":
    return store.table(TABLE).read(_STORED, partitions=list(variants), values={"bucket": [bucket]})


def _row(pair: Pair, plan: JudgePlan, fingerprint: str, change: str) -> dict[str, Any]:
    request = {name: pair.request[name] for name in ("request_id", "user_id", "task", "input", "bucket")}
    return {
        **request,
        "variant": pair.variant,
        "judge": plan.judge,
        "persona": pair.kind,
        "shown": pair.shown,
        "about": pair.about,
        "answer": pair.answer,
        "fingerprint": fingerprint,
        "change": change,
    }


def _without_reason(completion: Any) -> Any:
    """The same reply with nothing but its score, or empty if it has none."""
    import json
    from dataclasses import replace

    from persona.chat.base import ChatPrompt
    from persona.judging.prompts import SCHEMA

    value = completion.reply(ChatPrompt((), schema=SCHEMA)).value
    return replace(completion, text=json.dumps({"reason": "", "score": value["score"]}) if value else "")


def _pair_schema() -> "pa.Schema":
    import pyarrow as pa

    names = ("request_id", "user_id", "task", "variant", "judge", "persona", "fingerprint", "bucket")
    texts = [(name, pa.large_string()) for name in ("shown", "about", "input", "answer")]
    return pa.schema([*_schema(names), *(pa.field(*one) for one in texts), pa.field("change", pa.string())])


def _schema(names: Sequence[str]) -> "pa.Schema":
    import pyarrow as pa

    from persona.store.schema import LAYOUTS

    return pa.schema([LAYOUTS[TABLE].schema.field(name) for name in names])
