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
  profile: `user_id` is the question's id and `as_of` is null. A store sorts undated behaviors by id, so the position
  in the profile comes first in the id. Repeated items are kept, as in the reference code. If not all items have a
  date, none gets a timestamp, so that the order is the profile's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from persona.errors import InputError
from persona.inputs import dates
from persona.options import Metric

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
                raise InputError(f"{field!r} must be a string, got {shown(item.get(field))}")
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
    """The behaviors and the request of a question.

    Attributes:
        rejects: the reasons why other profile items were left out.
        n_unreadable_dates: how many dates, of the question and its profile, count as absent.
    """

    behaviors: list[dict[str, Any]]
    request: dict[str, Any]
    rejects: list[str]
    n_unreadable_dates: int


def question_id(question: Any) -> str:
    """The id of a question. Raises `InputError` if there is none."""
    if not isinstance(question, dict):
        raise InputError(f"a question must be an object, got {shown(question)}")
    return id_of(question, "id")


def question_to_rows(task: Task, question: Any, gold: str | None) -> Rows:
    """The behaviors and the request of one question; unusable profile items are rejected.

    Raises `InputError` with the reason if the question as a whole is unusable.
    """
    request_id = question_id(question)
    if not isinstance(question.get("input"), str):
        raise InputError(f"the input must be a string, got {shown(question.get('input'))}")
    if not isinstance(question.get("profile"), list):
        raise InputError(f"the profile must be a list, got {shown(question.get('profile'))}")
    blank = [""] if task.metric.kind == "label" else []
    if gold is not None and task.metric.labels and gold.strip() not in (*task.metric.labels, *blank):
        raise InputError(f"the gold must be one of {', '.join(task.metric.labels)}, got {gold!r}")
    query = task.query(question["input"])
    user_id = None if question.get("user_id") is None else id_of(question, "user_id")
    unreadable: list[Any] = []
    date = _date(question.get("date"), unreadable)
    items, rejects = _items(task, question["profile"], unreadable)
    distinct, repeated = _distinct(items)
    owner, as_of = request_id, None
    if user_id is not None and date is not None and _is_ascending([*(item.date for item in distinct), date]):
        owner, items, rejects = user_id, distinct, rejects + repeated
        *times, as_of = _separated([*(item.date for item in items), date])
    else:
        items = [replace(item, id=f"{item.position:05}:{item.id}") for item in items]
        times = [item.date for item in items]
        times = [None] * len(times) if None in times else _separated(times)
    return Rows(
        behaviors=[
            {"user_id": owner, "behavior_id": item.id, "text": item.text, "timestamp": time}
            for item, time in zip(items, times, strict=True)
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
        n_unreadable_dates=len(unreadable),
    )


def parse_date(value: Any) -> datetime | None:
    """The first instant, in UTC, of a date in one of LaMP's forms: 2014, "2014-7", "2014-07-05 10:00:00".

    Also of those that `dates.parse` reads. A month or day of 0 is unknown and becomes the first. None for null or an
    empty string. Raises `InputError` for anything else.
    """
    if value is None or value == "":
        return None
    text = str(value).strip() if isinstance(value, str | int) else ""
    found = _DATE.fullmatch(text)
    try:
        if found:
            year, month, day, time = found.groups()
            date = datetime.fromisoformat(f"{year}-{int(month or 0) or 1:02}-{int(day or 0) or 1:02}{time or ''}")
            return date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except ValueError as error:
        raise InputError(f"the date {value!r} does not exist ({error})") from error
    micros = dates.parse(text)
    if not isinstance(micros, int):
        raise InputError(f"the date must be like 2014, 2014-07-05 or 2014-07-05 10:00:00, got {shown(value)}")
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A usable item of a profile."""

    position: int
    id: str
    text: str
    date: datetime | None


def _items(task: Task, profile: list[Any], unreadable: list[Any]) -> tuple[list[_Item], list[str]]:
    """The usable items of a profile in order, and the reasons why others are not."""
    items: list[_Item] = []
    rejects: list[str] = []
    for position, item in enumerate(profile):
        try:
            if not isinstance(item, dict):
                raise InputError(f"must be an object, got {shown(item)}")
            found = {"id": id_of(item, "id"), "text": task.behavior_text(item)}
        except InputError as error:
            rejects.append(f"profile item {position}: {error}")
        else:
            items.append(_Item(position=position, date=_date(item.get("date"), unreadable), **found))
    return items, rejects


def _distinct(items: list[_Item]) -> tuple[list[_Item], list[str]]:
    """The first item of each id, and a reason for each later one with another text."""
    first: dict[str, _Item] = {}
    for item in items:
        first.setdefault(item.id, item)
    others = [item for item in items if item.text != first[item.id].text]
    return list(first.values()), [f"profile item {one.position}: duplicate id {one.id!r}, other text" for one in others]


def _date(value: Any, unreadable: list[Any]) -> datetime | None:
    """A date, or None; a value that is no date is added to `unreadable`."""
    try:
        return parse_date(value)
    except InputError:
        unreadable.append(value)
        return None


def _is_ascending(times: list[datetime | None]) -> bool:
    known = [time for time in times if time is not None]
    return len(known) == len(times) and known == sorted(known)


def _separated(times: list[datetime | None]) -> list[datetime | None]:
    """The times, shifted just enough to be distinct and in order."""
    found = list(times)
    last: datetime | None = None
    for time, position in sorted((time, position) for position, time in enumerate(times) if time is not None):
        last = time if last is None else max(time, last + _TICK)
        found[position] = last
    return found


def id_of(item: Mapping[str, Any], field: str) -> str:
    """The string or integer in a field, as a string. Raises `InputError` for anything else."""
    value = item.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"{field!r} must be a string or an integer, got {shown(value)}")
    return str(value)


def shown(value: Any) -> str:
    """A value, shortened for a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
