"""The names of an input's columns: read from a flag, and searched for misspelled optional ones.

Nothing demands an optional column, so a misspelled one would go unnoticed: with `asof` in place of `as_of`, every
request would see the whole history, its own answer included.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from difflib import SequenceMatcher
from typing import ClassVar, Self

import pyarrow as pa
from pyarrow import types

from persona.errors import InputError, UsageError
from persona.inputs.json_columns import is_json
from persona.inputs.reader import schema_of
from persona.inputs.records import LOCATION
from persona.inputs.splits import Split
from persona.options import MAX_ROW_MB, TimeUnit

_LOOKED_AT = 8  # files whose columns are read before work begins; the others are checked when they are read
_SIMILAR = 0.85  # timestmap and timestamp: 0.89; query and queries: 0.67


@dataclass(frozen=True, kw_only=True)
class ColumnNames:
    """How to read the rows of an input: the names of their columns by field, and what else their reading depends on.

    A field of `OPTIONAL` is None if there is no such column.

    Attributes:
        timestamp_unit: of timestamps that are numbers.
        max_row_mb: a longer row is a reject.
    """

    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    timestamp_unit: TimeUnit = "s"
    max_row_mb: int = MAX_ROW_MB

    @classmethod
    def parse(cls, spec: str, flag: str, timestamp_unit: TimeUnit = "s", max_row_mb: int = MAX_ROW_MB) -> Self:
        """From `text=body,timestamp=`; other fields keep their names. Raises `UsageError`, naming `flag`."""
        known = cls.names()
        named: dict[str, str | None] = {}
        for part in filter(None, (part.strip() for part in spec.split(","))):
            field, equals, name = (piece.strip() for piece in part.partition("="))
            if not equals or field not in known or field in named or not (name or field in cls.OPTIONAL):
                raise UsageError(
                    f"{flag}: {part!r} must be FIELD=COLUMN, with each FIELD at most once and one of "
                    f"{', '.join(known)}; COLUMN may be empty only for {', '.join(cls.OPTIONAL)}, if there is none"
                )
            named[field] = name or None
        return cls(timestamp_unit=timestamp_unit, max_row_mb=max_row_mb, **named)  # None only for OPTIONAL ones

    @classmethod
    def names(cls) -> list[str]:
        """The fields that have a column."""
        return [field.name for field in fields(cls) if field not in fields(ColumnNames)]

    def name_of(self, field: str) -> str | None:
        """The name of a field's column."""
        name: str | None = getattr(self, field)
        return name

    def optional(self) -> dict[str, str]:
        """The names of the optional columns by field, without those that do not exist by choice."""
        return {field: name for field in self.OPTIONAL if (name := self.name_of(field)) is not None}

    def misspelled(self, names: Iterable[str]) -> dict[str, str]:
        """The optional fields whose column is absent from `names`, by an unused name that looks like it."""
        used = {self.name_of(field) for field in self.names()}
        others = sorted(set(names) - used)
        absent = {field: name for field, name in self.optional().items() if name not in set(names)}
        similar = {field: [one for one in others if _look_alike(name, one)] for field, name in absent.items()}
        return {field: found[0] for field, found in similar.items() if found}


def check(
    splits: Sequence[Split], columns: ColumnNames, problem: Callable[[pa.Schema], str], *, flag: str
) -> frozenset[str]:
    """Look at some files, spread over the input; returns the optional fields that have a column in a usable one.

    `problem` says why no row of a file with such columns can be used; empty if some can. A file that cannot be used is
    a reject when it is read. Raises `InputError` if none of those looked at can be used; also, with what `flag` can do,
    for a column that looks like an optional one which its file lacks, and for one named by `flag` that no file has.
    """
    usable = _usable(splits, problem)
    found: set[str] = set()
    seen: set[str] = set()
    for uri, schema in usable.items():
        names = names_in(schema, columns)
        if names is None:
            return frozenset(columns.OPTIONAL)
        seen |= names
        found |= {field for field, name in columns.optional().items() if name in names}
        for field, similar in columns.misspelled(names).items():
            raise InputError(
                f"{uri} has no column {columns.name_of(field)!r}, but {similar!r}. If that is it: "
                f"{flag} {field}={similar}. If it is something else: {flag} {field}= (without a name)"
            )
    for field, name in columns.optional().items():
        if field not in found and name != field:  # a name that was given
            raise InputError(f"{flag} {field}={name}: there is no such column. There are: {', '.join(sorted(seen))}")
    return frozenset(found)


def _usable(splits: Sequence[Split], problem: Callable[[pa.Schema], str]) -> dict[str, pa.Schema]:
    """The columns of the usable files among some; of all files until one has rows, if those have none."""
    files: dict[str, list[Split]] = {}
    for split in splits:
        files.setdefault(split.uri, []).append(split)
    first = list(files)[:: -(-len(files) // _LOOKED_AT)]
    usable: dict[str, pa.Schema] = {}
    without_rows: list[str] = []
    unusable: list[str] = []
    for number, uri in enumerate([*first, *(uri for uri in files if uri not in set(first))]):
        if number >= len(first) and (usable or unusable):
            break
        try:
            schema = schema_of(files[uri])
        except InputError as error:
            without_rows.append(str(error))
            continue
        if why := problem(schema):
            unusable.append(f"{uri} cannot be used: {why}")
        else:
            usable[uri] = schema
    if not usable:
        n_others = len(unusable or without_rows) - 1
        looked_at = "other file that was" if n_others == 1 else f"{n_others:,} other files that were"
        others = f" (nor can the {looked_at} looked at)" if n_others else ""
        raise InputError(f"{(unusable or without_rows)[0]}{others}")
    return usable


def why_absent(schema: pa.Schema, columns: ColumnNames) -> dict[str, str]:
    """By optional field: why its null cells are rejects in a file of this schema that has a misspelled column."""
    names = names_in(schema, columns)
    found = {} if names is None else columns.misspelled(names)
    return {
        field: f"there is no column {columns.name_of(field)}, but {similar!r}, which may be it"
        for field, similar in found.items()
    }


def names_in(schema: pa.Schema, columns: ColumnNames) -> set[str] | None:
    """The names of columns, and of the fields of structs in lists; None if only the rows tell those."""
    name = getattr(columns, "behaviors", None)
    if name in schema.names and is_json(schema.field(name).type):
        return None
    items = [getattr(field.type, "value_type", pa.null()) for field in schema]
    nested = {field.name for kind in items if types.is_struct(kind) for field in kind}
    return {*schema.names, *nested} - set(LOCATION)


def _look_alike(name: str, other: str) -> bool:
    """Whether two names are the same but for case, signs or a letter, or a time has a word behind it: as_of_date."""
    plain, other_plain = _plain(name), _plain(other)
    if plain in ("asof", "timestamp") and other_plain.startswith(plain):
        return True
    is_near = abs(len(plain) - len(other_plain)) <= 1
    return is_near and SequenceMatcher(None, plain, other_plain).ratio() >= _SIMILAR


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
