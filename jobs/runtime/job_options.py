"""Groups of flags that several jobs share; a job's config holds them as fields, and the CLI flattens them into flags.

Each group checks itself when it is made and raises UsageError naming the flag. Each field's docstring is its line in
`--help`.
"""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from cyclopts import Parameter

from persona.errors import UsageError
from persona.option_checks import check_at_least, check_default
from persona.options import MAX_ROW_MB, SPREAD, Precision, RetrievalOptions, TimeUnit, TrainingOptions

FLAT = Parameter(name="*")
"""Annotates a field that holds a group: `--beams` instead of `--decoding.beams`."""


@dataclass(frozen=True, kw_only=True)
class InputRows:
    """How many rows a job takes from its input, and how many of them may be bad."""

    max_reject_fraction: float = 0.01
    """Exit with code 3 when a larger share of the rows is bad; all good rows are processed first."""
    limit: int | None = None
    """Take only this many rows of the input, for a trial run."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_reject_fraction(self.max_reject_fraction)
        check_limit(self.limit)


def check_reject_fraction(fraction: float) -> None:
    """Raises UsageError for what is no share."""
    if not 0 <= fraction <= 1:
        raise UsageError(f"--max-reject-fraction {fraction}: must be from 0 to 1")


def check_limit(limit: int | None) -> None:
    """Raises UsageError for a limit below 1."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: must be 1 or more; leave it out for everything")


def check_buckets(n_buckets: int | None) -> None:
    """Raises UsageError for more buckets than the order of an exchange can tell apart."""
    from persona.inputs.place import MAX_BUCKETS

    if n_buckets is not None and not 1 <= n_buckets <= MAX_BUCKETS:
        raise UsageError(f"--buckets {n_buckets}: must be from 1 to {MAX_BUCKETS:,}")


@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """Which files of the inputs are read, and how."""

    exclude: tuple[str, ...] = ()
    """Leave out input files and folders whose name or path matches one of these patterns, like '*.csv'."""
    timestamp_unit: TimeUnit = "s"
    """Unit of timestamps that are numbers, counted since 1970: s, ms, us or ns."""
    max_row_mb: int = MAX_ROW_MB
    """Reject a longer row or line of the input; raise it where one holds the whole history of a very busy user."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "max_row_mb")


@dataclass(frozen=True, kw_only=True)
class RequestFormat(InputFormat):
    """The same for jobs that read requests, and the names of their columns."""

    request_columns: str = ""
    """Names of the columns of --requests where they differ: input=prompt,as_of=asked_at."""


@dataclass(frozen=True, kw_only=True)
class ActorPool:
    """How many actors hold a model, and what each one takes."""

    actors: int | None = None
    """Number of actors that hold a model; default one per GPU, or one per core, and no more than blocks of rows."""
    cpus_per_actor: int = 1
    """Least cores per actor where there is no GPU; raise it for models that do not fit memory once per core."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "actors", "cpus_per_actor")


@dataclass(frozen=True, kw_only=True)
class LLMPool(ActorPool):
    """The same for actors that hold an LLM."""

    gpus_per_actor: int = 1
    """GPUs of each actor, all on one node; raise it for an LLM that does not fit one GPU, to spread its layers."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        super().__post_init__()
        check_at_least(self, 1, "gpus_per_actor")

    @property
    def device(self) -> str | None:
        """Where an actor's LLM is loaded, as of `FrozenLLM.load`."""
        return SPREAD if self.gpus_per_actor > 1 else None


@dataclass(frozen=True, kw_only=True)
class PlugModels:
    """The models of a trained plug, where they differ from what the plug records."""

    llm: str | None = None
    """Folder or hub id of the plug's LLM, if it is not where the plug was trained."""
    encoder: str | None = None
    """Folder or hub id of the plug's encoder, if it is not where the plug was trained."""
    precision: Precision = "auto"
    """Precision of the LLM; auto is bf16 where the hardware supports it."""


@dataclass(frozen=True, kw_only=True)
class PastTexts:
    """The texts of the users' histories, which the store does not hold."""

    texts: str | None = None
    """The histories given to jobs.embed, local or s3://; needed because the store holds no texts."""
    columns: str = ""
    """Names of the columns of --texts where they differ: text=body,user_id=author."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        if self.columns and self.texts is None:
            raise UsageError("--columns names the columns of --texts, which is not given")

    def check_enough_for(self, retrieval: RetrievalOptions) -> None:
        """Raises UsageError when texts are to be retrieved and there are none."""
        if retrieval.retrieve and self.texts is None:
            raise UsageError(f"--retrieve {retrieval.retrieve} needs --texts: the store holds vectors, not texts")

    def check_used_by(self, retrieval: RetrievalOptions) -> None:
        """Raises UsageError for texts that nothing is retrieved from."""
        if self.texts is not None and not retrieval.retrieve:
            raise UsageError("--texts has no effect without --retrieve; give a number of texts, or leave it out")


@dataclass(frozen=True, kw_only=True)
class PreferenceInputs:
    """What the preference loss compares the targets with."""

    rejected: str | None = None
    """Column of --requests with a worse answer, for --preference; jobs.pair takes it from stored answers."""
    reference: tuple[str, ...] = ()
    """Folders of jobs.evaluate --persona bare --rejected COLUMN: the losses without the plug, for --preference."""

    def check_used_by(self, training: TrainingOptions) -> None:
        """Raises UsageError for a preference without its inputs, and for inputs without a preference."""
        if training.preference and not (self.rejected and self.reference):
            missing = "--reference" if self.rejected else "--rejected"
            raise UsageError(f"--preference {training.preference} needs {missing}; see docs/style.md")
        if not training.preference:
            check_default(self, "rejected", "reference", needs="--preference")


def flat_settings(config: Any) -> dict[str, Any]:
    """The values of a config by flag name, with _ for -; those of groups stand beside its own."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        found |= flat_settings(value) if is_dataclass(value) else {field.name: value}
    return found
