"""The LaMP tasks, and how one LaMP question becomes a user's behaviors and a request.

Salemi et al., "LaMP: When Large Language Models Meet Personalization" (arXiv 2304.11406). A question comes with a
profile, its user's past, and must see exactly that profile. In a store, a request sees what its *user* wrote before
`as_of`. To make the two agree when questions of one user are in one store:

- A question is placed in time if it has a user and a date, and its profile is dated, oldest first and no later than
  the question. It shares its user with other questions, and `as_of` hides what came later. Dates are coarse: many
  such questions have profile items of their own month. The order of the profile is more precise, so each timestamp is
  at least a microsecond after the previous one, and `as_of` after the last. As long as a user's profiles only grow at
  their end, `as_of` then hides nothing of the profile. It does hide the question's own answer, which a later profile
  has at exactly this time.
- Any other question, which includes every question of the public LaMP, becomes a separate user who sees the whole
  profile: `user_id` is the question's id and `as_of` is null.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO

import ijson

from persona.errors import InputError
from persona.options import Metric

MAX_DEPTH = 16  # of nested lists and objects in a question; LaMP has 3, a malicious file may have many
_READ_BYTES = 2**18
_TICK = timedelta(microseconds=1)
_DATE = re.compile(r"([12]\d{3})(?:-(\d{1,2})(?:-(\d{1,2})([T ].*)?)?)?")

_MOVIE_TAGS = (
    "sci-fi",
    "based on a book",
    "comedy",
    "action",
    "twist ending",
    "dystopia",
    "dark comedy",
    "classic",
    "psychology",
    "fantasy",
    "romance",
    "thought-provoking",
    "social commentary",
    "violence",
    "true story",
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One LaMP task.

    The text of a behavior is the profile item's `behavior_fields`, joined by spaces. `label_field` is the user's
    verdict on the item, which `with_labels` appends. The query is the group of `query_pattern` in the question's input.
    An answer has at most `max_new_tokens` tokens.
    """

    name: str
    behavior_fields: tuple[str, ...]
    query_pattern: str
    metric: Metric
    max_new_tokens: int = 128
    label_field: str | None = None

    def with_labels(self) -> "Task":
        """The task with the label in each behavior's text; the same task if it has no labels."""
        if self.label_field is None:
            return self
        return replace(self, behavior_fields=(*self.behavior_fields, self.label_field), label_field=None)

    def behavior_text(self, item: Mapping[str, Any]) -> str:
        """The text of a profile item. Raises `InputError` if a field is missing or all are blank."""
        for field in self.behavior_fields:
            if not isinstance(item.get(field), str):
                raise InputError(f"{field!r} must be a string, got {_shown(item.get(field))}")
        text = " ".join(item[field] for field in self.behavior_fields)
        if not text.strip():
            raise InputError(f"{' and '.join(map(repr, self.behavior_fields))} is blank")
        return text

    def query(self, text: str) -> str:
        """The part of a question's input for the query encoder. Raises `InputError` if there is none."""
        found = re.search(self.query_pattern, text, re.DOTALL)
        query = found[found.lastindex or 0] if found else ""
        if not query.strip():
            raise InputError(f"the input does not belong to {self.name}: it does not match {self.query_pattern!r}")
        return query


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="LaMP_1",
            behavior_fields=("title", "abstract"),
            # A title may contain quotation marks.
            query_pattern='title "(?:(.+?)", which reference|([^"]+)")',
            metric=Metric(kind="label", labels=("[1]", "[2]")),
        ),
        Task(
            name="LaMP_2",
            behavior_fields=("description",),
            query_pattern="description: (.+)",
            metric=Metric(kind="label", labels=_MOVIE_TAGS),
            label_field="tag",
        ),
        Task(
            name="LaMP_3",
            behavior_fields=("text",),
            query_pattern="review: (.+)",
            metric=Metric(kind="rating", labels=("1", "2", "3", "4", "5")),
            max_new_tokens=10,
            label_field="score",
        ),
        Task(
            name="LaMP_4",
            behavior_fields=("text", "title"),
            query_pattern="article: (.+)",
            metric=Metric(kind="text"),
        ),
        Task(
            name="LaMP_5",
            behavior_fields=("title", "abstract"),
            query_pattern="paper: (.+)",
            metric=Metric(kind="text"),
        ),
        Task(
            name="LaMP_7",
            behavior_fields=("text",),
            query_pattern="before or after it: (.+)",
            metric=Metric(kind="text"),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The behaviors and the request of a question, and the reasons why other profile items were rejected."""

    behaviors: list[dict[str, Any]]
    request: dict[str, Any]
    rejects: list[str]


def read_questions(stream: BinaryIO, *, name: str) -> Iterator[Any]:
    """The questions of a LaMP `questions.json`, one at a time, so that memory grows only with the longest profile.

    Raises `InputError`, naming the file `name`, if the stream is not a JSON list or is invalid further on.
    """
    count = 0
    try:
        events = iter(ijson.basic_parse(stream, use_float=True, buf_size=_READ_BYTES))
        event, _ = next(events)
        if event != "start_array":
            raise InputError(f"{name} is not a LaMP questions file: expected a JSON list of questions")
        for event, value in events:
            if event == "end_array":
                next(events, None)  # the parser raises if anything follows
                return
            yield _build(event, value, events, MAX_DEPTH)
            count += 1
    except (ijson.JSONError, OSError) as error:
        problem = f"cannot be read after {count} questions" if count else "cannot be read as JSON"
        raise InputError(f"{name} {problem}; is it complete? ({_first_line(error)})") from error


def read_golds(stream: BinaryIO, task: Task, *, name: str) -> dict[str, str]:
    """The answers of a LaMP `outputs.json` by question id.

    Raises `InputError` if the file is malformed or belongs to another task.
    """
    try:
        events = iter(ijson.basic_parse(stream, use_float=True, buf_size=_READ_BYTES))
        event, value = next(events)
        outputs = _build(event, value, events, MAX_DEPTH)
        next(events, None)
    except (ijson.JSONError, OSError) as error:
        raise InputError(f"{name} cannot be read as JSON; is it complete? ({_first_line(error)})") from error
    if not isinstance(outputs, dict) or not isinstance(outputs.get("golds"), list):
        raise InputError(f'{name} is not a LaMP outputs file: expected {{"task": "{task.name}", "golds": [...]}}')
    if outputs.get("task") != task.name:
        raise InputError(f"{name} has the task {outputs.get('task')!r}, not {task.name!r}: correct one of them")
    golds: dict[str, str] = {}
    for row, gold in enumerate(outputs["golds"]):
        if not isinstance(gold, dict) or not isinstance(gold.get("output"), str):
            raise InputError(f"{name}: gold {row} must have an id and a string as output, got {_shown(gold)}")
        request_id = _id(gold, "id")
        if request_id in golds:
            raise InputError(f"{name}: duplicate id {request_id!r}")
        golds[request_id] = gold["output"]
    return golds


def outputs_json(task: Task, answers: Mapping[str, str]) -> bytes:
    """Answers (or golds) by question id as an outputs file for LaMP's own evaluation; the inverse of `read_golds`."""
    golds = [{"id": request_id, "output": answers[request_id]} for request_id in sorted(answers)]
    return json.dumps({"task": task.name, "golds": golds}, ensure_ascii=False, indent=1).encode() + b"\n"


def question_id(question: Any) -> str:
    """The id of a question. Raises `InputError` if there is none."""
    if not isinstance(question, dict):
        raise InputError(f"a question must be an object, got {_shown(question)}")
    return _id(question, "id")


def question_to_rows(task: Task, question: Any, gold: str | None) -> Rows:
    """The behaviors and the request of one question; unusable profile items are rejected.

    Raises `InputError` with the reason if the question as a whole is unusable.
    """
    request_id = question_id(question)
    if not isinstance(question.get("input"), str):
        raise InputError(f"the input must be a string, got {_shown(question.get('input'))}")
    if not isinstance(question.get("profile"), list):
        raise InputError(f"the profile must be a list, got {_shown(question.get('profile'))}")
    if gold is not None and task.metric.labels and gold.strip() not in task.metric.labels:
        raise InputError(f"the gold must be one of {', '.join(task.metric.labels)}, got {gold!r}")
    query = task.query(question["input"])
    date = parse_date(question.get("date"))
    user_id = None if question.get("user_id") is None else _id(question, "user_id")
    behaviors, rejects = _behaviors(task, question["profile"])

    dates = [behavior["timestamp"] for behavior in behaviors]
    placed = user_id is not None and date is not None and _is_ascending([*dates, date])
    times = _separated([*dates, date] if placed else dates)
    as_of = times.pop() if placed else None
    owner = user_id if placed else request_id
    return Rows(
        behaviors=[
            behavior | {"user_id": owner, "timestamp": time} for behavior, time in zip(behaviors, times, strict=True)
        ],
        request={
            "request_id": request_id,
            "user_id": owner,
            "input": question["input"],
            "query": query,
            "target": gold,
            "as_of": as_of,
        },
        rejects=rejects,
    )


def parse_date(value: Any) -> datetime | None:
    """The first instant, in UTC, of a date in one of LaMP's forms: 2014, "2014-7", "2014-07-05 10:00:00".

    A month or day of 0 is unknown and becomes the first. None for null or an empty string. Raises `InputError` for
    anything else.
    """
    if value is None or value == "":
        return None
    found = _DATE.fullmatch(str(value).strip()) if isinstance(value, str | int) else None
    if not found:
        raise InputError(f"the date must be like 2014, 2014-07-05 or 2014-07-05 10:00:00, got {_shown(value)}")
    year, month, day, time = found.groups()
    try:
        date = datetime.fromisoformat(f"{year}-{int(month or 0) or 1:02}-{int(day or 0) or 1:02}{time or ''}")
        return date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except ValueError as error:
        raise InputError(f"the date {value!r} does not exist ({error})") from error


def _behaviors(task: Task, profile: list[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The distinct items of a profile in order, and the reasons why others were rejected."""
    texts: dict[str, str] = {}
    behaviors: list[dict[str, Any]] = []
    rejects: list[str] = []
    for position, item in enumerate(profile):
        try:
            if not isinstance(item, dict):
                raise InputError(f"must be an object, got {_shown(item)}")
            behavior_id = _id(item, "id")
            text = task.behavior_text(item)
            timestamp = parse_date(item.get("date"))
            if texts.get(behavior_id, text) != text:
                raise InputError(f"duplicate id {behavior_id!r} with another text")
        except InputError as error:
            rejects.append(f"profile item {position}: {error}")
            continue
        if behavior_id not in texts:
            texts[behavior_id] = text
            behaviors.append({"behavior_id": behavior_id, "text": text, "timestamp": timestamp})
    return behaviors, rejects


def _is_ascending(dates: list[datetime | None]) -> bool:
    known = [date for date in dates if date is not None]
    return len(known) == len(dates) and known == sorted(known)


def _separated(dates: list[datetime | None]) -> list[datetime | None]:
    """The dates, shifted just enough to be distinct and in order; null stays null."""
    times = list(dates)
    last: datetime | None = None
    dated = [(date, position) for position, date in enumerate(dates) if date is not None]
    for date, position in sorted(dated):
        last = date if last is None else max(date, last + _TICK)
        times[position] = last
    return times


def _build(event: str, value: Any, events: Iterator[tuple[str, Any]], depth: int) -> Any:
    """The JSON value that starts with this parser event."""
    if event not in ("start_map", "start_array"):
        return value
    if not depth:
        raise InputError(f"lists and objects nest deeper than {MAX_DEPTH} levels: not a LaMP file")
    if event == "start_array":
        items: list[Any] = []
        for inner, item in events:
            if inner == "end_array":
                return items
            items.append(_build(inner, item, events, depth - 1))
    fields: dict[str, Any] = {}
    for inner, key in events:
        if inner == "end_map":
            return fields
        event, value = next(events)
        fields[key] = _build(event, value, events, depth - 1)
    raise AssertionError("the parser raises if a list or an object does not end")


def _id(item: Mapping[str, Any], field: str) -> str:
    value = item.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"{field!r} must be a string or an integer, got {_shown(value)}")
    return str(value)


def _shown(value: Any) -> str:
    """A value, shortened for a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _first_line(error: Exception) -> str:
    text = error.args[0] if error.args else str(error)
    return (text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)).strip().split("\n")[0]
