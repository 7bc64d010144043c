"""Run benchmark contenders in turns (A, B, A, B, ...), each in a separate process, and measure speed and peak memory.

A ratio compares two contenders within one turn, when both had the same machine load. We report the median over turns;
the noise is half the interquartile range.
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
    """What a contender does in each turn.

    Optional methods: `result()` returns an output to compare between contenders, and `close()` frees resources.
    """

    def turn(self) -> tuple[float, float]:
        """Do the work once; returns the amount, in a unit that the contenders share, and the seconds."""


@dataclass(kw_only=True)
class Contender:
    """One way to do the work, and its measurements."""

    name: str
    work: type[Any]
    """The class of the `Work`."""
    settings: Mapping[str, Any]
    """Its keyword arguments."""
    process: str = ""
    """Contenders with the same non-empty value share a process."""
    rates: list[float] = field(default_factory=list)
    """Units per second in each turn."""
    peak_mib: float = 0.0
    result: Any = None
    """The return value of the work's `result()`, to check that all contenders do the same."""

    @property
    def process_key(self) -> str:
        """Contenders with an equal key share a process."""
        return self.process or self.name

    @property
    def rate(self) -> float:
        """Units per second, the median over turns."""
        return statistics.median(self.rates)


def compete(contenders: Sequence[Contender], turns: int) -> None:
    """Fill in `rates`, `peak_mib` and `result` of each contender."""
    processes = {one.process_key: _Process() for one in contenders}
    try:
        for i, one in enumerate(contenders):
            one.result = processes[one.process_key].create(i, one.work, dict(one.settings))
        for _ in range(turns):
            for i, one in enumerate(contenders):
                with processes[one.process_key].memory() as memory:
                    units, seconds = processes[one.process_key].turn(i)
                one.rates.append(units / seconds)
                one.peak_mib = max(one.peak_mib, memory.peak_mib)
    finally:
        for process in processes.values():
            process.close()


def ratio(ours: Contender, peer: Contender) -> tuple[float, float]:
    """Our rate divided by the peer's, and the noise of this ratio."""
    ratios = [our_rate / peer_rate for our_rate, peer_rate in zip(ours.rates, peer.rates, strict=True)]
    return statistics.median(ratios), spread(ratios)


def spread(values: Sequence[float]) -> float:
    """Half the interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


class Memory:
    """Peak memory (resident minus shared, MiB) of a process tree, and of its largest process by name."""

    def __init__(self, pid: int) -> None:
        self.peak_mib = 0.0
        self.peaks_mib: dict[str, float] = defaultdict(float)
        self._pid = pid
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(0.2):
            total = 0.0
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(self._pid)
                for process in [root, *root.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        info = process.memory_info()
                        mib = (info.rss - info.shared) / 2**20
                        # A Ray worker's command line names its current task.
                        name = "driver" if process.pid == self._pid else (process.cmdline() or ["?"])[0].split("(")[0]
                        self.peaks_mib[Path(name).name] = max(self.peaks_mib[Path(name).name], mib)
                        total += mib
            self.peak_mib = max(self.peak_mib, total)


class _Process:
    """A process that keeps its works between turns."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def create(self, i: int, work: type[Any], settings: dict[str, Any]) -> Any:
        self._pid, result = self._pool.submit(_create, i, work, settings).result()
        return result

    def turn(self, i: int) -> tuple[float, float]:
        return self._pool.submit(_turn, i).result()

    def memory(self) -> Memory:
        return Memory(self._pid)

    def close(self) -> None:
        self._pool.submit(_close).result()
        self._pool.shutdown()


_works: dict[int, Any] = {}


def _create(i: int, work: type[Any], settings: dict[str, Any]) -> tuple[int, Any]:
    _works[i] = created = work(**settings)
    return multiprocessing.current_process().pid or 0, created.result() if hasattr(created, "result") else None


def _turn(i: int) -> tuple[float, float]:
    measured: tuple[float, float] = _works[i].turn()
    return measured


def _close() -> None:
    for work in _works.values():
        if hasattr(work, "close"):
            work.close()


def timed(call: Any) -> float:
    """Seconds that `call()` takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
