"""Measure encoding, training and generation on one GPU with models of real size, each next to its floor.

    python -m tests.benchmarks.gpu
    python -m tests.benchmarks.gpu --only encode --small     # to try the program without a GPU

The models have random weights, since speed depends on the shapes only. The floor is the time of the FLOPs
(`persona.cost`) at the measured rate of a large matrix product, plus for each generated token the time to read the
LLM's weights at the measured rate of a copy. Prints one table.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.runtime import session
from persona import cost
from persona.engines.local import LocalEngine
from persona.models.compiled import compile_layers, use_plain_layers
from persona.models.device import choose_precision
from persona.models.encoder import TextEncoder
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import ModelFolder, resolve
from persona.options import Decoding
from persona.plug.answerer import Answerer
from persona.plug.personalized import prepare_for_inference, prompt_texts
from persona.training.step import train_step
from tests import models, plugs
from tests.benchmarks import corpus, gpu_models
from tests.benchmarks.contest import timed
from tests.benchmarks.gpu_models import DEVICE, INPUT_TOKENS, IS_GPU, QUERY_TOKENS, Sizes
from tests.benchmarks.llm_work import generate_plainly

_OUTPUT_TOKENS = 32
_BLOCK_ROWS = 4096  # as in jobs.embed on GPUs


class Gpu:
    """The measured rates of the chip: FLOPs and bytes per second."""

    def __init__(self, sizes: Sizes) -> None:
        n = sizes.square
        left, right = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.flops = 2 * n**3 / median_s(lambda: left @ right, 10)
        source = torch.randn(sizes.copied_mib * 2**18, device=DEVICE)
        target = torch.empty_like(source)
        self.bytes = 2 * source.nbytes / median_s(lambda: target.copy_(source), 10)
        name = torch.cuda.get_device_name() if IS_GPU else "CPU"
        print(f"{name}, torch {torch.__version__}: {self.flops / 1e12:.3g} TFLOP/s in a matrix product of {n} x {n} in")
        print(f"bf16, {self.bytes / 1e12:.3g} TB/s in a copy (bytes read and written)\n")
        print("| work | ours | floor | share of the floor | for comparison |\n|---|---|---|---|---|")


def median_s(work: Callable[[], Any], turns: int) -> float:
    """Median seconds of a call over some turns, after one warm-up turn."""

    def call() -> None:
        work()
        if IS_GPU:
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
    devices = ("cpu", str(DEVICE))
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
    """`TextEncoder` as in an actor of `jobs.embed`, packed and padded, compared with sentence_transformers."""
    from sentence_transformers import SentenceTransformer

    ours = [TextEncoder(encoder, pooling="cls", max_tokens=512, packed=packed) for packed in (True, False)]
    kwargs = {"dtype": choose_precision("auto", DEVICE)}
    peer = SentenceTransformer(str(encoder.path), device=str(DEVICE), model_kwargs=kwargs)
    for kind in ("titles", "abstracts"):
        texts = corpus.texts(kind, sizes.texts)
        blocks = [texts[first : first + _BLOCK_ROWS] for first in range(0, len(texts), _BLOCK_ROWS)]
        lengths = [len(row) for block in blocks for row in ours[0].tokenize(block)]
        floor = gpu.flops * len(texts) / sum(cost.encoder_flops(encoder.config, n_texts=1, tokens=n) for n in lengths)
        tokenizing_s = median_s(lambda blocks=blocks: [ours[0].tokenize(block) for block in blocks], sizes.turns)
        sample, rates = texts[::8], [f"the tokenizer alone {len(texts) / tokenizing_s:,.4g}/s"]
        for size in (32, 256):
            seconds = median_s(
                lambda size=size, sample=sample: peer.encode(sample, batch_size=size, show_progress_bar=False), 1
            )
            rates.append(f"sentence_transformers {len(sample) / seconds:,.4g}/s in batches of {size}")
        for one in ours:
            rate = len(texts) / median_s(lambda one=one, blocks=blocks: [*map(one.encode, blocks)], sizes.turns)
            work = f"encode {kind}, {'packed' if one.packed else 'padded'}"
            line(work, rate, floor, "texts", "; ".join(rates) if one is ours[0] else "")


def train(gpu: Gpu, sizes: Sizes, encoder: ModelFolder, name: str, llm: FrozenLLM) -> None:
    """A training step with DeepSpeed as in `jobs.train`, with the paper's settings and requests of full length."""
    n = sizes.batch
    requests = gpu_models.requests(n, encoder.config["hidden_size"])
    flops = cost.training_flops(
        llm.model.config.to_dict(),
        encoder.config,
        n_requests=n,
        inputs=INPUT_TOKENS + 2,
        outputs=round(statistics.mean(map(len, llm.tokenizer.targets([row["target"] for row in requests])))),
        query=QUERY_TOKENS,
        epochs=1,
    )
    # Inductor needs Triton or a C++ compiler; on a CPU, only the program is tried.
    backend = "inductor" if IS_GPU else "aot_eager"
    for compiled in (False, True):
        if compiled and (reason := compile_layers(llm, backend=backend)) is not None:
            print(f"{name} cannot be compiled: {reason}")
            break
        engine, options = gpu_models.new_engine(llm, encoder, requests)
        if IS_GPU:
            torch.cuda.reset_peak_memory_stats()  # of the sizes that were tried
        step = partial(train_step, engine, requests, step=1, n_steps=100, options=options)
        rate = n / median_s(step, sizes.turns)
        peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB" if IS_GPU else ""
        work = f"training step, {name}, {n} requests{', compiled' if compiled else ''}"
        line(work, rate, n / flops * gpu.flops, "requests", f"passes of {options.micro_batch} (auto){peak}")
        engine.destroy()
    use_plain_layers(llm)


def generate(gpu: Gpu, sizes: Sizes, encoder: ModelFolder, name: str, llm: FrozenLLM) -> None:
    """Answers as in `jobs.generate`, compared with `transformers.generate` on the same texts without a plug."""
    n = sizes.answers
    model = gpu_models.new_model(llm, encoder)
    plug, engine = prepare_for_inference(model.plug, dtype=llm.dtype, device=llm.device), LocalEngine(llm, batch_size=n)
    answerer = Answerer(plug, engine, model.query_text, batch_size=n)
    requests = gpu_models.requests(n, encoder.config["hidden_size"])
    prompts = llm.tokenizer.prompts(prompt_texts(requests))
    ids = torch.tensor([[*prompt.before, *prompt.after][:INPUT_TOKENS] for prompt in prompts]).to(DEVICE)
    config = llm.model.config.to_dict()
    prefill_s = cost.llm_flops(config, n_requests=n, inputs=INPUT_TOKENS, outputs=0) / gpu.flops
    for beams in (1, 4):
        decoding = Decoding(beams=beams, max_new_tokens=_OUTPUT_TOKENS)
        plainly = partial(generate_plainly, engine, decoding, input_ids=ids, attention_mask=torch.ones_like(ids))
        lengths = [answer.n_tokens for answer in answerer.answer(requests, decoding)]
        rate = n / median_s(partial(answerer.answer, requests, decoding), sizes.turns)
        plain = n / median_s(plainly, 1)
        floor = n / (prefill_s + max(lengths) * gpu_models.bytes_per_token(llm) / gpu.bytes)
        work = f"{n} answers of {statistics.mean(lengths):.0f} tokens, {name}, {beams} beam{'s' * (beams > 1)}"
        line(work, rate, floor, "answers", f"transformers.generate, no plug: {plain:,.4g}/s")


_LLM_WORKS = {"train": train, "generate": generate}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = ("compare", "encode", *_LLM_WORKS)
    parser.add_argument("--only", nargs="+", choices=works, default=works, help="run these only")
    parser.add_argument("--small", action="store_true", help="small models and little work, for a CPU")
    arguments = parser.parse_args()
    sizes = gpu_models.SMALL if arguments.small else gpu_models.REAL
    session.tokenize_with(session.usable_cores())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "compare" in arguments.only:
            compare(folder)
        gpu = Gpu(sizes)
        encoder = gpu_models.new_encoder(sizes, folder)
        if "encode" in arguments.only:
            encode(gpu, sizes, encoder)
        if chosen := [work for name, work in _LLM_WORKS.items() if name in arguments.only]:
            for llm_name, llm in gpu_models.new_llms(sizes, folder):
                for work in chosen:
                    work(gpu, sizes, encoder, llm_name, llm)


if __name__ == "__main__":
    main()
