"""The contrast loss of a training step; whole steps are tested in test_zero.py."""

import math

import pytest
import torch

from persona.training.augmentation import with_other_histories
from persona.training.deepspeed import trainable
from persona.training.step import contrast_loss
from tests.plugs import ROWS, losses, new_model


def test_contrast_loss_is_minus_log_probability_of_the_own_history():
    own, other = torch.tensor([3.0, 5.0, 40.0]), torch.tensor([3.0, 4.0, 90.0])
    # log 2 for equal losses, Bayes' rule for the second, about 0 for the last.
    probability = math.exp(-5.0) / (math.exp(-5.0) + math.exp(-4.0))
    assert float(contrast_loss(own, other)) == pytest.approx(math.log(2) - math.log(probability), rel=1e-6)


def test_a_gradient_step_on_the_contrast_loss_separates_own_from_other_histories(encoder_folder, llm):
    model = new_model(encoder_folder, llm)
    rows = [one for one in ROWS if one["history"]]
    numbers, others = with_other_histories(rows)
    assert numbers == [0, 1, 2, 3]
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
