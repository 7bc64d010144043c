"""From the token vectors of a text to its unit vector: pooling, dense layers and width, as in sentence-transformers.

Shapes: N texts, T tokens padded on the right, d width of token vectors, e width of what a layer reads or gives.
"""

from collections.abc import Callable, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from persona.errors import InputError
from persona.models.sentence_transformer import Dense, Layer
from persona.options import Pooling, pooling_modes

_Pool = Callable[[Tensor, Tensor], Tensor]


class SentenceHead(nn.Module):
    """Pools token vectors, applies dense layers, cuts to a width and scales to unit length, all in float32.

    Args:
        pooling: modes joined by `+`, whose results are concatenated.
        layers: what follows the pooling; their weights are random until `load_weights`.
        width: of the vectors; None for all components (Matryoshka models can be cut).
    """

    def __init__(self, pooling: str, layers: Sequence[Layer] = (), width: int | None = None) -> None:
        super().__init__()
        self.modes = pooling_modes(pooling)
        self.width = width
        self.layers = nn.ModuleList(_Normalize() if layer == "normalize" else _DenseLayer(layer) for layer in layers)

    def load_weights(self) -> "SentenceHead":
        """Reads the weights of the dense layers; returns itself. Raises InputError when one is missing or different."""
        for layer in self.layers:
            if isinstance(layer, _DenseLayer):
                layer.load_weights()
        return self

    def forward(self, hidden_NTd: Tensor, mask_NT: Tensor) -> Tensor:
        """Unit vectors (N, e). PPlug eq. 3 is computed on unit vectors, as in the reference implementation."""
        hidden_NTd = hidden_NTd.float()
        vectors_Ne = torch.cat([_POOLS[mode](hidden_NTd, mask_NT) for mode in self.modes], dim=-1)
        for layer in self.layers:
            vectors_Ne = layer(vectors_Ne)
        return nn.functional.normalize(vectors_Ne[:, : self.width], dim=-1)


class _Normalize(nn.Module):
    def forward(self, vectors_Ne: Tensor) -> Tensor:
        return nn.functional.normalize(vectors_Ne, dim=-1)


class _DenseLayer(nn.Module):
    """activation(W x + b), plus x (or its projection) with a residual connection."""

    def __init__(self, declared: Dense) -> None:
        super().__init__()
        self.folder = declared.folder
        self.linear = nn.Linear(declared.inputs, declared.outputs, bias=declared.bias)
        self.activation: nn.Module = getattr(nn, declared.activation)()
        self.has_residual = declared.residual
        if declared.residual and declared.inputs != declared.outputs:
            self.residual = nn.Linear(declared.inputs, declared.outputs, bias=False)

    def load_weights(self) -> None:
        try:
            self.load_state_dict(load_file(self.folder / "model.safetensors"))
        except (RuntimeError, SafetensorError, OSError) as error:
            raise InputError(
                f"{self.folder}: model.safetensors does not fit config.json ({str(error).splitlines()[-1].strip()}); "
                "copy the whole folder again"
            ) from error

    def forward(self, vectors_Ne: Tensor) -> Tensor:
        activated_Ne: Tensor = self.activation(self.linear(vectors_Ne))
        if not self.has_residual:
            return activated_Ne
        return activated_Ne + (self.residual(vectors_Ne) if hasattr(self, "residual") else vectors_Ne)


def _first(hidden_NTd: Tensor, mask_NT: Tensor) -> Tensor:  # noqa: ARG001 - all have one signature
    return hidden_NTd[:, 0]


def _last(hidden_NTd: Tensor, mask_NT: Tensor) -> Tensor:
    last_N = (mask_NT.sum(1) - 1).clamp(min=0)
    return hidden_NTd[torch.arange(len(last_N), device=last_N.device), last_N]


def _max(hidden_NTd: Tensor, mask_NT: Tensor) -> Tensor:
    return hidden_NTd.masked_fill(~mask_NT.bool().unsqueeze(-1), -torch.inf).amax(1)


def _mean(hidden_NTd: Tensor, mask_NT: Tensor) -> Tensor:
    return _weighted_mean(hidden_NTd, mask_NT.float())


def _mean_by_root(hidden_NTd: Tensor, mask_NT: Tensor) -> Tensor:
    return _mean(hidden_NTd, mask_NT) * mask_NT.float().sum(1, keepdim=True).sqrt()


def _mean_by_position(hidden_NTd: Tensor, mask_NT: Tensor) -> Tensor:
    positions_T = torch.arange(1, mask_NT.shape[1] + 1, device=mask_NT.device)
    return _weighted_mean(hidden_NTd, mask_NT.float() * positions_T)


def _weighted_mean(hidden_NTd: Tensor, weights_NT: Tensor) -> Tensor:
    return (hidden_NTd * weights_NT.unsqueeze(-1)).sum(1) / weights_NT.sum(1, keepdim=True).clamp(min=1.0)


_POOLS: dict[Pooling, _Pool] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _mean_by_position,
    "lasttoken": _last,
}
