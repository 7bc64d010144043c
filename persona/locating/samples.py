"""Labelled rows of one layer, and their labels shuffled as chance would have them.

Shapes: N rows, D LLM width.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Hidden states of one layer with their labels.

    Attributes:
        hidden_ND: float32.
        labels_N: whether a row matches the persona, or is under the own persona.
        blocks_N: int64; rows of one block depend on each other, like the requests of a user. A block is never divided
            between fitting and testing.
    """

    hidden_ND: NDArray[np.float32]
    labels_N: NDArray[np.bool_]
    blocks_N: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> "Sample":
        """Some of the rows."""
        return Sample(hidden_ND=self.hidden_ND[rows], labels_N=self.labels_N[rows], blocks_N=self.blocks_N[rows])

    def shuffled(self, draw: np.random.Generator) -> "Sample":
        """The same rows with labels as they would be by chance.

        Where all rows of each block have one label, labels are permuted among blocks. Where blocks have both, as a
        request under two personas, all labels of a block are exchanged, or none.
        """
        blocks, block_N = np.unique(self.blocks_N, return_inverse=True)
        n_rows = np.bincount(block_N, minlength=len(blocks))
        n_true = np.bincount(block_N, weights=self.labels_N, minlength=len(blocks))
        if np.any((n_true > 0) & (n_true < n_rows)):
            labels_N = self.labels_N ^ (draw.random(len(blocks)) < 0.5)[block_N]
        else:
            labels_N = draw.permutation(n_true > 0)[block_N]
        return replace(self, labels_N=labels_N)


def balanced(sample: Sample, draw: np.random.Generator) -> Sample:
    """As many rows of each label, drawn without replacement."""
    of_label = [np.flatnonzero(sample.labels_N == label) for label in (False, True)]
    size = min(map(len, of_label))
    return sample.take(np.sort(np.concatenate([draw.permutation(rows)[:size] for rows in of_label])))
