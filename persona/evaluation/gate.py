"""The gate: whether the evaluations of two plugs show that one of them should replace the other.

A plug passes when the users' own personas save nats against other users' personas, and against the live plug, each by
more than the interval over held-out users. Differences are paired by request.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from persona.errors import InputError
from persona.evaluation.intervals import Interval, bootstrap, paired_bootstrap
from persona.evaluation.saved_run import Evaluation

OWN, OTHER = "own", "other"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison: what the own persona of the plug saves against `against`, in nats a token; positive is better."""

    against: str
    saved: Interval
    requests: int
    users: int

    @property
    def holds(self) -> bool:
        """Whether the saving is beyond its interval. It never is with a single user, who gives no interval."""
        return self.saved.low > 0

    def __str__(self) -> str:
        found = f"{self.saved.mean:+.4f} nats a token [{self.saved.low:+.4f}, {self.saved.high:+.4f}]"
        return f"saves {found} against {self.against}, {self.requests:,} requests of {self.users:,} users"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The comparison behind a decision: the loss under the own persona, and what it saves.

    Attributes:
        other: against another user's persona.
        live: against the live plug; None if there is none to compare with.
    """

    loss: Interval
    other: Check
    live: Check | None

    @property
    def failed(self) -> list[Check]:
        """The comparisons that do not hold."""
        return [check for check in (self.other, self.live) if check is not None and not check.holds]

    def facts(self) -> dict[str, Any]:
        """The verdict as plain values for JSON."""
        return {
            "loss": self.loss.rounded(),
            "passed": not self.failed,
            "checks": [
                {**asdict(check), "saved": check.saved.rounded(), "holds": check.holds}
                for check in (self.other, self.live)
                if check is not None
            ],
        }


def judge(proposed: Evaluation, live: Evaluation | None, *, seed: int = 0) -> Verdict:
    """Compares a plug's evaluation within itself, and with that of the live plug on the requests that both have.

    Raises:
        InputError: one of them does not have what is compared, or they share no request with the same target tokens.
    """
    for one in (proposed, *([live] if live else [])):
        _check_usable(one)
    if OTHER not in proposed.losses:
        raise InputError(
            f"{proposed.name}: was evaluated without the persona {OTHER!r}, which shows that it is the user's own "
            "history that helps; evaluate again with --persona own other"
        )
    own, users = proposed.losses[OWN], proposed.requests["user_id"]
    nats_R, tokens_R = own["nats"].to_numpy(), own["tokens"].to_numpy()
    other_R = proposed.losses[OTHER]["nats"].to_numpy()
    return Verdict(
        loss=bootstrap(nats_R, users, weights=tokens_R, seed=seed),
        other=Check(
            against="another user's persona",
            saved=paired_bootstrap(other_R, nats_R, users, weights=tokens_R, seed=seed),
            requests=len(users),
            users=len(set(users)),
        ),
        live=None if live is None else _against(live, proposed, seed=seed),
    )


def _check_usable(one: Evaluation) -> None:
    if OWN not in one.losses:
        raise InputError(f"{one.name}: was evaluated without the persona {OWN!r}; evaluate again with --persona own")
    if one.metrics["limited"]:
        raise InputError(f"{one.name}: was evaluated with --limit, so it decides nothing; evaluate again without it")


def _against(live: Evaluation, proposed: Evaluation, *, seed: int) -> Check:
    rows = shared_rows([proposed, live])
    (mine, theirs), tokens = rows.nats, rows.tokens
    return Check(
        against="the live plug",
        saved=paired_bootstrap(theirs, mine, rows.users, weights=tokens, seed=seed),
        requests=len(rows.users),
        users=len(set(rows.users)),
    )


@dataclass(frozen=True, kw_only=True)
class SharedRows:
    """Requests that several evaluations have: user and target tokens of each, and nats under the own persona.

    Attributes:
        nats: one array (R,) for each evaluation.
    """

    users: Sequence[str]
    tokens: np.ndarray[Any, np.dtype[np.float64]]
    nats: Sequence[np.ndarray[Any, np.dtype[np.float64]]]


def shared_rows(evaluations: Sequence[Evaluation]) -> SharedRows:
    """The rows of the requests that all evaluations have, with the same number of target tokens in each.

    Raises InputError when there are none, or when the evaluations have different LLMs.
    """
    if len({one.metrics["settings"]["llm"]["fingerprint"] for one in evaluations}) > 1:
        raise InputError(
            f"{' and '.join(one.name for one in evaluations)}: the plugs have different LLMs, so their nats a token "
            "cannot be compared"
        )
    tables = [_own_rows(one) for one in evaluations]
    first = tables[0]
    shared = [
        key for key, (_, tokens) in first.items() if all(key in other and other[key][1] == tokens for other in tables)
    ]
    if not shared:
        names = " and ".join(one.name for one in evaluations)
        raise InputError(
            f"{names}: share no request with the same user and target, so their nats a token cannot be compared; "
            "evaluate both plugs on the same --requests"
        )
    return SharedRows(
        users=[user for user, _ in shared],
        tokens=np.array([first[key][1] for key in shared], dtype=np.float64),
        nats=[np.array([table[key][0] for key in shared], dtype=np.float64) for table in tables],
    )


def _own_rows(one: Evaluation) -> Mapping[tuple[str, str], tuple[float, int]]:
    """Nats and tokens by user and request."""
    columns = [one.losses[OWN][name].to_pylist() for name in ("user_id", "request_id", "nats", "tokens")]
    return {(user, request): (nats, tokens) for user, request, nats, tokens in zip(*columns, strict=True)}
