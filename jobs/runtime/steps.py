"""The steps of a long job that is made of other jobs: each is done once, and the same command again goes on.

A step's result is a JSON file in the job's folder, written when the step has ended. What the job was started with is
kept beside them, so that results of different settings never meet in one folder.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.runtime.cli import Summary, plain
from persona.errors import InputError, UsageError

_SETTINGS = "settings.json"


class StepFailed(Exception):
    """A step did its work, but ended with an exit code, such as 3 for too many rejects."""

    def __init__(self, name: str, summary: Summary) -> None:
        super().__init__(f"{name} ended with exit code {summary.exit_code}")
        self.name = name
        self.summary = summary


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps in a folder, local or s3://."""

    uri: str

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise `UsageError` if the folder was begun with other settings."""
        known = self._read(_SETTINGS)
        now = plain(settings)
        if known is None:
            return
        pairs = {name: (known.get(name), value) for name, value in now.items()}
        differing = [
            f"--{name.replace('_', '-')} was {was!r} and is {value!r}"
            for name, (was, value) in pairs.items()
            if was != value
        ]
        if differing:
            raise UsageError(
                f"--out: was begun with other settings ({'; '.join(differing)}); use the same ones, or another folder"
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Keep the settings."""
        self._write(_SETTINGS, plain(settings))

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of a step; None if it is not done."""
        return self._read(f"{name}.json")

    def run(self, name: str, work: Callable[[], Summary]) -> tuple[dict[str, Any], Summary | None]:
        """The result of a step, and the summary of its job if it had to be done. Raises `StepFailed`."""
        if (known := self.result(name)) is not None:
            return known, None
        summary = work()
        if summary.exit_code:
            raise StepFailed(name, summary)
        result: dict[str, Any] = plain(summary.result)
        self._write(f"{name}.json", result)
        return result, summary

    def _read(self, name: str) -> dict[str, Any] | None:
        from persona import storage

        uri = storage.join(self.uri, name)
        if not storage.exists(uri):
            return None
        try:
            found = json.loads(storage.read_bytes(uri))
        except ValueError as error:
            raise InputError(f"{uri} is broken ({error}); delete it to do the step again") from error
        if not isinstance(found, dict):
            raise InputError(f"{uri} is not a result; delete it to do the step again")
        return found

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        from persona import storage

        storage.write_bytes(storage.join(self.uri, name), json.dumps(value, indent=2).encode())
