"""Bring the `personas` table up to date: a row per user and plug, computed from all of the user's vectors.

Which rows are out of date follows from the tables alone (the number of a user's behaviors, and when the latest one was
encoded), so it does not matter how earlier runs ended.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.runtime import exchange
from jobs.runtime.commits import Committer
from jobs.runtime.plugs import PlugRef, check_vectors, read_plug
from jobs.runtime.tally import Tally
from persona.errors import PlugMismatch

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.store.identity import Identity
    from persona.store.store import Store
    from persona.store.writer import Writer

_USERS_TOGETHER = 1024


def find_plug(given: str, identity: "Identity", store: "Store | None") -> PlugRef:
    """The plug of `--plug`. Raises PlugMismatch if it was trained on another encoder's vectors."""
    plug = read_plug(given, store=store)
    if plug.record.encoder["fingerprint"] != identity.fingerprint:
        raise PlugMismatch(
            f"--plug {given} was trained on vectors of {plug.record.encoder['name']!r}, but --encoder is "
            f"{identity.encoder!r}; give a plug of this encoder, or train one"
        )
    check_vectors(plug, identity)
    return plug


def update(store: "Store", writer: "Writer", plug: PlugRef, tally: Tally) -> None:
    """Write the personas that are missing or out of date, and delete those of users who have no behaviors any more."""
    store = store.snapshot("behaviors", "personas")
    buckets = [{"bucket": bucket} for bucket in sorted({*store.buckets(), *store.persona_buckets()})]
    with Committer(writer, tally, stage="personas") as committer:
        for staged in exchange.each(buckets, _make, store=store, plug=plug):
            committer.take(staged)


def _make(batch: "pa.Table", *, store: "Store", plug: PlugRef) -> Iterator["pa.Table"]:
    """Stage the personas of one bucket."""
    from persona.plug.user_personas import UserPersonas
    from persona.store.writer import staged_files

    model = None
    for bucket in batch["bucket"].to_pylist():
        changes = store.personas_to_make(bucket, plug.fingerprint)
        for start in range(0, changes.num_rows, _USERS_TOGETHER):
            part = changes.slice(start, _USERS_TOGETHER)
            if model is None:
                with plug.folder() as folder:
                    model = UserPersonas.load(folder)
            users = part["user_id"].to_pylist()
            rows = model.make(part, store.read_histories(bucket, users))
            yield store.stage("personas", rows)
    if model is None:
        yield staged_files([])
