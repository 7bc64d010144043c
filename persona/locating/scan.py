"""Deep subset scan: the rows and units whose values together are most unlike those of background rows.

Cintas et al., "Detecting adversarial attacks via subset scanning of autoencoder activations" (IJCAI 2020), after
Neill's linear-time subset scanning. A cell's p-value says how extreme a unit's value is among the background rows. The
scan looks for the subset of rows and units, and the threshold a, that maximize a score of N, the number of cells in the
subset, and of N_a, the number of those with p ≤ a.

Shapes: M background rows, N scanned rows, D units, A thresholds.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Tails = Literal["both", "upper", "lower"]
ScanScore = Literal["berk-jones", "higher-criticism"]
THRESHOLDS = np.linspace(0.01, 0.5, 50)
"""The thresholds a, as in the code of "Localizing Persona Representations" (arXiv 2505.24539)."""
_MAX_STEPS = 100  # of one ascent; each step raises the score, and a handful suffice


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The highest-scoring subset: its score, its threshold a, and the sorted numbers of its rows and units."""

    score: float
    threshold: float
    rows: NDArray[np.int64]
    units: NDArray[np.int64]


def p_values(background_MD: NDArray[np.float32], values_ND: NDArray[np.float32], tails: Tails) -> NDArray[np.float64]:
    """The empirical p-value (N, D) of each cell: the share of background rows at least as extreme in its unit.

    The cell itself counts among them, so that p is never 0 and, without a signal, P(p ≤ a) is at most a. With both
    tails, it is twice the smaller of the two.
    """
    n_rows = len(background_MD)
    upper_ND, lower_ND = np.empty(values_ND.shape), np.empty(values_ND.shape)
    for unit, column_M in enumerate(np.sort(background_MD, axis=0).T):
        upper_ND[:, unit] = n_rows - np.searchsorted(column_M, values_ND[:, unit], side="left")
        lower_ND[:, unit] = np.searchsorted(column_M, values_ND[:, unit], side="right")
    upper_ND, lower_ND = (upper_ND + 1) / (n_rows + 1), (lower_ND + 1) / (n_rows + 1)
    if tails == "both":
        both_ND: NDArray[np.float64] = np.minimum(2 * np.minimum(upper_ND, lower_ND), 1)
        return both_ND
    return upper_ND if tails == "upper" else lower_ND


def scores(
    n_low: NDArray[np.float64], n_cells: NDArray[np.float64], thresholds: NDArray[np.float64], score: ScanScore
) -> NDArray[np.float64]:
    """The score of subsets of `n_cells` cells, `n_low` of them with p ≤ a; 0 where there are no more than expected.

    Berk-Jones: N · KL(N_a / N, a). Higher criticism: (N_a - N·a) / √(N·a·(1 - a)).
    """
    share = n_low / n_cells
    if score == "higher-criticism":
        found = (n_low - n_cells * thresholds) / np.sqrt(n_cells * thresholds * (1 - thresholds))
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            low = np.where(share > 0, share * np.log(share / thresholds), 0.0)
            high = np.where(share < 1, (1 - share) * np.log((1 - share) / (1 - thresholds)), 0.0)
        found = n_cells * (low + high)
    above: NDArray[np.float64] = np.where(share > thresholds, found, 0.0)
    return above


def scan(
    p_ND: NDArray[np.float64],
    *,
    score: ScanScore,
    restarts: int,
    seed: int,
    thresholds: NDArray[np.float64] = THRESHOLDS,
) -> Found:
    """The best subset of several ascents: the first from all rows, `restarts` more from random ones.

    Each ascent takes the best units for its rows, then the best rows for these units, until the score stops rising. It
    finds a local maximum; which of the maxima depends on where it starts.
    """
    draw = np.random.default_rng(seed)
    n_rows = len(p_ND)
    # The first threshold that each p-value is at or below; those above all are in the last place.
    levels_ND = np.searchsorted(thresholds, p_ND, side="left")
    starts = [np.arange(n_rows)]
    starts += [np.flatnonzero(draw.random(n_rows) < draw.uniform(0.1, 0.9)) for _ in range(restarts)]
    best = Found(score=0.0, threshold=float(thresholds[0]), rows=np.arange(0), units=np.arange(0))
    for rows in starts:
        found = _ascend(levels_ND, rows if len(rows) else np.array([draw.integers(n_rows)]), thresholds, score)
        if found.score > best.score:
            best = found
    return best


def _ascend(
    levels_ND: NDArray[np.int64], rows: NDArray[np.int64], thresholds: NDArray[np.float64], score: ScanScore
) -> Found:
    found = Found(score=0.0, threshold=float(thresholds[0]), rows=np.arange(0), units=np.arange(0))
    for _ in range(_MAX_STEPS):
        units, _, _ = best_subset(levels_ND[rows], thresholds, score)
        rows, value, threshold = best_subset(levels_ND[:, units].T, thresholds, score)
        if value <= found.score:
            break
        found = Found(score=value, threshold=threshold, rows=np.sort(rows), units=np.sort(units))
    return found


def best_subset(
    levels_ND: NDArray[np.int64], thresholds: NDArray[np.float64], score: ScanScore
) -> tuple[NDArray[np.int64], float, float]:
    """The columns that maximize the score together with all rows; also the score and the threshold.

    For a fixed threshold, the best subset is a prefix of the columns sorted by how many of their cells are at or below
    it, so D subsets are tried instead of 2^D.
    """
    n_rows, n_columns = levels_ND.shape
    n_levels = len(thresholds) + 1
    flat = (levels_ND + n_levels * np.arange(n_columns)).ravel()
    counts_DA = np.bincount(flat, minlength=n_columns * n_levels).reshape(n_columns, n_levels)[:, :-1].cumsum(axis=1)
    order_DA = np.argsort(-counts_DA, axis=0, kind="stable")
    n_low_DA = np.take_along_axis(counts_DA, order_DA, axis=0).cumsum(axis=0).astype(float)
    n_cells_D1 = n_rows * np.arange(1, n_columns + 1, dtype=float)[:, None]
    scores_DA = scores(n_low_DA, n_cells_D1, thresholds, score)
    last, level = np.unravel_index(int(scores_DA.argmax()), scores_DA.shape)
    return order_DA[: last + 1, level], float(scores_DA[last, level]), float(thresholds[level])
