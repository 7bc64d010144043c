"""LLMs of many kinds give the losses and answers of plain transformers, or the probe refuses them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from persona.engines import probe
from persona.engines.base import Prompt
from persona.engines.local import LocalEngine
from persona.errors import InputError, UsageError
from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptText
from persona.models.resolve import resolve
from persona.options import Decoding
from tests.models import tiny_llm
from tests.plugs import random_soft_tokens

CAUSAL = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEQ2SEQ = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
    "scale_embedding": True,
}
HYBRID = {"mamba_d_ssm": 96, "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 16, "embedding_multiplier": 5.65}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 48},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4},
    "mistral": {**CAUSAL, "sliding_window": 6},
    "gemma3_text": {**CAUSAL, "sliding_window": 6, "query_pre_attn_scalar": 12},
    "llama4_text": {**CAUSAL, "attention_chunk_size": 8, "num_hidden_layers": 4, "num_local_experts": 2},
    "lfm2": {**CAUSAL, "layer_types": ["conv", "full_attention"]},
    "falcon_h1": {**CAUSAL, **HYBRID},
    "bart": SEQ2SEQ,
    "pegasus": SEQ2SEQ,
}  # fmt: skip
INPUTS = ["the movie is", "a paper with a title of a long review of the movie that i like", "it"]
TARGETS = ["good and long", "it is x", "movie"]
# Longer than the sliding windows and chunks above, and of different lengths.
RETRIEVED = [["review of the movie", "like it"], ["i like the paper"], []]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind of LLM, made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_llm(tmp_path_factory.mktemp("llm"), kind, **KINDS[kind])
        return made[kind]

    return folder


def load(folder: Path) -> FrozenLLM:
    return FrozenLLM.load(resolve(str(folder), flag="--llm"), precision="fp32", device="cpu")


def plain_loss(model: Any, text: list[int], target: list[int]) -> float:
    """By transformers alone, from token ids."""
    if model.config.is_encoder_decoder:
        loss = model(input_ids=torch.tensor([text]), labels=torch.tensor([target])).loss
    else:
        labels = torch.tensor([[-100] * len(text) + target])
        loss = model(input_ids=torch.tensor([text + target]), labels=labels).loss
    return float(loss) * len(target)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_losses_and_answers_of_padded_batches_are_those_of_transformers(folders, kind):
    llm = load(folders(kind))
    seq2seq = llm.is_encoder_decoder
    plain: Any = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(folders(kind)).eval()
    texts = [PromptText(input=text, retrieved=past) for text, past in zip(INPUTS, RETRIEVED, strict=True)]
    prompts, targets = llm.tokenizer.prompts(texts, retrieved_tokens=64), llm.tokenizer.targets(TARGETS)
    rows = [[*prompt.before, *prompt.after] for prompt in prompts]
    no_soft = torch.empty(3, 0, llm.width)

    expected = [plain_loss(plain, row, target) for row, target in zip(rows, targets, strict=True)]
    for cache_before in (False, True):
        found = llm.nll(no_soft, prompts, targets, cache_before=cache_before)
        assert found.tolist() == pytest.approx(expected, rel=1e-4)

    engine = LocalEngine(llm, batch_size=3)
    for beams in (1, 3):
        answers = engine.answer(
            [Prompt(ids=prompt, soft_SD=no_soft[0]) for prompt in prompts],
            Decoding(max_new_tokens=8, beams=beams),
            [0, 0, 0],
        )
        settings = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "eos_token_id": engine.eos_ids}
        for answer, row in zip(answers, rows, strict=True):
            whole = plain.generate(input_ids=torch.tensor([row]), pad_token_id=0, **settings)[0].tolist()
            generated = whole[1 if seq2seq else len(row) :]
            end = next((i for i, token in enumerate(generated) if token in engine.eos_ids), None)
            assert answer.text == llm.tokenizer.decode(generated[:end])


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_passes_kinds_that_work_in_both_precisions(folders, kind):
    llm = load(folders(kind))
    probe.check_llm(llm)
    llm.model.to(torch.bfloat16)
    probe.check_llm(llm)


def test_the_probe_notices_a_lost_scale_of_embeddings(folders):
    llm = load(folders("pegasus"))
    llm._embedding_scale = 1.0
    with pytest.raises(InputError, match=r"\(pegasus\): the scores of a text given as embeddings differ.*another LLM"):
        probe.check_llm(llm)


def test_the_probe_notices_padding_that_an_llm_sees(folders):
    llm = load(folders("lfm2"))
    assert not llm.can_mask_padding
    llm.can_mask_padding = True
    llm.mask_arguments = lambda mask_BL, n_new=None: {}  # as if transformers ignored masks
    with pytest.raises(InputError, match="results would be wrong"):
        probe.check_llm(llm)


def test_the_probe_notices_an_llm_that_is_not_causal(folders):
    llm = load(folders("gpt2"))
    llm.model.config.is_causal = False
    for layer in llm.model.transformer.h:
        layer.attn.is_causal = False
    with pytest.raises(InputError, match="results would be wrong"):
        probe.check_llm(llm)


def test_the_probe_notices_an_llm_that_cannot_answer(tmp_path):
    llm = load(tiny_llm(tmp_path, "mamba", hidden_size=48, num_hidden_layers=2, state_size=8))
    with pytest.raises(InputError, match=r"\(mamba\) cannot be used: .*past_key_values"):
        probe.check_llm(llm)


@pytest.mark.parametrize("kind", ["falcon", "bart", "opt"])
def test_recomputed_activations_have_no_dropout(tmp_path, kind):
    dropout = dict.fromkeys(("dropout", "hidden_dropout", "activation_dropout", "attention_dropout"), 0.5)
    falcon = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm = load(tiny_llm(tmp_path, kind, **{**KINDS.get(kind, falcon), **dropout}))
    prompts = llm.tokenizer.prompts([PromptText(input=text) for text in INPUTS])
    targets, no_soft = llm.tokenizer.targets(TARGETS), torch.empty(3, 0, llm.width)
    expected = llm.nll(no_soft, prompts, targets)
    llm.checkpoint_activations()
    torch.testing.assert_close(llm.nll(no_soft, prompts, targets), expected)


def losses_and_gradient(llm: FrozenLLM) -> tuple[torch.Tensor, torch.Tensor]:
    """With retrieved texts in front of the soft tokens."""
    texts = [PromptText(input=text, retrieved=past) for text, past in zip(INPUTS, RETRIEVED, strict=True)]
    soft_BSD = random_soft_tokens(llm, 3).requires_grad_()
    prompts, targets = llm.tokenizer.prompts(texts, retrieved_tokens=64), llm.tokenizer.targets(TARGETS)
    losses_B = llm.nll(soft_BSD, prompts, targets, cache_before=True)
    losses_B.sum().backward()
    assert soft_BSD.grad is not None
    return losses_B.detach(), soft_BSD.grad


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "mistral", "gemma3_text"])
def test_texts_in_front_are_read_ahead_while_activations_are_recomputed(folders, kind):
    llm = load(folders(kind))
    plain = losses_and_gradient(llm)
    llm.checkpoint_activations()
    assert probe.check_reading_ahead(llm) is None
    assert llm.reads_ahead
    torch.testing.assert_close(losses_and_gradient(llm), plain, rtol=1e-4, atol=1e-4)


def test_texts_in_front_are_read_with_the_rest_where_that_changes_scores(folders):
    llm = load(folders("mistral"))
    plain = losses_and_gradient(llm)
    llm.checkpoint_activations()
    for layer in llm.model.model.layers:
        layer._can_checkpoint_with_cache = False  # transformers then takes the cache away
    reason = probe.check_reading_ahead(llm)
    assert reason is not None
    assert not llm.reads_ahead
    torch.testing.assert_close(losses_and_gradient(llm), plain, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_is_refused_where_transformers_cannot(tmp_path):
    llm = load(tiny_llm(tmp_path, "ctrl", n_embd=48, dff=64, n_layer=2, n_head=4))
    with pytest.raises(UsageError, match="--activation-checkpointing is not possible with LLMs of the kind 'ctrl'"):
        llm.checkpoint_activations()


def test_the_probe_leaves_the_llm_as_it_was(llm):
    llm.checkpoint_activations()
    before = [module.training for module in llm.modules()]
    probe.check_llm(llm)
    assert [module.training for module in llm.modules()] == before
    assert not any(parameter.requires_grad for parameter in llm.parameters())
