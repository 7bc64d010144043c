"""Read and write LaMP's JSON files: questions one at a time, and the answers to them."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import ijson

from persona.errors import InputError
from persona.inputs.lamp import Task, id_of, shown
from persona.options import MAX_ROW_MB

MAX_QUESTION_BYTES = MAX_ROW_MB * 2**20  # with its profile; those of LaMP have a few megabytes at most
MAX_DEPTH = 16  # of nested lists and objects in a question; LaMP has 3, a malicious file may have many
_READ_BYTES = 2**18
# An escape sequence in JSON: a pair of surrogates, half of one, or another.
_ESCAPE = re.compile(rb"\\(?:(u[dD][89abAB]..\\u[dD][c-fC-F]..)|(u[dD][89a-fA-F]..)|.)", re.DOTALL)
_FIRST_HALF = re.compile(rb"\\u[dD][89abAB]..\Z", re.DOTALL)
_LONGEST_ESCAPE = len(r"\ud83d\ude00")


def read_questions(stream: BinaryIO, *, name: str) -> Iterator[Any]:
    """The questions of a LaMP `questions.json`, one at a time, so that memory grows only with the longest profile.

    Raises `InputError`, naming the file `name`, if the stream is not a JSON list or is invalid further on, or if a
    question has more than about `MAX_QUESTION_BYTES`.
    """
    count = 0
    text = _WholeCharacters(stream, MAX_QUESTION_BYTES)
    try:
        events = iter(ijson.basic_parse(text, use_float=True, buf_size=_READ_BYTES))
        event, _ = next(events)
        if event != "start_array":
            raise InputError(f"{name} is not a LaMP questions file: expected a JSON list of questions")
        for event, value in events:
            if event == "end_array":
                next(events, None)  # the parser raises if anything follows
                return
            yield _build(event, value, events, MAX_DEPTH)
            count += 1
            text.n_bytes = 0
    except _TooLongError as error:
        limit = f"{MAX_QUESTION_BYTES // 2**20:,} MB"
        raise InputError(f"{name}: the question after the first {count} is longer than {limit}") from error
    except (ijson.JSONError, OSError) as error:
        problem = f"cannot be read after {count} questions" if count else "cannot be read as JSON"
        raise InputError(f"{name} {problem}; is it complete? ({_first_line(error)})") from error


def read_golds(stream: BinaryIO, task: Task, *, name: str) -> dict[str, str]:
    """The answers of a LaMP `outputs.json` by question id.

    Raises `InputError` if the file is malformed or belongs to another task.
    """
    try:
        events = iter(ijson.basic_parse(_WholeCharacters(stream), use_float=True, buf_size=_READ_BYTES))
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
            raise InputError(f"{name}: gold {row} must have an id and a string as output, got {shown(gold)}")
        request_id = id_of(gold, "id")
        if request_id in golds:
            raise InputError(f"{name}: duplicate id {request_id!r}")
        golds[request_id] = gold["output"]
    return golds


def outputs_json(task: Task, answers: Mapping[str, str]) -> bytes:
    """Answers (or golds) by question id as an outputs file for LaMP's own evaluation; the inverse of `read_golds`."""
    golds = [{"id": request_id, "output": answers[request_id]} for request_id in sorted(answers)]
    return json.dumps({"task": task.name, "golds": golds}, ensure_ascii=False, indent=1).encode() + b"\n"


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


class _TooLongError(Exception):
    """More was read than may belong together."""


class _WholeCharacters:
    """A stream of JSON in which half of a pair of surrogates, without the other half, becomes U+FFFD.

    Such text has no encoding: the parser would end with an error, and no table could hold it.
    """

    def __init__(self, stream: BinaryIO, max_bytes: float = math.inf) -> None:
        self._stream = stream
        self._rest = b""
        self._max_bytes = max_bytes
        self.n_bytes = 0  # since the caller set it to 0

    def read(self, size: int) -> bytes:
        """At most about `size` bytes; empty only at the end (or if `size` is 0).

        Raises `_TooLongError` for more than `max_bytes` since `n_bytes` was 0: the parser keeps a string until it ends.
        """
        while size:
            chunk = self._stream.read(size)
            self.n_bytes += len(chunk)
            if self.n_bytes > self._max_bytes + size:
                raise _TooLongError
            data = self._rest + chunk
            end = _last_escape(data) if chunk else len(data)
            self._rest = data[end:]
            if end or not chunk:
                return _ESCAPE.sub(_whole, data[:end])
        return b""


def _last_escape(data: bytes) -> int:
    """Where an escape sequence starts that may go on behind the data; the data's length if there is none."""
    start = data.rfind(b"\\", max(0, len(data) - _LONGEST_ESCAPE))
    if start < 0 or not _starts_escape(data, start):
        return len(data)
    half = _FIRST_HALF.search(data[:start])
    return half.start() if half and _starts_escape(data, half.start()) else start


def _starts_escape(data: bytes, at: int) -> bool:
    """Whether the byte is a backslash that no backslash before it escapes."""
    before = data[: at + 1]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1


def _whole(escape: re.Match[bytes]) -> bytes:
    return rb"\ufffd" if escape[2] else escape[0]


def _first_line(error: Exception) -> str:
    text = error.args[0] if error.args else str(error)
    return (text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)).strip().split("\n")[0]
