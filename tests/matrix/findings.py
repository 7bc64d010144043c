"""What a comparison finds about a model."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The model is refused with a message; or what failed (nothing: it works), and the limits within which it works."""

    refused: str = ""
    failures: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """One line for the page."""
        if self.refused:
            return f"refused: {self.refused}"
        if self.failures:
            return f"fails: {'; '.join(self.failures)}"
        return "; ".join(["works", *self.limits])


def message(error: Exception, folder: Path) -> str:
    """The error's text, the same in any folder; of a refusal, the reason alone."""
    text = " ".join(str(error).replace(str(folder), "MODEL").split()).partition("; supported are ")[0]
    return text.partition("which is not supported: ")[2].partition("; choose another")[0] or text
