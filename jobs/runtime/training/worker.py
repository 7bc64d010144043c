"""What a training worker does: models, DeepSpeed, the last checkpoint if there is one, and the steps from there."""

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime import session
from jobs.runtime.tally import Tally
from persona.errors import PlugMismatch
from persona.options import TrainingOptions

if TYPE_CHECKING:
    import pyarrow as pa

    from jobs.train import Config
    from persona.models.encoder import TextEncoder
    from persona.models.frozen_llm import FrozenLLM
    from persona.models.resolve import ModelFolder
    from persona.plug.module import Plug
    from persona.plug.personalized import Row


def train_worker(settings: Mapping[str, Any]) -> None:
    """Trains from the last checkpoint on, together with the other workers; Ray Train calls it in each of them.

    `settings` has `config`, `workers`, `threads` (of this process), `n_steps_epoch`, `encoder` and `llm` (models'
    cards), `identity` (of the store) and `tally`. Datasets are `validation` and an `epoch-N` for each epoch, of which
    each block is this worker's share of one global batch.
    """
    from ray import train

    from persona.training.order import one_ahead, shuffle_windows
    from persona.training.step import aligned_steps, step_rows, train_step, validation_loss

    config: Config = settings["config"]
    tally: Tally = settings["tally"]
    options = config.training
    context = train.get_context()
    rank, first = context.get_world_rank(), context.get_world_rank() == 0
    n_epoch, n_steps = settings["n_steps_epoch"], settings["n_steps_epoch"] * options.epochs
    share = options.global_batch // settings["workers"]
    encoder = _encoder_folder(settings)
    with _last_checkpoint() as folder:
        engine, state = _engine(settings, config, options, encoder, folder)
    begun = state["step"]
    held_out = _held_out_rows(train.get_dataset_shard("validation"), rank, settings["workers"])
    if options.empty_history == 1:
        # What has never seen a history must be judged, and its best step chosen, without one.
        held_out = [{**row, "history": b""} for row in held_out]
    aligns = begun < aligned_steps(n_steps, options)
    frozen = _frozen_encoder(encoder, settings, engine.module.llm.device) if aligns else None
    width = settings["identity"]["width"]
    seeing: dict[str, Any] = {"n_steps": n_steps, "width": width, "options": options, "encoder": frozen}

    def batches(epoch: int, blocks: "Iterator[pa.Table]") -> "Iterator[tuple[int, list[Row]]]":
        for index, block in enumerate(shuffle_windows(blocks, epoch=epoch, seed=options.seed)):
            if (step := epoch * n_epoch + index) < begun:
                continue
            if block.num_rows != share:
                raise AssertionError(f"a worker's share of a batch has {block.num_rows} requests instead of {share}")
            yield step, step_rows(block.to_pylist(), step=step, epoch=epoch, **seeing)

    stopwatch = _Stopwatch()
    for epoch in range(begun // n_epoch, options.epochs):
        blocks = train.get_dataset_shard(f"epoch-{epoch}").iter_batches(batch_size=None, batch_format="pyarrow")
        for step, rows in one_ahead(batches(epoch, blocks)):
            stopwatch.lap("waiting")
            loss, n_tokens = train_step(engine, rows, step=step, n_steps=n_steps, options=options)
            seconds = stopwatch.lap("step")
            state["step"] = step + 1
            state["seconds"] += seconds
            state["tokens"] += n_tokens
            state["training_curve"].append([step + 1, round(loss, 5)])
            if first:
                held_out_loss = state.get("validation_loss", 0.0)
                now = {"step": step + 1, "of": n_steps, "loss": loss, "validation": held_out_loss}
                tally.note_soon("train", "now", {**now, "requests_per_s": options.global_batch / seconds})
            if (step + 1) % config.validate_every == 0 or step + 1 == n_steps:
                state["validation_loss"] = validation_loss(engine, held_out, micro_batch=options.micro_batch)
                state["validation_curve"].append([step + 1, round(state["validation_loss"], 5)])
                stopwatch.lap("validate")
                _report(engine, state, first)
                stopwatch.lap("save")
                if first:
                    tally.note("time", f"since step {begun}", stopwatch.seconds)


class _Stopwatch:
    """Seconds from one lap to the next, added up by what was done in them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def lap(self, name: str) -> float:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.seconds[name] += seconds
        return seconds


@contextmanager
def _last_checkpoint() -> Iterator[Path | None]:
    """The folder of the run's last checkpoint, or None at its start."""
    from ray import train

    last = train.get_checkpoint()
    if last is None:
        yield None
        return
    with last.as_directory() as folder:
        yield Path(folder)


def _engine(
    settings: Mapping[str, Any],
    config: "Config",
    options: TrainingOptions,
    encoder: "ModelFolder",
    folder: Path | None,
) -> Any:
    """A DeepSpeed engine over plug and frozen LLM, and the state of the run."""
    import deepspeed
    import torch

    from persona.models import resolve as models
    from persona.models.frozen_llm import FrozenLLM
    from persona.plug import folder as plug_folder
    from persona.plug.module import Plug
    from persona.plug.personalized import PersonalizedLLM
    from persona.training import checkpoint
    from persona.training.step import deepspeed_settings, new_optimizer

    session.quiet_models(settings["threads"])
    # On CPUs this op is compiled with g++ at every start and then never used outside DeepSpeed's own launcher.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    identity = settings["identity"]
    llm_folder = models.resolve(config.llm, revision=config.llm_revision, flag="--llm")
    _check_same(llm_folder, settings["llm"])
    torch.manual_seed(options.seed)
    llm = FrozenLLM.load(llm_folder, max_input_tokens=config.max_input_tokens, precision=config.precision)
    if config.activation_checkpointing:
        llm.checkpoint_activations()
    plug_options = config.plug_options
    plug = Plug(
        plug_options,
        query_encoder=plug_folder.new_query_encoder(encoder, plug_options, pretrained=True),
        pooling=identity["pooling"],
        width=identity["width"],
        llm_width=llm.width,
        token_norm=llm.token_norm(),
    )
    query_text = plug_folder.new_query_text(encoder, config.query_prefix, config.max_query_tokens)
    model = PersonalizedLLM(plug.to(llm.device), llm, query_text, prefix_tokens=config.retrieval.front_tokens)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "tokens": 0, "training_curve": [], "validation_curve": []}
    if folder is None:
        _start(plug, encoder, llm, settings, warm=options.warm_start == "vocabulary")
    else:
        state = checkpoint.load_weights(model, folder)
        # Measured once: another machine may measure a little differently.
        plug.token_norm, plug.scale = state["token_norm"], state["scale"]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=new_optimizer(model, options), config=deepspeed_settings(options, settings["workers"])
    )
    if folder is not None:
        checkpoint.load_moments(engine, folder, step=state["step"])
    state |= {"token_norm": plug.token_norm, "scale": plug.scale, "llm_width": llm.width}
    return engine, state


def _start(plug: "Plug", encoder: "ModelFolder", llm: "FrozenLLM", settings: Mapping[str, Any], *, warm: bool) -> None:
    """Tells a new plug what is typical, and `warm` where words lie; every worker finds the same."""
    import numpy as np
    import torch

    from persona.plug import warm_start
    from persona.store import vectors

    behaviors_Nd = vectors.from_bytes(settings["behaviors"], settings["identity"]["width"])
    plug.set_typical_behavior(torch.from_numpy(behaviors_Nd.astype(np.float32)).to(llm.device))
    if warm:
        warm_start.fit(plug, _frozen_encoder(encoder, settings, llm.device), llm, behaviors_Nd)


def _encoder_folder(settings: Mapping[str, Any]) -> "ModelFolder":
    """The store's encoder on this node."""
    from persona.models import resolve as models

    card = settings["encoder"]
    folder = models.resolve(card["name"], revision=settings["identity"]["revision"], flag="--encoder")
    _check_same(folder, card)
    return folder


def _frozen_encoder(folder: "ModelFolder", settings: Mapping[str, Any], device: Any) -> "TextEncoder":
    """The encoder as it made the store's vectors. The device is named, since each thread has its own default."""
    from persona.models.encoder import TextEncoder

    how = {name: settings["identity"][name] for name in ("pooling", "max_tokens")}
    return TextEncoder(folder, **how, precision="fp32", device=str(device))


def _check_same(found: "ModelFolder", card: Mapping[str, str]) -> None:
    if found.fingerprint != card["fingerprint"]:
        raise PlugMismatch(
            f"{found.name!r} is another model on this node than where the job was started; pin its revision, or give "
            "every node the same folder"
        )


def _held_out_rows(shard: Any, rank: int, workers: int) -> "list[Row]":
    """What this worker validates on, in an order that does not depend on how the rows came."""
    tables: Iterator[pa.Table] = shard.iter_batches(batch_size=None, batch_format="pyarrow")
    rows = [row for table in tables for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row["request_id"])[rank::workers]


def _report(engine: Any, state: dict[str, Any], first: bool) -> None:
    """Hands the state to Ray Train, which keeps the best and the latest."""
    from ray import train

    from persona.training import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(engine, Path(folder), state, write=first)
        metrics = {"step": state["step"], "validation_loss": state["validation_loss"]}
        train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder) if first else None)
