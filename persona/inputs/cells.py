"""Read the cells of a raw column as ids, texts or timestamps, or give the reason why they are not.

Each reader takes a column of any type and returns `(values, reasons)`, both as long as the column. Ignore a value whose
reason is not null.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from persona.inputs.dates import parse
from persona.inputs.json_columns import decoded, is_json, kind_of
from persona.options import TimeUnit

TIME = pa.timestamp("us", "UTC")
# The years 1 to 9999 in seconds, the range of ISO 8601 and of every reader of the tables. Milliseconds mistaken for
# seconds are out of range.
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799
_ZONE = r"(Z|[+-]\d\d:?\d\d)$"
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

Cells = tuple[pa.Array, pa.Array]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a column must contain: a description for messages, and the Arrow types that can be read as that."""

    description: str
    fits: Callable[[pa.DataType], bool]


def _is_text(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_null(kind) or is_json(kind) or _is_string(kind) or _is_bytes(kind)


def _is_timestamp(kind: pa.DataType) -> bool:
    numbers = types.is_integer(kind) or types.is_floating(kind)
    return numbers or types.is_timestamp(kind) or types.is_date(kind) or _is_text(kind)


ID = Kind(description="a string or an integer", fits=lambda kind: types.is_integer(kind) or _is_text(kind))
TEXT = Kind(description="a string", fits=_is_text)
TIMESTAMP = Kind(description="a timestamp, an ISO 8601 string or a number since 1970", fits=_is_timestamp)


def unfit(schema: pa.Schema, wanted: Mapping[str | None, Kind]) -> str:
    """What is wrong with the first column whose type does not fit its kind; empty if all fit. None names no column."""
    for name, kind in wanted.items():
        if name in schema.names and not kind.fits(schema.field(name).type):
            return f"column {name!r} is {schema.field(name).type}; it must be {kind.description}"
    return ""


def ids(column: pa.Array, name: str, *, required: bool = True) -> Cells:
    """Strings, and integers in decimal, as `string`; required ids must not be blank."""
    if types.is_integer(column.type):
        column = column.cast(pa.string())
    values, reasons = _strings(column, name, lambda v: str(v) if type(v) is int else v)
    return values.cast(pa.string()), _why_blank(values, reasons, name) if required else reasons


def texts(column: pa.Array, name: str, *, required: bool = True) -> Cells:
    """Strings as `large_string`, unchanged; required texts must not be blank."""
    values, reasons = _strings(column, name, lambda v: v)
    return values, _why_blank(values, reasons, name) if required else reasons


def why_null(values: Mapping[str, pa.Array], reasons: Mapping[str, str]) -> pa.Array:
    """For each row the reason of the first column that has a reason and is null there, or null."""
    none = pa.scalar(None, pa.string())
    found = [pc.if_else(column.is_null(), reasons.get(name), none) for name, column in values.items()]
    return pc.coalesce(*(one.cast(pa.string()) for one in found))


def is_blank(values: pa.Array) -> pa.Array:
    """Which strings are null, empty or only whitespace."""
    return pc.equal(pc.binary_length(pc.utf8_trim_whitespace(values)), 0).fill_null(True)


def timestamps(column: pa.Array, name: str, unit: TimeUnit = "s") -> Cells:
    """Timestamps, dates, strings and numbers of `unit` since 1970, as `TIME`; UTC if there is no time zone.

    Strings may be in ISO 8601 or another form that `persona.inputs.dates` reads.
    """
    kind = column.type
    if is_json(kind):
        return _json_timestamps(column, name, unit)
    if types.is_null(kind):
        return column.cast(TIME), _no_reasons(len(column))
    if not TIMESTAMP.fits(kind):
        return _wrong(column, name, TIME, TIMESTAMP)
    if types.is_timestamp(kind):
        return _since_1970(column.view(pa.int64()), _PER_SECOND[kind.unit], name)
    if types.is_date32(kind):
        return _since_1970(pc.multiply(column.view(pa.int32()).cast(pa.int64()), 86_400), 1, name)
    if types.is_date64(kind):
        return _since_1970(column.view(pa.int64()), _PER_SECOND["ms"], name)
    if types.is_integer(kind) or types.is_floating(kind):
        return _since_1970(column, _PER_SECOND[unit], name)
    strings, reasons = _strings(column, name, lambda v: v)
    times, why = _from_strings(pc.if_else(is_blank(strings), None, strings), name)
    return times, pc.coalesce(reasons, why)


def _json_timestamps(column: pa.Array, name: str, unit: TimeUnit) -> Cells:
    values = decoded(column)
    numbers = [float(v) if type(v) in (int, float) else None for v in values]
    others = [None if type(v) in (int, float) else v for v in values]
    from_numbers, why_number = timestamps(pa.array(numbers, pa.float64()), name, unit)
    strings, why_type = _strings_of(others, name)
    from_strings, why_string = timestamps(strings, name)
    return pc.coalesce(from_numbers, from_strings), pc.coalesce(why_type, why_number, why_string)


def _since_1970(column: pa.Array, per_second: int, name: str) -> Cells:
    """Counts since 1970, `per_second` of them a second, as `TIME`; a reason for those outside the years 1 to 9999."""
    null = column.is_null().to_numpy(zero_copy_only=False)
    if types.is_floating(column.type):
        column = column.cast(pa.float64())  # smaller floats would round a date of today by minutes
    counts = column.fill_null(0).to_numpy(zero_copy_only=False)
    with np.errstate(invalid="ignore"):
        good = (counts >= _FIRST_S * per_second) & (counts < (_LAST_S + 1) * per_second) & ~null
    counts = np.where(good, counts, 0)
    if counts.dtype.kind == "f":
        whole = np.floor(counts)  # separately: a float has too few digits for all microseconds
        micros = _micros(whole, per_second) + np.round((counts - whole) * (1e6 / per_second)).astype(np.int64)
    else:
        micros = _micros(counts, per_second)
    reason = f"{name} is out of range: years 1 to 9999 are allowed; --timestamp-unit gives the unit of numbers"
    reasons = pc.if_else(pa.array(good | null), pa.scalar(None, pa.string()), reason)
    return pa.array(micros, pa.int64(), mask=~good).cast(TIME), reasons


def _micros(counts: np.ndarray, per_second: int) -> np.ndarray:
    whole = counts.astype(np.int64)
    return whole * (10**6 // per_second) if per_second <= 10**6 else whole // (per_second // 10**6)


def _from_strings(strings: pa.Array, name: str) -> Cells:
    try:
        zoned = pc.match_substring_regex(strings, _ZONE)
        read = pc.coalesce(
            pc.if_else(zoned, strings, None).cast(TIME),
            pc.if_else(zoned, None, strings).cast(pa.timestamp("us")).cast(TIME),
        )
        return _since_1970(read.view(pa.int64()), _PER_SECOND["us"], name)
    except pa.ArrowInvalid:  # Arrow does not say which string failed: parse each distinct one
        coded = strings.dictionary_encode()
        parsed = [parse(text) for text in coded.dictionary.to_pylist()]
        times = pa.array([time if isinstance(time, int) else None for time in parsed], TIME)
        why = pa.array([None if isinstance(time, int) else f"{name} {time}" for time in parsed], pa.string())
        return times.take(coded.indices), why.take(coded.indices)


def _strings(column: pa.Array, name: str, read: Callable[[Any], Any]) -> Cells:
    kind = column.type
    if types.is_dictionary(kind):
        return _strings(column.cast(kind.value_type), name, read)
    if is_json(kind):
        return _strings_of([read(v) for v in decoded(column)], name)
    if types.is_null(kind):
        return column.cast(pa.large_string()), _no_reasons(len(column))
    if not TEXT.fits(kind):
        return _wrong(column, name, pa.large_string(), TEXT)
    octets = column.cast(pa.large_binary())
    try:
        return octets.cast(pa.large_string()), _no_reasons(len(column))
    except pa.ArrowInvalid:
        values = [_decode(v) for v in octets.to_pylist()]
        strings = pa.array(values, pa.large_string())
        failed = pc.and_(octets.is_valid(), strings.is_null())
        return strings, pc.if_else(failed, f"{name} is not valid UTF-8", pa.scalar(None, pa.string()))


def _strings_of(values: list[Any], name: str) -> Cells:
    strings = [v if isinstance(v, str) else None for v in values]
    reasons = [None if v is None or isinstance(v, str) else f"{name} is {kind_of(v)}, not a string" for v in values]
    return pa.array(strings, pa.large_string()), pa.array(reasons, pa.string())


def _why_blank(values: pa.Array, reasons: pa.Array, name: str) -> pa.Array:
    empty = pc.if_else(values.is_null(), f"{name} is missing", f"{name} is empty")
    return pc.coalesce(reasons, pc.if_else(is_blank(values), empty, pa.scalar(None, pa.string())))


def _wrong(column: pa.Array, name: str, kind: pa.DataType, wanted: Kind) -> Cells:
    reason = f"{name} is {column.type}, not {wanted.description}"
    return pa.nulls(len(column), kind), pc.if_else(column.is_valid(), reason, pa.scalar(None, pa.string()))


def _no_reasons(n: int) -> pa.Array:
    return pa.nulls(n, pa.string())


def _decode(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _is_string(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))
