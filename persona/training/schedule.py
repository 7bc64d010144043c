"""What changes over a run: the learning rate, and the strength of the persona."""

import math


def learning_rate_factor(step: int, n_steps: int, warmup: float) -> float:
    """The share of the peak rate at `step`, which counts from 0.

    Rises linearly over the first `warmup` share of the steps, then falls linearly to 0, as in PPlug.
    """
    n_warmup = math.ceil(warmup * n_steps)
    if step < n_warmup:
        return (step + 1) / n_warmup
    return (n_steps - step) / max(n_steps - n_warmup, 1)


def persona_strength(step: int, n_steps: int) -> float:
    """The strength of the persona at `step`, which counts from 0: it rises linearly to 1 over the first `n_steps`.

    What all requests share is learned in few steps, but not while each history moves the soft tokens by a map that is
    still noise.
    """
    return min(1.0, (step + 1) / n_steps) if n_steps else 1.0
