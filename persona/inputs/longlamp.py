"""The LongLaMP tasks, and how one row of their files becomes a user's behaviors and a request.

Kumar et al., "LongLaMP: A Benchmark for Personalized Long-form Text Generation" (arXiv 2407.11016). The layout is that
of the Parquet files of the Hugging Face dataset `LongLaMP/LongLaMP`, with one folder for each task and setting (`user`,
`temporal`) and files `train-…`, `val-…` and `test-…` in it. A row has its user, `input`, `output` and `profile`, a list
of structs; the name of the user's column and the fields of a profile item differ by task:

    abstract_generation  name        profile: id, title, abstract, year
    product_review       reviewerId  profile: description, overall, reviewText, summary
    topic_writing        author      profile: id, summary, content, author

Email completion is not in the dataset, because its corpus is licensed.

A row has no date, and a user's rows have different profiles, so each row becomes a user who sees exactly its profile,
as a question of the public LaMP does (see `lamp`). Its id is the split and the user's name, `test:Jane Doe`, from the
second row of a user on followed by `#2`, `#3`, …: the splits of the temporal setting have the same users, and no row
may see the profile of another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from persona.errors import InputError
from persona.inputs import lamp
from persona.options import Metric

COLUMNS = ("input", "output", "profile")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One LongLaMP task.

    Attributes:
        user_column: the name of the user.
        behavior_fields: of a profile item, joined by spaces; what the user wrote comes first, as encoders cut texts.
        answer_field: the field that a row's `output` is an example of.
        opening: what every input begins with; the rest weighs the history.
        label_field: the user's verdict, which `with_labels` appends to a behavior.
        date_field: of a profile item, if it has one.
    """

    name: str
    user_column: str
    behavior_fields: tuple[str, ...]
    answer_field: str
    opening: str
    label_field: str | None = None
    date_field: str | None = None

    def with_labels(self) -> "Task":
        """The task with the label in each behavior's text; the same task if it has no labels."""
        if self.label_field is None:
            return self
        return replace(self, behavior_fields=(*self.behavior_fields, self.label_field), label_field=None)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="abstract_generation",
            user_column="name",
            behavior_fields=("title", "abstract"),
            answer_field="abstract",
            opening="Generate an abstract for the title",
            date_field="year",
        ),
        Task(
            name="product_review",
            user_column="reviewerId",
            behavior_fields=("summary", "reviewText", "description"),
            answer_field="reviewText",
            opening="Generate the review text written by a reviewer who has",
            label_field="overall",
        ),
        Task(
            name="topic_writing",
            user_column="author",
            behavior_fields=("summary", "content"),
            answer_field="content",
            opening="Generate the content for a reddit post",
        ),
    )
}


def user_of(task: Task, row: Mapping[str, Any]) -> str:
    """The name of a row's user. Raises `InputError` if there is none."""
    return lamp.id_of(row, task.user_column)


def row_to_rows(task: Task, row: Mapping[str, Any], *, split: str, nth: int) -> lamp.Rows:
    """The behaviors and the request of the `nth` row (from 1) of its user in a split; unusable items are rejected.

    A profile item whose text is the row's own output is rejected too: with it, the answer would be in the history.

    Raises `InputError` with the reason if the row as a whole is unusable.
    """
    user = user_of(task, row)
    output = row.get("output")
    if not isinstance(output, str) or not output.strip():
        raise InputError(f"'output' must be a text, got {lamp.shown(output)}")
    if not isinstance(row.get("profile"), list):
        raise InputError(f"'profile' must be a list, got {lamp.shown(row.get('profile'))}")
    rejects, items = [], []
    for position, item in enumerate(row["profile"]):
        if isinstance(item, Mapping) and _same(item.get(task.answer_field), output):
            rejects.append(f"profile item {position}: is the row's own output")
        else:
            items.append(_item(task, item, position))
    name = f"{split}:{user}" if nth == 1 else f"{split}:{user}#{nth}"
    question = {"id": name, "input": row.get("input"), "profile": items}
    found = lamp.question_to_rows(_as_lamp(task), question, output)
    return replace(found, rejects=[*rejects, *found.rejects])


def _as_lamp(task: Task) -> lamp.Task:
    return lamp.Task(
        name=task.name,
        behavior_fields=task.behavior_fields,
        query_pattern=rf"\A\s*(?:{task.opening}\b\s*)?(.+)",
        metric=Metric(kind="long_text"),
    )


def _item(task: Task, item: Any, position: int) -> Any:
    """A profile item in LaMP's form: with an id and a date, its numbers as text, and its missing fields blank."""
    if not isinstance(item, Mapping):
        return item
    fields = {name: _text(item.get(name)) for name in task.behavior_fields}
    if not (fields[task.answer_field] or "").strip():
        fields[task.answer_field] = None  # a reject: the user has written nothing
    name = item.get("id")
    return {**fields, "id": position if name in (None, "") else name, "date": _date(task, item)}


def _date(task: Task, item: Mapping[str, Any]) -> Any:
    value = item.get(task.date_field) if task.date_field else None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(value: Any) -> Any:
    """A number as text, nothing as a blank; anything else is left for the check of the field."""
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else value


def _same(text: Any, output: str) -> bool:
    return isinstance(text, str) and text.split() == output.split()
