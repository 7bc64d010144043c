"""The steps of a run: the same batches on any number of workers and after a resume, which reads nothing before it."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.runtime.tally import Tally
from jobs.runtime.training import inputs, windows as training_windows
from jobs.runtime.training.windows import FillSettings, RequestBlocks, Windows
from persona.inputs.histories import bucket_of
from persona.options import PersonaKind
from persona.store.join import join_histories
from persona.store.store import Store
from persona.training.order import RunOrder, cut
from tests.stores import IDENTITY, behaviors, encode, write_rows

N_REQUESTS, N_USERS, N_BUCKETS, GLOBAL_BATCH, N_EPOCHS, MAX_BEHAVIORS = 150, 40, 4, 16, 2, 6
WINDOW_BYTES = 40 * 220  # some 40 requests, most of it their inputs
Step = tuple[int, list[str], list[bytes]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    opened = Store.create(str(tmp_path_factory.mktemp("windows") / "store"), IDENTITY, N_BUCKETS)
    rows = [(f"u{i}", f"b{j}", "x" * (10 * i + j), j) for i in range(N_USERS) for j in range(i % 9)]
    encoded = encode(behaviors(*rows, n_buckets=N_BUCKETS))
    write_rows(opened, "behaviors", encoded.append_column("change", pa.repeat("new", len(rows))))
    return opened.snapshot("behaviors")


@pytest.fixture(scope="module")
def joined(store: Store) -> pa.Table:
    """Requests with counts and hashes but without vectors, in no order."""
    users = [f"u{i * 7 % N_USERS}" for i in range(N_REQUESTS)]
    table = pa.table(
        {
            "request_id": [f"r{i}" for i in range(N_REQUESTS)],
            "user_id": users,
            "input": pa.array(["x" * (i * 37 % 400) for i in range(N_REQUESTS)], pa.large_string()),
            "target": pa.array(["y"] * N_REQUESTS, pa.large_string()),
            "as_of": pa.array([i % 12 for i in range(N_REQUESTS)], pa.timestamp("us", "UTC")),
            "bucket": bucket_of(users, N_BUCKETS),
        }
    )
    parts = []
    for bucket in range(N_BUCKETS):
        of_bucket = table.filter(pa.compute.equal(table["bucket"], bucket))
        how: Any = {"persona": PersonaKind.OWN, "max_behaviors": MAX_BEHAVIORS, "with_vectors": False}
        parts.append(join_histories(of_bucket, store, bucket, **how))
    whole = pa.concat_tables(parts)
    return whole.take(np.random.default_rng(0).permutation(len(whole)))


@pytest.fixture(scope="module")
def histories(store: Store, joined: pa.Table) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for bucket in range(N_BUCKETS):
        of_bucket = joined.select(["request_id", "user_id", "as_of"]).filter(pa.compute.equal(joined["bucket"], bucket))
        whole = join_histories(of_bucket, store, bucket, persona=PersonaKind.OWN, max_behaviors=MAX_BEHAVIORS)
        found |= dict(zip(whole["request_id"].to_pylist(), whole["history"].to_pylist(), strict=True))
    return found


class Run:
    """A run over these requests, of which those of block number `arrival` arrived first."""

    def __init__(self, store: Store, joined: pa.Table, arrival: int) -> None:
        import ray

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inputs, "_BLOCK_ROWS", 16)
            in_turn = [joined.slice(start, 40) for start in range(0, N_REQUESTS, 40)]
            arrived = ray.data.from_arrow(in_turn[arrival:] + in_turn[:arrival])
            refs = inputs._sorted(arrived, n_blocks=3).to_arrow_refs()
        tables = [ray.get(ref) for ref in refs]
        assert max(table.num_rows for table in tables) == 16
        in_order = [(name, "ascending") for name in ("bucket", "user_id", "request_id")]
        assert pa.concat_tables(tables).combine_chunks() == joined.sort_by(in_order).combine_chunks()
        blocks = RequestBlocks.of(refs, IDENTITY.width)
        assert list(blocks.starts) == np.cumsum([0, *(table.num_rows for table in tables)]).tolist()
        pieces = cut(tables, IDENTITY.width, WINDOW_BYTES // 8)
        how: Any = {"seed": 3, "global_batch": GLOBAL_BATCH}
        self.order = RunOrder(pieces=pieces, n_epochs=N_EPOCHS, window_bytes=WINDOW_BYTES, **how)
        self.blocks, self.tally = blocks, Tally.start()
        self.settings = {"store": store, "max_behaviors": MAX_BEHAVIORS, "tally": self.tally, **how}

    def steps(self, n_workers: int, begun: int = 0) -> Iterator[Step]:
        """The global batches, as all workers together see them in lockstep."""
        windows = Windows.start(self.order, self.blocks, FillSettings(n_workers=n_workers, **self.settings))
        of_workers = [windows.steps(rank, begun) for rank in range(n_workers)]
        for shares in zip(*of_workers, strict=True):
            assert len({step for step, _, _ in shares}) == 1
            assert {share.num_rows for _, _, share in shares} == {GLOBAL_BATCH // n_workers}
            batch = pa.concat_tables([share for _, _, share in shares])
            yield shares[0][0], batch["request_id"].to_pylist(), batch["history"].to_pylist()


def test_any_number_of_workers_sees_the_same_batches_also_after_a_resume(
    local_ray: None, store: Store, joined: pa.Table, histories: dict[str, bytes]
) -> None:
    run = Run(store, joined, arrival=0)
    whole = list(run.steps(1))
    assert [step for step, _, _ in whole] == list(range(N_EPOCHS * (N_REQUESTS // GLOBAL_BATCH)))
    assert len(run.order.epoch(0)) >= 3
    for _, names, vectors in whole:
        assert vectors == [histories[name] for name in names]
    for epoch in (whole[:9], whole[9:]):
        names = [name for _, batch, _ in epoch for name in batch]
        assert len(set(names)) == len(names) == N_REQUESTS - N_REQUESTS % GLOBAL_BATCH
    assert list(run.steps(2)) == whole
    again = Run(store, joined, arrival=2)
    assert list(again.steps(8)) == whole

    # What a resumed run reads, by the counts of its tasks: its window and the next, and nothing before.
    resumed = Run(store, joined, arrival=1)
    begun = 12
    assert list(islice(resumed.steps(2, begun), 1)) == [whole[begun]]
    first, following = islice(resumed.order.from_step(begun), 2)
    assert first.first_step > 0
    # The counts of the second window may come later.
    n_filled = resumed.tally.totals()["windows"]["requests"] / GLOBAL_BATCH
    assert n_filled in (first.n_steps, first.n_steps + following.n_steps)
    assert list(resumed.steps(2, begun)) == whole[begun:]


def test_workers_that_start_again_get_their_shares_again(local_ray: None, store: Store, joined: pa.Table) -> None:
    run = Run(store, joined, arrival=0)
    windows = Windows.start(run.order, run.blocks, FillSettings(n_workers=2, **run.settings))
    expected = [share.to_pylist() for _, _, share in windows.steps(1, 0)]
    # Both crash at step 5; one had taken its share of that window, the other not yet.
    list(islice(windows.steps(0, 0), 6))
    for rank in (1, 0, 1):
        found = [share.to_pylist() for _, _, share in islice(windows.steps(rank, 5), 3)]
        assert rank == 0 or found == expected[5:8]


def test_shares_of_several_steps_have_the_batches_of_single_steps(
    store: Store, joined: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order = joined.sort_by([(name, "ascending") for name in ("bucket", "user_id", "request_id")])
    pieces = cut([in_order], IDENTITY.width, WINDOW_BYTES // 8)
    order = RunOrder(pieces=pieces, n_epochs=1, seed=3, global_batch=4, window_bytes=WINDOW_BYTES)
    no_tally: Any = None
    settings = FillSettings(
        store=store, max_behaviors=MAX_BEHAVIORS, seed=3, global_batch=4, n_workers=2, tally=no_tally
    )

    def batches(n_shares: int, begun: int) -> list[tuple[int, int, list[dict[str, Any]]]]:
        monkeypatch.setattr(training_windows, "_SHARES", n_shares)
        found = []
        for window in order.epoch(0):
            requests = pa.concat_tables([in_order.slice(start, end - start) for start, end in window.ranges])
            steps = training_windows._steps_of_shares(window)
            shares = list(training_windows.shares(requests, window, settings))
            assert len(shares) == 2 * len(steps) <= 2 * n_shares
            for number, share in enumerate(shares):
                of_steps = training_windows._each_step(share, window, steps[number // 2], begun)
                found += [(step, number % 2, rows.to_pylist()) for step, _, rows in of_steps]
        return sorted(found, key=lambda one: one[:2])

    single = batches(64, begun=0)
    assert [step for step, _, _ in single] == [step for step in range(order.steps_per_epoch) for _ in range(2)]
    assert all(len(rows) == 2 for _, _, rows in single)
    assert batches(3, begun=0) == single
    assert batches(3, begun=5) == single[10:]
