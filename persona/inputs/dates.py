"""Read dates and times that are written as text: ISO 8601, and other forms that have one meaning only."""

import re
from datetime import UTC, datetime, timedelta, timezone, tzinfo

from dateutil import parser

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ZONE_NAME = re.compile(r"\s*(UTC|GMT)$")
# Python takes any character between date and time, so 1412101200123 would be 01:23 on a day of the year 1412.
_NUMBER = re.compile(r"[-+]?\d{9,}")
# What is unambiguous: a month in words and a year of four digits, or a year first. And the form of Amazon's reviews.
_MONTH = re.compile(r"(?i)\b(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\b")
_YEAR = re.compile(r"\b[12]\d{3}\b")
_YEAR_FIRST = re.compile(r"[12]\d{3}([-/.])\d{1,2}\1\d{1,2}([ T]|$)")
_AMAZON = re.compile(r"(\d{1,2}) (\d{1,2}), (\d{4})")
_DAY_OR_MONTH = re.compile(r"\d{1,2}[-/. ]\d{1,2}[-/. ]\d{2,4}\b")
# A field that a text lacks takes its value from these, which differ in each.
_DEFAULTS = datetime(2000, 1, 1), datetime(2001, 2, 2)  # noqa: DTZ001  # the text's own zone, or UTC


def parse(text: str | None) -> int | str | None:
    """Microseconds since 1970, UTC if there is no zone; or the end of a sentence that says why there is no date.

    None for None. Beyond ISO 8601 it reads "2014-07-05 12:00:00 UTC", "2014/7/5", "Sat, 05 Jul 2014 12:00:00 +0200",
    "July 5, 2014 3:04 PM", and "07 5, 2014" (month, day, year). A text like 05/07/2014 could be in May or July.
    """
    if text is None:
        return None
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return "is a number in quotes, which has no unit; write it as a number, or as a date like 2014-07-05"
    try:
        time = _iso(text) or _other(text)
        if time is not None:
            return (time.replace(tzinfo=time.tzinfo or UTC) - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        pass
    if _DAY_OR_MONTH.match(text):
        return "is ambiguous: which number is the month? Write it as in 2014-07-05"
    return "is not an ISO 8601 date or time, nor in another form that can be read"


def _iso(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(_ZONE_NAME.sub("Z", text))
    except ValueError:
        return None


def _other(text: str) -> datetime | None:
    if found := _AMAZON.fullmatch(text):
        month, day, year = map(int, found.groups())
        return datetime(year, month, day, tzinfo=UTC)
    if not (_YEAR_FIRST.match(text) or (_MONTH.search(text) and _YEAR.search(text))):
        return None
    first, second = (parser.parse(text, default=default, tzinfos=_zone) for default in _DEFAULTS)
    return first if first == second else None


def _zone(name: str | None, offset_s: int | None) -> tzinfo:
    """The zone of a text. Raises `ValueError` for names other than UTC, as many of them have several meanings."""
    if name not in (None, "UTC", "GMT", "Z"):
        raise ValueError(name)
    return timezone(timedelta(seconds=offset_s or 0))
