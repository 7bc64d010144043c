"""One process of a DeepSpeed test: trains a tiny plug for a few steps, saves half-way, resumes from a checkpoint."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import resolve
from persona.options import Precision, TrainingOptions
from persona.plug.personalized import PersonalizedLLM
from persona.training.checkpoint import Progress
from tests.plugs import new_model, row

N_STEPS, STOP, GLOBAL_BATCH, MICRO_BATCH = 6, 3, 8, 2
# The first four rows have no history, so a micro-batch and a worker's whole share have no behavior. Some neighboring
# rows are of one user. Some micro-batches, and a worker's whole share, have no retrieved text.
ROWS = [
    {
        **row(number, 0 if number < 4 else number % 4),
        "user_id": f"u{2 * number // 5}",
        "retrieved": ["the movie", "a paper " * number][: max(number % 4 - 1, 0) if number > 4 else 0],
    }
    for number in range(N_STEPS * GLOBAL_BATCH)
]
# Odd, so that two workers have different numbers of batches.
HELD_OUT = [{**row(1000 + number, number % 5), "retrieved": ["a movie"] * (number % 3)} for number in range(9)]

# What is saved with the checkpoint of the first STOP steps.
PROGRESS = Progress(
    step=STOP,
    seconds=1.5,
    tokens=123,
    training_curve=[(1, 4.5), (2, 4.25)],
    validation_curve=[(2, 4.0)],
    validation_loss=4.0,
    token_norm=1.7,
    scale=2.5,
    llm_width=48,
)


def run(case: dict[str, Any], rank: int, n_workers: int) -> dict[str, Any]:
    """One training run.

    Args:
        case: `llm` and `encoder` (folders), `stage`, and optionally `plug` (options), `contrast`, `clip` (gradient
            norm), `front_tokens` (of retrieved texts), `precision`, `recompute` (activations), `save` (folder for a
            checkpoint after half of the steps), `start` (such a folder to resume from), `forget_moments` (of that
            folder), `shard_small` (ZeRO-3 shards parameters of any size, as it does with those of a large LLM).
        rank: of this process.
        n_workers: number of processes.
    """
    import deepspeed

    from persona.engines import probe
    from persona.training import checkpoint
    from persona.training.deepspeed import (
        deepspeed_settings,
        gather_over_workers,
        gathered,
        load_llm,
        new_engine,
    )
    from persona.training.step import target_losses, train_step, validation_loss

    options = new_options(case, case["stage"])
    settings = deepspeed_settings(options, n_workers)
    if case.get("shard_small"):
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    llm = load_llm(resolve(case["llm"], flag="--llm"), settings, precision=precision_of(case), device="cpu")
    with gathered(llm.model.get_input_embeddings()):
        model = new_case_model(case, llm)
    if case.get("recompute"):
        llm.checkpoint_activations()
    resumed = checkpoint.load_weights(model, Path(case["start"])) if "start" in case else None
    begun = resumed.step if resumed else 0
    engine = new_engine(model, options, settings)
    probe.check_llm(llm)
    if "start" in case and not case.get("forget_moments"):
        checkpoint.load_moments(engine, Path(case["start"]), step=begun)
    losses, share = [], GLOBAL_BATCH // n_workers
    for step in range(begun, N_STEPS):
        start = step * GLOBAL_BATCH + rank * share
        rows = ROWS[start : start + share]
        loss, n_tokens = train_step(engine, rows, step=step, n_steps=N_STEPS, options=options)
        losses.append(loss)
        if step + 1 == STOP and "save" in case:
            checkpoint.save(engine, Path(case["save"]), PROGRESS, write=rank == 0)
    held_out = validation_loss(engine, HELD_OUT[rank::n_workers], options)
    engine.empty_partition_cache()  # some weights are still being gathered for a backward pass
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        plain = new_case_model(case)
        unchanged = llm_bytes(model) == llm_bytes(plain)
        moved = moved_parameters(model, plain)
    selected = []
    if "save" in case:
        checkpoint.load_selected(engine, Path(case["save"]))
        selected = gather_over_workers(target_losses(engine, HELD_OUT[rank::n_workers], options))
    return {
        "losses": losses,
        "held_out": held_out,
        "selected": selected,
        "n_tokens": n_tokens,
        "llm_unchanged": unchanged,
        "llm_dtype": str(model.llm.model.dtype),
        "moved": moved,
        "progress": resumed and json.loads(resumed.to_json()),
    }


def plain_run(case: dict[str, Any]) -> list[float]:
    """The same steps without DeepSpeed: one process, the global batch in one sum, AdamW, a clipped gradient norm."""
    from persona.training.deepspeed import new_optimizer, trainable
    from persona.training.schedule import learning_rate_factor

    options, model, losses = new_options(case, 1), new_case_model(case), []
    optimizer = new_optimizer(model, options)
    for step in range(N_STEPS):
        rows = ROWS[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        batches = [model.collate([one]) for one in rows]
        n_tokens = sum(batch.n_target_tokens for batch in batches)
        loss = sum(model(batch).sum() for batch in batches) / n_tokens
        optimizer.zero_grad()
        (loss + options.contrast * plain_contrast(model, rows) / n_tokens).backward()
        if options.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(trainable(model).values(), options.max_gradient_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, N_STEPS, options.warmup)
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain_contrast(model: PersonalizedLLM, rows: Sequence[dict[str, Any]]) -> torch.Tensor | float:
    """Request by request: minus the log-probability of the own history against that of the next request."""
    total: torch.Tensor | float = 0.0
    for number, one in enumerate(rows):
        start = number // MICRO_BATCH * MICRO_BATCH
        other = rows[start + (number - start + 1) % MICRO_BATCH]
        if one["user_id"] != other["user_id"] and one["history"] and other["history"]:
            histories = (one["history"], other["history"])
            nll_2 = torch.cat([model(model.collate([{**one, "history": history}])) for history in histories])
            total = total - (-nll_2).log_softmax(0)[0]
    return total


def new_options(case: dict[str, Any], stage: int) -> TrainingOptions:
    """Learning rates that change the loss visibly in six steps, and gradients that are clipped by default."""
    return TrainingOptions(
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        learning_rate=6e-2,
        query_learning_rate=1e-3,
        warmup=0.3,
        persona_warmup=0,
        zero_stage=stage,
        contrast=case.get("contrast", 0.0),
        max_gradient_norm=case.get("clip", 1.0),
    )


def new_case_model(case: dict[str, Any], llm: FrozenLLM | None = None) -> PersonalizedLLM:
    """The model of a case before training, by default with a whole LLM of its own."""
    if llm is None:
        llm = FrozenLLM.load(resolve(case["llm"], flag="--llm"), precision=precision_of(case), device="cpu")
    options = {"learn_temperature": case.get("plug", {}).get("weights") != "mean", **case.get("plug", {})}
    model = new_model(resolve(case["encoder"], flag="--encoder"), llm, **options)
    model.retrieved_tokens = case.get("front_tokens", 0)
    return model


def precision_of(case: dict[str, Any]) -> Precision:
    """The LLM's precision, by default float32."""
    return case.get("precision", "fp32")


def llm_bytes(model: PersonalizedLLM) -> str:
    """A hash of every byte of the LLM's weights."""
    digest = hashlib.blake2b()
    for name, tensor in sorted(model.llm.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def moved_parameters(model: PersonalizedLLM, start: PersonalizedLLM) -> list[str]:
    """Names of all parameters that changed."""
    mine, theirs = dict(model.named_parameters()), dict(start.named_parameters())
    return sorted(name for name in mine if not torch.equal(mine[name].detach(), theirs[name].detach()))
