"""Pools of actors that hold a model: blocks of rows go in, as many rows come out."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.data import Dataset


def by_models(
    rows: "Dataset", work: type[Any], *, block_rows: int, pool: Mapping[str, Any], **settings: Any
) -> "Dataset":
    """The rows as actors of a class `work(**settings)` give them back, block by block, each as many as it was given."""
    return rows.repartition(target_num_rows_per_block=block_rows).map_batches(
        work,
        fn_constructor_kwargs=settings,
        batch_size=block_rows,
        batch_format="pyarrow",
        udf_modifying_row_count=False,
        **pool,
    )
