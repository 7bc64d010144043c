"""A quantized LLM gives what plain transformers gives with the quantized weights, gradients included."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, MixtralConfig

from persona.engines import probe
from persona.errors import InputError
from persona.models.frozen_llm import FrozenLLM
from persona.models.quantized import QuantizedLinear, nf4_levels
from persona.models.resolve import ModelFolder, resolve
from persona.options import Quantization
from tests import models, plugs

KINDS = [kind for kind in get_args(Quantization) if kind != "none"]
# The largest error of a weight, as a share of the largest weight of its row (or block): half of the widest gap between
# neighboring levels.
_LARGEST_ERROR = {"int8": 0.5 / 127, "fp8": 2**-4, "nf4": 0.16}


@pytest.fixture(params=["llama", "t5"])
def folder(request, llama_folder: ModelFolder, t5_folder: ModelFolder) -> ModelFolder:
    return {"llama": llama_folder, "t5": t5_folder}[request.param]


def load(folder: ModelFolder, kind: Any, precision: Any = "fp32") -> FrozenLLM:
    return FrozenLLM.load(folder, precision=precision, quantization=kind, device="cpu")


def with_quantized_weights(folder: ModelFolder, quantized: FrozenLLM) -> FrozenLLM:
    """Plain transformers, whose weights are the expanded ones of `quantized`."""
    plain = load(folder, "none")
    for name, layer in quantized.model.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.model.get_submodule(name).weight.data.copy_(layer.weight)
    return plain


def loss_and_gradient(llm: FrozenLLM, encoder: ModelFolder) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of some requests, and the gradient of the plug's outermost weight, through the LLM."""
    model = plugs.new_model(encoder, llm)
    losses = model(model.collate(plugs.ROWS))
    losses.sum().backward()
    return losses.detach(), model.plug.projector.outer.weight.grad


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_transformers_with_the_quantized_weights(folder, encoder_folder, kind):
    quantized = load(folder, kind)
    found, expected = (
        loss_and_gradient(llm, encoder_folder) for llm in (quantized, with_quantized_weights(folder, quantized))
    )
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    # The weights of the folder give other losses.
    assert not torch.allclose(found[0], loss_and_gradient(load(folder, "none"), encoder_folder)[0], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_llm_answers_as_transformers_does(folder, kind):
    probe.check_llm(load(folder, kind))
    probe.check_llm(load(folder, kind, "bf16"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_keeps_no_expanded_weight(kind):
    layer = QuantizedLinear(nn.Linear(128, 96), kind, torch.device("cpu"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
        layer(torch.randn(2, 128, requires_grad=True))
    assert not [tensor.shape for tensor in kept if tensor.numel() >= 128 * 96]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_take_a_quarter_or_an_eighth_of_their_bytes_and_stay_close(kind):
    torch.manual_seed(0)
    linear = nn.Linear(130, 70, bias=False)  # no multiple of a block
    linear.weight.data[3] = 0
    layer = QuantizedLinear(linear, kind, torch.device("cpu"))
    assert layer.values.nbytes == pytest.approx(linear.weight.nbytes / (8 if kind == "nf4" else 4), rel=0.01)
    error = (layer.weight - linear.weight).abs().max() / linear.weight.abs().max()
    assert 0 < error <= _LARGEST_ERROR[kind]
    assert not layer.weight[3].any()


def test_the_levels_of_nf4_are_those_of_the_paper():
    """QLoRA, appendix E."""
    paper = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
    paper += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    torch.testing.assert_close(nf4_levels(torch.device("cpu")), torch.tensor(paper), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4),
        MixtralConfig(
            vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_an_llm_whose_weights_are_not_in_linear_layers_is_refused(tmp_path: Path, config):
    models.tiny_llama(tmp_path)  # for its tokenizer
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="--llm-quantization int8: only .* weights are in linear layers"):
        load(resolve(str(tmp_path), flag="--llm"), "int8")
