"""A closer look at a few requests of an evaluation: their texts, what the plug attends to, and the users' personas.

These requests are read and joined with their histories a second time, so that the first pass over all requests need not
bring texts to the driver.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from jobs.runtime import exchange, joining, plugs, session
from jobs.runtime.inputs import Histories, Requests
from jobs.runtime.plugs import PlugRef
from jobs.runtime.reading import SplitFound
from jobs.runtime.tally import Tally
from jobs.runtime.texts import Texts
from persona.options import PersonaKind

if TYPE_CHECKING:
    import pyarrow as pa

    from jobs.runtime.losses import Losses
    from persona.evaluation.one_run import Answers
    from persona.inputs.requests import Columns
    from persona.inputs.splits import Split
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class InspectionInputs:
    """Where requests, behaviors, plug and texts are; without `histories` no texts are read. `out` takes run files."""

    requests: Requests
    store: "Store"
    plug: PlugRef
    histories: Histories | None
    out: str


def report_parts(
    inputs: InspectionInputs, losses: "Losses", personas: Sequence[str], answers: "Answers", tally: Tally
) -> dict[str, Any]:
    """The parts of `metrics.json` that show single requests and users."""
    import numpy as np

    from persona.evaluation import examples

    chosen = examples.choose(losses, personas)
    user_of = dict(zip(losses["request_id"], losses["user_id"], strict=True))
    ids = sorted({*chosen.examples, *chosen.mapped})
    found = _inspect(inputs, ids, frozenset(user_of[one] for one in ids), tally)

    def example(request_id: str) -> dict[str, Any]:
        seen = found[request_id]
        one = examples.example(losses, personas, answers, request_id, seen["input"])
        return {**one, "listened_to": examples.heaviest_behaviors(seen)}

    # All users without a behavior have the same persona.
    mapped = [request_id for request_id in chosen.mapped if found[request_id]["n_behaviors"]]
    vectors_UF = np.array([np.frombuffer(found[one]["persona_vector"], "<f4") for one in mapped])
    users = [user_of[request_id] for request_id in mapped]
    return {
        "examples": [example(one) for one in chosen.even],
        "largest_gains": [example(one) for one in chosen.largest_gains],
        "largest_losses": [example(one) for one in chosen.largest_losses],
        "map": examples.persona_map(vectors_UF, users, losses, personas),
    }


def _inspect(
    inputs: InspectionInputs, ids: Sequence[str], users: frozenset[str], tally: Tally
) -> dict[str, Mapping[str, Any]]:
    """Rows by request id: `input`, and the `behavior_id`s, `timestamp`s and `weights` of the visible behaviors.

    Also `persona_vector`, the bytes of float32 values, and with histories the `texts` of the visible behaviors, null
    where the histories no longer have them.
    """
    store, max_behaviors = inputs.store, inputs.plug.record.max_behaviors
    read = _Chosen(
        columns=inputs.requests.columns,
        needs_as_of=inputs.requests.needs_as_of,
        ids=frozenset(ids),
        n_buckets=store.n_buckets,
    )
    texts = None
    if inputs.histories is not None:
        texts = Texts(histories=inputs.histories, use=_AddTexts(max_behaviors), users=users)
    plan = joining.JoinPlan(
        job="evaluate",
        stage="inspect",
        personas=[PersonaKind.OWN],
        max_behaviors=max_behaviors,
        needs_target=True,
        selection=_AddVisible(max_behaviors),
        texts=texts,
    )
    source = exchange.Source(splits=inputs.requests.splits, read=read)
    with exchange.run_files(inputs.out, "inspect") as folder:
        joined = joining.join(source, store, tally, plan, folder=folder).rows
        # A single process suffices for a few hundred requests without an LLM.
        inspected = joined.repartition(1).map_batches(
            _add_weights_and_persona,  # type: ignore[arg-type]  # Ray's types do not cover fn_kwargs
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"plug": inputs.plug},
        )
        tables = inspected.iter_batches(batch_size=None, batch_format="pyarrow")
        return {row["request_id"]: row for table in tables for row in cast("pa.Table", table).to_pylist()}


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Reads the chosen requests of splits."""

    columns: "Columns"
    needs_as_of: bool
    ids: frozenset[str]
    n_buckets: int

    def __call__(self, split: "Split", found: SplitFound, limit: int | None) -> Iterator["pa.Table"]:
        del found, limit
        import pyarrow as pa

        from persona.inputs import requests
        from persona.inputs.reader import read_split

        chosen = pa.array(sorted(self.ids), pa.string())
        problem = partial(requests.problem, columns=self.columns, needs_target=True)
        for records in read_split(split, job="evaluate", max_row_mb=self.columns.max_row_mb, problem=problem):
            good, _ = requests.validate(
                records,
                self.n_buckets,
                needs_target=True,
                blank_targets=True,
                columns=self.columns,
                needs_as_of=self.needs_as_of,
            )
            yield good.filter(pa.compute.is_in(good["request_id"], chosen))


class _AddTexts:
    """Adds the texts of the behaviors that each request sees."""

    def __init__(self, max_behaviors: int) -> None:
        self.max_behaviors = max_behaviors

    def __call__(self, requests: "pa.Table", texts: "pa.Table", store: "Store", bucket: int) -> "pa.Table":
        import pyarrow as pa

        from persona.retrieval.lookup import TextLookup
        from persona.store.join import seen_rows

        visible = seen_rows(requests, store, bucket, max_behaviors=self.max_behaviors)
        lookup = TextLookup(texts)
        found = [lookup.texts(rows) for rows in visible]
        return requests.append_column("texts", pa.array(found, pa.list_(pa.large_string())))


class _AddVisible:
    """Selects all requests, and adds which behaviors each one sees."""

    adds = ("behavior_id", "timestamp")

    def __init__(self, max_behaviors: int) -> None:
        self.max_behaviors = max_behaviors

    def __call__(self, joined: "pa.Table", store: "Store", bucket: int, counts: dict[str, float]) -> "pa.Table":
        """All rows with the columns of `adds`, oldest behavior first."""
        del counts
        import pyarrow as pa

        from persona.store.join import seen_rows

        visible = seen_rows(joined, store, bucket, max_behaviors=self.max_behaviors)
        for name in self.adds:
            kind = pa.string() if name == "behavior_id" else pa.timestamp("us", "UTC")
            joined = joined.append_column(name, pa.array([rows[name].to_pylist() for rows in visible], pa.list_(kind)))
        return joined


def _add_weights_and_persona(requests: "pa.Table", *, plug: PlugRef) -> "pa.Table":
    """Adds `weights` and `persona_vector`; drops the vectors of the history."""
    import pyarrow as pa

    session.quiet_models(1)
    model = plugs.load_without_llm(plug)
    found = [model.look([row])[0] for row in requests.to_pylist()]
    requests = requests.append_column("weights", pa.array([one.weights for one in found], pa.list_(pa.float32())))
    personas = [one.persona.astype("<f4").tobytes() for one in found]
    return requests.append_column("persona_vector", pa.array(personas, pa.large_binary())).drop_columns(["history"])
