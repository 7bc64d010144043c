"""Compiled layers of a frozen LLM: torch fuses the small kernels between its matrix products.

Each repeated layer is compiled alone ("regional compilation"), so that all layers of one kind share a graph. Shapes are
dynamic: rows of any number and length use the same graph.

Shapes: B requests, S soft tokens, D LLM width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from persona.errors import InputError, UsageError
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptIds

# Requests and tokens of the batches on which compiled and plain layers are compared.
_BATCHES = ((2, 24), (3, 37))
_SOFT_TOKENS, _TARGET_TOKENS = 2, 5
# T5 has four kinds of layers (the first ones and the others, in encoder and decoder), each with graphs with and without
# gradients, for one row and for several. By default torch stops at eight.
_MAX_GRAPHS = 32
# Fused kernels round less often, so bf16 differs by some percent in the gradient. A wrong mask, position or scale
# changes much more.
_LOSS_TOLERANCE = {torch.float32: 1e-4}
_GRADIENT_TOLERANCE = {torch.float32: 1e-3}
_COARSE_LOSS, _COARSE_GRADIENT = 0.02, 0.15


def compile_layers(llm: FrozenLLM, *, backend: str | Callable[..., Any] = "inductor") -> str | None:
    """Compiles the layers of the LLM in place, unless losses or gradients then differ from those of the plain layers.

    Returns:
        None, or why the layers have stayed as they were.

    Raises:
        UsageError: the LLM's layers are of a kind that transformers does not mark as repeated.
        InputError: its weights are quantized.
    """
    layers = [layer for layer in llm.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        kind = llm.model.config.model_type
        raise UsageError(f"--compile is not possible with LLMs of the kind {kind!r}; leave it out")
    if getattr(llm.model.config, "quantization_config", None) is not None:
        raise InputError(f"--compile: {llm.model.name_or_path!r} has quantized weights; leave the flag out")
    plain = [_loss_and_gradient(llm, *shape) for shape in _BATCHES]
    torch._dynamo.config.recompile_limit = _MAX_GRAPHS  # noqa: SLF001
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    try:
        compiled = [_loss_and_gradient(llm, *shape) for shape in _BATCHES]
    except Exception as error:  # noqa: BLE001 - compilers fail in many ways, and nothing depends on this one
        reason: str | None = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        reason = _difference(plain, compiled, llm.dtype)
    if reason is not None:
        use_plain_layers(llm)
    else:
        # A cache has a part for each layer, which would therefore need a graph of its own.
        llm.reads_ahead = False
    return reason


def use_plain_layers(llm: FrozenLLM) -> None:
    """Undoes `compile_layers`."""
    for layer in llm.model.modules():
        layer._compiled_call_impl = None  # noqa: SLF001 - torch has no public way back
    llm.reads_ahead = llm.can_mask_padding


def _loss_and_gradient(llm: FrozenLLM, n_requests: int, n_tokens: int) -> tuple[Tensor, Tensor]:
    """The summed loss of a made-up batch, and its gradient to the soft tokens (B, S, D)."""
    spread = torch.linspace(1, llm.model.get_input_embeddings().num_embeddings - 1, n_requests * n_tokens)
    rows = spread.long().view(n_requests, n_tokens).tolist()
    # One row is shorter, so that there is padding.
    rows[0] = rows[0][: n_tokens // 2]
    soft_BSD = llm.embed(torch.tensor([row[:_SOFT_TOKENS] for row in rows], device=llm.device)).detach().float()
    soft_BSD.requires_grad_()
    prompts = [PromptIds(before=row[:1], after=row[1:-_TARGET_TOKENS]) for row in rows]
    loss = llm.nll(soft_BSD, prompts, [row[-_TARGET_TOKENS:] for row in rows]).sum()
    (gradient_BSD,) = torch.autograd.grad(loss, soft_BSD)
    return loss.detach(), gradient_BSD


def _difference(
    plain: list[tuple[Tensor, Tensor]], compiled: list[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> str | None:
    """What differs by more than rounding, in words."""
    for (loss, gradient), (found_loss, found_gradient) in zip(plain, compiled, strict=True):
        of_loss = float((found_loss - loss).abs() / loss.abs())
        of_gradient = float((found_gradient - gradient).norm() / gradient.norm())
        if not of_loss <= _LOSS_TOLERANCE.get(dtype, _COARSE_LOSS):
            return f"the loss differs by {of_loss:.1%}"
        if not of_gradient <= _GRADIENT_TOLERANCE.get(dtype, _COARSE_GRADIENT):
            return f"the gradient differs by {of_gradient:.1%}"
    return None
