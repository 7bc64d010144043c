"""The tables of `tests.benchmarks.ceiling`: losses in nats per token with intervals over users, paired where compared.

Shapes: R requests in the order of their ids, U users.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from persona.evaluation.intervals import Floats, Interval, bootstrap, interval_of
from persona.evaluation.ranking import outcomes

Record = Mapping[str, Any]
BASELINE = "tokens"
CONTROLS = {"tokens": "tuning", "prefix": "prefix-tuning"}


def show(records: Sequence[Record]) -> None:
    """Print all tables of results that have the same requests; the first plug of soft tokens is the baseline."""
    plugs = [record for record in records if "losses" in record]
    print("\n| plug | own | none | another author |\n|---|---|---|---|")
    for record in plugs:
        print(_row(label(record), *(_loss(record, name) for name in ("own", "none", "other"))))
    print("\n| plug | told the title | near |\n|---|---|---|")
    for record in plugs:
        if "title" in record["losses"]:
            print(_row(label(record), *(_loss(record, name) for name in ("title", "near"))))
    baseline = next((record for record in plugs if record["plug"] == BASELINE), None)
    print(
        f"\n| plug | own minus another author | times that of `{BASELINE}` | own minus own of `{BASELINE}` | own minus "
        "its control |\n|---|---|---|---|---|"
    )
    for record in plugs:
        if "own" in record["losses"]:
            print(_row(label(record), *_comparisons(record, baseline, _control(record, plugs))))
    print("\n| which of two titles | method | right |\n|---|---|---|")
    for record in records:
        for method, share in _rankings(record):
            print(_row(label(record), method, f"{_share(share)}"))


def label(record: Record) -> str:
    """What a row is called."""
    rate = f", rate {record['rate']:g}" if "rate" in record else ""
    return f"{record['plug']}, vectors {record['width']} wide{rate}"


def minus(one: tuple[Record, str], other: tuple[Record, str]) -> Interval:
    """The loss of a plug under one kind of persona minus that of the same requests under another, or another plug."""
    a, b = (_nats(record, name) for record, name in (one, other))
    return bootstrap(a - b, one[0]["losses"]["user_id"], weights=one[0]["losses"]["tokens"])


def times(record: Record, baseline: Record) -> Interval:
    """How many times as far own is ahead of another author as with the baseline."""
    _, user_of_R = np.unique(record["losses"]["user_id"], return_inverse=True)
    ahead_U, baseline_U = (
        np.bincount(user_of_R, weights=_nats(one, "other") - _nats(one, "own")) for one in (record, baseline)
    )

    def ratio(drawn_U: np.ndarray) -> float:
        return float(ahead_U[drawn_U].sum() / baseline_U[drawn_U].sum())

    return interval_of(ratio, len(ahead_U))


def _comparisons(record: Record, baseline: Record | None, control: Record | None) -> Iterator[str]:
    yield _signed(minus((record, "own"), (record, "other")))
    if baseline is None or baseline is record:
        yield from ("", "")
    else:
        found = times(record, baseline)
        yield f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"
        yield _signed(minus((record, "own"), (baseline, "own")))
    yield "" if control is None else _signed(minus((record, "own"), (control, "none")))


def _control(record: Record, plugs: Sequence[Record]) -> Record | None:
    """The plug without histories that a plug is compared with; it reads no vectors, so any encoder's will do."""
    name = CONTROLS.get(record["plug"])
    return next((one for one in plugs if one["plug"] == name and one.get("rate") == record.get("rate")), None)


def _rankings(record: Record) -> Iterator[tuple[str, Interval]]:
    if "ranking" in record:
        for method, share in record["ranking"].items():
            yield f"similarity, {method}", Interval(**share)
    losses = record.get("losses", {})
    if "rejected_own" in losses:
        nats = {name: (_nats(record, name), _nats(record, f"rejected_{name}")) for name in ("own", "none")}
        yield "gain over none", bootstrap(outcomes(nats)["own"]["calibrated"], losses["user_id"])


def _nats(record: Record, name: str) -> Floats:
    return np.array(record["losses"][name], dtype=np.float64)


def _loss(record: Record, name: str) -> str:
    losses = record["losses"]
    if name not in losses:
        return ""
    found = bootstrap(losses[name], losses["user_id"], weights=losses["tokens"])
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _signed(found: Interval) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]".replace("-", "−")


def _share(found: Interval) -> str:
    return f"{found.mean:.1%} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
