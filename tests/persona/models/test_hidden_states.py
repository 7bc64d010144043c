"""The hidden states of last tokens equal those of transformers, whatever the batch."""

import pytest
import torch

from persona.models.frozen_llm import FrozenLLM
from persona.models.hidden_states import last_hidden_states, text_prompts
from persona.models.prompts import PromptText
from persona.options import PromptOptions
from tests.models import tiny_chat_llama
from tests.plugs import random_soft_tokens

TEXTS = ["the movie is", "i like it", "a paper with a title " * 12, "a"]
# Sums of some hundred float32 products in another order.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def no_soft_tokens(llm: FrozenLLM, n: int) -> torch.Tensor:
    return torch.empty(n, 0, llm.width)


def of_transformers(llm: FrozenLLM, ids: list[int]) -> torch.Tensor:
    """`output_hidden_states` of one row of token ids at its last token, (H, D)."""
    row = torch.tensor([ids])
    model = llm.model.get_encoder() if llm.is_encoder_decoder else llm.model
    with torch.no_grad():
        return torch.stack([state[0, -1] for state in model(row, output_hidden_states=True).hidden_states])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_texts_are_read_as_the_tokenizer_writes_them(llm, dtype):
    llm.model.to(dtype)
    prompts = text_prompts(llm, TEXTS)
    found = last_hidden_states(llm, no_soft_tokens(llm, len(TEXTS)), prompts)
    assert found.dtype is torch.float32
    assert found.shape == (len(TEXTS), 3, llm.width)
    for text, prompt, state in zip(TEXTS, prompts, found, strict=True):
        ids = llm.tokenizer.pretrained(text)["input_ids"]
        assert [*prompt.before, *prompt.after] == ids
        if dtype is torch.float32:
            torch.testing.assert_close(state, of_transformers(llm, ids), **FLOAT32)
        else:  # padding changes the order of sums, by a few units of bf16's 8 bits
            torch.testing.assert_close(state, of_transformers(llm, ids).float(), rtol=0.1, atol=0.1)


def test_a_chat_is_read_up_to_where_the_llm_answers(tmp_path):
    from persona.models.resolve import resolve

    folder = resolve(str(tiny_chat_llama(tmp_path / "chat")), flag="--llm")
    llm = FrozenLLM.load(folder, precision="fp32", device="cpu", prompt=PromptOptions(prompt_format="chat"))
    found = last_hidden_states(llm, no_soft_tokens(llm, len(TEXTS)), text_prompts(llm, TEXTS))
    for text, state in zip(TEXTS, found, strict=True):
        chat = [{"role": "user", "content": text}]
        rendered = llm.tokenizer.pretrained.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = llm.tokenizer.pretrained(rendered, add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(state, of_transformers(llm, ids), **FLOAT32)


def test_with_soft_tokens_the_last_token_is_that_of_the_prompt(llm):
    soft_BSD = random_soft_tokens(llm, len(TEXTS))
    prompts = llm.tokenizer.prompts([PromptText(input=text) for text in TEXTS])
    found = last_hidden_states(llm, soft_BSD, prompts)
    model = llm.model.get_encoder() if llm.is_encoder_decoder else llm.model
    for prompt, soft_SD, state in zip(prompts, soft_BSD, found, strict=True):
        before, after = (llm.embed(torch.tensor(ids, dtype=torch.long)) for ids in (prompt.before, prompt.after))
        embeds_1LD = torch.cat([before, soft_SD, after])[None]
        with torch.no_grad():
            output = model(inputs_embeds=embeds_1LD, output_hidden_states=True)
        expected = torch.stack([one[0, -1] for one in output.hidden_states])
        torch.testing.assert_close(state, expected, **FLOAT32)
    without = last_hidden_states(llm, soft_BSD[:, :0], prompts)
    assert not torch.allclose(found[:, 1:], without[:, 1:], atol=1e-2)
    torch.testing.assert_close(found[:, 0], without[:, 0])  # no block has read the soft tokens yet


def test_the_last_state_is_taken_after_the_final_norm(llm):
    [state] = last_hidden_states(llm, no_soft_tokens(llm, 1), text_prompts(llm, TEXTS[:1]))
    core = llm.model.get_encoder() if llm.is_encoder_decoder else llm.model.model
    norm = core.final_layer_norm if llm.is_encoder_decoder else core.norm
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(output[0, -1]))
    of_transformers(llm, llm.tokenizer.pretrained(TEXTS[0])["input_ids"])
    torch.testing.assert_close(state[-1], seen[-1], **FLOAT32)
