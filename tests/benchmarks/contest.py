"""Contenders that do the same work in turns (A, B, A, B, ...), each in a process of its own, so that memory is its own.

A ratio is taken within each turn, where both met the same machine, and the median over turns is quoted; the noise is
half the distance between the quartiles of those ratios.
"""

import multiprocessing
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import psutil


class Work(Protocol):
    """What a contender does in each turn."""

    def turn(self) -> tuple[float, float]:
        """Does the work once; returns how much it was, in units that the contenders share, and the seconds.

        A work may also have `found()`, what it makes of its input, and `end()`, for what it has started.
        """


@dataclass(kw_only=True)
class Contender:
    """A class with a method `turn`, in a process that it shares with those of the same `process`, or else name."""

    name: str
    work: type[Any]
    settings: Mapping[str, Any]
    process: str = ""
    rates: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    found: Any = None
    """What the work's `found` returns: for a look at whether all do the same."""

    @property
    def home(self) -> str:
        """What the contenders of one process share."""
        return self.process or self.name

    @property
    def rate(self) -> float:
        """The median over turns, units a second."""
        return statistics.median(self.rates)


def compete(contenders: Sequence[Contender], turns: int) -> None:
    """Fills `rates`, `peak_mib` and `found` of each contender; a median of five does not mind a slow first turn."""
    processes = {one.home: _Process() for one in contenders}
    try:
        for place, one in enumerate(contenders):
            one.found = processes[one.home].make(place, one.work, dict(one.settings))
        for _ in range(turns):
            for place, one in enumerate(contenders):
                with processes[one.home].watched() as memory:
                    units, seconds = processes[one.home].turn(place)
                one.rates.append(units / seconds)
                one.peak_mib = max(one.peak_mib, memory.peak_mib)
    finally:
        for process in processes.values():
            process.end()


def ratio(ours: Contender, peer: Contender) -> tuple[float, float]:
    """How many times as fast as the peer, and the noise of that."""
    ratios = [mine / theirs for mine, theirs in zip(ours.rates, peer.rates, strict=True)]
    return statistics.median(ratios), spread(ratios)


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


class Memory:
    """The peak of a process and all below it, and of the largest of each name: resident, not shared, in MiB."""

    def __init__(self, pid: int) -> None:
        self.peak_mib = 0.0
        self.peaks_mib: dict[str, float] = defaultdict(float)
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            total = 0.0
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(self._pid)
                for process in [root, *root.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        found = process.memory_info()
                        mib = (found.rss - found.shared) / 2**20
                        # Ray's workers are named after what they do at the moment.
                        name = "driver" if process.pid == self._pid else (process.cmdline() or ["?"])[0].split("(")[0]
                        self.peaks_mib[Path(name).name] = max(self.peaks_mib[Path(name).name], mib)
                        total += mib
            self.peak_mib = max(self.peak_mib, total)


class _Process:
    """One process that keeps what was made in it."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def make(self, place: int, work: type[Any], settings: dict[str, Any]) -> Any:
        self._pid, found = self._pool.submit(_make, place, work, settings).result()
        return found

    def turn(self, place: int) -> tuple[float, float]:
        return self._pool.submit(_turn, place).result()

    def watched(self) -> Memory:
        return Memory(self._pid)

    def end(self) -> None:
        self._pool.submit(_end).result()
        self._pool.shutdown()


_made: dict[int, Any] = {}


def _make(place: int, work: type[Any], settings: dict[str, Any]) -> tuple[int, Any]:
    _made[place] = made = work(**settings)
    return multiprocessing.current_process().pid or 0, made.found() if hasattr(made, "found") else None


def _turn(place: int) -> tuple[float, float]:
    found: tuple[float, float] = _made[place].turn()
    return found


def _end() -> None:
    for made in _made.values():
        if hasattr(made, "end"):
            made.end()


def timed(work: Any) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
