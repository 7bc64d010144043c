"""One way to reach Ray: the cluster of RAY_ADDRESS when there is one, else a Ray of our own on this machine."""

import logging
import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

from jobs.runtime import log
from persona.errors import UsageError

# Reads, joins and commits must find a CPU beside the actors, also on a laptop with two cores: these CPUs are tickets.
_LEAST_LOCAL_CPUS = 6
_POLL_S = 0.5
_WORKER_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_RAY_ENVIRONMENT = {
    # To Ray's C++ side every actor pool of Ray Data is an error (arguments in the object store, Ray issue 53727); what
    # really fails comes as a Python exception, too.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # A Ray of our own is the program that a person waits for; by default its workers give way to all others.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True, kw_only=True)
class Threads:
    """How many threads an encoder's process takes."""

    model: int
    """Of the model on CPUs, beside others."""
    alone: int
    """Of the model on CPUs, while it is alone in its pool: on a machine of our own all cores are free."""
    tokenizing: int
    """Of the tokenizer. For one thread a GPU would wait most of the time; on CPUs other models have the other cores."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What the cluster has; `cores` are real ones where that can be known."""

    cores: int
    gpus: int
    is_ours: bool = False
    """Whether this Ray was started for this run, and nobody else has a part in the machine."""

    def n_models(self, actors: int | None, cpus_per_actor: int) -> int:
        """How many models run side by side: as many as asked for, or one a GPU, or else as there are cores for."""
        return actors or self.gpus or max(1, self.cores // cpus_per_actor)

    def pool(self, actors: int | None, cpus_per_actor: int) -> dict[str, Any]:
        """Options of a pool of model actors for `map_batches`: one a GPU, or else one a core with cores for the rest.

        On GPUs a fixed size: such pools do not grow on a cluster that scales itself (Ray issue 59144). On CPUs, where a
        model that is being loaded takes a core from the reads before it, half of the pool comes only for a queue.
        """
        from ray.data import ActorPoolStrategy

        size = self.n_models(actors, cpus_per_actor)
        if self.gpus:
            # No CPU: a pool that holds all CPUs starves the reads in front of it (Ray issue 44687).
            return {"compute": ActorPoolStrategy(size=size), "num_gpus": 1, "num_cpus": 0}
        least = actors or (size + 1) // 2
        return {"compute": ActorPoolStrategy(min_size=least, max_size=size), "num_cpus": cpus_per_actor}

    def threads(self, cpus_per_actor: int) -> Threads:
        """Threads of each encoder of a pool."""
        if self.gpus:
            return Threads(model=cpus_per_actor, alone=cpus_per_actor, tokenizing=max(1, self.cores // self.gpus))
        alone = max(self.cores, cpus_per_actor) if self.is_ours else cpus_per_actor
        return Threads(model=cpus_per_actor, alone=alone, tokenizing=1)


def connect() -> Machines:
    """Attaches to Ray, or starts it; `jobs.runtime.cli` ends what was started here."""
    import ray

    attach = "RAY_ADDRESS" in os.environ
    tickets = max(usable_cores(), _LEAST_LOCAL_CPUS)
    if not ray.is_initialized():
        # What `ray job submit` or the caller has set stays: Ray refuses two values for one name.
        of_workers = {name: value for name, value in _WORKER_ENVIRONMENT.items() if name not in os.environ}
        # By default Ray warns when more processes start than there are cores.
        of_ours = {} if attach else {**of_workers, "RAY_worker_maximum_startup_concurrency": str(tickets)}
        for name, value in {**_RAY_ENVIRONMENT, **of_ours}.items():
            os.environ.setdefault(name, value)
        try:
            ray.init(
                address=None if attach else "local",
                num_cpus=None if attach else tickets,
                include_dashboard=None if attach else False,
                # A Ray of our own inherits them; its first workers are already there, and fit no other environment.
                runtime_env={"env_vars": of_workers} if attach else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError as error:
            raise UsageError(
                f"RAY_ADDRESS is {os.environ.get('RAY_ADDRESS')!r}, but no Ray answers there ({error}); start it, "
                "or unset RAY_ADDRESS to run on this machine alone"
            ) from error
    _settle_ray_data()
    _wait_for_gpus()
    resources = ray.cluster_resources()
    n_cpus = int(resources.get("CPU", 1))
    alone = len(ray.nodes()) == 1 and n_cpus <= tickets
    cores = min(n_cpus, usable_cores()) if alone else max(1, n_cpus - 2)
    return Machines(cores=cores, gpus=int(resources.get("GPU", 0)), is_ours=alone and not attach)


def usable_cores() -> int:
    """Cores that this process may use: a batch system, a cpuset or `taskset` often gives fewer than there are."""
    mine = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(mine(0)) if mine else os.cpu_count() or 1


def _wait_for_gpus() -> None:
    """Has the autoscaler bring PERSONA_GPUS GPUs, if that is set: a job sees only what is there when it starts.

    On a cluster that scales to zero it would otherwise find none and go to the CPUs. When spot machines are scarce, it
    goes on with those that came within PERSONA_GPUS_WITHIN_S seconds. Raises UsageError when none did.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    wanted = _whole_number("PERSONA_GPUS", 0)
    if not wanted:
        return
    until = time.monotonic() + _whole_number("PERSONA_GPUS_WITHIN_S", 1800)
    request_resources(bundles=[{"GPU": 1}] * wanted)
    try:
        while (found := int(ray.cluster_resources().get("GPU", 0))) < wanted and time.monotonic() < until:
            time.sleep(_POLL_S)
    finally:
        request_resources(bundles=[])  # from here on it is the actors that keep them
    if not found:
        raise UsageError(f"PERSONA_GPUS={wanted}: no GPU has come; look at the cluster's limits, or unset it for CPUs")
    if found < wanted:
        log.say(f"{found} of {wanted} GPUs have come (PERSONA_GPUS); going on with them", level="warning")


def _whole_number(name: str, default: int) -> int:
    """A variable of the environment. Raises UsageError when it is no whole number."""
    value = os.environ.get(name, "").strip() or str(default)
    if not value.isdecimal():
        raise UsageError(f"{name}={value}: must be a whole number")
    return int(value)


def _settle_ray_data() -> None:
    from ray.data import DataContext
    from ray.util.debug import log_once

    context = DataContext.get_current()
    context.enable_progress_bars = False  # the jobs print their own, in rows and not in blocks
    # What a task sorts into buckets at a time; by default 1 GiB, which a worker would have to hold.
    context.shuffle_input_batch_bytes = 64 * 2**20
    log_once("ray_data_progress_manager_disabled")  # takes that as said
    # Nothing to encode or to answer is how a refresh often ends, and no reason for advice.
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors for", UserWarning)
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def tokenize_with(n_threads: int) -> None:
    """Lets the tokenizers of this process take so many threads; it must not have tokenized yet, nor fork later."""
    if n_threads > 1:
        os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(min(n_threads, usable_cores()))}


def quiet_models(n_threads: int | None = None) -> None:
    """What every process that holds a model does first: as many threads as it was given, and no bars in the log."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if n_threads is not None and not torch.cuda.is_available():
        torch.set_num_threads(n_threads)
