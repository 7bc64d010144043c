"""How long an actor works and how long it waits for input, also when several threads call it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(kw_only=True)
class CallTimes:
    """Seconds of one call. Summed over all calls: the time with no call at work, and the time with at least one."""

    waiting: float = 0.0
    seconds: float = 0.0


class BusyTime:
    """Divides the life of an actor into work and waiting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_calls = 0
        self._counted_until = time.perf_counter()

    @contextmanager
    def call(self) -> Iterator[CallTimes]:
        """Measures one call; its times are complete at the end."""
        times = CallTimes()
        with self._lock:
            elapsed = self._elapsed()
            if self._n_calls == 0:
                times.waiting = elapsed
            else:
                times.seconds = elapsed
            self._n_calls += 1
        try:
            yield times
        finally:
            with self._lock:
                times.seconds += self._elapsed()
                self._n_calls -= 1

    def _elapsed(self) -> float:
        """Seconds that no call has counted yet."""
        now = time.perf_counter()
        elapsed, self._counted_until = now - self._counted_until, now
        return elapsed
