"""Compute hidden states in a pool of models; each actor writes the states of its blocks as files of their own."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.runtime import exchange, joining, plugs, pools, reading, session
from jobs.runtime.exchange import Source
from jobs.runtime.locating_inputs import RequestInput, StatementInput, TextLLM
from jobs.runtime.plugs import PlugRef
from jobs.runtime.pools import ModelPool
from jobs.runtime.reading import Found, SplitFound
from jobs.runtime.tally import Tally

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from ray import ObjectRef

    from persona.inputs.splits import Split
    from persona.locating.statements import Columns
    from persona.options import Precision
    from persona.store.store import Store

_STATEMENT_BUCKETS = 64


@dataclass(frozen=True, kw_only=True)
class StateSettings:
    """What each actor needs.

    Attributes:
        model: a plug for requests, or an LLM alone for statements.
        precision, device: of the LLM, as of `FrozenLLM.load`.
        batch_size: texts per forward pass.
        folder: of the parts (`persona.locating.state_files`).
    """

    model: PlugRef | TextLLM
    precision: "Precision"
    device: str | None
    batch_size: int
    folder: str


def write_states(
    source: StatementInput | RequestInput,
    settings: StateSettings,
    pool: ModelPool,
    tally: Tally,
    *,
    block_rows: int,
    limit: int | None,
    run_files: str,
) -> Found:
    """Write the states of all rows that no complete part in `settings.folder` has; returns what was read.

    Rows go to the actors in blocks of `block_rows`; each block becomes a part.
    """
    import ray

    done = ray.put(_keys_done(settings.folder))
    if isinstance(source, StatementInput):
        rows, found = _statements(source, done, tally, limit=limit, run_files=run_files)
    else:
        rows, found = _requests(source, done, tally, limit=limit, run_files=run_files)
    n_personas = 1 if isinstance(source, StatementInput) else len(source.personas)
    pool = pool.fit(found.total.rows * n_personas, block_rows)
    written = pools.by_models(rows, WriteStates, block_rows=block_rows, pool=pool, settings=settings, tally=tally)
    for _ in written.iter_batches(batch_size=None, batch_format="pyarrow"):
        pass
    return found


class WriteStates:
    """An actor with the LLM, and the plug if there is one: rows in, files of their hidden states out."""

    def __init__(self, settings: StateSettings, tally: Tally, n_threads: int) -> None:
        session.quiet_models(n_threads)
        self.settings = settings
        self.model = _load(settings)
        self.tally = tally

    def __call__(self, rows: "pa.Table") -> "pa.Table":
        """The name of its part for each row."""
        import pyarrow as pa

        from persona.locating import state_files

        name = ""
        if rows.num_rows:
            name = state_files.write_part(self.settings.folder, _keyed(rows), self._states(rows)).name
            self.tally.note("states", name, {"rows": rows.num_rows})
        return pa.table({"part": pa.repeat(name, rows.num_rows)})

    def _states(self, rows: "pa.Table") -> "np.ndarray":
        from persona.locating import prompt_states

        batch_size = self.settings.batch_size
        if isinstance(self.settings.model, TextLLM):
            return prompt_states.states_of_texts(self.model, rows["text"].to_pylist(), batch_size=batch_size)
        return prompt_states.states_of_requests(self.model, rows.to_pylist(), batch_size=batch_size)


def _load(settings: StateSettings) -> Any:
    """A `FrozenLLM`, or a `PersonalizedLLM` for requests."""
    from persona.engines import probe
    from persona.models.frozen_llm import FrozenLLM

    model = settings.model
    if isinstance(model, PlugRef):
        return plugs.load_personalized(model, precision=settings.precision, device=settings.device, retrieved_tokens=0)
    llm = FrozenLLM.load(
        model.folder(),
        max_input_tokens=model.max_input_tokens,
        prompt=model.prompt,
        precision=settings.precision,
        device=settings.device,
    )
    probe.check_llm(llm)
    return llm


def _keyed(rows: "pa.Table") -> "pa.Table":
    """The rows of a part (`state_files.ROWS`), of statements or of requests under their personas."""
    from persona.locating import state_files

    if "persona" not in rows.column_names:
        groups, ids, labels = (rows[name].to_pylist() for name in ("group", "row_id", "label"))
        return state_files.rows_of(groups, ids, labels, rows["user_id"].to_pylist())
    groups, ids = rows["persona"].to_pylist(), rows["request_id"].to_pylist()
    return state_files.rows_of(groups, ids, [None] * rows.num_rows, rows["user_id"].to_pylist())


def _keys_done(folder: str) -> "pa.Array":
    """The keys of all rows in complete parts, 16 bytes each: what a run that resumes leaves out."""
    import pyarrow as pa

    from persona.locating import state_files

    found = [
        state_files.keys_of(rows["group"].to_pylist(), rows["row_id"].to_pylist())
        for _, rows in state_files.parts(folder)
    ]
    return pa.concat_arrays([pa.array([], state_files.KEY), *found])


def _without_done(rows: "pa.Table", keys: "pa.Array", done: "ObjectRef[pa.Array]") -> "pa.Table":
    import pyarrow.compute as pc
    import ray

    return rows.filter(pc.invert(pc.is_in(keys, value_set=ray.get(done))))


def _requests(
    source: RequestInput, done: "ObjectRef[pa.Array]", tally: Tally, *, limit: int | None, run_files: str
) -> "tuple[Any, Found]":
    plan = joining.JoinPlan(
        job="locate",
        personas=source.personas,
        max_behaviors=source.plug.record.max_behaviors,
        needs_target=False,
        limit=limit,
        selection=_NotDone(done),
    )
    joined = joining.requests_with_histories(source.requests, source.store, tally, plan, folder=run_files)
    return joined.rows, joined.found


class _NotDone:
    """Selects the requests whose states no complete part has."""

    adds = ()

    def __init__(self, done: "ObjectRef[pa.Array]") -> None:
        self.done = done

    def __call__(self, joined: "pa.Table", store: "Store", bucket: int, counts: dict[str, float]) -> "pa.Table":
        """Some of the rows."""
        del store, bucket, counts
        from persona.locating import state_files

        keys = state_files.keys_of(joined["persona"].to_pylist(), joined["request_id"].to_pylist())
        return _without_done(joined, keys, self.done)


def _statements(
    source: StatementInput, done: "ObjectRef[pa.Array]", tally: Tally, *, limit: int | None, run_files: str
) -> "tuple[Any, Found]":
    from persona.locating.statements import SCHEMA

    read = _ReadStatements(columns=source.columns, tally=tally)
    sources = [Source(splits=source.splits, read=read, limit=limit)]
    exchanged = exchange.exchange(sources, _STATEMENT_BUCKETS, SCHEMA, key=None, folder=run_files)
    return exchange.by_window(exchanged, _new_statements, done=done, tally=tally), exchanged.found[0]


def _new_statements(rows: "pa.Table", *, done: "ObjectRef[pa.Array]", tally: Tally) -> "Iterator[pa.Table]":
    """The statements of a window that are not done; of a repeated id in a group, the first counts."""
    import numpy as np
    import pyarrow as pa

    from persona.locating import state_files

    keys = state_files.keys_of(rows["group"].to_pylist(), rows["row_id"].to_pylist())
    _, first = np.unique(np.array(keys.to_pylist(), dtype=object), return_index=True)
    order = pa.array(np.sort(first))
    kept = _without_done(rows.take(order), keys.take(order), done)
    unit = f"{rows['bucket'][0]}/{rows['user_id'][0]}"
    tally.note("join", unit, {"asked": len(first), "repeated": rows.num_rows - len(first), "kept": kept.num_rows})
    yield kept


@dataclass(frozen=True, kw_only=True)
class _ReadStatements:
    """Reads the valid statements of splits; the others are counted, and named by reason in the summary."""

    columns: "Columns"
    tally: Tally

    def __call__(self, split: "Split", found: SplitFound, limit: int | None) -> "Iterator[pa.Table]":
        """The first `limit` of them, or all."""
        from persona.inputs.reader import read_split
        from persona.locating import statements

        validate = partial(statements.validate, columns=self.columns, n_buckets=_STATEMENT_BUCKETS, job="locate")
        problem = partial(statements.problem, columns=self.columns)
        batches = read_split(split, job="locate", max_row_mb=self.columns.max_row_mb, problem=problem)
        good = reading.keep_good(batches, validate, found, limit, time_column=None, store=None)
        yield from reading.counted(good, split, found, self.tally)
