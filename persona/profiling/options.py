"""How profiles are made; jobs build their flags from this class, so it imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from persona.errors import UsageError
from persona.option_checks import check_at_least, given

By = Literal["likelihood", "chat"]


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """How a user's preference pairs become a profile."""

    by: By = "likelihood"
    """Choose demonstrations by the likelihood of a frozen LLM (--llm), or let a strong LLM reason (--chat-model)."""
    recipe: str | None = None
    """Name of the profiles in the table, for generate and evaluate --user-profile; default the value of --by."""
    min_pairs: int = 5
    """A user with fewer pairs gets no profile, and is counted."""
    max_pairs: int = 32
    """Use at most this many pairs of a user, the newest ones; bounds what a user costs."""
    holdout: float = 0.0
    """Keep this share of each user's newest pairs out of the profile, and measure its accuracy on them."""
    candidates: int = 10
    """Random sets of demonstrations per user that are tried on the validation pairs."""
    demonstrations: int = 4
    """Most demonstrations of a profile."""
    seed: int = 0
    """Seed of the random sets."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 2, "min_pairs")
        check_at_least(self, 1, "candidates", "demonstrations")
        if self.max_pairs < self.min_pairs:
            raise UsageError(f"{given(self, 'max_pairs')}: must be at least --min-pairs, which is {self.min_pairs}")
        if not 0 <= self.holdout < 1:
            raise UsageError(f"{given(self, 'holdout')}: must be at least 0 and below 1")
        if self.recipe is not None and not self.recipe.strip():
            raise UsageError("--recipe is empty; give a name, or leave it out")

    @property
    def name(self) -> str:
        """The name of the profiles in the table."""
        return self.recipe or self.by
