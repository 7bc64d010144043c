"""How a plug is trained: what is trained, the loss of a step, history dropout, the schedule, DeepSpeed's settings.

Shapes: N requests, B requests of a micro-batch, C of those that are held against another user's history, n behaviors of
one request, d encoder width.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from persona.models.encoder import TextEncoder
from persona.options import TrainingOptions
from persona.plug.personalized import PersonalizedLLM, Row
from persona.store import vectors
from persona.training.order import hash64

_WHOLE_PASSES = 1 / 11


def trainable(model: PersonalizedLLM) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name: all of the plug's, none of the LLM's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def new_optimizer(model: PersonalizedLLM, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW over the plug: the query encoder, which is pretrained, at a rate of its own."""
    named = trainable(model)
    query = [parameter for name, parameter in named.items() if name.startswith("plug.query_encoder.")]
    rest = [parameter for name, parameter in named.items() if not name.startswith("plug.query_encoder.")]
    groups = [{"params": rest, "lr": options.learning_rate, "peak_lr": options.learning_rate}]
    if query:
        groups.append({"params": query, "lr": options.query_learning_rate, "peak_lr": options.query_learning_rate})
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)


def deepspeed_settings(options: TrainingOptions, n_workers: int) -> dict[str, Any]:
    """The DeepSpeed dict. The plug stays in float32 and the LLM in its own precision, so there is no bf16 section."""
    return {
        "train_batch_size": options.global_batch,
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.global_batch // (n_workers * options.micro_batch),
        "gradient_clipping": options.max_gradient_norm,
        "zero_optimization": {"stage": options.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }


def learning_rate_factor(step: int, n_steps: int, warmup: float) -> float:
    """Linear warm-up over `warmup` of the steps, then linear decay to 0 (PAPER section 2); `step` counts from 0."""
    n_warmup = math.ceil(warmup * n_steps)
    if step < n_warmup:
        return (step + 1) / n_warmup
    return (n_steps - step) / max(n_steps - n_warmup, 1)


def drop_behaviors(row: Row, *, width: int, epoch: int, options: TrainingOptions) -> Row:
    """The row with a random part of its history left out, the same for this row and epoch on any worker.

    The reference writes the data 11 times instead: once whole, and ten times with int(n·U(0, 0.5)) + 1 behaviors left
    out; so here one pass in eleven is whole. At least one behavior stays, unless the row is one of the `empty_history`
    share.
    """
    history = vectors.from_bytes(row["history"], width)
    draw = np.random.default_rng(hash64("dropout", options.seed, epoch, row["request_id"]))
    if draw.random() < options.empty_history:
        return {**row, "history": b""}
    n = len(history)
    if draw.random() < _WHOLE_PASSES:
        return row
    n_dropped = min(int(n * draw.uniform(0, options.history_dropout)) + 1, n - 1) if options.history_dropout else 0
    if n_dropped < 1:
        return row
    kept = np.sort(draw.permutation(n)[n_dropped:])
    return {**row, "history": vectors.to_bytes(history[kept])}


def step_rows(
    rows: Sequence[Row],
    *,
    step: int,
    n_steps: int,
    epoch: int,
    width: int,
    options: TrainingOptions,
    encoder: TextEncoder | None,
) -> list[Row]:
    """What a step sees of its requests: parts of the histories, or while it aligns the vectors of the targets.

    `encoder` is the one of the store, None when no step to come aligns.
    """
    dropped = [drop_behaviors(row, width=width, epoch=epoch, options=options) for row in rows]
    if step >= aligned_steps(n_steps, options):
        return dropped
    assert encoder is not None
    return align(dropped, encoder)


def aligned_steps(n_steps: int, options: TrainingOptions) -> int:
    """How many steps, the first ones, align the plug with the LLM."""
    return round(options.alignment * n_steps)


def align(rows: Sequence[Row], encoder: TextEncoder) -> list[Row]:
    """The rows with the vector of their own target, as the store would have it, in the place of their history.

    A plug that can have a text written from its vector has found where the encoder's meanings lie for the LLM, which
    takes long to find out from histories that merely resemble the target (xRAG, arXiv 2405.13792, begins like this). A
    row without a history stays without: what stands in for it learns meanwhile.
    """
    places = [place for place, row in enumerate(rows) if row["history"]]
    targets_Nd = encoder.encode([rows[place]["target"] for place in places]).vectors
    found = list(rows)
    for place, target_d in zip(places, targets_Nd, strict=True):
        found[place] = {**rows[place], "history": vectors.to_bytes(target_d)}
    return found


def with_other_histories(rows: Sequence[Row]) -> tuple[list[int], list[Row]]:
    """Requests of a micro-batch, each with the history of the next one, and their places in it.

    Left out is a request whose next one is of the same user, or where one of the two has no history.
    """
    pairs = list(zip(rows, [*rows[1:], *rows[:1]], strict=True))
    places = [
        place
        for place, (row, after) in enumerate(pairs)
        if row["user_id"] != after["user_id"] and row["history"] and after["history"]
    ]
    return places, [{**pairs[place][0], "history": pairs[place][1]["history"]} for place in places]


def contrast_loss(own_C: torch.Tensor, other_C: torch.Tensor) -> torch.Tensor:
    """-Σ log p(own | y), summed over C requests: the nats it takes to tell from the target whose history it was.

    By Bayes' rule, with the own history and another's equally likely beforehand,
    p(own | y) = p(y | own) / (p(y | own) + p(y | other)) = σ(nll_other - nll_own), and so the loss is
    softplus(nll_own - nll_other): InfoNCE with one negative (arXiv 1807.03748), or Bradley-Terry as in DPO. Like eq. 6
    it is in nats, so both may be added. Its slope is at most 1 on either side and vanishes once the two are told apart,
    so that no text is made unlikely for ever.
    """
    return nn.functional.softplus(own_C - other_C).sum()


def train_step(
    engine: Any, rows: Sequence[Row], *, step: int, n_steps: int, options: TrainingOptions
) -> tuple[float, int]:
    """One optimizer step over this worker's rows of a global batch; all workers call it together.

    The loss is eq. 6, and with `options.contrast` so much of `contrast_loss`, divided by the target tokens of the
    *global* batch, so that one worker and many take the same step.

    Returns:
        the global batch's loss by eq. 6 alone in nats a token, and its number of target tokens.
    """
    model: PersonalizedLLM = engine.module
    parts = [rows[start : start + options.micro_batch] for start in range(0, len(rows), options.micro_batch)]
    others = [with_other_histories(part) if options.contrast else ([], []) for part in parts]
    # The engine is called once a micro-batch, so the same requests with other histories stand behind it.
    batches = [model.collate([*part, *again]) for part, (_, again) in zip(parts, others, strict=True)]
    own_targets = [batch.targets[: len(part)] for part, batch in zip(parts, batches, strict=True)]
    n_tokens = sum_over_workers(sum(len(target) for part in own_targets for target in part), model.llm.device)
    factor = learning_rate_factor(step, n_steps, options.warmup)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    # DeepSpeed averages over workers and over accumulated micro-batches; eq. 6 is a sum.
    scale = engine.world_size * len(batches) / n_tokens
    total = 0.0
    for part, (places, _), batch in zip(parts, others, batches, strict=True):
        nll = engine(batch)
        own_B, other_C = nll[: len(part)], nll[len(part) :]
        loss = own_B.sum()
        if places:
            loss = loss + options.contrast * contrast_loss(own_B[places], other_C)
        engine.backward(loss * scale)
        engine.step()
        total += float(own_B.detach().sum())
    return sum_over_workers(total, model.llm.device) / n_tokens, int(n_tokens)


@torch.no_grad()
def validation_loss(engine: Any, rows: Sequence[Row], *, micro_batch: int) -> float:
    """Loss in nats a token over all workers' held-out rows.

    Each worker makes as many forward passes as the one with most rows, since under ZeRO-3 all must call together; the
    surplus counts nothing.
    """
    model: PersonalizedLLM = engine.module
    device = model.llm.device
    ordered = sorted(rows, key=lambda row: len(row["input"]) + len(row["target"]))
    batches = [ordered[start : start + micro_batch] for start in range(0, len(ordered), micro_batch)]
    total, n_tokens = 0.0, 0
    for i in range(int(max_over_workers(len(batches), device))):
        batch = model.collate(batches[min(i, len(batches) - 1)])
        nll = float(engine(batch).sum())
        if i < len(batches):
            total += nll
            n_tokens += batch.n_target_tokens
    return sum_over_workers(total, device) / sum_over_workers(n_tokens, device)


def sum_over_workers(value: float, device: torch.device) -> float:
    """The sum of a number over all workers."""
    return _reduce(value, device, torch.distributed.ReduceOp.SUM)


def max_over_workers(value: float, device: torch.device) -> float:
    """The largest of a number over all workers."""
    return _reduce(value, device, torch.distributed.ReduceOp.MAX)


def _reduce(value: float, device: torch.device, operation: Any) -> float:
    if not torch.distributed.is_initialized():
        return value
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, operation)
    return float(tensor)
