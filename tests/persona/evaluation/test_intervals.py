"""Bootstrap intervals on cases small enough to work out by hand."""

import math

import numpy as np
import pytest

from persona.evaluation.intervals import bootstrap, paired_bootstrap


def test_bootstrap_of_two_users_spans_both() -> None:
    # samples of two users have the mean 0, 1/2 or 1
    interval = bootstrap([0.0, 1.0], ["u", "v"])
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.0, 1.0)


def test_bootstrap_resamples_users_not_requests() -> None:
    values = [0.0] * 100 + [1.0] * 100
    same_user = bootstrap(values, ["u"] * 100 + ["v"] * 100)
    assert (same_user.low, same_user.high) == (0.0, 1.0)
    own_users = bootstrap(values, [str(position) for position in range(200)])
    assert 0.4 < own_users.low < own_users.high < 0.6


def test_bootstrap_interval_is_that_of_the_normal_distribution_for_many_users() -> None:
    values = np.random.default_rng(5).normal(size=4000)
    interval = bootstrap(values, [str(position) for position in range(4000)])
    half = 1.96 * values.std() / math.sqrt(4000)
    # 2000 samples place a 2.5 % quantile to about 3 % of the half width; allow three times that
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_weights_make_the_mean_a_ratio_of_sums() -> None:
    interval = bootstrap([10.0, 2.0, 3.0], ["u", "u", "v"], weights=[4, 1, 5])
    assert interval.mean == 15 / 10
    assert (interval.low, interval.high) == (3 / 5, 12 / 5)


def test_a_single_user_gives_no_interval() -> None:
    interval = bootstrap([1.0, 2.0], ["u", "u"])
    assert interval.mean == 1.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_pairing_cancels_the_difficulty_of_a_user() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.normal(scale=10, size=300)
    users = [str(position // 3) for position in range(300)]
    difference = paired_bootstrap(difficulty + 0.5, difficulty, users)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5))


def test_paired_losses_are_weighted_by_tokens_and_swap_sign() -> None:
    a, b, users, tokens = [4.0, 9.0, 1.0], [5.0, 6.0, 2.0], ["u", "v", "w"], [2, 3, 1]
    forth = paired_bootstrap(a, b, users, weights=tokens, seed=7)
    back = paired_bootstrap(b, a, users, weights=tokens, seed=7)
    assert forth.mean == pytest.approx((14 - 13) / 6)
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low))


def test_the_same_seed_gives_the_same_interval() -> None:
    values, users = np.arange(50.0), [str(position) for position in range(50)]
    assert bootstrap(values, users, seed=1) == bootstrap(values, users, seed=1)
    assert bootstrap(values, users, seed=1) != bootstrap(values, users, seed=2)


@pytest.mark.parametrize(
    ("values", "users", "weights", "message"),
    [
        ([], [], None, "at least one request"),
        ([1.0], ["u", "v"], None, "one user a request"),
        ([1.0, 2.0], ["u", "v"], [1.0], "one weight"),
        ([1.0, math.nan], ["u", "v"], None, "finite"),
        ([1.0, 2.0], ["u", "v"], [1.0, 0.0], "above 0"),
    ],
)
def test_bootstrap_refuses_values_without_a_mean(
    values: list[float], users: list[str], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(values, users, weights=weights)


def test_a_pair_needs_the_same_requests() -> None:
    with pytest.raises(ValueError, match="same requests"):
        paired_bootstrap([1.0], [1.0, 2.0], ["u", "v"])
