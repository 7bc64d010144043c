"""The table `sources`: which input files have been read whole, so that a refresh need not open them again.

A row is void once another program has written to `behaviors`, for example when it restored an older version: the rows
of the file may be gone. Commits of our own never void it, because each holds the table's lease and keeps what it does
not replace; `forget` deletes rows on purpose, and a refresh must not bring them back.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa

from persona.storage import join
from persona.store.schema import LAYOUTS
from persona.store.store import Store
from persona.store.table import Table
from persona.store.writer import Writer

NAME = "sources"
# Raise it when this program reads other rows from a file than before: then every file is read again, once.
_READER_VERSION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file that has been read whole; its bad rows are among the rejects.

    Attributes:
        input: the URI that the file was found with.
        tag: changes with the file's content (`storage.FileEntry`).
        table_version: the version or snapshot that was read, if the input is a Delta or Iceberg table.
        read_as: digest of the settings that decide which rows a file has.
        rows: number of valid rows.
        run: the run that read it.
        epoch: of `behaviors` when it was read, see `Ledger`.
        exact_version: the version of `behaviors` after that run if it held rows of recorded files only, or null.
    """

    input: str
    uri: str
    size_bytes: int
    tag: str
    table_version: int | None
    read_as: str
    rows: int
    rejects: int
    run: str
    read_at: datetime
    epoch: str
    exact_version: int | None


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The files that have been read into a store, and the state of `behaviors` that decides what that means.

    Attributes:
        epoch: changes when another program writes to `behaviors`; a source of another epoch is void.
        is_exact: whether `behaviors` has rows of these files only. Otherwise there may be others, of runs that were
            killed or limited, or of files that could not be read whole.
    """

    sources: Sequence[Source] = ()
    epoch: str = ""
    is_exact: bool = True


def read(store: Store) -> Ledger:
    """The ledger of a store, as of now."""
    table = Table.find(join(store.uri, NAME), NAME)
    sources = [] if table is None else [Source(**row) for file in table.files() for row in _rows(table.read_file(file))]
    behaviors = Table(join(store.uri, "behaviors"), "behaviors")
    version = behaviors.version()
    is_exact = any(source.exact_version == version for source in sources) or not behaviors.partitions()
    return Ledger(sources=sources, epoch=epoch(behaviors), is_exact=is_exact)


def epoch(behaviors: Table) -> str:
    """The epoch of a ledger: the table's id, and how many commits other programs have made."""
    return f"{behaviors.id()}:{behaviors.log.foreign_commits()}"


def digest(settings: Mapping[str, object]) -> str:
    """`Source.read_as`: what tells apart two ways to read a file."""
    text = json.dumps([_READER_VERSION, settings], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def create(store: Store) -> None:
    """Create the table in a store that was made before there was one."""
    Table.create(join(store.uri, NAME), NAME, {})


def write(writer: Writer, before: Ledger, sources: Iterable[Source]) -> None:
    """Replace the sources `before` by others, in one commit; an input without a change keeps its file."""
    old, new = _by_input(before.sources), _by_input(sources)
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if not changed:
        return
    removed = writer.table.files(changed)
    schema = LAYOUTS[NAME].schema
    rows = [[asdict(source) for source in new[name].values()] for name in changed if name in new]
    added = [writer.table.write_file(pa.Table.from_pylist(of_one, schema)) for of_one in rows]
    writer.exchange([(file, None) for file in removed], added)


def _by_input(sources: Iterable[Source]) -> Mapping[str, Mapping[str, Source]]:
    found: dict[str, dict[str, Source]] = {}
    for source in sources:
        found.setdefault(source.input, {})[source.uri] = source
    return found


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
