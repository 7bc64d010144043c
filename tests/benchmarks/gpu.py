"""Measure encoding, training and generation on one GPU with models of real size, each next to its floor.

    python -m tests.benchmarks.gpu
    python -m tests.benchmarks.gpu --only encode --small     # to try the program without a GPU

The models have random weights, since speed depends on the shapes only. The floor is the time of the FLOPs
(`persona.cost`) at the measured rate of a large matrix product, plus for each generated token the time to read the
LLM's weights at the measured rate of a copy. Prints one table.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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

from jobs.runtime import session
from persona import cost
from persona.engines.local import LocalEngine
from persona.models import attention, packaged
from persona.models.device import choose_precision
from persona.models.encoder import TextEncoder
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder, resolve
from persona.options import Decoding, TrainingOptions
from persona.plug.answerer import Answerer
from persona.plug.personalized import PersonalizedLLM, prepare_for_inference
from persona.training.deepspeed import deepspeed_settings, new_optimizer
from persona.training.step import train_step
from tests import models, plugs
from tests.benchmarks import corpus
from tests.benchmarks.contest import timed
from tests.benchmarks.llm_work import generate_plainly

_IS_GPU = torch.cuda.is_available()
_DEVICE = torch.device("cuda" if _IS_GPU else "cpu")
_INPUT_TOKENS, _QUERY_TOKENS = 256, 276
_OUTPUT_TOKENS = 32
_BLOCK_ROWS = 4096  # as in jobs.embed on GPUs


@dataclass(frozen=True)
class Sizes:
    """Shapes of the models, and amounts of work."""

    encoder: BertConfig
    llms: dict[str, PretrainedConfig]
    texts: int
    square: int
    copied_mib: int
    micro_batches: Sequence[int]
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


_REAL = Sizes(
    encoder=BertConfig(),  # 768 wide, 12 layers, 12 heads: BGE-base-en-v1.5
    llms={
        "FlanT5-XXL": _t5(d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64),
        "Llama-3-8B": _llama(4096, 14_336, layers=32, heads=32, key_heads=8, vocabulary=128_256),
    },
    texts=16_384,
    square=8192,
    copied_mib=4096,
    micro_batches=(8, 16),
    answers=64,
    turns=3,
)
_SMALL = Sizes(
    encoder=BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    llms={
        "T5": _t5(d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4),
        "Llama": _llama(48, 64, layers=2, heads=4, key_heads=2, vocabulary=32_000),
    },
    texts=200,
    square=512,
    copied_mib=64,
    micro_batches=(2, 4),
    answers=4,
    turns=3,
)


class Gpu:
    """The measured rates of the chip: FLOPs and bytes per second."""

    def __init__(self, sizes: Sizes) -> None:
        n = sizes.square
        left, right = (torch.randn(n, n, device=_DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.flops = 2 * n**3 / median_s(lambda: left @ right, 10)
        source = torch.randn(sizes.copied_mib * 2**18, device=_DEVICE)
        target = torch.empty_like(source)
        self.bytes = 2 * source.nbytes / median_s(lambda: target.copy_(source), 10)
        name = torch.cuda.get_device_name() if _IS_GPU else "CPU"
        print(f"{name}, torch {torch.__version__}: {self.flops / 1e12:.3g} TFLOP/s in a matrix product of {n} x {n} in")
        print(f"bf16, {self.bytes / 1e12:.3g} TB/s in a copy (bytes read and written)\n")
        print("| work | ours | floor | share of the floor | for comparison |\n|---|---|---|---|---|")


def median_s(work: Callable[[], Any], turns: int) -> float:
    """Median seconds of a call over some turns, after one warm-up turn."""

    def call() -> None:
        work()
        if _IS_GPU:
            torch.cuda.synchronize()

    return statistics.median([timed(call) for _ in range(turns + 1)][1:])


def line(work: str, rate: float, floor: float, unit: str, comparison: str = "") -> None:
    """Print one row of the table; `rate` and `floor` are in `unit` per second."""
    print(f"| {work} | {rate:,.4g} {unit}/s | {floor:,.4g} | {rate / floor:.2f} | {comparison} |", flush=True)


def compare(folder: Path) -> None:
    """Print how far vectors, losses and answers of tiny models in float32 differ from those on a CPU."""
    encoder = resolve(str(models.tiny_encoder(folder / "tiny_encoder")), flag="--encoder")
    texts = [f"the title of paper {number} " * (number % 30) for number in range(300)]
    settings: dict[str, Any] = {"pooling": "mean", "max_tokens": 128, "precision": "fp32"}
    devices = ("cpu", str(_DEVICE))
    vectors = [TextEncoder(encoder, **settings, device=device).encode(texts).vectors for device in devices]
    print(f"float32, compared with a CPU: vectors differ by at most {np.abs(vectors[0] - vectors[1]).max():.0e}")
    # Not sampling: random numbers differ between kinds of device.
    decodings = (Decoding(beams=1), Decoding())
    for make in (models.tiny_llama, models.tiny_t5):
        path = resolve(str(make(folder / make.__name__)), flag="--llm")
        losses, answers = [], []
        for device in devices:
            model = plugs.new_model(encoder, FrozenLLM.load(path, precision="fp32", device=device))
            model.plug.to(device)
            losses.append(plugs.losses(model, plugs.ROWS).cpu())
            answerer = plugs.new_answerer(model)
            answers.append([answer.text for how in decodings for answer in answerer.answer(plugs.ROWS, how)])
        same = sum(one == other for one, other in zip(*answers, strict=True))
        difference = float((losses[0] - losses[1]).abs().max())
        equal = f"{same} of {len(answers[0])} answers are equal"
        print(f"{make.__name__}: losses differ by at most {difference:.0e} nats, {equal}")


def encode(gpu: Gpu, sizes: Sizes, encoder: ModelFolder) -> None:
    """`TextEncoder` as in an actor of `jobs.embed`, compared with sentence_transformers in the same precision."""
    from sentence_transformers import SentenceTransformer

    ours = TextEncoder(encoder, pooling="cls", max_tokens=512)
    kwargs = {"dtype": choose_precision("auto", _DEVICE)}
    peer = SentenceTransformer(str(encoder.path), device=str(_DEVICE), model_kwargs=kwargs)
    for kind in ("titles", "abstracts"):
        texts = corpus.texts(kind, sizes.texts)
        blocks = [texts[first : first + _BLOCK_ROWS] for first in range(0, len(texts), _BLOCK_ROWS)]
        rate = len(texts) / median_s(lambda blocks=blocks: [ours.encode(block) for block in blocks], sizes.turns)
        tokenized = [ours.tokenize(block) for block in blocks]
        flops = sum(
            cost.encoder_flops(encoder.config, n_texts=1, tokens=len(row)) for rows in tokenized for row in rows
        )
        sample, peer_rates = texts[::8], []
        for size in (32, 256):
            seconds = median_s(
                lambda size=size, sample=sample: peer.encode(sample, batch_size=size, show_progress_bar=False), 1
            )
            peer_rates.append(f"{len(sample) / seconds:,.4g}/s in batches of {size}")
        tokenizing_s = median_s(lambda blocks=blocks: [ours.tokenize(block) for block in blocks], 1)
        tokenizer = f"the tokenizer alone {len(texts) / tokenizing_s:,.4g}/s"
        comparison = f"sentence_transformers {', '.join(peer_rates)}; {tokenizer}"
        line(f"encode {kind}", rate, len(texts) / flops * gpu.flops, "texts", comparison)


def train(gpu: Gpu, sizes: Sizes, encoder: ModelFolder, name: str, llm: FrozenLLM) -> None:
    """A training step with DeepSpeed as in `jobs.train`, with the paper's settings and requests of full length."""
    for micro_batch in sizes.micro_batches:
        engine, options = new_engine(llm, encoder, micro_batch)
        requests = rows(micro_batch, encoder.config["hidden_size"])
        targets = llm.tokenizer.targets([row["target"] for row in requests])
        flops = cost.training_flops(
            llm.model.config.to_dict(),
            encoder.config,
            n_requests=micro_batch,
            inputs=_INPUT_TOKENS + 2,
            outputs=round(statistics.mean(map(len, targets))),
            query=_QUERY_TOKENS,
            epochs=1,
        )
        if _IS_GPU:
            torch.cuda.reset_peak_memory_stats()
        step = partial(train_step, engine, requests, step=1, n_steps=100, options=options)
        rate = micro_batch / median_s(step, sizes.turns)
        peak = f"peak {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB" if _IS_GPU else ""
        work = f"training step, {name}, {micro_batch} requests"
        line(work, rate, micro_batch / flops * gpu.flops, "requests", peak)


def generate(gpu: Gpu, sizes: Sizes, encoder: ModelFolder, name: str, llm: FrozenLLM) -> None:
    """Answers as in `jobs.generate`, compared with `transformers.generate` on the same texts without a plug."""
    n = sizes.answers
    model = new_model(llm, encoder)
    plug, engine = prepare_for_inference(model.plug, dtype=llm.dtype, device=llm.device), LocalEngine(llm, batch_size=n)
    answerer = Answerer(plug, engine, model.query_text, batch_size=n)
    requests = rows(n, encoder.config["hidden_size"])
    inputs = llm.tokenizer.inputs([row["input"] for row in requests])
    ids = torch.tensor([row[:_INPUT_TOKENS] for row in inputs]).to(_DEVICE)
    config = llm.model.config.to_dict()
    prefill_s = cost.llm_flops(config, n_requests=n, inputs=_INPUT_TOKENS, outputs=0) / gpu.flops
    for beams in (1, 4):
        decoding = Decoding(beams=beams, max_new_tokens=_OUTPUT_TOKENS)
        plainly = partial(generate_plainly, engine, decoding, input_ids=ids, attention_mask=torch.ones_like(ids))
        lengths = [answer.n_tokens for answer in answerer.answer(requests, decoding)]
        rate = n / median_s(partial(answerer.answer, requests, decoding), sizes.turns)
        plain = n / median_s(plainly, 1)
        floor = n / (prefill_s + max(lengths) * bytes_per_token(llm) / gpu.bytes)
        work = f"{n} answers of {statistics.mean(lengths):.0f} tokens, {name}, {beams} beam{'s' * (beams > 1)}"
        line(work, rate, floor, "answers", f"transformers.generate, no plug: {plain:,.4g}/s")


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
        dtype = choose_precision("auto", _DEVICE)
        implementation = attention.register_attention(config.model_type, dtype=dtype, device=_DEVICE)
        with _DEVICE:
            model = auto.from_config(config, dtype=dtype, attn_implementation=implementation)
        yield name, FrozenLLM(model, AutoTokenizer.from_pretrained(tiny), max_input_tokens=_INPUT_TOKENS)
        del model
        if _IS_GPU:
            torch.cuda.empty_cache()


def bytes_per_token(llm: FrozenLLM) -> int:
    """Bytes of weights read per generated token: the decoder and the head."""
    modules: list[Any] = [llm.model.get_decoder(), llm.model.get_output_embeddings()]
    weights = {id(weight): weight.nbytes for module in modules for weight in module.parameters()}
    # Of the input embeddings, only a few rows are read.
    return sum(weights.values()) - llm.model.get_input_embeddings().weight.nbytes


def new_model(llm: FrozenLLM, encoder: ModelFolder) -> PersonalizedLLM:
    """A plug like the paper's: one token, attention weights."""
    model = plugs.new_model(
        encoder, llm, max_query_tokens=_QUERY_TOKENS, persona_tokens=1, instruction="projected", temperature=1.0
    )
    model.plug.to(_DEVICE)
    return model


def new_engine(llm: FrozenLLM, encoder: ModelFolder, micro_batch: int) -> tuple[Any, TrainingOptions]:
    """The DeepSpeed engine of a `jobs.train` run with one worker."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        os.environ.setdefault("MASTER_PORT", "29511")
        deepspeed.init_distributed("nccl" if _IS_GPU else "gloo", verbose=False)
    options = TrainingOptions(global_batch=micro_batch, micro_batch=micro_batch)
    model = new_model(llm, encoder)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=new_optimizer(model, options), config=deepspeed_settings(options, 1)
    )
    return engine, options


def rows(n: int, width: int) -> list[dict[str, Any]]:
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


_LLM_WORKS = {"train": train, "generate": generate}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = ("compare", "encode", *_LLM_WORKS)
    parser.add_argument("--only", nargs="+", choices=works, default=works, help="run these only")
    parser.add_argument("--small", action="store_true", help="small models and little work, for a CPU")
    arguments = parser.parse_args()
    sizes = _SMALL if arguments.small else _REAL
    session.tokenize_with(session.usable_cores())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "compare" in arguments.only:
            compare(folder)
        gpu = Gpu(sizes)
        encoder = new_encoder(sizes, folder)
        if "encode" in arguments.only:
            encode(gpu, sizes, encoder)
        if chosen := [work for name, work in _LLM_WORKS.items() if name in arguments.only]:
            for llm_name, llm in new_llms(sizes, folder):
                for work in chosen:
                    work(gpu, sizes, encoder, llm_name, llm)


if __name__ == "__main__":
    main()
