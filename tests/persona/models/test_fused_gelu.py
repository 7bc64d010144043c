"""A linear layer fused with its GELU: the same states, only where the GELU is the exact one, and undone."""

import pytest
import torch
from transformers import AutoModel

from persona.models import fused_gelu
from tests import encoders


def states(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 40)[None]
    with torch.inference_mode():
        return model(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("kind", ["bert", "electra", "roberta", "roberta-prelayernorm"])
def test_a_fused_model_has_the_same_states(kind, tmp_path):
    model = AutoModel.from_pretrained(encoders.transformer(tmp_path, kind, **encoders.size_of(kind))).eval()
    before = states(model)
    weights = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    fused_gelu.fuse(model)
    fused = [module for module in model.modules() if isinstance(module, fused_gelu.LinearGelu)]
    assert len(fused) == model.config.num_hidden_layers
    torch.testing.assert_close(states(model), before, rtol=1e-4, atol=1e-5)
    fused_gelu.undo(model)
    assert torch.equal(states(model), before)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == weights


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu_python"])
def test_other_activations_stay(activation, tmp_path):
    settings = {**encoders.size_of("bert"), "hidden_act": activation}
    model = AutoModel.from_pretrained(encoders.transformer(tmp_path, "bert", **settings)).eval()
    before = states(model)
    fused_gelu.fuse(model)
    assert torch.equal(states(model), before)
