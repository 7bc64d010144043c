"""Compare rows with what a store already has, by key, and find those that need work."""

import pyarrow as pa
import pyarrow.compute as pc

from persona.inputs.histories import KEY, in_order, latest

CHANGES = ("new", "edited", "gone")


def behavior_changes(
    rows: pa.Table, stored: pa.Table, bucket: int, *, sync: bool = False
) -> tuple[pa.Table, dict[str, int]]:
    """The behaviors of one bucket to encode or delete, and counts. See `Store.missing`.

    Args:
        rows: Valid input (`histories.SCHEMA`), possibly with duplicate keys.
        stored: user_id, behavior_id, text_hash and timestamp of the bucket's stored behaviors.
        bucket: Their bucket.
        sync: Whether stored behaviors that are not among `rows` are `gone`.
    """
    wanted = latest(rows)
    keys, stored_keys = (key_strings(table.select(KEY)) for table in (wanted, stored))
    # A lookup in an array of strings takes a fraction of the memory of a join.
    positions = pc.index_in(keys, value_set=stored_keys)
    same = same_content(stored.select(["text_hash", "timestamp"]).take(positions), wanted)
    change = pc.if_else(positions.is_valid(), "edited", "new")
    work = wanted.append_column("change", change).filter(pc.invert(same))
    n_known = wanted.num_rows - work.num_rows
    if sync:
        gone = stored.select(KEY).filter(pc.invert(pc.is_in(stored_keys, value_set=keys)))
        gone = in_order(gone, dict.fromkeys(KEY, "ascending"))
        work = pa.concat_tables([work, _gone(gone, bucket, work.schema)])
    counts = {name: pc.sum(pc.equal(work["change"], name)).as_py() or 0 for name in CHANGES}
    return work, {"known": n_known, **counts, "duplicates": rows.num_rows - wanted.num_rows}


def same_content(one: pa.Table, other: pa.Table) -> pa.ChunkedArray:
    """For each row, whether both tables have the same text hash, not null, and the same timestamp."""
    same_time = pc.or_(
        pc.fill_null(pc.equal(one["timestamp"], other["timestamp"]), False),
        pc.and_(one["timestamp"].is_null(), other["timestamp"].is_null()),
    )
    return pc.and_(pc.fill_null(pc.equal(one["text_hash"], other["text_hash"]), False), same_time)


def persona_changes(behaviors: pa.Table, personas: pa.Table, bucket: int) -> pa.Table:
    """The users of one bucket whose persona is to be made, remade or deleted. See `Store.personas_to_make`.

    Args:
        behaviors: user_id and embedded_at of the bucket's behaviors.
        personas: user_id, n_behaviors and updated_at of its personas under one plug.
        bucket: Their bucket.
    """
    current = behaviors.group_by("user_id").aggregate([("embedded_at", "max"), ("embedded_at", "count")])
    both = current.join(personas, "user_id", join_type="full outer", use_threads=False).sort_by("user_id")
    is_new, is_gone = both["n_behaviors"].is_null(), both["embedded_at_count"].is_null()
    is_old = pc.or_(
        pc.not_equal(both["embedded_at_count"], both["n_behaviors"].cast(pa.int64())),
        pc.greater(both["embedded_at_max"], both["updated_at"]),
    )
    cases = pc.make_struct(is_new, is_gone, pc.fill_null(is_old, False))
    change = pc.case_when(cases, "new", "gone", "edited", pa.scalar(None, pa.string()))
    buckets = pa.repeat(pa.scalar(bucket, pa.int32()), both.num_rows)
    users = pa.table({"user_id": both["user_id"], "bucket": buckets, "change": change})
    return users.filter(users["change"].is_valid())


def key_strings(keys: pa.Table) -> pa.Array:
    """One string for each row of key columns, equal only for equal keys: each part is prefixed by its length."""
    parts = [keys[name].cast(pa.large_string()) for name in keys.column_names]
    sized = [part for text in parts for part in (pc.utf8_length(text).cast(pa.large_string()), text)]
    joined = pc.binary_join_element_wise(*sized, pa.scalar(":", pa.large_string()))
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def _gone(keys: pa.Table, bucket: int, schema: pa.Schema) -> pa.Table:
    """Rows of `schema` with only key, bucket and change set."""
    known = {"bucket": pa.repeat(pa.scalar(bucket, pa.int32()), keys.num_rows), "change": ["gone"] * keys.num_rows}
    columns = {**{name: keys[name] for name in keys.column_names}, **known}
    return pa.table([columns.get(f.name, pa.nulls(keys.num_rows, f.type)) for f in schema], schema=schema)
