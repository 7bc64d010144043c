"""A training worker's DeepSpeed engine: models, a new or resumed plug, and AdamW's state."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime import log, session
from jobs.runtime.training.spec import WorkerSettings
from persona.errors import PlugMismatch

if TYPE_CHECKING:
    import torch

    from persona.models.encoder import TextEncoder
    from persona.models.frozen_llm import FrozenLLM
    from persona.models.resolve import ModelFolder
    from persona.plug.personalized import PersonalizedLLM
    from persona.training.checkpoint import Progress


def start_engine(
    settings: WorkerSettings, encoder: "ModelFolder", last_checkpoint: Path | None, rank: int
) -> "tuple[Any, Progress]":
    """The engine over plug and frozen LLM, and the progress of the run, which has the size of a pass.

    All workers call it together; the one with rank 0 writes to the log.
    """
    from persona.training import checkpoint
    from persona.training.deepspeed import deepspeed_settings, gathered, new_engine

    session.quiet_models(settings.n_threads)
    llm = _load_llm(settings, deepspeed_settings(settings.spec.training, settings.n_workers))
    # A new plug reads the token embeddings, before the engine gathers weights.
    with gathered(llm.model.get_input_embeddings()):
        model = _new_model(settings, encoder, llm)
        if last_checkpoint is None:
            _initialize(model, encoder, settings)
    plug = model.plug
    if last_checkpoint is None:
        progress = checkpoint.Progress(token_norm=plug.token_norm, scale=plug.scale, llm_width=llm.width)
    else:
        progress = checkpoint.load_weights(model, last_checkpoint)
        plug.token_norm, plug.scale = progress.token_norm, progress.scale
    is_sharded = settings.spec.training.zero_stage == 3
    if not is_sharded:
        progress.notes = _check(llm, settings)
    progress.micro_batch = _micro_batch(settings, model, progress.micro_batch, rank)
    options = settings.with_micro_batch(progress.micro_batch).spec.training
    engine = new_engine(model, options, deepspeed_settings(options, settings.n_workers))
    if is_sharded:  # only the engine can gather the weights
        progress.notes = _check(llm, settings)
    if rank == 0:
        for note in progress.notes:
            log.say(note, level="warning")
    if last_checkpoint is not None:
        checkpoint.load_moments(engine, last_checkpoint, step=progress.step)
    return engine, progress


def _load_llm(settings: WorkerSettings, deepspeed: dict[str, Any]) -> "FrozenLLM":
    """The LLM on this worker's device; under ZeRO-3, this worker's share of it."""
    from persona.training.deepspeed import load_llm

    spec = settings.spec
    folder = local_model(settings.llm, flag="--llm")
    llm = load_llm(
        folder,
        deepspeed,
        precision=spec.precision,
        quantization=spec.llm_quantization,
        max_input_tokens=spec.max_input_tokens,
        max_target_tokens=spec.max_target_tokens,
        prompt=spec.prompt,
    )
    if spec.activation_checkpointing:
        llm.checkpoint_activations()
    return llm


def _check(llm: "FrozenLLM", settings: WorkerSettings) -> list[str]:
    """Compares the LLM with plain transformers code, and faster ways to compute its loss with the plain one.

    Returns a note about each way that this LLM cannot take.
    """
    from persona.engines import probe
    from persona.models.compiled import compile_layers

    spec = settings.spec
    probe.check_llm(llm)
    slower: dict[str, str | None] = {}
    if spec.activation_checkpointing and spec.retrieval.retrieve and llm.reads_ahead and not llm.is_encoder_decoder:
        slower["texts in front of the soft tokens are read with gradients"] = probe.check_reading_ahead(llm)
    if spec.compile:
        slower["--compile: the layers of the LLM run as they are"] = compile_layers(llm)
    return [f"{what}, which is slower ({reason})" for what, reason in slower.items() if reason is not None]


def _micro_batch(settings: WorkerSettings, model: "PersonalizedLLM", resumed: int, rank: int) -> int:
    """The size of a pass; `resumed` is that of the run so far, or 0."""
    from persona.store import vectors
    from persona.training import micro_batch

    options, share = settings.spec.training, settings.share
    if (size := micro_batch.settled(options, share, resumed)) is not None:
        return size
    longest = dict(settings.longest or {})
    longest["history"] = bytes(longest.get("n_behaviors", 0) * vectors.n_bytes(model.plug.width))
    size = micro_batch.choose(model, longest, options, share)
    if rank == 0:
        log.say(f"--micro-batch auto: a pass reads {size} of a worker's {share} requests a step")
    return size


def _new_model(settings: WorkerSettings, encoder: "ModelFolder", llm: "FrozenLLM") -> "PersonalizedLLM":
    """An untrained plug in front of the LLM, on its device; the seed makes it the same on every worker."""
    import torch

    from persona.plug import folder as plug_folder
    from persona.plug.module import Plug
    from persona.plug.personalized import PersonalizedLLM

    spec, identity = settings.spec, settings.identity
    torch.manual_seed(spec.training.seed)
    query_encoder, query_head = plug_folder.new_query_encoder(
        encoder, spec.plug_options, pooling=identity.pooling, width=identity.width, pretrained=True
    )
    plug = Plug(
        spec.plug_options,
        query_encoder=query_encoder,
        query_head=query_head,
        width=identity.width,
        llm_width=llm.width,
        token_norm=llm.token_norm(),
    )
    query_text = plug_folder.new_query_text(encoder, spec.query_prompt, spec.max_query_tokens)
    return PersonalizedLLM(plug.to(llm.device), llm, query_text, retrieved_tokens=spec.retrieval.front_tokens)


def _initialize(model: "PersonalizedLLM", encoder: "ModelFolder", settings: WorkerSettings) -> None:
    """Sets the typical behavior of a new plug, and fits the projector to the vocabulary when that is chosen."""
    import numpy as np
    import torch

    from persona.plug import warm_start
    from persona.store import vectors

    device = model.llm.device
    behaviors_Nd = vectors.from_bytes(settings.behaviors, settings.identity.width)
    model.plug.set_typical_behavior(torch.from_numpy(behaviors_Nd.astype(np.float32)).to(device))
    if settings.spec.training.warm_start == "vocabulary":
        warm_start.fit(model.plug, store_encoder(encoder, settings, device), model.llm, behaviors_Nd)


def store_encoder(folder: "ModelFolder", settings: WorkerSettings, device: "torch.device") -> "TextEncoder":
    """The frozen encoder, as it made the store's vectors."""
    from persona.models.encoder import TextEncoder

    identity = settings.identity
    return TextEncoder(
        folder,
        pooling=identity.pooling,
        max_tokens=identity.max_tokens,
        prompt=identity.document_prompt,
        width=identity.width,
        precision="fp32",
        device=str(device),  # explicit, because torch's default device is a thread's own
    )


def local_model(model: "ModelFolder", *, flag: str) -> "ModelFolder":
    """The driver's model on this node. Raises PlugMismatch when it is another one here."""
    from persona.models import resolve as models

    found = models.resolve(model.name, revision=model.revision, flag=flag)
    if found.fingerprint != model.fingerprint:
        raise PlugMismatch(
            f"{flag} {found.name!r} is another model on this node than on the node where the job was started; pin its "
            "revision, or give every node the same folder"
        )
    return found
