"""What one GPU reaches with models of real sizes: encoding, training steps and answers, each beside its floor.

    python -m tests.benchmarks.gpu
    python -m tests.benchmarks.gpu --only encode --small     # to try the program where there is no GPU

The weights are random: only their number matters. A floor is the arithmetic of `persona.cost` at the rate of a large
matrix product on the same chip, or the bytes of the LLM's weights, once a token that is made, at the rate of a copy.
Prints one line of a table each.
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
_BLOCK_ROWS = 4096  # of `jobs.embed` on GPUs


@dataclass(frozen=True)
class Sizes:
    """Shapes of the models, and how much work there is."""

    encoder: BertConfig
    llms: dict[str, PretrainedConfig]
    texts: int
    square: int
    copied_mib: int
    micro_batches: Sequence[int]
    answers: int
    turns: int


def _t5(**shape: int) -> T5Config:
    """FlanT5's kind."""
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
    """The chip's two rates, measured once."""

    def __init__(self, sizes: Sizes) -> None:
        n = sizes.square
        left, right = (torch.randn(n, n, device=_DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.flops = 2 * n**3 / median_s(lambda: left @ right, 10)
        source = torch.randn(sizes.copied_mib * 2**18, device=_DEVICE)
        target = torch.empty_like(source)
        self.bytes = 2 * source.nbytes / median_s(lambda: target.copy_(source), 10)
        name = torch.cuda.get_device_name() if _IS_GPU else "CPU"
        print(f"{name}, torch {torch.__version__}: {self.flops / 1e12:.3g} TFLOP/s in a matrix product of {n} x {n} in")
        print(f"bf16, {self.bytes / 1e12:.3g} TB/s in a copy, read and written\n")
        print("| work | ours | the floor | share of the floor | beside |\n|---|---|---|---|---|")


def median_s(work: Callable[[], Any], turns: int) -> float:
    """Seconds of a call, the median of some turns after one that is not counted."""

    def done() -> None:
        work()
        if _IS_GPU:
            torch.cuda.synchronize()

    return statistics.median([timed(done) for _ in range(turns + 1)][1:])


def line(work: str, rate: float, floor: float, unit: str, beside: str = "") -> None:
    """One row of the table; rates are in `unit` a second."""
    print(f"| {work} | {rate:,.4g} {unit}/s | {floor:,.4g} | {rate / floor:.2f} | {beside} |", flush=True)


def compare(folder: Path) -> None:
    """Vectors, losses and answers of tiny models in float32: how far from those that a CPU finds."""
    here = str(_DEVICE)
    encoder = resolve(str(models.tiny_encoder(folder / "tiny_encoder")), flag="--encoder")
    texts = [f"the title of paper {number} " * (number % 30) for number in range(300)]
    how: dict[str, Any] = {"pooling": "mean", "max_tokens": 128, "precision": "fp32"}
    vectors = [TextEncoder(encoder, **how, device=device).encode(texts).vectors for device in ("cpu", here)]
    print(f"in float32, beside a CPU: vectors at most {np.abs(vectors[0] - vectors[1]).max():.0e} apart")
    for make in (models.tiny_llama, models.tiny_t5):
        path = resolve(str(make(folder / make.__name__)), flag="--llm")
        losses, said = [], []
        for device in ("cpu", here):
            model = plugs.new_model(encoder, FrozenLLM.load(path, precision="fp32", device=device))
            model.plug.to(device)
            losses.append(plugs.losses(model, plugs.ROWS).cpu())
            ways = (
                Decoding(beams=1),
                Decoding(),
            )  # a sampled answer is drawn from other numbers on each kind of device
            answerer = plugs.new_answerer(model)
            said.append([answer.text for way in ways for answer in answerer.answer(plugs.ROWS, way)])
        same = sum(one == other for one, other in zip(*said, strict=True))
        apart = float((losses[0] - losses[1]).abs().max())
        print(f"{make.__name__}: losses at most {apart:.0e} nats apart, {same} of {len(said[0])} answers the same")


def encode(gpu: Gpu, sizes: Sizes, encoder: ModelFolder) -> None:
    """`TextEncoder` as an actor of `jobs.embed` has it, beside sentence_transformers in the same precision."""
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
        sample, theirs = texts[::8], []
        for size in (32, 256):
            seconds = median_s(
                lambda size=size, sample=sample: peer.encode(sample, batch_size=size, show_progress_bar=False), 1
            )
            theirs.append(f"{len(sample) / seconds:,.4g}/s in batches of {size}")
        tokenizing_s = median_s(lambda blocks=blocks: [ours.tokenize(block) for block in blocks], 1)
        beside = f"sentence_transformers {', '.join(theirs)}; the tokenizer alone {len(texts) / tokenizing_s:,.4g}/s"
        line(f"encode {kind}", rate, len(texts) / flops * gpu.flops, "texts", beside)


def train(gpu: Gpu, sizes: Sizes, encoder: ModelFolder, name: str, llm: FrozenLLM) -> None:
    """A step of `jobs.train` in the paper's setting, DeepSpeed included, with requests of full length."""
    for micro_batch in sizes.micro_batches:
        engine, options = new_engine(llm, encoder, micro_batch)
        some = rows(micro_batch, encoder.config["hidden_size"])
        targets = llm.tokenizer.targets([row["target"] for row in some])
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
        how: dict[str, Any] = {"step": 1, "n_steps": 100, "options": options}
        step = partial(train_step, engine, some, **how)
        rate = micro_batch / median_s(step, sizes.turns)
        peak = f"peak {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB" if _IS_GPU else ""
        work = f"training step, {name}, {micro_batch} requests"
        line(work, rate, micro_batch / flops * gpu.flops, "requests", peak)


def generate(gpu: Gpu, sizes: Sizes, encoder: ModelFolder, name: str, llm: FrozenLLM) -> None:
    """Answers as `jobs.generate` makes them, beside `transformers.generate` on the same texts without a plug."""
    n = sizes.answers
    model = new_model(llm, encoder)
    plug, engine = prepare_for_inference(model.plug, dtype=llm.dtype, device=llm.device), LocalEngine(llm, batch_size=n)
    answerer = Answerer(plug, engine, model.query_text, batch_size=n)
    some = rows(n, encoder.config["hidden_size"])
    inputs = llm.tokenizer.inputs([row["input"] for row in some])
    ids = torch.tensor([row[:_INPUT_TOKENS] for row in inputs]).to(_DEVICE)
    config = llm.model.config.to_dict()
    prefill_s = cost.llm_flops(config, n_requests=n, inputs=_INPUT_TOKENS, outputs=0) / gpu.flops
    for beams in (1, 4):
        decoding = Decoding(beams=beams, max_new_tokens=_OUTPUT_TOKENS)
        plainly = partial(generate_plainly, engine, decoding, input_ids=ids, attention_mask=torch.ones_like(ids))
        said = [answer.n_tokens for answer in answerer.answer(some, decoding)]
        rate = n / median_s(partial(answerer.answer, some, decoding), sizes.turns)
        plain = n / median_s(plainly, 1)
        floor = n / (prefill_s + max(said) * bytes_a_token(llm) / gpu.bytes)
        work = f"{n} answers of {statistics.mean(said):.0f} tokens, {name}, {beams} beam{'s' * (beams > 1)}"
        line(work, rate, floor, "answers", f"transformers.generate, no plug: {plain:,.4g}/s")


def new_encoder(sizes: Sizes, folder: Path) -> ModelFolder:
    """An encoder of random weights with MiniLM's tokenizer, which is BERT's."""
    path = folder / "encoder"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(packaged.minilm())
        tokenizer.model_max_length = 512
        BertModel(sizes.encoder).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return resolve(str(path), flag="--encoder")


def new_llms(sizes: Sizes, folder: Path) -> Iterator[tuple[str, FrozenLLM]]:
    """One after the other: each takes most of the memory."""
    for name, config in sizes.llms.items():
        is_t5 = isinstance(config, T5Config)
        auto = AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM
        tiny = (models.tiny_t5 if is_t5 else models.tiny_llama)(folder / name)
        dtype = choose_precision("auto", _DEVICE)
        how = attention.register_attention(config.model_type, dtype=dtype, device=_DEVICE)
        with _DEVICE:
            model = auto.from_config(config, dtype=dtype, attn_implementation=how)
        yield name, FrozenLLM(model, AutoTokenizer.from_pretrained(tiny), max_input_tokens=_INPUT_TOKENS)
        del model
        if _IS_GPU:
            torch.cuda.empty_cache()


def bytes_a_token(llm: FrozenLLM) -> int:
    """What is read of the LLM for each token: of an encoder-decoder the decoder, of both the head."""
    read: list[Any] = [llm.model.get_decoder(), llm.model.get_output_embeddings()]
    unread = llm.model.get_input_embeddings().weight.nbytes  # a few of its rows only
    weights = {id(weight): weight.nbytes for module in read for weight in module.parameters()}
    return sum(weights.values()) - unread


def new_model(llm: FrozenLLM, encoder: ModelFolder) -> PersonalizedLLM:
    """A plug of the paper's kind: one token, weights by the request."""
    model = plugs.new_model(
        encoder, llm, max_query_tokens=_QUERY_TOKENS, persona_tokens=1, instruction="projected", temperature=1.0
    )
    model.plug.to(_DEVICE)
    return model


def new_engine(llm: FrozenLLM, encoder: ModelFolder, micro_batch: int) -> tuple[Any, TrainingOptions]:
    """DeepSpeed as a worker of `jobs.train` has it; there is one."""
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
    """Requests longer than what is read of them, targets like titles, histories of 5 to 512 behaviors, few long."""
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
                "input": text[:600],  # letters, most of them, and a letter is a token here
                "query": f"{text} {text}",
                "target": " ".join(target.split()[:4]),
                "history": history,
            }
        )
    return made


_OF_LLMS = {"train": train, "generate": generate}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = ("compare", "encode", *_OF_LLMS)
    parser.add_argument("--only", nargs="+", choices=works, default=works)
    parser.add_argument("--small", action="store_true", help="models and work that a CPU bears")
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
        if asked := [work for name, work in _OF_LLMS.items() if name in arguments.only]:
            for llm_name, llm in new_llms(sizes, folder):
                for work in asked:
                    work(gpu, sizes, encoder, llm_name, llm)


if __name__ == "__main__":
    main()
