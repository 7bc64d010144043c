"""Pools of actors that hold a model: blocks of rows go in, as many rows come out."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from jobs.runtime.job_options import ActorPool, LLMPool
from jobs.runtime.session import Machines
from persona.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset


class Model(Protocol):
    """What an actor holds; the constructor loads it. Its argument `n_threads` is for the model on CPUs."""

    def __call__(self, rows: "pa.Table", /) -> "pa.Table":
        """As many rows as were given, in their order."""


@dataclass(frozen=True, kw_only=True)
class ModelPool:
    """How many actors hold a model, and which resources each one reserves."""

    min_size: int
    max_size: int
    num_cpus: int
    num_gpus: int
    n_calls: int = 1
    """Blocks that an actor works on at the same time, in as many threads."""
    n_processes: int = 1
    """Processes of an actor, each of which holds a part of the model."""
    cores: int = 0
    """Cores that all actors may use together, where no other job uses them; 0 on GPUs."""

    @property
    def n_threads(self) -> int:
        """Threads of the model in each process of an actor, on CPUs."""
        return max(1, max(self.num_cpus, self.cores // self.max_size) // self.n_processes)

    @property
    def all_gpus(self) -> int:
        """GPUs of all actors together."""
        return self.max_size * self.num_gpus

    @classmethod
    def plan(cls, machines: Machines, options: ActorPool, *, n_processes: int = 1, n_calls: int = 1) -> "ModelPool":
        """One actor per GPU, or on CPUs as many as leave cores for reads and commits; `actors` overrides the number.

        On GPUs the size is fixed, because such pools do not grow on an autoscaling cluster (Ray issue 59144). On CPUs,
        loading a model takes a core away from the reads that feed it, so half of the pool starts only when work queues
        up.

        Args:
            machines: of the cluster.
            options: what an actor takes for each of its processes.
            n_processes: processes in which an actor's engine holds parts of one LLM.
            n_calls: blocks that an actor works on at the same time.

        Raises UsageError when an actor needs more GPUs than a node has.
        """
        actors, cpus_per_actor = options.actors, options.cpus_per_actor * n_processes
        gpus_per_process = options.gpus_per_actor if isinstance(options, LLMPool) else 1
        most = max(machines.node_gpus, 1) if machines.gpus or n_processes == 1 else n_processes
        if (gpus_per_actor := gpus_per_process * n_processes) > most:
            flag = "--tensor-parallel × --pipeline-parallel =" if n_processes > 1 else "--gpus-per-actor"
            raise UsageError(
                f"{flag} {gpus_per_actor}: an actor's GPUs must be on one node, and the largest node has "
                f"{machines.node_gpus}; take at most {most}"
            )
        size = machines.n_models(actors, cpus_per_actor, gpus_per_actor)
        if machines.gpus:
            # An actor reserves no CPU: a pool that reserves all CPUs starves the reads before it (Ray issue 44687).
            return cls(
                min_size=size,
                max_size=size,
                num_cpus=0,
                num_gpus=gpus_per_actor,
                n_calls=n_calls,
                n_processes=n_processes,
            )
        return cls(
            min_size=actors or (size + 1) // 2,
            max_size=size,
            num_cpus=cpus_per_actor,
            num_gpus=0,
            n_calls=n_calls,
            n_processes=n_processes,
            cores=machines.cores if machines.is_ours else 0,
        )

    def fit(self, n_rows: int, block_rows: int) -> "ModelPool":
        """No more actors on CPUs than there are blocks of `n_rows` rows; those that are left share the cores."""
        if self.num_gpus or not self.num_cpus:
            return self
        size = min(self.max_size, max(1, math.ceil(n_rows / block_rows)))
        return replace(self, min_size=min(self.min_size, size), max_size=size)


def by_models(
    rows: "Dataset", model: type[Model], *, block_rows: int, pool: ModelPool, **settings: object
) -> "Dataset":
    """The rows as the actors return them, in blocks of `block_rows`.

    Each actor holds a `model(**settings, n_threads=…)`; the pool says how many threads.
    """
    from ray.data import ActorPoolStrategy

    return rows.repartition(target_num_rows_per_block=block_rows).map_batches(
        model if pool.n_calls > 1 else _in_one_thread(model),
        fn_constructor_kwargs={**settings, "n_threads": pool.n_threads},
        batch_size=block_rows,
        batch_format="pyarrow",
        udf_modifying_row_count=False,
        compute=ActorPoolStrategy(
            min_size=pool.min_size,
            max_size=pool.max_size,
            max_concurrent_calls_per_actor=pool.n_calls if pool.n_calls > 1 else None,
            enable_true_multi_threading=pool.n_calls > 1,
        ),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus or None,
    )


def _in_one_thread(model: type[Model]) -> type[Model]:
    """The same model, loaded and called in one thread; Ray Data loads it in one and calls it in another.

    OpenMP gives each of them its own workers. With more workers than cores, even idle ones, libgomp puts them to sleep
    after every operation: a step of decoding took a third longer on two cores.
    """

    class InOneThread:
        def __init__(self, **settings: object) -> None:
            self._thread = ThreadPoolExecutor(1)
            self._model = self._thread.submit(model, **settings).result()

        def __call__(self, rows: "pa.Table", /) -> "pa.Table":
            return self._thread.submit(self._model, rows).result()

    InOneThread.__name__ = model.__name__  # Ray's names of the operation and its actors
    return InOneThread
