"""What the matrix checks of an LLM: each check compares this project's code with plain transformers on the same input.

A check returns what is wrong, with numbers, or nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from persona.errors import PersonaError
from tests.matrix.findings import Findings, message
from tests.matrix.ours import OurLLM
from tests.matrix.plain import PlainLLM
from tests.matrix.requests import Request, sample_requests

_NEW_TOKENS = 8
# A loss is a sum of up to ten terms of size 10, each after some thousand float32 operations in another order.
_RELATIVE, _ABSOLUTE = 2e-5, 2e-4
# Lengths of a finite step along the soft tokens, whose own length is about 1. One that agrees is enough: a longer step
# may end with another expert of a mixture, a shorter one drowns in rounding.
_STEPS = (0.01, 0.003, 0.001)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An LLM in this project's code and in plain transformers, and requests for both."""

    folder: Path
    ours: OurLLM
    plain: PlainLLM
    requests: list[Request]


Check = Callable[[Pair], Iterator[str]]


def new_pair(folder: Path, *, seq2seq: bool) -> Pair:
    """The LLM in the folder. Raises PersonaError when this project refuses it."""
    ours, plain = OurLLM(folder), PlainLLM(folder, seq2seq=seq2seq)
    return Pair(folder=folder, ours=ours, plain=plain, requests=sample_requests(plain.word_ids()))


def check_llm(folder: Path, checks: Sequence[Check], *, seq2seq: bool) -> Findings:
    """Runs the checks on the LLM in the folder."""
    try:
        pair = new_pair(folder, seq2seq=seq2seq)
    except PersonaError as error:
        return Findings(refused=message(error, folder))
    failures: list[str] = []
    limits = ["one prompt length a batch"] if pair.ours.needs_one_prompt_length else []
    for check in checks:
        try:
            failures += [f"{check.__name__}: {finding}" for finding in check(pair)]
        except Exception as error:  # noqa: BLE001 - a crash is a finding like any other
            if isinstance(error, PersonaError) and check in OPTIONS:
                limits.append(f"no {OPTIONS[check]}")
            else:
                failures.append(f"{check.__name__}: {type(error).__name__}: {message(error, folder)}")
    return Findings(failures=failures, limits=limits)


def losses(pair: Pair) -> Iterator[str]:
    """Losses alone and beside longer rows: bare, with soft tokens, with texts in front as well."""
    kinds: dict[str, Callable[[Request], Request]] = {
        "bare": Request.bare,
        "soft tokens": Request.without_texts,
        "texts and soft tokens": lambda request: request,
    }
    for name, change in kinds.items():
        requests = [change(request) for request in pair.requests]
        expected = torch.tensor([pair.plain.loss(request) for request in requests])
        with torch.no_grad():
            alone = torch.cat([pair.ours.losses([request]) for request in requests])
            together = pair.ours.losses(requests)
            cached = pair.ours.losses(requests, cache_before=True)
        yield from _difference(f"{name}, alone", alone, expected)
        yield from _difference(f"{name}, in a padded batch", together, expected)
        yield from _difference(f"{name}, with the texts in a cache", cached, expected)


def gradients(pair: Pair) -> Iterator[str]:
    """The gradient to every soft token, against that of transformers and against finite differences."""
    together_BSD = pair.ours.gradient(pair.requests)
    soft_BSD = pair.ours.soft_tokens(pair.requests)
    expected_BSD = torch.stack(
        [pair.plain.gradient(one, soft_SD) for one, soft_SD in zip(pair.requests, soft_BSD, strict=True)]
    )
    alone_BSD = torch.cat([pair.ours.gradient([request]) for request in pair.requests])
    for name, found_BSD in (("alone", alone_BSD), ("in a padded batch", together_BSD)):
        yield from _difference(
            name, found_BSD, expected_BSD, relative=1e-3, absolute=1e-4 * expected_BSD.abs().max().item()
        )
    length_B = together_BSD.flatten(1).norm(dim=1)
    direction_BSD = together_BSD / length_B.view(-1, 1, 1)
    agrees_B = torch.zeros(len(pair.requests), dtype=torch.bool)
    for step in _STEPS:
        with torch.no_grad():
            up_B, down_B = (pair.ours.losses(pair.requests, soft_BSD + move * direction_BSD) for move in (step, -step))
        slope_B = (up_B - down_B) / (2 * step)
        agrees_B |= torch.isclose(slope_B, length_B, rtol=0.05)
    if not agrees_B.all():
        yield f"finite differences {_numbers(slope_B)}, gradient {_numbers(length_B)}"


def depends(pair: Pair) -> Iterator[str]:
    """The tiny LLM is a fair test: its loss depends on every soft token and on the texts in front."""
    weakest = pair.ours.gradient(pair.requests).norm(dim=-1).min().item()
    if not weakest > 1e-3:
        yield f"the gradient of a soft token is {weakest:.1e}"
    for request in pair.requests:
        change = abs(pair.plain.loss(request) - pair.plain.loss(request.without_texts()))
        if request.texts and not change > 2e-3:
            yield f"the texts in front change a loss by {change:.1e}"


def answers(pair: Pair) -> Iterator[str]:
    """Greedy and beam answers, alone and in a padded batch, with soft tokens and with texts in front as well."""
    for beams in (1, 4):
        for requests in ([request.without_texts() for request in pair.requests], pair.requests):
            expected = [pair.plain.answer(one, beams=beams, max_new_tokens=_NEW_TOKENS) for one in requests]
            together = pair.ours.answers(requests, beams=beams, max_new_tokens=_NEW_TOKENS)
            alone = [
                answer
                for request in requests
                for answer in pair.ours.answers([request], beams=beams, max_new_tokens=_NEW_TOKENS)
            ]
            for name, found in (("alone", alone), ("in a padded batch", together)):
                if found != expected:
                    row = next(i for i in range(len(found)) if found[i] != expected[i])
                    texts = "with" if requests is pair.requests else "without"
                    yield f"{beams} beams, {name}, {texts} texts: {found[row]}, transformers {expected[row]}"


def soft_first(pair: Pair) -> Iterator[str]:
    """The loss with the soft tokens in front of all text."""
    ours = OurLLM(pair.folder, soft_first=True)
    plain = PlainLLM(pair.folder, seq2seq=pair.plain.seq2seq, soft_first=True)
    expected = torch.tensor([plain.loss(request) for request in pair.requests])
    with torch.no_grad():
        found = ours.losses(pair.requests)
    yield from _difference("loss", found, expected)


def checkpointing(pair: Pair) -> Iterator[str]:
    """Recomputing activations changes neither losses nor gradients."""
    recomputing = OurLLM(pair.folder)
    recomputing.checkpoint_activations()
    yield from _difference("loss", recomputing.losses(pair.requests).detach(), pair.ours.losses(pair.requests).detach())
    yield from _difference(
        "gradient", recomputing.gradient(pair.requests), pair.ours.gradient(pair.requests), relative=1e-3
    )


def bf16(pair: Pair) -> Iterator[str]:
    """In bf16, losses are as near to those in float32 as plain transformers' own in bf16."""
    half = OurLLM(pair.folder, precision="bf16")
    plain = PlainLLM(pair.folder, seq2seq=pair.plain.seq2seq, dtype=torch.bfloat16)
    expected = torch.tensor([pair.plain.loss(request) for request in pair.requests])
    reference = torch.tensor([plain.loss(request) for request in pair.requests])
    with torch.no_grad():
        found = half.losses(pair.requests)
    allowed = 2 * (reference - expected).abs().max() + 0.02 * expected.max()
    if not ((found - expected).abs() <= allowed).all():
        yield f"{_numbers(found)}, in float32 {_numbers(expected)}, transformers in bf16 {_numbers(reference)}"


SHORT: list[Check] = [losses, gradients, answers]
LONG: list[Check] = [depends, *SHORT, soft_first, checkpointing, bf16]
OPTIONS: dict[Check, str] = {checkpointing: "activation checkpointing", bf16: "bf16"}
"""What an LLM may refuse and still work."""


def _difference(
    name: str, found: Tensor, expected: Tensor, *, relative: float = _RELATIVE, absolute: float = _ABSOLUTE
) -> Iterator[str]:
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=relative, atol=absolute):
        if found.dim() == 1:
            yield f"{name}: {_numbers(found)}, expected {_numbers(expected)}"
        else:
            yield f"{name}: the largest difference is {(found - expected).abs().max():.2e}"


def _numbers(values: Tensor) -> str:
    return " ".join(f"{value:.4f}" for value in values.tolist())
