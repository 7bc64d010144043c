"""A key-value cache of fixed place and size: a CUDA graph repeats its kernels at the same addresses.

transformers' own `StaticCache` allocates new memory when rows are reordered, waits for the device to do so, and counts
tokens in each layer by itself. Here all layers are in one tensor and share the place of the next token.

Shapes: A parts (keys and values of each layer), N rows, R running rows, h key heads, P places, T some of these places,
L prompt tokens, w width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

# Rows are moved by way of a copy; larger ones save no time.
_COPIED_BYTES = 2**28


class StaticCache:
    """Keys and values of `n_layers` layers for at most N rows and P tokens."""

    def __init__(
        self, n_layers: int, sizes_NhPw: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Not empty: places that are masked are read, too, and NaN times zero is NaN.
        self.kv_ANhPw = torch.zeros(2 * n_layers, *sizes_NhPw, dtype=dtype, device=device)

    def layers(self, n_rows: int, n_places: int, place_1: Tensor | None = None) -> Cache:
        """The first rows and places, in transformers' interface; see `_Layer` for `place_1`."""
        parts = self.kv_ANhPw[:, :n_rows, :, :n_places].unbind()
        return Cache(
            layers=[_Layer(keys, values, place_1) for keys, values in zip(parts[::2], parts[1::2], strict=True)]
        )

    def move_rows(self, rows_R: Tensor, first: int, end: int) -> None:
        """Row i continues with what row `rows_R[i]` holds at the places from `first` to before `end`."""
        held_ANhTw = self.kv_ANhPw[:, :, :, first:end]
        part_bytes = held_ANhTw[0, : len(rows_R)].numel() * held_ANhTw.element_size()
        for some_ANhTw in torch.split(held_ANhTw, max(1, _COPIED_BYTES // max(part_bytes, 1))):
            some_ANhTw[:, : len(rows_R)] = some_ANhTw.index_select(1, rows_R)


class _Layer(CacheLayerMixin):
    """The keys and values (N, h, P, w) of one layer.

    Without `place_1` it takes in a prompt: the prompt's tokens see each other alone, as with a growing cache. With it
    each row gets a token at the place `place_1` (1,), and sees all places; a mask must hide those that are not filled.
    """

    is_sliding = False
    is_initialized = True
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, place_1: Tensor | None) -> None:
        self.keys, self.values, self.place_1 = keys, values, place_1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the memory is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes in keys and values (N, h, L, w); returns those that the new tokens see."""
        if self.place_1 is None:
            length = key_states.shape[2]
            self.keys[:, :, :length], self.values[:, :, :length] = key_states, value_states
            return key_states, value_states
        self.keys.index_copy_(2, self.place_1, key_states)
        self.values.index_copy_(2, self.place_1, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """The number of tokens before the new ones; in a step it stays on the device, since to read it would wait."""
        return 0 if self.place_1 is None else self.place_1[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the new tokens see, and the place of the first."""
        return (query_length if self.place_1 is None else self.get_max_length()), 0

    def get_max_length(self) -> int:
        """P."""
        return self.keys.shape[2]
