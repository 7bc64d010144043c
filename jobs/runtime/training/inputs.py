"""The requests of a training run: joined with their histories, split by user, and ordered for each epoch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime import exchange, joining, retrieval
from jobs.runtime.inputs import Histories, Requests
from jobs.runtime.reading import Found
from jobs.runtime.tally import Tally
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


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What a run reads and where it writes, found and checked before Ray starts.

    Attributes:
        tokenizer: of the LLM; it writes the prompts.
        requests, validation: what to train on; `validation` is None when it is taken from `requests`.
        histories: the texts for retrieval, if any.
        runs, plug: URIs of the folders for checkpoints and for the plug.
    """

    store: "Store"
    encoder: "ModelFolder"
    llm: "ModelFolder"
    tokenizer: "PromptTokenizer"
    requests: Requests
    validation: Requests | None
    histories: Histories | None
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
    """Requests with their histories, in Ray's object store, and what was found in their files."""

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
                f"{global_batch}"
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
    store = inputs.store.at(behaviors=behaviors_version)
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
            limit=limit,
            texts=retrieval.best_of(retrieval_spec, tally, stage=f"texts{held_out}"),
            stage=f"join{held_out}",
        )
        return joining.requests_with_histories(requests, store, tally, plan, folder=folder)

    requests = joined(inputs.requests, limit=spec.limit)
    train, found = requests.rows.materialize(), requests.found
    if inputs.validation is not None:
        validation = joined(inputs.validation, " held out")
        held_out, found = validation.rows, found + validation.found
    else:
        held_out = _mapped(train, _users, fraction=spec.validation_fraction, held_out=True)
        train = _mapped(train, _users, fraction=spec.validation_fraction, held_out=False).materialize()
    # Sorted by a fixed draw, so that a resumed run validates on the same rows.
    drawn = _mapped(held_out, _drawn).sort("draw").limit(spec.validation_rows).materialize()
    return TrainingRequests(train=train, held_out=drawn, found=found, n_train=train.count(), n_held_out=drawn.count())


def epoch_of(requests: TrainingRequests, epoch: int, spec: "RunSpec", *, n_workers: int) -> "Dataset":
    """The training requests in the order of an epoch; a block is one worker's share of one global batch."""
    global_batch = spec.training.global_batch
    order = {"seed": spec.training.seed, "n_requests": requests.n_train, "global_batch": global_batch}
    return (
        _mapped(requests.train, _with_order, epoch=epoch, **order)
        .sort("order")
        .limit(requests.n_train - requests.n_train % global_batch)
        # Blocks of equal size, in order, are dealt to the workers in turn.
        .repartition(target_num_rows_per_block=global_batch // n_workers, strict=True)
    )


def some_behaviors(requests: TrainingRequests, width: int, n_drawn: int = 128) -> bytes:
    """Vectors of behaviors that about `n_drawn` training requests see; always the same ones."""
    share = n_drawn / requests.n_train
    found = _mapped(requests.train, _some_vectors, share=share, width=width).take_all()
    return b"".join(row["vectors"] for row in sorted(found, key=lambda row: row["request_id"]))


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


def _some_vectors(rows: "pa.Table", *, share: float, width: int, at_most: int = 8) -> "pa.Table":
    """For a share of the requests: some vectors of the history, evenly spaced."""
    import numpy as np
    import pyarrow as pa

    from persona.store import vectors

    drawn = _drawn(rows)
    drawn = drawn.filter(pa.array(drawn["draw"].to_numpy() < share * _DRAWS))
    drawn_vectors = []
    for history in drawn["history"].to_pylist():
        seen_Nd = vectors.from_bytes(history, width)
        spaced = np.linspace(0, len(seen_Nd) - 1, min(len(seen_Nd), at_most)).astype(int)
        drawn_vectors.append(vectors.to_bytes(seen_Nd[spaced]))
    return drawn.select(["request_id"]).append_column("vectors", pa.array(drawn_vectors, pa.binary()))


def _with_order(rows: "pa.Table", *, epoch: int, seed: int, n_requests: int, global_batch: int) -> "pa.Table":
    from persona.training.order import epoch_order

    order = epoch_order(rows, epoch=epoch, seed=seed, n_requests=n_requests, global_batch=global_batch)
    return rows.append_column("order", order)
