"""The figures of one training step for an experiment tracker: loss, speed, and what the worker's machine does."""

import resource
import sys
from collections.abc import Mapping

from jobs.runtime.tracking import TRAINING_LOSS

_MIB = 2**20
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of `ru_maxrss`


def step_figures(global_batch: int, spent_s: Mapping[str, float], *, loss: float, seconds: float) -> dict[str, float]:
    """The figures of the step just taken, by name; `spent_s` are the seconds of this process so far."""
    import torch

    figures = {
        TRAINING_LOSS: loss,
        "train/requests_per_s": global_batch / seconds,
        "system/seconds_waiting": spent_s.get("waiting", 0.0),
        "system/peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES / _MIB,
    }
    if torch.cuda.is_available():
        figures["system/gpu_peak_memory_mib"] = torch.cuda.max_memory_allocated() / _MIB
        figures["system/gpu_reserved_memory_mib"] = torch.cuda.memory_reserved() / _MIB
    return figures
