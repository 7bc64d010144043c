"""A strict reader of LaMP outputs files, independent of this project's code."""

import json
from typing import Any


def read(data: bytes, task: str) -> dict[str, str]:
    """The answers by id. Raises AssertionError for any deviation from the format."""
    found: Any = json.loads(
        data.decode("utf-8"), parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name))
    )
    assert type(found) is dict and set(found) == {"task", "golds"}
    assert found["task"] == task
    assert type(found["golds"]) is list and found["golds"]
    for gold in found["golds"]:
        assert type(gold) is dict and set(gold) == {"id", "output"}
        assert type(gold["id"]) is str and type(gold["output"]) is str
    answers = {gold["id"]: gold["output"] for gold in found["golds"]}
    assert len(answers) == len(found["golds"]), "duplicate id"
    return answers
