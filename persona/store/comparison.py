"""Compare the behaviors of two stores, some buckets at a time: which only one of them has, and which differ.

Stores may have different numbers of buckets. As a user's bucket is a hash modulo that number, users whose buckets are
equal modulo the greatest common divisor are compared together.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from persona.inputs.histories import KEY
from persona.store.changes import key_strings, same_content
from persona.store.store import Store

_MAX_EXAMPLES = 1000
_DIFFERENCES = ("missing", "extra", "differing")
_EXAMPLES = pa.schema([*((name, pa.string()) for name in KEY), ("difference", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Counts of behaviors, and examples of those that are not the same in both stores.

    Attributes:
        missing: only in the old store; extra: only in the new one.
        differing: in both, with another text or timestamp.
        examples: up to 1,000 of each; user_id, behavior_id and `difference`, which is one of the three names.
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
    examples = pa.concat_tables(_examples(rows, name) for name, rows in parts.items())
    counts = {name: rows.num_rows for name, rows in parts.items()}
    return Comparison(old=mine.num_rows, new=theirs.num_rows, **counts, examples=examples)


def added(found: Iterable[Comparison]) -> Comparison:
    """The comparison of all groups together; holds the examples of one group at a time and their sum."""
    counts: Counter[str] = Counter()
    examples = _EXAMPLES.empty_table()
    for one in found:
        counts.update({name: getattr(one, name) for name in ("old", "new", *_DIFFERENCES)})
        both = pa.concat_tables([examples, one.examples])
        examples = pa.concat_tables(
            both.filter(pc.equal(both["difference"], name)).slice(0, _MAX_EXAMPLES) for name in _DIFFERENCES
        )
    return Comparison(**{name: counts[name] for name in ("old", "new", *_DIFFERENCES)}, examples=examples)


def _examples(rows: pa.Table, difference: str) -> pa.Table:
    some = rows.select(KEY).slice(0, _MAX_EXAMPLES)
    return some.append_column("difference", pa.repeat(difference, some.num_rows)).cast(_EXAMPLES)


def _keys(store: Store, buckets: range) -> pa.Table:
    columns = [*KEY, "text_hash", "timestamp"]
    return store.table("behaviors").read(columns, partitions=buckets)
