"""The table `plugs`: the versions of a plug that were proposed for a store, and which of them is live.

A version is a plug's fingerprint; its folder must stay as it is for as long as anyone may go back to it. At most one
version is live. All rows change together in one commit, so readers see one live plug before and after it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Literal, get_args

import pyarrow as pa

from persona.errors import InputError, PlugMismatch, UsageError
from persona.storage import join
from persona.store.schema import LAYOUTS
from persona.store.store import Store
from persona.store.table import Table
from persona.store.writer import Writer

NAME = "plugs"
LIVE = "live"
"""What is given in place of a plug's folder for the live plug of the store."""
Stage = Literal["live", "retired", "rolled_back", "refused"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlugVersion:
    """A plug that was proposed, and what became of it.

    Attributes:
        version: counts from 1.
        stage: `live`; `retired` (was live until a later one was promoted); `rolled_back` (was live until someone went
            back to an earlier one); `refused` (never live).
        uri, fingerprint: the plug's folder and content.
        run: the training run.
        loss: nats a token of held-out targets under the users' own personas.
        saved_against_other: nats a token that the own persona saves against another user's.
        saved_against_live: nats a token saved against the plug that was live; null if there was none to compare with.
        metrics: the comparison behind the decision, as JSON.
        evaluation: the folder that jobs.evaluate wrote.
        reason: why it has this stage, for people.
        decided_at: when it got this stage.
        live_since: when it last became live; null if it never was.
    """

    version: int
    stage: Stage
    uri: str
    fingerprint: str
    run: str
    loss: float
    saved_against_other: float
    saved_against_live: float | None
    metrics: str
    evaluation: str
    reason: str
    decided_at: datetime
    live_since: datetime | None


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The versions of a store, by number. It is never changed: `promoted`, `refused` and `rolled_back` make new ones.

    Attributes:
        store: for messages.
    """

    store: str
    versions: Sequence[PlugVersion] = ()

    @property
    def live(self) -> PlugVersion | None:
        """The live version, if there is one."""
        return next((one for one in self.versions if one.stage == "live"), None)

    def of(self, fingerprint: str) -> PlugVersion | None:
        """The version of this plug, if it was proposed before."""
        return next((one for one in self.versions if one.fingerprint == fingerprint), None)

    def require_live(self) -> PlugVersion:
        """The live version. Raises InputError when there is none."""
        if self.live is None:
            raise InputError(
                f"--plug {LIVE}: the store {self.store} has no live plug yet; promote one with python -m jobs.plugs "
                f"promote --store {self.store} --plug FOLDER --evaluation FOLDER, or give --plug a folder"
            )
        return self.live

    def promoted(self, proposed: PlugVersion) -> "Registry":
        """The registry with `proposed` live, and the one that was live retired."""
        now, number = proposed.decided_at, self._number_of(proposed)
        new = replace(proposed, version=number, stage="live", live_since=now)
        return self._with([*self._out_of_use("retired", f"version {number} was promoted", now), new])

    def refused(self, proposed: PlugVersion) -> "Registry":
        """The registry with `proposed` refused; one that was live before keeps its stage, so that one can go back."""
        before = self.of(proposed.fingerprint)
        if before is not None and before.live_since is not None:
            return self
        return self._with([replace(proposed, version=self._number_of(proposed), stage="refused")])

    def rolled_back(self) -> "Registry":
        """The registry with the plug that was live before. Raises InputError when none was."""
        live = self.require_live()
        earlier = [one for one in self.versions if one.stage == "retired"]
        if not earlier:
            raise InputError(
                f"the store {self.store} has no plug that was live before version {live.version}; train and promote "
                "another one, or give the jobs a folder as --plug"
            )
        now = datetime.now(UTC)
        last = max(earlier, key=lambda one: (one.live_since, one.version))
        reason = f"back from version {live.version}"
        back = replace(last, stage="live", reason=reason, decided_at=now, live_since=now)
        return self._with([back, *self._out_of_use("rolled_back", f"back to version {last.version}", now)])

    def _out_of_use(self, stage: Stage, reason: str, now: datetime) -> list[PlugVersion]:
        live = [one for one in self.versions if one.stage == "live"]
        return [replace(one, stage=stage, reason=reason, decided_at=now) for one in live]

    def _number_of(self, proposed: PlugVersion) -> int:
        before = self.of(proposed.fingerprint)
        return before.version if before else 1 + max((one.version for one in self.versions), default=0)

    def _with(self, changed: Sequence[PlugVersion]) -> "Registry":
        by_number = {one.version: one for one in (*self.versions, *changed)}
        return replace(self, versions=[by_number[number] for number in sorted(by_number)])


def read(store: Store) -> Registry:
    """The registry of a store, as of now; empty for a store that was made before there was one."""
    table = Table.find(join(store.uri, NAME), NAME)
    rows = [] if table is None else [row for file in table.files() for row in table.read_file(file).to_pylist()]
    versions = sorted((PlugVersion(**row) for row in rows), key=lambda one: one.version)
    return Registry(store=store.uri, versions=versions)


def create(store: Store) -> None:
    """Create the table in a store that was made before there was one."""
    Table.create(join(store.uri, NAME), NAME, {})


def write(writer: Writer, before: Registry, after: Registry) -> None:
    """Replace the rows `before` by those `after`, in one commit; a stage without a change keeps its file."""
    stages = [stage for stage in get_args(Stage) if _rows(before, stage) != _rows(after, stage)]
    if not stages:
        return
    removed = writer.table.files(stages)
    tables = [pa.Table.from_pylist(rows, LAYOUTS[NAME].schema) for stage in stages if (rows := _rows(after, stage))]
    writer.exchange([(file, None) for file in removed], [writer.table.write_file(rows) for rows in tables])


def check_unchanged(live: PlugVersion, fingerprint: str) -> None:
    """Raises PlugMismatch when the folder of the live plug has a plug with another fingerprint."""
    if fingerprint != live.fingerprint:
        raise PlugMismatch(
            f"--plug {LIVE}: version {live.version} was promoted as {live.fingerprint[:12]}, but {live.uri} now has "
            f"{fingerprint[:12]}; put it back, or go back to the one before with python -m jobs.plugs rollback"
        )


def _rows(registry: Registry, stage: Stage) -> list[dict[str, object]]:
    return [asdict(one) for one in registry.versions if one.stage == stage]


def find(given: str, store: Store | None) -> PlugVersion | None:
    """The version that `given` means in place of a folder; None for a folder.

    Raises:
        UsageError: it means the live plug, and there is no store yet.
        InputError: it means the live plug, and the store has none.
    """
    if given != LIVE:
        return None
    if store is None:
        raise UsageError(f"--plug {LIVE}: there is no store yet, so no plug is live in it; give the plug's folder")
    return read(store).require_live()
