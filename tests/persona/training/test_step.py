"""The preference and contrast losses of a training step; whole steps are tested in test_zero.py."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from persona.errors import InputError, UsageError
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder
from persona.options import TrainingOptions
from persona.plug.personalized import PersonalizedLLM
from persona.training.augmentation import with_other_histories, with_rejected
from persona.training.deepspeed import trainable
from persona.training.step import (
    contrast_loss,
    micro_batches,
    objective,
    preference_loss,
    target_losses,
    train_step,
    validation_loss,
)
from tests.plugs import ROWS, losses, new_model

BETA, NLL_WEIGHT = 0.3, 0.25
PREFERS = TrainingOptions(
    global_batch=len(ROWS),
    micro_batch=2,
    preference=BETA,
    nll_weight=NLL_WEIGHT,
    max_gradient_norm=0,
    warmup=0,
    persona_warmup=0,
)


def with_preferences(model: PersonalizedLLM) -> list[dict[str, Any]]:
    """Rows with rejected texts, and a reference that differs from row to row."""
    rows = []
    for number, row in enumerate(ROWS):
        rejected = "bad " * (1 + number % 3)
        n_tokens = [len(ids) for ids in model.llm.tokenizer.targets([row["target"], rejected])]
        reference = {"reference_nats": 11.0 + number, "reference_rejected_nats": 13.0 - 0.5 * number}
        lengths = {"reference_tokens": n_tokens[0], "reference_rejected_tokens": n_tokens[1]}
        rows.append({**row, "rejected": rejected, **reference, **lengths})
    return rows


def float64_model(encoder: ModelFolder, llm: ModelFolder, **options: Any) -> PersonalizedLLM:
    """What `new_model` makes, in float64."""
    return new_model(encoder, FrozenLLM.load(llm, precision="fp32", device="cpu"), **options).double()


def float64_loop(model: PersonalizedLLM, rows: list[dict[str, Any]], *, nll_weight: float) -> torch.Tensor:
    """The loss of PsPLUG and PPlug eq. 6, text by text, from the logits of the plain model."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        nll = {}
        for name in ("target", "rejected"):
            batch = model.collate([{**row, "target": row[name]}])
            nll[name] = _nll(model, replace(batch, history_Md=batch.history_Md.double()))
        reward = {
            "target": BETA * (row["reference_nats"] - nll["target"]),
            "rejected": BETA * (row["reference_rejected_nats"] - nll["rejected"]),
        }
        total = total - torch.log(1 / (1 + torch.exp(reward["rejected"] - reward["target"])))
        total = total + nll_weight * nll["target"]
    return total


def _nll(model: PersonalizedLLM, batch: Any) -> torch.Tensor:
    """Minus the sum of the log-probabilities of one target, from the logits of the plain model."""
    soft_SD, prompt, target = model.soft_tokens(batch)[0], batch.prompts[0], batch.targets[0]
    plain, ids = model.llm.model, torch.tensor(target)
    embed = plain.get_input_embeddings()
    before, after = (embed(torch.tensor(part, dtype=torch.long)) for part in (prompt.before, prompt.after))
    read = torch.cat([before, soft_SD.to(before.dtype), after]).unsqueeze(0)
    if plain.config.is_encoder_decoder:
        logits = plain(inputs_embeds=read, labels=ids.unsqueeze(0)).logits[0]
    else:
        logits = plain(inputs_embeds=torch.cat([read, embed(ids).unsqueeze(0)], 1)).logits[0]
        logits = logits[read.shape[1] - 1 : -1]
    return -logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum()


@pytest.mark.parametrize("nll_weight", [NLL_WEIGHT, 0.0])
def test_loss_and_gradients_of_a_preference_are_those_of_a_float64_loop(encoder_folder, llm_folder, llm, nll_weight):
    model = new_model(encoder_folder, llm, query_token=True)
    rows, options = with_preferences(model), replace(PREFERS, nll_weight=nll_weight)
    found = objective(model(model.collate([*rows, *with_rejected(rows)])), rows, options)
    found.backward()
    exact = float64_model(encoder_folder, llm_folder, query_token=True)
    expected = float64_loop(exact, rows, nll_weight=nll_weight)
    expected.backward()
    # Losses are made from float32 logits, which have 24 bits.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    largest = max(float(parameter.grad.abs().max()) for parameter in trainable(exact).values())
    assert largest > 0
    for (name, one), other in zip(trainable(model).items(), trainable(exact).values(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_a_preference_starts_at_log_2_where_the_plug_equals_the_reference():
    same = torch.tensor([3.0, -70.0])
    assert float(preference_loss(same, same, beta=0.1)) == pytest.approx(2 * math.log(2))
    # A thousand nats apart, the loss is linear and finite.
    far = torch.tensor([1e3])
    assert float(preference_loss(far, -far, beta=0.1)) == pytest.approx(200.0)
    assert float(preference_loss(-far, far, beta=0.1)) == 0.0


@dataclass
class PlainEngine:
    """What a step uses of DeepSpeed's engine, on one worker; it keeps the gradients."""

    module: PersonalizedLLM
    n_parts: int = len(ROWS) // 2
    world_size: int = 1

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD([{"params": list(trainable(self.module).values()), "peak_lr": 0.0, "lr": 0.0}])

    def __call__(self, batch: Any) -> torch.Tensor:
        return self.module(batch)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.n_parts).backward()  # DeepSpeed averages over micro-batches

    def step(self) -> None:
        self.optimizer.step()


def test_a_step_has_the_strength_of_its_place_in_the_warm_up_and_keeps_it(encoder_folder, llm):
    model, options = new_model(encoder_folder, llm), replace(PREFERS, preference=0.0, nll_weight=1.0, persona_warmup=4)
    for step, strength in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        loss, n_tokens = train_step(PlainEngine(model), ROWS, step=step, n_steps=5, options=options)
        model.plug.full_strength.fill_(1.0)
        expected = model(model.collate(ROWS, strength=strength)).sum().item()
        assert loss == pytest.approx(expected / n_tokens, rel=1e-5)
        train_step(PlainEngine(model), ROWS, step=step, n_steps=5, options=options)
        assert model.plug.full_strength.tolist() == [strength]


def test_a_step_and_a_validation_have_that_loss_and_a_step_its_gradients(encoder_folder, llm_folder, llm):
    model = new_model(encoder_folder, llm)
    rows = with_preferences(model)
    engine = PlainEngine(model)
    loss, n_tokens = train_step(engine, rows, step=0, n_steps=2, options=PREFERS)
    assert n_tokens == sum(row["reference_tokens"] for row in rows)
    gradients = [parameter.grad.clone() for parameter in trainable(model).values()]
    exact = float64_model(encoder_folder, llm_folder)
    expected = float64_loop(exact, rows, nll_weight=NLL_WEIGHT) / n_tokens
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    largest = max(float(parameter.grad.abs().max()) for parameter in trainable(exact).values())
    for found, parameter in zip(gradients, trainable(exact).values(), strict=True):
        torch.testing.assert_close(found.double(), parameter.grad, rtol=1e-3, atol=1e-4 * largest)
    assert validation_loss(engine, rows, PREFERS) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("changes", [{"preference": 0.0, "nll_weight": 1.0}, {}], ids=["contrast", "and preference"])
def test_loss_and_gradients_of_a_step_do_not_depend_on_the_size_of_a_pass(encoder_folder, llm, changes):
    model = new_model(encoder_folder, llm, query_token=True)
    rows = with_preferences(model)
    # Only rows 2 and 3 are a pair, and in small passes each is in another one.
    assert [other is not None for other in with_other_histories(rows)] == [False, False, True, True, False, False]
    found = {}
    for size in ("auto", 1, 2, 3, 6):  # auto counts as 1 before it is settled
        options = replace(PREFERS, contrast=2.0, micro_batch=size, **changes)
        model.zero_grad()
        engine = PlainEngine(model, n_parts=len(rows) // options.pass_size(len(rows)))
        loss, _ = train_step(engine, rows, step=0, n_steps=2, options=options)
        found[size] = loss, {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    whole_loss, whole = found[6]
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for size, (loss, gradients) in found.items():
        # Sums of float32 in another order.
        assert loss == pytest.approx(whole_loss, rel=1e-5), size
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-4 * largest, msg=f"{size} {name}")
    # The pair matters, so a lost one would have been seen.
    model.zero_grad()
    without = replace(PREFERS, contrast=0.0, micro_batch=6, **changes)
    train_step(PlainEngine(model, n_parts=1), rows, step=0, n_steps=2, options=without)
    moved = max(float((parameter.grad - whole[name]).abs().max()) for name, parameter in trainable(model).items())
    assert moved > 100 * 1e-4 * largest


def test_passes_are_of_rows_of_similar_length(encoder_folder, llm):
    model = new_model(encoder_folder, llm)
    options = replace(PREFERS, preference=0.0, nll_weight=1.0, micro_batch=3)
    parts = micro_batches(model, ROWS, options)
    assert [[row["request_id"] for row in part.rows] for part in parts] == [["r0", "r3", "r4"], ["r1", "r5", "r2"]]


def test_losses_of_targets_are_those_of_each_row_alone(encoder_folder, llm):
    model = new_model(encoder_folder, llm)
    options = replace(PREFERS, preference=0.0, nll_weight=1.0, micro_batch=4)  # six rows in two passes
    found = target_losses(PlainEngine(model), ROWS, options)
    assert [n_tokens for _, n_tokens in found] == [
        len(ids) for ids in model.llm.tokenizer.targets([row["target"] for row in ROWS])
    ]
    # Requests have the same losses alone and in a larger batch, up to the order of float32 sums.
    alone = [float(losses(model, [row])) for row in ROWS]
    assert [nats for nats, _ in found] == pytest.approx(alone, rel=1e-5)
    total = sum(nats for nats, _ in found) / sum(n_tokens for _, n_tokens in found)
    assert total == pytest.approx(validation_loss(PlainEngine(model), ROWS, options), rel=1e-6)


def test_a_reference_of_other_texts_is_refused(encoder_folder, llm):
    model = new_model(encoder_folder, llm)
    rows = with_preferences(model)
    rows[3] = {**rows[3], "rejected": "bad bad bad bad bad"}
    with pytest.raises(InputError, match="--reference: target and rejected text of request 'r3' had"):
        train_step(PlainEngine(model), rows, step=0, n_steps=1, options=PREFERS)


def test_a_run_that_has_diverged_ends_with_what_to_change(encoder_folder, llm):
    model = new_model(encoder_folder, llm)
    options = replace(PREFERS, preference=0.0, nll_weight=1.0)
    with torch.no_grad():
        model.plug.projector.outer.bias.fill_(math.nan)
    with pytest.raises(UsageError, match=r"--learning-rate 0\.01: the loss of step 5 is nan, so .* --run"):
        train_step(PlainEngine(model), ROWS, step=4, n_steps=9, options=options)
    # The weights of the last step have been in no loss before.
    with pytest.raises(UsageError, match="the held-out loss is nan"):
        validation_loss(PlainEngine(model), ROWS, options)


def test_contrast_loss_is_minus_log_probability_of_the_own_history():
    own, other = torch.tensor([3.0, 5.0, 40.0]), torch.tensor([3.0, 4.0, 90.0])
    # log 2 for equal losses, Bayes' rule for the second, about 0 for the last.
    probability = math.exp(-5.0) / (math.exp(-5.0) + math.exp(-4.0))
    assert float(contrast_loss(own, other)) == pytest.approx(math.log(2) - math.log(probability), rel=1e-6)


def test_a_gradient_step_on_the_contrast_loss_separates_own_from_other_histories(encoder_folder, llm):
    model = new_model(encoder_folder, llm)
    rows = [one for one in ROWS if one["history"]]
    others = with_other_histories(rows)
    assert None not in others
    batch = model.collate([*rows, *others])
    nll = model(batch)
    own_B, other_C = nll[: len(rows)], nll[len(rows) :]
    # Requests have the same losses alone and in a larger batch, up to the order of float32 sums.
    torch.testing.assert_close(own_B.detach(), losses(model, rows), rtol=1e-4, atol=1e-4)
    own_B.retain_grad(), other_C.retain_grad()
    before = contrast_loss(own_B, other_C)
    before.backward()
    # The loss rises with the own nll and falls with the other, with a slope between 0 and 1.
    assert ((own_B.grad > 0) & (own_B.grad < 1)).all()
    torch.testing.assert_close(other_C.grad, -own_B.grad)
    slope = sum(float(p.grad.square().sum()) for p in trainable(model).values())
    step = 1e-3 * before.item() / slope
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.sub_(step * parameter.grad)
        after = model(batch)
    stepped = contrast_loss(after[: len(rows)], after[len(rows) :])
    # The step is short enough for the linear prediction, a thousandth less; the tolerance is for the curvature.
    assert stepped.item() == pytest.approx(0.999 * before.item(), rel=5e-4)
