"""Cells of a raw column read as what they should be: an id, a text or a moment; or the reason why they cannot be.

Each reader takes a column of any type and returns `(values, reasons)`, both as long as the column: where a
reason stands (it is null otherwise), the value is to be ignored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

TIME = pa.timestamp("us", "UTC")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# The years 1 to 9999, in seconds: what ISO 8601 and every reader of the tables can write down. Milliseconds
# taken for seconds fall outside.
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799
_ZONE = r"(Z|[+-]\d\d:?\d\d)$"
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

Cells = tuple[pa.Array, pa.Array]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a column is meant to hold: in words, and which Arrow types can be read as that."""

    words: str
    fits: Callable[[pa.DataType], bool]


def _is_text(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_null(kind) or is_json(kind) or _is_string(kind) or _is_bytes(kind)


def _is_moment(kind: pa.DataType) -> bool:
    numbers = types.is_integer(kind) or types.is_floating(kind)
    return numbers or types.is_timestamp(kind) or types.is_date(kind) or _is_text(kind)


ID = Kind(words="a string or an integer", fits=lambda kind: types.is_integer(kind) or _is_text(kind))
TEXT = Kind(words="a string", fits=_is_text)
MOMENT = Kind(words="a timestamp, an ISO 8601 string or seconds since 1970", fits=_is_moment)


def ids(column: pa.Array, name: str, *, required: bool = True) -> Cells:
    """Strings, or integers in decimal, as `string`; a required one must not be blank, another is null where it is."""
    if types.is_integer(column.type):
        column = column.cast(pa.string())
    values, reasons = _strings(column, name, lambda v: str(v) if type(v) is int else v)
    return values.cast(pa.string()), _demand(values, reasons, name) if required else reasons


def texts(column: pa.Array, name: str, *, required: bool = True) -> Cells:
    """Strings as `large_string`, untouched; a required one must hold more than white space."""
    values, reasons = _strings(column, name, lambda v: v)
    return values, _demand(values, reasons, name) if required else reasons


def is_blank(values: pa.Array) -> pa.Array:
    """Which strings are null, empty or only white space."""
    return pc.equal(pc.binary_length(pc.utf8_trim_whitespace(values)), 0).fill_null(True)


def moments(column: pa.Array, name: str) -> Cells:
    """Timestamps, dates, ISO 8601 strings and seconds since 1970, as microseconds UTC; without a zone, UTC is meant."""
    kind = column.type
    if is_json(kind):
        values = decoded(column)
        numbers = [float(v) if type(v) in (int, float) else None for v in values]
        read_n, why_n = moments(pa.array(numbers, pa.float64()), name)
        others = [None if type(v) in (int, float) else v for v in values]
        strings, why = _from_values(others, name)
        read_s, why_s = moments(strings, name)
        return pc.coalesce(read_n, read_s), pc.coalesce(why, why_n, why_s)
    if types.is_null(kind):
        return column.cast(TIME), _no_reasons(len(column))
    if not MOMENT.fits(kind):
        return _wrong(column, name, TIME, MOMENT)
    if types.is_timestamp(kind):
        return _on_the_clock(column.view(pa.int64()), _PER_SECOND[kind.unit], name)
    if types.is_date32(kind):
        return _on_the_clock(pc.multiply(column.view(pa.int32()).cast(pa.int64()), 86_400), 1, name)
    if types.is_date64(kind):
        return _on_the_clock(column.view(pa.int64()), _PER_SECOND["ms"], name)
    if types.is_integer(kind) or types.is_floating(kind):
        return _on_the_clock(column, 1, name)
    strings, reasons = _strings(column, name, lambda v: v)
    moments_, unread = _iso(pc.if_else(is_blank(strings), None, strings), name)
    return moments_, pc.coalesce(reasons, unread)


def _on_the_clock(column: pa.Array, per_second: int, name: str) -> Cells:
    """Counts since 1970 in a unit, as microseconds; what lies outside the years 1 to 9999 gets a reason."""
    null = column.is_null().to_numpy(zero_copy_only=False)
    if types.is_floating(column.type):
        column = column.cast(pa.float64())  # less would round a date of today by minutes
    counts = column.fill_null(0).to_numpy(zero_copy_only=False)
    with np.errstate(invalid="ignore"):
        good = (counts >= _FIRST_S * per_second) & (counts < (_LAST_S + 1) * per_second) & ~null
    counts = np.where(good, counts, 0)
    if counts.dtype.kind == "f":
        whole = np.floor(counts)  # apart from the rest: together they would need more digits than a float has
        micros = whole.astype(np.int64) * 10**6 + np.round((counts - whole) * 1e6).astype(np.int64)
    else:
        micros = counts.astype(np.int64)
        micros = micros * (10**6 // per_second) if per_second <= 10**6 else micros // (per_second // 10**6)
    reason = f"{name} is out of range: years 1 to 9999 are allowed, numbers are seconds since 1970"
    reasons = pc.if_else(pa.array(good | null), pa.scalar(None, pa.string()), reason)
    return pa.array(micros, pa.int64(), mask=~good).cast(TIME), reasons


def _iso(strings: pa.Array, name: str) -> Cells:
    try:
        zoned = pc.match_substring_regex(strings, _ZONE)
        read = pc.coalesce(
            pc.if_else(zoned, strings, None).cast(TIME),
            pc.if_else(zoned, None, strings).cast(pa.timestamp("us")).cast(TIME),
        )
        return _on_the_clock(read.view(pa.int64()), _PER_SECOND["us"], name)
    except pa.ArrowInvalid:  # Arrow does not say which one: read each distinct string on its own
        coded = strings.dictionary_encode()
        read = pa.array([_moment(text) for text in coded.dictionary.to_pylist()], TIME).take(coded.indices)
        failed = pc.and_(strings.is_valid(), read.is_null())
        reason = pa.scalar(f"{name} is no ISO 8601 date or time")
        return read, pc.if_else(failed, reason, pa.scalar(None, pa.string()))


def _moment(text: str) -> int | None:
    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment.replace(tzinfo=moment.tzinfo or UTC) - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return None


def _strings(column: pa.Array, name: str, read: Callable[[Any], Any]) -> Cells:
    kind = column.type
    if types.is_dictionary(kind):
        return _strings(column.cast(kind.value_type), name, read)
    if is_json(kind):
        return _from_values([read(v) for v in decoded(column)], name)
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


def _from_values(values: list[Any], name: str) -> Cells:
    strings = [v if isinstance(v, str) else None for v in values]
    reasons = [None if v is None or isinstance(v, str) else f"{name} is {kind_of(v)}, not a string" for v in values]
    return pa.array(strings, pa.large_string()), pa.array(reasons, pa.string())


def kind_of(value: Any) -> str:
    """A JSON value's kind in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names[_Broken] = "broken JSON"
    return names.get(type(value), "a number")


def _demand(values: pa.Array, reasons: pa.Array, name: str) -> pa.Array:
    empty = pc.if_else(values.is_null(), f"{name} is missing", f"{name} is empty")
    return pc.coalesce(reasons, pc.if_else(is_blank(values), empty, pa.scalar(None, pa.string())))


def _wrong(column: pa.Array, name: str, kind: pa.DataType, wanted: Kind) -> Cells:
    reason = f"{name} is {column.type}, not {wanted.words}"
    return pa.nulls(len(column), kind), pc.if_else(column.is_valid(), reason, pa.scalar(None, pa.string()))


def _no_reasons(n: int) -> pa.Array:
    return pa.nulls(n, pa.string())


def _decode(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


class _Broken:
    """What a text that should be JSON and is not stands for; no reader takes it."""


def decoded(column: pa.Array) -> list[Any]:
    """The Python values of an `arrow.json` column; one of a kind of its own where a text is no JSON."""
    return [None if v is None else _loaded(v) for v in column.storage.to_pylist()]


def _loaded(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return _Broken()


def is_json(kind: pa.DataType) -> bool:
    """Whether each value is a JSON text of its own, because the values share no type."""
    return isinstance(kind, pa.JsonType)


def _is_string(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))
