"""Measure the loss of each request's target in a pool of models, and gather the numbers on the driver."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from jobs.runtime import joining, plugs, pools, session
from jobs.runtime.plugs import PlugRef
from jobs.runtime.pools import ModelPool
from jobs.runtime.tally import Tally

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from persona.options import Precision

Losses = dict[str, list[Any]]
"""Columns with a row per request and kind of persona, in any order."""

_NUMBERS = ("request_id", "user_id", "persona", "n_behaviors", "nats", "tokens")
_REJECTED_NUMBERS = ("rejected_nats", "rejected_tokens")
_BATCHES_PER_BLOCK = 8


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What each actor needs to measure losses.

    Attributes:
        plug: in front of the LLM.
        precision: of the LLM.
        device: of the LLM, as of `FrozenLLM.load`.
        batch_size: requests per forward pass.
        retrieved_tokens: tokens of retrieved texts in front of a prompt.
        with_rejected: whether to measure the rejected texts as well.
    """

    plug: PlugRef
    precision: "Precision"
    device: str | None
    batch_size: int
    retrieved_tokens: int
    with_rejected: bool


def measure(requests: "Dataset", settings: LossSettings, pool: ModelPool, tally: Tally, *, n_rows: int) -> Losses:
    """The losses of at most `n_rows` joined requests with their targets: a few numbers per request, and the target.

    Raises InputError as `check_ids`.
    """
    block_rows = _BATCHES_PER_BLOCK * settings.batch_size
    pool = pool.fit(n_rows, block_rows)
    rows = pools.by_models(requests, MeasureLosses, block_rows=block_rows, pool=pool, settings=settings, tally=tally)
    names = [*_NUMBERS, "target", *(_REJECTED_NUMBERS if settings.with_rejected else ())]
    gathered: Losses = {name: [] for name in names}
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in cast("pa.Table", table).to_pylist():
            for name in names:
                gathered[name].append(row[name])
    check_ids(gathered)
    return gathered


def check_ids(losses: Mapping[str, list[Any]]) -> None:
    """Raises InputError for an id of several users: answers and losses are found by their ids.

    The join of a bucket finds such users in the same bucket only.
    """
    user_of: dict[str, str] = {}
    for request, user in zip(losses["request_id"], losses["user_id"], strict=True):
        if user_of.setdefault(request, user) != user:
            raise joining.id_of_several_users(request)


def to_parquet(losses: Mapping[str, list[Any]]) -> bytes:
    """The numbers as a file without any text, sorted by request and persona; `jobs.compare` reads it."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: losses[name] for name in (*_NUMBERS, *_REJECTED_NUMBERS) if name in losses})
    sink = io.BytesIO()
    pq.write_table(table.sort_by([("request_id", "ascending"), ("persona", "ascending")]), sink)
    return sink.getvalue()


class MeasureLosses:
    """An actor with plug and LLM: requests with histories and targets in, losses out."""

    def __init__(self, settings: LossSettings, tally: Tally, n_threads: int) -> None:
        session.quiet_models(n_threads)
        self.model = plugs.load_personalized(
            settings.plug,
            precision=settings.precision,
            device=settings.device,
            retrieved_tokens=settings.retrieved_tokens,
        )
        self.batch_size = settings.batch_size
        self.with_rejected = settings.with_rejected
        self.tally = tally

    def __call__(self, requests: "pa.Table") -> "pa.Table":
        """Adds `nats` and `tokens` of the target, and of the rejected text if it is measured."""
        from persona.plug.request_tables import loss_of_all

        losses = loss_of_all(self.model, requests, batch_size=self.batch_size)
        rows = requests.select(["request_id", "user_id", "persona", "target", "n_behaviors"])
        for name in ("nats", "tokens"):
            rows = rows.append_column(name, losses[name])
        if self.with_rejected:
            index = requests.column_names.index("target")
            rejected = requests.set_column(index, "target", requests["rejected"])
            losses = loss_of_all(self.model, rejected, batch_size=self.batch_size)
            for name in ("nats", "tokens"):
                rows = rows.append_column(f"rejected_{name}", losses[name])
        if rows.num_rows:
            unit = f"{rows['request_id'][0]}/{rows['persona'][0]}"
            self.tally.note("loss", unit, {"rows": rows.num_rows})
        return rows
