"""Dates in words and numbers: read if they have one meaning only, otherwise refused with a reason."""

from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from persona.inputs import cells
from persona.inputs.dates import parse

NOON = datetime(2014, 7, 5, 12, tzinfo=UTC)
DAY = datetime(2014, 7, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("07 5, 2014", DAY),  # Amazon's reviews
        ("12 11, 2014", datetime(2014, 12, 11, tzinfo=UTC)),
        ("2014-07-05 12:00:00 UTC", NOON),
        ("2014-07-05T12:00:00GMT", NOON),
        ("2014/7/5", DAY),
        ("2014/07/05 12:00", NOON),
        ("2014.07.05", DAY),
        ("20140705", DAY),
        ("Sat, 05 Jul 2014 12:00:00 GMT", NOON),  # RFC 2822
        ("Sat, 05 Jul 2014 14:00:00 +0200", NOON),
        ("Sat Jul 05 12:00:00 +0000 2014", NOON),  # Twitter
        ("July 5, 2014", DAY),
        ("Jul 5, 2014 12:00 PM", NOON),
        ("5 July 2014", DAY),
        ("05-Jul-2014", DAY),
        (" 2014-07-05 ", DAY),
    ],
)
def test_a_date_with_one_meaning_is_read(text: str, time: datetime) -> None:
    micros = parse(text)
    assert isinstance(micros, int) and datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros) == time


@pytest.mark.parametrize("text", ["05/07/2014", "05/25/2014", "5.7.14", "05-07-2014 12:00", "05 07 2014"])
def test_a_day_that_may_be_a_month_is_refused(text: str) -> None:
    assert str(parse(text)).startswith("is ambiguous: which number is the month?")


@pytest.mark.parametrize(
    "text",
    [
        *("soon", "2014", "Jul 2014", "12:00", "5 July", "Sat, 05 Jul 2014 12:00:00 EST", "2014-02-30", "30 Feb 2014"),
        *("13 5, 2014", "7 May 2014 25:00", "1e9", "\x00", "Mayor 5 2014", "5 May 2014 or 2015"),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    assert str(parse(text)).startswith("is not an ISO 8601 date")


@pytest.mark.parametrize("text", ["1404518400", "1412101200123", "2014070512000", "-1404518400", " 1404518400000000 "])
def test_a_number_in_quotes_is_no_date(text: str) -> None:
    """1412101200123, milliseconds of October 2014, was read as a day of the year 1412."""
    assert str(parse(text)).startswith("is a number in quotes, which has no unit")


def test_a_column_of_many_forms_gives_each_row_its_time_or_reason() -> None:
    column = pa.array(["07 5, 2014", None, "2014-07-05T12:00Z", "05/07/2014", " ", "07 5, 2014", "soon"])
    times, reasons = cells.timestamps(column, "timestamp")
    assert times.to_pylist() == [DAY, None, NOON, None, None, DAY, None]
    assert [None if reason is None else reason[:21] for reason in reasons.to_pylist()] == [
        *[None] * 3,
        "timestamp is ambiguous"[:21],
        None,
        None,
        "timestamp is not an ISO 8601"[:21],
    ]
