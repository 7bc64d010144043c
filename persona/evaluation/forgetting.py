"""Remove users from the files of an evaluation: rows of losses, examples and dots of single users, LaMP's outputs.

Totals, means and intervals stay as they were measured; they name no user.
"""

import io
import json
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MIN_MAPPED = 3  # users on a map; with fewer there is none


def split_losses(data: bytes, users: Collection[str]) -> tuple[pa.Table, pa.Table]:
    """The rows of these users in `losses.parquet`, and all others. Raises `KeyError` or `pa.ArrowInvalid`."""
    rows = pq.read_table(pa.BufferReader(data))
    is_theirs = pc.is_in(rows["user_id"].cast(pa.string()), value_set=pa.array(sorted(users), pa.string()))
    return rows.filter(is_theirs), rows.filter(pc.invert(is_theirs))


def losses_file(rows: pa.Table) -> bytes:
    """The bytes of `losses.parquet`."""
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    return sink.getvalue()


def split_metrics(metrics: Mapping[str, Any], users: Collection[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The parts of `metrics.json` that are about these users, and the metrics without them."""
    theirs: list[dict[str, Any]] = []
    rest = dict(metrics)
    for name, parts in metrics.items():
        if isinstance(parts, list) and any(isinstance(part, dict) and "user_id" in part for part in parts):
            theirs += [part for part in parts if part.get("user_id") in users]
            rest[name] = [part for part in parts if part.get("user_id") not in users]
    if len(rest.get("map", ())) < MIN_MAPPED:
        rest["map"] = []
    return theirs, rest


def split_outputs(data: bytes, request_ids: Collection[str]) -> tuple[int, bytes]:
    """The number of these requests in a file of LaMP outputs or golds, and the file without them.

    Raises ValueError, TypeError or KeyError for a file of another kind.
    """
    content = json.loads(data)
    rest = [one for one in content["golds"] if one["id"] not in request_ids]
    n_theirs = len(content["golds"]) - len(rest)
    return n_theirs, json.dumps({**content, "golds": rest}, ensure_ascii=False, indent=1).encode() + b"\n"
