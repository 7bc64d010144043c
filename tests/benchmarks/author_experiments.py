"""The experiments on ACL authors: for each question, the plugs to train and the personas to evaluate them with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persona.options import RetrievalOptions, Retriever

_NO_RETRIEVAL = RetrievalOptions()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the results: how its plug is trained, and the personas it is evaluated with."""

    recipe: str | None = None
    """Training recipe; None for the LLM without a plug."""
    train: Sequence[str] = ()
    """Flags of `jobs.train` that change the recipe."""
    personas: Sequence[str] = ("own", "none", "other")
    retrieval: RetrievalOptions = _NO_RETRIEVAL
    """Past texts in the prompt, the same in training, generation and evaluation."""
    one_seed: bool = False
    """Run the first seed only."""
    encoder_alone: bool = False
    """Rank the two titles by their similarity to the history, without any LLM."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One question, put to the requests of all authors."""

    tables: str
    """Data set of the requests: `next_title` or `which`."""
    rows: Mapping[str, Row]
    against: str
    """Reference row of the comparison."""
    generate: Sequence[str] | None = None
    """Flags of `jobs.generate`; None to measure losses only."""
    evaluate: Sequence[str] = ()
    """More flags of `jobs.evaluate`."""
    oracle: bool = False
    """Replace each request's history with the right answer."""


def _texts(n: int, retriever: Retriever, tokens: int) -> RetrievalOptions:
    return RetrievalOptions(retrieve=n, retriever=retriever, retrieve_tokens=tokens)


def _recent(n: int) -> RetrievalOptions:
    return _texts(n, "recency", 32 * n)


def _tokens(n: int) -> Sequence[str]:
    return "--persona-tokens", str(n)


def _rate(rate: str) -> Sequence[str]:
    return "--learning-rate", rate


def _best(
    *train: str, personas: Sequence[str] = ("own", "none", "other"), retrieval: RetrievalOptions = _NO_RETRIEVAL
) -> Row:
    return Row(recipe="best", train=train, personas=personas, retrieval=retrieval)


def _addition(*train: str) -> Row:
    return _best(*train, personas=("own", "other"))


def _tuning(*train: str, retrieval: RetrievalOptions = _NO_RETRIEVAL) -> Row:
    return _best(*_WITHOUT_HISTORIES, *train, personas=("none",), retrieval=retrieval)


def _bare(retrieval: RetrievalOptions = _NO_RETRIEVAL) -> Row:
    return Row(personas=("bare",), retrieval=retrieval, one_seed=True)


_WHICH = Row(recipe="best", train=("--query-prompt", ""), personas=("own", "none"), one_seed=True)
_REJECTED = ("--rejected", "rejected")
_LABELS: dict[str, Any] = {
    "generate": ("--beams", "1", "--max-new-tokens", "8"),
    "evaluate": ("--metric", "label", *_REJECTED),
    "against": "best/none",
}
_WITHOUT_HISTORIES = ("--empty-history", "1", "--alignment", "0")
# The paper's learning rate, 1e-4, is meant for 22 epochs, so this uses the one of `best`. The prefix is BGE's.
_PAPER = (*_rate("1e-2"), "--query-prompt", "")
# Some rows were measured with the recipe as it was before it had a gain.
_NO_GAIN = ("--persona-gain", "1")
_BEFORE = (*_NO_GAIN, "--alignment", "0.3")
_ATTENTION = ("--weights", "attention", "--temperature", "30", "--learn-temperature")
_RENDERINGS = {
    "plain": ("--prompt-format", "plain"),
    "chat": ("--prompt-format", "chat"),
    "chat-start": ("--prompt-format", "chat", "--soft-position", "start"),
}
EXPERIMENTS = {
    "next_title": Experiment(
        tables="next_title",
        rows={
            "tuning": _tuning(),
            "bare": _bare(),
            "bare-recency": _bare(_recent(4)),
            "bare-bm25": _bare(_texts(4, "bm25", 128)),
            "bare-dense": _bare(_texts(4, "dense", 128)),
            "best": _best(),
            "no-gain": _best(*_BEFORE),
            "no-gain-tuning": _tuning(*_NO_GAIN),
            "paper": Row(recipe="paper", train=_PAPER),
            # The control of `paper`, with one token as well; without a history there is nothing to weigh.
            "paper-tuning": Row(
                recipe="paper", train=(*_PAPER, *_WITHOUT_HISTORIES, "--weights", "mean"), personas=("none",)
            ),
            "attention": _best(*_BEFORE, *_ATTENTION, personas=("own", "none", "other", "mean")),
            # With alignment, the plug learns to use the retrieved texts less well (dev).
            "retrieval": _best(*_NO_GAIN, "--alignment", "0", retrieval=_recent(2)),
            "retrieval-tuning": _tuning(*_NO_GAIN, retrieval=_recent(2)),
        },
        generate=("--beams", "1", "--max-new-tokens", "32"),
        evaluate=("--metric", "text", *_REJECTED),
        against="tuning/none",
    ),
    # What each addition to the paper's plug gains: the recipe, and the recipe with one change.
    "additions": Experiment(
        tables="next_title",
        rows={
            "best": _addition(),
            "recency": _addition("--recency"),
            **{f"tokens-{n}": _addition(*_tokens(n)) for n in (1, 4, 8, 32)},
            **{f"rate-{rate}": _addition(*_rate(rate)) for rate in ("5e-3", "2e-2")},
            "random-start": _addition("--warm-start", "none"),
            "no-gain": _addition(*_NO_GAIN),
            "no-alignment": _addition("--alignment", "0"),
            "more-alignment": _addition("--alignment", "0.3"),
            "attention": _addition(*_ATTENTION),
            "contrast": _addition("--contrast", "0.5"),
            # More tokens and a higher rate also help a plug without personas. These rows show how much is left.
            **{f"tuning-tokens-{n}": _tuning(*_tokens(n)) for n in (4, 8, 16, 32)},
            "tuning-rate-5e-3": _tuning(*_rate("5e-3")),
        },
        against="best/own",
    ),
    # Is a persona worth as much as recent texts in the prompt, and does it add to them?
    "texts": Experiment(
        tables="next_title",
        rows={
            "plug": _best(),
            "tuning": _tuning(),
            **{f"bare-{n}": _bare(_recent(n)) for n in (2, 8)},
            # With alignment, the plug learns to use the texts in front less well (dev).
            **{f"plug-{n}": _best("--alignment", "0", retrieval=_recent(n)) for n in (2, 8)},
            **{f"tuning-{n}": _tuning(retrieval=_recent(n)) for n in (2, 8)},
        },
        against="tuning-2/none",
    ),
    # What the LLM reads: the input as it is, or a chat with the soft tokens in front of the user's text or of all text.
    # A base LLM has no chat template: `--only plain plain-tuning`.
    "rendering": Experiment(
        tables="next_title",
        rows={
            name: row
            for rendering, flags in _RENDERINGS.items()
            for name, row in ((rendering, _best(*flags)), (f"{rendering}-tuning", _tuning(*flags)))
        },
        against="plain-tuning/none",
    ),
    "which": Experiment(
        tables="which",
        rows={
            "encoder": Row(encoder_alone=True, one_seed=True),
            "best": _WHICH,
            "bare": _bare(),
            "bare-dense": _bare(_texts(4, "dense", 64)),
        },
        **_LABELS,
    ),
    # Can the LLM pick the right title when the soft tokens encode nothing but that title?
    "which_oracle": Experiment(
        tables="which",
        rows={"best": _WHICH, "bare": _bare(), "bare-text": _bare(_texts(1, "recency", 64))},
        **_LABELS,
        oracle=True,
    ),
}
