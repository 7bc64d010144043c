"""Batches of token rows: which rows go together, how they are padded, and the positions of their tokens.

Shapes: N rows, n some of them, T tokens of the longest row, M tokens of all rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persona.models.device import to_device


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids in one array, so that no step takes time per row in Python.

    Attributes:
        ids_M: the tokens of all rows, one row after the other.
        lengths_N: tokens of each row.
    """

    ids_M: NDArray[np.int64]
    lengths_N: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "TokenRows":
        """The same rows in one array."""
        lengths_N = np.fromiter(map(len, rows), np.int64, len(rows))
        return cls(np.fromiter(chain.from_iterable(rows), np.int64, int(lengths_N.sum())), lengths_N)

    def __len__(self) -> int:
        return len(self.lengths_N)

    def starts(self) -> NDArray[np.int64]:
        """The index in `ids_M` of each row's first token."""
        return np.cumsum(self.lengths_N) - self.lengths_N

    def take(self, rows_n: NDArray[np.int64]) -> "TokenRows":
        """The rows of these numbers, in their order."""
        lengths_n = self.lengths_N[rows_n]
        columns = np.arange(int(lengths_n.sum())) - np.repeat(np.cumsum(lengths_n) - lengths_n, lengths_n)
        return TokenRows(self.ids_M[np.repeat(self.starts()[rows_n], lengths_n) + columns], lengths_n)

    def followed_by(self, others: "TokenRows") -> "TokenRows":
        """These rows, then the others."""
        return TokenRows(np.concatenate([self.ids_M, others.ids_M]), np.concatenate([self.lengths_N, others.lengths_N]))

    def pad(self, pad_id: int, device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Ids and mask, both (N, T) on the device, padded on the right or on the left."""
        column_T = np.arange(max(int(self.lengths_N.max(initial=0)), 1))
        mask_NT = (column_T[::-1] if left else column_T) < self.lengths_N.reshape(-1, 1)
        ids_NT = np.full(mask_NT.shape, pad_id, np.int64)
        ids_NT[mask_NT] = self.ids_M
        return to_device(torch.from_numpy(ids_NT), device), to_device(torch.from_numpy(mask_NT), device)


def token_batches(
    lengths: Sequence[int] | NDArray[np.int64], token_budget: int, *, packed: bool = False
) -> Iterator[NDArray[np.int64]]:
    """Splits rows into batches of at most `token_budget` tokens; a longer row is its own batch.

    The tokens of a batch include padding (rows × longest row) unless it is `packed`. Longest first, so that the batch
    that needs most memory comes first and fails early.

    Yields:
        row numbers (n,) of a batch.
    """
    lengths_N = np.asarray(lengths, np.int64)
    order_N = np.argsort(-lengths_N, kind="stable")
    sorted_N = lengths_N[order_N]
    ends_N = np.cumsum(sorted_N)
    first = 0
    while first < len(order_N):
        if packed:
            before = ends_N[first] - sorted_N[first]
            last = int(np.searchsorted(ends_N, before + token_budget, side="right"))
        else:
            last = first + token_budget // max(int(sorted_N[first]), 1)
        last = max(last, first + 1)
        yield order_N[first:last]
        first = last


def full_batches(
    parts: Iterable[tuple[NDArray[np.int64], TokenRows]], token_budget: int, *, packed: bool = False
) -> Iterator[tuple[NDArray[np.int64], TokenRows]]:
    """Like `token_batches`, for rows that arrive in parts with their numbers, longer rows in earlier parts.

    Rows that do not fill a batch wait for the next part, whose first rows are about as long.
    """
    numbers_N, rows = np.empty(0, np.int64), TokenRows.of([])
    for more_numbers_N, more_rows in parts:
        numbers_N, rows = np.concatenate([numbers_N, more_numbers_N]), rows.followed_by(more_rows)
        batches = list(token_batches(rows.lengths_N, token_budget, packed=packed))
        for batch in batches[:-1]:
            yield numbers_N[batch], rows.take(batch)
        for batch in batches[-1:]:
            numbers_N, rows = numbers_N[batch], rows.take(batch)
    if len(rows):
        yield numbers_N, rows


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Token rows to (ids, mask), both (N, T), padded on the right or on the left."""
    return TokenRows.of(rows).pad(pad_id, device, left=left)


def position_ids(mask_NT: Tensor) -> Tensor:
    """The position (N, T) of each token in its row, not counting padding on the left."""
    return (mask_NT.long().cumsum(1) - 1).clamp(min=0)
