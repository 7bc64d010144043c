"""Where a model runs, in which precision, and how tensors get there."""

from typing import get_args

import torch
from torch import Tensor

from persona.errors import UsageError
from persona.options import Precision


def choose_device(device: str | None = None) -> torch.device:
    """The device of that name; by default a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """bf16 or float32; `auto` is bf16 where the hardware multiplies it natively. Raises UsageError for other names."""
    if precision not in get_args(Precision):
        raise UsageError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported()
        else:
            # torch has no public API for this.
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to the device, asynchronously to a GPU, which requires pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
