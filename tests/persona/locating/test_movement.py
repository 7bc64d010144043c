"""Movement and the nearest request, against loops."""

import numpy as np
import pytest

from persona.locating.movement import movement, of_other_users, user_in_nearest

USERS = np.array([3, 3, 1, 7, 1, 7, 7])


def states(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(USERS), 5)).astype(np.float32)


def test_movement_is_that_of_a_loop():
    first, second = states(0), states(1)
    found = movement(first, second, USERS, seed=0)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(first, second, strict=True)]
    moved = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(first, second, strict=True)]
    assert found.cosine == pytest.approx(np.mean(cosines), rel=1e-5)
    assert found.moved == pytest.approx(np.mean(moved), rel=1e-5)


def test_a_persona_that_changes_nothing_moves_nothing_and_another_prompt_does():
    found = movement(states(0), states(0), USERS, seed=0)
    assert (found.cosine, found.moved) == (pytest.approx(1), 0)
    assert found.cosine_shuffled < 0.9
    assert found.moved_shuffled > 0.5


def test_every_row_gets_a_random_row_of_another_user():
    seen: set[tuple[int, int]] = set()
    for seed in range(200):
        others = of_other_users(USERS, np.random.default_rng(seed))
        assert (USERS[others] != USERS).all()
        seen |= set(enumerate(others.tolist()))
    assert seen == {(i, j) for i in range(7) for j in range(7) if USERS[i] != USERS[j]}
    assert of_other_users(np.array([4, 4]), np.random.default_rng(0)).tolist() == [-1, -1]


def test_the_nearest_request_is_of_the_same_user_where_states_show_the_user():
    draw = np.random.default_rng(0)
    users = np.repeat(np.arange(30), 3)
    of_users = draw.normal(size=(30, 16))[users]
    assert user_in_nearest((of_users + 0.1 * draw.normal(size=(90, 16))).astype(np.float32), users) == 1
    assert user_in_nearest(draw.normal(size=(90, 16)).astype(np.float32), users) < 0.15
    assert np.isnan(user_in_nearest(states(0), np.arange(7)))  # nobody has a second request
    assert np.isnan(user_in_nearest(np.ones((7, 5), np.float32), USERS))


def test_one_user_has_no_other_prompt():
    found = movement(states(0), states(1), np.zeros(7, np.int64), seed=0)
    assert np.isnan(found.moved_shuffled)
