"""The learning rate over a run: linear warm-up, then linear decay."""

import math


def learning_rate_factor(step: int, n_steps: int, warmup: float) -> float:
    """The share of the peak rate at `step`, which counts from 0.

    Rises linearly over the first `warmup` share of the steps, then falls linearly to 0, as in PPlug.
    """
    n_warmup = math.ceil(warmup * n_steps)
    if step < n_warmup:
        return (step + 1) / n_warmup
    return (n_steps - step) / max(n_steps - n_warmup, 1)
