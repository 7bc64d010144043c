"""One training step, and the loss on held-out requests.

Shapes: B requests of a pass, C of those that are also read with another user's history.

With `options.preference`, each row has a `rejected` text, and nats and tokens of both texts under the LLM without the
plug: `reference_nats`, `reference_tokens`, `reference_rejected_nats` and `reference_rejected_tokens`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from persona.errors import InputError, UsageError
from persona.models.device import to_device
from persona.options import TrainingOptions
from persona.plug.personalized import Batch, PersonalizedLLM, Row
from persona.training.augmentation import with_other_histories, with_rejected
from persona.training.deepspeed import max_over_workers, sum_over_workers
from persona.training.schedule import learning_rate_factor, persona_strength


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """What one forward and backward pass reads.

    Attributes:
        rows: B requests.
        contrasted: the numbers of C rows that are also read with another user's history.
        batch: the rows with their targets, with a preference the same with their rejected texts, then the C rows.
    """

    rows: Sequence[Row]
    contrasted: Sequence[int]
    batch: Batch

    @property
    def n_target_tokens(self) -> int:
        """Tokens of the rows' targets."""
        return sum(map(len, self.batch.targets[: len(self.rows)]))

    def losses(self, nll: Tensor, options: TrainingOptions) -> tuple[Tensor, Tensor]:
        """`objective` in nats, without and with `options.contrast` times `contrast_loss`; `nll` is of the batch."""
        loss = objective(nll, self.rows, options)
        if not self.contrasted:
            return loss, loss
        numbers_C = to_device(torch.tensor(self.contrasted), nll.device)
        return loss, loss + options.contrast * contrast_loss(nll[numbers_C], nll[-len(self.contrasted) :])


def micro_batches(model: PersonalizedLLM, rows: Sequence[Row], options: TrainingOptions) -> list[MicroBatch]:
    """A worker's rows of a global batch, cut into passes of rows of similar length."""
    others = with_other_histories(rows) if options.contrast else [None] * len(rows)
    return [
        micro_batch(model, [rows[number] for number in numbers], [others[number] for number in numbers], options)
        for numbers in _by_length(rows, options.pass_size(len(rows)))
    ]


def micro_batch(
    model: PersonalizedLLM, rows: Sequence[Row], others: Sequence[Row | None], options: TrainingOptions
) -> MicroBatch:
    """One pass over the rows; `others` are the same with other histories, or None where there is no such pair."""
    again = {number: other for number, other in enumerate(others) if other is not None}
    batch = _collate(model, rows, options, others=list(again.values()))
    return MicroBatch(rows=rows, contrasted=list(again), batch=batch)


def train_step(
    engine: Any, rows: Sequence[Row], *, step: int, n_steps: int, options: TrainingOptions
) -> tuple[float, int]:
    """One optimizer step over this worker's rows of a global batch; all workers call it together.

    The loss is divided by the target tokens of the *global* batch, so that the step depends neither on the number of
    workers nor on the size of a pass. The host waits for the device once, at the end.

    Returns:
        the global batch's loss without contrast, in nats a token, and its number of target tokens.

    Raises:
        UsageError: the loss is not finite.
    """
    model: PersonalizedLLM = engine.module
    # The engine is called once a pass, so rows with rejected texts and with other histories are appended to it.
    parts = micro_batches(model, rows, options)
    n_tokens = sum_over_workers(_float64(sum(part.n_target_tokens for part in parts), model.llm.device))
    factor = learning_rate_factor(step, n_steps, options.warmup)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    model.plug.full_strength.fill_(persona_strength(step, options.persona_warmup))
    # DeepSpeed averages over workers and over accumulated passes; eq. 6 is a sum.
    scale = (engine.world_size * len(parts) / n_tokens).float()
    total = torch.zeros_like(n_tokens)
    for part in parts:
        loss, with_contrast = part.losses(engine(part.batch), options)
        total += loss.detach()
        engine.backward(with_contrast * scale)
        engine.step()
    mean, n = torch.stack([sum_over_workers(total) / n_tokens, n_tokens]).tolist()
    return _finite(mean, f"loss of step {step + 1:,}", options), int(n)


def _finite(loss: float, name: str, options: TrainingOptions) -> float:
    """The loss, which all workers have. Raises UsageError if the run has diverged: its weights are lost then."""
    if math.isfinite(loss):
        return loss
    raise UsageError(
        f"--learning-rate {options.learning_rate:g}: the {name} is {loss}, so the training has diverged; give the run "
        "another name with --run and a smaller rate (try a tenth), or a smaller --max-gradient-norm"
    )


def _float64(value: float, device: torch.device) -> Tensor:
    return to_device(torch.tensor(value, dtype=torch.float64), device)


def _collate(
    model: PersonalizedLLM, rows: Sequence[Row], options: TrainingOptions, *, others: Sequence[Row] = ()
) -> Batch:
    """One batch of the rows, then the same with their rejected texts if there is a preference, then `others`."""
    rejected = with_rejected(rows) if options.preference else []
    batch = model.collate([*rows, *rejected, *others])
    if options.preference:
        _check_reference(rows, [len(target) for target in batch.targets])
    return batch


def _check_reference(rows: Sequence[Row], n_tokens: Sequence[int]) -> None:
    """Raises InputError when the reference of a row was measured on other texts; `n_tokens` are of both, B and B."""
    n_rows = len(rows)
    for row, *read in zip(rows, n_tokens[:n_rows], n_tokens[n_rows : 2 * n_rows], strict=True):
        measured = [row["reference_tokens"], row["reference_rejected_tokens"]]
        if measured != read:
            raise InputError(
                f"--reference: target and rejected text of request {row['request_id']!r} had {measured[0]} and "
                f"{measured[1]} tokens when they were measured, and have {read[0]} and {read[1]} now; measure them "
                "again with jobs.evaluate --persona bare"
            )


def objective(nll: Tensor, rows: Sequence[Row], options: TrainingOptions) -> Tensor:
    """The loss of B rows in nats, without contrast: PPlug eq. 6 and `preference_loss`, each with its weight.

    Args:
        nll: of the rows' targets (B,), and with a preference behind them of their rejected texts (B,); what follows is
            not read.
        rows: with the nats of the reference if there is a preference.
        options: with the weights.
    """
    target_B = nll[: len(rows)]
    if not options.preference:
        return target_B.sum()
    rejected_B = nll[len(rows) : 2 * len(rows)]
    reference_B, reference_rejected_B = (
        to_device(torch.tensor([row[name] for row in rows], dtype=nll.dtype), nll.device)
        for name in ("reference_nats", "reference_rejected_nats")
    )
    preferred = preference_loss(target_B - reference_B, rejected_B - reference_rejected_B, beta=options.preference)
    return options.nll_weight * target_B.sum() + preferred


def preference_loss(target_B: Tensor, rejected_B: Tensor, *, beta: float) -> Tensor:
    """-Σ log σ(r(target) - r(rejected)) over B requests, with the reward r(y) = β·(log p(y) - log p_reference(y)).

    This is DPO (arXiv 2305.18290, eq. 7). The reference is the same frozen LLM without the plug (PsPLUG, arXiv
    2601.06362), so the reward of a text is what the plug adds to its likelihood.

    Args:
        target_B: nll of the targets minus that under the reference, in nats.
        rejected_B: the same for the rejected texts.
        beta: β; the larger it is, the sooner a pair counts as told apart.
    """
    return nn.functional.softplus(beta * (target_B - rejected_B)).sum()


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
def validation_loss(engine: Any, rows: Sequence[Row], options: TrainingOptions) -> float:
    """Loss without contrast in nats a token, over all workers' held-out rows; all workers call it together.

    Raises UsageError if it is not finite.
    """
    model: PersonalizedLLM = engine.module
    total, n_tokens = _float64(0, model.llm.device), 0
    for numbers, counts in _passes(rows, options, model.llm.device):
        part = [rows[number] for number in numbers]
        batch = _collate(model, part, options)
        loss = objective(engine(batch), part, options)
        if counts:
            total += loss
            n_tokens += sum(map(len, batch.targets[: len(part)]))
    nats, n = sum_over_workers(torch.stack([total, _float64(n_tokens, model.llm.device)])).tolist()
    return _finite(nats / n, "held-out loss", options)


@torch.no_grad()
def target_losses(engine: Any, rows: Sequence[Row], options: TrainingOptions) -> list[tuple[float, int]]:
    """Nats (PPlug eq. 6) and tokens of the target of each of this worker's rows; all workers call it together."""
    model: PersonalizedLLM = engine.module
    found = [(0.0, 0)] * len(rows)
    for numbers, counts in _passes(rows, options, model.llm.device):
        batch = model.collate([rows[number] for number in numbers])
        nll = engine(batch).tolist()
        if counts:
            for number, nats, target in zip(numbers, nll, batch.targets, strict=True):
                found[number] = (nats, len(target))
    return found


def _passes(rows: Sequence[Row], options: TrainingOptions, device: torch.device) -> Iterator[tuple[list[int], bool]]:
    """Numbers of rows of similar length, at most `pass_size` of them, and whether the pass counts.

    Every worker makes as many passes as the one with the most rows, as ZeRO-3 requires; those beyond its own rows do
    not count.
    """
    parts = _by_length(rows, options.pass_size(len(rows)))
    for i in range(int(max_over_workers(len(parts), device))):
        yield parts[min(i, len(parts) - 1)], i < len(parts)


def _by_length(rows: Sequence[Row], size: int) -> list[list[int]]:
    """Numbers of the rows in parts of this size, the shortest rows first: padding then costs little."""
    ordered = sorted(range(len(rows)), key=lambda number: len(rows[number]["input"]) + len(rows[number]["target"]))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
