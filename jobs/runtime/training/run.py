"""A training run by name: what it was started with, so that it is resumed with the same or refused."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from jobs.runtime.training.spec import OPTIONS, RunSpec, read_back
from persona.errors import InputError, UsageError
from persona.field_types import check_field_types

if TYPE_CHECKING:
    from jobs.runtime.training.inputs import TrainingInputs


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The `settings.json` of a run: the table of behaviors, its version, the number of requests, settings by name."""

    behaviors: str
    behaviors_version: int
    requests: int
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, uri: str) -> "RunRecord | None":
        """The record at `uri`; None when there is none. Raises InputError when it is broken."""
        from persona import storage

        if not storage.exists(uri):
            return None
        try:
            record = cls(**json.loads(storage.read_bytes(uri)))
            check_field_types(record)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{uri} is broken ({error}); give the run another name with --run") from error
        return record

    def write(self, uri: str) -> None:
        """Writes the record to `uri`."""
        from persona import storage

        storage.write_bytes(uri, json.dumps(asdict(self), indent=2).encode())


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that starts, or resumes as `record` says with the same settings and the same version of the behaviors."""

    uri: str
    settings: Mapping[str, Any]
    behaviors: str
    behaviors_version: int
    record: RunRecord | None

    @classmethod
    def find(cls, spec: RunSpec, inputs: "TrainingInputs", *, is_tracked: bool) -> "Run":
        """The run of that name. Raises UsageError when it cannot be resumed with these settings.

        A run that ended before its first checkpoint has nothing to resume, so it starts anew, with any settings; unless
        it is tracked, as a tracker keeps the settings that it was told first.
        """
        from persona import storage

        folder = storage.join(inputs.runs, spec.run)
        uri = storage.join(folder, "settings.json")
        settings = spec.fixed() | {"llm": inputs.llm.fingerprint, "encoder": inputs.encoder.fingerprint}
        record = RunRecord.read(uri) if is_tracked or _has_checkpoint(folder) else None
        behaviors = inputs.store.table("behaviors")
        if record is not None:
            if record.behaviors != behaviors.id():
                raise UsageError(
                    f"--run {spec.run}: was started with another store than {inputs.store.label}; give --store the one "
                    "it was started with, or give the run another name"
                )
            _check_same_settings(spec.run, record.settings, settings)
            if not behaviors.has(record.behaviors_version):
                raise UsageError(
                    f"--run {spec.run}: reads version {record.behaviors_version} of the behaviors, whose files "
                    "jobs.forget or jobs.store vacuum has deleted since; give the run another name to train on the "
                    "current version"
                )
        version = record.behaviors_version if record else behaviors.version()
        return cls(uri=uri, settings=settings, behaviors=behaviors.id(), behaviors_version=version, record=record)

    def begin(self, n_requests: int) -> None:
        """Records a new run. Raises UsageError when a resumed run has another number of requests."""
        if self.record is None:
            RunRecord(
                behaviors=self.behaviors,
                behaviors_version=self.behaviors_version,
                requests=n_requests,
                settings=self.settings,
            ).write(self.uri)
        elif self.record.requests != n_requests:
            raise UsageError(
                f"--requests gives {n_requests:,} requests to train on, but gave {self.record.requests:,} when the run "
                "was started; give the run another name with --run"
            )


def _has_checkpoint(folder: str) -> bool:
    from persona import storage

    return any(file.uri.removeprefix(f"{folder}/").startswith("checkpoint_") for file in storage.list_files(folder))


def _check_same_settings(run: str, known: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    # An option that is newer than the run was off in it (spec.OPTIONS).
    off = {option.name: read_back(option.default) for kind in OPTIONS for option in fields(kind)}
    pairs = {name: (known.get(name, off.get(name)), settings[name]) for name in settings}
    differing = [f"{name} was {was!r} and is {now!r}" for name, (was, now) in pairs.items() if was != now]
    if differing:
        raise UsageError(
            f"--run {run}: was started with other settings ({'; '.join(differing)}); use the same settings, or give "
            "the run another name"
        )
