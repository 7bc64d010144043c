"""Demonstrations by likelihood: what a loop in float64 over plain transformers chooses."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import resolve
from persona.profiling.likelihood import LikelihoodJudge, choose, demonstration_sets, share_right
from persona.profiling.options import ProfileOptions
from persona.profiling.pairs import Pair, Split, split
from tests.models import tiny_llama, tiny_t5

START = datetime(2024, 1, 1, tzinfo=UTC)
OPTIONS = ProfileOptions(candidates=4, demonstrations=3, holdout=0.2)


def pairs(n: int = 10) -> list[Pair]:
    return [
        Pair(
            request_id=f"r{number}",
            input=f"title of paper {number}",
            target="abcdefghij"[number] * 3,
            rejected=f"the {number} review",
            as_of=START + timedelta(days=number),
        )
        for number in range(n)
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def parts() -> Split:
    found = split(pairs(), OPTIONS)
    assert found is not None
    return found


def judge_of(folder: Path, **settings: int) -> LikelihoodJudge:
    llm = FrozenLLM.load(resolve(str(folder), flag="--llm"), precision="fp32")
    return LikelihoodJudge(llm, front_tokens=128, **settings)


def loop(folder: Path, chosen: tuple[Pair, ...], pair: Pair) -> float:
    """The margin of one pair, one token after the other, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    share = 128 // max(len(chosen), 1) - 1
    front = [token for one in chosen for token in [*ids(f"{one.input}\n{one.target}")[:share], *ids("\n")]]
    prompt = [tokenizer.bos_token_id, *front, *ids(pair.input), *ids("\n")]
    nats = []
    for answer in (pair.target, pair.rejected):
        target, so_far, total = [*ids(answer), tokenizer.eos_token_id], list(prompt), 0.0
        for token in target:
            with torch.no_grad():
                logits = model(torch.tensor([so_far])).logits[0, -1]
            total -= float(torch.log_softmax(logits, -1)[token])
            so_far.append(token)
        nats.append(total)
    return nats[1] - nats[0]


def test_the_set_is_chosen_that_a_float64_loop_chooses(llama: Path) -> None:
    found, judge = parts(), judge_of(llama)
    sets = demonstration_sets("u", found.train, OPTIONS)
    expected = [[loop(llama, one, pair) for pair in found.validation] for one in sets]
    for one, margins in zip(sets, expected, strict=True):
        front = [f"{pair.input}\n{pair.target}" for pair in one]
        np.testing.assert_allclose(judge.margins(front, found.validation), margins, rtol=1e-4, atol=1e-4)
    best = int(np.argmax([np.mean(margins) for margins in expected]))
    profile = choose("u", found, judge, OPTIONS)
    assert tuple(one.pair for one in profile.demonstrations) == sets[best]
    assert profile.validation_score == share_right(np.array(expected[best]))
    assert profile.held_out_score == share_right(np.array([loop(llama, sets[best], pair) for pair in found.held_out]))
    assert profile.held_out_none == share_right(np.array([loop(llama, (), pair) for pair in found.held_out]))
    assert (profile.n_pairs, profile.n_held_out, profile.newest_pair_at) == (8, 2, START + timedelta(days=7))


def test_batches_do_not_change_the_margins(llama: Path, tmp_path: Path) -> None:
    for folder in (llama, tiny_t5(tmp_path / "t5")):
        front = ["a title\nabc", "review\nthe paper"]
        whole = judge_of(folder).margins(front, pairs())
        np.testing.assert_allclose(judge_of(folder, batch_size=1).margins(front, pairs()), whole, rtol=1e-4, atol=1e-4)


def test_sets_differ_by_user_and_are_always_the_same() -> None:
    train = parts().train
    sets = demonstration_sets("u", train, OPTIONS)
    assert sets[:2] == [(), train[-3:]]
    assert sets == demonstration_sets("u", train, OPTIONS) != demonstration_sets("v", train, OPTIONS)
    assert len(set(sets)) == len(sets) <= 2 + OPTIONS.candidates
    assert all(len(one) <= 3 and len(set(one)) == len(one) for one in sets)
