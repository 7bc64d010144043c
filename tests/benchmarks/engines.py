"""Compare the engines `local` and `vllm`, in turns, and vLLM with prompts of token ids beside them.

    python -m tests.benchmarks.engines --new-tokens 16 128
    python -m tests.benchmarks.engines --new-tokens 128 --requests 512 --llm FOLDER

Runs where vLLM is installed (`make test-vllm` makes such an environment), on a GPU if there is one, else on all cores.
Each request has 30 to 100 tokens of text, and 17 soft tokens unless vLLM is given ids alone. Answers are greedy and
end where the LLM ends them. Loading is not counted.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from persona.engines.base import Answer, EngineSettings, Prompt, engine_module
from persona.engines.options import EngineOptions
from persona.models import packaged
from persona.models.prompts import PromptText
from persona.models.resolve import resolve
from persona.options import Decoding, Precision, PromptOptions
from tests.benchmarks import corpus
from tests.benchmarks.contest import Contender, compete, ratio

_SOFT = 17
_MAX_INPUT_TOKENS = 100
_WARM_REQUESTS = 8


class Answers:
    """An engine that answers all requests in each turn."""

    def __init__(
        self, *, engine: str, llm: str, n_soft: int, n_requests: int, new_tokens: int, precision: Precision, cores: int
    ) -> None:
        torch.set_num_threads(cores)
        self.decoding = Decoding(max_new_tokens=new_tokens, beams=1)
        settings = EngineSettings(
            max_input_tokens=_MAX_INPUT_TOKENS,
            prompt=PromptOptions(prompt_format="plain"),
            precision=precision,
            batch_size=64,
            options=EngineOptions(engine="vllm", max_model_len=512) if engine == "vllm" else EngineOptions(),
        )
        module, folder = engine_module(engine), resolve(llm, flag="--llm")
        module.check(folder, settings, self.decoding)
        self.engine = module.load(folder, settings)
        self.prompts = self._prompts(n_requests, n_soft)
        self._answer(self.prompts[:_WARM_REQUESTS])
        self.answers: list[Answer] = []

    def turn(self) -> tuple[float, float]:
        """Answers and seconds."""
        started = time.perf_counter()
        self.answers = self._answer(self.prompts)
        return len(self.prompts), time.perf_counter() - started

    def result(self) -> list[Answer]:
        """The answers, to compare the engines."""
        return self._answer(self.prompts)

    def close(self) -> None:
        """Ends vLLM's processes."""
        if client := getattr(self.engine, "client", None):
            client.close()

    def _answer(self, prompts: list[Prompt]) -> list[Answer]:
        return self.engine.answer(prompts, self.decoding, [0] * len(prompts))

    def _prompts(self, n: int, n_soft: int) -> list[Prompt]:
        """The same prompts for each engine, the longest first."""
        draw, random = np.random.default_rng(0), torch.Generator().manual_seed(0)
        texts = [" ".join(text.split()[: draw.integers(22, 75)]) for text in corpus.texts("abstracts", n)]
        ids = self.engine.tokenizer.prompts([PromptText(input=text) for text in texts])
        soft = torch.randn(n, n_soft, self.engine.width, generator=random) * 0.1  # about as long as SmolLM2's tokens
        return [Prompt(ids=ids[i], soft_SD=soft[i]) for i in sorted(range(n), key=lambda i: -len(ids[i]))]


def main() -> None:
    """Print a table and a line of JSON for each number of new tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[16, 128], help="longest answers")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--llm", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--cores", type=int, default=2, help="threads of each engine on CPUs")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    for new_tokens in arguments.new_tokens:
        print(json.dumps(_measure(arguments, new_tokens)))


def _measure(arguments: argparse.Namespace, new_tokens: int) -> dict[str, Any]:
    shared = {
        "llm": arguments.llm or str(packaged.smollm2()),
        "n_requests": arguments.requests,
        "new_tokens": new_tokens,
        "precision": arguments.precision,
        "cores": arguments.cores,
    }
    local, vllm, ids = contenders = [
        Contender(name=name, work=Answers, settings={**shared, "engine": engine, "n_soft": n_soft})
        for name, engine, n_soft in (("local", "local", _SOFT), ("vllm", "vllm", _SOFT), ("vllm, ids alone", "vllm", 0))
    ]
    compete(contenders, arguments.turns)
    report: dict[str, Any] = {**shared, "equal": _share_of_equal(local.result, vllm.result)}
    print(f"{arguments.requests} requests, at most {new_tokens} new tokens, {arguments.precision}")
    for one in contenders:
        tokens = sum(answer.n_tokens for answer in one.result)
        report[one.name] = {"per_s": one.rate, "tokens_per_s": one.rate * tokens / len(one.result), "mib": one.peak_mib}
        print(f"{one.name:<16} {one.rate:7.2f} answers/s {report[one.name]['tokens_per_s']:8.0f} tokens/s", end=" ")
        print(f"{one.peak_mib:7.0f} MiB")
    for name, pair in (("vllm / local", (vllm, local)), ("vllm / ids alone", (vllm, ids))):
        report[name] = ratio(*pair)
        print(f"{name:<16} {report[name][0]:7.2f} ± {report[name][1]:.2f}")
    print(f"equal answers    {report['equal']:.1%}")
    return report


def _share_of_equal(one: list[Answer], other: list[Answer]) -> float:
    return sum(a.text == b.text for a, b in zip(one, other, strict=True)) / len(one)


if __name__ == "__main__":
    main()
