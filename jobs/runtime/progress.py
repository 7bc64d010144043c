"""One line of progress on stderr while a job runs."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jobs.runtime import log
from jobs.runtime.tally import Counts, totals
from persona.errors import RunLost

_QUIET_S = 10.0


@contextmanager
def progress(tally: Any, line: Callable[[Counts, float], str]) -> Iterator[None]:
    """Prints `line(totals, seconds)` on stderr while the body runs: in place on a terminal, now and then in a log."""
    done = threading.Event()
    started = time.perf_counter()
    on_terminal = sys.stderr.isatty() and not log.in_json()

    def show() -> None:
        last, last_at = "", 0.0
        while not done.wait(1.0):
            try:
                text = line(totals(tally), time.perf_counter() - started)
            except RunLost:
                return  # the run itself will say so
            due = on_terminal or time.perf_counter() - last_at > _QUIET_S
            if text and text != last and due:
                if on_terminal:
                    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
                else:
                    log.say(text)
                last, last_at = text, time.perf_counter()
        if on_terminal and last:
            print(file=sys.stderr)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
