"""Made-up people for the demo, whose diary notes imply what they like without naming it.

Each person has one answer for each facet of life (a drink, a way to travel, a pet, a kind of music). Their notes imply
these answers in mixed order, between notes that imply nothing; a request asks for one facet, in words that fit every
answer. So a good answer needs the history, and the part of it that the request is about. The people of `validation` and
`test` are not in `train`, and one wording of each answer is used only by them.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from statistics import fmean
from typing import Literal, get_args

import pyarrow as pa

from persona.demo.facets import AFTER, BEFORE, FACETS, FIRST_NAMES, FRIENDS, SMALL_TALK
from persona.inputs import histories as behavior_rows, requests as request_rows

Part = Literal["train", "validation", "test"]

# Without the columns that the jobs add when they read the files.
_HISTORIES = pa.schema([behavior_rows.SCHEMA.field(name) for name in ("user_id", "behavior_id", "text", "timestamp")])
_REQUESTS = pa.schema([field for field in request_rows.SCHEMA if field.name not in ("bucket", "system")])
_BEGIN = datetime(2025, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Person:
    """A made-up user and the answer that fits them for each facet."""

    user_id: str
    part: Part
    answers: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The number of people in each part, and how much each of them writes."""

    train: int = 240
    validation: int = 10
    test: int = 36
    notes_a_facet: int = 2
    small_talk: int = 2
    # Wordings of each answer that only people outside `train` use.
    unseen_wordings: int = 1


def people(*, seed: int = 0, sizes: Sizes = Sizes()) -> list[Person]:
    """All people, in a fixed order; the answers of a person to different facets are drawn independently."""
    parts: list[Part] = [part for part in get_args(Part) for _ in range(getattr(sizes, part))]
    everyone = []
    for number, part in enumerate(parts):
        random = Random(f"{seed}/person/{number}")
        user_id = f"{random.choice(FIRST_NAMES).lower()}-{number:03d}"
        answers = {facet.name: random.choice(list(facet.notes)) for facet in FACETS}
        everyone.append(Person(user_id=user_id, part=part, answers=answers))
    return everyone


def guessed_right() -> float:
    """The share of answers that random guessing gets right."""
    return fmean(1 / len(facet.notes) for facet in FACETS)


def histories(*, seed: int = 0, sizes: Sizes = Sizes()) -> pa.Table:
    """All notes as input for jobs.embed, one row a note, each user's oldest first."""
    rows = []
    for person in people(seed=seed, sizes=sizes):
        random = Random(f"{seed}/notes/{person.user_id}")
        written = _BEGIN
        for number, text in enumerate(_notes(person, random, sizes)):
            written += timedelta(minutes=random.randrange(600, 10_000))
            key = f"{person.user_id}/{number}"
            rows.append({"user_id": person.user_id, "behavior_id": key, "text": text, "timestamp": written})
    return pa.Table.from_pylist(rows, schema=_HISTORIES)


def requests(part: Part, *, seed: int = 0, sizes: Sizes = Sizes()) -> pa.Table:
    """The requests of one part's people as input for the jobs, one row for each person and facet."""
    rows = []
    for person in people(seed=seed, sizes=sizes):
        if person.part != part:
            continue
        random = Random(f"{seed}/requests/{person.user_id}")
        for facet in FACETS:
            text = random.choice(facet.requests)
            rows.append(
                {
                    "request_id": f"{person.user_id}/{facet.name}",
                    "user_id": person.user_id,
                    "input": text,
                    "query": text,
                    "target": person.answers[facet.name],
                    "as_of": None,
                }
            )
    return pa.Table.from_pylist(rows, schema=_REQUESTS)


def _notes(person: Person, random: Random, sizes: Sizes) -> list[str]:
    """One person's notes in mixed order."""
    plain = random.sample(SMALL_TALK, sizes.small_talk)
    for facet in FACETS:
        wordings = facet.notes[person.answers[facet.name]]
        if person.part == "train":
            wordings = wordings[sizes.unseen_wordings :]
        plain += random.sample(wordings, sizes.notes_a_facet)
    random.shuffle(plain)
    return [_styled(text, random) for text in plain]


def _styled(text: str, random: Random) -> str:
    """The wording with a random beginning, end and friend."""
    before, after = random.choice(BEFORE), random.choice(AFTER)
    return (before + text + after).replace("{friend}", random.choice(FRIENDS))
