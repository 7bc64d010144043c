"""The scan against brute force, with a planted signal and with none."""

from itertools import chain, combinations

import numpy as np
import pytest

from persona.locating.runs import ScanOptions, chance_p, run, split, unit_frequency
from persona.locating.samples import Sample
from persona.locating.scan import Found, best_subset, p_values, scan, scores

SCORES = ("berk-jones", "higher-criticism")
FEW = np.array([0.1, 0.25, 0.5])


def subsets(n: int):
    return chain.from_iterable(combinations(range(n), size) for size in range(1, n + 1))


def score_of(p_ND: np.ndarray, threshold: float, score: str) -> float:
    """The score of all cells of an array, by its definition."""
    n_cells, n_low = p_ND.size, int((p_ND <= threshold).sum())
    share = n_low / n_cells
    if share <= threshold:
        return 0.0
    if score == "higher-criticism":
        return (n_low - n_cells * threshold) / np.sqrt(n_cells * threshold * (1 - threshold))
    rest = 0.0 if share == 1 else (1 - share) * np.log((1 - share) / (1 - threshold))
    return n_cells * (share * np.log(share / threshold) + rest)


@pytest.mark.parametrize("tails", ["upper", "lower", "both"])
def test_p_values_are_shares_of_the_background(tails):
    draw = np.random.default_rng(0)
    background = draw.integers(0, 6, (9, 4)).astype(np.float32)  # with ties
    values = draw.integers(-1, 7, (5, 4)).astype(np.float32)
    found = p_values(background, values, tails)
    for row, unit in np.ndindex(values.shape):
        upper = (1 + sum(background[:, unit] >= values[row, unit])) / 10
        lower = (1 + sum(background[:, unit] <= values[row, unit])) / 10
        expected = {"upper": upper, "lower": lower, "both": min(1, 2 * min(upper, lower))}[tails]
        assert found[row, unit] == pytest.approx(expected)


@pytest.mark.parametrize("tails", ["upper", "lower", "both"])
def test_without_a_signal_p_values_are_at_most_as_often_small_as_they_say(tails):
    draw = np.random.default_rng(1)
    found = np.concatenate(
        [p_values(draw.normal(size=(60, 1)), draw.normal(size=(1, 1)), tails).ravel() for _ in range(4000)]
    )
    for threshold in (0.05, 0.1, 0.3, 0.5):
        # Three standard deviations of a share of 4,000.
        assert (found <= threshold).mean() <= threshold + 3 * np.sqrt(threshold * (1 - threshold) / 4000)
        assert (found <= threshold).mean() >= threshold - 0.05  # and not much more rarely


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_of_the_definition(score):
    draw = np.random.default_rng(2)
    for _ in range(50):
        p_ND = draw.random((3, 4)) ** 2
        for threshold in FEW:
            found = scores(np.array([(p_ND <= threshold).sum()]), np.array([12.0]), np.array([threshold]), score)
            assert found[0] == pytest.approx(score_of(p_ND, threshold, score))


@pytest.mark.parametrize("score", SCORES)
def test_the_best_units_for_given_rows_are_those_of_brute_force(score):
    draw = np.random.default_rng(3)
    for _ in range(20):
        p_ND = draw.random((4, 7)) ** 1.5
        levels = np.searchsorted(FEW, p_ND, side="left")
        units, value, threshold = best_subset(levels, FEW, score)
        best = max(score_of(p_ND[:, list(some)], a, score) for some in subsets(7) for a in FEW)
        assert value == pytest.approx(best)
        assert value == pytest.approx(score_of(p_ND[:, units], threshold, score))


@pytest.mark.parametrize("score", SCORES)
def test_the_scan_finds_the_best_subset_of_small_arrays(score):
    draw = np.random.default_rng(4)
    n_best = 0
    for seed in range(10):
        p_ND = draw.random((5, 6))
        p_ND[:2, :3] **= 4
        found = scan(p_ND, score=score, restarts=20, seed=seed, thresholds=FEW)
        best = max(
            score_of(p_ND[np.ix_(rows, units)], a, score) for rows in subsets(5) for units in subsets(6) for a in FEW
        )
        of_found = score_of(p_ND[np.ix_(found.rows, found.units)], found.threshold, score)
        assert found.score == pytest.approx(of_found)
        assert found.score <= best + 1e-9
        n_best += found.score == pytest.approx(best)
    assert n_best >= 9  # an ascent may end at a local maximum


def test_a_scan_of_nothing_unusual_finds_nothing():
    found = scan(np.ones((4, 5)), score="berk-jones", restarts=2, seed=0)
    assert (found.score, len(found.rows), len(found.units)) == (0.0, 0, 0)
    assert isinstance(found, Found)


def planted(shift: float, n_units: int = 40, seed: int = 0) -> Sample:
    """Sixty rows of each label; the label moves units 0 to 9, half of them up and half of them down."""
    draw = np.random.default_rng(seed)
    hidden = draw.normal(size=(120, n_units)).astype(np.float32)
    labels = np.arange(120) % 2 == 1
    hidden[np.ix_(labels, range(5))] += shift
    hidden[np.ix_(labels, range(5, 10))] -= shift
    return Sample(hidden_ND=hidden, labels_N=labels, blocks_N=np.arange(120))


@pytest.mark.parametrize(("tails", "expected"), [("both", 10), ("upper", 5), ("lower", 5)])
def test_a_planted_signal_is_found_in_its_rows_and_units(tails, expected):
    options = ScanOptions(score="berk-jones", tails=tails, restarts=3, seed=0)
    runs = [run(planted(2.5), number, options) for number in range(10)]
    frequency = unit_frequency([one.units for one in runs], 40)
    frequent = set(np.flatnonzero(frequency >= 0.5).tolist())
    assert frequent == set(range(5, 10) if tails == "lower" else range(expected))
    assert np.mean([one.precision for one in runs]) > 0.9
    assert np.mean([one.recall for one in runs]) > 0.9
    assert chance_p([one.score for one in runs], [one.score_shuffled for one in runs]) == pytest.approx(1 / 11)


def test_the_same_run_finds_the_same_and_other_runs_draw_other_rows():
    options = ScanOptions(score="higher-criticism", tails="both", restarts=2, seed=5)
    first, again, second = (run(planted(1.0), number, options) for number in (0, 0, 1))
    assert (first.score, first.units.tolist()) == (again.score, again.units.tolist())
    assert first.score != second.score


def test_without_a_signal_the_stated_rate_of_scans_is_significant():
    options = ScanOptions(score="berk-jones", tails="both", restarts=0, seed=0)
    n_layers, n_runs, rate = 60, 9, 0.1
    ps = []
    for layer in range(n_layers):
        sample = planted(0.0, n_units=12, seed=100 + layer)
        runs = [run(sample, number, options) for number in range(n_runs)]
        # The first run alone, so that the rate is exact; the median of several is below it.
        ps.append(chance_p([runs[0].score], [one.score_shuffled for one in runs]))
    n_false = sum(p <= rate for p in ps)
    # Three standard deviations of a binomial.
    assert abs(n_false - rate * n_layers) <= 3 * np.sqrt(n_layers * rate * (1 - rate))


def test_no_block_is_in_both_the_background_and_the_scan():
    draw = np.random.default_rng(6)
    blocks = np.repeat(np.arange(15), 8)
    sample = Sample(
        hidden_ND=np.arange(120, dtype=np.float32)[:, None], labels_N=np.arange(120) % 2 == 0, blocks_N=blocks
    )
    background, scanned = split(sample, draw)
    in_background = {blocks[int(value)] for value in background.ravel()}
    assert not in_background & set(scanned.blocks_N.tolist())
    assert not sample.labels_N[background.ravel().astype(int)].any()
    assert scanned.labels_N.mean() == 0.5


def test_too_few_rows_are_no_run():
    sample = Sample(hidden_ND=np.zeros((2, 3), np.float32), labels_N=np.array([True, False]), blocks_N=np.arange(2))
    assert run(sample, 0, ScanOptions(score="berk-jones", tails="both", restarts=0, seed=0)) is None
