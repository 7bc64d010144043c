"""Retry work that fails for a passing reason, with backoff and a time limit.

`PERSONA_STORAGE_TIMEOUT_S` (default: `DEFAULT_TIMEOUT_S`) limits how long one piece of storage work may keep failing.
The timeouts and attempts of every storage client derive from it, so that no single request uses up the limit.
Only failure is limited: a slow transfer that makes progress is never interrupted.
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

DEFAULT_TIMEOUT_S = 120.0
_TRANSIENT_STATUS = {408, 409, 429, 500, 502, 503, 504}
# Transient errors with another status: 400 for a body that was sent too slowly, and 404 when the response to a
# completed multipart upload was lost; the whole upload is then repeated.
_TRANSIENT_CODES = {"RequestTimeout", "RequestTimeoutException", "NoSuchUpload", "SlowDown", "Throttling"}
# Arrow and delta-rs raise OSError, DeltaError or ArrowInvalid; only the text tells what happened. A failed commit with
# a bare number as its reason means that the next log entry already exists or that the response was a 409: object_store
# does not distinguish the two.
_TRANSIENT_TEXT = re.compile(
    r"AWS Error (INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|NETWORK_CONNECTION|REQUEST_TIMEOUT)"
    r"|AWS Error NO_SUCH_UPLOAD"
    r"|HTTP status (408|409|429|500|502|503|504)\b"
    r"|non-2xx status code:? (408|409|429|500|502|503|504)\b"
    r"|HTTP error:? (error sending request|request or response body error|operation timed out)"
    r"|client error \((Connect|SendRequest)\)"
    r"|<Code>(InternalError|SlowDown|RequestTimeout)</Code>"
    r"|Failed to commit transaction: \d+$"
)


def timeout_s() -> float:
    """The time limit for storage work that keeps failing, in seconds."""
    given = os.environ.get("PERSONA_STORAGE_TIMEOUT_S", "")
    try:
        seconds = float(given) if given else DEFAULT_TIMEOUT_S
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"PERSONA_STORAGE_TIMEOUT_S: must be a number of seconds above 0, got {given!r}")
    return seconds


def silence_s() -> float:
    """How long a store may send nothing before a request counts as lost, in seconds."""
    return timeout_s() / 12


def is_transient(error: BaseException) -> bool:
    """Whether the same storage request may succeed if it is repeated.

    True for server errors, throttling, conflicting writes (409), failed or broken connections, and missing or partial
    responses. False for a denied request, a missing object or bucket, a failed precondition (412) and any
    `PersonaError`.
    """
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return code in _TRANSIENT_CODES or (status in _TRANSIENT_STATUS and not code.startswith("Bucket"))
    if isinstance(error, BotoCoreError):
        return isinstance(error, HTTPClientError | BotoConnectionError | IncompleteReadError | FlexibleChecksumError)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return not isinstance(error, PersonaError) and _TRANSIENT_TEXT.search(plain(error)) is not None


def retry_transient(
    work: Callable[[], T],
    what: str,
    *,
    is_transient: Callable[[BaseException], bool] = is_transient,
    give_up_s: float | None = None,
    pauses_s: tuple[float, float] = (0.1, 8.0),
    asked_pause_s: Callable[[BaseException], float] = lambda _: 0.0,
    error_class: type[PersonaError] = StorageError,
) -> T:
    """Call `work` until it returns, and return its result. `work` must be safe to repeat.

    An error for which `is_transient` is false is raised at once, unchanged. To stop early with a better message, let
    `work` raise a `PersonaError` that the predicate does not accept. To look before each attempt, do so in `work`:

        def commit() -> None:
            if not is_committed():
                transact()

        retry_transient(commit, "cannot write ...", is_transient=lambda e: isinstance(e, CommitFailedError))

    Args:
        work: What to do; any state it keeps between attempts is its own.
        what: Start of the message on giving up ("cannot read s3://..."); the time and the last error follow.
        is_transient: Which errors to retry; by default those of object stores.
        give_up_s: The time limit in seconds; None for `timeout_s()`. With 0 there is one attempt.
        pauses_s: The first and the longest pause between attempts. Pauses double and are randomized by half.
        asked_pause_s: The pause that an error asks for at least, such as `Retry-After`.
        error_class: What to raise on giving up.

    Raises:
        error_class: The limit would pass before another attempt, as long as the longest so far, could end. The second
            attempt need only start in time. The last error is the cause.
    """
    limit_s = timeout_s() if give_up_s is None else give_up_s
    (pause_s, max_pause_s), longest_s = pauses_s, 0.0
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
            wait_s = max(random.uniform(pause_s / 2, pause_s), asked_pause_s(error))
            expected_s = now - began + wait_s + (longest_s if attempt > 1 else 0)
            if expected_s > limit_s:
                message = f"{what}: retried for {now - began:.0f} s; last error: {in_one_line(error)}"
                raise error_class(message) from error
        time.sleep(wait_s)
        pause_s = min(2 * pause_s, max_pause_s)
    raise AssertionError("unreachable")


def in_one_line(error: BaseException) -> str:
    """An error's class and message without line breaks, at most 400 characters."""
    return f"{type(error).__name__}: {plain(error)}"[:400]


def plain(error: BaseException) -> str:
    """An error's message without line breaks and colors."""
    # delta-rs joins the causes of an error with colored arrows where other libraries use a colon.
    return " ".join(re.sub(r"\x1b\[[\d;]*m|↳", " ", str(error)).split())
