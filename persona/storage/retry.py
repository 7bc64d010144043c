"""How long work on an object store is tried again, and at which errors, before it fails with one that says why.

`PERSONA_STORAGE_TIMEOUT_S` sets for how long one piece of work may go on failing (default: `GIVE_UP_S`). Every client
of the store takes its own time-outs and its own number of attempts from it, so that no single request uses it up.
What is bounded is failure: a transfer that goes on, however slowly, is left alone.
"""

import itertools
import os
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError as BotoConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
)

from persona.errors import PersonaError, StorageError, UsageError

T = TypeVar("T")

GIVE_UP_S = 120.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 8.0
_PASSING_STATUS = {408, 409, 429, 500, 502, 503, 504}
# Answers that pass though their status is one of those that do not: 400 for a body that came too slowly, and 404 for an
# upload whose completion was answered, but not heard. The whole upload has to be done again.
_PASSING_CODES = {"RequestTimeout", "RequestTimeoutException", "NoSuchUpload", "SlowDown", "Throttling"}
# How Arrow and delta-rs say it; they raise OSError, DeltaError or ArrowInvalid, whose text alone tells what happened.
# Of a commit that failed, a number in the place of a reason says that the log's next entry was there already, or that
# the answer was a 409: object_store takes either for the same.
_PASSING_TEXT = re.compile(
    r"AWS Error (INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|NETWORK_CONNECTION|REQUEST_TIMEOUT)"
    r"|AWS Error NO_SUCH_UPLOAD"
    r"|HTTP status (408|409|429|500|502|503|504)\b"
    r"|non-2xx status code:? (408|409|429|500|502|503|504)\b"
    r"|HTTP error:? (error sending request|request or response body error|operation timed out)"
    r"|client error \((Connect|SendRequest)\)"
    r"|<Code>(InternalError|SlowDown|RequestTimeout)</Code>"
    r"|Failed to commit transaction: \d+$"
)


def give_up_s() -> float:
    """For how long work that fails is tried again, in seconds."""
    told = os.environ.get("PERSONA_STORAGE_TIMEOUT_S", "")
    try:
        bound_s = float(told) if told else GIVE_UP_S
    except ValueError:
        bound_s = 0.0
    if not 0 < bound_s < float("inf"):
        raise UsageError(f"PERSONA_STORAGE_TIMEOUT_S: {told!r} is no number of seconds above 0")
    return bound_s


def silence_s() -> float:
    """For how long a store may be silent before a request counts as lost, in seconds."""
    return give_up_s() / 12


def retry_transient(work: Callable[[], T], what: str) -> T:
    """The result of `work`, which is repeated on errors that pass by themselves; it must be harmless to repeat.

    Any other error passes at once, as it is. Raises `StorageError`, beginning with `what` ("cannot read ..."), with the
    last error as its cause, before a further attempt as long as the longest so far would end after `give_up_s`; there
    are two attempts at least.
    """
    bound_s, pause_s, longest_s = give_up_s(), _FIRST_PAUSE_S, 0.0
    began = time.monotonic()
    for attempt in itertools.count(1):
        started = time.monotonic()
        try:
            return work()
        except Exception as error:
            if not is_transient(error):
                raise
            now = time.monotonic()
            longest_s = max(longest_s, now - started)
            wait_s = random.uniform(pause_s / 2, pause_s)
            foreseen_s = now - began + wait_s + (longest_s if attempt > 1 else 0)
            if foreseen_s > bound_s:
                raise StorageError(f"{what}: tried for {now - began:.0f} s, at last {in_one_line(error)}") from error
        time.sleep(wait_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    raise AssertionError


def in_one_line(error: BaseException) -> str:
    """What an error says, without its line breaks, cut where it goes on for long."""
    return f"{type(error).__name__}: {_plain(error)}"[:400]


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment.

    So are server errors, requests to slow down, conflicts of two writes at once (409), connections that fail or break,
    answers that do not come or come in part. A refusal, an object or a bucket that is not there, a condition that does
    not hold (412) and any `PersonaError` are not.
    """
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return code in _PASSING_CODES or (status in _PASSING_STATUS and not code.startswith("Bucket"))
    if isinstance(error, BotoCoreError):
        return isinstance(error, HTTPClientError | BotoConnectionError | IncompleteReadError | FlexibleChecksumError)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return not isinstance(error, PersonaError) and _PASSING_TEXT.search(_plain(error)) is not None


def _plain(error: BaseException) -> str:
    # delta-rs joins the causes of an error by coloured arrows where others put a colon.
    return " ".join(re.sub(r"\x1b\[[\d;]*m|↳", " ", str(error)).split())
