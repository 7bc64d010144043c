"""Layers of an LLM that keep only their input and compute the rest again in the backward pass."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from persona.errors import UsageError


class ReadOnlyCache(Cache):
    """What a cache holds, for passes that add nothing to it, so that a layer may be computed twice."""

    def __init__(self, kv_cache: Cache) -> None:
        super().__init__(layers=kv_cache.layers)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ARG002 - the signature is transformers'
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer behind those in the cache."""
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


def recompute_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Prepares the layers of a model for recomputation, which they then do in training mode; returns them.

    Raises UsageError for kinds of LLMs for which transformers cannot.
    """
    # transformers recomputes only these layers, and only in training mode.
    layers: list[nn.Module] = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise UsageError(
            f"--activation-checkpointing is not possible with LLMs of the kind {model.config.model_type!r}; "
            "leave it out, and lower --micro-batch if memory is short"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers rename the argument
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        _switch_off_dropout(layer)
        # By default, transformers takes away the cache of a layer that recomputes, which would be filled twice. Here
        # such a layer gets a `ReadOnlyCache` only.
        layer._can_checkpoint_with_cache = True  # type: ignore[assignment]  # noqa: SLF001
    return layers


def _switch_off_dropout(layer: nn.Module) -> None:
    """For layers that do not leave dropout to a submodule: BART's keep its rate, Falcon's read it from their config."""
    for owner in (layer, getattr(layer, "config", None)):
        for name, value in vars(owner).items() if owner is not None else ():
            if "dropout" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
