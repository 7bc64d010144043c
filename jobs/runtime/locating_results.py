"""The files that jobs.locate leaves, from the results of its tasks: tables, JSON, a page and the summary."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.runtime import cli
from jobs.runtime.locating_analysis import Analysis, rows_of_layers, runs_of

if TYPE_CHECKING:
    import pyarrow as pa

RESULT = "locate.json"
_FILES = ("layers.parquet", "scan.parquet", "overlaps.parquet", "locate.html", RESULT)


def finished(out: str, fingerprint: str) -> dict[str, Any] | None:
    """The content of `locate.json` if this very work is done, else None."""
    from persona import storage

    if not all(storage.exists(storage.join(out, name)) for name in _FILES):
        return None
    found: dict[str, Any] = json.loads(storage.read_bytes(storage.join(out, RESULT)))
    return found if found.get("fingerprint") == fingerprint else None


def write(out: str, analysis: Analysis, about: Mapping[str, Any], *, width: int) -> dict[str, Any]:
    """Write all files; returns the content of `locate.json`, which is written last. `about` becomes a part of it."""
    import pyarrow.parquet as pq

    from persona import storage
    from persona.locating import findings
    from persona.report.pages import locating_page

    rows: list[dict[str, Any]] = []
    with (
        storage.write_file(storage.join(out, "scan.parquet")) as path,
        pq.ParquetWriter(path, findings.SCAN, compression="zstd") as file,
    ):
        # One layer at a time: the units of all runs may be many.
        for one, row in rows_of_layers(analysis):
            if (runs := runs_of(analysis, one)) is not None:
                file.write_table(findings.scan_rows(row["group"], one.layer, runs))
                rows.append({**row, **findings.scan_summary(runs, width)})
            else:
                rows.append(row)
    overlaps = findings.overlaps(rows, width)
    _write_table(storage.join(out, "layers.parquet"), rows, findings.LAYERS)
    _write_table(storage.join(out, "overlaps.parquet"), overlaps, findings.OVERLAPS)
    printed = [_with_numbers_of_units(row) for row in rows]
    found: dict[str, Any] = cli.plain(
        {**about, "width": width, "groups": findings.headlines(rows), "layers": printed, "overlaps": overlaps}
    )
    storage.write_bytes(storage.join(out, "locate.html"), locating_page(found))
    storage.write_bytes(storage.join(out, RESULT), (json.dumps(found, indent=2, allow_nan=False) + "\n").encode())
    return found


def table(found: Mapping[str, Any], out: str) -> list[Sequence[str]]:
    """The rows of the summary."""
    from persona import storage
    from persona.report.layer_wording import group_reading

    lines = [(one["group"], " ".join(group_reading(one))) for one in found["groups"]]
    return [
        *lines,
        ("layers", storage.join(out, "layers.parquet")),
        ("page", storage.join(out, "locate.html")),
    ]


def printed(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON line has: everything but the rows of the tables."""
    return {name: value for name, value in found.items() if name not in ("layers", "overlaps")}


def _write_table(uri: str, rows: Sequence[Mapping[str, Any]], schema: "pa.Schema") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from persona import storage

    with storage.write_file(uri) as path:
        pq.write_table(pa.Table.from_pylist([*rows], schema=schema), path)


def _with_numbers_of_units(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `n_units` in place of `units`, and so for those of shuffled labels."""
    lists = ("units", "units_shuffled")
    numbers = {f"n_{name}": len(row[name]) if name in row else None for name in lists}
    return {**{name: value for name, value in row.items() if name not in lists}, **numbers}
