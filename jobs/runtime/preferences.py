"""Preference pairs by user: requests with a rejected answer become a row for each user whose profile is to be made."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime.tally import Tally
from persona.profiling.options import ProfileOptions

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.profiling.pairs import Pair
    from persona.store.store import Store

_USERS_TOGETHER = 64  # per table that goes on


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which profiles to make: `model` identifies the LLM and how it reads, as in `persona.profiling.profile`."""

    options: ProfileOptions
    model: str


def users_to_profile(requests: "pa.Table", *, store: "Store", tally: Tally, wanted: Wanted) -> "Iterator[pa.Table]":
    """For `exchange.by_window`: a row for each user of a bucket whose profile is missing or out of date.

    Columns: user_id, bucket, recipe, fingerprint, change, and `pairs`, those that the profile is made from.
    """
    from persona.profiling.pairs import split
    from persona.profiling.profile import fingerprint
    from persona.store import profiles

    since = time.perf_counter()
    options = wanted.options
    bucket: int = requests["bucket"][0].as_py()
    counts: Counter[str] = Counter(users=0, pairs=0, few=0, known=0, asked=0, untimed=0, equal=0, repeated=0, later=0)
    by_user = _pairs_by_user(requests, counts)
    stored = profiles.fingerprints(store, bucket, options.name, list(by_user))
    rows: list[dict[str, Any]] = []
    for user, pairs in sorted(by_user.items()):
        counts.update(users=1, pairs=len(pairs))
        parts = split(pairs, options)
        if parts is None:
            counts["few"] += 1
            continue
        used = [*parts.used, *parts.held_out]
        print_now = fingerprint(used, options, wanted.model)
        if stored.get(user) == print_now:
            counts["known"] += 1
            continue
        counts["asked"] += 1
        change = "edited" if user in stored else "new"
        rows.append(
            {"user_id": user, "bucket": bucket, "recipe": options.name, "fingerprint": print_now, "change": change}
            | {"pairs": [vars(pair) for pair in used]}
        )
    first_user = requests["user_id"][0].as_py()
    tally.note("join", f"{bucket}/{first_user}", {**counts, "seconds": time.perf_counter() - since})
    # An empty table has the columns that later steps expect.
    for start in range(0, max(len(rows), 1), _USERS_TOGETHER):
        yield _table(rows[start : start + _USERS_TOGETHER])


def pairs_of(row: Mapping[str, Any]) -> "list[Pair]":
    """The pairs of a row of `users_to_profile`."""
    from persona.profiling.pairs import Pair

    return [Pair(**pair) for pair in row["pairs"]]


def profile_rows(users: "pa.Table", made: "Sequence[Mapping[str, Any]]", model: str) -> "pa.Table":
    """Rows of the table `profiles`, in the order of `users`; `made` has `Profile.row` of each."""
    import pyarrow as pa

    from persona.store.schema import LAYOUTS

    schema = LAYOUTS["profiles"].schema
    rows = users.select(["user_id", "bucket", "recipe", "fingerprint", "change"])
    rows = rows.append_column("model", pa.repeat(model, rows.num_rows))
    for name in schema.names:
        if name not in (*rows.column_names, "created_at"):
            values = pa.array([one[name] for one in made], schema.field(name).type)
            rows = rows.append_column(name, values)
    return rows


def _pairs_by_user(requests: "pa.Table", counts: Counter[str]) -> "dict[str, list[Pair]]":
    """The pairs of each user. Of a repeated id, the first counts; a pair needs a time and two different answers."""
    from persona.profiling.pairs import Pair

    found: dict[str, dict[str, Pair]] = defaultdict(dict)
    for row in requests.to_pylist():
        if row["as_of"] is None:
            counts["untimed"] += 1
        elif row["target"] == row["rejected"]:
            counts["equal"] += 1
        elif row["request_id"] in found[row["user_id"]]:
            counts["repeated"] += 1
        else:
            pair = Pair(**{name: row[name] for name in Pair.__dataclass_fields__})
            found[row["user_id"]][pair.request_id] = pair
    return {user: list(pairs.values()) for user, pairs in found.items() if pairs}


def _table(rows: Sequence[Mapping[str, Any]]) -> "pa.Table":
    import pyarrow as pa

    from persona.inputs.cells import TIME

    texts = [(name, pa.large_string()) for name in ("request_id", "input", "target", "rejected", "system")]
    names = [("user_id", pa.string()), ("bucket", pa.int32())]
    names += [(name, pa.string()) for name in ("recipe", "fingerprint", "change")]
    pairs = pa.list_(pa.struct([*texts, ("as_of", TIME)]))
    return pa.Table.from_pylist(list(rows), pa.schema([*names, ("pairs", pairs)]))
