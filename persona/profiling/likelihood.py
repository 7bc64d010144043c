"""Choose a user's demonstrations by the likelihood that a frozen LLM gives to preferred and rejected answers.

SynthesizeMe (arXiv 2506.05598) lets a strong LLM reason about pairs. Its search over sets of demonstrations also works
without reasoning: the best set is the one under which the validation pairs' preferred answers gain most on the rejected
ones. This needs no strong LLM.

Shapes: P pairs.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from persona.models.frozen_llm import FrozenLLM
from persona.models.prompts import PromptText
from persona.profiling.options import ProfileOptions
from persona.profiling.pairs import Demonstration, Pair, Sizes, Split
from persona.profiling.profile import Profile, demonstration_text

Floats = NDArray[np.float64]


class LikelihoodJudge:
    """A frozen LLM that prefers the likelier answer, with texts in front of the request.

    Args:
        llm: the frozen LLM; it reads requests as `evaluate --persona bare` does.
        front_tokens: tokens of all texts in front of a request, shared equally.
        batch_size: answers per forward pass.
    """

    def __init__(self, llm: FrozenLLM, *, front_tokens: int, batch_size: int = 16) -> None:
        self.llm = llm
        self.front_tokens = front_tokens
        self.batch_size = batch_size

    @torch.inference_mode()
    def margins(self, front: Sequence[str], pairs: Sequence[Pair]) -> Floats:
        """Nats of the rejected answer minus nats of the target (P,): above 0, the target is likelier."""
        requests = [PromptText(input=pair.input, retrieved=front, system=pair.system) for pair in pairs for _ in "ab"]
        answers = [answer for pair in pairs for answer in (pair.target, pair.rejected)]
        prompts = self.llm.tokenizer.prompts(requests, retrieved_tokens=self.front_tokens)
        targets = self.llm.tokenizer.targets(answers)
        nats: list[float] = []
        for start in range(0, len(prompts), self.batch_size):
            some = slice(start, start + self.batch_size)
            no_soft_B0D = torch.empty(len(prompts[some]), 0, self.llm.width, device=self.llm.device)
            # All rows of a user's candidate have the same texts in front, so they are read once.
            nats += self.llm.nll(no_soft_B0D, prompts[some], targets[some], cache_before=bool(front)).tolist()
        nats_P2 = np.array(nats, dtype=np.float64).reshape(-1, 2)
        return nats_P2[:, 1] - nats_P2[:, 0]


def choose(user_id: str, pairs: Split, judge: LikelihoodJudge, options: ProfileOptions) -> Profile:
    """The profile with the set of demonstrations under which the mean margin of the validation pairs is greatest.

    Without demonstrations is one of the candidates, and wins ties: a user whom no set helps gets an empty profile.
    """
    sets = demonstration_sets(user_id, pairs.train, options)
    margins = [judge.margins(_front(chosen), pairs.validation) for chosen in sets]
    best = max(range(len(sets)), key=lambda number: (float(margins[number].mean()), -number))
    held_out: tuple[float, float] | tuple[None, None] = (None, None)
    if pairs.held_out:
        with_profile = share_right(judge.margins(_front(sets[best]), pairs.held_out))
        held_out = with_profile, share_right(judge.margins((), pairs.held_out))
    return Profile(
        text="",
        demonstrations=tuple(Demonstration(pair=pair) for pair in sets[best]),
        validation_score=share_right(margins[best]),
        n_pairs=len(pairs.used),
        newest_pair_at=pairs.newest,
        n_held_out=len(pairs.held_out),
        held_out_score=held_out[0],
        held_out_none=held_out[1],
    )


def max_answers(parts: Sizes, options: ProfileOptions) -> int:
    """The most answers whose likelihood `choose` measures for a user's pairs."""
    return 2 * ((options.candidates + 2) * parts.validation + 2 * parts.held_out)


def demonstration_sets(user_id: str, train: Sequence[Pair], options: ProfileOptions) -> list[tuple[Pair, ...]]:
    """The candidates: no pair, the newest pairs, and random sets of random size; each once, and always the same."""
    most = min(options.demonstrations, len(train))
    found = [(), tuple(train[-most:])]
    for number in range(options.candidates):
        draw = random.Random(f"{options.seed}\0{user_id}\0{number}")
        found.append(tuple(draw.sample(list(train), draw.randint(1, most))))
    return list(dict.fromkeys(found))


def share_right(margins_P: Floats) -> float:
    """The share of pairs whose target is preferred; a tie counts half."""
    return float(np.mean((np.sign(margins_P) + 1) / 2))


def _front(chosen: Sequence[Pair]) -> list[str]:
    return [demonstration_text(pair.input, pair.target) for pair in chosen]
