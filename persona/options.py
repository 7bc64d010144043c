"""The choices people make about a plug, its training and its answers; jobs build their flags from these classes.

Each class checks itself when it is created, by a job or from Python, and raises UsageError naming the flag. The module
imports nothing heavy, so `--help` needs no torch. Each field's docstring is its line in `--help`.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from datetime import date
from enum import StrEnum
from typing import Any, Literal, get_args

from persona.errors import UsageError
from persona.option_checks import check_above_zero, check_at_least, check_default, given

# The names of sentence-transformers.
Pooling = Literal["cls", "mean", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"]
Precision = Literal["auto", "bf16", "fp32"]
Quantization = Literal["none", "int8", "fp8", "nf4"]
# The name of a device: all visible GPUs, over which the layers of an LLM are spread.
SPREAD = "auto"
Retriever = Literal["recency", "bm25", "dense"]
Select = Literal["best", "last"]
TimeUnit = Literal["s", "ms", "us", "ns"]
Track = Literal["none", "mlflow", "tensorboard"]
MAX_ROW_MB = 64  # of an input, by default; a row may hold a user's whole history

# What the chat template is given besides its own arguments.
_TEMPLATE_OWN = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize")


def pooling_modes(pooling: str) -> tuple[Pooling, ...]:
    """The modes of a pooling such as `cls+mean`. Raises UsageError for a mode that does not exist."""
    known: dict[str, Pooling] = {mode: mode for mode in get_args(Pooling)}
    unknown = [mode for mode in pooling.split("+") if mode not in known]
    if unknown:
        raise UsageError(f"pooling {pooling!r}: must be {', '.join(known)}, or several of them joined by +")
    return tuple(known[mode] for mode in pooling.split("+"))


class PersonaKind(StrEnum):
    """Which history a request is answered with, and whether the plug is used at all."""

    OWN = "own"
    """The user's own history, weighted by the trained plug."""
    NONE = "none"
    """No history: the persona of a typical behavior."""
    OTHER = "other"
    """Another user's history."""
    MEAN = "mean"
    """The user's own history, all behaviors weighted equally."""
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
class VectorOptions:
    """How an encoder makes a behavior's vector; what is left out comes from its folder."""

    pooling: Literal["auto", Pooling] = "auto"
    """How token vectors become one; auto is what the encoder's folder says, or cls for a plain BERT-like model."""
    document_prompt: str | None = None
    """Text in front of each behavior; default the encoder's own prompt for documents, "" for none."""
    width: int | None = None
    """Keep only this many components of each vector, for encoders trained for it (Matryoshka)."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "width")


@dataclass(frozen=True, kw_only=True)
class PlugOptions:
    """The architecture of a plug; kept in `plug.json`. The recipes `*/paper` have the values of PPlug."""

    weights: Literal["attention", "mean"] = "mean"
    """Weight all behaviors equally, or by their similarity to the request (PPlug eq. 3) if requests differ in topic."""
    persona_tokens: int = 16
    """Soft tokens that carry the persona; fewer are faster and say less."""
    persona_gain: float = 4.0
    """Scale each history's deviation from the mean behavior by this; raise it when the persona has little effect."""
    instruction: Literal["vector", "projected", "none"] = "vector"
    """Instruction token of PPlug eq. 5: a trained vector, a vector behind its own projector, or none."""
    temperature: float = 30.0
    """Of --weights attention: multiplies similarities before the softmax; at 1 (the paper) weights are nearly flat."""
    learn_temperature: bool = False
    """Train the temperature too, starting at --temperature."""
    query_token: bool = False
    """Add a soft token of the request itself behind the persona (PsPLUG, arXiv 2601.06362)."""
    recency: bool = False
    """Learn how much newer behaviors count more than older ones; has no effect before training."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "persona_tokens")
        check_above_zero(self, "persona_gain", note=" (1 is the paper's plug)")
        check_above_zero(self, "temperature")
        if self.weights == "mean" and self.learn_temperature:
            raise UsageError("--learn-temperature has no effect with --weights mean; use --weights attention")

    @property
    def n_soft(self) -> int:
        """Soft tokens in front of a request."""
        return self.persona_tokens + (self.instruction != "none") + self.query_token


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How the LLM reads a request; kept in `plug.json`, where `auto` has become `chat` or `plain`."""

    prompt_format: Literal["auto", "chat", "plain"] = "auto"
    """Write requests by the LLM's chat template, or plainly; auto is chat for a decoder-only LLM with a template."""
    soft_position: Literal["start", "input"] = "input"
    """Put the soft tokens in front of all text, or directly in front of the request's input."""
    system: str = ""
    """System text of the chat; a request's own, in its column `system`, replaces it."""
    template_argument: tuple[str, ...] = ()
    """Argument of the chat template as KEY=VALUE, like enable_thinking=false; give the flag once per argument."""
    template_date: str = ""
    """Date (YYYY-MM-DD) for a chat template that writes today's, which would change the answers from day to day."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        if self.prompt_format == "plain":
            check_default(self, "system", "template_argument", "template_date", needs="--prompt-format chat")
        if self.template_date:
            try:
                date.fromisoformat(self.template_date)
            except ValueError as error:
                raise UsageError(f"--template-date {self.template_date}: must be a date like 2026-01-31") from error
        names = [argument.partition("=")[0] for argument in self.template_argument]
        for argument, name in zip(self.template_argument, names, strict=True):
            if "=" not in argument or not name.isidentifier() or name in _TEMPLATE_OWN or names.count(name) > 1:
                raise UsageError(
                    f"--template-argument {argument}: must be KEY=VALUE, each KEY once, and none of "
                    f"{', '.join(_TEMPLATE_OWN)}"
                )

    def template_arguments(self) -> dict[str, Any]:
        """The arguments of the chat template by name; a value that is JSON, like `false` or `3`, is read as such."""
        return {name: _json_or_text(value) for name, _, value in (one.partition("=") for one in self.template_argument)}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The settings of a training run; a resumed run must have the same. The defaults are those of the recipe `base`."""

    epochs: int = 2
    """Passes over the requests, each with different behaviors dropped; take more if --dry-run shows few steps."""
    global_batch: int = 16
    """Requests per optimizer step, over all workers."""
    micro_batch: Literal["auto"] | int = 8
    """Requests per forward pass of a worker, at most; auto takes as many as fit the GPU, or 8 without one."""
    learning_rate: float = 1e-2
    """Peak learning rate of projector and instruction token; try 1e-3 for LLMs above 1B, or if the loss diverges."""
    query_learning_rate: float = 1e-4
    """Peak learning rate of the query encoder, which is pretrained."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    warmup: float = 0.05
    """Share of the steps over which the rates rise; after that they fall linearly to 0."""
    persona_warmup: int = 100
    """Steps over which the persona rises to its full strength: first, the plug learns what all requests share."""
    max_gradient_norm: float = 1.0
    """Clip the gradients of a step to this norm; 0 clips nothing."""
    history_dropout: float = 0.25
    """Drop up to this share of each history, drawn anew each epoch."""
    empty_history: float = 0.05
    """Share of requests trained without a history, for users who have none; 1 is prompt tuning (the control)."""
    alignment: float = 0.12
    """For this first share of steps, replace the history with the target's embedding (xRAG); 0 with --retrieve."""
    contrast: float = 0.0
    """Weight of a loss that prefers the own history to another user's; costs a second forward and backward pass."""
    preference: float = 0.0
    """The β of a loss that prefers the target to --rejected (DPO); costs a second forward and backward pass."""
    nll_weight: float = 1.0
    """Weight of the targets' own loss (PPlug eq. 6) beside --preference; 0 leaves it out, as PsPLUG does."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage 1, 2 or 3; take 3 when the LLM does not fit one GPU."""
    warm_start: Literal["none", "vocabulary"] = "vocabulary"
    """Start the projector near the LLM's word embeddings (needs no labels), or at random as in the paper."""
    seed: int = 0
    """Seed of the initial weights, the order of requests and the dropout."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "epochs", "global_batch", *(["micro_batch"] if self.micro_batch != "auto" else []))
        if self.zero_stage not in (1, 2, 3):
            raise UsageError(f"--zero-stage {self.zero_stage}: must be 1, 2 or 3")
        if self.zero_stage == 3 and self.micro_batch == "auto":
            raise UsageError("--micro-batch auto is for --zero-stage 1 and 2; give a number with --zero-stage 3")
        for name in ("warmup", "history_dropout", "alignment"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{given(self, name)}: must be at least 0 and below 1")
        if not 0 <= self.empty_history <= 1:
            raise UsageError(f"--empty-history {self.empty_history}: must be from 0 to 1")
        check_above_zero(self, "learning_rate", "query_learning_rate")
        if not 0 <= self.max_gradient_norm < math.inf:
            raise UsageError(f"--max-gradient-norm {self.max_gradient_norm}: must be 0 (clips nothing) or more")
        for name in ("persona_warmup", "weight_decay", "contrast", "preference", "nll_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{given(self, name)}: must be 0 or more")
        if not self.preference:
            check_default(self, "nll_weight", needs="--preference")
        if self.empty_history == 1 and (self.alignment or self.contrast):
            name, value = ("alignment", self.alignment) if self.alignment else ("contrast", self.contrast)
            raise UsageError(f"--empty-history 1 leaves no history for --{name} {value}; add --{name} 0")

    def n_steps(self, n_requests: int) -> int:
        """Optimizer steps of a whole run over so many training requests."""
        return self.epochs * (n_requests // self.global_batch)

    def check_workers(self, n_workers: int) -> None:
        """Raises UsageError when a global batch cannot be split evenly over this many workers."""
        if n_workers < 1:
            raise UsageError(f"--workers {n_workers}: must be 1 or more")
        share, rest = divmod(self.global_batch, n_workers)
        if rest or share % self.pass_size(share):
            size = self.micro_batch
            passes = "" if size == "auto" else f" × --micro-batch {size} = {n_workers * size}"
            raise UsageError(
                f"--global-batch {self.global_batch} is not a multiple of --workers {n_workers}{passes}; change one of "
                "them"
            )
        if self.contrast and share % 2:
            raise UsageError(f"--contrast {self.contrast} pairs a worker's requests: {share} a step must be even")

    def pass_size(self, share: int) -> int:
        """Requests per forward pass of a worker that has `share` requests of each batch; auto counts as the least."""
        return 1 if self.micro_batch == "auto" else min(self.micro_batch, share)


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """What a GPU costs and how fast it is, from which a job computes the cost of a run."""

    gpu_hour_price: float | None = None
    """Price of a GPU-hour in your currency; the summary and --dry-run then show the cost of the run."""
    tflops: float | None = None
    """Measured speed of one GPU with your model, in 10¹² operations a second; --dry-run then shows hours."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        for name in ("gpu_hour_price", "tflops"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UsageError(f"{given(self, name)}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are decoded; part of the fingerprint of every answer."""

    max_new_tokens: int = 128
    """Cut answers after this many tokens."""
    beams: int = 4
    """Beams of the beam search; 1 is greedy and faster."""
    sample: bool = False
    """Draw answers at random, with one seed per request; needs --beams 1."""
    sampling_temperature: float = 1.0
    """Temperature of --sample; below 1 makes answers more predictable."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this probability; needs --sample."""
    seed: int = 0
    """Seed of --sample; a request gets the same answer in any batch on the same kind of device."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "max_new_tokens")
        if self.beams < 1:
            raise UsageError(f"--beams {self.beams}: must be 1 (greedy) or more")
        if self.sample and self.beams > 1:
            raise UsageError(f"--sample draws one answer per request and needs --beams 1, not {self.beams}")
        check_above_zero(self, "sampling_temperature")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if not self.sample:
            check_default(self, "sampling_temperature", "top_p", "seed", needs="--sample")

    def facts(self) -> dict[str, Any]:
        """The settings that an answer depends on; what only sampling uses is left out without it."""
        return asdict(self) if self.sample else {"max_new_tokens": self.max_new_tokens, "beams": self.beams}

    def row_seed(self, request_id: str) -> int:
        """The seed of one request's sampling: the same in any batch, on any worker."""
        digest = hashlib.blake2b(f"{self.seed}\0{request_id}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "little")


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Texts of the user's own history in the prompt, in front of the input; off by default."""

    retrieve: int = 0
    """Put this many of the user's past texts in front of the input; needs --texts."""
    retriever: Retriever = "recency"
    """Choose the latest texts, those that share the query's words (BM25), or those nearest by the store's encoder."""
    retrieve_tokens: int = 256
    """Tokens of all retrieved texts together, shared equally."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        if self.retrieve < 0:
            raise UsageError(f"--retrieve {self.retrieve}: must be 0 (none) or more")
        if self.retrieve_tokens < max(self.retrieve, 1):
            raise UsageError(
                f"--retrieve-tokens {self.retrieve_tokens}: must be at least one a text, so {max(self.retrieve, 1)} "
                "or more"
            )
        if not self.retrieve:
            check_default(self, "retriever", "retrieve_tokens", needs="--retrieve")

    @property
    def front_tokens(self) -> int:
        """Tokens of retrieved texts in front of a prompt."""
        return self.retrieve_tokens if self.retrieve else 0

    def answers_of(self, persona: str) -> str:
        """The default name of the answers under a persona, like `own` or `own-bm25-4`."""
        return f"{persona}-{self.retriever}-{self.retrieve}" if self.retrieve else persona


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How the answers of a task are scored.

    `label`: one of `labels`, by accuracy and macro-F1. `rating`: a number from 1 to 5, by MAE and RMSE. `text`: free
    text, by ROUGE-1 and ROUGE-L. `long_text`: the same, and METEOR.
    """

    kind: Literal["label", "rating", "text", "long_text"]
    labels: tuple[str, ...] = ()


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
