"""How many actors a job starts, and what each reserves."""

import pytest

from jobs.runtime.job_options import ActorPool, LLMPool
from jobs.runtime.pools import ModelPool
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
