"""The learning rate rises and falls linearly, and the persona's strength rises."""

import pytest
from hypothesis import given, strategies as st

from persona.training.schedule import learning_rate_factor, persona_strength


def test_the_rate_rises_linearly_then_falls_linearly_to_zero():
    factors = [learning_rate_factor(step, 20, 0.2) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == [pytest.approx((20 - step) / 16) for step in range(4, 20)]
    assert learning_rate_factor(20, 20, 0.2) == 0


@given(st.integers(1, 300), st.floats(0, 1, exclude_max=True))
def test_every_step_has_a_rate_between_zero_and_the_peak(n_steps, warmup):
    factors = [learning_rate_factor(step, n_steps, warmup) for step in range(n_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1


def test_the_persona_has_its_full_strength_from_the_end_of_its_warm_up_on():
    assert [persona_strength(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert persona_strength(0, 0) == 1
