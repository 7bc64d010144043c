"""Progress of a running job on stderr: a bar for each stage on a terminal, a line every ten seconds in a log."""

import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.runtime import log
from jobs.runtime.tally import Counts, Tally
from persona.errors import RunLost

if TYPE_CHECKING:
    from tqdm import tqdm

_REFRESH_S = 0.5
_LOG_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a job is doing, and how far it is."""

    name: str
    done: int
    total: int | None
    """None while it is not known."""
    unit: str
    note: str = ""
    """More to show, such as a loss."""


@contextmanager
def progress(tally: Tally, job: str, stage_of: Callable[[Counts], Stage | None]) -> Iterator[None]:
    """Show the current stage while the body runs. `stage_of` derives it from the counts so far; None shows nothing."""
    display = _Bars(job) if _on_terminal() else _Lines(job)
    ended = threading.Event()

    def show() -> None:
        if stage := stage_of(tally.totals()):
            display.show(stage)

    def watch() -> None:
        while not ended.wait(_REFRESH_S):
            try:
                show()
            except RunLost:
                return  # the main thread gets the same error and reports it

    thread = threading.Thread(target=watch, daemon=True, name="progress")
    thread.start()
    try:
        yield
        ended.set()
        thread.join()
        show()
    finally:
        ended.set()
        thread.join()
        display.close()


def _on_terminal() -> bool:
    if log.in_json() or not sys.stderr.isatty():
        return False
    return os.get_terminal_size(sys.stderr.fileno()).lines > 0  # a container's may have no size, and shows no bar


class _Display(ABC):
    """The stage shown, and since when."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.stage: Stage | None = None
        self._begun_with, self._begun_at = 0, 0.0

    def show(self, stage: Stage) -> None:
        if self.stage is None or self.stage.name != stage.name:
            self.close()
            # The rate counts what was done under our eyes: a resumed training starts in the middle.
            self._begun_with, self._begun_at = stage.done, time.perf_counter()
        self.stage = stage
        self.draw(stage)

    @abstractmethod
    def draw(self, stage: Stage) -> None:
        """Bring what is on the screen or in the log up to date."""

    @abstractmethod
    def close(self) -> None:
        """End the stage shown."""

    def label(self, stage: Stage) -> str:
        return self.job if stage.name == self.job else f"{self.job}: {stage.name}"

    def text(self, stage: Stage) -> str:
        """How much, how fast, how long still."""
        from tqdm import tqdm

        elapsed_s = time.perf_counter() - self._begun_at
        rate = (stage.done - self._begun_with) / elapsed_s if elapsed_s else 0.0
        parts = [f"{stage.done:,}{'' if stage.total is None else f' of {stage.total:,}'} {stage.unit}"]
        if rate:
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s" if rate >= 0.1 else f"{60 * rate:.1f}/min")
        if stage.total is not None and stage.done >= stage.total:
            parts.append(f"took {tqdm.format_interval(elapsed_s)}")
        elif stage.total is not None and rate:
            parts.append(f"{tqdm.format_interval((stage.total - stage.done) / rate)} left")
        return ", ".join([*parts, *([stage.note] if stage.note else [])])


class _Lines(_Display):
    """Lines in a log."""

    _shown, _shown_at = "", -_LOG_EVERY_S

    def draw(self, stage: Stage) -> None:
        line = f"{self.label(stage)} {self.text(stage)}"
        if line != self._shown and time.perf_counter() - self._shown_at >= _LOG_EVERY_S:
            log.say(line)
            self._shown, self._shown_at = line, time.perf_counter()

    def close(self) -> None:
        """A log needs none."""


class _Bars(_Display):
    """A bar on a terminal for each stage; the line of a stage that is over stays."""

    _bar: "tqdm | None" = None

    def draw(self, stage: Stage) -> None:
        text = self.text(stage).replace("{", "{{").replace("}", "}}")
        # Without a total there is no bar, just the text.
        layout = "{desc} " + (text if stage.total is None else "{percentage:3.0f}%|{bar:20}| " + text)
        if self._bar is None:
            self._bar = _new_bar(self.label(stage), layout, stage)
        self._bar.bar_format, self._bar.total, self._bar.n = layout, stage.total, stage.done
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _new_bar(label: str, layout: str, stage: Stage) -> "tqdm":
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        monitor_interval = 0  # no thread of its own: `watch` refreshes it

    return Bar(
        desc=label, bar_format=layout, total=stage.total, initial=stage.done, file=sys.stderr, dynamic_ncols=True
    )
