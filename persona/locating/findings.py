"""What layers and runs say together: the tables that people read, and a few numbers for each comparison."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from persona.locating.overlap import overlap
from persona.locating.runs import FREQUENT, chance_p, unit_frequency

LAYERS = pa.schema(
    [
        ("group", pa.string()),
        ("layer", pa.int32()),
        *((name, pa.int32()) for name in ("rows", "rows_other")),
        ("explained", pa.float64()),
        *(
            (f"{name}{suffix}", pa.float64())
            for name in ("silhouette", "calinski_harabasz", "davies_bouldin", "auc")
            for suffix in ("", "_shuffled")
        ),
        *((name, pa.float64()) for name in ("auc_shuffled_high", "cosine", "cosine_shuffled")),
        *((name, pa.float64()) for name in ("moved", "moved_shuffled", "user_in_nearest", "user_in_nearest_shuffled")),
        *((name, pa.float64()) for name in ("scan_score", "scan_score_shuffled", "scan_p")),
        *((name, pa.float64()) for name in ("scan_precision", "scan_recall")),
        ("units", pa.list_(pa.int32())),
        ("units_shuffled", pa.list_(pa.int32())),
    ]
)
SCAN = pa.schema(
    [
        ("group", pa.string()),
        ("layer", pa.int32()),
        ("run", pa.int32()),
        *((name, pa.float64()) for name in ("score", "score_shuffled", "threshold")),
        ("units", pa.list_(pa.int32())),
        *((name, pa.int32()) for name in ("rows_found", "rows_scanned")),
        *((name, pa.float64()) for name in ("precision", "recall")),
        ("units_shuffled", pa.list_(pa.int32())),
    ]
)
OVERLAPS = pa.schema(
    [
        ("layer", pa.int32()),
        *((name, pa.string()) for name in ("first", "second")),
        *((name, pa.int32()) for name in ("units_first", "units_second", "shared")),
        *((name, pa.float64()) for name in ("expected", "p")),
        ("shared_shuffled", pa.int32()),
        ("expected_shuffled", pa.float64()),
    ]
)
_RUN_NAMES = {"number": "run", "n_found": "rows_found", "n_scanned": "rows_scanned"}
# Of the best AUC's distance from 0.5: where a persona counts as readable.
_MOST_OF_IT = 0.9


def scan_rows(group: str, layer: int, runs: pa.Table) -> pa.Table:
    """The runs of a layer as rows of `SCAN`."""
    table = runs.rename_columns([_RUN_NAMES.get(name, name) for name in runs.column_names])
    table = table.append_column("group", pa.repeat(group, table.num_rows))
    table = table.append_column("layer", pa.repeat(pa.scalar(layer, pa.int32()), table.num_rows))
    return table.select(SCAN.names).cast(SCAN)


def scan_summary(runs: pa.Table, n_units: int) -> dict[str, Any]:
    """The part of a row of `LAYERS` that its runs give; `units` are those that at least half of the runs find."""
    scores, shuffled = runs["score"].to_numpy(), runs["score_shuffled"].to_numpy()

    def frequent(column: str) -> list[int]:
        frequency_D = unit_frequency([np.array(units, np.int64) for units in runs[column].to_pylist()], n_units)
        return np.flatnonzero(frequency_D >= FREQUENT).tolist()

    precisions = [one for one in runs["precision"].to_pylist() if not math.isnan(one)]
    return {
        "scan_score": float(np.median(scores)),
        "scan_score_shuffled": float(np.median(shuffled)),
        "scan_p": chance_p(scores.tolist(), shuffled.tolist()),
        "scan_precision": float(np.mean(precisions)) if precisions else None,
        "scan_recall": float(np.mean(runs["recall"].to_numpy())),
        "units": frequent("units"),
        "units_shuffled": frequent("units_shuffled"),
    }


def overlaps(rows: Sequence[Mapping[str, Any]], n_units: int) -> list[dict[str, Any]]:
    """Rows of `OVERLAPS`: for each layer and pair of groups that both have units, how many they share.

    `expected` takes units for independent. `shared_shuffled` and `expected_shuffled` are the same two numbers with
    shuffled labels: what they differ by has nothing to do with the groups.
    """
    by_layer: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("units"):
            by_layer.setdefault(row["layer"], []).append(row)
    found = []
    for layer, of_layer in sorted(by_layer.items()):
        for first, second in combinations(of_layer, 2):
            units = set(first["units"]), set(second["units"])
            one = overlap(*units, n_units)
            sizes = {"units_first": len(units[0]), "units_second": len(units[1])}
            of_pair = {"layer": layer, "first": first["group"], "second": second["group"], **sizes}
            by_chance = overlap(set(first["units_shuffled"]), set(second["units_shuffled"]), n_units)
            shuffled = {"shared_shuffled": by_chance.shared, "expected_shuffled": by_chance.expected}
            found.append({**of_pair, "shared": one.shared, "expected": one.expected, "p": one.p, **shuffled})
    return found


def headlines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each group: where it is read best, from which layer on nearly so, and where it dominates most."""
    found = []
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == group]
        read, dominant = _highest(mine, "auc"), _highest(mine, "silhouette")
        one: dict[str, Any] = {"group": group, "rows": mine[0]["rows"], "rows_other": mine[0]["rows_other"]}
        if read is not None:
            enough = 0.5 + _MOST_OF_IT * (read["auc"] - 0.5) if read["auc"] > 0.5 else read["auc"]
            readable = next(row["layer"] for row in mine if row.get("auc") is not None and row["auc"] >= enough)
            one |= {"auc": read["auc"], "auc_layer": read["layer"], "auc_shuffled_high": read["auc_shuffled_high"]}
            one["readable_from"] = readable
        if dominant is not None:
            one |= {"silhouette": dominant["silhouette"], "silhouette_layer": dominant["layer"]}
            one["silhouette_shuffled"] = dominant["silhouette_shuffled"]
        if (moved := _highest(mine, "moved")) is not None:
            one |= {"moved": moved["moved"], "moved_layer": moved["layer"], "moved_shuffled": moved["moved_shuffled"]}
        if any(row.get("scan_p") is not None for row in mine):
            scanned = min((row for row in mine if row.get("scan_p") is not None), key=_unlikeliness)
            names = ("scan_p", "scan_precision", "scan_recall")
            one |= {**{name: scanned[name] for name in names}, "scan_layer": scanned["layer"]}
            one |= {"n_units": len(scanned["units"]), "n_units_shuffled": len(scanned["units_shuffled"])}
        found.append(one)
    return found


def _unlikeliness(row: Mapping[str, Any]) -> tuple[float, float]:
    """Least probable by chance first; of equals, the one that finds the rows best."""
    return row["scan_p"], -(row["scan_precision"] or 0.0) * row["scan_recall"]


def _highest(rows: Iterable[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    return max((row for row in rows if row.get(name) is not None), key=lambda row: row[name], default=None)
