"""The choices that a person makes about a plug, its training and its answers; the jobs' flags are made of these.

Light to import, so that `--help` needs no torch. Each field's text is its line of `--help`.
"""

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from persona.errors import UsageError

Pooling = Literal["cls", "mean"]
Precision = Literal["auto", "bf16", "fp32"]
Retriever = Literal["recency", "bm25", "dense"]


class PersonaKind(StrEnum):
    """Whose history a request is answered with, and whether the plug is used at all."""

    OWN = "own"
    """The user's own history, weighed as the plug learned to."""
    NONE = "none"
    """No history: the persona of a typical behavior."""
    OTHER = "other"
    """Another user's history."""
    MEAN = "mean"
    """The user's own history, all behaviors weighed equally."""
    BARE = "bare"
    """The LLM without the plug."""

    @property
    def sees_own_history(self) -> bool:
        """Whether the request sees its own user's behaviors."""
        return self in (PersonaKind.OWN, PersonaKind.MEAN)

    @property
    def sees_no_history(self) -> bool:
        """Whether the request sees no behavior at all."""
        return self in (PersonaKind.NONE, PersonaKind.BARE)


@dataclass(frozen=True, kw_only=True)
class PlugOptions:
    """What makes one plug differ from another; kept in `plug.json`. The defaults are the paper's."""

    weights: Literal["attention", "mean"] = "attention"
    """How behaviors are weighed: by the request (eq. 3), or without it, all alike (the paper's own ablation)."""
    persona_tokens: int = 1
    """Soft tokens that carry the persona."""
    persona_gain: float = 1.0
    """Factor on what sets a history apart from the typical one, inside the projector: 4 learns more a step."""
    instruction: Literal["vector", "projected", "none"] = "vector"
    """The instruction token of eq. 5: a trained vector, one behind a projector of its own (the reference), or none."""
    temperature: float = 1.0
    """Factor on x·h before the softmax; with unit vectors and 1.0 (the paper) the weights are nearly flat."""
    learn_temperature: bool = False
    """Train that factor, starting from --temperature."""
    recency: bool = False
    """Let a behavior weigh less by a learned power of how many newer ones the request sees; starts without effect."""

    @property
    def n_soft(self) -> int:
        """Soft tokens in front of a request."""
        return self.persona_tokens + (self.instruction != "none")

    def check(self) -> None:
        """Raises UsageError for values that cannot work."""
        if self.persona_tokens < 1:
            raise UsageError(f"--persona-tokens {self.persona_tokens}: must be 1 or more")
        if not 0 < self.persona_gain < math.inf:
            raise UsageError(f"--persona-gain {self.persona_gain}: must be above 0 (1 is the paper's plug)")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"--temperature {self.temperature}: must be above 0")
        if self.weights == "mean" and self.learn_temperature:
            raise UsageError("--learn-temperature does nothing under --weights mean; take one of them away")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The settings of a training run; a run that is resumed must have the same."""

    epochs: int = 2
    """Passes over the requests, each with other behaviors left out."""
    global_batch: int = 64
    """Requests of one optimizer step, over all workers."""
    micro_batch: int = 8
    """Requests of one forward pass of a worker; lower it when a GPU runs out of memory."""
    learning_rate: float = 1e-4
    """Peak rate of projector and instruction token."""
    query_learning_rate: float = 1e-4
    """Peak rate of the query encoder, which is pretrained."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    warmup: float = 0.05
    """Share of the steps over which the rates rise; then they fall linearly to 0."""
    max_gradient_norm: float = 1.0
    """Gradients of a step are scaled down to this norm."""
    history_dropout: float = 0.5
    """Up to this share of a history is left out of a row, drawn anew each epoch."""
    empty_history: float = 0.05
    """Share of rows that lose their history, for users who have none; 1 is prompt tuning (--personas none)."""
    alignment: float = 0.0
    """First share of the steps, in which a history is the one vector of the row's own target (xRAG, 2405.13792)."""
    contrast: float = 0.0
    """Weight in the loss of telling the own history from another user's; one more forward and backward pass a row."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 1, 2, or 3 when the LLM does not fit one GPU."""
    warm_start: Literal["none", "vocabulary"] = "none"
    """Start the projector where words of the LLM's vocabulary lie (needs no labels), or at random as in the paper."""
    seed: int = 0
    """Of the plug's start, of the order of requests and of the dropout."""

    def check_training(self, n_workers: int) -> None:
        """Raises UsageError for values that cannot work, before anything is loaded."""
        share = n_workers * self.micro_batch
        if min(self.epochs, self.global_batch, self.micro_batch, n_workers) < 1:
            raise UsageError("--epochs, --global-batch, --micro-batch and --workers must be 1 or more")
        if self.global_batch % share:
            raise UsageError(
                f"--global-batch {self.global_batch} is not a multiple of --workers {n_workers} × --micro-batch "
                f"{self.micro_batch} = {share}; change one of the three"
            )
        if self.zero_stage not in (1, 2, 3):
            raise UsageError(f"--zero-stage {self.zero_stage}: must be 1, 2 or 3")
        for name in ("warmup", "history_dropout", "alignment"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0 and below 1")
        if not 0 <= self.empty_history <= 1:
            raise UsageError(f"--empty-history {self.empty_history}: must be from 0 to 1")
        for name in ("learning_rate", "query_learning_rate", "max_gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"--weight-decay {self.weight_decay}: must be 0 or more")
        if not 0 <= self.contrast < math.inf:
            raise UsageError(f"--contrast {self.contrast}: must be 0 (off) or more")
        if self.contrast and self.micro_batch < 2:
            raise UsageError(
                f"--contrast {self.contrast} takes the other history from the same micro-batch: --micro-batch must be "
                f"2 or more, not {self.micro_batch}"
            )
        if self.empty_history == 1 and (self.alignment or self.contrast):
            raise UsageError("--empty-history 1 leaves no history for --alignment or --contrast to work on")


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """What is known of the machines, so that a job can say what it costs."""

    gpu_hour_price: float | None = None
    """Price of an hour of one GPU, in your own currency: the summary says what the run cost, --dry-run what it will."""
    tflops: float | None = None
    """What one GPU reaches with your model, in 10¹² operations a second: --dry-run makes hours of it."""

    def check_cost(self) -> None:
        """Raises UsageError for values that cannot be."""
        for name in ("gpu_hour_price", "tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One way to decode; part of the fingerprint of every answer."""

    max_new_tokens: int = 128
    """Answers are cut after this many tokens."""
    beams: int = 4
    """Beams of the search; 1 is greedy."""
    sample: bool = False
    """Draw answers at random instead, with a seed a request (takes --beams 1)."""
    sampling_temperature: float = 1.0
    """Of the distribution that --sample draws from."""
    top_p: float = 1.0
    """Share of the probability that --sample draws from."""
    seed: int = 0
    """Of --sample; the same request gets the same answer in any batch on the same kind of device."""

    def check_decoding(self) -> None:
        """Raises UsageError for values that cannot work."""
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: must be 1 or more")
        if self.beams < 1:
            raise UsageError(f"--beams {self.beams}: must be 1 (greedy) or more")
        if self.sample and self.beams > 1:
            raise UsageError(f"--sample draws one answer a request and takes --beams 1, not {self.beams}")
        if not 0 < self.sampling_temperature < math.inf:
            raise UsageError(f"--sampling-temperature {self.sampling_temperature}: must be above 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if not self.sample:
            _check_default(self, Decoding, ("sampling_temperature", "top_p", "seed"), needs="--sample")

    def row_seed(self, request_id: str) -> int:
        """The seed of one request's sampling: the same in any batch, on any worker."""
        digest = hashlib.blake2b(f"{self.seed}\0{request_id}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "little")


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Texts of the user's own history in the prompt, in front of the soft tokens (eq. r); off unless asked for."""

    retrieve: int = 0
    """So many of the user's own past texts go in front of the prompt; needs --texts."""
    retriever: Retriever = "recency"
    """Which: the latest, the best by the words of the query (BM25), or by the store's encoder."""
    retrieve_tokens: int = 256
    """Tokens of all these texts together, in equal shares."""
    texts: str | None = None
    """The histories of jobs.embed, which have the texts that the store does not hold."""
    columns: str = ""
    """Names of the columns of --texts where they differ: text=body,user_id=author."""

    @property
    def front_tokens(self) -> int:
        """Tokens of retrieved texts that go in front of a prompt."""
        return self.retrieve_tokens if self.retrieve else 0

    def answers_of(self, persona: str) -> str:
        """The name of the answers under a persona, like own or own-bm25-4."""
        return f"{persona}-{self.retriever}-{self.retrieve}" if self.retrieve else persona

    def check_texts_are_used(self) -> None:
        """Raises UsageError for --texts that nothing is taken from."""
        if self.texts is not None and not self.retrieve:
            raise UsageError("--texts does nothing without --retrieve; give a number of texts, or leave it out")

    def check_retrieval(self) -> None:
        """Raises UsageError for values that cannot work."""
        if self.retrieve < 0:
            raise UsageError(f"--retrieve {self.retrieve}: must be 0 (none) or more")
        if self.retrieve and self.texts is None:
            raise UsageError(f"--retrieve {self.retrieve} needs --texts: the store holds vectors, not texts")
        if self.retrieve_tokens < max(self.retrieve, 1):
            raise UsageError(f"--retrieve-tokens {self.retrieve_tokens}: must be one a text of --retrieve at least")
        if self.columns and self.texts is None:
            raise UsageError("--columns names the columns of --texts, which is not given")
        if not self.retrieve:
            _check_default(self, Retrieval, ("retriever", "retrieve_tokens"), needs="--retrieve")


def _check_default(options: object, kind: type, names: tuple[str, ...], *, needs: str) -> None:
    """Raises UsageError for an option that was given and that nothing looks at."""
    for name in names:
        value = getattr(options, name)
        if value != getattr(kind, name):
            raise UsageError(f"--{name.replace('_', '-')} {value} does nothing without {needs}; give both or none")
