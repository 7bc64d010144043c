"""How far the last token of the same prompts moves in one layer when the persona changes.

Shapes: N requests, D LLM width.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Movement:
    """Means over requests.

    Attributes:
        cosine: between a request's states under the two personas.
        moved: length of the difference of the two states, relative to the state under the second persona.
        cosine_shuffled, moved_shuffled: the same between the first state of a request and the second state of a request
            of another user: how far a different user, and a different prompt, move the state.
    """

    cosine: float
    moved: float
    cosine_shuffled: float
    moved_shuffled: float


def movement(
    first_ND: NDArray[np.float32], second_ND: NDArray[np.float32], users_N: NDArray[np.int64], seed: int
) -> Movement:
    """The movement between states under two personas, row by row of the same requests."""
    first, second = first_ND.astype(np.float64), second_ND.astype(np.float64)
    cosine, moved = _means(first, second)
    others_N = of_other_users(users_N, np.random.default_rng(seed))
    has_other = others_N >= 0
    cosine_shuffled, moved_shuffled = _means(first[has_other], second[others_N[has_other]])
    return Movement(cosine=cosine, moved=moved, cosine_shuffled=cosine_shuffled, moved_shuffled=moved_shuffled)


def of_other_users(users_N: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.int64]:
    """For each row, the number of a random row of another user; -1 if there is only one user."""
    found_N = np.full(len(users_N), -1, np.int64)
    order = np.argsort(users_N, kind="stable")
    starts = np.searchsorted(users_N[order], users_N, side="left")
    ends = np.searchsorted(users_N[order], users_N, side="right")
    n_others_N = len(users_N) - (ends - starts)
    has_other = n_others_N > 0
    picks = draw.integers(np.maximum(n_others_N, 1))
    places_N = np.where(picks < starts, picks, picks + (ends - starts))
    found_N[has_other] = order[places_N[has_other]]
    return found_N


def user_in_nearest(hidden_ND: NDArray[np.float32], users_N: NDArray[np.int64]) -> float:
    """The share of requests whose nearest other request (cosine of the centered states) is of the same user.

    Only users with at least two requests are asked for; NaN if there is none, or all states are equal.
    """
    centered_ND = hidden_ND.astype(np.float64) - hidden_ND.mean(axis=0, dtype=np.float64)
    norms_N = np.linalg.norm(centered_ND, axis=1, keepdims=True)
    counts = np.unique(users_N, return_inverse=True, return_counts=True)
    asked_N = counts[2][counts[1]] > 1
    if not asked_N.any() or np.ptp(hidden_ND, axis=0).max() == 0:
        return float("nan")
    unit_ND = centered_ND / np.maximum(norms_N, np.finfo(np.float64).tiny)
    similarity_NN = unit_ND @ unit_ND.T
    np.fill_diagonal(similarity_NN, -np.inf)
    return float((users_N[similarity_NN.argmax(axis=1)] == users_N)[asked_N].mean())


def _means(first_ND: NDArray[np.float64], second_ND: NDArray[np.float64]) -> tuple[float, float]:
    if not len(first_ND):
        return float("nan"), float("nan")
    norms = np.linalg.norm(first_ND, axis=1), np.linalg.norm(second_ND, axis=1)
    cosines_N = (first_ND * second_ND).sum(axis=1) / (norms[0] * norms[1])
    return float(cosines_N.mean()), float((np.linalg.norm(first_ND - second_ND, axis=1) / norms[1]).mean())
