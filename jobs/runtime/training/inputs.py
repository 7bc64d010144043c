"""The requests of a training run: joined with their histories, split by user, and sorted for the windows of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime import exchange, joining, retrieval
from jobs.runtime.inputs import Histories, Requests
from jobs.runtime.reading import Found
from jobs.runtime.reference import Reference
from jobs.runtime.tally import Tally
from jobs.runtime.training import windows
from persona.errors import InputError
from persona.options import PersonaKind

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from jobs.runtime.training.spec import RunSpec
    from persona.models.prompts import PromptTokenizer
    from persona.models.resolve import ModelFolder
    from persona.store.store import Store

_DRAWS = 2**31 - 1
# A sort makes as many objects as the square of this number of blocks, which the driver owns.
_SORTED_BYTES = 2**26
# A window is gathered from small blocks, since other nodes fetch blocks as a whole.
_BLOCK_ROWS = 1024
# Columns on which the memory of a training pass depends.
_SIZED = ("input", "query", "target", "system", "rejected", "retrieved", "n_behaviors")


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What a run reads and where it writes, found and checked before Ray starts.

    Attributes:
        tokenizer: of the LLM; it writes the prompts.
        requests, validation: what to train on; `validation` is None when it is taken from `requests`.
        histories: the texts for retrieval, if any.
        reference: the losses without the plug for the preference loss, if there is one.
        runs, plug: URIs of the folders for checkpoints and for the plug.
    """

    store: "Store"
    encoder: "ModelFolder"
    llm: "ModelFolder"
    tokenizer: "PromptTokenizer"
    requests: Requests
    validation: Requests | None
    histories: Histories | None
    reference: Reference | None
    runs: str
    plug: str

    def validation_rows(self) -> list[tuple[str, str]]:
        """The rows of a summary about what --validation lacks."""
        rows = self.validation.rows() if self.validation is not None else []
        return [(f"{name} in validation", text) for name, text in rows]


def prompt_example(spec: "RunSpec", inputs: TrainingInputs) -> str:
    """What the LLM reads for a request."""
    return inputs.tokenizer.example(n_soft=spec.plug_options.n_soft, retrieved=bool(spec.retrieval.retrieve))


@dataclass(frozen=True, kw_only=True)
class TrainingRequests:
    """Requests in Ray's object store, and what was found in their files.

    Attributes:
        store: a snapshot of the behaviors that the requests see.
        train: without vectors, sorted by bucket and user.
        held_out: with their histories, and another user's.
    """

    store: "Store"
    train: "Dataset"
    held_out: "Dataset"
    found: Found
    n_train: int
    n_held_out: int

    def check(self, *, global_batch: int, n_workers: int) -> None:
        """Raises InputError when there are too few requests for one step, or for validation on every worker."""
        if self.n_train < global_batch:
            raise InputError(
                f"--requests gives {self.n_train:,} requests with target to train on, fewer than --global-batch "
                f"{global_batch}; give more requests, or a lower --global-batch"
            )
        if self.n_held_out < n_workers:
            raise InputError(
                f"{self.n_held_out} held-out requests are too few for {n_workers} workers; give more with --validation"
            )


def join_and_split(spec: "RunSpec", inputs: TrainingInputs, behaviors_version: int, tally: Tally) -> TrainingRequests:
    """Joins the requests with the histories at a version of the behaviors, once for all epochs."""
    with exchange.run_files(inputs.runs, f"train-{spec.run}") as folder:
        return _join_and_split(spec, inputs, behaviors_version, tally, folder)


def _join_and_split(
    spec: "RunSpec", inputs: TrainingInputs, behaviors_version: int, tally: Tally, folder: str
) -> TrainingRequests:
    store = inputs.store.at(behaviors=behaviors_version).snapshot("behaviors")
    retrieval_spec = retrieval.RetrievalSpec(
        options=spec.retrieval,
        histories=inputs.histories,
        encoder=inputs.encoder.name,
        query_prompt=spec.query_prompt,
        max_query_tokens=spec.max_query_tokens,
        max_behaviors=spec.max_behaviors,
    )

    def joined(requests: Requests, held_out: str = "", limit: int | None = None) -> joining.Joined:
        plan = joining.JoinPlan(
            job="train",
            personas=[PersonaKind.OWN],
            max_behaviors=spec.max_behaviors,
            needs_target=True,
            rejected=spec.preferences.rejected,
            reference=inputs.reference,
            limit=limit,
            texts=retrieval.best_of(retrieval_spec, tally, stage=f"texts{held_out}"),
            stage=f"join{held_out}",
            with_vectors=False,
        )
        return joining.requests_with_histories(requests, store, tally, plan, folder=folder)

    requests = joined(inputs.requests, limit=spec.limit)
    train, found = requests.rows.materialize(), requests.found
    n_bytes = train.size_bytes()
    if inputs.validation is not None:
        validation = joined(inputs.validation, " held out")
        held_out, found = validation.rows, found + validation.found
    else:
        held_out = _mapped(train, _users, fraction=spec.validation_fraction, held_out=True)
        train = _mapped(train, _users, fraction=spec.validation_fraction, held_out=False)
    # Sorted by a fixed draw, so that a resumed run validates on the same rows.
    drawn = _mapped(held_out, _drawn).sort("draw").limit(spec.validation_rows)
    drawn = _mapped(drawn, _with_history, store=store, max_behaviors=spec.max_behaviors)
    if spec.training.empty_history < 1:  # prompt tuning sees no history
        drawn = _mapped(drawn, with_other_history, store=store, max_behaviors=spec.max_behaviors)
    drawn = drawn.materialize()
    train = _sorted(train, n_blocks=max(1, n_bytes // _SORTED_BYTES))
    return TrainingRequests(
        store=store, train=train, held_out=drawn, found=found, n_train=train.count(), n_held_out=drawn.count()
    )


def _sorted(requests: "Dataset", *, n_blocks: int) -> "Dataset":
    """The requests in an order that does not depend on how they arrive, in small blocks."""
    in_order = requests.repartition(n_blocks).sort(["bucket", "user_id", "request_id"])
    in_order.context.execution_options.preserve_order = True
    return in_order.repartition(target_num_rows_per_block=_BLOCK_ROWS).materialize()


def run_windows(requests: TrainingRequests, spec: "RunSpec", tally: Tally, *, n_workers: int) -> windows.Windows:
    """The steps of the run, with vectors that are read when their window comes up."""
    from persona.training.order import RunOrder

    options = spec.training
    blocks = windows.RequestBlocks.of(requests.train.to_arrow_refs(), requests.store.identity.width)
    order = RunOrder(
        pieces=blocks.pieces, n_epochs=options.epochs, seed=options.seed, global_batch=options.global_batch
    )
    settings = windows.FillSettings(
        store=requests.store,
        max_behaviors=spec.max_behaviors,
        seed=options.seed,
        global_batch=options.global_batch,
        n_workers=n_workers,
        tally=tally,
    )
    return windows.Windows.start(order, blocks, settings)


def some_behaviors(requests: TrainingRequests, max_behaviors: int, n_drawn: int = 128) -> bytes:
    """Vectors of behaviors that about `n_drawn` training requests see; always the same ones."""
    store = requests.store
    drawn = _mapped(requests.train, _share, share=n_drawn / requests.n_train)
    with_history = _mapped(drawn, _with_history, store=store, max_behaviors=max_behaviors)
    found = _mapped(with_history, _some_vectors, width=store.identity.width).take_all()
    return b"".join(row["vectors"] for row in sorted(found, key=lambda row: row["request_id"]))


def longest_request(requests: TrainingRequests, max_behaviors: int) -> dict[str, Any]:
    """The longest value of each text column of the training requests, and the most behaviors that one sees."""
    import pyarrow as pa
    import ray

    parts = ray.get(_mapped(requests.train, longest_values).to_arrow_refs())
    [longest] = longest_values(pa.concat_tables([part for part in parts if part.num_rows])).to_pylist()
    return {**longest, "n_behaviors": min(longest["n_behaviors"], max_behaviors)}


def longest_values(rows: "pa.Table") -> "pa.Table":
    """One row of the longest value (in bytes) of each column that makes a pass larger; no row of no rows."""
    import pyarrow as pa

    found = rows.select([name for name in _SIZED if name in rows.column_names])
    longest = (max(column.to_pylist(), key=_size, default=None) for column in found)
    columns = [pa.array([one][: rows.num_rows], field.type) for one, field in zip(longest, found.schema, strict=True)]
    return pa.table(columns, schema=found.schema)


def _size(value: Any) -> int:
    """Bytes of a text or of texts; a number is its own size."""
    if isinstance(value, str):
        return len(value.encode())
    return value if isinstance(value, int) else sum(map(_size, value or ()))


def _mapped(rows: "Dataset", function: Callable[..., Any], **arguments: Any) -> "Dataset":
    return rows.map_batches(function, batch_size=None, batch_format="pyarrow", fn_kwargs=arguments)


def _users(rows: "pa.Table", *, fraction: float, held_out: bool) -> "pa.Table":
    """The rows of held-out users, or of the others; all rows of a user are on one side."""
    import pyarrow as pa

    from persona.inputs.histories import bucket_of

    share = bucket_of([f"held out {user}" for user in rows["user_id"].to_pylist()], 10_000)
    return rows.filter(pa.array((share < fraction * 10_000) == held_out))


def _drawn(rows: "pa.Table") -> "pa.Table":
    """Adds the column `draw`: a number that is random, but fixed for a request."""
    import pyarrow as pa

    from persona.inputs.histories import bucket_of

    draw = bucket_of([f"draw {request}" for request in rows["request_id"].to_pylist()], _DRAWS)
    return rows.append_column("draw", pa.array(draw))


def _share(rows: "pa.Table", *, share: float) -> "pa.Table":
    """A random share of the requests; the choice of a request depends on nothing else."""
    import pyarrow as pa

    return rows.filter(pa.array(_drawn(rows)["draw"].to_numpy() < share * _DRAWS))


def _with_history(rows: "pa.Table", *, store: "Store", max_behaviors: int) -> "pa.Table":
    """Adds the column `history` to requests of any buckets."""
    from persona.store.join import Histories, with_vectors

    sources = list(zip(rows["bucket"].to_pylist(), rows["user_id"].to_pylist(), strict=True))
    histories = Histories.read(store, sources, with_vectors=True)
    return with_vectors(rows, sources, histories, max_behaviors=max_behaviors)


def with_other_history(rows: "pa.Table", *, store: "Store", max_behaviors: int) -> "pa.Table":
    """Adds the column `other_history` to requests of any buckets: what they see under the persona `other`."""
    from persona.store.join import Histories, Source, sources, with_vectors

    places = list(zip(rows["bucket"].to_pylist(), rows["request_id"].to_pylist(), strict=True))
    found: dict[tuple[int, str], Source | None] = {}
    for bucket in sorted({bucket for bucket, _ in places}):
        numbers = [number for number, (of_row, _) in enumerate(places) if of_row == bucket]
        of_bucket = sources(rows.take(numbers), store, bucket, PersonaKind.OTHER)
        found |= zip((places[number] for number in numbers), of_bucket, strict=True)
    others = [found[place] for place in places]
    histories = Histories.read(store, others, with_vectors=True)
    seen = with_vectors(rows.drop_columns(["history"]), others, histories, max_behaviors=max_behaviors)
    return rows.append_column("other_history", seen["history"])


def _some_vectors(rows: "pa.Table", *, width: int, at_most: int = 8) -> "pa.Table":
    """For each request: some vectors of the history, evenly spaced."""
    import numpy as np
    import pyarrow as pa

    from persona.store import vectors

    some = []
    for history in rows["history"].to_pylist():
        seen_Nd = vectors.from_bytes(history, width)
        spaced = np.linspace(0, len(seen_Nd) - 1, min(len(seen_Nd), at_most)).astype(int)
        some.append(vectors.to_bytes(seen_Nd[spaced]))
    return rows.select(["request_id"]).append_column("vectors", pa.array(some, pa.binary()))
