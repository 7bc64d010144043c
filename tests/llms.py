"""Tiny random LLMs of many families in real model folders, each with the kind of tokenizer that its family has.

`LLMS` lists them; `build` writes one. In configurations, names of special tokens stand for their ids.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.tokenizer_styles import new_tokenizer

WIDTH = 48
# Dropout is on in every configuration, to catch a model in train mode.
_DROPOUT = 0.2
# Standard deviation of weights: above 1/√WIDTH, so that every layer adds more than it received, and outputs depend on
# all inputs. T5 starts with weights of a good size; most others with 0.02, which suits wider models.
_SPREAD, _TOO_SMALL, _NOISE = 0.25, 0.03, 0.1
# One word in twelve ends an answer, besides the end token: a random LLM would hardly ever end one.
_END_EVERY = 12


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of LLMs, as tiny as it gets."""

    name: str
    model_type: str
    style: str
    config: Mapping[str, Any]
    seq2seq: bool = False
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Besides the special tokens, what the family's `generation_config.json` declares."""


def build(family: Family, folder: Path) -> Path:
    """Writes the family's model and tokenizer into the folder; always the same ones."""
    tokenizer = new_tokenizer(family.style)
    config = _config(family, tokenizer)
    torch.manual_seed(zlib.crc32(family.name.encode()))
    auto = AutoModelForSeq2SeqLM if family.seq2seq else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    _spread(model)
    roles = _roles(tokenizer)
    roles["eos_token_id"] = [tokenizer.eos_token_id, *range(20, len(tokenizer), _END_EVERY)]
    if family.seq2seq:
        roles["decoder_start_token_id"] = config.decoder_start_token_id
    model.generation_config = GenerationConfig(**{**roles, **_ids(family.generation, tokenizer)})
    assert model.config.model_type == family.model_type  # not that of a part
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(family: Family, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    shared = {**_roles(tokenizer), "vocab_size": len(tokenizer)}
    chosen = {**shared, **_ids(family.config, tokenizer)}
    parts = [name for name in ("encoder", "decoder", "text_config") if name in chosen]
    for part in parts:
        chosen[part] = {**shared, **chosen[part]}
    config = AutoConfig.for_model(family.model_type, **chosen)
    for owner in (config, *(getattr(config, part) for part in parts)):
        for name, value in owner.to_dict().items():
            if isinstance(value, int | float) and name.endswith(("dropout", "dropout_rate", "pdrop")):
                setattr(owner, name, _DROPOUT)
    return config


def _roles(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}


def _ids(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The settings with ids in place of the names of special tokens."""
    return {
        name: tokenizer.convert_tokens_to_ids(value) if name.endswith("token_id") and isinstance(value, str) else value
        for name, value in settings.items()
    }


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    """Scales matrices that start too small to matter, and embeddings that start too large to leave room for context.

    Vectors get some noise: many start as zeros or ones, which would hide what they do. States of Mamba decay slowly.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.add_(_NOISE * torch.randn_like(parameter))
        if parameter.dim() > 1 and 0 < parameter.std() < _TOO_SMALL:
            parameter.mul_(_SPREAD / parameter.std())
        if name.endswith("A_log"):
            parameter.sub_(2)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None and module.weight.std() > 2 * _SPREAD:
            module.weight.mul_(2 * _SPREAD / module.weight.std())


# A line or two a family read better than a line an argument.
# fmt: off

# Decoder-only LLMs -------------------------------------------------------------------------------------------

_LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 512,
}
_FALCON = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
_GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 512}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_chunk_size": 8}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"],
}
_HALF_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_HALF_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}


_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3}


def _causal(
    name: str, model_type: str, style: str, *parts: Mapping[str, Any], generation: Mapping[str, Any] | None = None,
    **config: Any,
) -> Family:
    shared = {key: value for part in parts for key, value in part.items()}
    return Family(
        name=name, model_type=model_type, style=style, config=shared | config, generation=generation or {}
    )


CAUSAL = [
    _causal("GPT-2", "gpt2", "plain", _GPT),
    _causal("GPT-NeoX", "gpt_neox", "plain", _LLAMA, rope_parameters=_HALF_ROPE),
    _causal("OPT", "opt", "eos as bos", _LLAMA, ffn_dim=64, word_embed_proj_dim=WIDTH),
    _causal("OPT-350M", "opt", "eos as bos", _LLAMA, ffn_dim=64, word_embed_proj_dim=24, do_layer_norm_before=False),
    _causal("Bloom", "bloom", "bos, pad", hidden_size=WIDTH, n_layer=2, n_head=4),
    _causal("MPT", "mpt", "plain", d_model=WIDTH, n_heads=4, n_layers=2, max_seq_len=512),
    _causal("Falcon", "falcon", "plain", _FALCON),
    _causal("Falcon RW (ALiBi)", "falcon", "plain", _FALCON, alibi=True, multi_query=False, parallel_attn=False),
    _causal("Llama 3", "llama", "bos", _LLAMA, rope_parameters=_LLAMA3_ROPE),
    _causal("Llama with an end token behind every text", "llama", "bos, eos", _LLAMA),
    _causal("Llama 4", "llama4_text", "bos", _LLAMA, num_hidden_layers=4, attention_chunk_size=8, num_local_experts=2,
            intermediate_size_mlp=64),
    _causal("Mistral", "mistral", "bos", _LLAMA, num_hidden_layers=4, sliding_window=12),
    _causal("Mixtral", "mixtral", "bos", _LLAMA, num_local_experts=4),
    _causal("Qwen2", "qwen2", "plain", _LLAMA),
    _causal("Qwen2.5-Instruct", "qwen2", "plain", _LLAMA, generation=_SAMPLING),
    _causal("Qwen3", "qwen3", "plain", _LLAMA),
    _causal("Qwen3 MoE", "qwen3_moe", "plain", _LLAMA, _MOE),
    _causal("Qwen3-Next", "qwen3_next", "plain", _LLAMA, _LINEAR, _MOE, shared_expert_intermediate_size=32),
    _causal("Qwen3.5", "qwen3_5_text", "plain", _LLAMA, _LINEAR),
    _causal("Gemma", "gemma", "bos, pad", _LLAMA),
    _causal("Gemma 2", "gemma2", "bos, pad", _LLAMA, _HALF_SLIDING, query_pre_attn_scalar=12),
    _causal("Gemma 3", "gemma3_text", "bos, pad", _LLAMA, _HALF_SLIDING, query_pre_attn_scalar=12),
    _causal("Gemma 3 with images", "gemma3", "bos, pad", vision_config=_VISION, mm_tokens_per_image=4,
            text_config={**_LLAMA, **_HALF_SLIDING, "query_pre_attn_scalar": 12}),
    _causal("Gemma 3n", "gemma3n_text", "bos, pad", _LLAMA, _HALF_SLIDING, vocab_size_per_layer_input=200,
            hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4),
    _causal("Gemma 4", "gemma4_text", "bos, pad", _LLAMA, _HALF_SLIDING, hidden_size_per_layer_input=0),
    _causal("Gemma 4 E2B", "gemma4_text", "bos, pad", _LLAMA, _HALF_SLIDING, hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=300),
    _causal("Phi-3", "phi3", "bos", _LLAMA, num_hidden_layers=4, sliding_window=12),
    _causal("Granite", "granite", "plain", _LLAMA, embedding_multiplier=12.0, logits_scaling=0.5,
            residual_multiplier=0.5, attention_multiplier=0.3),
    _causal("Granite 4 hybrid", "granitemoehybrid", "plain", _LLAMA, _MAMBA, layer_types=["mamba", "attention"],
            embedding_multiplier=12.0, num_local_experts=4, shared_intermediate_size=32),
    _causal("SmolLM3", "smollm3", "plain", _LLAMA, no_rope_layers=[1, 0]),
    _causal("OLMo 2", "olmo2", "plain", _LLAMA),
    _causal("Cohere", "cohere", "bos, pad", _LLAMA, logit_scale=0.5),
    _causal("Cohere 2", "cohere2", "bos, pad", _LLAMA, _HALF_SLIDING, logit_scale=0.5),
    _causal("GPT-OSS", "gpt_oss", "plain", _LLAMA, _HALF_SLIDING, num_local_experts=4, num_experts_per_tok=2),
    _causal("DeepSeek-V3", "deepseek_v3", "bos", _LLAMA, num_key_value_heads=4, head_dim=8, q_lora_rank=16,
            kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4,
            num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1),
    _causal("Bamba", "bamba", "bos, pad", _LLAMA, _MAMBA, attn_layer_indices=[1]),
    _causal("Jamba", "jamba", "bos, pad", _LLAMA, num_experts=2, num_experts_per_tok=1, attn_layer_period=2,
            attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    _causal("Zamba 2", "zamba2", "bos, pad", _LLAMA, layers_block_type=["mamba", "hybrid"], mamba_d_state=8,
            n_mamba_heads=8, chunk_size=8, adapter_rank=4, use_mamba_kernels=False),
    _causal("Nemotron-H", "nemotron_h", "bos, pad", _LLAMA, layers_block_type=["mamba", "attention", "mlp"],
            num_hidden_layers=3, ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=12, n_groups=1, chunk_size=8,
            use_mamba_kernels=False),
    _causal("LFM2", "lfm2", "bos, pad", _LLAMA, layer_types=["conv", "full_attention"]),
    _causal("Falcon-H1", "falcon_h1", "plain", _LLAMA, _MAMBA, mamba_d_ssm=96, embedding_multiplier=5.65),
    _causal("Mamba", "mamba", "plain", hidden_size=WIDTH, num_hidden_layers=2, state_size=8),
    _causal("Mamba 2", "mamba2", "plain", hidden_size=WIDTH, num_hidden_layers=2, state_size=8, num_heads=8,
            head_dim=12, n_groups=1, chunk_size=8),
    _causal("Falcon Mamba", "falcon_mamba", "plain", hidden_size=WIDTH, num_hidden_layers=2, state_size=8),
    _causal("RWKV", "rwkv", "plain", hidden_size=WIDTH, num_hidden_layers=2, context_length=512),
    _causal("RecurrentGemma", "recurrent_gemma", "bos, pad", _LLAMA, num_hidden_layers=3, num_key_value_heads=1,
            attention_window_size=8, lru_width=WIDTH),
    _causal("Llama 3 Instruct", "llama", "chat: llama_3", _LLAMA, rope_parameters=_LLAMA3_ROPE),
    _causal("Mistral Instruct", "mistral", "chat: mistral", _LLAMA),
    _causal("Gemma 3 Instruct", "gemma3_text", "chat: gemma_3", _LLAMA, _HALF_SLIDING, query_pre_attn_scalar=12),
    _causal("Phi-3 Instruct", "phi3", "chat: phi_3", _LLAMA),
    _causal("Qwen3, chat", "qwen3", "chat: qwen_3", _LLAMA),
    _causal("SmolLM2 Instruct", "llama", "chat: chatml", _LLAMA, tie_word_embeddings=True),
    _causal("Llama 2 chat", "llama", "chat: llama_2", _LLAMA),
    _causal("Zephyr", "mistral", "chat: zephyr", _LLAMA),
    _causal("OpenAI GPT", "openai-gpt", "plain", _GPT),
    _causal("XLNet", "xlnet", "sep, cls", d_model=WIDTH, n_layer=2, n_head=4, d_inner=64),
]

# Encoder-decoder LLMs ----------------------------------------------------------------------------------------

_T5 = {
    "d_model": WIDTH, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": "<pad>",
}
_GATED = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_BART = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256,
    "decoder_start_token_id": "</s>",
}
_SCALED = {**_BART, "scale_embedding": True}
_GEMMA2 = {**_LLAMA, **_HALF_SLIDING, "query_pre_attn_scalar": 12}
_TO_ENGLISH = {"forced_bos_token_id": "en_XX", "forced_eos_token_id": "</s>"}
_FORCED = {"forced_bos_token_id": "<s>", "forced_eos_token_id": "</s>"}
_SUMMARY = {
    **_FORCED, "no_repeat_ngram_size": 3, "early_stopping": True, "length_penalty": 2.0, "min_length": 6,
    "num_beams": 4,
}


def _seq2seq(
    name: str,
    model_type: str,
    style: str,
    part: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    **config: Any,
) -> Family:
    return Family(
        name=name,
        model_type=model_type,
        style=style,
        config={**part, **config},
        seq2seq=True,
        generation=generation or {},
    )


SEQ2SEQ = [
    _seq2seq("T5", "t5", "eos", _T5),
    _seq2seq("FLAN-T5", "t5", "eos", _GATED),
    _seq2seq("mT5", "mt5", "eos", _GATED),
    _seq2seq("UMT5", "umt5", "eos", _GATED),
    _seq2seq("LongT5", "longt5", "eos", _GATED, local_radius=7, encoder_attention_type="transient-global"),
    _seq2seq("Switch Transformers", "switch_transformers", "eos", _T5, num_experts=2, num_sparse_encoder_layers=1,
             num_sparse_decoder_layers=1),
    _seq2seq("T5Gemma", "t5gemma", "bos, pad", {}, encoder=_GEMMA2, decoder=_GEMMA2, decoder_start_token_id="<bos>"),
    _seq2seq("BART", "bart", "bos, eos", _BART, _FORCED),
    _seq2seq("BART for summaries", "bart", "bos, eos", _BART, _SUMMARY),
    _seq2seq("mBART", "mbart", "eos, language", _SCALED, {"forced_eos_token_id": "</s>"},
             decoder_start_token_id="en_XX"),
    _seq2seq("mBART-50", "mbart", "language, eos", _SCALED, _TO_ENGLISH),
    _seq2seq("M2M-100", "m2m_100", "language, eos", _SCALED, {"forced_bos_token_id": "en_XX"}),
    _seq2seq("NLLB-MoE", "nllb-moe", "language, eos", _BART, {"forced_bos_token_id": "en_XX"}, num_experts=2,
             encoder_sparse_step=2, decoder_sparse_step=2),
    _seq2seq("Pegasus", "pegasus", "eos", _SCALED, {"forced_eos_token_id": "</s>", "length_penalty": 0.8,
             "num_beams": 8}, decoder_start_token_id="<pad>"),
    _seq2seq("Marian", "marian", "eos", _SCALED, {"forced_eos_token_id": "</s>"}, decoder_start_token_id="<pad>"),
    _seq2seq("Blenderbot-small", "blenderbot-small", "eos", _SCALED, decoder_start_token_id="<pad>"),
    _seq2seq("MVP", "mvp", "bos, eos", _SCALED, _FORCED),
    _seq2seq("FSMT", "fsmt", "eos", _SCALED, langs=["en", "de"], src_vocab_size=120, tgt_vocab_size=120),
    _seq2seq("LED", "led", "bos, eos", _BART, max_encoder_position_embeddings=256, max_decoder_position_embeddings=256,
             attention_window=8),
    _seq2seq("ProphetNet", "prophetnet", "eos", {}, hidden_size=WIDTH, num_encoder_layers=2, num_decoder_layers=2,
             num_encoder_attention_heads=4, num_decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
             decoder_start_token_id="<pad>"),
]

LLMS = [*CAUSAL, *SEQ2SEQ]

# Relatives of the above, which only the long form checks -------------------------------------------------------

MORE_CAUSAL = [
    _causal("GPT-Neo", "gpt_neo", "plain", hidden_size=WIDTH, num_layers=2, num_heads=4, window_size=6,
            attention_types=[[["global", "local"], 1]], max_position_embeddings=512),
    _causal("GPT-J", "gptj", "plain", _GPT, rotary_dim=8),
    _causal("CodeGen", "codegen", "plain", _GPT, rotary_dim=8),
    _causal("GPT-BigCode", "gpt_bigcode", "plain", _GPT),
    _causal("XGLM", "xglm", "eos as bos", d_model=WIDTH, ffn_dim=64, num_layers=2, attention_heads=4,
            max_position_embeddings=256),
    _causal("BioGPT", "biogpt", "eos as bos", _LLAMA),
    _causal("CTRL", "ctrl", "plain", n_embd=WIDTH, dff=64, n_layer=2, n_head=4, n_positions=256),
    _causal("Phi-2", "phi", "plain", _LLAMA, num_key_value_heads=4, rope_parameters=_HALF_ROPE),
    _causal("Phi-3.5 MoE", "phimoe", "bos", _LLAMA, num_local_experts=4),
    _causal("StarCoder2", "starcoder2", "plain", _LLAMA, num_hidden_layers=4, sliding_window=12),
    _causal("StableLM", "stablelm", "plain", _LLAMA, rope_parameters=_HALF_ROPE),
    _causal("OLMo", "olmo", "plain", _LLAMA),
    _causal("OLMo 3", "olmo3", "plain", _LLAMA, _HALF_SLIDING),
    _causal("OLMoE", "olmoe", "plain", _LLAMA, _MOE),
    _causal("OLMo hybrid", "olmo_hybrid", "plain", _LLAMA, _LINEAR),
    _causal("GLM-4", "glm4", "plain", _LLAMA, rope_parameters=_HALF_ROPE),
    _causal("EXAONE 4", "exaone4", "plain", _LLAMA, _HALF_SLIDING),
    _causal("Nemotron", "nemotron", "plain", _LLAMA, rope_parameters=_HALF_ROPE),
    _causal("ERNIE 4.5", "ernie4_5", "plain", _LLAMA),
    _causal("Ministral", "ministral", "bos", _LLAMA, _HALF_SLIDING),
    _causal("Apertus", "apertus", "bos", _LLAMA),
    _causal("Seed-OSS", "seed_oss", "plain", _LLAMA),
    _causal("Hunyuan", "hunyuan_v1_dense", "plain", _LLAMA),
    _causal("Qwen2 MoE", "qwen2_moe", "plain", _LLAMA, _MOE, shared_expert_intermediate_size=32),
    _causal("DeepSeek-V2", "deepseek_v2", "bos", _LLAMA, num_key_value_heads=4, head_dim=8, q_lora_rank=16,
            kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4,
            num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1),
    _causal("Granite MoE", "granitemoe", "plain", _LLAMA, num_local_experts=4, num_experts_per_tok=2,
            embedding_multiplier=6.0),
    _causal("JetMoE", "jetmoe", "bos", _LLAMA, num_local_experts=4, kv_channels=12),
    _causal("MiniMax", "minimax", "plain", _LLAMA, layer_types=["linear_attention", "full_attention"], block_size=8,
            num_local_experts=2),
    _causal("LFM2 MoE", "lfm2_moe", "bos, pad", _LLAMA, _MOE, layer_types=["conv", "full_attention"],
            num_dense_layers=1),
    _causal("VaultGemma", "vaultgemma", "bos, pad", _GEMMA2),
    _causal("xLSTM", "xlstm", "plain", hidden_size=WIDTH, num_hidden_layers=2, num_heads=4),
    _causal("Doge", "doge", "bos", _LLAMA),
]
MORE_SEQ2SEQ = [
    _seq2seq("Blenderbot", "blenderbot", "eos", _SCALED, decoder_start_token_id="<pad>"),
    _seq2seq("PLBart", "plbart", "bos, eos", _SCALED),
    _seq2seq("Pegasus-X", "pegasus_x", "eos", _SCALED, decoder_start_token_id="<pad>", num_global_tokens=4,
             block_size=8),
    _seq2seq("BigBird-Pegasus", "bigbird_pegasus", "eos", _SCALED, decoder_start_token_id="<pad>", block_size=8),
]
# fmt: on
