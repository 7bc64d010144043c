"""TensorBoard as a tracker: a folder with event files and other files below TENSORBOARD_LOGGING_DIR.

The variable is that of transformers and accelerate; TensorBoard itself has none.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from persona.errors import TrackingError, UsageError
from persona.tracking.tracker import Point, TrackedRun

PACKAGE = "tensorboard"
_VARIABLE = "TENSORBOARD_LOGGING_DIR"
_FILES = "files"


def start(run: TrackedRun) -> "TensorBoard":
    """The folder of this run, where earlier event files stay. Raises as `tracker.start`."""
    root = os.environ.get(_VARIABLE, "")
    if not root:
        raise UsageError(f"--track tensorboard: set {_VARIABLE} to the folder that TensorBoard shows")
    if "://" in root:
        raise UsageError(f"--track tensorboard: {_VARIABLE}={root} must be a local folder or a mounted one")
    import tensorboard  # noqa: F401 - torch's own error does not name the missing package
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(root) / f"{run.job}-{run.name}-{run.key[:8]}"
    with _errors(folder):
        logged = _logged(folder)
        return TensorBoard(folder, SummaryWriter(os.fspath(folder)), logged)


class TensorBoard:
    """A folder of event files."""

    def __init__(self, folder: Path, writer: Any, logged: Mapping[str, set[int]]) -> None:
        """Use `start`."""
        self.place = os.fspath(folder)
        self._folder = folder
        self._writer = writer
        self._logged = logged

    def steps(self, name: str) -> set[int]:
        """See `Tracker`."""
        return self._logged.get(name, set())

    def log_settings(self, settings: Mapping[str, str]) -> None:
        """See `Tracker`."""
        lines = [f"| {name} | {value.replace('|', '&#124;')} |" for name, value in settings.items()]
        with _errors(self._folder):
            self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *lines]))

    def log_numbers(self, points: Sequence[Point]) -> None:
        """See `Tracker`."""
        with _errors(self._folder):
            for step, values in points:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def log_files(self, folder: Path, name: str) -> None:
        """See `Tracker`."""
        with _errors(self._folder):
            shutil.copytree(folder, self._folder / _FILES / name, dirs_exist_ok=True)

    def close(self, *, failed: bool) -> None:
        """See `Tracker`; an event file does not tell how its run ended."""
        del failed
        with _errors(self._folder):
            self._writer.close()


def _logged(folder: Path) -> dict[str, set[int]]:
    """The steps in the event files of a folder, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return {}
    found = EventAccumulator(os.fspath(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    return {name: {event.step for event in found.Scalars(name)} for name in found.Tags()["scalars"]}


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrackingError(f"TensorBoard's files in {folder}: {error}") from error
