"""Brings the `personas` table up to date: a row a user and plug, from all the user's vectors, without a request.

Who has to be made anew is read off the tables themselves (how many behaviors a user has, and when the latest was
encoded), so it does not matter when, or how, an earlier run has ended.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.runtime import exchange
from jobs.runtime.commits import Committer
from jobs.runtime.tally import Tally

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.store.identity import Identity
    from persona.store.store import Store
    from persona.store.writer import Writer

_USERS_TOGETHER = 1024


@dataclass(frozen=True, kw_only=True)
class PlugSource:
    """A plug that fits the encoder: where it lies, and its fingerprint."""

    uri: str
    fingerprint: str


def check_plug(given: str, identity: "Identity") -> PlugSource:
    """Finds the plug of `--plug`. Raises PlugMismatch when it was trained on another encoder's vectors."""
    from persona import storage
    from persona.errors import PlugMismatch
    from persona.plug import record as plug_record

    uri = storage.check_uri(given, flag="--plug")
    storage.check_reachable(uri, flag="--plug")
    with storage.local_folder(uri) as folder:
        record = plug_record.read(folder)
        fingerprint = plug_record.fingerprint(folder)
    if record.encoder["fingerprint"] != identity.fingerprint:
        raise PlugMismatch(
            f"--plug {given} was trained on vectors of {record.encoder['name']!r}, and --encoder is "
            f"{identity.encoder!r}; give the plug of this encoder, or train one"
        )
    return PlugSource(uri=uri, fingerprint=fingerprint)


def update(store: "Store", writer: "Writer", plug: PlugSource, tally: Tally) -> None:
    """Makes the personas of all users who need one, bucket by bucket, and takes out those of users who are gone."""
    store = store.snapshot("behaviors", "personas")
    work = [{"bucket": bucket} for bucket in sorted({*store.buckets(), *store.persona_buckets()})]
    with Committer(writer, tally, stage="personas") as committer:
        for staged in exchange.each(work, _make, store=store, plug=plug):
            committer.take(staged)


def _make(batch: "pa.Table", *, store: "Store", plug: PlugSource) -> Iterator["pa.Table"]:
    """The personas of one bucket, staged."""
    from persona.plug import record as plug_record
    from persona.plug.user_personas import UserPersonas
    from persona.store.writer import staged_files

    model = None
    for bucket in batch["bucket"].to_pylist():
        work = store.personas_to_make(bucket, plug.fingerprint)
        for start in range(0, work.num_rows, _USERS_TOGETHER):
            part = work.slice(start, _USERS_TOGETHER)
            if model is None:
                with plug_record.local_plug(plug.uri, plug.fingerprint) as folder:
                    model = UserPersonas.load(folder)
            users = part["user_id"].to_pylist()
            rows = model.make(part, store.read_histories(bucket, users))
            yield store.stage("personas", rows)
    if model is None:
        yield staged_files([])
