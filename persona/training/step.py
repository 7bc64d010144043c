"""One training step, and the loss on held-out requests.

Shapes: B requests of a micro-batch, C of those that are also read with another user's history.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from persona.options import TrainingOptions
from persona.plug.personalized import PersonalizedLLM, Row
from persona.training.augmentation import with_other_histories
from persona.training.deepspeed import max_over_workers, sum_over_workers
from persona.training.schedule import learning_rate_factor


def train_step(
    engine: Any, rows: Sequence[Row], *, step: int, n_steps: int, options: TrainingOptions
) -> tuple[float, int]:
    """One optimizer step over this worker's rows of a global batch; all workers call it together.

    The loss is PPlug eq. 6 plus `options.contrast` times `contrast_loss`, divided by the target tokens of the *global*
    batch, so that the step does not depend on the number of workers.

    Returns:
        the global batch's loss by eq. 6 alone, in nats a token, and its number of target tokens.
    """
    model: PersonalizedLLM = engine.module
    parts = [rows[start : start + options.micro_batch] for start in range(0, len(rows), options.micro_batch)]
    pairs = [with_other_histories(part) if options.contrast else ([], []) for part in parts]
    # The engine is called once a micro-batch, so rows with other histories are appended to it.
    batches = [model.collate([*part, *others]) for part, (_, others) in zip(parts, pairs, strict=True)]
    own_targets = [batch.targets[: len(part)] for part, batch in zip(parts, batches, strict=True)]
    n_tokens = sum_over_workers(sum(len(target) for part in own_targets for target in part), model.llm.device)
    factor = learning_rate_factor(step, n_steps, options.warmup)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    # DeepSpeed averages over workers and over accumulated micro-batches; eq. 6 is a sum.
    scale = engine.world_size * len(batches) / n_tokens
    total = 0.0
    for part, (numbers, _), batch in zip(parts, pairs, batches, strict=True):
        nll = engine(batch)
        own_B, other_C = nll[: len(part)], nll[len(part) :]
        loss = own_B.sum()
        if numbers:
            loss = loss + options.contrast * contrast_loss(own_B[numbers], other_C)
        engine.backward(loss * scale)
        engine.step()
        total += float(own_B.detach().sum())
    return sum_over_workers(total, model.llm.device) / n_tokens, int(n_tokens)


def contrast_loss(own_C: Tensor, other_C: Tensor) -> Tensor:
    """-Σ log p(own | target) over C requests: the nats to infer from the target which of two histories is the user's.

    With equal priors, Bayes' rule gives p(own | y) = p(y | own) / (p(y | own) + p(y | other)) = σ(nll_other - nll_own),
    so the loss is softplus(nll_own - nll_other): InfoNCE with one negative (arXiv 1807.03748), or Bradley-Terry as in
    DPO. It is in nats like eq. 6, so the two add up. Its slope is at most 1 and vanishes once the histories are told
    apart, so it does not push the likelihood of a text down without limit.

    Args:
        own_C: nll of the targets under the users' own histories, in nats.
        other_C: nll of the same targets under the other users' histories.
    """
    return nn.functional.softplus(own_C - other_C).sum()


@torch.no_grad()
def validation_loss(engine: Any, rows: Sequence[Row], *, micro_batch: int) -> float:
    """Loss in nats a token over all workers' held-out rows; all workers call it together.

    Every worker makes as many forward passes as the one with the most rows, as ZeRO-3 requires; those beyond its own
    rows do not count.
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
