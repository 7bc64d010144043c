"""How many actors a job starts, and what each reserves."""

import threading

import pytest

from jobs.runtime.job_options import ActorPool, LLMPool
from jobs.runtime.pools import ModelPool, _in_one_thread
from jobs.runtime.session import Machines
from persona.errors import UsageError

EIGHT = Machines(cores=64, gpus=8, node_gpus=4)


@pytest.mark.parametrize(
    ("options", "actors", "gpus"),
    [
        (ActorPool(), 8, 1),
        (LLMPool(), 8, 1),
        (LLMPool(gpus_per_actor=2), 4, 2),
        (LLMPool(gpus_per_actor=3), 2, 3),
        (LLMPool(gpus_per_actor=4, actors=1), 1, 4),
    ],
)
def test_an_actor_reserves_the_gpus_of_its_llm(options, actors, gpus):
    pool = ModelPool.plan(EIGHT, options)
    assert (pool.min_size, pool.max_size, pool.num_gpus, pool.num_cpus) == (actors, actors, gpus, 0)
    assert pool.all_gpus == actors * gpus


def test_only_an_llm_on_several_gpus_is_spread():
    assert LLMPool().device is None
    assert LLMPool(gpus_per_actor=2).device == "auto"


@pytest.mark.parametrize(("machines", "most"), [(EIGHT, 4), (Machines(cores=4, gpus=0), 0)])
def test_more_gpus_than_a_node_has_are_refused(machines, most):
    said = f"--gpus-per-actor 5: an actor's GPUs must be on one node, and the largest node has {most}"
    with pytest.raises(UsageError, match=said):
        ModelPool.plan(machines, LLMPool(gpus_per_actor=5))


def test_on_cpus_cores_are_reserved():
    pool = ModelPool.plan(Machines(cores=8, gpus=0), LLMPool(cpus_per_actor=2))
    assert (pool.min_size, pool.max_size, pool.num_cpus, pool.all_gpus) == (2, 4, 2, 0)


def test_an_engine_of_several_processes_reserves_devices_for_each():
    pool = ModelPool.plan(EIGHT, LLMPool(), n_processes=4, n_calls=2)
    assert (pool.max_size, pool.num_gpus, pool.n_calls) == (2, 4, 2)
    said = "--tensor-parallel × --pipeline-parallel = 5: an actor's GPUs must be on one node"
    with pytest.raises(UsageError, match=said):
        ModelPool.plan(EIGHT, LLMPool(), n_processes=5)
    pool = ModelPool.plan(Machines(cores=8, gpus=0), LLMPool(cpus_per_actor=2), n_processes=2)
    assert (pool.max_size, pool.num_cpus) == (2, 4)


@pytest.mark.parametrize(
    ("n_rows", "actors", "threads"), [(0, 1, 8), (100, 1, 8), (101, 2, 4), (300, 3, 2), (1000, 8, 1)]
)
def test_on_cpus_no_actor_is_without_a_block_and_no_core_without_a_thread(n_rows, actors, threads):
    pool = ModelPool.plan(Machines(cores=8, gpus=0, is_ours=True), LLMPool()).fit(n_rows, 100)
    assert (pool.max_size, pool.n_threads) == (actors, threads)
    assert 1 <= pool.min_size <= pool.max_size


def test_cores_of_a_shared_cluster_are_not_taken_beyond_the_reserved_ones():
    pool = ModelPool.plan(Machines(cores=8, gpus=0), LLMPool(cpus_per_actor=2)).fit(1, 100)
    assert (pool.max_size, pool.n_threads) == (1, 2)


def test_the_processes_of_an_actor_share_its_cores():
    pool = ModelPool.plan(Machines(cores=8, gpus=0, is_ours=True), LLMPool(), n_processes=4).fit(1, 100)
    assert (pool.max_size, pool.n_threads) == (1, 2)


def test_on_gpus_the_pool_keeps_its_size():
    assert ModelPool.plan(EIGHT, LLMPool()).fit(1, 100).max_size == 8


class NotesThreads:
    def __init__(self, n_threads: int) -> None:
        self.threads = [n_threads, threading.get_ident()]

    def __call__(self, rows: list[int]) -> list[int]:
        return [*self.threads, threading.get_ident(), *rows]


def test_a_model_is_loaded_and_called_in_one_thread_which_is_not_the_callers():
    model = _in_one_thread(NotesThreads)(n_threads=2)
    n_threads, loaded_in, called_in, row = model([7])
    assert (n_threads, row) == (2, 7)
    assert loaded_in == called_in != threading.get_ident()
    assert _in_one_thread(NotesThreads).__name__ == "NotesThreads"
