"""Which requests a training run sees: joined, split by user, in an order for each epoch, and a glimpse of them all."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jobs.runtime import joining, retrieval as retrieve
from jobs.runtime.tally import Tally
from persona.options import PersonaKind

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from jobs.train import Config, Inputs

_DRAWS = 2**31 - 1


def split(config: "Config", inputs: "Inputs", version: int, tally: Tally) -> "tuple[Dataset, Dataset]":
    """Training and held-out requests with their histories, joined once and kept in Ray's object store."""
    store = inputs.store.at(behaviors=version)
    retrieval = retrieve.RetrievalSpec(
        options=config.retrieval,
        histories=inputs.histories,
        encoder=inputs.encoder.name,
        query_prefix=config.query_prefix,
        max_query_tokens=config.max_query_tokens,
        max_behaviors=config.max_behaviors,
    )

    def joined(splits: list[Any], held_out: str = "", limit: int | None = None) -> "Dataset":
        texts = retrieve.best_of(retrieval, tally, stage=f"texts{held_out}")
        plan = joining.JoinPlan(
            job="train",
            stage=f"join{held_out}",
            personas=[PersonaKind.OWN],
            max_behaviors=config.max_behaviors,
            needs_target=True,
            limit=limit,
            texts=texts,
        )
        return joining.requests_with_histories(splits, store, tally, plan)

    train = joined(inputs.requests, limit=config.rows.limit).materialize()
    if inputs.validation is not None:
        held_out = joined(inputs.validation, " held out")
    else:
        held_out = _only(train, _users, fraction=config.validation_fraction, held_out=True)
        train = _only(train, _users, fraction=config.validation_fraction, held_out=False).materialize()
    # The same rows whenever the run is resumed, in whatever order they come.
    drawn = _only(held_out, _drawn).sort("draw").limit(config.validation_rows)
    return train, drawn.materialize()


def epoch_of(train: "Dataset", epoch: int, config: "Config", *, n_requests: int, workers: int) -> "Dataset":
    """The requests of one epoch in its own order; a block is what one worker gets of one global batch."""
    order = {"seed": config.training.seed, "n_requests": n_requests, "global_batch": config.training.global_batch}
    return (
        _only(train, _with_order, epoch=epoch, **order)
        .sort("order")
        .limit(n_requests - n_requests % config.training.global_batch)
        # In order and of equal size, blocks go round the workers.
        .repartition(target_num_rows_per_block=config.training.global_batch // workers, strict=True)
    )


def vectors_seen(train: "Dataset", n_requests: int, width: int, n_drawn: int = 128) -> bytes:
    """Vectors that some requests see, which tell a new plug where behaviors lie; always the same ones."""
    found = _only(train, _some_vectors, share=n_drawn / n_requests, width=width).take_all()
    return b"".join(row["vectors"] for row in sorted(found, key=lambda row: row["request_id"]))


def _only(rows: "Dataset", work: Callable[..., Any], **settings: Any) -> "Dataset":
    return rows.map_batches(work, batch_size=None, batch_format="pyarrow", fn_kwargs=settings)


def _users(rows: "pa.Table", *, fraction: float, held_out: bool) -> "pa.Table":
    """The rows of the users that are held out, or of the others; a user is always on one side."""
    import pyarrow as pa

    from persona.inputs.histories import bucket_of

    share = bucket_of([f"held out {user}" for user in rows["user_id"].to_pylist()], 10_000)
    return rows.filter(pa.array((share < fraction * 10_000) == held_out))


def _drawn(rows: "pa.Table") -> "pa.Table":
    """Adds a random but fixed number to each row."""
    import pyarrow as pa

    from persona.inputs.histories import bucket_of

    draw = bucket_of([f"draw {request}" for request in rows["request_id"].to_pylist()], _DRAWS)
    return rows.append_column("draw", pa.array(draw))


def _some_vectors(rows: "pa.Table", *, share: float, width: int, at_most: int = 8) -> "pa.Table":
    """Of a share of the rows: some vectors of the history, from its whole length."""
    import numpy as np
    import pyarrow as pa

    from persona.store import vectors

    drawn = _drawn(rows)
    drawn = drawn.filter(pa.array(drawn["draw"].to_numpy() < share * _DRAWS))
    drawn_vectors = []
    for history in drawn["history"].to_pylist():
        seen_Nd = vectors.from_bytes(history, width)
        places = np.linspace(0, len(seen_Nd) - 1, min(len(seen_Nd), at_most)).astype(int)
        drawn_vectors.append(vectors.to_bytes(seen_Nd[places]))
    return drawn.select(["request_id"]).append_column("vectors", pa.array(drawn_vectors, pa.binary()))


def _with_order(rows: "pa.Table", *, epoch: int, seed: int, n_requests: int, global_batch: int) -> "pa.Table":
    from persona.training.order import epoch_order

    order = epoch_order(rows, epoch=epoch, seed=seed, n_requests=n_requests, global_batch=global_batch)
    return rows.append_column("order", order)
