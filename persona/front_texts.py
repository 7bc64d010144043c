"""The choice of texts in front of a request; jobs build their flags from this class, as from `persona.options`."""

from dataclasses import dataclass

from persona.errors import UsageError
from persona.option_checks import check_at_least, check_default
from persona.options import RetrievalOptions


@dataclass(frozen=True, kw_only=True)
class FrontTexts(RetrievalOptions):
    """Texts of the user in the prompt, in front of the input: past texts, or the user's profile; off by default."""

    user_profile: str | None = None
    """Put the profile of this recipe (see jobs.profile) in front of the input, where it is older than the request."""
    user_profile_tokens: int = 512
    """Tokens of the whole profile, shared equally by its description and its demonstrations."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        super().__post_init__()
        check_at_least(self, 1, "user_profile_tokens")
        if self.user_profile is None:
            check_default(self, "user_profile_tokens", needs="--user-profile")
        elif self.retrieve:
            raise UsageError("--user-profile and --retrieve both put texts in front of the input; give one of them")

    @property
    def front_tokens(self) -> int:
        """Tokens of all texts in front of a prompt."""
        return super().front_tokens if self.user_profile is None else self.user_profile_tokens

    def answers_of(self, persona: str) -> str:
        """The default name of the answers under a persona, like `own` or `own-profile-likelihood`."""
        if self.user_profile is None:
            return super().answers_of(persona)
        return f"{persona}-profile-{self.user_profile}"
