"""Repeated scans of one layer: each run draws its own background and scanned rows, and scans them once more shuffled.

What a single scan finds depends on its draw. So units count by the share of runs that find them, and both the score and
the units are compared with those of the same runs after shuffling the labels. That matters, because units of an LLM
depend on each other: where some rows are unusual in hundreds of units, for whatever reason, a scan finds those units.

Shapes: N rows, D units, R runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from persona.locating.samples import Sample, balanced
from persona.locating.scan import Found, ScanScore, Tails, p_values, scan

FREQUENT = 0.5
"""A unit is a persona's if at least this share of the runs find it."""


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """How a run scans.

    Attributes:
        score: what a subset is scored by.
        tails: whether high values, low values or both are unusual.
        restarts: ascents from random rows besides that from all rows.
        seed: of all draws.
    """

    score: ScanScore
    tails: Tails
    restarts: int
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run.

    Attributes:
        number: of the run.
        score, threshold, units: of the subset that was found; `units` are the sorted numbers of its units.
        n_found: rows of the subset.
        n_scanned: rows that were scanned, half of them with the label.
        precision: share of the found rows that have the label; 0.5 by chance, NaN if none was found.
        recall: share of the scanned rows with the label that were found.
        score_shuffled, units_shuffled: the same of a scan with shuffled labels.
    """

    number: int
    score: float
    threshold: float
    units: NDArray[np.int64]
    n_found: int
    n_scanned: int
    precision: float
    recall: float
    score_shuffled: float
    units_shuffled: NDArray[np.int64]


def run(sample: Sample, number: int, options: ScanOptions) -> Run | None:
    """One run; None if there are too few rows of a label for background and scan."""
    draw = np.random.default_rng([options.seed, number])
    drawn = _scan(sample, options, draw)
    shuffled = _scan(sample.shuffled(draw), options, draw)
    if drawn is None or shuffled is None:
        return None
    found, labels_N = drawn
    is_labelled = labels_N[found.rows]
    return Run(
        number=number,
        score=found.score,
        threshold=found.threshold,
        units=found.units,
        n_found=len(found.rows),
        n_scanned=len(labels_N),
        precision=float(is_labelled.mean()) if len(is_labelled) else float("nan"),
        recall=float(is_labelled.sum() / labels_N.sum()),
        score_shuffled=shuffled[0].score,
        units_shuffled=shuffled[0].units,
    )


def _scan(sample: Sample, options: ScanOptions, draw: np.random.Generator) -> tuple[Found, NDArray[np.bool_]] | None:
    """What a scan finds, and the labels of the scanned rows."""
    halves = split(sample, draw)
    if halves is None:
        return None
    background_MD, scanned = halves
    p_ND = p_values(background_MD, scanned.hidden_ND, options.tails)
    seed = int(draw.integers(2**32))
    return scan(p_ND, score=options.score, restarts=options.restarts, seed=seed), scanned.labels_N


def split(sample: Sample, draw: np.random.Generator) -> tuple[NDArray[np.float32], Sample] | None:
    """Background rows without the label, from half of the blocks, and a balanced sample of the rows of the others."""
    blocks, block_N = np.unique(sample.blocks_N, return_inverse=True)
    order_N = draw.permutation(len(blocks))[block_N]
    is_background_N = order_N < np.median(order_N)
    background_N = is_background_N & ~sample.labels_N
    scanned = balanced(sample.take(np.flatnonzero(~is_background_N)), draw)
    if background_N.sum() < 2 or len(scanned.labels_N) < 2:
        return None
    return sample.hidden_ND[background_N], scanned


def unit_frequency(found: Sequence[NDArray[np.int64]], n_units: int) -> NDArray[np.float64]:
    """For each unit (D,), the share of the runs that found it, given the units of each run."""
    counts_D = np.bincount(np.concatenate([np.arange(0), *found]).astype(np.int64), minlength=n_units)
    return counts_D / max(len(found), 1)


def chance_p(scores_R: Sequence[float], shuffled_R: Sequence[float]) -> float:
    """How probable a score as high as the median of the runs is by chance, at most.

    It is the share of the scores with shuffled labels that reach the median, the median itself among them; so it is at
    least 1 / (R + 1).
    """
    reached = np.asarray(shuffled_R) >= np.median(scores_R)
    return float((1 + reached.sum()) / (1 + len(shuffled_R)))
