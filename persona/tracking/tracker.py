"""The interface of an experiment tracker: settings, numbers by step, and files of one run.

To add a tracker, write `persona/tracking/NAME.py` with a function `start` as in `TrackerModule`, and add NAME to
`persona.options.Track`. It imports its library in that function, so the library is needed only where it is chosen.

A tracker gets no ids or texts of users: `forget` cannot follow them into another system.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from persona.errors import UsageError
from persona.extensions import find

Point = tuple[int, Mapping[str, float]]
"""A step of the run, and numbers by name (`train/loss`)."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What is tracked. The same `key` always means the same run, which goes on; `name` and `job` are for people."""

    key: str
    name: str
    job: str


class Tracker(Protocol):
    """One run in a tracker. Every method raises TrackingError when the tracker cannot be reached or refuses."""

    @property
    def place(self) -> str:
        """Where people find the run: an address or a folder."""

    def steps(self, name: str) -> set[int]:
        """The steps for which the run has a number of this name, logged by earlier processes."""

    def log_settings(self, settings: Mapping[str, str]) -> None:
        """Record settings by name; one that the run has already keeps its first value."""

    def log_numbers(self, points: Sequence[Point]) -> None:
        """Record numbers of steps, in any order; no step twice."""

    def log_files(self, folder: Path, name: str) -> None:
        """Keep the files of a local folder with the run, under `name`."""

    def close(self, *, failed: bool) -> None:
        """End this process's part of the run. A failed run goes on when it is started again."""


class TrackerModule(Protocol):
    """What `persona/tracking/NAME.py` defines."""

    PACKAGE: str
    """The package that it needs, which is also the name of the extra of persona-plug."""

    def start(self, run: TrackedRun) -> Tracker:
        """See `start`."""


def start(name: str, run: TrackedRun) -> Tracker:
    """Starts or continues a run in the tracker of that name (`persona.options.Track`).

    Raises:
        UsageError: its package is not installed, or the environment does not say where it is.
        TrackingError: it cannot be reached.
    """
    module = cast(TrackerModule, find("persona.tracking", name, required="start"))
    try:
        return module.start(run)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.PACKAGE:
            raise
        raise UsageError(
            f"--track {name} needs the package {module.PACKAGE}: pip install 'persona-plug[{module.PACKAGE}]'"
        ) from error
