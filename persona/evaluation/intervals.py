"""Bootstrap intervals: how far a number would move with another sample of users.

Shapes: R requests, U users, S bootstrap samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

SAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the central `LEVEL` of its bootstrap distribution; with a single user the bounds are NaN."""

    mean: float
    low: float
    high: float

    def rounded(self) -> dict[str, float]:
        """The three values to five decimals, for JSON."""
        return {name: round(value, 5) for name, value in asdict(self).items()}


def bootstrap(
    values: ArrayLike,
    users: Sequence[str],
    *,
    weights: ArrayLike | None = None,
    n: int = SAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of `values` (R,) and its interval over users; with `weights` (R,) the mean is a ratio of sums.

    Requests of one user resemble each other, so drawing requests instead of users would give too narrow an interval.
    For a loss in nats a token, values are summed nats and weights are tokens.

    Raises `ValueError` for unequal lengths, no requests, values that are not finite, or weights that are not positive.
    """
    values_R = np.asarray(values, dtype=np.float64)
    weights_R = np.ones_like(values_R) if weights is None else np.asarray(weights, dtype=np.float64)
    if not values_R.shape == weights_R.shape == (len(users),) or not len(users):
        raise ValueError(
            f"expected one value, one weight and one user a request, and at least one request: got values "
            f"{values_R.shape}, weights {weights_R.shape}, users ({len(users)},)"
        )
    if not (np.isfinite(values_R).all() and np.isfinite(weights_R).all() and (weights_R > 0).all()):
        raise ValueError("values must be finite, weights finite and above 0")
    _, user_of_R = np.unique(np.asarray(users), return_inverse=True)
    values_U = np.bincount(user_of_R, weights=values_R)
    weights_U = np.bincount(user_of_R, weights=weights_R)

    def mean(drawn_U: NDArray[np.intp]) -> float:
        return float(values_U[drawn_U].sum() / weights_U[drawn_U].sum())

    return interval_of(mean, len(values_U), n=n, seed=seed)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    users: Sequence[str],
    *,
    weights: ArrayLike | None = None,
    n: int = SAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of `a` − `b` on the same requests: a user who is hard for both does not widen the interval.

    Shapes, weights and errors are those of `bootstrap`.
    """
    a_R, b_R = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_R.shape != b_R.shape:
        raise ValueError(f"a pair needs the same requests on both sides: got {a_R.shape} and {b_R.shape}")
    return bootstrap(a_R - b_R, users, weights=weights, n=n, seed=seed)


def interval_of(
    statistic: Callable[[NDArray[np.intp]], float], n_users: int, *, n: int = SAMPLES, seed: int = 0
) -> Interval:
    """A `statistic` of user indices: its value for all users, with the interval over `n` samples with replacement."""
    mean = statistic(np.arange(n_users))
    if n_users == 1:
        return Interval(mean=mean, low=float("nan"), high=float("nan"))
    rng = np.random.default_rng(seed)
    # One sample at a time: all at once would take memory for samples × users.
    values_S = np.array([statistic(rng.integers(n_users, size=n_users)) for _ in range(n)])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values_S, [tail, 1 - tail])
    return Interval(mean=mean, low=float(low), high=float(high))
