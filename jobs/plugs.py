"""List, promote or roll back the plugs of a store: `persona-plug plugs promote --store URI ...`, or another action.

list: print the versions that were proposed, and which of them is live.

promote: make `--plug` the live plug, if `--evaluation` (the `--out` of jobs.evaluate on held-out users) shows that it
is better: the users' own personas save nats against other users' personas and against the live plug, each beyond its
95 % interval. Exit code 4 if it does not; the live plug then stays.

rollback: go back to the plug that was live before.

generate, evaluate and embed use the live plug when they are given `--plug live`. Needs neither Ray nor a model.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, ClassVar, Literal

from jobs.runtime import cli, log
from jobs.runtime.cli import Summary
from jobs.runtime.plugs import PlugRef, check_store, read_plug
from persona.errors import InputError, UsageError

if TYPE_CHECKING:
    from persona.evaluation.gate import Verdict
    from persona.evaluation.saved_run import Evaluation
    from persona.store.registry import PlugVersion, Registry
    from persona.store.store import Store

REFUSED = 4
"""Exit code of a plug that is not promoted: a final verdict, so schedulers should not try again."""
_FOR_PROMOTE = ("plug", "evaluation", "live_evaluation", "allow_incomparable", "allow_rolled_back", "seed")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of jobs.plugs."""

    FIRST_ARGUMENT: ClassVar[str] = "action"

    action: Literal["list", "promote", "rollback"]
    """What to do; may also be given first, without the flag."""
    store: str
    """Folder of the tables made by jobs.embed, local or s3://; the plugs are those of its encoder."""
    plug: str | None = None
    """With promote: folder of the plug made by jobs.train; it must stay as it is while it may become live."""
    evaluation: str | None = None
    """With promote: folder that jobs.evaluate wrote for this plug, on users who were not in its training."""
    live_evaluation: str | None = None
    """With promote: evaluation of the live plug on the same requests; default the one it was promoted with."""
    allow_incomparable: bool = False
    """With promote: also replace a live plug that cannot be compared, because its LLM or all requests are others."""
    allow_rolled_back: bool = False
    """With promote: also accept a plug that was rolled back."""
    seed: int = 0
    """With promote: seed of the bootstrap behind the intervals."""
    dry_run: bool = False
    """Print what would be decided, and change nothing."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        if self.action != "promote":
            for name in _FOR_PROMOTE:
                if getattr(self, name) != getattr(Config, name):
                    raise UsageError(f"--{name.replace('_', '-')} goes with promote, not with {self.action}")
        elif self.plug is None or self.evaluation is None:
            raise UsageError("promote needs --plug, a folder, and --evaluation, what jobs.evaluate wrote of that plug")


def main(config: Config) -> Summary:
    """Runs the job."""
    from persona import storage
    from persona.store.store import Store

    started = time.perf_counter()
    target = storage.check_uri(config.store, flag="--store")
    changes = config.action != "list" and not config.dry_run
    storage.check_reachable(target, flag="--store", write=changes)
    store = Store.open(target)
    action = {"list": _list, "promote": _promote, "rollback": _rollback}[config.action]
    outcome = action(config, store)
    result = {
        "job": "plugs",
        "action": config.action,
        "store": store.uri,
        "dry_run": config.dry_run,
        **outcome.result,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return Summary(table=[("store", store.label), *outcome.table], result=result, exit_code=outcome.exit_code)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an action found or did: rows for people, fields for programs."""

    table: Sequence[Sequence[str]]
    result: Mapping[str, object]
    exit_code: int = 0


def _list(_config: Config, store: "Store") -> Outcome:
    from persona.store import registry

    found = registry.read(store)
    return Outcome(table=_listed(found), result={"plugs": [_facts(one) for one in found.versions]})


def _rollback(config: Config, store: "Store") -> Outcome:
    from persona.store import registry

    if config.dry_run:
        before, after = (found := registry.read(store)), found.rolled_back()
    else:
        with store.writer(registry.NAME, job="jobs.plugs") as writer:
            before = registry.read(store)
            after = before.rolled_back()
            registry.write(writer, before, after)
    old, new = before.require_live(), after.require_live()
    table = [("live", _named(new)), ("rolled back", _named(old))]
    return Outcome(table=table, result={"live": _facts(new), "rolled_back": _facts(old)})


def _promote(config: Config, store: "Store") -> Outcome:
    from persona.store import registry

    assert config.plug is not None
    plug = read_plug(config.plug)
    check_store(plug, store.identity)
    if config.dry_run:
        return _decide(config, plug, registry.read(store))[1]
    registry.create(store)
    # The lease is held while the plugs are compared, so that none can become live meanwhile.
    with store.writer(registry.NAME, job="jobs.plugs") as writer:
        before = registry.read(store)
        after, outcome = _decide(config, plug, before)
        registry.write(writer, before, after)
    return outcome


def _decide(config: Config, plug: PlugRef, before: "Registry") -> "tuple[Registry, Outcome]":
    """The registry after the verdict, and what to say about it."""
    live = before.live
    if live is not None and live.fingerprint == plug.fingerprint:
        return before, Outcome(
            table=[("live", f"{_named(live)}, as before")], result={"promoted": False, "live": _facts(live)}
        )
    known = before.of(plug.fingerprint)
    if known is not None and known.stage == "rolled_back" and not config.allow_rolled_back:
        reason = f"version {known.version} was rolled back on {known.decided_at:%Y-%m-%d}; add --allow-rolled-back"
        return before, _outcome_of_refusal(f"{plug.uri}: {reason}", before, {})
    verdict, note = _judge(config, plug, live)
    reasons = [f"{check} is not beyond the interval" for check in verdict.failed]
    proposed = _proposed(config, plug, verdict, "; ".join(reasons) or note)
    table = [(f"against {check.against}", str(check)) for check in (verdict.other, verdict.live) if check is not None]
    if reasons:
        after = before.refused(proposed)
        return after, _outcome_of_refusal(f"{plug.uri}: {proposed.reason}", after, verdict.facts(), table)
    after = before.promoted(proposed)
    new = after.require_live()
    rows = [("live", _named(new)), ("before", "none" if live is None else _named(live)), *table, ("because", note)]
    return after, Outcome(table=rows, result={"promoted": True, "live": _facts(new), **verdict.facts()})


def _outcome_of_refusal(
    reason: str, after: "Registry", facts: Mapping[str, object], table: Sequence[tuple[str, str]] = ()
) -> Outcome:
    live = after.live
    stays = "none" if live is None else f"{_named(live)}, as before"
    log.say(f"not promoted: {reason}", level="error")
    result = {"promoted": False, "reason": reason, "live": None if live is None else _facts(live), **facts}
    return Outcome(table=[("refused", reason), ("live", stays), *table], result=result, exit_code=REFUSED)


def _judge(config: Config, plug: PlugRef, live: "PlugVersion | None") -> "tuple[Verdict, str]":
    """The verdict, and what it rests on."""
    from persona.evaluation.gate import judge

    assert config.evaluation is not None
    mine = _evaluation(config.evaluation, plug.fingerprint, flag="--evaluation")
    if live is None:
        return judge(mine, None, seed=config.seed), "no plug was live before; ahead of another user's persona"
    try:
        given = config.live_evaluation or live.evaluation
        theirs = _evaluation(given, live.fingerprint, flag="--live-evaluation")
        return judge(mine, theirs, seed=config.seed), "ahead of another user's persona and of the live plug"
    except InputError as error:
        if not config.allow_incomparable:
            raise InputError(
                f"the live plug, version {live.version}, cannot be compared: {error}. Evaluate it on the same requests "
                "(jobs.evaluate --plug live) and give that folder as --live-evaluation, or add --allow-incomparable"
            ) from error
    return judge(mine, None, seed=config.seed), "ahead of another user's persona; not comparable with the live plug"


def _evaluation(given: str, fingerprint: str, *, flag: str) -> "Evaluation":
    """An evaluation of the plug with this fingerprint."""
    from persona import storage
    from persona.evaluation.saved_run import LOSSES, METRICS, Evaluation

    folder = storage.check_uri(given, flag=flag)
    if not all(storage.exists(storage.join(folder, name)) for name in (METRICS, LOSSES)):
        raise InputError(f"{flag} {folder}: has no {METRICS} and {LOSSES} of jobs.evaluate")
    metrics, losses = (storage.read_bytes(storage.join(folder, name)) for name in (METRICS, LOSSES))
    found = Evaluation.read(folder, metrics, losses, source=f"{flag} {folder}")
    measured = found.metrics["settings"]["plug_fingerprint"]
    if measured != fingerprint:
        raise InputError(
            f"{flag} {folder}: is of the plug {measured[:12]}, not of {fingerprint[:12]}; evaluate the plug again"
        )
    return found


def _proposed(config: Config, plug: PlugRef, verdict: "Verdict", reason: str) -> "PlugVersion":
    from persona import storage
    from persona.store.registry import PlugVersion

    assert config.evaluation is not None
    return PlugVersion(
        version=0,
        stage="refused",
        uri=plug.uri,
        fingerprint=plug.fingerprint,
        run=str(plug.record.training.get("run", "")),
        loss=verdict.loss.mean,
        saved_against_other=verdict.other.saved.mean,
        saved_against_live=None if verdict.live is None else verdict.live.saved.mean,
        metrics=json.dumps(cli.plain(verdict.facts())),
        evaluation=storage.check_uri(config.evaluation, flag="--evaluation"),
        reason=reason,
        decided_at=datetime.now(UTC),
        live_since=None,
    )


def _listed(found: "Registry") -> list[Sequence[str]]:
    heads = ("version", "stage", "loss", "against other", "against live", "decided", "run", "plug")
    rows = [
        (
            str(one.version),
            one.stage,
            f"{one.loss:.4f}",
            f"{one.saved_against_other:+.4f}",
            "–" if one.saved_against_live is None else f"{one.saved_against_live:+.4f}",
            f"{one.decided_at:%Y-%m-%d %H:%M}",
            one.run,
            f"{one.uri} ({one.fingerprint[:12]})",
        )
        for one in found.versions
    ]
    return [heads, *rows] if rows else [("plugs", "none")]


def _named(one: "PlugVersion") -> str:
    return f"version {one.version}, {one.uri} ({one.fingerprint[:12]})"


def _facts(one: "PlugVersion") -> dict[str, object]:
    since = None if one.live_since is None else one.live_since.isoformat(timespec="seconds")
    times = {"decided_at": one.decided_at.isoformat(timespec="seconds"), "live_since": since}
    return {**asdict(one), "metrics": json.loads(one.metrics), **times}


if __name__ == "__main__":
    sys.exit(cli.run(Config, main))
