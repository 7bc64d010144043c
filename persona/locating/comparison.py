"""What is compared in a layer: the rows of two sides, read from the parts and kept in one small file.

Shapes: N rows, D LLM width.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from persona import storage
from persona.locating import separation as separations, state_files
from persona.locating.movement import movement, user_in_nearest
from persona.locating.samples import Sample


@dataclass(frozen=True, kw_only=True)
class Side:
    """Rows of one side: a group of statements with a label, or all requests under a persona (label None)."""

    group: str
    label: int | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two sides under the name of what they tell apart; the first one is that of the persona."""

    name: str
    sides: tuple[Side, Side]

    @property
    def is_paired(self) -> bool:
        """Whether both sides are the same requests, under two personas."""
        return self.sides[0].label is None

    @classmethod
    def of_statements(cls, group: str) -> "Comparison":
        """The matching statements of a group against the others."""
        return cls(name=group, sides=(Side(group=group, label=1), Side(group=group, label=0)))

    @classmethod
    def of_personas(cls, first: str, second: str) -> "Comparison":
        """Requests under one persona against the same requests under another."""
        return cls(name=f"{first} / {second}", sides=(Side(group=first, label=None), Side(group=second, label=None)))


def gather(folder: str, names: Sequence[str], one: Comparison, *, layer: int, most: int, to: str) -> Sample:
    """The sample of a layer from the parts of these names, at most `most` rows of each side; also written to `to`.

    Of a paired comparison, both sides have the same requests in the same order.
    """
    read = [
        state_files.sample(folder, names, layer=layer, group=side.group, label=side.label, most=most)
        for side in one.sides
    ]
    if one.is_paired:
        common = set.intersection(*(set(rows["row_id"].to_pylist()) for rows, _ in read))
        kept = [np.array([row in common for row in rows["row_id"].to_pylist()], bool) for rows, _ in read]
        read = [(rows.filter(pa.array(keep)), hidden[keep]) for (rows, hidden), keep in zip(read, kept, strict=True)]
    width = max(hidden_ND.shape[1] for _, hidden_ND in read)
    sample = Sample(
        hidden_ND=np.concatenate([hidden_ND.reshape(-1, width) for _, hidden_ND in read]),
        labels_N=np.repeat([True, False], [rows.num_rows for rows, _ in read]),
        blocks_N=np.concatenate([rows["block"].to_numpy() for rows, _ in read]),
    )
    _write(to, sample)
    return sample


def read(uri: str) -> Sample:
    """A sample that `gather` has written."""
    table = storage.retried(lambda: _table(uri), f"cannot read {uri}")
    hidden = table["hidden"].combine_chunks()
    return Sample(
        hidden_ND=hidden.flatten().to_numpy().reshape(table.num_rows, hidden.type.list_size),
        labels_N=table["label"].to_numpy(),
        blocks_N=table["block"].to_numpy(),
    )


def layer_row(sample: Sample, one: Comparison, *, layer: int, n_components: int, seed: int) -> dict[str, Any]:
    """The numbers of one layer: a row of `layers.parquet`, without the scan. NaN where a number is not defined."""
    n_rows = np.bincount(sample.labels_N.astype(int), minlength=2)
    row: dict[str, Any] = {"group": one.name, "layer": layer, "rows": int(n_rows[1]), "rows_other": int(n_rows[0])}
    if n_rows.min() < 2:
        return row
    found = asdict(separations.separation(sample, n_components=n_components, seed=seed))
    shuffled = [asdict(one) for one in separations.shuffled_separations(sample, n_components=n_components, seed=seed)]
    row |= found
    for name in ("silhouette", "calinski_harabasz", "davies_bouldin", "auc"):
        row[f"{name}_shuffled"] = float(np.mean([other[name] for other in shuffled]))
    row["auc_shuffled_high"] = float(np.max([other["auc"] for other in shuffled]))
    return row | _movement(sample, seed) if one.is_paired else row


def _movement(sample: Sample, seed: int) -> dict[str, float]:
    first_ND, second_ND = sample.hidden_ND[sample.labels_N], sample.hidden_ND[~sample.labels_N]
    users_N = sample.blocks_N[sample.labels_N]
    by_chance = np.random.default_rng([seed, 2]).permutation(users_N)
    return {
        **asdict(movement(first_ND, second_ND, users_N, seed)),
        "user_in_nearest": user_in_nearest(first_ND, users_N),
        "user_in_nearest_shuffled": user_in_nearest(first_ND, by_chance),
    }


def _write(uri: str, sample: Sample) -> None:
    flat = pa.array(sample.hidden_ND.ravel(), pa.float32())
    width: int = sample.hidden_ND.shape[1]
    columns: dict[str, pa.Array | NDArray[Any]] = {
        "label": pa.array(sample.labels_N),
        "block": pa.array(sample.blocks_N, pa.int64()),
        "hidden": pa.FixedSizeListArray.from_arrays(flat, max(width, 1)),
    }
    with storage.write_file(uri) as path:
        pq.write_table(pa.table(columns), path)


def _table(uri: str) -> pa.Table:
    filesystem, path = storage.open_filesystem(uri)
    with filesystem.open_input_file(path) as source:
        return pq.read_table(source)
