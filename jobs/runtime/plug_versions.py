"""The other plugs of a store, with the evaluations that they were promoted or refused with, beside a new evaluation."""

import json
from typing import TYPE_CHECKING, Any

from jobs.runtime import cli
from jobs.runtime.plugs import PlugRef

if TYPE_CHECKING:
    from persona.evaluation.plug_versions import Version
    from persona.store.registry import PlugVersion
    from persona.store.store import Store


def compared(
    store: "Store", plug: PlugRef, metrics: dict[str, Any], losses: bytes, *, seed: int
) -> dict[str, Any] | None:
    """The part `plug_versions` of `metrics.json`: a new evaluation of `plug` beside those of the store's other plugs.

    None if the store has no other plug with a usable evaluation.
    """
    from persona.evaluation.plug_versions import Version, over_time
    from persona.evaluation.saved_run import Evaluation
    from persona.store import registry

    known = registry.read(store)
    others = [one for one in known.versions if one.fingerprint != plug.fingerprint]
    if not others:
        return None
    mine = known.of(plug.fingerprint)
    newest = Version(
        number=mine.version if mine else None,
        stage=mine.stage if mine else "this one",
        since=f"{mine.decided_at:%Y-%m-%d}" if mine else "",
        fingerprint=plug.fingerprint,
        evaluation=Evaluation.read("this one", json.dumps(cli.plain(metrics)).encode(), losses, source="this one"),
    )
    versions = [version for one in others if (version := _version(one)) is not None]
    return over_time(versions, newest, seed=seed)


def _version(one: "PlugVersion") -> "Version | None":
    """A plug with its evaluation; None if that is gone, or of an older format."""
    from persona import storage
    from persona.errors import InputError
    from persona.evaluation.plug_versions import Version
    from persona.evaluation.saved_run import LOSSES, METRICS, Evaluation

    uris = [storage.join(one.evaluation, name) for name in (METRICS, LOSSES)]
    if not all(storage.exists(uri) for uri in uris):
        return None
    try:
        found = Evaluation.read(str(one.version), *map(storage.read_bytes, uris), source=one.evaluation)
    except InputError:
        return None
    if found.metrics["settings"]["plug_fingerprint"] != one.fingerprint:
        return None  # another evaluation has replaced it
    return Version(
        number=one.version,
        stage=one.stage,
        since=f"{one.decided_at:%Y-%m-%d}",
        fingerprint=one.fingerprint,
        evaluation=found,
    )
