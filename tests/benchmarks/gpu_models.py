"""The models of real size, and their requests, for the measurements on one GPU."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    PretrainedConfig,
    T5Config,
)

from persona import cost
from persona.engines.static_steps import cache_sizes
from persona.models import attention, packaged
from persona.models.device import choose_precision
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder, resolve
from persona.options import TrainingOptions
from persona.plug.personalized import PersonalizedLLM
from persona.training import micro_batch
from persona.training.deepspeed import deepspeed_settings, new_engine as new_deepspeed_engine
from tests import models, plugs
from tests.benchmarks import corpus
from tests.benchmarks.gpu_chip import DEVICE, IS_GPU, Gpu

INPUT_TOKENS, QUERY_TOKENS = 256, 276


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes of the models, and amounts of work."""

    encoder: BertConfig
    llms: dict[str, PretrainedConfig]
    texts: int
    square: int
    """Width of the square matrices in the matrix product."""
    copied_mib: int
    batch: int
    """Requests of a training step."""
    answers: int
    turns: int


def _t5(**shape: int) -> T5Config:
    """A configuration like FlanT5's."""
    kind: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return T5Config(**shape, **kind, decoder_start_token_id=0)


def _llama(width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
    )


REAL = Sizes(
    encoder=BertConfig(),  # 768 wide, 12 layers, 12 heads: BGE-base-en-v1.5
    llms={
        "FlanT5-XXL": _t5(d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64),
        "Llama-3-8B": _llama(4096, 14_336, layers=32, heads=32, key_heads=8, vocabulary=128_256),
    },
    texts=16_384,
    square=8192,
    copied_mib=4096,
    batch=64,
    answers=64,
    turns=3,
)
SMALL = Sizes(
    encoder=BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    llms={
        "T5": _t5(d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4),
        "Llama": _llama(48, 64, layers=2, heads=4, key_heads=2, vocabulary=32_000),
    },
    texts=200,
    square=512,
    copied_mib=64,
    batch=4,
    answers=4,
    turns=3,
)


def new_encoder(sizes: Sizes, folder: Path) -> ModelFolder:
    """An encoder with random weights and the tokenizer of MiniLM, which is BERT's."""
    path = folder / "encoder"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(packaged.minilm())
        tokenizer.model_max_length = 512
        BertModel(sizes.encoder).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return resolve(str(path), flag="--encoder")


def new_llms(sizes: Sizes, folder: Path) -> Iterator[tuple[str, FrozenLLM]]:
    """Yield the LLMs by name, one at a time: each takes most of the memory."""
    for name, config in sizes.llms.items():
        is_t5 = isinstance(config, T5Config)
        auto = AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM
        tiny = (models.tiny_t5 if is_t5 else models.tiny_llama)(folder / name)
        dtype = choose_precision("auto", DEVICE)
        implementation = attention.register_attention(config.model_type, dtype=dtype, device=DEVICE)
        with DEVICE:
            model = auto.from_config(config, dtype=dtype, attn_implementation=implementation)
        yield name, FrozenLLM(model, AutoTokenizer.from_pretrained(tiny), max_input_tokens=INPUT_TOKENS)
        del model
        if IS_GPU:
            torch.cuda.empty_cache()


def answer_floors_s(gpu: Gpu, llm: FrozenLLM, n: int, beams: int, outputs: int) -> tuple[float, float]:
    """Least seconds to read `n` prompts, and for each token of all their beams, halfway through `outputs` tokens."""
    config = llm.model.config.to_dict()
    read, first = (cost.llm_flops(config, n_requests=1, inputs=INPUT_TOKENS, outputs=tokens) for tokens in (0, 1))
    rows = n * beams
    n_layers, heads, width = cache_sizes(llm.model.config)
    cached = rows * (INPUT_TOKENS + outputs // 2) * 2 * n_layers * heads * width * llm.dtype.itemsize
    step_s = max((_weight_bytes(llm) + cached) / gpu.bytes, rows * (first - read) / gpu.flops)
    return n * read / gpu.flops, step_s


def _weight_bytes(llm: FrozenLLM) -> int:
    """Bytes of weights that a step reads: the decoder and the head.

    T5's cross-attention makes its keys and values once per prompt, and of the input embeddings a few rows are read.
    """
    modules: list[Any] = [llm.model.get_decoder(), llm.model.get_output_embeddings()]
    named = [part for module in modules for part in module.named_parameters()]
    once = ("EncDecAttention.k.weight", "EncDecAttention.v.weight")
    weights = {id(weight): weight.nbytes for name, weight in named if not name.endswith(once)}
    return sum(weights.values()) - llm.model.get_input_embeddings().weight.nbytes


def new_model(llm: FrozenLLM, encoder: ModelFolder) -> PersonalizedLLM:
    """A plug like the paper's: one token, attention weights."""
    model = plugs.new_model(
        encoder, llm, max_query_tokens=QUERY_TOKENS, persona_tokens=1, instruction="projected", temperature=1.0
    )
    model.plug.to(DEVICE)
    return model


def new_engine(llm: FrozenLLM, encoder: ModelFolder, requests: Sequence[dict[str, Any]]) -> tuple[Any, TrainingOptions]:
    """The DeepSpeed engine of a `jobs.train` run with one worker and --micro-batch auto; the requests make a step."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        os.environ.setdefault("MASTER_PORT", "29511")
        deepspeed.init_distributed("nccl" if IS_GPU else "gloo", verbose=False)
    options = TrainingOptions(global_batch=len(requests), micro_batch="auto")
    model = new_model(llm, encoder)
    longest = max(requests, key=lambda request: len(request["history"]))
    options = replace(options, micro_batch=micro_batch.choose(model, longest, options, len(requests)))
    return new_deepspeed_engine(model, options, deepspeed_settings(options, 1)), options


def requests(n: int, width: int) -> list[dict[str, Any]]:
    """`n` requests: inputs and queries above the limits, short targets, 5 to 512 behaviors, most histories short."""
    draw = np.random.default_rng(0)
    inputs, targets = corpus.texts("abstracts", n, seed=1), corpus.texts("titles", n)
    made = []
    for number, (text, target) in enumerate(zip(inputs, targets, strict=True)):
        history = plugs.random_history(draw, round(5 * 100 ** draw.random()), width)
        made.append(
            {
                "request_id": f"r{number}",
                "user_id": f"u{number}",
                "persona": "own",
                "input": text[:600],  # the tiny tokenizers encode most letters as one token each
                "query": f"{text} {text}",
                "target": " ".join(target.split()[:4]),
                "history": history,
            }
        )
    return made
