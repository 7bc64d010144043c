"""A closer look at a few requests of an evaluation: their words, what the plug listens to, and where the persona lies.

The requests are read a second time and joined with their histories once more, so that the first pass over all of them
need not carry texts to the driver.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from jobs.runtime import exchange, joining, reading, session
from jobs.runtime.tally import Tally
from jobs.runtime.texts import Texts
from persona.options import PersonaKind

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.inputs.splits import Split
    from persona.store.store import Store


def look(
    splits: "Sequence[Split]",
    ids: Sequence[str],
    users: frozenset[str],
    store: "Store",
    where: Mapping[str, Any],
    tally: Tally,
    histories: "tuple[Sequence[Split], Any] | None",
) -> dict[str, dict[str, Any]]:
    """By request id: `input`, the `behavior_id`s and `timestamp`s it sees, their `weights`, `persona_vector`.

    `persona_vector` is the bytes of float32 values; with `histories` (splits and columns) there are also the `texts`
    of what is seen, null where the histories no longer have them.
    """
    max_behaviors = where["record"].max_behaviors
    rows = reading.read(splits, _chosen, limit=None, ids=frozenset(ids), n_buckets=store.n_buckets)
    texts = None
    if histories is not None:
        use = _TextsOf(max_behaviors)
        texts = Texts(splits=histories[0], columns=histories[1], use=use, users=users)
        rows = texts.beside(rows, store.n_buckets)
    joined = exchange.by_bucket(
        rows,
        splits,
        store.n_buckets,
        joining.join_bucket,
        store=store,
        tally=tally,
        plan=joining.JoinPlan(
            job="evaluate",
            stage="look",
            personas=[PersonaKind.OWN],
            max_behaviors=max_behaviors,
            needs_target=True,
            selection=_Seen(max_behaviors),
            texts=texts,
        ),
    )
    # One process is enough for a few hundred requests, and it loads no LLM.
    looked = joined.repartition(1).map_batches(
        _look_at,  # type: ignore[arg-type]  # Ray's types know nothing of fn_kwargs
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"where": where},
    )
    tables = looked.iter_batches(batch_size=None, batch_format="pyarrow")
    return {row["request_id"]: row for table in tables for row in cast("pa.Table", table).to_pylist()}


def _chosen(split: "Split", *, ids: frozenset[str], n_buckets: int) -> Iterator["pa.Table"]:
    """The chosen requests of a split."""
    import pyarrow as pa

    from persona.inputs import requests
    from persona.inputs.reader import read_split

    for records in read_split(split, job="evaluate"):
        good, _ = requests.validate(records, n_buckets, needs_target=True)
        yield good.filter(pa.compute.is_in(good["request_id"], pa.array(sorted(ids), pa.string())))


class _TextsOf:
    """Adds the texts of what each request sees."""

    def __init__(self, max_behaviors: int) -> None:
        self.max_behaviors = max_behaviors

    def __call__(self, requests: "pa.Table", texts: "pa.Table", store: "Store", bucket: int) -> "pa.Table":
        import pyarrow as pa

        from persona.retrieval.lookup import TextLookup
        from persona.store.join import seen_rows

        seen = seen_rows(requests, store, bucket, max_behaviors=self.max_behaviors)
        lookup = TextLookup(texts)
        found = [lookup.texts(rows) for rows in seen]
        return requests.append_column("texts", pa.array(found, pa.list_(pa.large_string())))


class _Seen:
    """Adds which behaviors each request sees."""

    adds = ("behavior_id", "timestamp")

    def __init__(self, max_behaviors: int) -> None:
        self.max_behaviors = max_behaviors

    def __call__(self, joined: "pa.Table", store: "Store", bucket: int, _counts: Any) -> "pa.Table":
        """All rows, with the columns of `adds`, oldest behavior first."""
        import pyarrow as pa

        from persona.store.join import seen_rows

        seen = seen_rows(joined, store, bucket, max_behaviors=self.max_behaviors)
        for name in self.adds:
            kind = pa.string() if name == "behavior_id" else pa.timestamp("us", "UTC")
            joined = joined.append_column(name, pa.array([rows[name].to_pylist() for rows in seen], pa.list_(kind)))
        return joined


def _look_at(requests: "pa.Table", *, where: Mapping[str, Any]) -> "pa.Table":
    """Adds `weights` and `persona`."""
    import pyarrow as pa

    from persona.models import resolve as models
    from persona.plug import record as plug_record
    from persona.plug.inspection import PlugAlone

    session.quiet_models(1)
    encoder = models.resolve(where["encoder"], revision=where["record"].encoder["revision"], flag="--encoder")
    with plug_record.local_plug(where["plug"], where["fingerprint"]) as folder:
        plug = PlugAlone.load(folder, encoder)
    looks = [plug.look([row])[0] for row in requests.to_pylist()]
    requests = requests.append_column("weights", pa.array([one.weights for one in looks], pa.list_(pa.float32())))
    personas = [one.persona.astype("<f4").tobytes() for one in looks]
    return requests.append_column("persona_vector", pa.array(personas, pa.large_binary())).drop_columns(["history"])
