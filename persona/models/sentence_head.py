"""From the token vectors of a text to its unit vector: pooling, dense layers and width, as in sentence-transformers.

Shapes: N texts, T tokens padded on the right, M tokens of all texts without padding, d width of token vectors, e width
of what a layer reads or gives.
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
        return self._finish([_POOLS[mode](hidden_NTd, mask_NT) for mode in self.modes])

    def forward_packed(self, hidden_Md: Tensor, lengths_N: Tensor) -> Tensor:
        """The same (N, e) for the token vectors of texts one behind the other; `lengths_N` are int64, at least 1."""
        return self._finish([_PACKED_POOLS[mode](hidden_Md, lengths_N) for mode in self.modes])

    def _finish(self, pooled: Sequence[Tensor]) -> Tensor:
        vectors_Ne = torch.cat([*pooled], dim=-1)
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


def _packed_first(hidden_Md: Tensor, lengths_N: Tensor) -> Tensor:
    return hidden_Md[lengths_N.cumsum(0) - lengths_N].float()


def _packed_last(hidden_Md: Tensor, lengths_N: Tensor) -> Tensor:
    return hidden_Md[lengths_N.cumsum(0) - 1].float()


def _packed_max(hidden_Md: Tensor, lengths_N: Tensor) -> Tensor:
    return _reduce(hidden_Md.float(), "max", lengths_N)


def _packed_mean(hidden_Md: Tensor, lengths_N: Tensor) -> Tensor:
    return _reduce(hidden_Md.float(), "sum", lengths_N) / lengths_N.unsqueeze(1)


def _packed_mean_by_root(hidden_Md: Tensor, lengths_N: Tensor) -> Tensor:
    return _packed_mean(hidden_Md, lengths_N) * lengths_N.float().sqrt().unsqueeze(1)


def _packed_mean_by_position(hidden_Md: Tensor, lengths_N: Tensor) -> Tensor:
    starts_N, n = lengths_N.cumsum(0) - lengths_N, len(hidden_Md)
    starts_M = starts_N.repeat_interleave(lengths_N, output_size=n)
    positions_M1 = (torch.arange(1, n + 1, device=hidden_Md.device) - starts_M).float().unsqueeze(1)
    weights_N1 = _reduce(positions_M1, "sum", lengths_N)
    return _reduce(hidden_Md.float() * positions_M1, "sum", lengths_N) / weights_N1


def _reduce(values_Md: Tensor, how: str, lengths_N: Tensor) -> Tensor:
    # In a fixed order, unlike `index_add`. A check of the lengths would wait for the GPU.
    return torch.segment_reduce(values_Md, how, lengths=lengths_N, unsafe=True)


_PACKED_POOLS: dict[Pooling, _Pool] = {
    "cls": _packed_first,
    "max": _packed_max,
    "mean": _packed_mean,
    "mean_sqrt_len_tokens": _packed_mean_by_root,
    "weightedmean": _packed_mean_by_position,
    "lasttoken": _packed_last,
}
