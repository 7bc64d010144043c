"""Measure encoding, training and generation on one GPU with models of real size, each next to its floor.

    python -m tests.benchmarks.gpu
    python -m tests.benchmarks.gpu --only encode --small     # to try the program without a GPU

The models have random weights, since speed depends on the shapes only. The floor is the time of the FLOPs
(`persona.cost`) at the measured rate of a large matrix product. For each generated token it is the time to read the
decoder's weights and its key-value cache at the measured rate of a copy, or the time of the FLOPs if that is longer.
Prints one table; below each row, the peak memory, power and clock if they are readable, how long the chip computes, and
the five largest kernels besides matrix products. Made to take less than ten minutes on one H100.
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
from tests.benchmarks.gpu_chip import DEVICE, IS_GPU, Gpu, line, measure, median_s
from tests.benchmarks.gpu_models import INPUT_TOKENS, QUERY_TOKENS, Sizes
from tests.benchmarks.llm_work import generate_plainly

_OUTPUT_TOKENS, _LONG_OUTPUT = 32, 128
_BLOCK_ROWS = 4096  # as in jobs.embed on GPUs


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
            measured = measure(lambda one=one, blocks=blocks: [*map(one.encode, blocks)], sizes.turns)
            work = f"encode {kind}, {'packed' if one.packed else 'padded'}"
            rate = len(texts) / measured.seconds
            line(work, rate, floor, "texts", "; ".join(rates) if one is ours[0] else "", measured)


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
        measured = measure(partial(train_step, engine, requests, step=1, n_steps=100, options=options), sizes.turns)
        work = f"training step, {name}, {n} requests{', compiled' if compiled else ''}"
        passes = f"passes of {options.micro_batch} (auto)"
        line(work, n / measured.seconds, n / flops * gpu.flops, "requests", passes, measured)
        engine.destroy()
    use_plain_layers(llm)


def generate(gpu: Gpu, sizes: Sizes, encoder: ModelFolder, name: str, llm: FrozenLLM) -> None:
    """Answers as in `jobs.generate`, compared with `transformers.generate` on the same texts without a plug."""
    n = sizes.answers
    model = gpu_models.new_model(llm, encoder)
    plug = prepare_for_inference(model.plug, dtype=llm.dtype, device=llm.device)
    engine, growing = (LocalEngine(llm, batch_size=n, static=static) for static in (True, False))
    answerer, slow = (Answerer(plug, each, model.query_text, batch_size=n) for each in (engine, growing))
    requests = gpu_models.requests(n, encoder.config["hidden_size"])
    prompts = llm.tokenizer.prompts(prompt_texts(requests))
    ids = torch.tensor([[*prompt.before, *prompt.after][:INPUT_TOKENS] for prompt in prompts]).to(DEVICE)
    read_s = median_s(partial(answerer.answer, requests, Decoding(beams=1, max_new_tokens=1)), sizes.turns)
    print(f"{name}: {'a static cache' if engine.static else 'a growing cache'}, {read_s:.3g} s to the first token")
    lengths = [(1, _OUTPUT_TOKENS), (4, _OUTPUT_TOKENS), *([] if llm.is_encoder_decoder else [(1, _LONG_OUTPUT)])]
    for beams, n_new in lengths:
        decoding = Decoding(beams=beams, max_new_tokens=n_new)
        plainly = partial(generate_plainly, engine, decoding, input_ids=ids, attention_mask=torch.ones_like(ids))
        # First, while no cache of that size takes the memory.
        others = [
            f"{other} {n / median_s(call, 1):,.4g}/s"
            for other, call in {
                "a growing cache": partial(slow.answer, requests, decoding),
                "transformers.generate, no plug": plainly,
            }.items()
        ]
        tokens = [answer.n_tokens for answer in answerer.answer(requests, decoding)]
        ours = measure(partial(answerer.answer, requests, decoding), sizes.turns)
        read_floor_s, step_floor_s = gpu_models.answer_floors_s(gpu, llm, n, beams, max(tokens))
        floor = n / (read_floor_s + max(tokens) * step_floor_s)
        work = f"{n} answers of {statistics.mean(tokens):.0f} tokens, {name}, {beams} beam{'s' * (beams > 1)}"
        step_s = (ours.seconds - read_s) / max(max(tokens) - 1, 1)
        step = f"a step {1e3 * step_s:.3g} ms, floor {1e3 * step_floor_s:.3g}"
        line(work, n / ours.seconds, floor, "answers", "; ".join([step, *others]), ours)


_LLM_WORKS = {"train": train, "generate": generate}


def run(name: str, work: Callable[[], None]) -> None:
    """Do one work and print how long it took, all turns together."""
    print(f"({name}: {timed(work):.0f} s in all)", flush=True)


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
            run("compare", partial(compare, folder))
        gpu = Gpu(square=sizes.square, copied_mib=sizes.copied_mib)
        encoder = gpu_models.new_encoder(sizes, folder)
        if "encode" in arguments.only:
            run("encode", partial(encode, gpu, sizes, encoder))
        if chosen := [work for name, work in _LLM_WORKS.items() if name in arguments.only]:
            for llm_name, llm in gpu_models.new_llms(sizes, folder):
                for work in chosen:
                    run(f"{work.__name__}, {llm_name}", partial(work, gpu, sizes, encoder, llm_name, llm))


if __name__ == "__main__":
    main()
