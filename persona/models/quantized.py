"""Linear layers whose frozen weights are kept in 8 or 4 bits, to fit a large LLM on one GPU.

A layer expands its weight each time it computes, in the forward and in the backward pass, and keeps nothing of it for
the latter: it saves memory, not time. Gradients to its input are exact for the quantized weight.

Shapes: O output width, I input width, N blocks of a weight, K weights of a block.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from persona.errors import InputError
from persona.options import Quantization

_BLOCK = 64  # K of nf4
_INT8_MAX, _FP8_MAX = 127.0, torch.finfo(torch.float8_e4m3fn).max
_NO_LARGE_RANGE = 1e-12  # a row of zeros has scale 0 otherwise


class QuantizedLinear(nn.Module):
    """A frozen linear layer; `weight` is the expanded weight (O, I)."""

    def __init__(self, layer: nn.Linear, kind: Quantization, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.dtype = layer.weight.dtype
        self.bias = layer.bias
        values, scales = _quantize(layer.weight.detach().to(device), kind)
        # Buffers: neither an optimizer nor DeepSpeed touches them.
        self.values: Tensor
        self.scales: Tensor
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:
        """The weight (O, I) in the LLM's precision."""
        if self.kind == "nf4":
            index_N2K = torch.stack([self.values >> 4, self.values & 15], dim=-1).flatten(1).int()
            flat = (nf4_levels(self.values.device)[index_N2K] * self.scales).flatten()
            weight_OI = flat[: self.out_features * self.in_features].view(self.out_features, self.in_features)
        else:
            weight_OI = self.values.float() * self.scales
        return weight_OI.to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, I) to (…, O)."""
        product = cast(Tensor, _Product.apply(inputs, self))  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """x Wᵀ; the backward pass expands W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return inputs @ layer.weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight, None


def quantize(model: PreTrainedModel, kind: Quantization, device: torch.device) -> None:
    """Replaces the linear layers of a loaded model by quantized ones on `device`, one at a time, all but the head.

    The weights may still be in files that are mapped into memory.

    Raises:
        InputError: the weights are quantized in the folder, or most are outside linear layers, like fused experts.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(
            f"--llm-quantization {kind}: {model.name_or_path!r} has quantized weights already; leave the flag out"
        )
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head}
    numbers = {id(layer.weight): layer.weight.numel() for layer in layers.values()}
    embeddings = {id(part.weight) for part in (head, model.get_input_embeddings()) if part is not None}
    rest = sum(weight.numel() for weight in model.parameters() if id(weight) not in numbers.keys() | embeddings)
    if sum(numbers.values()) <= rest:
        raise InputError(
            f"--llm-quantization {kind}: only {sum(numbers.values()):,} of {model.name_or_path!r}'s weights are in "
            f"linear layers, which are quantized, and {rest:,} in others, such as fused experts; leave the flag out"
        )
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, QuantizedLinear(layer, kind, device))


def _quantize(weight_OI: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    """Values and float32 scales of a weight.

    int8 and fp8: one scale a row, of its largest absolute value. nf4: blocks of 64 weights, as the nearest of 16 levels
    times the block's largest absolute value (QLoRA, arXiv 2305.14314, section 3); two levels make a byte.
    """
    weight_OI = weight_OI.float()
    if kind == "nf4":
        flat = weight_OI.flatten()
        blocks_NK = nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
        scales_N1 = blocks_NK.abs().amax(1, keepdim=True)
        levels = nf4_levels(flat.device)
        middles = (levels[1:] + levels[:-1]) / 2
        index_NK = torch.bucketize(blocks_NK / scales_N1.clamp(min=_NO_LARGE_RANGE), middles).byte()
        return index_NK[:, ::2] << 4 | index_NK[:, 1::2], scales_N1
    largest_O1 = weight_OI.abs().amax(1, keepdim=True).clamp(min=_NO_LARGE_RANGE)
    if kind == "fp8":
        scales_O1 = largest_O1 / _FP8_MAX
        return (weight_OI / scales_O1).to(torch.float8_e4m3fn), scales_O1
    scales_O1 = largest_O1 / _INT8_MAX
    return (weight_OI / scales_O1).round().to(torch.int8), scales_O1


def nf4_levels(device: torch.device) -> Tensor:
    """The 16 levels of NormalFloat: quantiles of the normal distribution from -1 to 1, with an exact 0."""
    # The outermost quantile is between those of 1/30 and 1/32 (QLoRA, appendix E).
    outer = 1 - (1 / 30 + 1 / 32) / 2
    positive = torch.special.ndtri(torch.linspace(0.5, outer, 9, dtype=torch.float64))
    negative = -torch.special.ndtri(torch.linspace(0.5, outer, 8, dtype=torch.float64))
    levels = torch.cat([negative[1:].flip(0), positive])
    return (levels / levels.max()).float().to(device)
