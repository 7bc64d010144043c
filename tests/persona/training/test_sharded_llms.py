"""Under ZeRO-3 an LLM has the weights and buffers of plain transformers, or it is refused by name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PegasusConfig,
    Phi3Config,
    PretrainedConfig,
    T5Config,
)

from persona.errors import InputError
from persona.models.resolve import resolve
from persona.options import TrainingOptions
from persona.training.deepspeed import deepspeed_settings, gathered, load_llm
from tests import models
from tests.gloo_workers import run_together

_SMALL = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL |= {"intermediate_size": 96, "max_position_embeddings": 256, "num_key_value_heads": 2}
_ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 64}
_MOE = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    # Buffers that are computed in float32 from lists and ranges.
    "llama": lambda: LlamaConfig(
        **_SMALL,
        rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | _ROPE,
    ),
    "phi3": lambda: Phi3Config(
        **_SMALL,
        pad_token_id=0,
        rope_parameters={"rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [2.3] * 8} | _ROPE,
    ),
    "mixtral": lambda: MixtralConfig(**_SMALL, num_local_experts=4),  # its weights are converted while they are loaded
    "gemma3": lambda: Gemma3TextConfig(**_SMALL, head_dim=16),  # tied embeddings
    "deepseek": lambda: DeepseekV3Config(  # a buffer that stays in float32
        **{**_SMALL, "num_key_value_heads": 4}, **_MOE, **_LATENT, n_routed_experts=4, n_group=1, topk_group=1
    ),
    "t5": lambda: T5Config(
        vocab_size=320, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    # Refused: its positions are computed from a whole weight; a weight that stays in float32.
    "pegasus": lambda: PegasusConfig(
        vocab_size=320, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=256,
    ),
    "ernie": lambda: Ernie4_5_MoeConfig(
        **_SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=48, moe_layer_start_index=0
    ),
}  # fmt: skip
REFUSED = {
    "pegasus": "--zero-stage 3: transformers cannot create '.*' as shares .*; take --zero-stage 1 or 2",
    "ernie": "needs model.layers.0.mlp.gate.weight in float32; add --precision fp32",
}


def differences(case: dict[str, Any], _rank: int, n_workers: int) -> dict[str, Any]:
    """Names of what differs between an LLM as shares and the whole one, or why it is refused."""
    options = TrainingOptions(global_batch=n_workers, micro_batch=1, zero_stage=3)
    settings = deepspeed_settings(options, n_workers)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # shard small weights, too
    folder = resolve(case["llm"], flag="--llm")
    try:
        shares = load_llm(folder, settings, precision="bf16", device="cpu").model
    except InputError as error:
        return {"refused": str(error)}
    auto = AutoModelForSeq2SeqLM if shares.config.is_encoder_decoder else AutoModelForCausalLM
    plain = auto.from_pretrained(folder.path, dtype=torch.bfloat16)
    with gathered(shares):
        found = dict(shares.named_parameters()) | dict(shares.named_buffers())
        expected = dict(plain.named_parameters()) | dict(plain.named_buffers())
        same = {
            name
            for name in found.keys() & expected.keys()
            if found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
        }
    return {"different": sorted((found.keys() | expected.keys()) - same), "n": len(same)}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    out: Path = tmp_path_factory.mktemp("sharded")
    for number, (name, new_config) in enumerate(CONFIGS.items()):
        models.tiny_llama(out / name)  # for its tokenizer
        config = new_config()
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        torch.manual_seed(number)
        auto.from_config(config).save_pretrained(out / name)
    results = run_together(differences, [{"llm": str(out / name)} for name in CONFIGS], 2, out)
    return dict(zip(CONFIGS, results[0], strict=True))


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - REFUSED.keys()))
def test_shares_are_the_weights_and_buffers_of_plain_transformers(found, kind):
    assert found[kind].get("different") == [], found[kind]
    assert found[kind]["n"]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_as_shares_is_refused_by_name(found, kind):
    assert re.search(REFUSED[kind], found[kind].get("refused", "not refused"))
