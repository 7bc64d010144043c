"""Progress of a running job on stderr: one line that is updated on a terminal, or a line now and then in a log."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jobs.runtime import log
from jobs.runtime.tally import Counts, Tally
from persona.errors import RunLost

_REFRESH_S = 1.0
_LOG_EVERY_S = 10.0

ProgressLine = Callable[[Counts, float], str]
"""Makes the line from the counts so far and the seconds since the start; an empty line is not shown."""


@contextmanager
def progress(tally: Tally, line: ProgressLine) -> Iterator[None]:
    """Show `line` from a thread while the body runs."""
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(tally, line, done), daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show(tally: Tally, line: ProgressLine, done: threading.Event) -> None:
    on_terminal = sys.stderr.isatty() and not log.in_json()
    started = time.perf_counter()
    shown, shown_at = "", 0.0
    while not done.wait(_REFRESH_S):
        try:
            text = line(tally.totals(), time.perf_counter() - started)
        except RunLost:
            return  # the main thread gets the same error and reports it
        is_due = on_terminal or time.perf_counter() - shown_at > _LOG_EVERY_S
        if not text or text == shown or not is_due:
            continue
        if on_terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        else:
            log.say(text)
        shown, shown_at = text, time.perf_counter()
    if on_terminal and shown:
        print(file=sys.stderr)
