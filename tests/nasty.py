"""Random cells for tests of bad input, each generated together with the value that should be read."""

import hashlib
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple

import pyarrow as pa
from hypothesis import strategies as st

BAD = object()  # as the value read: the row is a reject
ABSENT = object()  # as the value written: the record does not have the key
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST_S, END_S = -62_135_596_800, 253_402_300_800  # the years 1 to 9999
# Valid text that breaks paths, SQL, shells or terminals if it is not escaped.
NASTY = [
    "a/b",
    "../..",
    "it's",
    '"',
    "\\",
    " lead ",
    "a\tb\r\nc",
    "%2F",
    "null",
    "NaN",
    "7",
    "x=y",
    "{}",
    "\x00",
    "\x7f",
]
NASTY += [
    "👩‍👩‍👧",
    "e\u0301",
    "\u200b",
    "a\u200db",
    "\u202eevil",
    "مرحبا",
    "\ufeff",
    "\ufffd",
    "\U0010ffff",
    "a\u2028b",
    "’",
]
BLANK = ["", " ", "\t\r\n", "\u3000", "\u2028", "\xa0"]


class Cell(NamedTuple):
    """The value written, and the value that should be read: None for an empty optional cell."""

    raw: Any
    read: Any


class Case(NamedTuple):
    """A record, the rows that should be read from it, and for each reject the columns that its reason may name."""

    raw: dict[str, Any]
    good: list[tuple[Any, ...]]
    bad: list[set[str]]


def read_as(read: Any, values: st.SearchStrategy) -> st.SearchStrategy:
    return values.map(lambda raw: Cell(raw, read))


def as_string(values: st.SearchStrategy) -> st.SearchStrategy:
    return values.map(lambda raw: Cell(raw, str(raw)))


def a_date(moment: datetime, hours: int, separator: str) -> Cell:
    moment = moment.replace(tzinfo=timezone(timedelta(hours=hours)))
    return Cell(moment.isoformat(separator), micros(moment))


def micros(moment: datetime | None) -> int | None:
    return None if moment is None else (moment - EPOCH) // timedelta(microseconds=1)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
TEXTS = st.sampled_from(NASTY) | WORDS.filter(str.strip)
EMPTY = st.sampled_from([None, *BLANK])
WHOLE = st.integers(-(2**63), 2**64 - 1)
REAL = st.floats(allow_nan=False, allow_infinity=False)
OTHER = st.recursive(
    st.booleans() | st.just([]) | st.just({}),
    lambda inner: (
        st.lists(inner | WHOLE | REAL | WORDS, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "a", ""]), inner | WORDS, max_size=3)
    ),
    max_leaves=6,
)
ANYTHING = EMPTY | WORDS | WHOLE | REAL | OTHER
MISSING = st.just(ABSENT)
DATES = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1))  # noqa: DTZ001  # the time zone is drawn separately
ISO = st.builds(a_date, DATES, st.integers(-14, 14), st.sampled_from("T "))
SECONDS = st.integers(FIRST_S, END_S - 1).map(lambda s: Cell(s, s * 10**6))
QUARTERS = st.integers(4 * FIRST_S, 4 * END_S - 1).map(lambda n: Cell(n / 4, n * 250_000))
TOO_FAR = st.integers(-(2**63), FIRST_S - 1) | st.integers(END_S, 2**64 - 1)
TOO_FAR_OFF = REAL.filter(lambda s: not FIRST_S <= s < END_S)
NOT_DATES = st.sampled_from(["soon", "2023-02-29", "10000-01-01", "2024-01-01T25:00", "12:00", "\u200b", "1e9", "\x00"])

# The values of each column. A file draws a few of these kinds per column, so incompatible types often meet.
WORD, NUMBER = as_string(TEXTS), as_string(WHOLE)
NOT_WORD = [read_as(BAD, values) for values in (REAL, st.booleans(), OTHER)]
REQUIRED, OPTIONAL = read_as(BAD, EMPTY | MISSING), read_as(None, EMPTY | MISSING)
USER = [WORD, NUMBER, REQUIRED, *NOT_WORD]
TEXT = [WORD, WORD, REQUIRED, read_as(BAD, WHOLE), *NOT_WORD]
NOT_TIME = [read_as(BAD, values) for values in (TOO_FAR, TOO_FAR_OFF, NOT_DATES, st.booleans(), OTHER)]
TIME = [OPTIONAL, ISO, SECONDS, QUARTERS, *NOT_TIME]
ITEM = {"behavior_id": [WORD, NUMBER, OPTIONAL, *NOT_WORD], "text": TEXT, "timestamp": TIME}
ITEM["note"] = [read_as(None, values) for values in (EMPTY, WORDS, WHOLE, REAL, OTHER)]
OPTIONAL_WORD = [WORD, read_as(None, st.none() | MISSING), read_as(BAD, WHOLE), *NOT_WORD]
REQUEST = {
    "request_id": USER,
    "user_id": USER,
    "input": TEXT,
    "query": OPTIONAL_WORD,
    "target": OPTIONAL_WORD,
    "system": OPTIONAL_WORD,
    "as_of": TIME,
}


def raw(cells: dict[str, Cell]) -> dict[str, Any]:
    return {name: cell.raw for name, cell in cells.items() if cell.raw is not ABSENT}


def behavior(cells: dict[str, Cell]) -> tuple[list[tuple[Any, ...]], list[set[str]]]:
    """The behavior of these cells, or the bad columns."""
    if bad := {name for name, cell in cells.items() if cell.read is BAD}:
        return [], [bad]
    text = cells["text"].read
    name = cells["behavior_id"].read or hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return [(cells["user_id"].read, name, text, cells["timestamp"].read)], []


def a_behavior(cells: dict[str, Cell]) -> Case:
    return Case(raw(cells), *behavior(cells))


def a_user(user: Cell, items: Any) -> Case:
    """A user with a list of items (cells, or values that are not objects), or with a value that is not a list."""
    record = raw({"user_id": user})
    if not isinstance(items, list):
        return Case(record | {"behaviors": items}, [], [] if items is None else [{"behaviors"}])
    good, bad = [], []
    for item in items:
        if isinstance(item, dict):
            more_good, more_bad = behavior({"user_id": user, **item})
            good, bad = good + more_good, bad + more_bad
        else:
            bad.append({"behaviors"} if item is not None else {"behaviors", "user_id", "text"})
    listed = [raw(item) if isinstance(item, dict) else item for item in items]
    return Case(record | {"behaviors": listed}, good, bad)


def a_request(cells: dict[str, Cell]) -> Case:
    if bad := {name for name, cell in cells.items() if cell.read is BAD}:
        return Case(raw(cells), [], [bad])
    found = {name: cell.read for name, cell in cells.items()}
    return Case(raw(cells), [tuple((found | {"query": found["query"] or found["input"]}).values())], [])


@st.composite
def rows(draw: st.DrawFn, kinds: dict[str, list[st.SearchStrategy]], n: int) -> list[dict[str, Cell]]:
    """The cells of `n` rows."""
    cells = {}
    for name, values in kinds.items():
        some = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
        cells[name] = draw(st.lists(st.one_of(*some), min_size=n, max_size=n))
    return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]


@st.composite
def users(draw: st.DrawFn, n: int) -> list[Case]:
    """Records of `n` users; some have a value that is not a list, or items that are not behaviors."""
    cases = []
    lengths = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    items = draw(rows(ITEM, sum(lengths)))
    with_junk = draw(st.booleans())
    for owner, length in zip(draw(rows({"user_id": USER}, n)), lengths, strict=True):
        own, items = items[:length], items[length:]
        if with_junk and draw(st.booleans()):
            own = draw(NOT_LIST | st.lists(NOT_OBJECT, max_size=3).map(lambda junk, items=own: [*junk, *items]))
        cases.append(a_user(owner["user_id"], own))
    return cases


NOT_OBJECT = ANYTHING.filter(lambda value: not isinstance(value, dict))
NOT_LIST = ANYTHING.filter(lambda value: not isinstance(value, list))
SIZES = st.integers(1, 8)
BEHAVIORS = SIZES.flatmap(lambda n: rows({"user_id": USER, **ITEM}, n)).map(lambda found: [*map(a_behavior, found)])
REQUESTS = SIZES.flatmap(lambda n: rows(REQUEST, n)).map(lambda found: [*map(a_request, found)])
USERS = SIZES.flatmap(users)


def any_of(good: st.SearchStrategy, empty: Any, *bad: Any) -> st.SearchStrategy:
    return good | read_as(empty, st.sampled_from([None, *bad]))


def encoded(good: st.SearchStrategy) -> st.SearchStrategy:
    return good.map(lambda cell: Cell(cell.raw.encode(), cell.read))


def typed(name: str, empty: Any) -> st.SearchStrategy:
    """A type that a Parquet column may have, and cells of it."""
    words = any_of(as_string(TEXTS), empty, *BLANK)
    kinds = {
        pa.string(): words,
        pa.large_string(): words,
        pa.dictionary(pa.int32(), pa.string()): words,
        pa.binary(): any_of(encoded(as_string(TEXTS)), empty)
        | read_as(BAD, st.sampled_from([b"\xff", b"a\xc3", b"\xed\xa0\x80"])),
        pa.bool_(): any_of(read_as(BAD, st.booleans()), empty),
        pa.float64(): any_of(read_as(BAD, REAL), empty),
        pa.list_(pa.int64()): any_of(read_as(BAD, st.just([1])), empty),
        pa.struct([("text", pa.string())]): any_of(read_as(BAD, st.just({"text": "x"})), empty),
        pa.int64(): any_of(read_as(BAD, st.integers(-9, 9)), empty),
    }
    if name in ("user_id", "behavior_id"):
        kinds[pa.int64()] = any_of(as_string(st.integers(-(2**63), 2**63 - 1)), empty)
        kinds[pa.uint64()] = any_of(as_string(st.integers(0, 2**64 - 1)), empty)
    if name == "timestamp":
        kinds[pa.int64()] = any_of(SECONDS, empty) | read_as(BAD, TOO_FAR.filter(lambda s: s < 2**63))
        kinds[pa.float64()] = any_of(QUARTERS, empty) | read_as(
            BAD, TOO_FAR_OFF | st.sampled_from([float("nan"), float("inf")])
        )
        kinds[pa.float32()] = any_of(st.integers(0, 2**24).map(lambda n: Cell(float(n * 128), n * 128 * 10**6)), empty)
        kinds[pa.date32()] = any_of(
            st.integers(-719_162, 2_932_896).map(lambda d: Cell(d, d * 86_400 * 10**6)), empty
        ) | read_as(BAD, st.sampled_from([-719_163, 2_932_897]))
        kinds[pa.timestamp("ms", "Asia/Tokyo")] = any_of(
            SECONDS.map(lambda cell: Cell(cell.raw * 1000, cell.read)), empty
        )
        kinds[pa.timestamp("us")] = any_of(SECONDS.map(lambda cell: Cell(cell.read, cell.read)), empty) | read_as(
            BAD, st.sampled_from([2**63 - 1, -(2**63)])
        )
        kinds[pa.string()] = any_of(ISO, empty, *BLANK) | read_as(BAD, NOT_DATES)
        for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()):
            del kinds[kind]
    return st.sampled_from(list(kinds.items()))


@st.composite
def columns(draw: st.DrawFn, n: int, empty: dict[str, Any]) -> tuple[dict[str, pa.Array], list[dict[str, Cell]]]:
    """Columns with `n` rows, and the cells of each row."""
    arrays, cells = {}, {}
    for name, none in empty.items():
        kind, values = draw(typed(name, none))
        cells[name] = draw(st.lists(values, min_size=n, max_size=n))
        written = [cell.raw for cell in cells[name]]
        arrays[name] = pa.array(written, kind)
    return arrays, [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
