"""Compare the behaviors of two stores, some buckets at a time: which only one of them has, and which differ.

Stores may have different numbers of buckets. As a user's bucket is a hash modulo that number, users whose buckets are
equal modulo the greatest common divisor are compared together.
"""

import math
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from persona.inputs.histories import KEY
from persona.store.changes import key_strings, same_content
from persona.store.store import Store
from persona.store.table import sql_in

_MAX_EXAMPLES = 100


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Counts of behaviors, and examples of those that are not the same in both stores.

    Attributes:
        missing: only in the old store; extra: only in the new one.
        differing: in both, with another text or timestamp.
        examples: some of them; user_id, behavior_id and `difference`, which is one of the three names.
    """

    old: int
    new: int
    missing: int
    extra: int
    differing: int
    examples: pa.Table

    @property
    def is_equal(self) -> bool:
        """Whether both stores have the same behaviors."""
        return not (self.missing or self.extra or self.differing)


def groups(old: Store, new: Store) -> list[int]:
    """The numbers of the groups that `compare` takes one by one."""
    return list(range(math.gcd(old.n_buckets, new.n_buckets)))


def compare(group: int, *, old: Store, new: Store) -> Comparison:
    """Compare the behaviors of one group; reads no vectors, and holds the keys of the group in memory."""
    n_groups = math.gcd(old.n_buckets, new.n_buckets)
    mine, theirs = (_keys(store, range(group, store.n_buckets, n_groups)) for store in (old, new))
    mine_keys, their_keys = (key_strings(table.select(KEY)) for table in (mine, theirs))
    positions = pc.index_in(mine_keys, value_set=their_keys)
    is_in_both = positions.is_valid()
    is_same = same_content(mine, theirs.take(positions))
    parts = {
        "missing": mine.filter(pc.invert(is_in_both)),
        "extra": theirs.filter(pc.invert(pc.is_in(their_keys, value_set=mine_keys))),
        "differing": mine.filter(pc.and_(is_in_both, pc.invert(is_same))),
    }
    named = [
        rows.select(KEY).slice(0, _MAX_EXAMPLES).append_column("difference", [[name] * min(len(rows), _MAX_EXAMPLES)])
        for name, rows in parts.items()
        if len(rows)
    ]
    schema = pa.schema([*(theirs.schema.field(name) for name in KEY), ("difference", pa.string())])
    return Comparison(
        old=len(mine),
        new=len(theirs),
        **{name: len(rows) for name, rows in parts.items()},
        examples=pa.concat_tables([table.cast(schema) for table in named]) if named else schema.empty_table(),
    )


def added(found: list[Comparison]) -> Comparison:
    """The comparison of all groups together."""
    counts = {
        name: sum(getattr(one, name) for one in found) for name in ("old", "new", "missing", "extra", "differing")
    }
    return Comparison(**counts, examples=pa.concat_tables(one.examples for one in found))


def _keys(store: Store, buckets: range) -> pa.Table:
    columns = [*KEY, "text_hash", "timestamp"]
    return store.table("behaviors").scan(columns, sql_in("bucket", list(buckets)))
