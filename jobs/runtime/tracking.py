"""Report a run to an experiment tracker (`--track`), from the driver, which has the credentials.

A tracker that fails while the run goes on costs a warning and nothing else. A resumed run goes on in the tracker: no
step is logged twice, and steps that are missing at the end are taken from the plug's own curves.
"""

import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime import cli, log
from jobs.runtime.tally import Tally
from persona.errors import RunLost, TrackingError

if TYPE_CHECKING:
    from persona.options import Track
    from persona.tracking.tracker import Point, Tracker

_POLL_S = 2.0
_NO_SETTINGS = ("track", "dry_run", "profile")  # change nothing about the result
TRAINING_LOSS, HELD_OUT_LOSS, LOSS_OF_NONE = "train/loss", "validation/loss", "validation/loss_no_persona"
_CURVES = {TRAINING_LOSS: "training_curve", HELD_OUT_LOSS: "validation_curve", LOSS_OF_NONE: "none_curve"}


class Tracked:
    """A run as it is tracked; without a tracker every method does nothing."""

    def __init__(self, tracker: "Tracker | None") -> None:
        self._tracker = tracker
        self._logged = {name: tracker.steps(name) for name in _CURVES} if tracker else {}

    @property
    def is_on(self) -> bool:
        """Whether there is a tracker, which has not failed so far."""
        return self._tracker is not None

    @contextmanager
    def following(self, tally: Tally) -> Iterator[None]:
        """Log the steps that workers report while the body runs, from a thread."""
        if self._tracker is None:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._follow, args=(tally, done), daemon=True, name="tracking")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def plug(self, uri: str) -> None:
        """Log what the curves of a finished plug have beyond what was logged, and keep its folder with the run."""
        from persona import storage
        from persona.plug import record as plug_record

        if self._tracker is None:
            return
        with storage.local_folder(uri) as folder:
            training = plug_record.read(folder).training
            for name, curve in _CURVES.items():
                self.log([(step, {name: loss}) for step, loss in training.get(curve, [])])
            self._try(lambda tracker: tracker.log_files(folder, "plug"))

    def results(self, numbers: Mapping[str, float], files: Mapping[str, bytes]) -> None:
        """Log the numbers of a result, and keep its files with the run."""
        if self._tracker is None:
            return
        finite = {name: value for name, value in numbers.items() if cli.plain(float(value)) is not None}
        self._try(lambda tracker: tracker.log_numbers([(0, finite)]))
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            self._try(lambda tracker: tracker.log_files(Path(folder), "report"))

    def close(self, *, failed: bool) -> None:
        """End this process's part of the run."""
        self._try(lambda tracker: tracker.close(failed=failed))

    def _follow(self, tally: Tally, done: threading.Event) -> None:
        is_last = False
        while not is_last:
            is_last = done.wait(_POLL_S)
            try:
                self.log(tally.take_points())
            except RunLost:
                return  # the main thread gets the same error and reports it

    def log(self, points: "Sequence[Point]") -> None:
        """Log numbers of steps, without those that are there already."""
        new = []
        for step, numbers in points:
            known = {name for name in numbers if step in self._logged.get(name, ())}
            if TRAINING_LOSS in known:
                continue  # the step is repeated after a crash, and its times belong to the repetition
            new.append((step, {name: value for name, value in numbers.items() if name not in known}))
            for name in self._logged.keys() & numbers.keys():
                self._logged[name].add(step)
        new = [(step, numbers) for step, numbers in new if numbers]
        if new:
            self._try(lambda tracker: tracker.log_numbers(new))

    def _try(self, call: "Callable[[Tracker], None]") -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except TrackingError as error:
            self._tracker = None
            log.say(f"this run is no longer tracked: {error}", level="warning")


@contextmanager
def tracked(track: "Track", *, job: str, place: str, settings: Mapping[str, Any]) -> Iterator[Tracked]:
    """The run of `job` whose outputs are at `place`, in the tracker `track`; the same place is the same run.

    Raises UsageError or TrackingError, before any work, when the tracker cannot be used.
    """
    if track == "none":
        yield Tracked(None)
        return
    from persona.tracking.tracker import TrackedRun, start

    key = hashlib.blake2b(f"{job} {place}".encode(), digest_size=8).hexdigest()
    tracker = start(track, TrackedRun(key=key, name=place.rsplit("/", 1)[-1], job=job))
    log.say(f"{job}: tracked at {tracker.place}")
    found = Tracked(tracker)
    tracker.log_settings(_as_given(settings))
    try:
        yield found
    except BaseException:
        found.close(failed=True)
        raise
    found.close(failed=False)


def _as_given(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings as a command line has them: several values with a space between, and no flag that is not given."""
    given = {name: value for name, value in settings.items() if name not in _NO_SETTINGS and value not in (None, ())}
    return {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in given.items()
    }
