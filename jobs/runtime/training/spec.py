"""What defines a training run, and what each of its workers gets."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from jobs.runtime.job_options import PastTexts, PreferenceInputs, RequestFormat
from persona.errors import UsageError
from persona.options import (
    PlugOptions,
    Precision,
    PromptOptions,
    Quantization,
    RetrievalOptions,
    Select,
    TrainingOptions,
)

if TYPE_CHECKING:
    from jobs.runtime.tally import Tally
    from jobs.runtime.training.windows import Windows
    from persona.models.resolve import ModelFolder
    from persona.store.identity import Identity

# A run that is older than an option had it off, which is what a new option's default must mean.
OPTIONS = (PlugOptions, TrainingOptions, PromptOptions, RetrievalOptions, PastTexts, PreferenceInputs, RequestFormat)
# What else must stay the same when a run is resumed.
_FIXED = (
    "requests",
    "validation",
    "validation_fraction",
    "validation_rows",
    "query_prompt",
    "max_query_tokens",
    "max_input_tokens",
    "max_target_tokens",
    "max_behaviors",
    "precision",
    "llm_quantization",
    "limit",
)


def check_together(*, quantization: Quantization, zero_stage: int, recomputes: bool, compiles: bool) -> None:
    """Raises UsageError for ways to run the LLM that exclude each other."""
    if quantization != "none" and zero_stage == 3:
        raise UsageError(
            f"--llm-quantization {quantization} and --zero-stage 3 exclude each other: one makes the LLM fit one GPU, "
            "the other spreads it over several; remove one of them"
        )
    others = {
        f"--llm-quantization {quantization}": quantization != "none",
        "--zero-stage 3": zero_stage == 3,
        "--activation-checkpointing": recomputes,
    }
    excluded = [flag for flag, is_given in others.items() if is_given]
    if compiles and excluded:
        raise UsageError(f"--compile and {excluded[0]} exclude each other; remove one of them")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """The choices behind a plug; fields are named like the flags of jobs.train, which describes them.

    In `prompt`, `auto` has become `chat` or `plain`.
    """

    run: str
    plug_options: PlugOptions
    training: TrainingOptions
    prompt: PromptOptions
    retrieval: RetrievalOptions
    past_texts: PastTexts
    preferences: PreferenceInputs
    requests: str
    form: RequestFormat
    limit: int | None
    validation: str | None
    validation_fraction: float
    validation_rows: int
    validate_every: int
    patience: int
    select: Select
    query_prompt: str
    max_query_tokens: int
    max_input_tokens: int
    max_target_tokens: int
    max_behaviors: int
    precision: Precision
    llm_quantization: Quantization
    activation_checkpointing: bool
    compile: bool

    def check_gpus(self, n_gpus: int) -> None:
        """Raises UsageError for choices that need a GPU."""
        if self.compile and not n_gpus:
            raise UsageError("--compile is for GPUs, and Ray has none; leave it out")

    def fixed(self) -> dict[str, Any]:
        """What must stay the same when the run is resumed, by name, as it is read back from JSON."""
        options = (self.plug_options, self.training, self.prompt, self.retrieval, self.past_texts, self.preferences)
        values = {name: value for part in (*options, self.form) for name, value in asdict(part).items()}
        values |= {name: getattr(self, name) for name in _FIXED}
        del values["micro_batch"]  # losses do not depend on it
        return {name: read_back(value) for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a training worker gets.

    Attributes:
        n_workers: of the run; n_threads: of this worker's process.
        n_steps: optimizer steps of the whole run, for which the learning rate is planned.
        encoder, llm: as found on the driver; a worker finds them on its own node and compares fingerprints.
        identity: of the store.
        behaviors: vectors of some behaviors that the requests see, in the store's bytes.
        windows: where the steps come from.
        tally: the counts of the run.
        reports_steps: whether to report the numbers of every step for a tracker.
        longest: `inputs.longest_request`; None if --micro-batch gives a number or there is no GPU.
    """

    spec: RunSpec
    n_workers: int
    n_threads: int
    n_steps: int
    encoder: "ModelFolder"
    llm: "ModelFolder"
    identity: "Identity"
    behaviors: bytes
    windows: "Windows"
    tally: "Tally"
    reports_steps: bool
    longest: Mapping[str, Any] | None

    @property
    def share(self) -> int:
        """Requests of a worker in each global batch."""
        return self.spec.training.global_batch // self.n_workers

    def with_micro_batch(self, size: int) -> "WorkerSettings":
        """The same with a settled size of a pass."""
        training = replace(self.spec.training, micro_batch=size)
        return replace(self, spec=replace(self.spec, training=training))


def read_back(value: Any) -> Any:
    """A setting as it is read back from JSON, where tuples become lists."""
    return json.loads(json.dumps(value))
