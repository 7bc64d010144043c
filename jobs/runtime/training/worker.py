"""The loop of a training worker: steps from the last checkpoint on, with validations and checkpoints between them."""

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from jobs.runtime.tracking import HELD_OUT_LOSS, LOSS_OF_NONE
from jobs.runtime.training import held_out as at_the_end
from jobs.runtime.training.engine import local_model, start_engine, store_encoder
from jobs.runtime.training.spec import WorkerSettings
from jobs.runtime.training.step_figures import step_figures

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.models.encoder import TextEncoder
    from persona.plug.personalized import Row
    from persona.training.checkpoint import Progress


_SMOOTHED_STEPS = 20  # that the loss on the progress line is the mean of: batches differ, so that of one step jumps


def train_worker(loop_config: Mapping[str, WorkerSettings]) -> dict[str, list[Any]] | None:
    """Trains together with the other workers, and returns `held_out.measure`; Ray Train calls it in each of them.

    `loop_config` has the `settings`; the dataset `validation` has the held-out requests.
    """
    from ray import train

    from persona.training.augmentation import aligned_steps
    from persona.training.order import one_ahead
    from persona.training.step import train_step

    settings = loop_config["settings"]
    rank = train.get_context().get_world_rank()
    encoder_folder = local_model(settings.encoder, flag="--encoder")
    with _last_checkpoint() as folder:
        engine, progress = start_engine(settings, encoder_folder, folder, rank)
    settings = settings.with_micro_batch(progress.micro_batch)
    spec, tally = settings.spec, settings.tally
    begun = progress.step
    held_out = _held_out_rows(settings, rank)
    aligns = begun < aligned_steps(settings.n_steps, spec.training)
    encoder = store_encoder(encoder_folder, settings, engine.module.llm.device) if aligns else None
    stopwatch = Stopwatch()
    if not progress.validation_curve:
        _validate(engine, settings, held_out, progress, rank)
        stopwatch.lap("validate")
    # A run that has stopped early takes no more steps.
    steps = iter(()) if _stops(engine, settings, progress) else _steps(settings, rank, begun, encoder)
    for step, rows in one_ahead(steps):
        stopwatch.lap("waiting")
        loss, n_tokens = train_step(engine, rows, step=step, n_steps=settings.n_steps, options=spec.training)
        seconds = stopwatch.lap("step")
        progress.add_step(loss, n_tokens=n_tokens, seconds=seconds)
        if rank == 0:
            tally.note_soon("train", "now", _status(settings, progress, begun=begun, loss=loss, seconds=seconds))
            if settings.reports_steps:
                tally.point_soon(
                    progress.step,
                    step_figures(spec.training.global_batch, stopwatch.seconds, loss=loss, seconds=seconds),
                )
        if progress.step % spec.validate_every == 0 or progress.step == settings.n_steps:
            _validate(engine, settings, held_out, progress, rank)
            stopwatch.lap("validate")
            _report(engine, progress, write=rank == 0)
            stopwatch.lap("save")
            if rank == 0:
                tally.note("time", f"since step {begun}", stopwatch.seconds)
            if _stops(engine, settings, progress):
                break
    losses = at_the_end.measure(engine, spec, held_out, progress.step)
    stopwatch.lap("validate")
    if rank == 0:
        tally.note("time", f"since step {begun}", stopwatch.seconds)
    return losses


class Stopwatch:
    """Adds up seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def lap(self, name: str) -> float:
        """Adds the seconds since the last lap to `name`, and returns them."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.seconds[name] += seconds
        return seconds


@contextmanager
def _last_checkpoint() -> Iterator[Path | None]:
    """The folder of the run's last checkpoint; None when the run is new."""
    from ray import train

    last = train.get_checkpoint()
    if last is None:
        yield None
        return
    with last.as_directory() as folder:
        yield Path(folder)


def _held_out_rows(settings: WorkerSettings, rank: int) -> "list[Row]":
    """The held-out rows of this worker, in an order that does not depend on how they arrive."""
    from ray import train

    shard: Any = train.get_dataset_shard("validation")
    tables: Iterator[pa.Table] = shard.iter_batches(batch_size=None, batch_format="pyarrow")
    rows = sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["request_id"])
    mine = rows[rank :: settings.n_workers]
    # A plug that never sees a history must be validated without one.
    return [{**row, "history": b""} for row in mine] if settings.spec.training.empty_history == 1 else mine


def _validate(engine: Any, settings: WorkerSettings, held_out: "list[Row]", progress: "Progress", rank: int) -> None:
    """Measures the held-out loss, also without any persona, and reports both to a tracker."""
    from persona.training.step import validation_loss

    options = settings.spec.training
    own, none = validation_loss(engine, held_out, options), None
    if options.empty_history < 1:  # else both are the same
        bare = [{**row, "history": b""} for row in held_out]
        none = validation_loss(engine, bare, options)
    progress.add_validation(own, none=none)
    if rank == 0 and settings.reports_steps:
        settings.tally.point_soon(progress.step, {HELD_OUT_LOSS: own} | ({} if none is None else {LOSS_OF_NONE: none}))


def _stops(engine: Any, settings: WorkerSettings, progress: "Progress") -> bool:
    """Whether the run ends before its last step; all workers call it together and get the same answer."""
    from persona.training.deepspeed import max_over_workers

    if not settings.spec.patience:
        return False
    return max_over_workers(progress.has_converged(settings.spec.patience), engine.module.llm.device) > 0


def _steps(
    settings: WorkerSettings, rank: int, begun: int, encoder: "TextEncoder | None"
) -> "Iterator[tuple[int, list[Row]]]":
    """The remaining steps with this worker's rows."""
    from persona.training.augmentation import step_rows

    options, width = settings.spec.training, settings.identity.width
    for step, epoch, share in settings.windows.steps(rank, begun):
        yield (
            step,
            step_rows(
                share.to_pylist(),
                step=step,
                n_steps=settings.n_steps,
                epoch=epoch,
                width=width,
                options=options,
                encoder=encoder,
            ),
        )


def _status(
    settings: WorkerSettings, progress: "Progress", *, begun: int, loss: float, seconds: float
) -> dict[str, float]:
    """What the progress line shows."""
    return {
        "step": progress.step,
        "of": settings.n_steps,
        "begun": begun,
        "loss": loss,
        "mean_loss": mean(one for _, one in progress.training_curve[-_SMOOTHED_STEPS:]),
        "validation": progress.validation_loss or 0.0,
        "none": progress.none_curve[-1][1] if progress.none_curve else 0.0,
        "requests_per_s": settings.spec.training.global_batch / seconds,
    }


def _report(engine: Any, progress: "Progress", *, write: bool) -> None:
    """Gives Ray Train a checkpoint, of which it keeps the best and the latest."""
    from ray import train

    from persona.training import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(engine, Path(folder), progress, write=write)
        metrics = {"step": progress.step, "validation_loss": progress.validation_loss}
        train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder) if write else None)
