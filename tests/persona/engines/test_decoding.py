"""Seeded sampling: draws follow the LLM's distribution, and those of a row do not depend on other rows."""

import math

import torch

from persona.engines.decoding import SeededSampling
from persona.options import Decoding

N_DRAWS = 20_000
SAMPLE = Decoding(beams=1, sample=True)
CPU = torch.device("cpu")


def draws(scores_V: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """How often each token is drawn (V,) from these scores, each time by a request with another seed."""
    processor = SeededSampling(decoding, range(N_DRAWS), CPU)
    found = processor(scores_V.expand(N_DRAWS, -1), range(N_DRAWS)).argmax(-1)
    return torch.bincount(found, minlength=len(scores_V)).double()


def assert_distribution(counts_V: torch.Tensor, expected_V: torch.Tensor) -> None:
    """Pearson's chi-square: with k tokens its mean is k - 1 and its variance 2(k - 1) if the distribution is right.

    The limit is five standard deviations above the mean. Half a percent of probability at the wrong token is far above
    it.
    """
    assert (counts_V[expected_V == 0] == 0).all()
    possible = expected_V > 0
    expected = expected_V[possible] * N_DRAWS
    assert expected.min() > 5  # otherwise the statistic is not chi-square distributed
    chi_square = ((counts_V[possible] - expected) ** 2 / expected).sum().item()
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


SCORES = torch.linspace(-2.0, 2.0, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]


def test_samples_follow_the_distribution():
    assert_distribution(draws(SCORES, SAMPLE), torch.softmax(SCORES.double(), -1))


def test_samples_follow_the_temperature():
    decoding = Decoding(beams=1, sample=True, sampling_temperature=2.5)
    assert_distribution(draws(SCORES, decoding), torch.softmax(SCORES.double() / 2.5, -1))


def test_top_p_keeps_the_likeliest_tokens_that_together_reach_it():
    p = torch.softmax(SCORES.double(), -1)
    kept, total = set(), 0.0
    for token in p.argsort(descending=True).tolist():
        if total < 0.6:
            kept.add(token)
        total += p[token].item()
    nucleus = torch.tensor([p[token].item() if token in kept else 0.0 for token in range(len(p))], dtype=torch.float64)
    decoding = Decoding(beams=1, sample=True, top_p=0.6)
    assert_distribution(draws(SCORES, decoding), nucleus / nucleus.sum())


def test_the_draws_of_a_row_do_not_depend_on_its_neighbors():
    def sequence(seeds: list[int], row: int) -> list[int]:
        processor = SeededSampling(SAMPLE, seeds, CPU)
        scores = SCORES.expand(len(seeds), -1)
        return [int(processor(scores, range(len(seeds))).argmax(-1)[row]) for _ in range(20)]

    alone = sequence([7], 0)
    assert sequence([1, 7, 3], 1) == alone
    assert sequence([7, 7], 1) == alone
    assert sequence([8], 0) != alone


def test_successive_draws_are_independent():
    """Twenty draws from one stream differ as much as the first draws of twenty streams."""
    processor = SeededSampling(SAMPLE, [0], CPU)
    found = [int(processor(torch.zeros(1, 1000), [0]).argmax()) for _ in range(20)]
    assert len(set(found)) > 15
