"""The first linear layer of a feed-forward block with its GELU in one kernel, for frozen BERT-like encoders on GPUs.

On a GPU a GELU of its own reads and writes the widest activations of a layer, almost half of what all steps between
the matrix products move. cuBLAS applies it while the product is in registers, in the tanh form, which is within 0.0005
of the exact one; a bf16 near 1 is rounded by up to 0.004. On CPUs the same call is exact.

Shapes: M tokens, d width, f width of the feed-forward block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation


class LinearGelu(nn.Module):
    """GELU(x·Wᵀ + b), with the parameters of a linear layer that it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden_1Md: Tensor) -> Tensor:
        """(1, M, d) to (1, M, f)."""
        bias, weight = self.linear.bias, self.linear.weight
        mixed_Mf: Tensor = torch._addmm_activation(bias, hidden_1Md[0], weight.t(), use_gelu=True)  # noqa: SLF001
        return mixed_Mf[None]


def fuse(model: nn.Module) -> None:
    """Replaces the linear layers before an exact GELU; those of other activations and without a bias stay."""
    for block in _blocks(model):
        if isinstance(block.dense, nn.Linear) and block.dense.bias is not None and _is_exact(block.intermediate_act_fn):
            block.dense, block.intermediate_act_fn = LinearGelu(block.dense), nn.Identity()


def undo(model: nn.Module) -> None:
    """The layers as they were before `fuse`."""
    for block in _blocks(model):
        if isinstance(block.dense, LinearGelu):
            block.dense, block.intermediate_act_fn = block.dense.linear, GELUActivation()


def _blocks(model: nn.Module) -> Iterator[Any]:
    """The modules of BERT and RoBERTa that are a linear layer and an activation."""
    yield from [module for module in model.modules() if hasattr(module, "intermediate_act_fn")]


def _is_exact(activation: object) -> bool:
    return isinstance(activation, GELUActivation) and activation.act is nn.functional.gelu
