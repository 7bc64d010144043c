"""Connect to Ray: to the cluster at RAY_ADDRESS if that is set, else to a Ray started on this machine for this run."""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jobs.runtime import log
from persona.errors import RunLost, UsageError

TERMINATED = 143  # what shells report for a process ended by SIGTERM
# Ray's CPUs are slots for tasks: reads, joins and commits need some besides the actors, even on two cores.
_MIN_LOCAL_CPUS = 6
_POLL_S = 0.5
_STDERR = 2
_NOTICE = b"Set ray log level from environment variable"
_WORKER_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_RAY_ENVIRONMENT = {
    # Ray's C++ code reports every actor pool of Ray Data as an error (Ray issue 53727). Real failures also come as
    # Python exceptions.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # By default, Ray's workers run at a lower priority. A person waits for a Ray that was started for this run.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What the cluster has."""

    cores: int
    """Cores for this run: physical ones where known, else Ray's CPUs."""
    gpus: int
    node_gpus: int = 0
    """GPUs of the node that has the most."""
    is_ours: bool = False
    """Whether this Ray was started for this run, so that no other job uses its machine."""

    def n_models(self, actors: int | None, cpus_per_actor: int, gpus_per_actor: int = 1) -> int:
        """How many models run in parallel: `actors`, or as many as there are GPUs or cores for."""
        return actors or self.gpus // gpus_per_actor or max(1, self.cores // cpus_per_actor)

    @property
    def tokenizing_threads(self) -> int:
        """Threads of each encoder's tokenizer: several per GPU, which would wait most of the time; one on CPUs."""
        return max(1, self.cores // self.gpus) if self.gpus else 1


def connect() -> Machines:
    """Attach to Ray, or start it; `jobs.runtime.cli` stops what was started here.

    Raises:
        UsageError: there is no Ray at RAY_ADDRESS, or none of PERSONA_GPUS came in time.
        RunLost: Ray does not start on this machine.
    """
    import ray

    attach = "RAY_ADDRESS" in os.environ
    n_local_cpus = max(usable_cores(), _MIN_LOCAL_CPUS)
    if not ray.is_initialized():
        with _without_notice():
            if attach:
                _attach()
            else:
                _start(n_local_cpus)
    _end_on_sigterm()
    _configure_ray_data()
    _wait_for_gpus()
    resources = ray.cluster_resources()
    n_cpus = int(resources.get("CPU", 1))
    # One node with no more CPUs than `_start` gives may be this machine, whose cores are known.
    is_local = len(ray.nodes()) == 1 and n_cpus <= n_local_cpus
    cores = min(n_cpus, usable_cores()) if is_local else max(1, n_cpus - 2)
    node_gpus = max(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])
    return Machines(
        cores=cores, gpus=int(resources.get("GPU", 0)), node_gpus=node_gpus, is_ours=is_local and not attach
    )


def _end_on_sigterm() -> None:
    """Let SIGTERM end the job by SystemExit, so that leases are released; Ray's own handler prints a stack instead."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))


@contextmanager
def _without_notice() -> Iterator[None]:
    """Hold back stderr, then write it without the line of Ray's C++ code about RAY_BACKEND_LOG_LEVEL."""
    stderr = os.dup(_STDERR)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), _STDERR)
        try:
            yield
        finally:
            os.dup2(stderr, _STDERR)
            os.close(stderr)
            written.seek(0)
            for line in written:
                if _NOTICE not in line:
                    os.write(_STDERR, line)


def _attach() -> None:
    import ray

    _set_environment(_RAY_ENVIRONMENT)
    try:
        ray.init(
            runtime_env={"env_vars": _missing_worker_environment()}, log_to_driver=False, logging_level=logging.ERROR
        )
    except ConnectionError as error:
        raise UsageError(
            f"RAY_ADDRESS is {os.environ.get('RAY_ADDRESS')!r}, but no Ray answers there ({error}); start it, or unset "
            "RAY_ADDRESS to run on this machine alone"
        ) from error


def _start(n_cpus: int) -> None:
    import ray

    # The workers inherit this process's environment. A runtime_env would not fit the first ones, which start early.
    _set_environment({**_RAY_ENVIRONMENT, **_missing_worker_environment()})
    # Without it, Ray warns when more processes start at the same time than there are cores.
    _set_environment({"RAY_worker_maximum_startup_concurrency": str(n_cpus)})
    try:
        ray.init(
            address="local", num_cpus=n_cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
    except Exception as error:  # a bare one, when a process of Ray does not start in time
        raise RunLost(
            f"Ray does not start on this machine ({str(error).splitlines()[0]}); it is very busy, or short of memory "
            "or disk: try again when it is less so"
        ) from error


def _missing_worker_environment() -> dict[str, str]:
    """What `ray job submit` or the caller has not set already: Ray refuses two values for one name."""
    return {name: value for name, value in _WORKER_ENVIRONMENT.items() if name not in os.environ}


def _set_environment(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def usable_cores() -> int:
    """Cores that this process may use: batch systems, cpusets and `taskset` often grant fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _wait_for_gpus() -> None:
    """If PERSONA_GPUS is set, ask the autoscaler for that many GPUs and wait for them.

    A job uses the GPUs that exist when it starts; on a cluster that scales to zero it would run on CPUs. If only some
    of the GPUs have come after PERSONA_GPUS_WITHIN_S seconds, as when spot machines are scarce, the job goes on with
    those. Raises UsageError if none has come.
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
        request_resources(bundles=[])  # from now on, the actors keep the machines up
    if not found:
        raise UsageError(
            f"PERSONA_GPUS={wanted}: no GPU has come; check the cluster's limits, or unset it to run on CPUs"
        )
    if found < wanted:
        log.say(f"{found} of {wanted} GPUs have come (PERSONA_GPUS); continuing with those", level="warning")


def _whole_number(name: str, default: int) -> int:
    """An environment variable as a number. Raises UsageError if it is not a whole number."""
    value = os.environ.get(name, "").strip() or str(default)
    if not value.isdecimal():
        raise UsageError(f"{name}={value}: must be a whole number")
    return int(value)


def _configure_ray_data() -> None:
    from ray.data import DataContext
    from ray.util.debug import log_once

    context = DataContext.get_current()
    context.enable_progress_bars = False  # jobs print their own progress, in rows instead of blocks
    # What a task of a sort holds in memory at a time; the default is 1 GiB.
    context.shuffle_input_batch_bytes = 64 * 2**20
    log_once("ray_data_progress_manager_disabled")  # marks that advice as already given
    # A refresh often has nothing to encode or to answer; Ray Data would advise a smaller actor pool.
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors for", UserWarning)
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def tokenize_with(n_threads: int) -> None:
    """Let this process's tokenizers use `n_threads`; it must not have tokenized before, nor fork afterwards."""
    if n_threads > 1:
        os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(min(n_threads, usable_cores()))}


def quiet_models(n_threads: int | None = None) -> None:
    """Prepare this process to hold a model: no progress bars in its log, and `n_threads` for torch on CPUs."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if n_threads is not None and not torch.cuda.is_available():
        torch.set_num_threads(n_threads)
