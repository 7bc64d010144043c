"""An LLM whose layers are spread over devices gives the losses and answers of the whole one.

Without GPUs, half of the layers are kept on disk: accelerate moves tensors between parts in the same way.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona.engines import probe
from persona.errors import InputError, UsageError
from persona.models.frozen_llm import FrozenLLM
from tests import plugs


def test_losses_and_answers_of_an_llm_in_parts_are_those_of_the_whole(llama_folder, encoder_folder, tmp_path):
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    parts |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder.path, dtype=torch.float32, device_map=parts, offload_folder=tmp_path
    )
    spread = FrozenLLM(model, AutoTokenizer.from_pretrained(llama_folder.path))
    assert spread.model.get_output_embeddings().weight.device.type == "meta"  # between two calls
    probe.check_llm(spread)
    whole = FrozenLLM.load(llama_folder, precision="fp32", device="cpu")
    found, expected = (plugs.losses(plugs.new_model(encoder_folder, llm), plugs.ROWS) for llm in (spread, whole))
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_an_llm_that_does_not_fit_the_gpus_is_refused(llama_folder):
    with pytest.raises(InputError, match="does not fit 0 GPUs in torch.float32; raise --gpus-per-actor"):
        FrozenLLM.load(llama_folder, precision="fp32", device="auto")


def test_an_llm_in_few_bits_is_not_spread(llama_folder):
    with pytest.raises(UsageError, match="an LLM in nf4 cannot be spread over GPUs; take --gpus-per-actor 1"):
        FrozenLLM.load(llama_folder, quantization="nf4", device="auto")
