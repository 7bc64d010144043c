"""Compare rows with what a store already has, by key, and find those that need work."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from persona.inputs.histories import KEY, in_order, latest
from persona.inputs.place import places
from persona.store import key_index
from persona.store.stored_keys import StoredKeys

CHANGES = ("new", "edited", "gone")


def behavior_changes(
    rows: pa.Table,
    stored: StoredKeys,
    bucket: int,
    n_buckets: int,
    *,
    absent: tuple[int, int] | None = None,
    keeps_later: bool = False,
) -> tuple[pa.Table, dict[str, int]]:
    """The behaviors of a window to encode or delete, and counts. See `Store.missing`.

    Args:
        rows: Valid input (`histories.SCHEMA`) of one bucket, possibly with duplicate keys.
        stored: What the store has in the bucket.
        bucket: The bucket.
        n_buckets: The number of buckets of the store.
        absent: The range of places in which stored behaviors that are not among `rows` are `gone`.
        keeps_later: Whether a stored behavior that is later than the given one stays.
    """
    wanted = latest(rows)
    work = wanted.append_column("change", pa.repeat("new", wanted.num_rows))
    n_read = 0
    if len(stored):
        given = key_index.entries(wanted)
        near = _near(stored, places(wanted, n_buckets))
        positions = pc.index_in(given["digest"], value_set=_digests(near))
        of_same_key = near.entries.take(positions)
        is_known = same_content(of_same_key, given)
        if keeps_later:
            is_known = pc.or_(is_known, _is_later(of_same_key, given))
        change = pc.if_else(positions.is_valid(), "edited", "new")
        work = wanted.append_column("change", change).filter(pc.invert(is_known))
        if absent is not None:
            here = stored.between(*absent)
            is_gone = pc.invert(pc.is_in(_digests(here), value_set=given["digest"].combine_chunks()))
            keys, n_read = here.keys(is_gone.to_numpy(zero_copy_only=False))
            gone = in_order(keys, dict.fromkeys(KEY, "ascending"))
            work = pa.concat_tables([work, _gone(gone, bucket, work.schema)])
    counts = {name: pc.sum(pc.equal(work["change"], name)).as_py() or 0 for name in CHANGES}
    n_known = wanted.num_rows - counts["new"] - counts["edited"]
    counts = {"known": n_known, **counts, "duplicates": rows.num_rows - wanted.num_rows, "store_bytes": n_read}
    return work, counts


def _near(stored: StoredKeys, places_N: np.ndarray) -> StoredKeys:
    """The stored behaviors among which those with these places are."""
    return stored.between(int(places_N.min()), int(places_N.max()) + 1) if len(places_N) else stored.between(0, 0)


def _digests(stored: StoredKeys) -> pa.Array:
    return pa.concat_arrays([pa.array([], pa.binary(16)), *stored.entries["digest"].chunks])


def _is_later(one: pa.Table, other: pa.Table) -> pa.ChunkedArray:
    """For each row, whether the first table's is the later one, as `histories.latest` decides; False without one."""
    is_later = pc.or_(
        pc.fill_null(pc.greater(one["timestamp"], other["timestamp"]), False),
        pc.and_(one["timestamp"].is_valid(), other["timestamp"].is_null()),
    )
    hashes = (table["text_hash"].cast(pa.binary()) for table in (one, other))
    is_greater = pc.fill_null(pc.greater(*hashes), False)
    return pc.or_(is_later, pc.and_(_is_same_time(one, other), is_greater))


def same_content(one: pa.Table, other: pa.Table) -> pa.ChunkedArray:
    """For each row, whether both tables have the same text hash, not null, and the same timestamp."""
    is_same_text = pc.fill_null(pc.equal(one["text_hash"], other["text_hash"]), False)
    return pc.and_(is_same_text, _is_same_time(one, other))


def _is_same_time(one: pa.Table, other: pa.Table) -> pa.ChunkedArray:
    return pc.or_(
        pc.fill_null(pc.equal(one["timestamp"], other["timestamp"]), False),
        pc.and_(one["timestamp"].is_null(), other["timestamp"].is_null()),
    )


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
