"""Turn personas and their questions into requests: the first step of PersonaGym, for jobs.generate and jobs.judge.

Reads `--personas`: Parquet, JSONL or JSON with one row per persona, or a folder of PersonaGym's own question files.
Writes into `--out`: requests.parquet (nothing in the prompt tells who is asked), told.parquet (the same requests with
the persona in front of each question), histories.parquet (what the personas have written, for jobs.embed) and, if a row
is left out, rejects.parquet. Personas without questions get static ones, so no LLM is needed, or with --write-questions
those that a chat model writes for them.
"""

import io
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from jobs.runtime import chat, cli, gym_questions, reading
from jobs.runtime.cli import Summary
from jobs.runtime.job_options import FLAT, InputRows
from persona.chat.options import ChatOptions
from persona.errors import InputError, UsageError
from persona.option_checks import check_at_least, check_default

if TYPE_CHECKING:
    from persona.judging.gym import GymPersona
    from persona.store.store import Store

_FORMATS = (".parquet", ".jsonl", ".json")
_MOST_STATIC = 3


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.import_gym."""

    out: str
    """Folder for requests, histories and rejects, local or s3://."""
    personas: str | None = None
    """File or folder of personas: Parquet, JSONL or JSON, local or s3://; default ten that come with this program."""
    questions: int = 2
    """Questions of each of the five tasks for a persona without questions of its own; static ones are at most 3."""
    write_questions: bool = False
    """Have a chat model write these questions for each persona, instead of static ones; needs --store."""
    store: str | None = None
    """With --write-questions: a store, where the model's replies are kept."""
    chat: Annotated[ChatOptions, FLAT] = field(default_factory=ChatOptions)
    rows: Annotated[InputRows, FLAT] = field(default_factory=InputRows)
    dry_run: bool = False
    """Read and check everything, and write nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "questions")
        if not self.write_questions:
            check_default(self, "store", needs="--write-questions")
            check_default(self.chat, "chat", "chat_model", needs="--write-questions")
            if self.questions > _MOST_STATIC:
                raise UsageError(
                    f"--questions {self.questions}: there are {_MOST_STATIC} static ones of each task; give "
                    "--write-questions for more"
                )
        elif self.store is None:
            raise UsageError("--write-questions needs --store, where the replies of the chat model are kept")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The personas of the input, and for each reject its file, its row and the reason."""

    personas: "Sequence[GymPersona]"
    rejects: Sequence[tuple[str, int, str]]


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage

    started = time.perf_counter()
    given = None if config.personas is None else storage.check_uri(config.personas, flag="--personas")
    out = storage.check_uri(config.out, flag="--out")
    if given is not None:
        storage.check_reachable(given, flag="--personas")
    storage.check_reachable(out, flag="--out", write=True)
    store = _store(config)
    found = _personas(config, given)
    if not found.personas:
        reason = found.rejects[0][2] if found.rejects else "it has no rows"
        raise InputError(f"--personas {config.personas}: has no usable persona; the first reason: {reason}")
    usage: dict[str, Any] = {}
    if store is not None and config.dry_run:
        usage = gym_questions.planned(found.personas, config.questions, config.chat)
    elif store is not None:
        written, usage = gym_questions.written(found.personas, config.questions, store, config.chat)
        found = replace(found, personas=written)
    files = _files(found)
    if not config.dry_run:
        for name, data in files.items():
            storage.write_bytes(storage.join(out, name), data)
    return _summary(config, found, out, usage, time.perf_counter() - started)


def _store(config: Config) -> "Store | None":
    """Where replies are kept, if a chat model writes the questions; checked before it is asked anything."""
    from persona import storage
    from persona.chat.base import check_chat
    from persona.store.store import Store

    if config.store is None:
        return None
    uri = storage.check_uri(config.store, flag="--store")
    storage.check_reachable(uri, flag="--store", write=True)
    check_chat(config.chat)
    return Store.open(uri)


def _personas(config: Config, uri: str | None) -> _Found:
    """The personas of all files; of a repeated id, the first counts."""
    from persona.judging.gym import GymPersona, with_static_questions

    personas: dict[str, GymPersona] = {}
    rejects = []
    for source, number, row in _rows(config, uri):
        if config.rows.limit is not None and len(personas) >= config.rows.limit:
            break
        try:
            if isinstance(row, Exception):
                raise InputError(str(row))
            one = row if isinstance(row, GymPersona) else GymPersona.of(row)
            if one.persona_id in personas:
                raise InputError(f"persona_id {one.persona_id!r} is repeated")
        except InputError as error:
            rejects.append((source, number, str(error)))
        else:
            personas[one.persona_id] = one if config.write_questions else with_static_questions(one, config.questions)
    return _Found(personas=list(personas.values()), rejects=rejects)


def _rows(config: Config, uri: str | None) -> Iterator[tuple[str, int, Any]]:
    """File, number and content of each row; in place of a row that cannot be read, the error."""
    from persona import storage
    from persona.judging.gym import own_personas

    if uri is None:
        yield from (("", number, row) for number, row in enumerate(own_personas()))
        return
    entries = sorted(storage.list_files(uri, _FORMATS), key=lambda entry: entry.uri)
    if not entries:
        raise InputError(f"--personas {config.personas}: has no file that ends in {', '.join(_FORMATS)}")
    for entry in entries:
        try:
            for number, row in enumerate(_parsed(entry.uri, storage.read_bytes(entry.uri))):
                yield entry.uri, number, row
        except (InputError, ValueError) as error:
            yield entry.uri, -1, InputError(str(error))


def _parsed(uri: str, data: bytes) -> Iterator[Any]:
    """The rows of a file. Raises ValueError or InputError for a file that cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from persona.judging.gym import published

    if uri.endswith(".parquet"):
        try:
            yield from pq.read_table(pa.BufferReader(data)).to_pylist()
        except pa.ArrowInvalid as error:
            raise InputError(f"is no Parquet file: {error}") from error
    elif uri.endswith(".jsonl"):
        for line in io.StringIO(data.decode("utf-8-sig")):  # str.splitlines would also cut at U+2028, within a text
            if line.strip():
                yield _json(line)
    else:
        content = json.loads(data.decode("utf-8-sig"))
        if isinstance(content, Mapping) and "persona" not in content:
            yield published(uri.rsplit("/", 1)[-1].removesuffix(".json"), content)
        else:
            yield from [content] if isinstance(content, Mapping) else content


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return InputError(f"is not JSON: {error}")


def _files(found: _Found) -> dict[str, bytes]:
    """The content of each file of the output folder, by name."""
    import pyarrow as pa

    from persona.inputs.records import rejects
    from persona.judging import gym

    others = gym.others(found.personas)
    rows = {
        told: [row for one in found.personas for row in gym.request_rows(one, others.get(one.persona_id), told=told)]
        for told in (False, True)
    }
    histories = [row for one in found.personas for row in gym.history_rows(one)]
    tables = {
        "requests.parquet": pa.Table.from_pylist(rows[False], gym.REQUESTS),
        "told.parquet": pa.Table.from_pylist(rows[True], gym.REQUESTS),
        "histories.parquet": pa.Table.from_pylist(histories, gym.HISTORIES),
    }
    sources, numbers, reasons = zip(*found.rejects, strict=True) if found.rejects else ((), (), ())
    tables["rejects.parquet"] = rejects("import_gym", sources, numbers, reasons)
    return {name: _parquet(table) for name, table in tables.items()}


def _parquet(table: Any) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _summary(config: Config, found: _Found, out: str, usage: Mapping[str, Any], seconds: float) -> Summary:
    tasks = Counter(question.task for one in found.personas for question in one.questions)
    reasons = Counter(reason for _, _, reason in found.rejects)
    result = {
        "job": "import_gym",
        "out": out,
        "dry_run": config.dry_run,
        "personas": len(found.personas),
        "requests": tasks.total(),
        "requests_by_task": dict(sorted(tasks.items())),
        "rejects": len(found.rejects),
        **usage,
        "seconds": round(seconds, 1),
    }
    table = [
        ("personas", f"{len(found.personas):,}"),
        ("requests", ", ".join(f"{n:,} {task}" for task, n in sorted(tasks.items()))),
        *([] if not usage else chat.planned_rows(usage) if config.dry_run else chat.usage_rows(usage)),
        ("rejects", f"{len(found.rejects):,}"),
        *((f"  {n:,}", reason) for reason, n in reasons.most_common(5)),
        ("out", f"{out} (nothing written)" if config.dry_run else out),
    ]
    fraction = reading.reject_fraction(rejects=len(found.rejects), rows=len(found.personas))
    return Summary(
        table=table, result=result, exit_code=reading.exit_code_of(fraction, config.rows.max_reject_fraction)
    )


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
