"""Personas with their questions, as requests: who is asked what, and what each of them has written.

A row is a persona: `persona` (who they are, in a sentence or more), and optional `persona_id`, `texts` (what they have
written), `environments` (where they are asked) and `questions` (each with `task` and `question`). Also read is the form
in which PersonaGym (arXiv 2407.18416) publishes its questions: a JSON file a persona, named after it, with a list of
questions for each task.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import pyarrow as pa

from persona.errors import InputError
from persona.judging.rubrics import RUBRICS, TASKS

REQUESTS = pa.schema(
    [
        *((name, pa.string()) for name in ("request_id", "user_id", "input", "query", "task", "environment")),
        *((name, pa.string()) for name in ("persona", "other_persona", "other_user_id")),
    ]
)
HISTORIES = pa.schema([(name, pa.string()) for name in ("user_id", "behavior_id", "text")])
_TOLD = (
    "You are the following person. Answer the question as this person would, in their words.\nPerson: {}\nQuestion: "
)
_WORDS = {word: task for task, rubric in RUBRICS.items() for word in (task, rubric.title.lower())}


@dataclass(frozen=True, kw_only=True)
class GymQuestion:
    """A question of one task; `environment` is where it is asked, if that is said."""

    task: str
    question: str
    environment: str | None = None


@dataclass(frozen=True, kw_only=True)
class GymPersona:
    """A persona with what they have written, where they may be asked, and what they are asked."""

    persona_id: str
    persona: str
    texts: Sequence[str] = ()
    environments: Sequence[str] = ()
    questions: Sequence[GymQuestion] = ()

    @classmethod
    def of(cls, row: Any) -> "GymPersona":
        """From a row. Raises InputError with the reason why it is none."""
        if not isinstance(row, Mapping):
            raise InputError("it is not an object")
        persona = _text(row.get("persona"), "persona")
        given = row.get("persona_id")
        return cls(
            persona_id=_id_of(persona) if given in (None, "") else str(given),
            persona=persona,
            texts=[_text(one, "texts") for one in _listed(row, "texts")],
            environments=[_text(one, "environments") for one in _listed(row, "environments")],
            questions=[_question(one) for one in _listed(row, "questions")],
        )


def published(name: str, content: Mapping[str, Any]) -> GymPersona:
    """A persona in the published form: `name` is who they are. Raises InputError for unknown tasks."""
    questions = [{"task": task, "question": question} for task, questions in content.items() for question in questions]
    return GymPersona.of({"persona": name, "questions": questions})


def task_of(given: Any) -> str:
    """The task of a name such as `action` or `Expected Action`. Raises InputError."""
    task = _WORDS.get(str(given).strip().lower().replace("_", " "))
    if task is None:
        # PersonaGym calls the task by its first word.
        task = next((_WORDS[word] for word in _WORDS if word.startswith(str(given).strip().lower() or " ")), None)
    if task is None:
        raise InputError(f"task {given!r}: must be one of {', '.join(TASKS)}")
    return task


@cache
def static_questions() -> Mapping[str, Sequence[str]]:
    """Questions by task that any persona can be asked, so that no LLM has to write them."""
    text = files("persona.judging").joinpath("questions.json").read_text("utf-8")
    found: dict[str, list[str]] = json.loads(text)
    return found


def own_personas() -> list[Any]:
    """Rows of the personas that come with this package."""
    found: list[Any] = json.loads(files("persona.judging").joinpath("personas.json").read_text("utf-8"))
    return found


def with_static_questions(persona: GymPersona, n_each: int) -> GymPersona:
    """The persona with `n_each` static questions of each task, if they have none of their own."""
    if persona.questions:
        return persona
    questions = [
        GymQuestion(task=task, question=question)
        for task, some in static_questions().items()
        for question in some[:n_each]
    ]
    return GymPersona(**{**vars(persona), "questions": questions})


def others(personas: Sequence[GymPersona]) -> dict[str, GymPersona]:
    """For each persona id another persona, each used once if all texts differ; nobody where there is no other text.

    The order is that of hashes, so neighbors in the file are no neighbors here.
    """
    ordered = sorted(personas, key=lambda one: _id_of(one.persona_id))
    found = {}
    for i, one in enumerate(ordered):
        later = (ordered[(i + step) % len(ordered)] for step in range(1, len(ordered)))
        other = next((other for other in later if other.persona != one.persona), None)
        if other is not None:
            found[one.persona_id] = other
    return found


def request_rows(persona: GymPersona, other: GymPersona | None, *, told: bool) -> Iterator[dict[str, Any]]:
    """The requests of a persona; if `told`, the persona stands in front of the question, in the input."""
    for number, one in enumerate(persona.questions):
        question = f"{one.environment.rstrip('.')}. {one.question}" if one.environment else one.question
        yield {
            "request_id": f"{persona.persona_id}/{one.task}/{number}",
            "user_id": persona.persona_id,
            "input": f"{_TOLD.format(persona.persona)}{question}" if told else question,
            "query": question,
            "task": one.task,
            "environment": one.environment,
            "persona": persona.persona,
            "other_persona": other.persona if other else None,
            "other_user_id": other.persona_id if other else None,
        }


def history_rows(persona: GymPersona) -> Iterator[dict[str, Any]]:
    """What the persona has written; if nothing is known, who they are is their only text."""
    for number, text in enumerate(persona.texts or [persona.persona]):
        yield {"user_id": persona.persona_id, "behavior_id": f"text {number}", "text": text}


def _question(given: Any) -> GymQuestion:
    if not isinstance(given, Mapping):
        raise InputError("questions: each must have a task and a question")
    environment = given.get("environment")
    return GymQuestion(
        task=task_of(given.get("task")),
        question=_text(given.get("question"), "question"),
        environment=None if environment is None else _text(environment, "environment"),
    )


def _listed(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    found = row.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise InputError(f"{name} must be a list")
    return found


def _text(given: Any, name: str) -> str:
    if not isinstance(given, str) or not given.strip():
        raise InputError(f"{name} must be a text that is not empty")
    return given.strip()


def _id_of(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
