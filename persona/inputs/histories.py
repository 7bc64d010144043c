"""Turn raw records into behaviors, or into rejects with a reason.

Two layouts are detected: one row per behavior, and one row per user with a list of behaviors.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from persona.inputs import cells
from persona.inputs.columns import ColumnNames, check, why_absent
from persona.inputs.json_columns import decoded, is_json, json_array, kind_of
from persona.inputs.records import BadRows, Records, bad_rows, column, describe
from persona.inputs.splits import Split

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("behavior_id", pa.string()),
        ("text", pa.large_string()),
        ("timestamp", cells.TIME),
        ("bucket", pa.int32()),
        ("text_hash", pa.string()),
    ]
)
KEY = ["user_id", "behavior_id"]


@dataclass(frozen=True, kw_only=True)
class Columns(ColumnNames):
    """The columns of histories; `behaviors` is the list column if there is one row per user."""

    OPTIONAL: ClassVar = ("behavior_id", "timestamp")

    user_id: str = "user_id"
    behavior_id: str | None = "behavior_id"
    text: str = "text"
    timestamp: str | None = "timestamp"
    behaviors: str = "behaviors"


def check_columns(splits: Sequence[Split], columns: Columns, *, flag: str = "--columns") -> frozenset[str]:
    """The optional fields whose column exists in the files that can be used. Raises `InputError` as `columns.check`."""
    return check(splits, columns, partial(problem, columns=columns, flag=flag), flag=flag)


def problem(schema: pa.Schema, columns: Columns, *, flag: str = "--columns") -> str:
    """Why no row of a file with these columns is a behavior: one is missing or of another type; empty if some may be.

    For a missing column with the existing ones, and how to map them with `flag`.
    """
    items: pa.Schema | None = schema
    if columns.text not in schema.names:
        items = _item_fields(schema, _list_column(schema, columns))
    missing = None
    if columns.user_id not in schema.names:
        missing, field, nested = columns.user_id, "user_id", ""
    elif items is None:
        missing, field, nested = columns.text, "text", " (nor a list column whose items have it)"
    if missing is not None:
        there_are = f"There are: {describe(schema)}"
        return f"no column {missing!r}{nested}. {there_are}. To use one of them: {flag} {field}=COLUMN"
    wanted = {columns.text: cells.TEXT, columns.behavior_id: cells.ID, columns.timestamp: cells.TIMESTAMP}
    return cells.unfit(schema, {columns.user_id: cells.ID}) or cells.unfit(items or pa.schema([]), wanted)


def validate(records: Records, columns: Columns, n_buckets: int, *, job: str = "") -> tuple[pa.Table, pa.Table]:
    """Behaviors (`SCHEMA`) in input order, and rejects: those of `records` and those found here.

    A missing or blank `behavior_id` becomes the hash of the text. A missing timestamp stays null.
    """
    raw, bad = _behavior_rows(records.table, columns)
    absent = why_absent(records.first_schema, columns)
    read = pa.concat_tables(_read(part, columns, absent) for part in raw)
    if len(raw) > 1:
        read = read.take(pc.sort_indices(column(read, "_row")))
    reasons = column(read, "reason")
    good = read.filter(reasons.is_null()).drop_columns(["_row", "reason"]).combine_chunks()
    hashes = text_hash(column(good, "text"))
    behavior_ids = pc.if_else(cells.is_blank(column(good, "behavior_id")), hashes, column(good, "behavior_id"))
    good = (
        good.set_column(1, "behavior_id", behavior_ids)
        .append_column("bucket", pa.array(bucket_of(column(good, "user_id"), n_buckets)))
        .append_column("text_hash", hashes)
        .cast(SCHEMA)
    )
    return good, records.all_rejects(bad + bad_rows(column(read, "_row"), reasons), job=job)


def bucket_of(user_ids: pa.Array | Sequence[str], n_buckets: int) -> np.ndarray:
    """crc32(utf8(user_id)) mod `n_buckets`, int32 (N,): the partition of a user's rows in every table."""
    encoded = pa.array(user_ids, pa.string()).cast(pa.binary()).to_pylist()
    checksums = np.fromiter((zlib.crc32(user) for user in encoded), dtype=np.uint32, count=len(encoded))
    return (checksums % np.uint32(n_buckets)).astype(np.int32)


def text_hash(texts: pa.Array | Sequence[str]) -> pa.Array:
    """The BLAKE2b-128 digest of each text in UTF-8, in hex. It tells whether a stored vector is still up to date."""
    encoded = pa.array(texts, pa.large_string()).cast(pa.large_binary()).to_pylist()
    return pa.array([hashlib.blake2b(text, digest_size=16).hexdigest() for text in encoded], pa.string())


def latest(behaviors: pa.Table) -> pa.Table:
    """One row per key: the latest one and, at equal times, the one with the greatest text hash."""
    order = {**dict.fromkeys(KEY, "ascending"), "timestamp": "descending", "text_hash": "descending"}
    rows = in_order(behaviors, order)
    if rows.num_rows < 2:
        return rows
    differs = reduce(pc.or_, (pc.not_equal(rows[c].slice(1), rows[c].slice(0, rows.num_rows - 1)) for c in KEY))
    return rows.filter(pa.chunked_array([pa.array([True]), *differs.chunks]))


def in_order(rows: pa.Table, order: Mapping[str, str]) -> pa.Table:
    """Rows sorted by columns, each `ascending` or `descending`, nulls last."""
    return rows.take(pc.sort_indices(rows.select(list(order)), sort_keys=[(*key, "at_end") for key in order.items()]))


_FIELDS = ("behavior_id", "text", "timestamp")


def _read(raw: pa.Table, columns: Columns, absent: Mapping[str, str]) -> pa.Table:
    """Typed cells and `_row`, with the first `reason` why a row is bad (null if it is good)."""
    users, why_user = cells.ids(column(raw, "user_id"), columns.user_id)
    behavior_ids, why_id = cells.ids(column(raw, "behavior_id"), str(columns.behavior_id), required=False)
    texts, why_text = cells.texts(column(raw, "text"), columns.text)
    times, why_time = cells.timestamps(column(raw, "timestamp"), str(columns.timestamp), columns.timestamp_unit)
    reason = pc.coalesce(why_user, why_id, why_text, why_time)
    read = {"user_id": users, "behavior_id": behavior_ids, "text": texts, "timestamp": times}
    reason = pc.coalesce(reason, cells.why_null(read, absent))
    return pa.table({**read, "_row": column(raw, "_row").cast(pa.int64()), "reason": reason})


def _behavior_rows(table: pa.Table, columns: Columns) -> tuple[list[pa.Table], BadRows]:
    """Raw `user_id`, `_row` and `_FIELDS` with one row per behavior: a table for each layout found."""
    if columns.text not in table.column_names:
        unnested, bad = _unnest(table, columns)
        return [unnested], bad
    if columns.behaviors in table.column_names and _item_fields(table.schema, columns.behaviors) is not None:
        has_list = pc.and_(column(table, columns.text).is_null(), column(table, columns.behaviors).is_valid())
        if pc.any(has_list).as_py():  # a file with both layouts: decide row by row
            unnested, bad = _unnest(table.filter(has_list), columns)
            return [_flat(table.filter(pc.invert(has_list)), columns), unnested], bad
    return [_flat(table, columns)], []


def _flat(table: pa.Table, columns: Columns) -> pa.Table:
    fields = {field: column(table, getattr(columns, field)) for field in _FIELDS}
    return pa.table({"user_id": column(table, columns.user_id), "_row": column(table, "_row"), **fields})


def _unnest(table: pa.Table, columns: Columns) -> tuple[pa.Table, BadRows]:
    """One row per item of the list column; rows and items that are not behaviors are bad."""
    users, rows = column(table, columns.user_id), column(table, "_row")
    name = _list_column(table.schema, columns)
    if name is None:
        reason = f"there is neither {columns.text!r} nor a list of behaviors"
        return _no_behaviors(), [(row, reason) for row in rows.to_pylist()]
    lists = column(table, name)
    bad: BadRows = []
    if is_json(lists.type):
        owners, parts, bad = _parsed_items(lists, rows, columns)
    elif types.is_null(lists.type) or (fields := _item_fields(table.schema, name)) is None:
        if _is_list(lists.type):
            reason = f"an item of {name} is {lists.type.value_type}, not an object"
            return _no_behaviors(), [(row, reason) for row in rows.take(pc.list_parent_indices(lists)).to_pylist()]
        reason = f"{name} is {lists.type}, not a list of behaviors"
        return _no_behaviors(), [(row, reason) for row in rows.filter(lists.is_valid()).to_pylist()]
    else:
        owners, items = pc.list_parent_indices(lists), pc.list_flatten(lists)
        parts = {
            field: pc.struct_field(items, part) if part in fields.names else pa.nulls(len(items))
            for field, part in ((field, getattr(columns, field)) for field in _FIELDS)
        }
    return pa.table({"user_id": users.take(owners), "_row": rows.take(owners), **parts}), bad


def _parsed_items(lists: pa.Array, rows: pa.Array, columns: Columns) -> tuple[pa.Array, dict[str, pa.Array], BadRows]:
    """The items of JSON lists without a common type: the index of each item's list, and its fields."""
    owners: list[int] = []
    items: list[dict[str, object]] = []
    bad: BadRows = []
    for owner, (row, value) in enumerate(zip(rows.to_pylist(), decoded(lists), strict=True)):
        if value is not None and not isinstance(value, list):
            bad.append((row, f"{columns.behaviors} is {kind_of(value)}, not a list"))
            continue
        for item in value or []:
            if isinstance(item, dict):
                owners.append(owner)
                items.append(item)
            else:
                bad.append((row, f"an item of {columns.behaviors} is {kind_of(item)}, not an object"))
    parts = {field: json_array([item.get(getattr(columns, field)) for item in items]) for field in _FIELDS}
    return pa.array(owners, pa.int64()), parts, bad


def _list_column(schema: pa.Schema, columns: Columns) -> str | None:
    """The column with a user's behaviors: the one of that name, or else the first list of structs with a text."""
    if columns.behaviors in schema.names:
        return columns.behaviors
    others = {columns.user_id, columns.behavior_id, columns.timestamp}
    names = (field.name for field in schema if field.name not in others)
    return next((name for name in names if columns.text in getattr(_item_fields(schema, name), "names", ())), None)


def _item_fields(schema: pa.Schema, name: str | None) -> pa.Schema | None:
    """The fields of a list column's items; empty if JSON does not determine them, None if they are not structs."""
    kind = None if name is None else schema.field(name).type
    if kind is None:
        return None
    if is_json(kind) or types.is_null(kind):
        return pa.schema([])
    if _is_list(kind) and types.is_null(kind.value_type):
        return pa.schema([])
    return pa.schema(list(kind.value_type)) if _is_list(kind) and types.is_struct(kind.value_type) else None


def _is_list(kind: pa.DataType) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _no_behaviors() -> pa.Table:
    return pa.table({name: pa.nulls(0) for name in ("user_id", "_row", *_FIELDS)})
