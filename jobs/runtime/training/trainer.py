"""Ray Train over the windows of a run."""

from typing import TYPE_CHECKING, Any

from jobs.runtime.session import Machines
from jobs.runtime.tally import Tally
from jobs.runtime.training.inputs import (
    TrainingInputs,
    TrainingRequests,
    longest_request,
    run_windows,
    some_behaviors,
)
from jobs.runtime.training.spec import RunSpec, WorkerSettings

if TYPE_CHECKING:
    from ray.train import RunConfig


def fit(
    spec: RunSpec,
    inputs: TrainingInputs,
    requests: TrainingRequests,
    tally: Tally,
    machines: Machines,
    *,
    n_workers: int,
    max_failures: int,
    reports_steps: bool,
) -> Any:
    """Trains, or resumes the run, and returns Ray Train's result; `reports_steps` as in WorkerSettings."""
    from ray.train import DataConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs.runtime.training.worker import train_worker

    tries_sizes = spec.training.micro_batch == "auto" and machines.gpus
    settings = WorkerSettings(
        spec=spec,
        n_workers=n_workers,
        n_threads=max(1, machines.cores // n_workers),
        n_steps=spec.training.n_steps(requests.n_train),
        encoder=inputs.encoder,
        llm=inputs.llm,
        identity=inputs.store.identity,
        behaviors=some_behaviors(requests, spec.max_behaviors),
        windows=run_windows(requests, spec, tally, n_workers=n_workers),
        tally=tally,
        reports_steps=reports_steps,
        longest=longest_request(requests, spec.max_behaviors) if tries_sizes else None,
    )
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # Ray's type leaves out the `return_value` of its results
        train_loop_config={"settings": settings},
        scaling_config=ScalingConfig(num_workers=n_workers, use_gpu=bool(machines.gpus)),
        torch_config=TorchConfig(backend="nccl" if machines.gpus else "gloo"),
        run_config=_run_config(spec.run, inputs.runs, max_failures),
        datasets={"validation": requests.held_out},
        dataset_config=DataConfig(datasets_to_split=[]),
    )
    return trainer.fit()


def _run_config(name: str, runs: str, max_failures: int) -> "RunConfig":
    """Keeps the checkpoint with the lowest held-out loss and the latest one."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig

    return RunConfig(
        name=name,
        storage_path=runs,
        failure_config=FailureConfig(max_failures=max_failures),
        checkpoint_config=CheckpointConfig(
            num_to_keep=2, checkpoint_score_attribute="validation_loss", checkpoint_score_order="min"
        ),
    )
